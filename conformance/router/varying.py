"""conformance, router: selections of as many experts as a token needs, and which of them rounding explains.

Legend: T tokens, E choices, K top_k.
"""

import numpy as np

from conformance.core.rounding import EPSILON
from conformance.router.bounds import choice_error, edges, taken
from conformance.router.case import RouterCase
from moe_ref import UNUSED


def explained_T(expert_ids_TK: np.ndarray, case: RouterCase, dtype: str) -> np.ndarray:
    """(T,) whether some choice scores within the error make the reference select these experts, in whatever slots."""
    spec, choice_TE, error_TE = case.spec, case.reference.scores_for_choice_TE, choice_error(case, dtype)
    assert choice_TE is not None  # a selector that varies ranks
    chosen_TE, num_T = taken(expert_ids_TK, spec.num_choices), (expert_ids_TK != UNUSED).sum(axis=-1)
    worst_in_T, best_out_T = edges(chosen_TE, choice_TE + error_TE, choice_TE - error_TE)
    full_T = num_T == spec.top_k
    if spec.selector == "threshold":
        # Those within are above it; of those without none is, or there is no slot left for it.
        slack = EPSILON[dtype] * abs(spec.threshold)
        none_left_T = np.where(full_T, worst_in_T >= best_out_T, best_out_T <= spec.threshold + slack)
        return (worst_in_T > spec.threshold - slack) & none_left_T
    masked_TE = np.isneginf(choice_TE)
    begins_T, ends_T = _sums(case, chosen_TE, np.where(masked_TE, 0, error_TE), dtype, sign=1)
    explained = begins_T & (ends_T | full_T) & (worst_in_T >= best_out_T)
    return explained & (num_T > 0) & ~(chosen_TE & masked_TE).any(axis=-1)


def settled_T(case: RouterCase, error_TE: np.ndarray) -> np.ndarray:
    """(T,) whether the reference selects the same experts for all choice scores within the error, (T, E)."""
    spec, trace = case.spec, case.reference
    choice_TE, chosen_TE = trace.scores_for_choice_TE, taken(trace.expert_ids_TK, spec.num_choices)
    assert choice_TE is not None  # a selector that varies ranks
    low_TE, high_TE = choice_TE - error_TE, choice_TE + error_TE
    if spec.score_func == "relu" and spec.select_by == "score":  # what is far below 0 scores 0 all the same
        z_TE = trace.scaled_logits_TE[:, : spec.num_choices]
        bias_TE = choice_TE - np.maximum(z_TE, 0)
        low_TE, high_TE = (np.maximum(z_TE + sign * error_TE, 0) + bias_TE for sign in (-1, 1))
    worst_in_T, best_out_T = edges(chosen_TE, low_TE, high_TE)
    full_T = chosen_TE.sum(axis=-1) == spec.top_k
    if spec.selector == "threshold":
        slack = EPSILON["float32"] * abs(spec.threshold)
        none_near_T = np.where(full_T, worst_in_T > best_out_T, best_out_T <= spec.threshold - slack)
        return (worst_in_T > spec.threshold + slack) & none_near_T
    begins_T, ends_T = _sums(case, chosen_TE, error_TE, "float32", sign=-1)
    return (begins_T | (chosen_TE.sum(axis=-1) <= 1)) & (ends_T | full_T) & (worst_in_T > best_out_T)


def _sums(
    case: RouterCase, chosen_TE: np.ndarray, error_TE: np.ndarray, dtype: str, *, sign: int
) -> tuple[np.ndarray, np.ndarray]:
    """(T,) whether all but the least of the chosen sum to at most top_p, and whether all of them sum to more.

    Where none is left all of them do. Either holds within the error of the sum, with sign 1, or beyond it, with -1.
    """
    choice_TE, top_p = case.reference.scores_for_choice_TE, case.spec.top_p
    assert choice_TE is not None
    assert top_p is not None
    masked_TE = np.isneginf(choice_TE)
    share_TE = np.where(chosen_TE & ~masked_TE, choice_TE, 0)
    off_T = np.where(chosen_TE, error_TE, 0).sum(axis=-1) + EPSILON[dtype] * (case.spec.top_k + 1)
    sum_T, least_T = share_TE.sum(axis=-1), np.where(chosen_TE, share_TE, np.inf).min(axis=-1)
    begins_T = sum_T - np.where(chosen_TE.any(axis=-1), least_T, 0) <= top_p + sign * off_T
    ends_T = (sum_T > top_p - sign * off_T) | (chosen_TE | masked_TE).all(axis=-1)
    return begins_T, ends_T
