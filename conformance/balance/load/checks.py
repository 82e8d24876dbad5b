"""conformance, balance: load. Counts, balance losses and the z-loss."""

from dataclasses import replace

import numpy as np

from conformance.balance.bounds import (
    Loss,
    loss_radius,
    wanted_loss,
    wanted_z_loss,
    z_loss_radius,
)
from conformance.balance.case import LENGTHS, BalanceCase
from conformance.balance.draw import cut, ids_of_kind, logits_of_kind
from conformance.balance.kind import requires
from conformance.balance.predicates import SOME_UNUSED
from conformance.balance.verdicts import (
    counts_of_subject,
    hold_arrays,
    hold_balance,
    hold_counts,
    hold_cut_z_losses,
    hold_gradient,
    hold_loss,
    loss_of_subject,
    z_loss_of_subject,
)
from conformance.core.check import given
from conformance.core.judge import Judge
from moe_ref import BalanceSpec, tokens_per_expert

# counts


def without_null(spec) -> bool:
    return not spec.num_null_experts


def hold_counts_of_slots(judge: Judge, case: BalanceCase) -> None:
    """The counts are those of the slots."""
    wanted_E = tokens_per_expert(case.expert_ids_TK, case.spec.num_experts)
    hold_counts(judge, case, wanted_E, "not the counts of the slots")


@requires("LOD-1", method="load", ids=("own", "collapsed", "unused"), tokens=(12, 1, 0))
def counting_returns_an_integer_for_each_expert(judge, case):
    counts_of_subject(judge, case)


@requires("LOD-2", method="load", spec=without_null, after=("LOD-1",))
def every_slot_is_counted(judge, case):
    hold_counts_of_slots(judge, case)


@requires("LOD-3", method="load", ids=("unused", "idle"), spec=lambda s: s.top_k > 1, after=("LOD-1",))
def unused_slots_and_null_choices_are_counted_for_nobody(judge, case):
    hold_counts_of_slots(judge, case)


@requires("LOD-4", method="load", spec=without_null, after=("LOD-1",))
def counting_again_counts_the_same(judge, case):
    hold_counts(judge, case, counts_of_subject(judge, case), "other counts on the second call")


def few_tokens(case: BalanceCase) -> BalanceCase:
    """The first tokens of the case."""
    return case.tokens(np.arange(min(case.num_tokens, 12)))


EDGES = (65_537, 2**24 + 1, 65_536, 65_535, 2049, 2048, 2047, 257, 256, 255)
"""Of what 16 bits, float32, float16, bfloat16 and a byte hold."""


@requires(
    "LOD-29",
    method="load",
    ids=("collapsed", "own", "unused"),
    tokens=(257,),
    sizes=EDGES,
    spec=lambda s: s.top_k == 1,
    after=("LOD-1",),
    simpler=((few_tokens, ("LOD-2", "LOD-3", "LOD-4")),),
)
def counts_are_exact_at_any_size(judge, case):
    hold_counts_of_slots(judge, case)


@requires("LOD-36", method="load", spec=lambda s: s.top_k > 1, ids=("own", "unused"), after=("LOD-1",))
def counting_changes_no_array(judge, case):
    hold_arrays(judge, case, counts_of_subject, {"expert_ids": case.expert_ids_TK})


# balance losses

FORM = ("LOD-5",)
ONE_PART = given(
    "judged without shards, where no scope makes a difference",
    lambda case: case.spec.balance.scope == "global" or "tokens_per_shard" not in case.inputs,
)
ONE_SEQUENCE = given(
    "judged on one sequence, where no unit makes a difference",
    lambda case: case.spec.balance.per == "batch" or "sequence_lengths" not in case.inputs,
)
SEVERAL_SHARDS = given("judged on several shards", lambda case: len(case.inputs.get("tokens_per_shard", ())) > 1)


def all_slots(spec) -> bool:
    """All slots of the given choice are counted."""
    b = spec.balance
    return b.counts == "routed" and b.counted_slots is None and b.target_top_k is None


def one_batch(spec) -> bool:
    """A loss of one batch in which all slots of the given choice are counted."""
    return spec.balance.per == "batch" and spec.balance.scope == "global" and all_slots(spec)


def of_slots(spec) -> bool:
    """The loss of the paper: shares of the slots times softmax scores."""
    return one_batch(spec) and spec.balance.counts_over == "slots" and spec.balance.score_func == "softmax"


@requires("LOD-5", method="balance_loss", inputs=LENGTHS)
def a_balance_loss_is_a_number_with_a_gradient(judge, case):
    loss_of_subject(judge, case)


@requires("LOD-6", method="balance_loss", spec=of_slots, after=FORM)
def the_loss_is_the_sum_of_shares_times_mean_scores(judge, case):
    hold_balance(judge, case, "not the sum over experts of f * P")


@requires("LOD-7", method="balance_loss", spec=lambda s: s.balance.score_func != "softmax" and one_batch(s), after=FORM)
def scores_are_made_of_the_logits_once(judge, case):
    hold_balance(judge, case, "not the loss of these scores")


@requires("LOD-8", method="balance_loss", spec=lambda s: one_batch(s) and s.top_k > 1, after=FORM)
def f_is_a_share_of_slots_or_of_tokens(judge, case):
    hold_balance(judge, case, "not with that f")


@requires(
    "LOD-9",
    method="balance_loss",
    ids=("own",),
    spec=lambda s: not all_slots(s) and s.balance.target_top_k is None,
    given=(ONE_PART, ONE_SEQUENCE),
    after=(*FORM, "LOD-6"),
)
def the_slots_that_the_spec_names_are_counted(judge, case):
    hold_balance(judge, case, "not the loss of these counts")


def plain_router(case: BalanceCase) -> BalanceCase | None:
    """The same logits and choice, of a router that does nothing else."""
    return case.with_(spec=replace(case.spec, router=None)) if case.spec.router is not None else None


@requires(
    "LOD-27",
    method="balance_loss",
    routers=True,
    spec=lambda s: s.router is not None,
    after=FORM,
    simpler=((plain_router, ("LOD-6", "LOD-7", "LOD-8", "LOD-9")),),
)
def nothing_else_of_the_router_reaches_a_loss(judge, case):
    hold_balance(judge, case, "not the loss of the scaled logits by its own scores", gradient=True)


@requires(
    "LOD-10",
    method="balance_loss",
    routers=True,
    spec=one_batch,
    after=(*FORM, "LOD-6", "LOD-7", "LOD-8", "LOD-27"),
)
def the_bias_enters_no_score_of_a_loss(judge, case):
    found = loss_of_subject(judge, case, expert_bias_E=case.expert_bias_E)
    hold_loss("changed by expert_bias", found, wanted_loss(case), loss_radius(judge, case))


def one_sequence(case: BalanceCase) -> BalanceCase:
    """The same tokens as one sequence."""
    return case.with_inputs(sequence_lengths=None)


def one_shard(case: BalanceCase) -> BalanceCase | None:
    """The same tokens on one shard, where no scope makes a difference."""
    balance = case.spec.balance
    if balance is None or balance.scope == "global":
        return None
    return case.with_(spec=replace(case.spec, balance=balance.replace(scope="global"))).with_inputs(
        tokens_per_shard=None
    )


@requires(
    "LOD-11",
    method="balance_loss",
    inputs=LENGTHS,
    spec=lambda s: s.balance.per == "sequence" and s.balance.scope == "global",
    after=FORM,
    simpler=((one_sequence, ("LOD-9",)),),
)
def the_loss_of_sequences_is_the_mean_of_theirs(judge, case):
    hold_balance(judge, case, "not the mean over sequences")


@requires(
    "LOD-12",
    method="balance_loss",
    inputs=LENGTHS,
    after=(*FORM, "LOD-6", "LOD-7", "LOD-8", "LOD-9", "LOD-11", "LOD-14", "LOD-26"),
)
def the_gradient_is_that_of_the_loss(judge, case):
    found, radius = loss_of_subject(judge, case), loss_radius(judge, case)
    hold_gradient("not the gradient of the loss", found, wanted_loss(case), radius)


@requires(
    "LOD-13",
    method="balance_loss",
    inputs=("sequence_lengths",),
    routers=True,
    spec=lambda s: s.balance.scope == "global",
    tokens=(12,),
    after=(*FORM, "LOD-6", "LOD-7", "LOD-8", "LOD-9", "LOD-11", "LOD-12", "LOD-27"),
)
def a_global_loss_does_not_depend_on_the_cut(judge, case):
    radius, evenly = loss_radius(judge, case), judge.subject.compiles
    for seed in range(2):
        lengths = cut(case.num_tokens, np.random.default_rng([case.seed, seed]), evenly=evenly)
        found = loss_of_subject(judge, case.with_inputs(tokens_per_shard=lengths))
        hold_loss(f"another loss on shards of {lengths} tokens", found, wanted_loss(case), radius)


@requires(
    "LOD-14",
    method="balance_loss",
    inputs=LENGTHS,
    spec=lambda s: s.balance.scope in ("local", "running_mean"),
    given=(SEVERAL_SHARDS,),
    after=(*FORM, "LOD-9"),
    simpler=((one_shard, ("LOD-11",)),),
)
def a_local_loss_is_the_mean_over_shards(judge, case):
    hold_balance(judge, case, "not the mean over shards")


@requires(
    "LOD-26",
    method="balance_loss",
    inputs=LENGTHS,
    spec=lambda s: s.balance.scope == "running",
    given=(SEVERAL_SHARDS,),
    after=(*FORM, "LOD-9"),
)
def a_running_f_is_a_share_of_all_slots_so_far(judge, case):
    hold_balance(judge, case, "not the share of all counts so far in all slots so far")


@requires("LOD-15", method="balance_loss", inputs=LENGTHS, tokens=(12,), after=FORM)
def the_same_input_gives_the_same_loss(judge, case):
    first, second = loss_of_subject(judge, case), loss_of_subject(judge, case)
    hold_loss("another loss on the second call", second, first, Loss.zero(case))


@requires("LOD-16", method="z_loss", spec=without_null)
def the_z_loss_is_the_mean_square_of_log_sum_exp(judge, case):
    found = z_loss_of_subject(judge, case)
    hold_loss("not the z-loss", found, wanted_z_loss(case), z_loss_radius(judge, case), gradient=False)


@requires("LOD-17", method="z_loss", spec=without_null, after=("LOD-16",))
def the_gradient_of_the_z_loss(judge, case):
    found = z_loss_of_subject(judge, case)
    hold_gradient("not the gradient of the z-loss", found, wanted_z_loss(case), z_loss_radius(judge, case))


@requires(
    "LOD-28",
    method="z_loss",
    spec=lambda s: without_null(s) and s.top_k == 2,
    tokens=(12,),
    after=("LOD-16", "LOD-17"),
)
def the_z_loss_does_not_depend_on_the_cut(judge, case):
    hold_cut_z_losses(judge, case)


def ordinary(case: BalanceCase) -> BalanceCase:
    """The same case with ordinary logits."""
    return case.with_(logits_TE=logits_of_kind("normal", case.logits_TE.shape, case.rng()))


@requires(
    "LOD-32",
    method="z_loss",
    logits=("large", "saturated", "negative", "barred"),
    spec=without_null,
    simpler=((ordinary, ("LOD-16", "LOD-17")),),
)
def the_z_loss_of_extreme_logits_is_finite(judge, case):
    found = z_loss_of_subject(judge, case)
    hold_loss("not the z-loss of these logits", found, wanted_z_loss(case), z_loss_radius(judge, case))


@requires(
    "LOD-31",
    method="balance_loss",
    logits=("barred",),
    after=FORM,
    simpler=((ordinary, ("LOD-6", "LOD-7", "LOD-8", "LOD-9", "LOD-11", "LOD-12", "LOD-14", "LOD-26")),),
)
def an_expert_at_minus_infinity_has_no_score(judge, case):
    hold_balance(judge, case, "not the loss of the other experts", gradient=True)


def used(case: BalanceCase) -> BalanceCase:
    """The same case with every slot used."""
    ids_TK = ids_of_kind("own", case.logits_TE, case.spec, case.rng())
    return case.with_(expert_ids_TK=ids_TK)


@requires(
    "LOD-33",
    method="balance_loss",
    ids=("unused", "idle"),
    spec=one_batch,
    given=(SOME_UNUSED,),
    after=FORM,
    simpler=((used, ("LOD-6", "LOD-7", "LOD-8", "LOD-12")),),
)
def an_unused_slot_is_counted_for_nobody_in_a_loss(judge, case):
    hold_balance(judge, case, "not the loss of the used slots", gradient=True)


NOTHING = (0,)


def switch_or_transformers(spec) -> bool:
    """The two losses of one batch that are most used; an empty batch is alike for all."""
    return spec.balance in (BalanceSpec(), BalanceSpec.of("transformers"))


@requires("LOD-34", method="balance_loss", tokens=NOTHING, spec=switch_or_transformers)
def no_token_has_the_loss_0(judge, case):
    hold_loss("not 0 without a token", loss_of_subject(judge, case), Loss.zero(case), Loss.zero(case))


@requires("LOD-35", method="z_loss", tokens=NOTHING, spec=lambda s: without_null(s) and s.top_k == 2)
def no_token_has_the_z_loss_0(judge, case):
    hold_loss("not 0 without a token", z_loss_of_subject(judge, case), Loss.zero(case), Loss.zero(case))


@requires("LOD-37", method="balance_loss", ids=("own", "unused"), after=FORM)
def a_balance_loss_changes_no_array(judge, case):
    hold_arrays(judge, case, loss_of_subject, {"logits": case.logits_TE, "expert_ids": case.expert_ids_TK})


@requires("LOD-38", method="z_loss", spec=without_null)
def a_z_loss_changes_no_array(judge, case):
    hold_arrays(judge, case, z_loss_of_subject, {"logits": case.logits_TE})


@requires(
    "LOD-18",
    method="balance_loss",
    logits=("large", "saturated", "negative"),
    spec=one_batch,
    after=FORM,
    simpler=((ordinary, ("LOD-6", "LOD-7", "LOD-8", "LOD-12")),),
)
def large_logits_have_finite_losses(judge, case):
    hold_balance(judge, case, "not the loss of large logits", gradient=True)


LAYERS = 2
EVEN = given("judged on rows that two layers share", lambda case: case.num_tokens > 0 and case.num_tokens % LAYERS == 0)


@requires(
    "LOD-51",
    method="balance_loss",
    spec=lambda s: s.balance.per == "batch",
    tokens=(12,),
    given=(EVEN,),
    after=FORM,
)
def the_loss_of_layers_is_a_sum_or_that_of_one_batch(judge, case):
    # Held against the subject's own losses: what one layer has wrong is told by others.
    found = loss_of_subject(judge, case, num_layers=LAYERS)
    rows = np.split(np.arange(case.num_tokens), LAYERS)
    pooled = case.spec.balance.over_layers == "pooled"
    parts = [case] if pooled else [case.tokens(own_T) for own_T in rows]
    losses = [loss_of_subject(judge, part) for part in parts]
    radii = [loss_radius(judge, part) for part in parts]
    wanted, radius = (
        Loss(loss=np.sum([each.loss for each in some]), d_logits_TE=np.concatenate([each.d_logits_TE for each in some]))
        for some in (losses, radii)
    )
    twice = Loss(loss=2 * radius.loss, d_logits_TE=2 * radius.d_logits_TE)
    title = "not the loss of the tokens of all layers as one batch" if pooled else "not the sum of the losses of each"
    hold_loss(title, found, wanted, twice)
