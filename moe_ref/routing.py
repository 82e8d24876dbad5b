"""moe_ref, routing: from logits to expert ids and weights, one function per stage, in order.

    gate -> scale_logits -> score -> bias_choice -> limit_groups -> select -> weigh -> normalise -> scale_weights

Legend: T tokens, D model dim, E choices (experts, then null experts), K top_k, G groups, P experts per group,
L groups kept, S router-scored shared experts. Everything is plain NumPy in float64.
Start at `route`.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import DTypeLike

from moe_ref.rounding import dtype_of_router, round_to
from moe_ref.sinkhorn import sinkhorn
from moe_ref.specs.checks import array, entries, integer, mask_array, require
from moe_ref.specs.ids import UNUSED, ids_array
from moe_ref.specs.inputs import NO_INPUTS, RouterInputs
from moe_ref.specs.router import RouterSpec


@dataclass(frozen=True, kw_only=True)
class RoutingTrace:
    """Every intermediate of `route`, under the name it keeps everywhere; None where a spec has no such stage."""

    logits_TE: np.ndarray
    scaled_logits_TE: np.ndarray
    scores_TE: np.ndarray | None
    scores_for_choice_TE: np.ndarray | None
    group_scores_TG: np.ndarray | None
    group_ids_TL: np.ndarray | None
    expert_ids_TK: np.ndarray
    weights_TK: np.ndarray
    shared_weights_TS: np.ndarray | None
    logit_factors_TE: np.ndarray | None = None
    """As they were given: the logits' gradient has them."""
    weights_are_given: bool = False
    """The weights were given with the ids: they are no function of the logits."""


def gate(
    x_TD: np.ndarray, gate_ED: np.ndarray, gate_bias_E: np.ndarray | None = None, *, dtype: DTypeLike = np.float64
) -> np.ndarray:
    """The logits are x @ gate.T, plus the learned gate bias. [GAT-1, GAT-2]

    Args:
        x_TD: (T, D) tokens.
        gate_ED: (E, D) gate weights, one row per column of the logits.
        gate_bias_E: (E,) learned bias; it is part of the logits, unlike expert_bias.

    Returns:
        logits_TE: (T, E).
    """
    x_TD = array("x_TD", x_TD, (None, None)).astype(dtype)
    gate_ED = array("gate_ED", gate_ED, (None, x_TD.shape[1])).astype(dtype)
    logits_TE = x_TD @ gate_ED.T
    if gate_bias_E is None:
        return logits_TE
    return logits_TE + array("gate_bias_E", gate_bias_E, (gate_ED.shape[0],)).astype(dtype)


def add_noise(logits_TE: np.ndarray, inputs: RouterInputs, valid_T1: np.ndarray) -> np.ndarray:
    """Noise is an input: factors multiply the logits, then a noise is added, before all else. [SCR-13]"""
    factors_TE, noise_TE = inputs.logit_factors_TE, inputs.logit_noise_TE
    if factors_TE is not None:
        positive_TE = np.isfinite(factors_TE) & (factors_TE > 0) | ~valid_T1
        entries("logit_factors_TE", np.asarray(factors_TE), positive_TE, "entries are finite and above 0")
        logits_TE = logits_TE * np.where(valid_T1, factors_TE, 1).astype(logits_TE.dtype)
    if noise_TE is not None:
        entries("logit_noise_TE", np.asarray(noise_TE), np.isfinite(noise_TE) | ~valid_T1, "entries are finite")
        logits_TE = logits_TE + np.where(valid_T1, noise_TE, 0).astype(logits_TE.dtype)
    return logits_TE


def scale_logits(logits_TE: np.ndarray, spec: RouterSpec) -> np.ndarray:
    """Logits are scaled, then soft-capped, before they are scored or ranked. [SCR-5]

    A narrow router_dtype rounds them as they come, and what is made of them. [SCR-11]
    """
    scaled_TE = round_to(logits_TE, spec.router_dtype) * spec.logit_scale
    if spec.logit_softcap is not None:
        capped_TE = spec.logit_softcap * np.tanh(scaled_TE / spec.logit_softcap)
        # A cap is finite, but an expert that is masked stays masked.
        scaled_TE = np.where(np.isneginf(scaled_TE), scaled_TE, capped_TE)
    return round_to(scaled_TE, spec.router_dtype)


def score(scaled_logits_TE: np.ndarray, spec: RouterSpec) -> np.ndarray:
    """Scores are a function of the scaled logits alone; no bias enters them. [SCR-1, SCR-2, SCR-3, SCR-14]"""
    if spec.score_func == "softmax":
        return softmax(scaled_logits_TE)
    if spec.score_func == "sigmoid":
        return np.exp(-np.logaddexp(0, -scaled_logits_TE))
    if spec.score_func == "relu":
        return np.maximum(scaled_logits_TE, 0)
    return np.sqrt(np.logaddexp(0, scaled_logits_TE))


def softmax(logits_TE: np.ndarray) -> np.ndarray:
    """Softmax over the last axis; -inf gives exactly 0, and so does a row of nothing else."""
    largest_T1 = logits_TE.max(axis=-1, keepdims=True, initial=-np.inf)
    exp_TE = np.exp(logits_TE - np.where(np.isneginf(largest_T1), 0, largest_T1))
    sum_T1 = exp_TE.sum(axis=-1, keepdims=True)
    return exp_TE / np.where(sum_T1 == 0, 1, sum_T1)


def bias_choice(
    scaled_logits_TE: np.ndarray, scores_TE: np.ndarray | None, expert_bias_E: np.ndarray, spec: RouterSpec
) -> np.ndarray:
    """What is ranked: scores (or logits) plus expert_bias; a logit of -inf is never chosen. [SEL-4, SEL-9]"""
    ranked_TE = scaled_logits_TE if spec.select_by == "logit" else scores_TE
    return np.where(np.isneginf(scaled_logits_TE), -np.inf, ranked_TE + expert_bias_E)


def limit_groups(biased_scores_TE: np.ndarray, spec: RouterSpec) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Only the L groups with the best scores are kept; a group's score sums its best k choice scores. [GRP-1]

    Returns:
        scores_for_choice_TE: experts of dropped groups replaced by mask_fill.
        group_scores_TG: (T, G).
        group_ids_TL: (T, L) kept groups, best first; ties go to the lower group id.
    """
    assert spec.num_expert_groups is not None
    assert spec.num_limited_groups is not None
    grouped_TGP = biased_scores_TE.reshape(-1, spec.num_expert_groups, spec.experts_per_group)
    best_first_TGP = -np.sort(-grouped_TGP, axis=-1)
    group_scores_TG = best_first_TGP[:, :, : spec.group_score_k].sum(axis=-1)
    group_ids_TL = top_k(group_scores_TG, spec.num_limited_groups)
    # -inf, not 0: choice scores can be negative (huggingface/transformers#45440).
    scores_for_choice_TE = np.where(kept_experts(group_ids_TL, spec), biased_scores_TE, spec.mask_fill)
    return scores_for_choice_TE, group_scores_TG, group_ids_TL


def kept_experts(group_ids_TL: np.ndarray, spec: RouterSpec) -> np.ndarray:
    """Whether each expert belongs to a kept group. Expert i belongs to group i // P. [GRP-2]"""
    group_of_E = np.arange(spec.num_experts) // spec.experts_per_group
    return (group_ids_TL[:, :, None] == group_of_E).any(axis=1)


def top_k(scores_TE: np.ndarray, k: int) -> np.ndarray:
    """Ids of the k largest entries of each row, descending; ties go to the lower id. [SEL-5, SEL-6]"""
    return np.argsort(-scores_TE, axis=-1, kind="stable")[:, :k]


def select(scores_for_choice_TE: np.ndarray, spec: RouterSpec) -> np.ndarray:
    """Each token selects the top_k choices with the best choice scores. [SEL-1, SEL-2, SEL-3]"""
    expert_ids_TK = top_k(scores_for_choice_TE, spec.top_k)
    chosen_TK = np.take_along_axis(scores_for_choice_TE, expert_ids_TK, axis=-1)
    enough_T = np.asarray((chosen_TK > -np.inf).all(axis=-1))
    entries("scores_for_choice_TE", scores_for_choice_TE, enough_T, f"top_k ({spec.top_k}) entries are above -inf")
    return expert_ids_TK


def select_above(scores_for_choice_TE: np.ndarray, spec: RouterSpec) -> np.ndarray:
    """(T, K): of the top_k best choices those above the threshold, best first; none, where none is. [SEL-21]

    Source: ReLURouter of thu-ml/ReMoE, and kexue.fm/archives/11626.
    """
    expert_ids_TK = top_k(scores_for_choice_TE, spec.top_k)
    above_TK = np.take_along_axis(scores_for_choice_TE, expert_ids_TK, axis=-1) > spec.threshold
    return np.where(above_TK, expert_ids_TK, UNUSED)


def select_share(scores_for_choice_TE: np.ndarray, spec: RouterSpec) -> np.ndarray:
    """(T, K): the best choices, each while those before it sum to at most top_p: one at least, top_k at most. [SEL-22]

    Raises:
        ValueError: a token has no choice above -inf.

    Source: arXiv:2403.07652, as ZhenweiAn/Dynamic_MoE computes it.
    """
    some_T = np.asarray((scores_for_choice_TE > -np.inf).any(axis=-1))
    entries("scores_for_choice_TE", scores_for_choice_TE, some_T, "an entry is above -inf")
    expert_ids_TK = top_k(scores_for_choice_TE, spec.top_k)
    chosen_TK = np.take_along_axis(scores_for_choice_TE, expert_ids_TK, axis=-1)
    masked_TK = np.isneginf(chosen_TK)
    share_TK = np.where(masked_TK, 0, chosen_TK)
    before_TK = np.concatenate([np.zeros_like(share_TK[:, :1]), share_TK[:, :-1].cumsum(axis=-1)], axis=-1)
    return np.where((before_TK <= spec.top_p) & ~masked_TK, expert_ids_TK, UNUSED)


def limit_quotas(ranked_TE: np.ndarray, spec: RouterSpec) -> np.ndarray:
    """Each quota group keeps its top_k / quota_groups best, ties to the lower id; the others are -inf. [SEL-18]"""
    assert spec.quota_groups is not None
    grouped_TGP = ranked_TE.reshape(-1, spec.quota_groups, spec.num_experts // spec.quota_groups)
    rank_TGP = np.argsort(np.argsort(-grouped_TGP, axis=-1, kind="stable"), axis=-1)
    return np.where(rank_TGP < spec.top_k // spec.quota_groups, grouped_TGP, -np.inf).reshape(ranked_TE.shape)


def take_tokens(ranked_TE: np.ndarray, valid_T1: np.ndarray, spec: RouterSpec) -> np.ndarray:
    """Each expert takes the C valid tokens that rank best for it, ties to the lower token. [SEL-30 .. SEL-34]

    Returns:
        scores_for_choice_TE: -inf where the expert did not take the token.
    """
    ranked_TE = np.where(valid_T1, ranked_TE, -np.inf)
    rank_TE = np.argsort(np.argsort(-ranked_TE, axis=0, kind="stable"), axis=0)
    return np.where(rank_TE < spec.takes(int(valid_T1.sum())), ranked_TE, -np.inf)


def list_takers(scores_for_choice_TE: np.ndarray, spec: RouterSpec) -> np.ndarray:
    """The experts that took a token, best choice score first, ties to the lower id; then unused slots. [SEL-35]"""
    expert_ids_TK = top_k(scores_for_choice_TE, spec.top_k)
    taken_TK = np.take_along_axis(scores_for_choice_TE, expert_ids_TK, axis=-1) > -np.inf
    return np.where(taken_TK, expert_ids_TK, UNUSED)


def sparsemixer(scaled_logits_TE: np.ndarray, spec: RouterSpec) -> tuple[np.ndarray, np.ndarray]:
    """Slot j takes the best remaining expert, weighted by a softmax over the band below it. [SEL-13, WGT-15]

    The band holds the remaining experts whose distance to the best is at most 2 * mixer_eps of the larger of
    |logit| and the best. Weights of a token need not sum to 1. Source: arXiv:2409.12136, phimoe in transformers.
    """
    rows_T = np.arange(scaled_logits_TE.shape[0])
    remaining_TE = scaled_logits_TE.copy()
    ids, weights = [], []
    enough_T = np.asarray((scaled_logits_TE > -np.inf).sum(axis=-1) >= spec.top_k)
    entries("logits_TE", scaled_logits_TE, enough_T, f"top_k ({spec.top_k}) entries are above -inf")
    for _ in range(spec.top_k):
        ids_T = np.argmax(remaining_TE, axis=-1)
        best_T1 = remaining_TE[rows_T, ids_T][:, None]
        size_TE = np.maximum(np.abs(scaled_logits_TE), best_T1)
        in_band_TE = best_T1 - scaled_logits_TE <= 2 * spec.mixer_eps * size_TE
        weights_TE = softmax(np.where(in_band_TE, remaining_TE, -np.inf))
        ids.append(ids_T)
        weights.append(weights_TE[rows_T, ids_T])
        remaining_TE[rows_T, ids_T] = -np.inf
    return np.stack(ids, axis=-1), np.stack(weights, axis=-1)


def choose(
    scores_for_choice_TE: np.ndarray | None, num_tokens: int, spec: RouterSpec, inputs: RouterInputs
) -> np.ndarray:
    """(T, K) expert ids by the spec's selector; those that do not rank look at no score. [SEL-14 .. SEL-35]"""
    T, K = num_tokens, spec.top_k
    if spec.ranks:
        assert scores_for_choice_TE is not None  # they are what is ranked
        own = {"expert_choice": list_takers, "threshold": select_above, "top_p": select_share}
        return own.get(spec.selector, select)(scores_for_choice_TE, spec)
    if spec.selector == "table":
        table_VK = ids_array("table_VK", inputs.table_VK, (None, K), spec.num_choices)
        return table_VK[ids_array("token_ids_T", inputs.token_ids_T, (T,), len(table_VK))]
    if spec.selector == "given":
        return ids_array("given_ids_TK", inputs.given_ids_TK, (T, K), spec.num_choices, low=UNUSED)
    if spec.selector == "round_robin":
        first_token = 0 if inputs.first_token is None else inputs.first_token
        integer("first_token", first_token, 0)
        return ((first_token * K + np.arange(T * K)) % spec.num_experts).reshape(T, K)
    draws_TE = np.random.default_rng(0 if inputs.seed is None else inputs.seed).random((T, spec.num_choices))
    return top_k(draws_TE, K)


def gather(values_TE: np.ndarray, expert_ids_TK: np.ndarray) -> np.ndarray:
    """The values of the selected experts; an unused slot reads 0. [WGT-8, WGT-11]"""
    found_TK = np.take_along_axis(values_TE, np.maximum(expert_ids_TK, 0), axis=-1)
    return np.where(expert_ids_TK == UNUSED, 0, found_TK)


def weigh(
    scaled_logits_TE: np.ndarray, scores_TE: np.ndarray | None, expert_ids_TK: np.ndarray, spec: RouterSpec
) -> np.ndarray:
    """Weights are the selected scores, without any bias. [WGT-1, WGT-3]"""
    if scores_TE is not None:
        return gather(scores_TE, expert_ids_TK)
    return softmax(np.where(expert_ids_TK == UNUSED, -np.inf, gather(scaled_logits_TE, expert_ids_TK)))


def leave_out(raw_weights_TK: np.ndarray, expert_ids_TK: np.ndarray, spec: RouterSpec) -> np.ndarray:
    """A zero expert weighs 0 before the norm. [WGT-12]"""
    return np.where(expert_ids_TK >= spec.num_choices - spec.num_zero_experts, 0, raw_weights_TK)


def normalise(
    raw_weights_TK: np.ndarray, shared_scores_TS: np.ndarray, spec: RouterSpec
) -> tuple[np.ndarray, np.ndarray]:
    """With route_norm a token's weights are divided by their norm; a norm of 0 leaves them 0. [WGT-2, WGT-6, WGT-7]"""
    if not spec.route_norm:
        return raw_weights_TK, shared_scores_TS
    in_norm = np.concatenate([raw_weights_TK, shared_scores_TS], axis=-1) if spec.norm_with_shared else raw_weights_TK
    divisor_T1, _ = divisor_of(in_norm, spec)
    divisor_T1 = np.where(divisor_T1 == 0, 1, divisor_T1)
    shared_TS = shared_scores_TS / divisor_T1 if spec.norm_with_shared else shared_scores_TS
    return raw_weights_TK / divisor_T1, shared_TS


def divisor_of(in_norm: np.ndarray, spec: RouterSpec) -> tuple[np.ndarray, np.ndarray]:
    """What a token's weights are divided by, 0 included, and their norm; (T, 1) each."""
    # The largest is factored out so that no power over- or underflows.
    largest_T1 = np.maximum(in_norm.max(axis=-1, keepdims=True, initial=0), np.finfo(in_norm.dtype).tiny)
    norm_T1 = largest_T1 * ((in_norm / largest_T1) ** spec.norm_p).sum(axis=-1, keepdims=True) ** (1 / spec.norm_p)
    return (norm_T1 + spec.norm_eps if spec.norm_form == "add_eps" else np.maximum(norm_T1, spec.norm_eps)), norm_T1


def scale_weights(
    weights_TK: np.ndarray, expert_ids_TK: np.ndarray, learned_scale: np.ndarray, spec: RouterSpec
) -> np.ndarray:
    """route_scale, then the learned scale, multiply the weights once; a skipped choice weighs 0. [WGT-4, WGT-9]"""
    scaled_TK = weights_TK * spec.route_scale * factor_of(expert_ids_TK, learned_scale, spec)
    if spec.null_kind == "skip":
        return np.where(expert_ids_TK >= spec.num_experts, 0, scaled_TK)
    return scaled_TK


def factor_of(expert_ids_TK: np.ndarray, learned_scale: np.ndarray, spec: RouterSpec) -> np.ndarray:
    """The learned factor of each slot: of its expert, global, or 1."""
    if spec.learned_scale == "per_expert":
        return learned_scale[np.maximum(expert_ids_TK, 0)]
    return learned_scale


def route(
    logits_TE: np.ndarray,
    spec: RouterSpec,
    *,
    expert_bias_E: np.ndarray | None = None,
    learned_scale: np.ndarray | None = None,
    inputs: RouterInputs = NO_INPUTS,
    token_mask_T: np.ndarray | None = None,
    dtype: DTypeLike = np.float64,
) -> RoutingTrace:
    """Every stage of routing in order; the trace keeps all of them.

    Args:
        logits_TE: (T, num_logits) floats, finite or -inf (never chosen).
        spec: what is computed.
        expert_bias_E: (E,) added to what is ranked, for the choice only; None is zeros.
        learned_scale: (E,) for learned_scale 'per_expert', a scalar for 'global'.
        inputs: what the selector reads besides the logits.
        token_mask_T: (T,) bools; a padding token (False) gets ids -1 and weights 0.
        dtype: of every stage; the specification is float64, and so is a router of router_dtype float64.

    Raises:
        ValueError: wrong shapes, dtypes or values; it names field, value and bound.
    """
    dtype = dtype_of_router(spec, dtype)
    logits_TE = array("logits_TE", logits_TE, (None, spec.num_logits)).astype(dtype)
    valid_T1 = mask_array(token_mask_T, len(logits_TE))[:, None]
    logits_TE = np.where(valid_T1, logits_TE, 0)  # whatever a padding row holds, NaN included, is not read
    is_logit_TE = np.isfinite(logits_TE) | np.isneginf(logits_TE)
    entries("logits_TE", logits_TE, is_logit_TE, "entries are finite, or -inf for an expert that is never chosen")
    expert_bias_E = _bias(expert_bias_E, spec, dtype)
    learned_scale = _learned_scale(learned_scale, spec, dtype)
    T, E = len(logits_TE), spec.num_choices
    inputs.check(spec, T)
    scores_TE: np.ndarray | None = None
    scores_for_choice_TE: np.ndarray | None = None
    group_scores_TG: np.ndarray | None = None
    group_ids_TL: np.ndarray | None = None

    scaled_logits_TE = scale_logits(add_noise(logits_TE, inputs, valid_T1), spec)
    choices_TE, shared_TS = scaled_logits_TE[:, :E], scaled_logits_TE[:, E:]
    if spec.has_scores:
        scores_TE = round_to(score(choices_TE, spec), spec.router_dtype)
    if spec.ranks and spec.selector != "sinkhorn":
        scores_for_choice_TE = bias_choice(choices_TE, scores_TE, expert_bias_E, spec)
    if scores_for_choice_TE is not None and spec.selector == "expert_choice":
        scores_for_choice_TE = take_tokens(scores_for_choice_TE, valid_T1, spec)
    if spec.selector == "sinkhorn":
        scores_for_choice_TE = choices_TE + sinkhorn(choices_TE, valid_T1)
    if scores_for_choice_TE is not None and spec.quota_groups is not None:
        scores_for_choice_TE = limit_quotas(scores_for_choice_TE, spec)
    if scores_for_choice_TE is not None and spec.num_expert_groups is not None:
        scores_for_choice_TE, group_scores_TG, group_ids_TL = limit_groups(scores_for_choice_TE, spec)

    weighed_TE = scores_TE
    if scores_TE is not None and group_ids_TL is not None and spec.weights_from == "masked_scores":
        weighed_TE = np.where(kept_experts(group_ids_TL, spec), scores_TE, 0)
    if spec.selector == "sparsemixer":
        expert_ids_TK, raw_weights_TK = sparsemixer(choices_TE, spec)
    else:
        expert_ids_TK = choose(scores_for_choice_TE, T, spec, inputs)
        raw_weights_TK = weigh(choices_TE, weighed_TE, expert_ids_TK, spec)
    raw_weights_TK = leave_out(raw_weights_TK, expert_ids_TK, spec)
    raw_shared_TS = round_to(score(shared_TS, spec), spec.router_dtype)
    normed_weights_TK, normed_shared_TS = normalise(raw_weights_TK, raw_shared_TS, spec)
    weights_TK = round_to(scale_weights(normed_weights_TK, expert_ids_TK, learned_scale, spec), spec.router_dtype)
    shared_weights_TS = round_to(scale_shared(normed_shared_TS, learned_scale, spec), spec.router_dtype)

    routing = RoutingTrace(
        logits_TE=logits_TE,
        scaled_logits_TE=scaled_logits_TE,
        logit_factors_TE=inputs.logit_factors_TE,
        scores_TE=scores_TE,
        scores_for_choice_TE=scores_for_choice_TE,
        group_scores_TG=group_scores_TG,
        group_ids_TL=group_ids_TL,
        expert_ids_TK=np.where(valid_T1, expert_ids_TK, UNUSED).astype(np.int64),
        weights_TK=np.where(valid_T1, weights_TK, 0),
        shared_weights_TS=np.where(valid_T1, shared_weights_TS, 0) if spec.num_scored_shared_experts else None,
    )
    return give_weights(routing, inputs.given_weights_TK)


def scale_shared(normed_shared_TS: np.ndarray, learned_scale: np.ndarray, spec: RouterSpec) -> np.ndarray:
    """Router-scored shared experts take route_scale and the global scale, like the selected ones. [WGT-13]"""
    return normed_shared_TS * spec.route_scale * (learned_scale if spec.learned_scale == "global" else 1)


def give_weights(routing: RoutingTrace, given_weights_TK: np.ndarray | None) -> RoutingTrace:
    """Given weights are final, after norm and scales; an unused slot weighs 0 whatever is given for it. [RPL-3]

    Shared experts that the router scores keep this router's weights.
    """
    if given_weights_TK is None:
        return routing
    given_TK = array("given_weights_TK", given_weights_TK, routing.weights_TK.shape).astype(routing.weights_TK.dtype)
    given_TK = np.where(routing.expert_ids_TK == UNUSED, 0, given_TK)
    entries("given_weights_TK", given_TK, np.isfinite(given_TK), "weights of used slots are finite")
    return replace(routing, weights_TK=given_TK, weights_are_given=True)


def _bias(expert_bias_E, spec: RouterSpec, dtype):
    if expert_bias_E is None:
        return np.zeros(spec.num_choices, dtype)
    # Elsewhere nothing is ranked, so a bias would be silently ignored.
    require(spec.takes_bias, f"expert_bias_E is given, but selector {spec.selector!r} takes none")
    expert_bias_E = array("expert_bias_E", expert_bias_E, (spec.num_choices,)).astype(dtype)
    entries("expert_bias_E", expert_bias_E, np.isfinite(expert_bias_E), "entries are finite")
    return expert_bias_E


def _learned_scale(learned_scale, spec: RouterSpec, dtype):
    if spec.learned_scale == "none":
        require(learned_scale is None, "learned_scale is given, but the spec's learned_scale is 'none'")
        return np.ones((), dtype)
    require(learned_scale is not None, f"learned_scale is None; the spec's is {spec.learned_scale!r}")
    shape = (spec.num_choices,) if spec.learned_scale == "per_expert" else ()
    learned_scale = array("learned_scale", learned_scale, shape).astype(dtype)
    entries("learned_scale", learned_scale, np.isfinite(learned_scale), "entries are finite")
    return learned_scale
