"""conformance, subject torchtitan: the MoE layer of pytorch/torchtitan, as it is, outside of any mesh.

It is built from its own Config, without a trainer, and keeps its gate.
"""

from dataclasses import asdict
from functools import lru_cache
from types import MethodType

import numpy as np
import torch
from torch.nn import functional as F

from conformance.core.subject import Subject
from conformance.subjects.torch.arrays import to_numpy, to_torch
from conformance.subjects.torchtitan.arrays import PARAMETERS, load_params, to_native, turned
from conformance.subjects.torchtitan.router import no_autocast_warning, router_config
from moe_ref import ExpertSpec, LayerParams, LayerSpec, ShardLayout

GRANULE = {"bfloat16": 8, "float32": 4}
"""Rows of a grouped matmul are a multiple of 16 bytes."""


class TorchtitanLayer(Subject):
    """MoE of torchtitan.models.common.moe; the experts compute in `expert_dtype`."""

    def supports_layer(self, spec: LayerSpec, layout: ShardLayout | None = None) -> str | None:
        return self.supports(spec.router, layout) or why_not_layer(spec, GRANULE[self.expert_dtype])

    def layer(self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec) -> np.ndarray:
        moe = loaded(spec, params, self.expert_dtype)
        with torch.no_grad(), no_autocast_warning():
            return to_numpy(moe(to_torch(x_TD)[None])[0])

    def layer_gradients(
        self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, d_output_TD: np.ndarray
    ) -> dict[str, np.ndarray]:
        """By autograd, brought back into the canonical layout; the balancing bias is a buffer and has none."""
        moe, tokens_TD = loaded(spec, params, self.expert_dtype), to_torch(x_TD).requires_grad_()
        trained = dict(moe.named_parameters())
        with no_autocast_warning():
            output_TD = moe(tokens_TD[None])[0]
        d_x_TD, *gradients = torch.autograd.grad(output_TD, [tokens_TD, *trained.values()], to_torch(d_output_TD))
        found = {"x_TD": to_numpy(d_x_TD)}
        for path, gradient in zip(trained, gradients, strict=True):
            field = PARAMETERS[path]
            native = to_native(field, params)
            found[field] = turned(field, to_numpy(gradient).reshape(native.shape))
        return found

    def experts(
        self, rows_RD: np.ndarray, tokens_per_expert_E: np.ndarray, params: LayerParams, spec: LayerSpec
    ) -> np.ndarray:
        experts = loaded(spec, params, self.expert_dtype).routed_experts.inner_experts
        # An empty NumPy array has strides of 0, which a grouped matmul refuses.
        rows = torch.empty(rows_RD.shape).copy_(to_torch(rows_RD))
        with torch.no_grad():
            return to_numpy(experts(rows, to_torch(tokens_per_expert_E)))

    def combine(self, rows_ND: np.ndarray, order_N: np.ndarray, weights_TK: np.ndarray, spec: LayerSpec) -> np.ndarray:
        """What its dispatcher does with its own metadata, which are token and weight of each row."""
        from torchtitan.models.common.token_dispatcher import LocalDispatchMetadata

        (T, K), D = weights_TK.shape, rows_ND.shape[1]
        dispatcher = layer_config(spec).routed_experts.token_dispatcher.build()
        metadata = LocalDispatchMetadata(
            token_indices_experts_sorted_N=to_torch(order_N // K),
            topk_scores_experts_sorted_N=to_torch(weights_TK.reshape(-1)[order_N]),
        )
        return to_numpy(dispatcher.combine(to_torch(rows_ND), metadata, torch.empty(T, D)))


def why_not_layer(spec: LayerSpec, granule: int) -> str | None:
    """A sentence that names the first field of experts or shared experts that the layer cannot have, or None."""
    experts, shared = spec.experts, spec.shared
    if spec.latent is not None:
        return "torchtitan's experts see the tokens, and no latent"
    for name in ("gated", "activation", "alpha", "up_offset", "clamp", "bias"):
        value, allowed = getattr(experts, name), ExpertSpec.__dataclass_fields__[name].default
        if value != allowed:
            return f"torchtitan's experts have {name} {allowed}, not {value}"
    for name in ("dim", "hidden_dim"):
        size = getattr(experts, name)
        if size % granule:
            return f"experts.{name} is {size}; torchtitan's grouped matmul takes multiples of {granule}"
    if shared is not None and (shared.combine != "sum" or shared.clamp is not None):
        return "torchtitan's shared expert has no clamp, and is summed"
    return None


def layer_config(spec: LayerSpec):
    """The Config of a whole layer."""
    from torchtitan.models.common import feed_forward as shared_experts
    from torchtitan.models.common import moe
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    router, D, width = spec.router, spec.experts.dim, spec.experts.hidden_dim
    experts = moe.GroupedExperts.Config(dim=D, hidden_dim=width, num_experts=router.num_experts)
    dispatcher = LocalTokenDispatcher.Config(num_experts=router.num_experts, top_k=router.top_k)
    shared = None
    if spec.shared is not None:
        into, out = (
            Linear.Config(in_features=a, out_features=b)
            for a, b in ((D, spec.shared.hidden_dim), (spec.shared.hidden_dim, D))
        )
        if spec.shared.gate == "sigmoid":
            gate = Linear.Config(in_features=D, out_features=1)
            shared = shared_experts.SigmoidGatedFeedForward.Config(w1=into, w2=out, w3=into, gate=gate)
        else:
            shared = shared_experts.FeedForward.Config(w1=into, w2=out, w3=into)
    return moe.MoE.Config(
        num_experts=router.num_experts,
        router=router_config(asdict(router), D, gate_bias=spec.gate_bias),
        routed_experts=moe.RoutedExperts.Config(inner_experts=experts, token_dispatcher=dispatcher),
        shared_experts=shared,
    )


@lru_cache(maxsize=64)
def build_layer(spec: LayerSpec, expert_dtype: str):
    """The layer with untrained weights, outside of any mesh."""
    from torchtitan.distributed.utils import set_spmd_backend

    set_spmd_backend("default")  # the shipped default looks for the trainer's mesh
    layer = layer_config(spec).build().eval()
    if expert_dtype == "float32":
        experts = layer.routed_experts.inner_experts
        experts.forward = MethodType(forward_in_float32, experts)
    return layer


def forward_in_float32(experts, x_RD, num_tokens_per_expert_E):
    """What GroupedExperts.forward computes, without its casts."""
    ends_E = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)

    def project(rows, w_EOI):
        return experts._grouped_mm(A=rows, B_t=w_EOI.transpose(-2, -1), offs=ends_E)

    return project(F.silu(project(x_RD, experts.w1_EFD)) * project(x_RD, experts.w3_EFD), experts.w2_EDF)


def loaded(spec: LayerSpec, params: LayerParams, expert_dtype: str):
    """The layer of a spec with these parameters."""
    layer = build_layer(spec, expert_dtype)
    load_params(layer, params)
    return layer
