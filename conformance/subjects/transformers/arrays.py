"""conformance, subject transformers: parameters between the canonical layout and that of its blocks."""

import numpy as np
import torch

from conformance.subjects.torch.arrays import to_torch
from conformance.subjects.transformers.blocks import Projections, RealBlock
from moe_ref import LayerParams

EXPERT_FIELDS = ("w_gate_EDF", "w_up_EDF", "w_down_EFD")
SHARED_FIELDS = ("shared_w_gate_SDF", "shared_w_up_SDF", "shared_w_down_SFD")
LATENT_FIELDS = ("latent_w_down_DH", "latent_w_up_HD")
BIAS_FIELDS = ("b_gate_EF", "b_up_EF", "b_down_ED")


def load_params(module: torch.nn.Module, block: RealBlock, params: LayerParams) -> None:
    """Write the parameters into a block, whose parameters take no gradient; no balancing bias is one of zeros."""
    for path, native in to_native(block, params).items():
        prefix(module.get_parameter(path), native).copy_(torch.from_numpy(native))
    set_expert_bias(module, block, params.expert_bias_E)


def set_expert_bias(module: torch.nn.Module, block: RealBlock, expert_bias_E) -> None:
    """The balancing bias is written where block or router keep it; None is zeros."""
    path = block.bias or (f"{block.router}.{block.row.bias}" if block.row.bias else "")
    if not path:
        return
    owner, _, name = path.rpartition(".")
    kept = getattr(module.get_submodule(owner), name)
    kept.copy_(torch.zeros(kept.shape) if expert_bias_E is None else to_torch(expert_bias_E).reshape(kept.shape))


def to_native(block: RealBlock, params: LayerParams) -> dict[str, np.ndarray]:
    """path -> what the block keeps there, up to its shape: everything that is trained."""
    row = block.row
    router = f"{block.router}." if block.router else ""
    found: dict = {router + row.gate: params.gate_ED}
    if row.gate_bias:
        found[router + row.gate_bias] = params.gate_bias_E
    if params.learned_scale is not None:
        found[router + "global_scale"] = params.learned_scale
    found |= _native_projections(block.experts, *(getattr(params, name) for name in EXPERT_FIELDS))
    if block.experts.biases:
        b_gate_EF, b_up_EF, b_down_ED = (getattr(params, name) for name in BIAS_FIELDS)
        fused = block.experts.layout.bias_from_canonical(b_gate_EF, b_up_EF)
        names = (f"{block.experts.path}.{name}" for name in block.experts.biases)
        found |= dict(zip(names, (fused, b_down_ED), strict=True))
    if block.shared is not None and params.shared_w_up_SDF is not None:
        found |= _native_projections(block.shared.projections, *(getattr(params, name) for name in SHARED_FIELDS))
        if block.shared.gate:
            found[block.shared.gate] = params.shared_token_gate_D
    if params.latent_w_down_DH is not None:
        found |= {path: np.swapaxes(getattr(params, name), 0, 1) for path, name in _latent(block)}
    return {path: np.array(value, np.float32, order="C") for path, value in found.items()}


def to_canonical(block: RealBlock, natives: dict[str, np.ndarray], params: LayerParams) -> dict[str, np.ndarray]:
    """Field of LayerParams -> value, from what `to_native` returns; `params` says which there are."""
    row, shared = block.row, block.shared
    router = f"{block.router}." if block.router else ""
    found: dict = {"gate_ED": natives[router + row.gate]}
    if row.gate_bias:
        found["gate_bias_E"] = natives[router + row.gate_bias]
    if params.learned_scale is not None:
        found["learned_scale"] = natives[router + "global_scale"]
    found |= zip(EXPERT_FIELDS, _canonical_projections(block.experts, natives), strict=True)
    if block.experts.biases:
        fused, b_down_ED = (natives[f"{block.experts.path}.{name}"] for name in block.experts.biases)
        found |= zip(BIAS_FIELDS, (*block.experts.layout.bias_to_canonical(fused), b_down_ED), strict=True)
    if shared is not None and params.shared_w_up_SDF is not None:
        found |= zip(SHARED_FIELDS, _canonical_projections(shared.projections, natives), strict=True)
        if shared.gate:
            found["shared_token_gate_D"] = natives[shared.gate]
    if params.latent_w_down_DH is not None:
        found |= {name: np.swapaxes(natives[path], 0, 1) for path, name in _latent(block)}
    return {name: value for name, value in found.items() if value is not None}


def _latent(block: RealBlock):
    """(path, field) of each projection around the routed experts."""
    return zip(block.latent, LATENT_FIELDS, strict=True)


def _native_projections(own: Projections, w_gate, w_up, w_down) -> dict[str, np.ndarray]:
    """path -> weights of experts, routed or shared."""
    gate_up, down = own.layout.from_canonical(w_gate, w_up, w_down)
    if own.down_order == "in_out":
        down = w_down
    parts = [each for each in gate_up if each is not None] if isinstance(gate_up, tuple) else [gate_up]
    names = (f"{own.path}.{name}" for name in (*own.gate_up, own.down))
    return dict(zip(names, (*parts, down), strict=True))


def _canonical_projections(own: Projections, natives: dict[str, np.ndarray]):
    """w_gate (None where experts are not gated), w_up, w_down."""
    *parts, down = (natives[f"{own.path}.{name}"] for name in (*own.gate_up, own.down))
    gate_up = parts[0] if own.layout.fused != "separate" else (parts[0] if len(parts) == 2 else None, parts[-1])
    w_gate, w_up, w_down = own.layout.to_canonical(gate_up, down)
    return w_gate, w_up, down if own.down_order == "in_out" else w_down


def prefix(values, native: np.ndarray):
    """The numbers that have a canonical name, in the shape of `native`.

    longcat_flash keeps up projections for its null experts too, after the others.
    """
    return values.reshape(-1)[: native.size].reshape(native.shape)
