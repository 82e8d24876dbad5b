"""moe_torch, names: a state dict of torchtitan's MoE layers becomes one of ours and back, bit for bit.

    model.load_state_dict(from_torchtitan(torch.load("titan.pt")))
    torch.save(to_torchtitan(model.state_dict()), "titan.pt")

The tensors are the same objects, in the same layout, and may be DTensors: only names differ.

    torchtitan 0.3                                  moe_torch
    moe.routed_experts.inner_experts.w1_EFD         moe.experts.w1_EFD          (w2_EDF, w3_EFD)
    moe.expert_bias_E                               moe.router.expert_bias
    moe.shared_experts.gate.weight                  moe.shared_experts.token_gate.weight
    moe.router.gate.weight, moe.shared_experts.w1.weight and all that is no part of an MoE layer: the same
"""

import re
from collections.abc import Mapping
from typing import Any

_NAMES = (
    ("routed_experts.inner_experts.", "experts."),
    ("expert_bias_E", "router.expert_bias"),
    ("shared_experts.gate.", "shared_experts.token_gate."),
)
"""A part of a name in torchtitan, and here; a part starts a name or follows a dot."""


def from_torchtitan(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of a model with torchtitan's MoE layers, for the same model with ours in their places.

    Args:
        state_dict: of a layer, a block or a whole model. Without `load_balance_coeff` it has no balancing bias; then
            `load_state_dict(..., strict=False)` leaves the bias as it is, which in a new layer is 0.

    Raises:
        ValueError: two names become one.
    """
    return _renamed(state_dict, _NAMES)


def to_torchtitan(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `from_torchtitan`.

    Raises:
        ValueError: a layer has what torchtitan's layers have not (biases of experts, a learned scale, a latent); or two
            names become one.
    """
    for name in state_dict:
        if re.search(
            r"(^|\.)(experts\.b[123]_\w+|router\.learned_scale|latent\.\w+\.weight|constant_experts\.\w+)$", name
        ):
            raise ValueError(f"the state dict has {name!r}, which torchtitan's MoE has not")
    return _renamed(state_dict, [(ours, theirs) for theirs, ours in _NAMES])


def _renamed(state_dict: Mapping[str, Any], names) -> dict[str, Any]:
    found = {}
    for name, value in state_dict.items():
        new = name
        for before, after in names:
            ending = "" if before.endswith(".") else "$"
            new = re.sub(rf"(^|\.){re.escape(before)}{ending}", rf"\g<1>{after}", new)
        if new in found:
            raise ValueError(f"two names of the state dict become {new!r}")
        found[new] = value
    return found
