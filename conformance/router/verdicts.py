"""conformance, router, verdicts: which tokens of a result differ from the reference by more than rounding."""

import numpy as np

from conformance.core.judge import Judge, accuse
from conformance.core.rounding import EPSILON, close, equal
from conformance.router.bounds import (
    admissible,
    best_in_some_groups,
    best_T,
    choice_error,
    edges,
    expected_weights,
    groups_of,
    known_factor,
    score_error,
    score_floor,
    taken,
    unlimited_choice,
    weight_error,
    weight_floor,
)
from conformance.router.case import RouterCase
from conformance.router.observation import Observation, observe
from conformance.router.varying import explained_T
from moe_ref import UNUSED


def selection_differs(judge: Judge, seen: Observation, *, dtype: str | None = None) -> list[int]:
    """Tokens whose selection no choice scores within the rounding error explain; the others are near ties.

    Args:
        dtype: that rounds, where it is not the subject's.
    """
    case = seen.case
    different_T = (np.sort(seen.expert_ids_TK) != np.sort(case.reference.expert_ids_TK)).any(axis=-1)
    tokens = np.flatnonzero(different_T & case.valid_T)
    if len(tokens) == 0:
        return []
    dtype = dtype or judge.subject.compute_dtype
    if case.spec.varies:
        unexplained = tokens[~explained_T(seen.expert_ids_TK, case, dtype)[tokens]].tolist()
        judge.near_ties(len(tokens) - len(unexplained))
        return unexplained
    choice_TE, error_TE = unlimited_choice(case), choice_error(case, dtype)
    if case.spec.num_expert_groups is None:
        doubtful = tokens[~best_T(seen.expert_ids_TK[tokens], choice_TE[tokens], error_TE[tokens])]
    else:
        doubtful = tokens
    unexplained = [
        int(t) for t in doubtful if not admissible(seen.expert_ids_TK[t], choice_TE[t], error_TE[t], case.spec, dtype)
    ]
    judge.near_ties(len(tokens) - len(unexplained))
    return unexplained


def not_the_best_E(judge: Judge, seen: Observation) -> list[int]:
    """Experts that take tokens that no choice scores within the rounding error make the best; the others are near ties.

    How many they take is not looked at.
    """
    case = seen.case
    choice_TE, error_TE = unlimited_choice(case), choice_error(case, judge.subject.compute_dtype)
    taken_TE = taken(seen.expert_ids_TK, case.spec.num_choices)
    other_E = (taken_TE != taken(case.reference.expert_ids_TK, case.spec.num_choices)).any(axis=0)
    worst_in_E, best_out_E = edges(taken_TE, choice_TE + error_TE, choice_TE - error_TE, axis=0)
    wrong_E = other_E & (worst_in_E < best_out_E)
    judge.near_ties(int((other_E & ~wrong_E).sum()))
    return np.flatnonzero(wrong_E).tolist()


def groups_used(seen: Observation, token) -> set[int]:
    """The groups of a token's experts."""
    return set(groups_of(seen.expert_ids_TK[token], seen.case.spec))


def leaves_groups(seen: Observation) -> list[int]:
    """Tokens with experts of more groups than are kept."""
    spec = seen.case.spec
    groups_TK = np.sort(seen.expert_ids_TK // spec.experts_per_group, axis=-1)
    used_T = (np.diff(groups_TK, axis=-1) != 0).sum(axis=-1) + 1
    return np.flatnonzero(seen.case.valid_T & (used_T > (spec.num_limited_groups or spec.num_experts))).tolist()


def best_of_other_groups(judge: Judge, seen: Observation, token: int) -> bool:
    """The selection is the best of some kept groups, though not of the reference's: the groups are at fault."""
    case = seen.case
    if case.spec.num_expert_groups is None:
        return False
    error_E = choice_error(case, judge.subject.compute_dtype)[token]
    return best_in_some_groups(seen.expert_ids_TK[token], unlimited_choice(case)[token], error_E, case.spec)


def wrong_selections(judge: Judge, seen: Observation) -> list[int]:
    """Tokens whose experts are not the best ones of whichever groups they come from."""
    elsewhere = set(leaves_groups(seen)) if seen.case.spec.num_expert_groups else set()
    return [
        t
        for t in selection_differs(judge, seen)
        if t not in elsewhere and not best_of_other_groups(judge, seen, t)  # the groups are at fault
    ]


def other_groups(judge: Judge, seen: Observation) -> list[int]:
    """Tokens whose reported groups are not the best ones, where the subject reports them."""
    case, dtype = seen.case, judge.subject.compute_dtype
    if seen.group_ids_TL is None:
        return []
    group_ids_TL = case.reference.group_ids_TL
    assert group_ids_TL is not None  # a router that reports groups has some
    different_T = (np.sort(seen.group_ids_TL) != np.sort(group_ids_TL)).any(axis=-1)
    tokens = np.flatnonzero(different_T & case.valid_T)
    choice_TE, error_TE = unlimited_choice(case), choice_error(case, dtype)
    return [
        int(t)
        for t in tokens
        if not admissible(seen.expert_ids_TK[t], choice_TE[t], error_TE[t], case.spec, dtype, seen.group_ids_TL[t])
    ]


def scores_differ(judge: Judge, seen: Observation) -> list[int]:
    """Tokens whose scores differ, where the subject shows them."""
    case, dtype = seen.case, judge.subject.compute_dtype
    if seen.scores_TE is None or case.reference.scores_TE is None:
        return []
    close_TE = close(seen.scores_TE, case.reference.scores_TE, score_error(case, dtype), score_floor(case, dtype))
    return [int(t) for t in np.flatnonzero(~close_TE.all(axis=-1) & case.valid_T)]


def shares(case: RouterCase, weights_TK, expert_ids_TK):
    """Each weight over the sum of its token's: what the scores alone decide, whatever the norm and the scale."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # found weights may be anything
        return _shares(case, weights_TK / known_factor(case, expert_ids_TK), expert_ids_TK)


def _shares(case: RouterCase, bare_TK, expert_ids_TK):
    # A null expert's weight is a matter of its kind, not of its score.
    bare_TK = np.where(expert_ids_TK >= case.spec.num_experts, 0, bare_TK)
    total_T1 = bare_TK.sum(axis=-1, keepdims=True)
    return bare_TK / np.where(total_T1 == 0, 1, total_T1)


def shares_differ(judge: Judge, seen: Observation, *, dtype: str | None = None) -> list[int]:
    """Tokens whose weights are not in the ratio of the scores of the selected experts, in whatever order."""
    case, dtype = seen.case, dtype or judge.subject.compute_dtype
    wanted_TK = expected_weights(case, seen.expert_ids_TK)
    wanted_share_TK = np.sort(shares(case, wanted_TK, seen.expert_ids_TK), axis=-1)
    share_TK = np.sort(shares(case, seen.weights_TK, seen.expert_ids_TK), axis=-1)
    error_TK = 2 * weight_error(case, seen.expert_ids_TK, dtype).max(axis=-1, keepdims=True, initial=0)
    # A token's null experts have no share: what remains may be too small for this dtype.
    total_T1 = np.where(seen.expert_ids_TK >= case.spec.num_experts, 0, wanted_TK).sum(axis=-1, keepdims=True)
    floor_T1 = weight_floor(case, seen.expert_ids_TK, wanted_TK, dtype) / np.where(total_T1 == 0, 1, total_T1)
    ok_T = close(share_TK, wanted_share_TK, error_TK, floor_T1).all(axis=-1)
    # Nothing can be said of a token whose weights are all 0 in this dtype.
    judged_T = (total_T1[:, 0] > 0) & (floor_T1[:, 0] < EPSILON["float16"]) & case.valid_T
    wrong = np.flatnonzero(~ok_T & judged_T)
    if len(wrong) == 0:
        return []
    # Right weights in the wrong slots: the scores are right (WGT-8).
    also_in_any_order = set(weights_differ(judge, seen, in_any_order=True, dtype=dtype))
    return [int(t) for t in wrong if t in also_in_any_order]


def weights_differ(judge: Judge, seen: Observation, *, in_any_order: bool = False, dtype=None) -> list[int]:
    """Tokens whose weights are not those of their experts."""
    case, dtype = seen.case, dtype or judge.subject.compute_dtype
    wanted_TK, found_TK = expected_weights(case, seen.expert_ids_TK), seen.weights_TK
    error_TK = weight_error(case, seen.expert_ids_TK, dtype)
    if in_any_order:
        wanted_TK, found_TK = np.sort(wanted_TK, axis=-1), np.sort(found_TK, axis=-1)
        error_TK = error_TK.max(axis=-1, keepdims=True, initial=0)
    floor_T1 = weight_floor(case, seen.expert_ids_TK, wanted_TK, dtype)
    ok_T = close(found_TK, wanted_TK, error_TK, floor_T1).all(axis=-1)
    if case.spec.weights_from == "masked_scores":  # other groups, of a near tie, mask other scores
        ok_T |= (np.sort(seen.expert_ids_TK) != np.sort(case.reference.expert_ids_TK)).any(axis=-1)
    return [int(t) for t in np.flatnonzero(~ok_T & case.valid_T)]


def by_id(seen: Observation):
    """Ids and weights of each token in ascending order of id."""
    order_TK = np.argsort(seen.expert_ids_TK, axis=-1, kind="stable")
    take = np.take_along_axis
    return take(seen.expert_ids_TK, order_TK, axis=-1), take(seen.weights_TK, order_TK, axis=-1)


def differ(judge: Judge, seen: Observation, other: Observation, *, ids_alone: bool = False) -> list[int]:
    """Tokens for which two results of one subject, on cases that mean the same, differ by more than rounding.

    Args:
        ids_alone: what weights do is not looked at; where they alone differ, their own requirements find it.
    """
    dtype = judge.subject.compute_dtype
    (ids_TK, weights_TK), (other_ids_TK, other_weights_TK) = by_id(seen), by_id(other)
    same_T = (ids_TK == other_ids_TK).all(axis=-1)
    error_TK = weight_error(seen.case, ids_TK, dtype) + weight_error(other.case, ids_TK, dtype)
    floor_T1 = 2 * weight_floor(seen.case, ids_TK, expected_weights(seen.case, ids_TK), dtype)
    # Unused slots, non-finite weights: equal is equal.
    close_T = (close(other_weights_TK, weights_TK, error_TK, floor_T1) | equal(other_weights_TK, weights_TK)).all(
        axis=-1
    )
    wrong = set() if ids_alone else set(np.flatnonzero(same_T & ~close_T).tolist())
    moved = np.flatnonzero(~same_T)
    if len(moved) and seen.case.spec.varies:
        near_tie_T = explained_T(ids_TK, seen.case, dtype) & explained_T(other_ids_TK, other.case, dtype)
        return sorted(wrong | set(moved[~near_tie_T[moved]].tolist()))
    if len(moved) and seen.case.spec.selector not in ("top_k", "sinkhorn"):
        return sorted(wrong | set(moved.tolist()))
    if len(moved):
        choice_TE = unlimited_choice(seen.case)
        error_TE = choice_error(seen.case, dtype) + choice_error(other.case, dtype)
        for t in moved:
            near_tie = all(
                admissible(x[t], choice_TE[t], error_TE[t], seen.case.spec, dtype) for x in (ids_TK, other_ids_TK)
            )
            if not near_tie:
                wrong.add(int(t))
    return sorted(wrong)


def unused(expert_ids_TK) -> np.ndarray:
    """(T, K) which slots are unused."""
    return expert_ids_TK == UNUSED


# holding a case against the reference


def hold_selection(judge: Judge, case: RouterCase, title: str = "another selection") -> None:
    """The selected experts are the best ones, of whichever groups they come from, and as many as the reference's."""
    seen = observe(judge, case)
    for t in wrong_selections(judge, seen):
        choice_E = unlimited_choice(case)[t]
        both = (case.reference.expert_ids_TK[t], seen.expert_ids_TK[t])
        wanted, found = (ids_K[ids_K != UNUSED].tolist() for ids_K in both)
        accuse(
            title,
            token=t,
            expected=f"experts {wanted} with choice scores {choice_E[wanted].round(6).tolist()}",
            received=f"experts {found} with choice scores {choice_E[found].round(6).tolist()}",
        )


def hold_order(judge: Judge, case: RouterCase) -> None:
    """Slots are in descending choice score, equal ones by lower id, and those that are not used come last."""
    seen = observe(judge, case)
    choice_TE, error_TE = unlimited_choice(case), choice_error(case, judge.subject.compute_dtype)
    for t, ids_K in enumerate(seen.expert_ids_TK):
        used_K = ids_K != UNUSED
        ids = ids_K[used_K]
        choice, error = choice_TE[t, ids], error_TE[t, ids]
        rises = np.diff(choice) > error[1:] + error[:-1]
        swapped = (np.diff(choice) == 0) & (np.diff(ids) < 0)
        if (np.diff(used_K.astype(int)) > 0).any() or (rises | swapped).any():
            accuse(
                "slots are in another order",
                token=t,
                expected=str(case.reference.expert_ids_TK[t].tolist()),
                received=str(ids_K.tolist()),
            )


def hold_few_groups(judge: Judge, case: RouterCase) -> None:
    """No token has experts of more groups than are kept."""
    seen, kept_TL = observe(judge, case), case.reference.group_ids_TL
    assert kept_TL is not None, "a case without groups"
    for t in leaves_groups(seen):
        kept = sorted(kept_TL[t].tolist())
        dropped = [
            f"{i} (group {i // case.spec.experts_per_group})"
            for i in seen.expert_ids_TK[t]
            if i // case.spec.experts_per_group not in kept
        ]
        accuse(
            f"experts of {len(groups_used(seen, t))} groups are selected",
            token=t,
            expected=f"experts {sorted(case.reference.expert_ids_TK[t].tolist())} of groups {kept}",
            received=f"experts {sorted(seen.expert_ids_TK[t].tolist())}; of dropped groups: {', '.join(dropped)}",
        )


def hold_renamed(judge: Judge, case: RouterCase, new_to_old: np.ndarray) -> None:
    """Columns renamed: the same experts under their new names."""
    bias_E, inputs = case.expert_bias_E, dict(case.inputs)
    if case.spec.learned_scale == "per_expert":
        inputs["learned_scale"] = inputs["learned_scale"][new_to_old]
    renamed = case.with_(
        logits_TE=case.logits_TE[:, new_to_old],
        inputs=inputs,
        expert_bias_E=None if bias_E is None else bias_E[new_to_old],
    )
    seen, other = observe(judge, case), observe(judge, renamed)
    back = Observation(
        case=case, expert_ids_TK=np.asarray(new_to_old)[other.expert_ids_TK], weights_TK=other.weights_TK
    )
    for t in differ(judge, seen, back, ids_alone=True):
        accuse(
            "under other names the routing is another",
            token=t,
            expected=sorted(seen.expert_ids_TK[t].tolist()),
            received=f"{sorted(back.expert_ids_TK[t].tolist())} after renaming back",
        )


def hold_weights(judge: Judge, case: RouterCase, title: str) -> None:
    """The weights of the selected experts are the reference's for these experts."""
    seen = observe(judge, case)
    for t in weights_differ(judge, seen):
        wanted_K = expected_weights(case, seen.expert_ids_TK)[t]
        accuse(
            title,
            token=t,
            expected=f"experts {seen.expert_ids_TK[t].tolist()} weigh {[float(f'{w:.7g}') for w in wanted_K]}",
            received=[float(f"{w:.7g}") for w in seen.weights_TK[t]],
        )
