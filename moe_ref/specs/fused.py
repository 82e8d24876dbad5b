"""moe_ref, the fused form of a layer: its shared experts stand among the routed ones, in slots that every token has.

    ids E .. E+S-1 after the K slots of each token, with the weight that cancels the factor on the routed output

One grouped matmul does the work of both (`num_fused_shared_experts` of vLLM and SGLang). A shared expert that is S
times as wide as a routed one is S experts: its output is the sum of theirs. What is computed is the same layer; the
router, its choices and its counts stay those of E experts.

Legend: E routed experts, S slots of shared experts, D model dim, F expert hidden dim.
"""

from dataclasses import replace

import numpy as np

from moe_ref.specs.checks import require
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.params import LayerParams


def num_fused(spec: LayerSpec) -> int:
    """S, the slots that the shared experts take.

    Raises:
        ValueError: the layer has no such form; it names the field.
    """
    shared, router, experts = spec.shared, spec.router, spec.experts
    require(shared is not None, "shared is None; without shared experts there is nothing to fuse")
    assert shared is not None
    require(shared.gate == "none", f"shared.gate is {shared.gate!r}; a fused shared expert has a constant weight")
    require(
        router.num_scored_shared_experts == 0,
        f"router.num_scored_shared_experts is {router.num_scored_shared_experts}; a fused one has a constant weight",
    )
    require(
        router.num_null_experts == 0,
        f"router.num_null_experts is {router.num_null_experts}; their ids are those of the fused shared experts",
    )
    require(spec.latent is None, f"latent is {spec.latent}; shared experts see the token, and routed ones its latent")
    require(router.weight_on == "output", f"router.weight_on is {router.weight_on!r}; fused weights are on the output")
    require(router.output_scale > 0, "router.output_scale is 0; no weight cancels it")
    require(shared.clamp == experts.clamp, f"shared.clamp is {shared.clamp!r}, and experts.clamp {experts.clamp!r}")
    require(
        shared.hidden_dim % experts.hidden_dim == 0,
        f"shared.hidden_dim is {shared.hidden_dim}, no multiple of experts.hidden_dim ({experts.hidden_dim})",
    )
    return shared.hidden_dim // experts.hidden_dim


def fused_weight(spec: LayerSpec) -> float:
    """The weight of a shared expert's slot: that which cancels the factor on the routed output."""
    return 1 / spec.router.output_scale


def fused_spec(spec: LayerSpec) -> LayerSpec:
    """The fused form as a layer of its own: E + S experts, whose ids and weights are given to it."""
    S = num_fused(spec)
    assert spec.shared is not None
    router = spec.router.given(with_weights=True).replace(
        num_experts=spec.router.num_experts + S,
        top_k=spec.router.top_k + S,
        output_scale=spec.router.output_scale / (2 if spec.shared.combine == "average" else 1),
        learned_scale="none",
    )
    return spec.replace(router=router, shared=None)


def fuse_params(params: LayerParams, spec: LayerSpec) -> LayerParams:
    """The parameters of `fused_spec(spec)`: the shared experts follow the routed ones, in parts of their width.

    The gate has rows of zeros for them, which nobody reads. A bias of a shared expert is 0.
    """
    params.check(spec)
    S, F = num_fused(spec), spec.experts.hidden_dim

    def columns(w_EDF: np.ndarray | None, w_SDF: np.ndarray | None) -> np.ndarray | None:
        if w_EDF is None or w_SDF is None:
            return None
        parts = np.split(np.asarray(w_SDF)[0], S, axis=1)
        return np.concatenate([w_EDF, np.stack(parts)])

    def zeros(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else np.concatenate([values, np.zeros((S, *values.shape[1:]), values.dtype)])

    assert params.shared_w_down_SFD is not None
    down_SFD = np.asarray(params.shared_w_down_SFD)[0].reshape(S, F, spec.experts.dim)
    w_up_EDF, gate_ED = columns(params.w_up_EDF, params.shared_w_up_SDF), zeros(np.asarray(params.gate_ED))
    assert w_up_EDF is not None
    assert gate_ED is not None
    return LayerParams(
        gate_ED=gate_ED,
        gate_bias_E=zeros(params.gate_bias_E),
        w_up_EDF=w_up_EDF,
        w_gate_EDF=columns(params.w_gate_EDF, params.shared_w_gate_SDF),
        w_down_EFD=np.concatenate([params.w_down_EFD, down_SFD]),
        b_up_EF=zeros(params.b_up_EF),
        b_gate_EF=zeros(params.b_gate_EF),
        b_down_ED=zeros(params.b_down_ED),
    )


def unfuse_params(fused: LayerParams, params: LayerParams, spec: LayerSpec) -> LayerParams:
    """The parameters of the layer with the experts of its fused form; the router's are those of `params`."""
    E, D = spec.router.num_experts, spec.experts.dim
    assert spec.shared is not None

    def shared(w_EDF: np.ndarray | None) -> np.ndarray | None:
        return None if w_EDF is None else np.concatenate(list(np.asarray(w_EDF)[E:]), axis=1)[None]

    def routed(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values[:E]

    own = {name: routed(getattr(fused, name)) for name in ("w_up_EDF", "w_gate_EDF", "w_down_EFD")}
    own |= {name: routed(getattr(fused, name)) for name in ("b_up_EF", "b_gate_EF", "b_down_ED")}
    return replace(
        params,
        **own,
        shared_w_up_SDF=shared(fused.w_up_EDF),
        shared_w_gate_SDF=shared(fused.w_gate_EDF),
        shared_w_down_SFD=np.asarray(fused.w_down_EFD)[E:].reshape(1, -1, D),
    )
