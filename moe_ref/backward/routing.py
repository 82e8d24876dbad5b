"""moe_ref, gradients of routing: each function undoes one stage of `routing.py`, by hand, last stage first.

    weigh -> (norm -> scales) backwards, then score, scale_logits, gate

What is constant by definition: the choice itself (ids, kept groups, sparsemixer's band), so expert_bias has no
gradient. An unused slot, a padding token and a given weight pass none. Where a function has a kink or no slope:

* a logit of -inf gets gradient 0;
* max(norm, norm_eps) passes the gradient to the norm where norm >= norm_eps;
* a weight of 0 has slope 0 in its p-norm unless p is 1 (for p < 1 the slope would be infinite);
* relu has slope 0 at 0;
* a norm of 0 without norm_eps leaves weights 0, and gives gradient 0;
* rounding to a narrow router_dtype has slope 1.

Legend: T tokens, D model dim, E choices, K top_k, S router-scored shared experts.
"""

from collections.abc import Iterator

import numpy as np

from moe_ref.experts import sigmoid
from moe_ref.rounding import round_to
from moe_ref.routing import (
    RoutingTrace,
    divisor_of,
    factor_of,
    gather,
    kept_experts,
    leave_out,
    normalise,
    score,
    softmax,
    weigh,
)
from moe_ref.specs.ids import UNUSED
from moe_ref.specs.router import RouterSpec


def route_backward(
    routing: RoutingTrace,
    spec: RouterSpec,
    learned_scale: np.ndarray | None,
    d_weights_TK: np.ndarray,
    d_shared_weights_TS: np.ndarray | None = None,
    *,
    token_mask_T: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Gradients of the logits and of the learned scale, from those of the weights. [BWD-5]

    Args:
        routing: the trace of `route`.
        learned_scale: as given to `route`; None where the spec has none.
        d_weights_TK: gradient of the routing weights.
        d_shared_weights_TS: gradient of the shared weights; None where the spec has none.
        token_mask_T: as given to `route`.

    Returns:
        d_logits_TE, and d_learned_scale (None where the spec has none).
    """
    T, E = len(routing.logits_TE), spec.num_choices
    valid_T1 = np.ones((T, 1), bool) if token_mask_T is None else np.asarray(token_mask_T)[:, None]
    if d_shared_weights_TS is None:
        d_shared_weights_TS = np.zeros((T, spec.num_scored_shared_experts), routing.logits_TE.dtype)
    constant_TK = (routing.expert_ids_TK == UNUSED) | routing.weights_are_given
    d_used_TK = np.where(constant_TK, 0, d_weights_TK)
    d_shared_TS = np.where(valid_T1, d_shared_weights_TS, 0)

    shared_logits_TS = routing.scaled_logits_TE[:, E:]
    raw_TK = leave_out(raw_weights(routing, spec), routing.expert_ids_TK, spec)
    shared_scores_TS = round_to(score(shared_logits_TS, spec), spec.router_dtype)
    normed_TK, normed_shared_TS = normalise(raw_TK, shared_scores_TS, spec)

    d_normed_TK, d_normed_shared_TS, d_learned_scale = scale_weights_backward(
        d_used_TK, d_shared_TS, normed_TK, normed_shared_TS, routing.expert_ids_TK, learned_scale, spec
    )
    d_raw_TK, d_shared_scores_TS = normalise_backward(d_normed_TK, d_normed_shared_TS, raw_TK, shared_scores_TS, spec)
    d_choices_TE = weigh_backward(leave_out(d_raw_TK, routing.expert_ids_TK, spec), routing, spec)
    d_shared_logits_TS = score_backward(d_shared_scores_TS, shared_logits_TS, spec)
    d_scaled_TE = np.concatenate([d_choices_TE, d_shared_logits_TS], axis=-1)
    d_logits_TE = scale_logits_backward(d_scaled_TE, routing.scaled_logits_TE, spec)
    if routing.logit_factors_TE is not None:
        d_logits_TE = np.where(valid_T1, d_logits_TE * routing.logit_factors_TE, 0)
    return d_logits_TE, d_learned_scale


def raw_weights(routing: RoutingTrace, spec: RouterSpec) -> np.ndarray:
    """The weights before the norm, read again from the trace."""
    choices_TE = routing.scaled_logits_TE[:, : spec.num_choices]
    if spec.selector != "sparsemixer":
        return weigh(choices_TE, weighed_scores(routing, spec), routing.expert_ids_TK, spec)
    slots = [gather(banded_TE, ids_T[:, None]) for ids_T, banded_TE in banded_softmaxes(routing, spec)]
    return np.concatenate(slots, axis=-1)


def weighed_scores(routing: RoutingTrace, spec: RouterSpec) -> np.ndarray | None:
    """The scores that weights are read from; with 'masked_scores' those of dropped groups are 0."""
    if spec.weights_from == "scores":
        return routing.scores_TE
    assert routing.scores_TE is not None
    assert routing.group_ids_TL is not None
    return np.where(kept_experts(routing.group_ids_TL, spec), routing.scores_TE, 0)


def banded_softmaxes(routing: RoutingTrace, spec: RouterSpec) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each slot of sparsemixer: its experts, and the softmax over the band that its weight is read from."""
    choices_TE = routing.scaled_logits_TE[:, : spec.num_choices]
    rows_T = np.arange(len(choices_TE))
    remaining_TE = choices_TE.copy()
    for ids_T in routing.expert_ids_TK.T:
        # A padding token has no expert; it reads column 0, and its gradient is 0.
        column_T = np.maximum(ids_T, 0)
        best_T1 = choices_TE[rows_T, column_T][:, None]
        size_TE = np.maximum(np.abs(choices_TE), best_T1)
        in_band_TE = best_T1 - choices_TE <= 2 * spec.mixer_eps * size_TE
        yield ids_T, softmax(np.where(in_band_TE, remaining_TE, -np.inf))
        remaining_TE[rows_T, column_T] = -np.inf


def scale_weights_backward(
    d_weights_TK: np.ndarray,
    d_shared_TS: np.ndarray,
    normed_TK: np.ndarray,
    normed_shared_TS: np.ndarray,
    expert_ids_TK: np.ndarray,
    learned_scale: np.ndarray | None,
    spec: RouterSpec,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """weight = normed * route_scale * learned_scale; a skipped choice passes nothing.

    Returns:
        d_normed_TK, d_normed_shared_TS, d_learned_scale (None where the spec has none).
    """
    if spec.null_kind == "skip":
        d_weights_TK = np.where(expert_ids_TK >= spec.num_experts, 0, d_weights_TK)
    d_scaled_TK, d_scaled_shared_TS = d_weights_TK * spec.route_scale, d_shared_TS * spec.route_scale
    if learned_scale is None:
        return d_scaled_TK, d_scaled_shared_TS, None
    d_factor_TK = d_scaled_TK * normed_TK
    d_normed_TK = d_scaled_TK * factor_of(expert_ids_TK, learned_scale, spec)
    if spec.learned_scale == "per_expert":
        return d_normed_TK, d_scaled_shared_TS, scatter(d_factor_TK, expert_ids_TK, spec.num_choices).sum(axis=0)
    d_global = d_factor_TK.sum() + (d_scaled_shared_TS * normed_shared_TS).sum()
    return d_normed_TK, d_scaled_shared_TS * learned_scale, np.asarray(d_global)


def normalise_backward(
    d_normed_TK: np.ndarray,
    d_normed_shared_TS: np.ndarray,
    raw_TK: np.ndarray,
    shared_scores_TS: np.ndarray,
    spec: RouterSpec,
) -> tuple[np.ndarray, np.ndarray]:
    """normed_i = raw_i / divisor, and the divisor depends on every weight in the norm. [BWD-8]"""
    if not spec.route_norm:
        return d_normed_TK, d_normed_shared_TS
    K = raw_TK.shape[1]
    d_normed, raw = d_normed_TK, raw_TK
    if spec.norm_with_shared:
        d_normed = np.concatenate([d_normed_TK, d_normed_shared_TS], axis=-1)
        raw = np.concatenate([raw_TK, shared_scores_TS], axis=-1)
    divisor_T1, norm_T1 = divisor_of(raw, spec)
    zero_T1 = divisor_T1 == 0
    safe_divisor_T1 = np.where(zero_T1, 1, divisor_T1)
    # d divisor / d raw_i, in units of the divisor: written so that a single weight gets exactly 0.
    pull_T1 = (d_normed * (raw / safe_divisor_T1)).sum(axis=-1, keepdims=True)
    d_raw = (d_normed - pull_T1 * divisor_slopes(raw, norm_T1, spec)) / safe_divisor_T1
    d_raw = np.where(zero_T1, 0, d_raw)
    return d_raw[:, :K], d_raw[:, K:] if spec.norm_with_shared else d_normed_shared_TS


def divisor_slopes(raw: np.ndarray, norm_T1: np.ndarray, spec: RouterSpec) -> np.ndarray:
    """d divisor / d weight: (weight / norm) ** (p - 1), and 0 where the norm is below its clamp."""
    positive = raw > 0
    ratio = np.where(positive, raw, 1) / np.where(positive, norm_T1, 1)
    slope = np.where(positive, ratio ** (spec.norm_p - 1), 1.0 if spec.norm_p == 1 else 0.0)
    clamped_T1 = (spec.norm_form == "clamp") & (norm_T1 < spec.norm_eps)
    return np.where(clamped_T1, 0, slope)


def weigh_backward(d_raw_TK: np.ndarray, routing: RoutingTrace, spec: RouterSpec) -> np.ndarray:
    """Gradient of the scaled logits of the choices, from that of the weights before the norm.

    sparsemixer's weight is differentiated as the softmax over its band that it is, not as the sampler of its
    paper (arXiv:2409.12136), whose training mode has another gradient.
    """
    ids_TK, E = routing.expert_ids_TK, spec.num_choices
    choices_TE = routing.scaled_logits_TE[:, :E]
    if spec.selector == "sparsemixer":
        d_choices_TE = np.zeros_like(choices_TE)
        for slot, (ids_T, banded_TE) in enumerate(banded_softmaxes(routing, spec)):
            d_banded_TE = scatter(d_raw_TK[:, slot, None], ids_T[:, None], E)
            d_choices_TE += softmax_backward(d_banded_TE, banded_TE)
        return d_choices_TE
    if spec.score_over == "selected":
        return scatter(softmax_backward(d_raw_TK, raw_weights(routing, spec)), ids_TK, E)
    d_scores_TE = scatter(d_raw_TK, ids_TK, E)
    if routing.group_ids_TL is not None and spec.weights_from == "masked_scores":
        d_scores_TE = np.where(kept_experts(routing.group_ids_TL, spec), d_scores_TE, 0)
    return score_backward(d_scores_TE, choices_TE, spec)


def scatter(d_slots_TK: np.ndarray, expert_ids_TK: np.ndarray, num_choices: int) -> np.ndarray:
    """Each slot's gradient goes to its expert's column; an unused slot's goes nowhere."""
    T, K = expert_ids_TK.shape
    d_columns_TE = np.zeros((T, num_choices), d_slots_TK.dtype)
    for slot in range(K):
        used_T = np.flatnonzero(expert_ids_TK[:, slot] != UNUSED)
        d_columns_TE[used_T, expert_ids_TK[used_T, slot]] += d_slots_TK[used_T, slot]
    return d_columns_TE


def score_backward(d_scores_TE: np.ndarray, scaled_logits_TE: np.ndarray, spec: RouterSpec) -> np.ndarray:
    """Gradient of the scaled logits, from that of the scores."""
    scores_TE = score(scaled_logits_TE, spec)
    if spec.score_func == "softmax":
        return softmax_backward(d_scores_TE, scores_TE)
    if spec.score_func == "sigmoid":
        return d_scores_TE * scores_TE * sigmoid(-scaled_logits_TE)
    if spec.score_func == "relu":
        return np.where(scaled_logits_TE > 0, d_scores_TE, 0)
    # The slope of sqrt(softplus) tends to 0 with the score; 0 / 0 is not asked for.
    zero_TE = scores_TE == 0
    return d_scores_TE * np.where(zero_TE, 0, sigmoid(scaled_logits_TE) / np.where(zero_TE, 1, 2 * scores_TE))


def softmax_backward(d_scores_TE: np.ndarray, scores_TE: np.ndarray) -> np.ndarray:
    """Gradient of the logits of a softmax over the last axis."""
    return scores_TE * (d_scores_TE - (d_scores_TE * scores_TE).sum(axis=-1, keepdims=True))


def scale_logits_backward(d_scaled_TE: np.ndarray, scaled_logits_TE: np.ndarray, spec: RouterSpec) -> np.ndarray:
    """Gradient of the logits, from that of the scaled logits; a logit of -inf gets 0."""
    masked_TE = np.isneginf(scaled_logits_TE)
    slope_TE = np.full_like(scaled_logits_TE, spec.logit_scale)
    if spec.logit_softcap is not None:
        slope_TE *= 1 - (np.where(masked_TE, 0, scaled_logits_TE) / spec.logit_softcap) ** 2
    return np.where(masked_TE, 0, d_scaled_TE * slope_TE)


def gate_backward(
    d_logits_TE: np.ndarray, x_TD: np.ndarray, gate_ED: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of the tokens, the gate weights and the gate bias, in their dtype, whatever the router's. [BWD-5]"""
    d_x_TD, d_gate_ED, d_bias_E = d_logits_TE @ gate_ED, d_logits_TE.T @ x_TD, d_logits_TE.sum(axis=0)
    return d_x_TD.astype(x_TD.dtype), d_gate_ED.astype(x_TD.dtype), d_bias_E.astype(x_TD.dtype)
