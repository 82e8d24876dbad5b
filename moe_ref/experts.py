"""moe_ref, experts: what one expert computes, one expert at a time; routed, shared and null.

Legend: R rows of one expert, N rows of all, T tokens, K top_k, D model dim, E experts, F expert hidden dim, S shared.
"""

import math
from dataclasses import dataclass

import numpy as np

from moe_ref.permute import unpermute
from moe_ref.specs.layer import ExpertSpec, LayerSpec
from moe_ref.specs.params import FeedForward, LayerParams
from moe_ref.specs.router import RouterSpec


@dataclass(frozen=True, kw_only=True)
class FeedForwardTrace:
    """Every intermediate of an expert, row by row."""

    input_RD: np.ndarray
    gate_RF: np.ndarray | None
    """The gate projection, before any clamp; None where the expert is not gated."""
    up_RF: np.ndarray
    """The up projection, before any clamp."""
    hidden_RF: np.ndarray
    output_RD: np.ndarray


def feed_forward(input_RD: np.ndarray, weights: FeedForward, spec: ExpertSpec) -> FeedForwardTrace:
    """An expert is a down projection of act(gate) * up, or of act(up) where it is not gated. [EXP-2]"""
    gate_RF = None if weights.w_gate_DF is None else project(input_RD, weights.w_gate_DF, weights.b_gate_F)
    up_RF = project(input_RD, weights.w_up_DF, weights.b_up_F)
    hidden_RF = hide(gate_RF, up_RF, spec)
    output_RD = project(hidden_RF, weights.w_down_FD, weights.b_down_D)
    return FeedForwardTrace(input_RD=input_RD, gate_RF=gate_RF, up_RF=up_RF, hidden_RF=hidden_RF, output_RD=output_RD)


def project(rows: np.ndarray, w_in_out: np.ndarray, b_out: np.ndarray | None = None) -> np.ndarray:
    """A projection is rows @ w, plus its bias. [EXP-4]"""
    return rows @ w_in_out if b_out is None else rows @ w_in_out + b_out


def hide(gate_RF: np.ndarray | None, up_RF: np.ndarray, spec: ExpertSpec) -> np.ndarray:
    """The activation applies to the gate half alone; the clamps stand where the spec says. [EXP-2, EXP-3]"""
    if gate_RF is None:
        return activated(up_RF, spec)
    return activated(gate_RF, spec) * clamped_up(up_RF, spec)


def activated(z_RF: np.ndarray, spec: ExpertSpec) -> np.ndarray:
    """The activation's input is clamped from above before it, or its output after it. [EXP-3]"""
    limit = np.inf if spec.clamp is None else spec.clamp
    if spec.clamp_at == "before":
        return activation(np.minimum(z_RF, limit), spec)
    return np.minimum(activation(z_RF, spec), limit)


def clamped_up(up_RF: np.ndarray, spec: ExpertSpec) -> np.ndarray:
    """The up half is clamped on both sides, or softly by a tanh, then offset. [EXP-3, EXP-11]"""
    limit = np.inf if spec.clamp is None else spec.clamp
    clipped_RF = np.clip(up_RF, -limit, limit)
    if spec.linear_beta is not None:
        clipped_RF = spec.linear_beta * np.tanh(clipped_RF / spec.linear_beta)
    return clipped_RF + spec.up_offset


def activation(z_RF: np.ndarray, spec: ExpertSpec) -> np.ndarray:
    """The activation of the spec, one number at a time."""
    if spec.activation == "silu":
        return z_RF * sigmoid(spec.alpha * z_RF)
    if spec.activation == "gelu":
        return z_RF * normal_cdf(z_RF)
    if spec.activation == "gelu_tanh":
        return z_RF * 0.5 * (1 + np.tanh(gelu_argument(z_RF)))
    if spec.activation == "situ":
        return spec.beta * np.tanh(z_RF / spec.beta) * sigmoid(z_RF)
    relu_RF = np.maximum(z_RF, 0)
    return relu_RF if spec.activation == "relu" else relu_RF**2


def sigmoid(z: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)), without overflow."""
    return np.exp(-np.logaddexp(0, -z))


def normal_cdf(z: np.ndarray) -> np.ndarray:
    """The share of a standard normal distribution below z."""
    # erfc, not 1 + erf: the tail below keeps its digits.
    erfc = np.vectorize(math.erfc, otypes=[np.float64])
    return (0.5 * erfc(-z / math.sqrt(2))).astype(z.dtype)


def gelu_argument(z: np.ndarray) -> np.ndarray:
    """What the tanh form of gelu takes the tanh of (arXiv:1606.08415)."""
    return math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)


def run_experts(
    rows_ND: np.ndarray, tokens_per_expert_E: np.ndarray, params: LayerParams, spec: ExpertSpec
) -> FeedForwardTrace:
    """Each expert works on its own rows alone, one expert after the other. [EXP-2, EXP-6, EXP-8]

    Rows are sorted by expert; the trace has all rows in that order. An expert without tokens works on zero rows.
    """
    ends_E = np.cumsum(tokens_per_expert_E)
    traces = []
    for expert_id, (end, size) in enumerate(zip(ends_E, tokens_per_expert_E, strict=True)):
        traces.append(feed_forward(rows_ND[end - size : end], params.expert(expert_id), spec))
    return FeedForwardTrace(
        input_RD=rows_ND,
        gate_RF=np.concatenate([t.gate_RF for t in traces]) if spec.gated else None,
        up_RF=np.concatenate([t.up_RF for t in traces]),
        hidden_RF=np.concatenate([t.hidden_RF for t in traces]),
        output_RD=np.concatenate([t.output_RD for t in traces]),
    )


def weigh_inputs(x_TD: np.ndarray, weights_TK: np.ndarray, spec: RouterSpec) -> np.ndarray:
    """A slot's input is its token, times the slot's weight where the weight is on the input. [LAY-12]"""
    inputs_TKD = np.repeat(x_TD[:, None, :], spec.top_k, axis=1)
    return inputs_TKD * weights_TK[:, :, None] if spec.weight_on == "input" else inputs_TKD


def fill_slots(
    expert_rows_ND: np.ndarray,
    order_N: np.ndarray,
    slot_inputs_TKD: np.ndarray,
    expert_ids_TK: np.ndarray,
    spec: RouterSpec,
) -> np.ndarray:
    """A slot's output is its row of the experts, or its own input for an identity null expert, or 0. [CMB-3, LAY-13]"""
    T, K, _ = slot_inputs_TKD.shape
    slot_outputs_TKD = unpermute(expert_rows_ND, order_N, K, T)
    return np.where(identity_slots(expert_ids_TK, spec)[:, :, None], slot_inputs_TKD, slot_outputs_TKD)


def identity_slots(expert_ids_TK: np.ndarray, spec: RouterSpec) -> np.ndarray:
    """Whether each slot belongs to a null expert that returns its input."""
    return (expert_ids_TK >= spec.identity_ids.start) & (expert_ids_TK < spec.identity_ids.stop)


def combine(slot_outputs_TKD: np.ndarray, weights_TK: np.ndarray, spec: RouterSpec) -> np.ndarray:
    """The routed output is the weighted sum of a token's slots, in slot order, times output_scale. [CMB-2, CMB-5]

    A weight that is on the input is not applied again.
    """
    summed_TD = np.zeros_like(slot_outputs_TKD[:, 0])
    for slot in range(spec.top_k):
        weight_T1 = weights_TK[:, slot, None] if spec.weight_on == "output" else 1
        summed_TD = summed_TD + weight_T1 * slot_outputs_TKD[:, slot]
    return summed_TD * spec.output_scale


def share_weights(
    x_TD: np.ndarray, shared_weights_TS: np.ndarray | None, params: LayerParams, spec: LayerSpec
) -> np.ndarray:
    """The factor of each shared expert: the router's weight, the sigmoid of a token's own logit, or 1. [LAY-10]"""
    if shared_weights_TS is not None:
        return shared_weights_TS
    if params.shared_token_gate_D is not None:
        return sigmoid(x_TD @ params.shared_token_gate_D)[:, None]
    return np.ones((len(x_TD), spec.num_shared_experts), x_TD.dtype)


def run_shared(x_TD: np.ndarray, params: LayerParams, spec: LayerSpec) -> tuple[FeedForwardTrace, ...]:
    """Each shared expert works on every token. [LAY-8]"""
    if spec.shared_experts is None:
        return ()
    return tuple(
        feed_forward(x_TD, params.shared_expert(shared_id), spec.shared_experts)
        for shared_id in range(spec.num_shared_experts)
    )


def sum_shared(shared_experts: tuple[FeedForwardTrace, ...], factors_TS: np.ndarray, x_TD: np.ndarray) -> np.ndarray:
    """The shared output is the sum of the shared experts' outputs, each times its factor; 0 without any. [LAY-8]"""
    shared_TD = np.zeros_like(x_TD)
    for shared_id, shared in enumerate(shared_experts):
        shared_TD = shared_TD + factors_TS[:, shared_id, None] * shared.output_RD
    return shared_TD


def join(routed_TD: np.ndarray, shared_TD: np.ndarray, spec: LayerSpec) -> np.ndarray:
    """The layer's output is the sum, or the average, of routed and shared output. [LAY-2, LAY-9, LAY-11]"""
    if spec.shared is None:
        return routed_TD
    joined_TD = routed_TD + shared_TD
    return joined_TD / 2 if spec.shared.combine == "average" else joined_TD
