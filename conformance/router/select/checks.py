"""conformance, suite: select. Each token gets its experts."""

import numpy as np

from conformance.core.check import requires
from conformance.core.judge import NotRun, Violation
from conformance.router.bounds import choice_error, unlimited_choice
from conformance.router.groups.checks import SCORES, hold_few_groups, hold_renamed, untied, without_bias
from conformance.router.run.checks import ALL_KINDS
from conformance.router.verdicts import differ, selection_differs, wrong_selections


def ranks(spec) -> bool:
    return spec.selector == "top_k" and spec.mask_fill != 0


def ungrouped(spec) -> bool:
    return spec.selector == "top_k" and spec.num_expert_groups is None


@requires("SEL-1", logits=ALL_KINDS, bias=("none", "mixed", "strong"))
def test_distinct_experts_in_range(judge, case):
    judge.observe(case)


def hold_selection(judge, case, id: str) -> None:
    """The selected experts are the best ones, of whichever groups they come from."""
    seen = judge.observe(case)
    for t in wrong_selections(judge, seen, id):
        choice_E = unlimited_choice(case)[t]
        wanted, found = case.reference.expert_ids_TK[t].tolist(), seen.expert_ids_TK[t].tolist()
        raise Violation(
            id,
            case,
            "another selection",
            token=t,
            expected=f"experts {wanted} with choice scores {choice_E[wanted].round(6).tolist()}",
            received=f"experts {found} with choice scores {choice_E[found].round(6).tolist()}",
        )


@requires("SEL-2", spec=ranks, bias=("none",), after=("SEL-11", *SCORES))
def test_the_best_choice_scores_are_selected(judge, case):
    if case.expert_bias_E is not None:
        raise NotRun("judged without a bias")
    hold_selection(judge, case, "SEL-2")


@requires(
    "SEL-3",
    spec=lambda s: ranks(s) and s.num_expert_groups is not None,
    logits=("separated", "normal", "negative"),
    bias=("negative", "mixed", "strong"),
)
def test_an_expert_of_a_dropped_group_is_never_selected(judge, case):
    if case.spec.select_by == "score" and case.expert_bias_E is not None:
        # The groups are at fault, not the sign, where the same biases above zero go wrong as well.
        positive = case.with_(expert_bias_E=case.expert_bias_E - min(0.0, float(case.expert_bias_E.min())))
        if not judge.sound(positive, "GRP-2"):
            return
    hold_few_groups(judge, case, "SEL-3")


@requires(
    "SEL-4", spec=ranks, bias=("mixed", "positive", "strong"), logits=("separated", "normal"), after=("GRP-2", "SEL-11")
)
def test_the_bias_is_added_to_what_is_ranked(judge, case):
    if not judge.sound(without_bias(case), "SEL-2", "GRP-1", *SCORES):
        return
    hold_selection(judge, case, "SEL-4")


@requires("SEL-5", spec=ranks, bias=("none",), logits=("tied", "equal", "one_hot"))
def test_of_equal_experts_the_lower_is_selected(judge, case):
    if not judge.sound(untied(case), "SEL-2", "GRP-1", "GRP-2"):
        return
    seen, P = judge.observe(case), case.spec.experts_per_group
    for t in range(case.num_tokens):
        wanted, found = case.reference.expert_ids_TK[t], seen.expert_ids_TK[t]
        kept = case.reference.group_ids_TL
        in_kept = kept is None or set(found // P) <= set(kept[t])
        if in_kept and set(wanted) != set(found):
            raise Violation(
                "SEL-5",
                case,
                "of equal experts a higher one is selected",
                token=t,
                expected=str(sorted(wanted.tolist())),
                received=str(sorted(found.tolist())),
            )


@requires("SEL-6", spec=ranks, logits=("separated", "normal", "tied"))
def test_slots_are_in_descending_choice_score(judge, case):
    seen = judge.observe(case)
    choice_TE, error_TE = unlimited_choice(case), choice_error(case, judge.subject.compute_dtype)
    for t, ids_K in enumerate(seen.expert_ids_TK):
        choice_K, error_K = choice_TE[t, ids_K], error_TE[t, ids_K]
        rises_K = np.diff(choice_K) > error_K[1:] + error_K[:-1]
        swapped_K = (np.diff(choice_K) == 0) & (np.diff(ids_K) < 0)
        if (rises_K | swapped_K).any():
            raise Violation(
                "SEL-6",
                case,
                "slots are in another order",
                token=t,
                expected=str(case.reference.expert_ids_TK[t].tolist()),
                received=str(ids_K.tolist()),
            )


@requires("SEL-7", spec=ranks, bias=("mixed", "negative"), logits=("separated", "normal"), after=("SEL-3",))
def test_a_constant_on_all_biases_changes_nothing(judge, case):
    if case.expert_bias_E is None:
        raise NotRun("judged with a bias")
    shift = float(case.rng().choice([-8.0, -3.0, 3.0, 8.0]))
    bias_E = np.float32(case.expert_bias_E + shift).astype(np.float64)
    seen, shifted = judge.observe(case), judge.observe(case.with_(expert_bias_E=bias_E))
    for t in differ(judge, seen, shifted, ids_alone=True):
        raise Violation(
            "SEL-7",
            case,
            f"{shift:+g} on every bias changes the routing",
            token=t,
            expected=f"{seen.expert_ids_TK[t].tolist()} {seen.weights_TK[t].round(6).tolist()}",
            received=f"{shifted.expert_ids_TK[t].tolist()} {shifted.weights_TK[t].round(6).tolist()}",
        )


@requires("SEL-8", spec=ungrouped, logits=("separated", "normal"), bias=("none", "mixed"))
def test_renaming_experts_renames_the_selection(judge, case):
    new_to_old = np.arange(case.spec.num_logits)
    new_to_old[: case.spec.num_experts] = case.rng().permutation(case.spec.num_experts)
    if case.expert_bias_E is not None and len(case.expert_bias_E) != len(new_to_old):
        raise NotRun("judged without shared columns")
    if not judge.sound(case, "SEL-11"):
        return
    if case.spec.learned_scale == "per_expert" and case.spec.num_scored_shared_experts:
        raise NotRun("judged without shared columns")
    hold_renamed(judge, case, "SEL-8", new_to_old)


def hold_masked(judge, case, id: str) -> None:
    """No selected expert has a logit of -inf."""
    seen = judge.observe(case)
    for t, ids_K in enumerate(seen.expert_ids_TK):
        never = [int(i) for i in ids_K if np.isneginf(case.logits_TE[t, i])]
        if never:
            raise Violation(
                id,
                case,
                f"experts {never} have logits of -inf",
                token=t,
                expected=str(case.reference.expert_ids_TK[t].tolist()),
                received=str(ids_K.tolist()),
            )


@requires("SEL-9", spec=ranks, logits=("masked",), bias=("none",), after=("SEL-11",))
def test_a_logit_of_minus_infinity_is_never_selected(judge, case):
    hold_masked(judge, case, "SEL-9")


@requires("SEL-10", spec=ranks, logits=("masked",), bias=("positive",))
def test_no_bias_lifts_a_logit_of_minus_infinity(judge, case):
    if not judge.sound(without_bias(case), "SEL-9"):
        return
    hold_masked(judge, case, "SEL-10")


@requires("SEL-11", spec=lambda s: s.num_null_experts > 0, logits=("separated", "normal"), bias=("none", "mixed"))
def test_a_null_choice_keeps_its_id(judge, case):
    seen, E = judge.observe(case), case.spec.num_experts
    for t in selection_differs(judge, seen, "SEL-11"):
        wanted, found = case.reference.expert_ids_TK[t], seen.expert_ids_TK[t]
        if (found >= E).sum() < (wanted >= E).sum() and (seen.weights_TK[t] == 0).any():
            raise Violation(
                "SEL-11",
                case,
                "a null choice is returned as an expert of weight 0",
                token=t,
                expected=str(wanted.tolist()),
                received=f"{found.tolist()} weigh {seen.weights_TK[t].tolist()}",
            )


def hold_ids(judge, case, id: str, title: str) -> None:
    """The ids are exactly the reference's, slot by slot."""
    seen = judge.observe(case)
    for t in np.flatnonzero((seen.expert_ids_TK != case.reference.expert_ids_TK).any(axis=-1)):
        raise Violation(
            id,
            case,
            title,
            token=int(t),
            expected=str(case.reference.expert_ids_TK[t].tolist()),
            received=str(seen.expert_ids_TK[t].tolist()),
        )


@requires("SEL-13", spec=lambda spec: spec.selector == "sparsemixer", logits=("separated", "normal"), bias=("none",))
def test_sparsemixer_takes_the_best_remaining_logit(judge, case):
    hold_ids(judge, case, "SEL-13", "not the experts of a repeated argmax")


@requires("SEL-14", spec=lambda spec: spec.selector == "table", bias=("none",))
def test_a_table_selects_the_row_of_the_token(judge, case):
    hold_ids(judge, case, "SEL-14", "not the table's experts")


@requires("SEL-15", spec=lambda spec: spec.selector == "given", bias=("none",))
def test_given_ids_are_taken_as_they_are(judge, case):
    hold_ids(judge, case, "SEL-15", "not the given experts")


@requires("SEL-16", spec=lambda spec: spec.selector == "round_robin", bias=("none",))
def test_round_robin_takes_the_next_expert_for_each_slot(judge, case):
    hold_ids(judge, case, "SEL-16", "not the next experts in turn")


@requires("SEL-17", spec=lambda spec: spec.selector == "random", tokens=(7,), bias=("none",))
def test_random_selection_depends_on_the_seed_alone(judge, case):
    seen, other = judge.observe(case), judge.observe(case.with_(logits_TE=case.logits_TE[::-1] * -1.0))
    if (seen.expert_ids_TK != other.expert_ids_TK).any():
        raise Violation(
            "SEL-17",
            case,
            "the logits take part in a random selection",
            expected=str(seen.expert_ids_TK.tolist()),
            received=str(other.expert_ids_TK.tolist()),
        )
    again = [judge.observe(case.with_(inputs=case.inputs | {"seed": seed})).expert_ids_TK for seed in range(12)]
    if case.spec.top_k < case.spec.num_choices and all((ids == again[0]).all() for ids in again):
        raise Violation(
            "SEL-17",
            case,
            "twelve seeds select alike",
            expected="another selection for another seed",
            received=str(again[0].tolist()),
        )
