"""conformance, subject torchtitan: parameters between the canonical layout and that of its modules."""

import numpy as np
import torch

from conformance.subjects.torch.arrays import to_torch
from moe_ref import LayerParams

EXPERTS = "routed_experts.inner_experts."
PARAMETERS = {
    "router.gate.weight": ("gate_ED",),
    "router.gate.bias": ("gate_bias_E",),
    EXPERTS + "w1_EFD": ("w_gate_EDF",),
    EXPERTS + "w2_EDF": ("w_down_EFD",),
    EXPERTS + "w3_EFD": ("w_up_EDF",),
    EXPERTS + "mlp1_weight_EGD": ("w_gate_EDF", "w_up_EDF"),
    EXPERTS + "mlp1_bias_EG": ("b_gate_EF", "b_up_EF"),
    EXPERTS + "mlp2_weight_EDF": ("w_down_EFD",),
    EXPERTS + "mlp2_bias_ED": ("b_down_ED",),
    "shared_experts.w1.weight": ("shared_w_gate_SDF",),
    "shared_experts.w2.weight": ("shared_w_down_SFD",),
    "shared_experts.w3.weight": ("shared_w_up_SDF",),
    "shared_experts.gate.weight": ("shared_token_gate_D",),
}
"""Path in the layer -> field of LayerParams; two fields have their rows in turns (gpt-oss)."""


def load_params(layer: torch.nn.Module, params: LayerParams) -> None:
    """Write the parameters into a layer; no balancing bias is one of zeros."""
    with torch.no_grad():
        for path, parameter in layer.named_parameters():
            parameter.copy_(to_torch(native(path, params)).reshape(parameter.shape))
        bias_E, kept_E = params.expert_bias_E, layer.get_buffer("expert_bias_E")
        kept_E.copy_(torch.zeros(len(kept_E)) if bias_E is None else to_torch(bias_E))


def native(path: str, params: LayerParams) -> np.ndarray:
    """A parameter as the layer keeps it, up to leading axes of 1."""
    parts = [turned(field, getattr(params, field)) for field in PARAMETERS[path]]
    if len(parts) == 1:
        return parts[0]
    both = np.stack(parts, axis=2)
    return both.reshape(both.shape[0], -1, *both.shape[3:])


def canonical(path: str, values: np.ndarray, params: LayerParams) -> dict[str, np.ndarray]:
    """What the layer keeps at a path, as fields of LayerParams."""
    fields, values = PARAMETERS[path], values.reshape(native(path, params).shape)
    if len(fields) == 1:
        return {fields[0]: turned(fields[0], values)}
    return {field: turned(field, values[:, number :: len(fields)]) for number, field in enumerate(fields)}


def turned(field: str, values: np.ndarray) -> np.ndarray:
    """[in, out] and [out, in], either way; gates and biases stay as they are."""
    return np.swapaxes(values, -1, -2) if "w_" in field else values
