"""conformance, subject torchtitan: the MoE layer of pytorch/torchtitan, as it is, outside of any mesh.

It is built from its own Config, without a trainer, and keeps its gate. Experts are GroupedExperts, or those of its
gpt-oss where the spec has their form.
"""

from dataclasses import asdict
from functools import lru_cache
from types import MethodType
from typing import Any
from unittest import mock

import numpy as np
import torch

from conformance.core.subject import Subject, Unsupported
from conformance.subjects.torch.arrays import to_numpy, to_torch
from conformance.subjects.torchtitan.arrays import canonical, load_params
from conformance.subjects.torchtitan.router import no_autocast_warning, router_config
from moe_ref import ExpertSpec, LayerParams, LayerSpec, RouterSpec, ShardLayout

GRANULE = {"bfloat16": 8, "float32": 4}
"""Rows of a grouped matmul are a multiple of 16 bytes."""
PLAIN = {"alpha": 1.0, "up_offset": 0.0, "clamp": None, "bias": False}
GPT_OSS = {"alpha": 1.702, "up_offset": 1.0, "bias": True}
"""Of gpt-oss; its clamp is free."""


class TorchtitanLayer(Subject):
    """MoE of torchtitan.models.common.moe; the experts compute in `expert_dtype`."""

    def supports_layer(self, spec: LayerSpec, layout: ShardLayout | None = None) -> str | None:
        return self.supports(own_router(spec), layout) or why_not_layer(spec, GRANULE[self.expert_dtype])

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
            found |= canonical(path, to_numpy(gradient), params)
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
    if is_gpt_oss(experts) and granule == GRANULE["bfloat16"]:
        return "torchtitan's experts of gpt-oss return bfloat16, which its sum of float32 tokens refuses"
    form = {"gated": True, "activation": "silu", "clamp_at": "before"} | ({} if is_gpt_oss(experts) else PLAIN)
    for name, allowed in form.items():
        if getattr(experts, name) != allowed:
            return f"torchtitan's experts have {name} {allowed}, not {getattr(experts, name)}"
    for name in ("dim", "hidden_dim"):
        size = getattr(experts, name)
        if size % granule:
            return f"experts.{name} is {size}; torchtitan's grouped matmul takes multiples of {granule}"
    if shared is not None and (shared.combine != "sum" or shared.clamp is not None):
        return "torchtitan's shared expert has no clamp, and is summed"
    return None


def is_gpt_oss(experts: ExpertSpec) -> bool:
    """Whether experts have the form of gpt-oss."""
    return experts.clamp is not None and all(getattr(experts, name) == value for name, value in GPT_OSS.items())


def own_router(spec: LayerSpec) -> RouterSpec:
    """The router as torchtitan has it: a softmax over the selected logits is one over all, divided by their sum."""
    if not (is_gpt_oss(spec.experts) and spec.router.score_over == "selected"):
        return spec.router
    return spec.router.replace(score_over="all", select_by="score", route_norm=True, norm_eps=1e-20)


def layer_config(spec: LayerSpec):
    """The Config of a whole layer."""
    from torchtitan.models.common import feed_forward as shared_experts
    from torchtitan.models.common import moe
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher
    from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

    router, D = own_router(spec), spec.experts.dim
    sizes: dict[str, Any] = {"dim": D, "hidden_dim": spec.experts.hidden_dim, "num_experts": router.num_experts}
    if is_gpt_oss(spec.experts):
        limit: Any = spec.experts.clamp  # which is_gpt_oss has seen
        experts = GptOssGroupedExperts.Config(**sizes, swiglu_limit=limit)
    else:
        experts = moe.GroupedExperts.Config(**sizes)
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
    """The forward pass of its experts, whose casts to bfloat16 are none."""
    with mock.patch.object(torch.Tensor, "bfloat16", lambda tensor: tensor):
        return type(experts).forward(experts, x_RD, num_tokens_per_expert_E)


def loaded(spec: LayerSpec, params: LayerParams, expert_dtype: str):
    """The layer of a spec with these parameters."""
    check_bias(spec, params)
    layer = build_layer(spec, expert_dtype)
    load_params(layer, params)
    return layer


def check_bias(spec: LayerSpec, params: LayerParams) -> None:
    """Its balancing bias is added to scores, whatever they are.

    Raises:
        Unsupported: the spec adds it to logits.
    """
    if params.expert_bias_E is not None and own_router(spec).select_by != spec.router.select_by:
        raise Unsupported("torchtitan adds the balancing bias to scores, not to logits")
