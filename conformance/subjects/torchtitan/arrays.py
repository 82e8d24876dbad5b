"""conformance, subject torchtitan: parameters between the canonical layout and that of its modules."""

import numpy as np
import torch

from conformance.subjects.torch.arrays import to_torch
from moe_ref import LayerParams

PARAMETERS = {
    "router.gate.weight": "gate_ED",
    "router.gate.bias": "gate_bias_E",
    "routed_experts.inner_experts.w1_EFD": "w_gate_EDF",
    "routed_experts.inner_experts.w2_EDF": "w_down_EFD",
    "routed_experts.inner_experts.w3_EFD": "w_up_EDF",
    "shared_experts.w1.weight": "shared_w_gate_SDF",
    "shared_experts.w2.weight": "shared_w_down_SFD",
    "shared_experts.w3.weight": "shared_w_up_SDF",
    "shared_experts.gate.weight": "shared_token_gate_D",
}
"""Path in the layer -> field of LayerParams."""


def load_params(layer: torch.nn.Module, params: LayerParams) -> None:
    """Write the parameters into a layer; no balancing bias is one of zeros."""
    with torch.no_grad():
        for path, parameter in layer.named_parameters():
            parameter.copy_(to_torch(to_native(PARAMETERS[path], params)).reshape(parameter.shape))
        bias_E, kept_E = params.expert_bias_E, layer.get_buffer("expert_bias_E")
        kept_E.copy_(torch.zeros(len(kept_E)) if bias_E is None else to_torch(bias_E))


def to_native(field: str, params: LayerParams) -> np.ndarray:
    """A parameter as the layer keeps it, up to leading axes of 1."""
    return turned(field, getattr(params, field))


def turned(field: str, values: np.ndarray) -> np.ndarray:
    """[in, out] and [out, in], either way; gates and biases stay as they are."""
    return np.swapaxes(values, -1, -2) if "w_" in field else values
