"""conformance, router: selections of as many experts as a token needs, and which of them rounding explains.

Legend: T tokens, E choices, K top_k.
"""

import numpy as np

from conformance.core.rounding import EPSILON
from conformance.router.bounds import choice_error, taken
from conformance.router.case import RouterCase
from moe_ref import UNUSED


def explained_T(expert_ids_TK: np.ndarray, case: RouterCase, dtype: str) -> np.ndarray:
    """(T,) whether some choice scores within the error make the reference select these experts, in whatever slots."""
    spec, choice_TE, error_TE = case.spec, case.reference.scores_for_choice_TE, choice_error(case, dtype)
    assert choice_TE is not None  # a selector that varies ranks
    chosen_TE, num_T = taken(case, expert_ids_TK), (expert_ids_TK != UNUSED).sum(axis=-1)
    high_TE, low_TE = choice_TE + error_TE, choice_TE - error_TE
    worst_in_T = np.where(chosen_TE, high_TE, np.inf).min(axis=-1)
    best_out_T = np.where(chosen_TE, -np.inf, low_TE).max(axis=-1, initial=-np.inf)
    full_T = num_T == spec.top_k
    if spec.selector == "threshold":
        # Those within are above it; of those without none is, or there is no slot left for it.
        slack = EPSILON[dtype] * abs(spec.threshold)
        none_left_T = np.where(full_T, worst_in_T >= best_out_T, best_out_T <= spec.threshold + slack)
        return (worst_in_T > spec.threshold - slack) & none_left_T
    assert spec.top_p is not None
    share_TE, off_TE = np.where(np.isneginf(choice_TE), 0, choice_TE), np.where(np.isneginf(choice_TE), 0, error_TE)
    sum_T, off_T = (np.where(chosen_TE, each, 0).sum(axis=-1) for each in (share_TE, off_TE))
    off_T = off_T + EPSILON[dtype] * (spec.top_k + 1)
    # The last one is the least of them; all that came before it sum to at most p, and with it to more.
    least_T = np.where(chosen_TE, share_TE, np.inf).min(axis=-1)
    begins_T = sum_T - np.where(num_T > 0, least_T, 0) <= spec.top_p + off_T
    masked_TE = np.isneginf(choice_TE)
    ends_T = (sum_T > spec.top_p - off_T) | full_T | (chosen_TE | masked_TE).all(axis=-1)
    return (num_T > 0) & (worst_in_T >= best_out_T) & begins_T & ends_T & ~(chosen_TE & masked_TE).any(axis=-1)


def settled_T(case: RouterCase, error_TE: np.ndarray) -> np.ndarray:
    """(T,) whether the reference selects the same experts for all choice scores within the error, (T, E)."""
    spec, trace = case.spec, case.reference
    choice_TE, chosen_TE = trace.scores_for_choice_TE, taken(case, trace.expert_ids_TK)
    assert choice_TE is not None  # a selector that varies ranks
    low_TE, high_TE = choice_TE - error_TE, choice_TE + error_TE
    if spec.score_func == "relu" and spec.select_by == "score":  # what is far below 0 scores 0 all the same
        z_TE = trace.scaled_logits_TE[:, : spec.num_choices]
        bias_TE = choice_TE - np.maximum(z_TE, 0)
        low_TE, high_TE = (np.maximum(z_TE + sign * error_TE, 0) + bias_TE for sign in (-1, 1))
        error_TE = high_TE - low_TE
    worst_in_T = np.where(chosen_TE, low_TE, np.inf).min(axis=-1, initial=np.inf)
    best_out_T = np.where(chosen_TE, -np.inf, high_TE).max(axis=-1, initial=-np.inf)
    full_T = chosen_TE.sum(axis=-1) == spec.top_k
    if spec.selector == "threshold":
        slack = EPSILON["float32"] * abs(spec.threshold)
        none_near_T = np.where(full_T, worst_in_T > best_out_T, best_out_T <= spec.threshold - slack)
        return (worst_in_T > spec.threshold + slack) & none_near_T
    assert spec.top_p is not None
    used_TE = np.where(chosen_TE, choice_TE, 0)
    sum_T, least_T = used_TE.sum(axis=-1), np.where(chosen_TE, choice_TE, np.inf).min(axis=-1, initial=np.inf)
    off_T = np.where(chosen_TE, error_TE, 0).sum(axis=-1) + EPSILON["float32"] * (spec.top_k + 1)
    alone_T = chosen_TE.sum(axis=-1) <= 1
    begins_T = alone_T | (sum_T - np.where(alone_T, 0, least_T) <= spec.top_p - off_T)
    ends_T = (sum_T > spec.top_p + off_T) | full_T | (chosen_TE | np.isneginf(choice_TE)).all(axis=-1)
    return (worst_in_T > best_out_T) & begins_T & ends_T
