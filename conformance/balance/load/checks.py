"""conformance, suite: load. Counts, balance losses, z-loss and the update of expert_bias."""

import numpy as np

from conformance.balance.draw import cut
from conformance.balance.verdicts import (
    counted,
    hold_gradient,
    hold_loss,
    loss_radius,
    lost,
    moved,
    wanted_loss,
    wanted_z,
    z_lost,
    z_radius,
)
from conformance.core.check import requires
from conformance.core.judge import NotRun, Violation
from conformance.core.rounding import EPSILON
from conformance.layer.verdicts import blaming, shown
from moe_ref import BiasUpdateSpec, bias_update, tokens_per_expert

CUTS = ("sequence_lengths", "tokens_per_shard")
FORM = ("LOD-5",)


def plain(spec) -> bool:
    """A loss of one batch in which all slots of the given choice are counted."""
    b = spec.balance
    return b.per == "batch" and b.scope == "global" and b.counts == "routed" and b.counted_slots is None


def all_slots(spec) -> bool:
    """Whether all slots of the given choice are counted."""
    return spec.balance.counts == "routed" and spec.balance.counted_slots is None


def of_slots(spec) -> bool:
    return plain(spec) and spec.balance.counts_over == "slots" and spec.balance.score_func == "softmax"


def hold_counts(judge, case) -> None:
    """The counts are those of the slots."""
    found_E, wanted_E = counted(judge, case), tokens_per_expert(case.expert_ids_TK, case.spec.num_experts)
    if (found_E != wanted_E).any():
        accuse("not the counts of the slots", expected=str(wanted_E.tolist()), received=str(found_E.tolist()))  # fmt: skip


def hold_balance(judge, case, title: str, *, gradient: bool = False) -> None:
    """The loss is the reference's, and the gradient where it is asked for."""
    hold_loss(case, title, lost(judge, case), wanted_loss(case), loss_radius(judge, case), gradient=gradient)


def hold_bias(judge, case, title: str, *, of_E=True) -> None:
    """The bias is the reference's; a float32 step is rounded, and so is its sum with the bias."""
    update, counts_E = case.spec.update, case.counts_SE.sum(axis=0)
    wanted_E, found_E = bias_update(counts_E, update, case.expert_bias_E), moved(judge, case)
    eps = EPSILON[judge.subject.compute_dtype]
    sizes = {"sign": 1, "proportional": counts_E.max(initial=0), "relative": len(counts_E)}[update.rule]
    radius_E = 16 * eps * (np.abs(case.expert_bias_E) + np.abs(wanted_E) + update.rate * sizes)
    if (~(np.abs(found_E - wanted_E) <= radius_E) & of_E).any():
        before = f"{title}; before {shown(case.expert_bias_E)}, counts {shown(counts_E)}"
        accuse(before, expected=shown(wanted_E), received=shown(found_E))


@requires("LOD-1", method="load", ids=("own", "collapsed", "unused"), tokens=(12, 1, 0))
def test_counting_returns_an_integer_for_each_expert(judge, case):
    counted(judge, case)


@requires("LOD-2", method="load", spec=lambda s: not s.num_null_experts, after=("LOD-1",))
def test_every_slot_is_counted(judge, case):
    hold_counts(judge, case)


@requires("LOD-3", method="load", ids=("unused",), spec=lambda s: s.top_k > 1, after=("LOD-1",))
def test_unused_slots_and_null_choices_are_counted_for_nobody(judge, case):
    hold_counts(judge, case)


@requires("LOD-4", method="load", spec=lambda s: not s.num_null_experts, after=("LOD-1",))
def test_counting_again_counts_the_same(judge, case):
    first_E, second_E = counted(judge, case), counted(judge, case)
    if (first_E != second_E).any():
        accuse("other counts on the second call", expected=str(first_E.tolist()), received=str(second_E.tolist()))  # fmt: skip


@requires("LOD-5", method="balance_loss", inputs=CUTS)
def test_a_balance_loss_is_a_number_with_a_gradient(judge, case):
    lost(judge, case)


@requires("LOD-6", method="balance_loss", spec=of_slots, after=FORM)
def test_the_loss_is_the_sum_of_shares_times_mean_scores(judge, case):
    hold_balance(judge, case, "not the sum over experts of f * P")


@requires("LOD-7", method="balance_loss", spec=lambda s: s.balance.score_func != "softmax" and plain(s), after=FORM)
def test_scores_are_made_of_the_logits_once(judge, case):
    hold_balance(judge, case, "not the loss of these scores")


@requires("LOD-8", method="balance_loss", spec=lambda s: plain(s) and s.top_k > 1, after=FORM)
def test_f_is_a_share_of_slots_or_of_tokens(judge, case):
    hold_balance(judge, case, "not with that f")


@requires("LOD-9", method="balance_loss", inputs=("sequence_lengths",), ids=("own",), after=(*FORM, "LOD-6"),
          spec=lambda s: not all_slots(s))  # fmt: skip
def test_the_slots_that_the_spec_names_are_counted(judge, case):
    if case.spec.balance.scope != "global" and "tokens_per_shard" in case.inputs:
        raise NotRun("judged without shards, where no scope makes a difference")
    hold_balance(judge, case, "not the loss of these counts")


@requires("LOD-10", method="balance_loss", spec=plain, after=(*FORM, "LOD-6", "LOD-7", "LOD-8"))
def test_the_bias_enters_no_score_of_a_loss(judge, case):
    found = lost(judge, case, expert_bias_E=case.expert_bias_E)
    hold_loss(case, "changed by expert_bias", found, wanted_loss(case), loss_radius(judge, case))


@requires("LOD-11", method="balance_loss", inputs=CUTS, after=FORM,
          spec=lambda s: s.balance.per == "sequence" and s.balance.scope == "global")  # fmt: skip
def test_the_loss_of_sequences_is_the_mean_of_theirs(judge, case):
    hold_balance(judge, case, "not the mean over sequences")


@requires("LOD-12", method="balance_loss", inputs=CUTS,
          after=(*FORM, "LOD-6", "LOD-7", "LOD-8", "LOD-9", "LOD-11", "LOD-14"))  # fmt: skip
def test_the_gradient_is_that_of_the_loss(judge, case):
    title = "not the gradient of the loss"
    found, radius = lost(judge, case), loss_radius(judge, case)
    hold_gradient(case, title, found.d_logits_TE, case.d_balance_TE, radius.d_logits_TE)


@requires("LOD-13", method="balance_loss", inputs=("sequence_lengths",), spec=lambda s: s.balance.scope == "global",
          tokens=(12,), after=(*FORM, "LOD-6", "LOD-7", "LOD-8", "LOD-11", "LOD-12"))  # fmt: skip
def test_a_global_loss_does_not_depend_on_the_cut(judge, case):
    radius, evenly = loss_radius(judge, case), judge.subject.compiles
    at = None if evenly else case.inputs.get("sequence_lengths")
    for seed in range(2):
        lengths = cut(case.num_tokens, np.random.default_rng([case.seed, seed]), evenly=evenly, at=at)
        found = lost(judge, case.with_inputs(tokens_per_shard=lengths))
        hold_loss(case, f"another loss on shards of {lengths} tokens", found, wanted_loss(case), radius)


@requires("LOD-14", method="balance_loss", inputs=CUTS, spec=lambda s: s.balance.scope != "global",
          after=(*FORM, "LOD-9"))  # fmt: skip
def test_a_local_loss_is_the_mean_over_shards(judge, case):
    if len(case.inputs.get("tokens_per_shard", ())) < 2:
        raise NotRun("judged on several shards")
    hold_balance(judge, case, "not the mean over shards")


@requires("LOD-15", method="balance_loss", inputs=CUTS, tokens=(12,), after=FORM)
def test_the_same_input_gives_the_same_loss(judge, case):
    first, second = lost(judge, case), lost(judge, case)
    nothing = type(first)(loss=np.zeros(()), d_logits_TE=np.zeros(case.logits_TE.shape))
    hold_loss(case, "another loss on the second call", second, first, nothing)


@requires("LOD-16", method="z_loss", spec=lambda s: not s.num_null_experts)
def test_the_z_loss_is_the_mean_square_of_log_sum_exp(judge, case):
    found = z_lost(judge, case)
    hold_loss(case, "not the z-loss", found, wanted_z(case), z_radius(judge, case), gradient=False)


@requires("LOD-17", method="z_loss", spec=lambda s: not s.num_null_experts, after=("LOD-16",))
def test_the_gradient_of_the_z_loss(judge, case):
    found, radius = z_lost(judge, case), z_radius(judge, case)
    hold_gradient(case, "not the gradient of the z-loss", found.d_logits_TE, wanted_z(case).d_logits_TE,
                  radius.d_logits_TE)  # fmt: skip


@requires("LOD-18", method="balance_loss", logits=("large",), spec=plain, after=FORM)
def test_large_logits_have_finite_losses(judge, case):
    hold_balance(judge, case, "not the loss of large logits", gradient=True)


@requires("LOD-19", method="bias_update", spec=lambda s: s.update == BiasUpdateSpec(rate=s.update.rate))
def test_the_bias_moves_against_the_load(judge, case):
    hold_bias(judge, case.with_(counts_SE=case.counts_SE.sum(axis=0, keepdims=True)), "not one step")


@requires("LOD-20", method="bias_update", spec=lambda s: s.update.rule == "sign", after=("LOD-19", "LOD-23", "LOD-24"))
def test_counts_are_summed_before_the_sign_is_taken(judge, case):
    hold_bias(judge, case, "not the sign of the summed counts")


@requires("LOD-21", method="bias_update", counts=("equal", "one_at_mean", "zero"),
          spec=lambda s: s.update.frozen_E is None)  # fmt: skip
def test_a_balanced_expert_keeps_its_bias(judge, case):
    counts_E = case.counts_SE.sum(axis=0)
    balanced_E = counts_E * len(counts_E) == counts_E.sum()
    hold_bias(judge, case, "an expert with the mean count", of_E=balanced_E)


@requires("LOD-22", method="bias_update", spec=lambda s: s.update.rule != "sign" and s.update.frozen_E is None)
def test_a_proportional_step_is_as_large_as_the_excess(judge, case):
    hold_bias(judge, case, "not in proportion")


@requires("LOD-23", method="bias_update", spec=lambda s: s.update.centred and s.update.frozen_E is None,
          counts=("mixed", "one_at_mean"))  # fmt: skip
def test_centred_steps_have_the_mean_0(judge, case):
    hold_bias(judge, case.with_(counts_SE=case.counts_SE.sum(axis=0, keepdims=True)), "not centred")


@requires("LOD-24", method="bias_update", spec=lambda s: s.update.frozen_E is not None)
def test_a_frozen_bias_stays(judge, case):
    hold_bias(judge, case.with_(counts_SE=case.counts_SE.sum(axis=0, keepdims=True)), "with frozen experts")


@requires("LOD-25", method="bias_update", counts=("large",),
          spec=lambda s: s.update.rule == "sign" and s.update.frozen_E is None)  # fmt: skip
def test_large_counts_move_the_bias(judge, case):
    if not judge.sound(case.with_(counts_SE=case.counts_SE - case.counts_SE.min()), "LOD-19", "LOD-23"):
        raise NotRun("judged where small counts move the bias")
    hold_bias(judge, case, "not the sign of large counts")
