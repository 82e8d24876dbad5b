"""moe_ref, gradients: the backward pass of a layer, every stage by hand, last stage first.

    join -> shared | (expand ->) combine -> fill_slots -> experts -> dispatch -> weigh_inputs (-> compress, capacity)
    -> routing -> gate

Each function takes the gradients of what a stage returned (d_*) and gives those of what it took. Nothing here comes
from a framework; the tests check it by finite differences. Routing is in `routing.py`, with what it holds
constant. At a kink: relu has slope 0 at 0; a clamp passes the gradient of a value that is exactly at its limit.

Legend: T tokens, D model dim, K top_k, N rows, R rows of one expert, F expert hidden dim, E experts, S shared experts.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_ref.backward.balance import capacity_backward
from moe_ref.backward.constants import constants_backward
from moe_ref.backward.latent import compress_backward, expand_backward
from moe_ref.backward.routing import gate_backward, route_backward
from moe_ref.experts import (
    FeedForwardTrace,
    activated,
    activation,
    clamped_up,
    gelu_argument,
    identity_slots,
    normal_cdf,
    sigmoid,
)
from moe_ref.layer import LayerTrace
from moe_ref.permute import dispatch, unpermute
from moe_ref.specs.balance import CapacitySpec
from moe_ref.specs.checks import array
from moe_ref.specs.layer import ExpertSpec, LayerSpec
from moe_ref.specs.params import FeedForward, LayerParams
from moe_ref.specs.router import RouterSpec


@dataclass(frozen=True, kw_only=True)
class LayerGradients:
    """Gradients of the tokens, of every parameter, and of two intermediates that help to find a fault."""

    x_TD: np.ndarray
    params: LayerParams
    """Each field holds the gradient of the parameter of that name, None where the spec has none. That of
    expert_bias_E is 0: it takes part in the choice alone."""
    weights_TK: np.ndarray
    logits_TE: np.ndarray


def layer_backward(
    trace: LayerTrace,
    params: LayerParams,
    spec: LayerSpec,
    d_output_TD: np.ndarray,
    *,
    capacity: CapacitySpec | None = None,
) -> LayerGradients:
    """The gradient of sum(d_output_TD * output_TD); the choice of experts is a constant of it. [BWD-2, BWD-7, BWD-9]

    Args:
        trace: what `moe_layer` returned for these params and this spec.
        capacity: as given to `moe_layer`; what was kept is a constant.
        d_output_TD: (T, D); the rows of padding tokens are not read, and their tokens get gradient 0.
    """
    dtype, valid_T1 = trace.x_TD.dtype, trace.token_mask_T[:, None]
    params = params.astype(dtype)
    d_output_TD = np.where(valid_T1, array("d_output_TD", d_output_TD, trace.x_TD.shape).astype(dtype), 0)
    ids_TK, weights_TK = trace.expert_ids_TK, trace.weights_TK

    d_routed_TD, d_shared_TD = join_backward(d_output_TD, spec)
    d_combined_TD, latent_grads = expand_backward(d_routed_TD, trace.latent, params, spec)
    d_slot_outputs_TKD, d_weights_at_output_TK = combine_backward(
        d_combined_TD, trace.slot_outputs_TKD, weights_TK, spec.router
    )
    d_expert_rows_ND, d_passed_TKD = fill_slots_backward(
        d_slot_outputs_TKD, trace.permutation.order_N, ids_TK, spec.router
    )
    d_rows_ND, expert_grads = experts_backward(
        d_expert_rows_ND, trace.experts, trace.permutation.tokens_per_expert_E, params, spec.experts
    )
    d_constants_TKD, constant_grads = constants_backward(
        d_slot_outputs_TKD, trace.slot_inputs_TKD, ids_TK, params, spec.router
    )
    d_slot_inputs_TKD = (
        d_passed_TKD + d_constants_TKD + unpermute(d_rows_ND, trace.permutation.order_N, *reversed(ids_TK.shape))
    )
    expert_input_TD = trace.x_TD if trace.latent is None else trace.latent.input_TH
    d_expert_input_TD, d_weights_at_input_TK = weigh_inputs_backward(
        d_slot_inputs_TKD, expert_input_TD, weights_TK, spec.router
    )
    d_x_routed_TD, compress_grads = compress_backward(d_expert_input_TD, trace.x_TD, params)
    d_x_shared_TD, d_factors_TS, shared_grads = shared_backward(
        d_shared_TD, trace.x_TD, trace.shared_factors_TS, trace.shared_experts, params, spec
    )

    d_weights_TK = d_weights_at_output_TK + d_weights_at_input_TK
    if capacity is not None:
        assert trace.capacity is not None
        d_weights_TK = capacity_backward(trace.capacity, capacity, d_weights_TK)
    d_logits_TE, d_learned_scale = route_backward(
        trace.routing,
        spec.router,
        params.learned_scale,
        d_weights_TK,
        d_factors_TS if spec.router.num_scored_shared_experts else None,
        token_mask_T=trace.token_mask_T,
    )
    d_x_gate_TD, d_gate_ED, d_gate_bias_E = gate_backward(d_logits_TE, trace.x_TD, params.gate_ED)
    return LayerGradients(
        x_TD=np.where(valid_T1, d_x_routed_TD + d_x_shared_TD + d_x_gate_TD, 0),
        params=LayerParams(
            gate_ED=d_gate_ED,
            gate_bias_E=d_gate_bias_E if spec.gate_bias else None,
            expert_bias_E=None if params.expert_bias_E is None else np.zeros_like(params.expert_bias_E),
            learned_scale=d_learned_scale,
            **expert_grads,
            **shared_grads,
            **constant_grads,
            **latent_grads,
            **compress_grads,
        ),
        weights_TK=d_weights_TK,
        logits_TE=d_logits_TE,
    )


def join_backward(d_output_TD: np.ndarray, spec: LayerSpec) -> tuple[np.ndarray, np.ndarray]:
    """Routed and shared output get the whole gradient each, or half of it where they are averaged. [LAY-11]"""
    if spec.shared is None:
        return d_output_TD, np.zeros_like(d_output_TD)
    d_each_TD = d_output_TD / 2 if spec.shared.combine == "average" else d_output_TD
    return d_each_TD, d_each_TD


def combine_backward(
    d_routed_TD: np.ndarray, slot_outputs_TKD: np.ndarray, weights_TK: np.ndarray, spec: RouterSpec
) -> tuple[np.ndarray, np.ndarray]:
    """routed = output_scale * sum of weight * slot; a weight on the input is none of this stage's."""
    d_summed_T1D = d_routed_TD[:, None, :] * spec.output_scale
    if spec.weight_on == "input":
        return np.repeat(d_summed_T1D, spec.top_k, axis=1), np.zeros_like(weights_TK)
    return d_summed_T1D * weights_TK[:, :, None], (d_summed_T1D * slot_outputs_TKD).sum(axis=-1)


def fill_slots_backward(
    d_slot_outputs_TKD: np.ndarray, order_N: np.ndarray, expert_ids_TK: np.ndarray, spec: RouterSpec
) -> tuple[np.ndarray, np.ndarray]:
    """Slots of experts pass their gradient to their row, identity slots to their own input, others nowhere.

    Returns:
        d_expert_rows_ND, and d_passed_TKD: the gradient of the slot inputs that went past the experts.
    """
    identity_TK1 = identity_slots(expert_ids_TK, spec)[:, :, None]
    return dispatch(d_slot_outputs_TKD, order_N), np.where(identity_TK1, d_slot_outputs_TKD, 0)


def experts_backward(
    d_rows_ND: np.ndarray,
    trace: FeedForwardTrace,
    tokens_per_expert_E: np.ndarray,
    params: LayerParams,
    spec: ExpertSpec,
) -> tuple[np.ndarray, dict]:
    """Each expert's weights get the gradients of its own rows, exactly 0 without rows. [BWD-3, BWD-4, BWD-6]

    Returns:
        d_inputs_ND, and the gradients of the expert parameters by name.
    """
    ends_E = np.cumsum(tokens_per_expert_E)
    d_inputs, grads = [], []
    for expert_id, (end, size) in enumerate(zip(ends_E, tokens_per_expert_E, strict=True)):
        own = slice(end - size, end)
        d_input_RD, grad = feed_forward_backward(d_rows_ND[own], _rows(trace, own), params.expert(expert_id), spec)
        d_inputs.append(d_input_RD)
        grads.append(grad)
    named = {
        "w_up_EDF": _stacked(grads, "w_up_DF"),
        "w_down_EFD": _stacked(grads, "w_down_FD"),
        "w_gate_EDF": _stacked(grads, "w_gate_DF"),
        "b_up_EF": _stacked(grads, "b_up_F"),
        "b_down_ED": _stacked(grads, "b_down_D"),
        "b_gate_EF": _stacked(grads, "b_gate_F"),
    }
    return np.concatenate(d_inputs), named


def feed_forward_backward(
    d_output_RD: np.ndarray, trace: FeedForwardTrace, weights: FeedForward, spec: ExpertSpec
) -> tuple[np.ndarray, FeedForward]:
    """One expert backwards: the gradients of its input and of its weights. [BWD-3]"""
    d_hidden_RF, d_w_down_FD, d_b_down_D = project_backward(
        d_output_RD, trace.hidden_RF, weights.w_down_FD, weights.b_down_D
    )
    d_gate_RF, d_up_RF = hide_backward(d_hidden_RF, trace.gate_RF, trace.up_RF, spec)
    d_input_RD, d_w_up_DF, d_b_up_F = project_backward(d_up_RF, trace.input_RD, weights.w_up_DF, weights.b_up_F)
    d_w_gate_DF = d_b_gate_F = None
    if weights.w_gate_DF is not None and d_gate_RF is not None:
        d_input_of_gate_RD, d_w_gate_DF, d_b_gate_F = project_backward(
            d_gate_RF, trace.input_RD, weights.w_gate_DF, weights.b_gate_F
        )
        d_input_RD = d_input_RD + d_input_of_gate_RD
    return d_input_RD, FeedForward(
        w_up_DF=d_w_up_DF,
        w_down_FD=d_w_down_FD,
        w_gate_DF=d_w_gate_DF,
        b_up_F=d_b_up_F,
        b_down_D=d_b_down_D,
        b_gate_F=d_b_gate_F,
    )


def project_backward(
    d_rows: np.ndarray, rows: np.ndarray, w_in_out: np.ndarray, b_out: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """rows @ w + b backwards: gradients of the rows, of w, and of b (None without one). [BWD-4]"""
    return d_rows @ w_in_out.T, rows.T @ d_rows, None if b_out is None else d_rows.sum(axis=0)


def hide_backward(
    d_hidden_RF: np.ndarray, gate_RF: np.ndarray | None, up_RF: np.ndarray, spec: ExpertSpec
) -> tuple[np.ndarray | None, np.ndarray]:
    """hidden = activated(gate) * clamped_up(up), or activated(up): gradients of gate (None without one) and up."""
    if gate_RF is None:
        return None, d_hidden_RF * activated_slope(up_RF, spec)
    limit = np.inf if spec.clamp is None else spec.clamp
    d_gate_RF = d_hidden_RF * clamped_up(up_RF, spec) * activated_slope(gate_RF, spec)
    d_up_RF = d_hidden_RF * activated(gate_RF, spec) * (np.abs(up_RF) <= limit)
    if spec.linear_beta is not None:
        d_up_RF = d_up_RF * (1 - np.tanh(np.clip(up_RF, -limit, limit) / spec.linear_beta) ** 2)
    return d_gate_RF, d_up_RF


def activated_slope(z_RF: np.ndarray, spec: ExpertSpec) -> np.ndarray:
    """The slope of the activation with its clamp: 0 where the clamped value is above the limit."""
    limit = np.inf if spec.clamp is None else spec.clamp
    clamped_RF = z_RF if spec.clamp_at == "before" else activation(z_RF, spec)
    return np.where(clamped_RF <= limit, activation_slope(z_RF, spec), 0)


def activation_slope(z_RF: np.ndarray, spec: ExpertSpec) -> np.ndarray:
    """The derivative of the activation; relu's is 0 at 0."""
    if spec.activation == "silu":
        s_RF = sigmoid(spec.alpha * z_RF)
        return s_RF + spec.alpha * z_RF * s_RF * sigmoid(-spec.alpha * z_RF)
    if spec.activation == "gelu":
        return normal_cdf(z_RF) + z_RF * np.exp(-(z_RF**2) / 2) / np.sqrt(2 * np.pi).astype(z_RF.dtype)
    if spec.activation == "gelu_tanh":
        tanh_RF = np.tanh(gelu_argument(z_RF))
        argument_slope_RF = np.sqrt(2 / np.pi).astype(z_RF.dtype) * (1 + 3 * 0.044715 * z_RF**2)
        return 0.5 * (1 + tanh_RF) + 0.5 * z_RF * (1 - tanh_RF**2) * argument_slope_RF
    if spec.activation == "situ":
        s_RF, t_RF = sigmoid(z_RF), np.tanh(z_RF / spec.beta)
        return s_RF * ((1 - t_RF**2) + spec.beta * t_RF * sigmoid(-z_RF))
    return np.where(z_RF > 0, 1.0 if spec.activation == "relu" else 2 * z_RF, 0)


def weigh_inputs_backward(
    d_slot_inputs_TKD: np.ndarray, x_TD: np.ndarray, weights_TK: np.ndarray, spec: RouterSpec
) -> tuple[np.ndarray, np.ndarray]:
    """slot input = token, or weight * token: gradients of the tokens and, where it is on the input, the weight."""
    if spec.weight_on == "output":
        return d_slot_inputs_TKD.sum(axis=1), np.zeros_like(weights_TK)
    d_x_TD = (d_slot_inputs_TKD * weights_TK[:, :, None]).sum(axis=1)
    return d_x_TD, (d_slot_inputs_TKD * x_TD[:, None, :]).sum(axis=-1)


def shared_backward(
    d_shared_TD: np.ndarray,
    x_TD: np.ndarray,
    factors_TS: np.ndarray,
    shared_experts: tuple[FeedForwardTrace, ...],
    params: LayerParams,
    spec: LayerSpec,
) -> tuple[np.ndarray, np.ndarray, dict]:
    """shared = sum of factor * expert(x): gradients of the tokens, the factors, and the parameters by name. [BWD-10]"""
    d_x_TD = np.zeros_like(x_TD)
    d_factors_TS = np.zeros_like(factors_TS)
    if spec.shared_experts is None:
        return d_x_TD, d_factors_TS, {}
    grads = []
    for shared_id, shared in enumerate(shared_experts):
        d_factors_TS[:, shared_id] = (d_shared_TD * shared.output_RD).sum(axis=-1)
        d_rows_TD = d_shared_TD * factors_TS[:, shared_id, None]
        weights = params.shared_expert(shared_id)
        d_input_TD, grad = feed_forward_backward(d_rows_TD, shared, weights, spec.shared_experts)
        d_x_TD = d_x_TD + d_input_TD
        grads.append(grad)
    named = {
        "shared_w_up_SDF": _stacked(grads, "w_up_DF"),
        "shared_w_down_SFD": _stacked(grads, "w_down_FD"),
        "shared_w_gate_SDF": _stacked(grads, "w_gate_DF"),
    }
    if params.shared_token_gate_D is not None:
        factor_T = factors_TS[:, 0]
        d_logit_T = d_factors_TS[:, 0] * factor_T * (1 - factor_T)
        d_x_TD = d_x_TD + d_logit_T[:, None] * params.shared_token_gate_D
        named["shared_token_gate_D"] = x_TD.T @ d_logit_T
    return d_x_TD, d_factors_TS, named


def _rows(trace: FeedForwardTrace, own: slice) -> FeedForwardTrace:
    """The part of a trace that belongs to some rows."""
    return FeedForwardTrace(
        input_RD=trace.input_RD[own],
        gate_RF=None if trace.gate_RF is None else trace.gate_RF[own],
        up_RF=trace.up_RF[own],
        hidden_RF=trace.hidden_RF[own],
        output_RD=trace.output_RD[own],
    )


def _stacked(grads: list[FeedForward], name: str) -> Any:
    """The gradients of one parameter, one expert after the other; None where the experts have none."""
    values = [getattr(grad, name) for grad in grads]
    return None if values[0] is None else np.stack(values)
