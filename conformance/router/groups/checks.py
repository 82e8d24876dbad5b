"""conformance, suite: limit_groups. Only some groups of experts are kept for each token."""

import numpy as np

from conformance.core.check import requires
from conformance.core.judge import NotRun, Violation
from conformance.router.case import Case
from conformance.router.verdicts import (
    best_of_other_groups,
    differ,
    groups_used,
    leaves_groups,
    other_groups,
    selection_differs,
    wrong_selections,
)

SCORES = ("SCR-1", "SCR-2", "SCR-3", "SCR-4", "SCR-5")


def grouped(spec) -> bool:
    return spec.num_expert_groups is not None and spec.mask_fill != 0


def without_bias(case: Case) -> Case:
    return case.with_(expert_bias_E=None)


def panel(case: Case) -> Case:
    """127 other tokens under the same spec and bias, half of them negative: many tell which stage is at fault."""
    logits_TE = case.rng().normal(0, 2, (127, case.spec.num_logits)).astype(np.float32)
    logits_TE[::2] -= 6
    return case.with_(logits_TE=logits_TE.astype(np.float64), inputs=_of_no_token(case.inputs))


def _of_no_token(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if not name.endswith(("_T", "_TK"))}


def selects_right(judge, case) -> bool:
    """The experts of many other tokens are the best of their groups, and the best of all where there are no groups.

    One token's wrong selection may by chance be the best of other groups; here it shows whether the groups or the
    selection is at fault.
    """
    spec = case.spec
    dropping = spec.replace(mask_fill=-np.inf, weights_from="scores")
    ungrouped = dropping.without_groups()
    for each in (dropping, ungrouped):
        if judge.subject.supports(each) is None:
            try:
                seen = judge.observe(panel(case.with_(spec=each)))
            except (NotRun, Violation):
                return False
            if wrong_selections(judge, seen):
                return False
    return True


def keeps_to_groups(judge, case) -> bool:
    """Many other tokens have no expert of a dropped group."""
    try:
        return not leaves_groups(judge.observe(panel(case)))
    except (NotRun, Violation):
        return False


def hold_groups(judge, case, id: str) -> None:
    """Where the selection is the best of some groups, these are the groups with the best scores."""
    seen = judge.observe(case)
    other = [t for t in selection_differs(judge, seen, id) if best_of_other_groups(judge, seen, t)]
    if other and selects_right(judge, case):
        t = other[0]
        wanted = sorted(set(case.reference.group_ids_TL[t].tolist()))
        raise Violation(
            id,
            case,
            "other groups are kept",
            token=t,
            expected=f"experts {sorted(case.reference.expert_ids_TK[t].tolist())} of groups {wanted}",
            received=f"experts {sorted(seen.expert_ids_TK[t].tolist())} of groups {sorted(groups_used(seen, t))}",
        )
    for t in other_groups(judge, seen):
        raise Violation(
            id,
            case,
            "other groups are reported",
            token=t,
            expected=str(sorted(case.reference.group_ids_TL[t].tolist())),
            received=str(sorted(seen.group_ids_TL[t].tolist())),
        )


@requires("GRP-1", spec=grouped, bias=("none",), logits=("separated", "normal"), after=("GRP-2", *SCORES))
def test_the_groups_with_the_best_scores_are_kept(judge, case):
    if case.expert_bias_E is not None:
        raise NotRun("judged without a bias")
    hold_groups(judge, case, "GRP-1")


@requires("GRP-2", spec=grouped, bias=("none", "positive"), logits=("separated", "normal"))
def test_experts_come_from_few_groups(judge, case):
    if "negative_choice" in case.tags:
        raise NotRun("judged where no choice score is negative")
    hold_few_groups(judge, case, "GRP-2")


def hold_few_groups(judge, case, id: str) -> None:
    seen = judge.observe(case)
    for t in leaves_groups(seen):
        kept = sorted(case.reference.group_ids_TL[t].tolist())
        dropped = [
            f"{i} (group {i // case.spec.experts_per_group})"
            for i in seen.expert_ids_TK[t]
            if i // case.spec.experts_per_group not in kept
        ]
        raise Violation(
            id,
            case,
            f"experts of {len(groups_used(seen, t))} groups are selected",
            token=t,
            expected=f"experts {sorted(case.reference.expert_ids_TK[t].tolist())} of groups {kept}",
            received=f"experts {sorted(seen.expert_ids_TK[t].tolist())}; of dropped groups: {', '.join(dropped)}",
        )


@requires("GRP-3", spec=grouped, bias=("mixed", "positive"), logits=("separated", "normal"), after=("GRP-2", "SEL-3"))
def test_group_scores_include_the_bias(judge, case):
    if not judge.sound(without_bias(case), "GRP-1", "SEL-2", *SCORES):
        return
    hold_groups(judge, case, "GRP-3")


@requires("GRP-4", spec=grouped, bias=("none",), logits=("tied", "equal"))
def test_of_equal_groups_the_lower_is_kept(judge, case):
    if not judge.sound(untied(case), "GRP-1", "GRP-2"):
        return
    seen = judge.observe(case)
    for t in range(case.num_tokens):
        wanted = set(map(int, case.reference.group_ids_TL[t]))
        # Which experts of the kept groups are selected is a matter of SEL-5, and what leaks of SEL-3.
        if not groups_used(seen, t) <= wanted and selects_right(judge, case) and keeps_to_groups(judge, case):
            raise Violation(
                "GRP-4",
                case,
                "of equal groups a higher one is kept",
                token=t,
                expected=f"groups {sorted(wanted)}",
                received=f"groups {sorted(groups_used(seen, t))}",
            )


def untied(case: Case) -> Case:
    """The same case with logits that are all apart."""
    T, E = case.logits_TE.shape
    return case.with_(logits_TE=case.rng().permuted(np.tile(np.linspace(-3, 3, E), (T, 1)), axis=-1))


@requires("GRP-5", spec=grouped, bias=("none", "mixed", "negative"), logits=("separated", "normal"), after=("SEL-3",))
def test_renaming_groups_renames_the_selection(judge, case):
    spec, order = case.spec, case.rng().permutation(case.spec.num_expert_groups)
    new_to_old = (order[:, None] * spec.experts_per_group + np.arange(spec.experts_per_group)).reshape(-1)
    hold_renamed(judge, case, "GRP-5", new_to_old)


def hold_renamed(judge, case, id: str, new_to_old) -> None:
    """Columns renamed: the same experts under their new names."""
    bias_E, inputs = case.expert_bias_E, dict(case.inputs)
    if case.spec.learned_scale == "per_expert":
        inputs["learned_scale"] = inputs["learned_scale"][new_to_old]
    renamed = case.with_(
        logits_TE=case.logits_TE[:, new_to_old],
        inputs=inputs,
        expert_bias_E=None if bias_E is None else bias_E[new_to_old],
    )
    seen, other = judge.observe(case), judge.observe(renamed)
    back = type(other)(
        case=case,
        expert_ids_TK=np.asarray(new_to_old)[other.expert_ids_TK],
        weights_TK=other.weights_TK,
        scores_TE=None,
        group_ids_TL=None,
        shared_weights_TS=None,
    )
    moved = differ(judge, seen, back, ids_alone=True)
    if (
        moved
        and id == "GRP-5"
        and not (
            selects_right(judge, case) and selects_right(judge, without_bias(case)) and keeps_to_groups(judge, case)
        )
    ):
        return
    for t in moved:
        raise Violation(
            id,
            case,
            "under other names the routing is another",
            token=t,
            expected=f"{sorted(seen.expert_ids_TK[t].tolist())}",
            received=f"{sorted(back.expert_ids_TK[t].tolist())} after renaming back",
        )


@requires("GRP-6", spec=lambda spec: spec.mask_fill == 0, logits=("separated", "normal"))
def test_mask_fill_0_ranks_dropped_experts_at_0(judge, case):
    seen = judge.observe(case)
    wrong = selection_differs(judge, seen, "GRP-6")
    bare = without_bias(case)
    if wrong and not (selects_right(judge, case) and selects_right(judge, bare) and judge.sound(panel(bare), *SCORES)):
        return
    for t in wrong:
        raise Violation(
            "GRP-6",
            case,
            "another selection with dropped experts at 0",
            token=t,
            expected=str(sorted(case.reference.expert_ids_TK[t].tolist())),
            received=str(sorted(seen.expert_ids_TK[t].tolist())),
        )
