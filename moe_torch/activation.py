"""moe_torch, activation: what stands between the projections of an expert, and its gradient.

Legend: R rows, F expert hidden dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_ref.specs.layer import ExpertSpec


class Activation(NamedTuple):
    """What stands between the projections, as arguments that an operator can take; see ExpertSpec."""

    name: str
    alpha: float
    up_offset: float
    clamp: float | None
    clamp_at: str
    beta: float
    linear_beta: float | None

    @classmethod
    def of(cls, spec: ExpertSpec) -> "Activation":
        """The part of a spec that is neither a size nor a weight."""
        return cls(spec.activation, spec.alpha, spec.up_offset, spec.clamp, spec.clamp_at, spec.beta, spec.linear_beta)


def hide(gate_RF: Tensor, up_RF: Tensor | None, act: Activation) -> Tensor:
    """The activation applies to the gate half alone; the clamps stand where the spec says."""
    activated_RF = activated(gate_RF, act)
    return activated_RF if up_RF is None else activated_RF * clamped_up(up_RF, act)


def hide_backward(
    d_hidden_RF: Tensor, gate_RF: Tensor, up_RF: Tensor | None, act: Activation
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The hidden values again, and the gradients of both halves.

    A clamp passes the gradient of a value exactly at its limit.
    """
    activated_RF = activated(gate_RF, act)
    if up_RF is None:
        return activated_RF, activated_backward(d_hidden_RF, gate_RF, act), None
    offset_up_RF = clamped_up(up_RF, act)
    d_up_RF = d_hidden_RF * activated_RF
    if act.clamp is not None:
        d_up_RF = torch.where(up_RF.abs() <= act.clamp, d_up_RF, 0)
    if act.linear_beta is not None:
        clipped_RF = up_RF if act.clamp is None else up_RF.clamp(-act.clamp, act.clamp)
        d_up_RF = torch.ops.aten.tanh_backward(d_up_RF, torch.tanh(clipped_RF / act.linear_beta))
    return activated_RF * offset_up_RF, activated_backward(d_hidden_RF * offset_up_RF, gate_RF, act), d_up_RF


def clamped_up(up_RF: Tensor, act: Activation) -> Tensor:
    """The up half is clamped on both sides, or softly by a tanh, then offset."""
    if act.clamp is not None:
        up_RF = up_RF.clamp(-act.clamp, act.clamp)
    if act.linear_beta is not None:
        up_RF = act.linear_beta * torch.tanh(up_RF / act.linear_beta)
    return up_RF + act.up_offset if act.up_offset else up_RF


def activated(z_RF: Tensor, act: Activation) -> Tensor:
    """The activation's input is clamped from above before it, or its output after it."""
    if act.clamp is None:
        return _activation(z_RF, act)
    if act.clamp_at == "before":
        return _activation(z_RF.clamp(max=act.clamp), act)
    return _activation(z_RF, act).clamp(max=act.clamp)


def activated_backward(d_RF: Tensor, z_RF: Tensor, act: Activation) -> Tensor:
    """The gradient of the activation's input; 0 where the clamped value is above the limit."""
    d_z_RF = _activation_backward(d_RF, z_RF, act)
    if act.clamp is None:
        return d_z_RF
    clamped_RF = z_RF if act.clamp_at == "before" else _activation(z_RF, act)
    return torch.where(clamped_RF <= act.clamp, d_z_RF, 0)


def _activation(z_RF: Tensor, act: Activation) -> Tensor:
    if act.name == "silu":
        return F.silu(z_RF) if act.alpha == 1 else z_RF * torch.sigmoid(act.alpha * z_RF)
    if act.name == "gelu":
        return F.gelu(z_RF)
    if act.name == "gelu_tanh":
        return F.gelu(z_RF, approximate="tanh")
    if act.name == "situ":
        return act.beta * torch.tanh(z_RF / act.beta) * torch.sigmoid(z_RF)
    return F.relu(z_RF) if act.name == "relu" else F.relu(z_RF).square()


def _activation_backward(d_RF: Tensor, z_RF: Tensor, act: Activation) -> Tensor:
    if act.name == "silu" and act.alpha == 1:
        return torch.ops.aten.silu_backward(d_RF, z_RF)
    if act.name == "silu":
        s_RF = torch.sigmoid(act.alpha * z_RF)
        return d_RF * (s_RF + act.alpha * z_RF * s_RF * (1 - s_RF))
    if act.name in ("gelu", "gelu_tanh"):
        return torch.ops.aten.gelu_backward(d_RF, z_RF, approximate="none" if act.name == "gelu" else "tanh")
    if act.name == "situ":
        s_RF, t_RF = torch.sigmoid(z_RF), torch.tanh(z_RF / act.beta)
        return d_RF * s_RF * ((1 - t_RF.square()) + act.beta * t_RF * (1 - s_RF))
    return torch.ops.aten.threshold_backward(d_RF if act.name == "relu" else 2 * d_RF * z_RF, z_RF, 0)
