"""conformance, the comparison: bounds from one table, and which selections rounding can explain.

Errors are relative to the number itself: weights and scores have no cancellation, so each is bounded by a few
roundings plus what a rounded exponent does to exp (one rounding of z shifts exp(z) by |z| of them).
"""

from itertools import combinations

import numpy as np

from conformance.core.rounding import EPSILON, TINY
from conformance.router.case import RouterCase
from moe_ref import UNUSED, RouterSpec
from moe_ref.routing import factor_of, gather, kept_experts, normalise, scale_weights, score, softmax

ROUNDINGS = 16
"""Roundings granted to a score or weight besides those of exp's argument: sums, divisions, library exp (4 ulp)."""


def score_floor(spec: RouterSpec, dtype: str) -> float:
    """Absolute error of a score that underflows."""
    return TINY[dtype] ** 0.5 if spec.score_func == "sqrtsoftplus" else TINY[dtype]


def logit_error(case: RouterCase, dtype: str) -> np.ndarray:
    """Absolute error of each scaled logit."""
    spec = case.spec
    z_TE = np.abs(np.nan_to_num(case.reference.scaled_logits_TE[:, : spec.num_choices], neginf=0.0))
    if spec.logit_scale == 1 and spec.logit_softcap is None:
        return np.zeros_like(z_TE)
    return 4 * EPSILON[dtype] * z_TE


def score_error(case: RouterCase, dtype: str) -> np.ndarray:
    """Relative error of each score, (T, E)."""
    spec, eps = case.spec, EPSILON[dtype]
    z_TE = np.nan_to_num(case.reference.scaled_logits_TE[:, : spec.num_choices], neginf=0.0)
    if spec.score_func == "softmax":
        z_TE = z_TE - z_TE.max(axis=-1, keepdims=True, initial=-np.inf)
    error_TE = eps * (ROUNDINGS + np.abs(z_TE)) + logit_error(case, dtype)
    if (spec.score_func == "softmax" and spec.logit_scale != 1) or spec.logit_softcap is not None:
        error_TE = error_TE + logit_error(case, dtype).max(axis=-1, keepdims=True, initial=0)
    return error_TE


def choice_error(case: RouterCase, dtype: str) -> np.ndarray:
    """Absolute error of each choice score, (T, E)."""
    trace, eps = case.reference, EPSILON[dtype]
    assert trace.scores_for_choice_TE is not None
    choice_TE = np.abs(np.nan_to_num(trace.scores_for_choice_TE, neginf=0.0))
    if case.spec.select_by == "logit":
        error_TE = logit_error(case, dtype)
    else:
        assert trace.scores_TE is not None
        error_TE = trace.scores_TE * score_error(case, dtype) + score_floor(case.spec, dtype)
    if case.expert_bias_E is None or not np.any(case.expert_bias_E):
        return error_TE
    return error_TE + eps * (choice_TE + np.abs(case.expert_bias_E))


def unlimited_choice(case: RouterCase) -> np.ndarray:
    """Choice scores before any group is dropped, (T, E)."""
    spec, trace = case.spec, case.reference
    if spec.num_expert_groups is None:
        assert trace.scores_for_choice_TE is not None
        return trace.scores_for_choice_TE
    ranked_TE = trace.scaled_logits_TE[:, : spec.num_choices] if spec.select_by == "logit" else trace.scores_TE
    assert ranked_TE is not None
    bias_E = 0 if case.expert_bias_E is None else case.expert_bias_E
    return np.where(np.isneginf(case.logits_TE[:, : spec.num_choices]), -np.inf, ranked_TE + bias_E)


def best_T(expert_ids_TK, choice_TE, error_TE) -> np.ndarray:
    """(T,) whether some choice scores within the error make these ids the best ones."""
    chosen_TE = np.zeros(choice_TE.shape, dtype=bool)
    np.put_along_axis(chosen_TE, expert_ids_TK, True, axis=-1)
    worst_in_T = np.where(chosen_TE, choice_TE + error_TE, np.inf).min(axis=-1)
    best_out_T = np.where(chosen_TE, -np.inf, choice_TE - error_TE).max(axis=-1)
    return worst_in_T >= best_out_T


def best(ids_K, choice_E, error_E) -> bool:
    """`best_T` of one token."""
    return bool(best_T(ids_K[None], choice_E[None], error_E[None])[0])


def group_sets(ids_K, spec: RouterSpec):
    """Every set of num_limited_groups groups that holds these ids."""
    used = sorted({int(i) // spec.experts_per_group for i in ids_K})
    free = [g for g in range(spec.num_expert_groups or 1) if g not in used]
    for more in combinations(free, max(0, (spec.num_limited_groups or 1) - len(used))):
        if len(used) + len(more) == spec.num_limited_groups:
            yield np.array(sorted([*used, *more]))


def best_in_some_groups(ids_K, choice_E, error_E, spec: RouterSpec) -> bool:
    """The ids are the best ones of some num_limited_groups groups, whichever these are."""
    group_of_E = np.arange(spec.num_experts) // spec.experts_per_group
    return any(
        best(ids_K, np.where(np.isin(group_of_E, kept), choice_E, -np.inf), error_E) for kept in group_sets(ids_K, spec)
    )


def admissible(ids_K, choice_E, error_E, spec: RouterSpec, dtype: str, group_ids_L=None) -> bool:
    """Some choice scores within the error make the reference select these ids, groups and experts together.

    The scores most favourable to a set of kept groups are: selected experts as high as the error allows, other
    experts of kept groups as high as they can be without being selected, experts of dropped groups as low as
    it allows. If the reference does not keep these groups then, it never does.
    """
    if spec.num_expert_groups is None:
        return best(ids_K, choice_E, error_E)
    group_of_E = np.arange(spec.num_experts) // spec.experts_per_group
    if spec.mask_fill == 0:
        # Dropped experts may be selected, at choice score 0: any set of kept groups is possible.
        sets = [np.array(s) for s in combinations(range(spec.num_expert_groups), spec.num_limited_groups or 1)]
    else:
        sets = list(group_sets(ids_K, spec))
    if group_ids_L is not None:
        sets = [kept for kept in sets if set(kept) == set(map(int, group_ids_L))]
    for kept in sets:
        kept_E = np.isin(group_of_E, kept)
        masked_E = np.where(kept_E, choice_E, spec.mask_fill)
        masked_error_E = np.where(kept_E, error_E, 0)
        if not best(ids_K, masked_E, masked_error_E):
            continue
        chosen_E = np.isin(np.arange(spec.num_experts), ids_K)
        threshold = (masked_E + masked_error_E)[chosen_E].min()
        favourable_E = np.where(
            kept_E,
            np.where(chosen_E, choice_E + error_E, np.minimum(choice_E + error_E, threshold)),
            choice_E - error_E,
        )
        if keeps(kept, favourable_E, spec, dtype):
            return True
    return False


def keeps(kept_L, choice_E, spec: RouterSpec, dtype: str) -> bool:
    """The reference keeps these groups for these choice scores, but for the rounding of the sums."""
    best_first_GP = -np.sort(-choice_E.reshape(spec.num_expert_groups, -1), axis=-1)[:, : spec.group_score_k]
    scores_G = best_first_GP.sum(axis=-1)
    sizes_G = np.abs(np.nan_to_num(best_first_GP, neginf=0.0)).sum(axis=-1)
    slack = (spec.group_score_k - 1) * EPSILON[dtype] * sizes_G.max()
    in_G = np.isin(np.arange(len(scores_G)), kept_L)
    return bool(scores_G[in_G].min() + slack >= scores_G[~in_G].max(initial=-np.inf))


def expected_weights(case: RouterCase, expert_ids_TK) -> np.ndarray:
    """The reference's weights for these ids, whoever selected them, (T, K)."""
    spec, trace = case.spec, case.reference
    E, S = spec.num_choices, spec.num_scored_shared_experts
    used_TK = expert_ids_TK != UNUSED
    if spec.selector == "sparsemixer":  # a weight belongs to its slot; known for the reference's own selection
        weights_TE = np.zeros((case.num_tokens, E))
        np.put_along_axis(weights_TE, trace.expert_ids_TK, trace.weights_TK, axis=-1)
        return gather(weights_TE, expert_ids_TK)
    if spec.score_over == "selected":
        logits_TK = gather(trace.scaled_logits_TE[:, :E], expert_ids_TK)
        raw_TK = softmax(np.where(used_TK, logits_TK, -np.inf))
    else:
        scores_TE = trace.scores_TE
        assert scores_TE is not None
        if trace.group_ids_TL is not None and spec.weights_from == "masked_scores":
            scores_TE = np.where(kept_experts(trace.group_ids_TL, spec), scores_TE, 0)
        raw_TK = gather(scores_TE, expert_ids_TK)
    shared_TS = score(trace.scaled_logits_TE[:, E:], spec) if S else np.zeros((case.num_tokens, 0))
    normed_TK, _ = normalise(raw_TK, shared_TS, spec)
    learned = case.inputs.get("learned_scale", np.ones(()))
    return scale_weights(normed_TK, expert_ids_TK, learned, spec)


def weight_error(case: RouterCase, expert_ids_TK, dtype: str) -> np.ndarray:
    """Relative error of each weight, (T, K)."""
    error_TK = gather(score_error(case, dtype), expert_ids_TK)
    if case.spec.route_norm or case.spec.score_over == "selected":
        error_TK = error_TK + error_TK.max(axis=-1, keepdims=True, initial=0)
    if case.spec.norm_with_shared:
        shared_TS = np.abs(case.reference.scaled_logits_TE[:, case.spec.num_choices :])
        error_TK = error_TK + EPSILON[dtype] * (ROUNDINGS + shared_TS.max(axis=-1, keepdims=True, initial=0))
    powers = case.spec.norm_p if case.spec.route_norm else 1.0
    return error_TK * max(1.0, powers) + EPSILON[dtype] * ROUNDINGS


def known_factor(case: RouterCase, expert_ids_TK):
    """Per-expert factors of the selected experts, to be divided out where only the scores matter."""
    if case.spec.learned_scale == "none":
        return np.ones(())
    return factor_of(expert_ids_TK, case.inputs["learned_scale"], case.spec)
