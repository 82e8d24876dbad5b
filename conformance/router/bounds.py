"""conformance, router, bounds: how far rounding reaches, from one table, and which selections rounding can explain.

Errors are relative to the number itself: weights and scores have no cancellation, so each is bounded by a few
roundings plus what a rounded exponent does to exp (one rounding of z shifts exp(z) by |z| of them).
"""

from itertools import combinations, islice

import numpy as np

from conformance.core.rounding import EPSILON, TINY, coarse, coarse_dtype
from conformance.router.case import RouterCase
from moe_ref import UNUSED, RouterSpec
from moe_ref.routing import factor_of, gather, kept_experts, leave_out, normalise, scale_weights, score, softmax
from moe_ref.sinkhorn import sinkhorn

ROUNDINGS = 16
"""Roundings granted to a score or weight besides those of exp's argument: sums, divisions, library exp (4 ulp)."""
LOW_PRECISION = ("bfloat16", "float16")
"""dtypes of logits that are narrower than float32, in which scores and weights may be handed on."""
ROUNDS = 512
"""Roundings granted to the logarithm of an expert's factor: those of sums over the batch, round after round."""
SETS_AT_A_TIME = 1024
"""Sets of kept groups that are looked at together."""


def narrow_dtypes(case: RouterCase) -> list[str]:
    """The dtypes narrower than float32 that a router of this case may round to: its logits', and its spec's."""
    return [dtype for dtype in (case.dtype, case.spec.router_dtype) if dtype in LOW_PRECISION]


def coarseness(case: RouterCase) -> float:
    """What one rounding to the dtype of low-precision logits, or to a narrow router_dtype, does; 0 where both are wide.

    Such logits are exact as they are given. What is made of them may be rounded to their dtype again, here and there:
    a score, the bias, their sum, a weight. SCR-8 advises against it.
    """
    return max((EPSILON[dtype] for dtype in narrow_dtypes(case)), default=0.0)


def smallest(case: RouterCase, dtype: str) -> float:
    """Below this a number has no relative accuracy."""
    own = [coarse_dtype(dtype, stage) for stage in ("scores", "weights")]
    tiny = max(TINY[each] for each in (dtype, *narrow_dtypes(case)))
    return max(tiny, *(TINY.get(name or "", 0.0) for name in own))


def score_floor(case: RouterCase, dtype: str) -> float:
    """Absolute error of a score that underflows."""
    tiny = smallest(case, dtype)
    return tiny**0.5 if case.spec.score_func == "sqrtsoftplus" else tiny


def underflows_T(case: RouterCase, expert_ids_TK: np.ndarray, dtype: str) -> np.ndarray:
    """(T,) whether the scores of all these choices underflow, in float32 too; where there are none, they do not."""
    if case.reference.scores_TE is None:
        return np.zeros(case.num_tokens, dtype=bool)
    largest_T = gather(case.reference.scores_TE, expert_ids_TK).max(axis=-1, initial=0)
    return largest_T < max(smallest(case, dtype), TINY["float32"])


def logit_error(case: RouterCase, dtype: str) -> np.ndarray:
    """Absolute error of each scaled logit."""
    spec = case.spec
    z_TE = np.abs(np.nan_to_num(case.reference.scaled_logits_TE[:, : spec.num_choices], neginf=0.0))
    error_TE = (4 * EPSILON[dtype] + 2 * coarseness(case)) * z_TE if spec.scales_logits else np.zeros_like(z_TE)
    if has_noise(case):  # a product, and a sum in which the two may cancel
        noise_TE = np.abs(case.inputs.get("logit_noise_TE", np.zeros(())))[..., : spec.num_choices]
        error_TE = error_TE + (EPSILON[dtype] + coarseness(case)) * (z_TE + 2 * spec.logit_scale * noise_TE)
    return error_TE


def has_noise(case: RouterCase) -> bool:
    """Whether the logits are multiplied by factors, or a noise is added to them."""
    return "logit_factors_TE" in case.inputs or "logit_noise_TE" in case.inputs


def score_error(case: RouterCase, dtype: str) -> np.ndarray:
    """Relative error of each score, (T, E)."""
    spec, eps = case.spec, EPSILON[dtype]
    z_TE = np.nan_to_num(case.reference.scaled_logits_TE[:, : spec.num_choices], neginf=0.0)
    if spec.score_func == "softmax":
        z_TE = z_TE - z_TE.max(axis=-1, keepdims=True, initial=-np.inf)
    error_TE = eps * (ROUNDINGS + np.abs(z_TE)) + 2 * coarseness(case) + logit_error(case, dtype)
    error_TE = error_TE + coarse(dtype, "scores", spec.num_choices)
    shifts = spec.logit_scale != 1 or has_noise(case)
    if (spec.score_func == "softmax" and shifts) or spec.logit_softcap is not None:
        error_TE = error_TE + logit_error(case, dtype).max(axis=-1, keepdims=True, initial=0)
    return error_TE


def choice_error(case: RouterCase, dtype: str) -> np.ndarray:
    """Absolute error of each choice score, (T, E)."""
    trace, eps = case.reference, EPSILON[dtype]
    assert trace.scores_for_choice_TE is not None
    choice_TE = np.abs(np.nan_to_num(trace.scores_for_choice_TE, neginf=0.0))
    if case.spec.selector == "sinkhorn":
        return logit_error(case, dtype) + eps * choice_TE + sinkhorn_error(case, dtype)
    if case.spec.select_by == "logit":
        error_TE = logit_error(case, dtype)
    else:
        assert trace.scores_TE is not None
        error_TE = trace.scores_TE * score_error(case, dtype) + score_floor(case, dtype)
        if case.spec.score_func == "relu":  # a logit below 0 scores 0 exactly, as far as its own error does not lift it
            z_TE, shift_TE = trace.scaled_logits_TE[:, : case.spec.num_choices], logit_error(case, dtype)
            error_TE = np.where(z_TE + shift_TE > 0, error_TE + shift_TE, 0)
    E = case.spec.num_choices
    if ranked := coarse(dtype, "selection", E):
        sizes_TE = np.abs(np.nan_to_num(unlimited_choice(case), neginf=0.0))
        error_TE = error_TE + ranked * (sizes_TE + error_TE)
    if case.expert_bias_E is None or not np.any(case.expert_bias_E):
        return error_TE
    error_TE = error_TE + coarse(dtype, "bias", E) * np.abs(case.expert_bias_E)
    return error_TE + (eps + coarseness(case)) * (choice_TE + np.abs(case.expert_bias_E))


def sinkhorn_error(case: RouterCase, dtype: str) -> np.ndarray:
    """(E,) absolute error of the logarithm of an expert's factor."""
    choices_TE, valid_T1 = case.reference.scaled_logits_TE[:, : case.spec.num_choices], case.valid_T[:, None]
    # Rounding may end the loop a round earlier or later, or not at all; so the whole way that is left is granted.
    ended_E, settled_E = sinkhorn(choices_TE, valid_T1), sinkhorn(choices_TE, valid_T1, tolerance=0)
    logits = logit_error(case, dtype).max(initial=0)
    return 4 * np.abs(ended_E - settled_E) + ROUNDS * EPSILON[dtype] * (1 + np.abs(settled_E)) + 4 * logits


def unlimited_choice(case: RouterCase) -> np.ndarray:
    """Choice scores before any group is dropped, and before experts take tokens, (T, E)."""
    spec, trace = case.spec, case.reference
    if spec.num_expert_groups is None and spec.selector != "expert_choice":
        assert trace.scores_for_choice_TE is not None
        return trace.scores_for_choice_TE
    ranked_TE = trace.scaled_logits_TE[:, : spec.num_choices] if spec.select_by == "logit" else trace.scores_TE
    assert ranked_TE is not None
    bias_E = 0 if case.expert_bias_E is None else case.expert_bias_E
    never_TE = np.isneginf(case.logits_TE[:, : spec.num_choices])
    if spec.selector == "expert_choice":
        never_TE |= ~case.valid_T[:, None]
    return np.where(never_TE, -np.inf, ranked_TE + bias_E)


def taken(expert_ids_TK: np.ndarray, num_choices: int) -> np.ndarray:
    """(T, E) whether each choice is among a token's ids."""
    return (expert_ids_TK[:, :, None] == np.arange(num_choices)).any(axis=1)


def edges(chosen: np.ndarray, inside: np.ndarray, outside: np.ndarray, axis: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """The worst of the chosen, of the numbers `inside`, and the best of the others, of those `outside`, along an axis.

    Of no number they are inf and -inf.
    """
    worst_in = np.where(chosen, inside, np.inf).min(axis=axis, initial=np.inf)
    return worst_in, np.where(chosen, -np.inf, outside).max(axis=axis, initial=-np.inf)


def taken_clearly_T(case: RouterCase, error_TE: np.ndarray) -> np.ndarray:
    """(T,) whether each expert takes the token, or leaves it, for all choice scores within the error."""
    choice_TE, taken_TE = unlimited_choice(case), taken(case.reference.expert_ids_TK, case.spec.num_choices)
    low_TE, high_TE = choice_TE - error_TE, choice_TE + error_TE
    worst_in_E, best_out_E = edges(taken_TE, low_TE, high_TE, axis=0)
    doubtful_TE = np.where(taken_TE, low_TE <= best_out_E, high_TE >= worst_in_E)
    return ~np.any(doubtful_TE, axis=-1)


def best_T(expert_ids_TK: np.ndarray, choice_TE: np.ndarray, error_TE: np.ndarray) -> np.ndarray:
    """(T,) whether some choice scores within the error make these ids the best ones."""
    chosen_TE = np.zeros(choice_TE.shape, dtype=bool)
    np.put_along_axis(chosen_TE, expert_ids_TK, True, axis=-1)
    worst_in_T, best_out_T = edges(chosen_TE, choice_TE + error_TE, choice_TE - error_TE)
    return worst_in_T >= best_out_T


def groups_of(ids_K: np.ndarray, spec: RouterSpec) -> list[int]:
    """The groups of these experts."""
    return np.unique(np.asarray(ids_K) // spec.experts_per_group).tolist()


def in_groups(values_E: np.ndarray, spec: RouterSpec) -> np.ndarray:
    """(G, P)."""
    return values_E.reshape(-1, spec.experts_per_group)


def can_be_kept(ids_K: np.ndarray, choice_E: np.ndarray, error_E: np.ndarray, spec: RouterSpec) -> np.ndarray:
    """(G,) groups that have no better expert than these ids, within the error."""
    chosen_E = np.isin(np.arange(spec.num_experts), ids_K)
    worst_in = (choice_E + error_E)[chosen_E].min()
    return np.all(in_groups(chosen_E | (choice_E - error_E <= worst_in), spec), axis=-1)


def best_in_some_groups(ids_K: np.ndarray, choice_E: np.ndarray, error_E: np.ndarray, spec: RouterSpec) -> bool:
    """The ids are the best ones of some num_limited_groups groups, whichever these are."""
    used, L = groups_of(ids_K, spec), spec.num_limited_groups or 1
    possible_G = can_be_kept(ids_K, choice_E, error_E, spec)
    return len(used) <= L <= possible_G.sum() and bool(possible_G[used].all())


def admissible(
    ids_K: np.ndarray,
    choice_E: np.ndarray,
    error_E: np.ndarray,
    spec: RouterSpec,
    dtype: str,
    group_ids_L: np.ndarray | None = None,
) -> bool:
    """Some choice scores within the error make the reference select these ids, groups and experts together.

    The scores most favourable to a set of kept groups are: selected experts as high as the error allows, other
    experts of kept groups as high as they can be without being selected, experts of dropped groups as low as
    it allows. If the reference does not keep these groups then, it never does.
    """
    if spec.num_expert_groups is None:
        return bool(best_T(ids_K[None], choice_E[None], error_E[None])[0])
    if spec.mask_fill == 0:
        return _admissible_with_fill_0(ids_K, choice_E, error_E, spec, dtype, group_ids_L)
    L, used = spec.num_limited_groups or 1, np.zeros(spec.num_expert_groups, dtype=bool)
    used[groups_of(ids_K, spec)] = True
    possible = can_be_kept(ids_K, choice_E, error_E, spec)
    chosen_E = np.isin(np.arange(spec.num_experts), ids_K)
    highest_E = choice_E + error_E
    kept_E = np.where(chosen_E, highest_E, np.minimum(highest_E, highest_E[chosen_E].min()))
    kept_G, slack = sums_of_best(in_groups(kept_E, spec), spec, dtype)
    dropped_G, other_slack = sums_of_best(in_groups(choice_E - error_E, spec), spec, dtype)
    kept_G = np.where(possible, kept_G, -np.inf) + max(slack, other_slack)
    if group_ids_L is not None:
        inside = np.isin(np.arange(spec.num_expert_groups), group_ids_L)
        fits = inside.sum() == L and not (used & ~inside).any() and possible[inside].all()
        return bool(fits and kept_G[inside].min() >= dropped_G[~inside].max(initial=-np.inf))
    # Whichever dropped group has the best score: those above it are kept, and every kept one reaches it.
    for best_dropped in (-np.inf, *dropped_G):
        inside, reaches = used | (dropped_G > best_dropped), possible & (kept_G >= best_dropped)
        if inside.sum() <= L <= reaches.sum() and reaches[inside].all():
            return True
    return False


def sums_of_best(choice_NP: np.ndarray, spec: RouterSpec, dtype: str) -> tuple[np.ndarray, float]:
    """(groups,) scores of groups, and how far their sums may be off."""
    best_first_NP = -np.sort(-choice_NP, axis=-1)[..., : spec.group_score_k]
    sizes_N = np.abs(np.nan_to_num(best_first_NP, neginf=0.0)).sum(axis=-1)
    return best_first_NP.sum(axis=-1), (spec.group_score_k - 1) * EPSILON[dtype] * sizes_N.max(initial=0)


def _admissible_with_fill_0(ids_K, choice_E, error_E, spec: RouterSpec, dtype: str, group_ids_L) -> bool:
    """Dropped experts may be selected, at choice score 0: any set of kept groups is possible, and each is tried."""
    G, P = spec.num_expert_groups or 1, spec.experts_per_group
    sets = combinations(range(G), spec.num_limited_groups or 1)
    if group_ids_L is not None:
        sets = iter([tuple(sorted(set(map(int, group_ids_L))))])
    chosen_E = np.isin(np.arange(spec.num_experts), ids_K)
    while some := list(islice(sets, SETS_AT_A_TIME)):
        kept = np.zeros((len(some), G), dtype=bool)
        kept[np.arange(len(some))[:, None], np.array(some)] = True
        kept_NE = np.repeat(kept, P, axis=-1)
        masked_NE, masked_error_NE = np.where(kept_NE, choice_E, 0), np.where(kept_NE, error_E, 0)
        worst_in_N, best_out_N = edges(chosen_E, masked_NE + masked_error_NE, masked_NE - masked_error_NE)
        in_kept_NE = np.where(chosen_E, choice_E + error_E, np.minimum(choice_E + error_E, worst_in_N[:, None]))
        favourable_NE = np.where(kept_NE, in_kept_NE, choice_E - error_E)
        scores_NG, slack = sums_of_best(favourable_NE.reshape(len(some), G, P), spec, dtype)
        worst_kept_N, best_dropped_N = edges(kept, scores_NG, scores_NG)
        if ((worst_in_N >= best_out_N) & (worst_kept_N + slack >= best_dropped_N)).any():
            return True
    return False


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
    normed_TK, _ = normalise(leave_out(raw_TK, expert_ids_TK, spec), shared_TS, spec)
    learned = case.inputs.get("learned_scale", np.ones(()))
    return scale_weights(normed_TK, expert_ids_TK, learned, spec)


def weight_error(case: RouterCase, expert_ids_TK, dtype: str) -> np.ndarray:
    """Relative error of each weight, (T, K)."""
    error_TK = gather(score_error(case, dtype), expert_ids_TK) + 4 * coarseness(case)
    if case.spec.route_norm or case.spec.score_over == "selected":
        error_TK = error_TK + error_TK.max(axis=-1, keepdims=True, initial=0)
    if case.spec.norm_with_shared:
        shared_TS = np.abs(case.reference.scaled_logits_TE[:, case.spec.num_choices :])
        error_TK = error_TK + EPSILON[dtype] * (ROUNDINGS + shared_TS.max(axis=-1, keepdims=True, initial=0))
    # Raw, normed and scaled, it is rounded each time.
    error_TK = error_TK + 3 * coarse(dtype, "weights", case.spec.num_choices)
    powers = case.spec.norm_p if case.spec.route_norm else 1.0
    return error_TK * max(1.0, powers) + EPSILON[dtype] * ROUNDINGS


def weight_floor(case: RouterCase, expert_ids_TK, wanted_TK, dtype: str) -> np.ndarray:
    """Absolute error of a token's weights: what the smallest number becomes after norm and scale, (T, 1)."""
    if case.reference.scores_TE is None:
        return np.full((case.num_tokens, 1), smallest(case, dtype) * max(1.0, case.spec.route_scale))
    raw_TK = gather(case.reference.scores_TE, expert_ids_TK)
    with np.errstate(over="ignore"):  # of a subnormal score
        factor_TK = np.where(raw_TK > 0, wanted_TK / np.where(raw_TK > 0, raw_TK, 1), 1)
    return score_floor(case, dtype) * factor_TK.max(axis=-1, keepdims=True, initial=1)


def known_factor(case: RouterCase, expert_ids_TK):
    """Per-expert factors of the selected experts, to be divided out where only the scores matter."""
    if case.spec.learned_scale == "none":
        return np.ones(())
    return factor_of(expert_ids_TK, case.inputs["learned_scale"], case.spec)
