"""conformance, router: select. Each token gets its experts."""

import numpy as np

from conformance.core.check import given
from conformance.core.judge import accuse
from conformance.router.bounds import choice_error, unlimited_choice
from conformance.router.draw import LOGITS
from conformance.router.kind import requires
from conformance.router.observation import observe
from conformance.router.predicates import (
    BIASED,
    EXACT,
    MODERATE,
    SCORES,
    UNBIASED,
    above_zero,
    ranks,
    untied,
    without_bias,
)
from conformance.router.verdicts import (
    differ,
    hold_few_groups,
    hold_order,
    hold_renamed,
    hold_selection,
    selection_differs,
    unused,
    weights_differ,
)


def ungrouped(spec) -> bool:
    return spec.selector == "top_k" and spec.num_expert_groups is None


@requires("SEL-1", logits=LOGITS, bias=("none", "mixed", "negative", "strong"), sweeps=True)
def distinct_experts_in_range(judge, case):
    observe(judge, case)


@requires(
    "SEL-2",
    spec=ranks,
    bias=("none",),
    logits=("separated", "close", "normal", "large", "negative", "below_zero"),
    given=(UNBIASED,),
    after=("SEL-11", *SCORES),
    sweeps=True,
)
def the_best_choice_scores_are_selected(judge, case):
    hold_selection(judge, case)


@requires(
    "SEL-3",
    spec=lambda s: ranks(s) and s.num_expert_groups is not None,
    logits=("separated", "normal", "negative"),
    bias=("negative", "mixed", "strong"),
    simpler=((above_zero, ("GRP-2",)),),
)
def an_expert_of_a_dropped_group_is_never_selected(judge, case):
    hold_few_groups(judge, case)


@requires(
    "SEL-4",
    spec=ranks,
    bias=("mixed", "positive", "strong"),
    logits=(*MODERATE, "close", "below_zero"),
    after=("GRP-2", "SEL-11"),
    simpler=((without_bias, ("SEL-2", "GRP-1", *SCORES)),),
)
def the_bias_is_added_to_what_is_ranked(judge, case):
    hold_selection(judge, case)


@requires(
    "SEL-5",
    spec=ranks,
    bias=("none",),
    logits=("tied", "equal", "one_hot"),
    dtypes=EXACT,
    simpler=((untied, ("SEL-2", "GRP-1", "GRP-2")),),
)
def of_equal_experts_the_lower_is_selected(judge, case):
    seen, P = observe(judge, case), case.spec.experts_per_group
    for t in range(case.num_tokens):
        wanted, found = case.reference.expert_ids_TK[t], seen.expert_ids_TK[t]
        kept = case.reference.group_ids_TL
        in_kept = kept is None or set(found // P) <= set(kept[t])
        if in_kept and set(wanted) != set(found):
            accuse(
                "of equal experts a higher one is selected",
                token=t,
                expected=str(sorted(wanted.tolist())),
                received=str(sorted(found.tolist())),
            )


@requires("SEL-6", spec=ranks, logits=("separated", "normal", "tied"))
def slots_are_in_descending_choice_score(judge, case):
    hold_order(judge, case)


@requires("SEL-7", spec=ranks, bias=("mixed", "negative"), logits=MODERATE, given=(BIASED,), after=("SEL-3",))
def a_constant_on_all_biases_changes_nothing(judge, case):
    shift = float(case.rng().choice([-8.0, -3.0, 3.0, 8.0]))
    bias_E = np.float32(case.expert_bias_E + shift).astype(np.float64)
    seen, shifted = observe(judge, case), observe(judge, case.with_(expert_bias_E=bias_E))
    for t in differ(judge, seen, shifted, ids_alone=True):
        accuse(
            f"{shift:+g} on every bias changes the routing",
            token=t,
            expected=f"{seen.expert_ids_TK[t].tolist()} {seen.weights_TK[t].round(6).tolist()}",
            received=f"{shifted.expert_ids_TK[t].tolist()} {shifted.weights_TK[t].round(6).tolist()}",
        )


def can_be_renamed(case) -> bool:
    """Whether biases and learned scales belong to the choices alone."""
    spec = case.spec
    biased = case.expert_bias_E is not None and len(case.expert_bias_E) != spec.num_logits
    return not biased and not (spec.learned_scale == "per_expert" and spec.num_scored_shared_experts)


@requires(
    "SEL-8",
    spec=ungrouped,
    logits=MODERATE,
    bias=("none", "mixed"),
    given=(given("judged without shared columns", can_be_renamed),),
    after=("SEL-11",),
)
def renaming_experts_renames_the_selection(judge, case):
    new_to_old = np.arange(case.spec.num_logits)
    new_to_old[: case.spec.num_experts] = case.rng().permutation(case.spec.num_experts)
    hold_renamed(judge, case, new_to_old)


def hold_masked(judge, case) -> None:
    """No selected expert has a logit of -inf."""
    seen = observe(judge, case)
    for t, ids_K in enumerate(seen.expert_ids_TK):
        never = [int(i) for i in ids_K if np.isneginf(case.logits_TE[t, i])]
        if never:
            accuse(
                f"experts {never} have logits of -inf",
                token=t,
                expected=str(case.reference.expert_ids_TK[t].tolist()),
                received=str(ids_K.tolist()),
            )


@requires("SEL-9", spec=ranks, logits=("masked",), bias=("none",), after=("SEL-11",))
def a_logit_of_minus_infinity_is_never_selected(judge, case):
    hold_masked(judge, case)


@requires("SEL-10", spec=ranks, logits=("masked",), bias=("positive",), simpler=((without_bias, ("SEL-9",)),))
def no_bias_lifts_a_logit_of_minus_infinity(judge, case):
    hold_masked(judge, case)


def most_nulls_T(judge, case) -> np.ndarray:
    """(T,) null choices that a token has, at most: each may rank as high as rounding allows."""
    E, ids_TK = case.spec.num_experts, case.reference.expert_ids_TK
    if ranks(case.spec):
        error_TE = choice_error(case, judge.subject.compute_dtype)
        error_TE = np.where(np.arange(case.spec.num_choices) < E, -error_TE, error_TE)
        ids_TK = np.argsort(-(unlimited_choice(case) + error_TE), axis=-1)[:, : case.spec.top_k]
    return (ids_TK >= E).sum(axis=-1)


@requires("SEL-11", spec=lambda s: s.num_null_experts > 0, logits=MODERATE, bias=("none", "mixed"))
def a_null_choice_keeps_its_id(judge, case):
    seen, E, most_T = observe(judge, case), case.spec.num_experts, most_nulls_T(judge, case)
    # Where rounding decides between a null choice and the expert that is returned for it, the weight tells.
    for t in sorted({*selection_differs(judge, seen), *weights_differ(judge, seen)}):
        found_K, weights_K = seen.expert_ids_TK[t], seen.weights_TK[t]
        if (found_K >= E).sum() < most_T[t] and (weights_K[found_K < E] == 0).any():
            accuse(
                "a null choice is returned as an expert of weight 0",
                token=t,
                expected=str(case.reference.expert_ids_TK[t].tolist()),
                received=f"{found_K.tolist()} weigh {weights_K.tolist()}",
            )


def hold_ids(judge, case, title: str) -> None:
    """The ids are exactly the reference's, slot by slot."""
    seen = observe(judge, case)
    for t in np.flatnonzero((seen.expert_ids_TK != case.reference.expert_ids_TK).any(axis=-1)):
        accuse(
            title,
            token=int(t),
            expected=str(case.reference.expert_ids_TK[t].tolist()),
            received=str(seen.expert_ids_TK[t].tolist()),
        )


@requires("SEL-13", spec=lambda spec: spec.selector == "sparsemixer", logits=MODERATE, bias=("none",))
def sparsemixer_takes_the_best_remaining_logit(judge, case):
    hold_ids(judge, case, "not the experts of a repeated argmax")


@requires("SEL-14", spec=lambda spec: spec.selector == "table", bias=("none",))
def a_table_selects_the_row_of_the_token(judge, case):
    hold_ids(judge, case, "not the table's experts")


@requires("SEL-15", spec=lambda spec: spec.selector == "given", bias=("none",))
def given_ids_are_taken_as_they_are(judge, case):
    hold_ids(judge, case, "not the given experts")


@requires("SEL-16", spec=lambda spec: spec.selector == "round_robin", bias=("none",))
def round_robin_takes_the_next_expert_for_each_slot(judge, case):
    hold_ids(judge, case, "not the next experts in turn")


@requires("SEL-17", spec=lambda spec: spec.selector == "random", tokens=(7,), bias=("none",))
def random_selection_depends_on_the_seed_alone(judge, case):
    seen, other = observe(judge, case), observe(judge, case.with_(logits_TE=case.logits_TE[::-1] * -1.0))
    if (seen.expert_ids_TK != other.expert_ids_TK).any():
        accuse(
            "the logits take part in a random selection",
            expected=str(seen.expert_ids_TK.tolist()),
            received=str(other.expert_ids_TK.tolist()),
        )
    again = [observe(judge, case.with_(inputs=case.inputs | {"seed": seed})).expert_ids_TK for seed in range(12)]
    if case.spec.top_k < case.spec.num_choices and all((ids == again[0]).all() for ids in again):
        accuse(
            "twelve seeds select alike", expected="another selection for another seed", received=str(again[0].tolist())
        )


@requires("SEL-18", spec=lambda spec: spec.selector == "group_top_k", logits=MODERATE, bias=("none",))
def each_group_gives_its_quota(judge, case):
    hold_ids(judge, case, "not the quota of each group")


@requires(
    "SEL-21",
    spec=lambda s: s.selector == "threshold",
    logits=(*MODERATE, "below_zero", "close", "one_hot"),
    bias=("none", "mixed", "strong"),
    after=("SEL-11",),
)
def what_is_above_the_threshold_is_selected(judge, case):
    hold_selection(judge, case, f"not the best choices above {case.spec.threshold:g}")


@requires(
    "SEL-22",
    spec=lambda s: s.selector == "top_p",
    logits=(*MODERATE, "below_zero", "close", "one_hot", "large"),
    bias=("none",),
    after=("SEL-11",),
)
def choices_are_taken_until_their_sum_is_above_top_p(judge, case):
    hold_selection(judge, case, f"not the best choices that reach {case.spec.top_p:g}")


@requires("SEL-23", spec=lambda s: s.varies, logits=MODERATE, bias=("none", "mixed"))
def a_slot_left_unused_weighs_nothing(judge, case):
    seen = observe(judge, case)
    weighs_T = (unused(seen.expert_ids_TK) & (seen.weights_TK != 0)).any(axis=-1)
    # Right weights in the wrong slots are judged with the weights (WGT-8, WGT-17).
    for t in set(weights_differ(judge, seen, in_any_order=True)) & set(np.flatnonzero(weighs_T).tolist()):
        accuse(
            "an unused slot has a weight",
            token=int(t),
            expected="0 where the id is -1",
            received=f"ids {seen.expert_ids_TK[t].tolist()} weigh {seen.weights_TK[t].tolist()}",
        )


@requires("SEL-24", spec=lambda s: s.varies, logits=("separated", "normal", "tied"), bias=("none", "mixed"))
def used_slots_come_first_and_descend(judge, case):
    hold_order(judge, case)


def hold_evened(judge, case, title: str) -> None:
    """The selection is that of the reference, or a near tie."""
    seen = observe(judge, case)
    for t in selection_differs(judge, seen):
        choice_E = case.reference.scores_for_choice_TE[t]
        wanted, found = case.reference.expert_ids_TK[t].tolist(), seen.expert_ids_TK[t].tolist()
        accuse(
            title,
            token=t,
            expected=f"experts {wanted}, which rank {choice_E[wanted].round(5).tolist()}",
            received=f"experts {found}, which rank {choice_E[found].round(5).tolist()}",
        )


@requires("SEL-19", spec=lambda s: s.selector == "sinkhorn", logits=(*MODERATE, "below_zero"), bias=("none",))
def sinkhorn_evens_the_whole_batch(judge, case):
    hold_evened(judge, case, "not the experts of the evened batch")


@requires(
    "SEL-20",
    spec=lambda s: s.selector == "sinkhorn",
    tokens=(7,),
    logits=MODERATE,
    bias=("none",),
    inputs=("token_mask_T",),
)
def padding_is_not_evened(judge, case):
    valid_T1 = case.valid_T[:, None]
    # Padding that would draw every token away from one expert.
    full = np.where(np.arange(case.spec.num_logits) == 0, 40.0, 0.0)
    hold_evened(judge, case.with_logits(np.where(valid_T1, case.logits_TE, full)), "padding changes what is evened")
