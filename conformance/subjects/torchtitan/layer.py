"""conformance, subject torchtitan: the token-choice router and the MoE layer of pytorch/torchtitan, as they are.

They are built from their own Config, without a trainer or a mesh. To route logits, the router's gate is replaced by
an identity (`identity_gate`); a whole layer keeps its gate.
"""

import warnings
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import version
from types import MethodType

import numpy as np
import torch
from torch.nn import functional as F

from conformance.core.subject import Routing, Unsupported
from conformance.subjects.identity_gate import give_identity_gate, to_numpy, to_torch
from conformance.subjects.torchtitan.balance import TorchtitanBalance
from moe_ref import ExpertSpec, LayerParams, LayerSpec, RouterSpec

FREE = ("num_experts", "top_k", "score_func", "num_expert_groups", "num_limited_groups", "route_norm", "route_scale")
"""Fields of its Config, under the names of RouterSpec."""
FIXED = {"score_func": ("softmax", "sigmoid"), "selector": ("top_k", "round_robin"), "norm_eps": (1e-20,)}
"""Values that differ from the identity, or are a choice."""
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
GRANULE = {"bfloat16": 8, "float32": 4}
"""Rows of a grouped matmul are a multiple of 16 bytes."""


class Torchtitan(TorchtitanBalance):
    """TokenChoiceTopKRouter and MoE of torchtitan.models.common.moe; the experts compute in bfloat16."""

    name = "torchtitan"
    url = "https://github.com/pytorch/torchtitan"
    # Not bfloat16: it raises its gate to float32 by autocast, which CPU builds of torch do not offer.
    logit_dtypes = ("float32",)
    expert_dtype = "bfloat16"

    def __init__(self):
        self.version = version("torchtitan")
        torch.set_num_threads(1)  # a router call is too small to share

    def supports(self, spec: RouterSpec, layout=None) -> str | None:
        if layout is not None:
            return "torchtitan's router has no layout"
        values = {name: getattr(spec, name) for name in RouterSpec.__dataclass_fields__}
        if not spec.route_norm:
            values |= {"norm_eps": 1e-20, "norm_form": "add_eps", "norm_p": 1.0}
        values |= {} if spec.selector == "sparsemixer" else {"mixer_eps": 0.01}
        values |= {} if spec.num_null_experts else {"null_kind": "identity"}
        return why_not(values)

    # It names its inputs (none further), which is how a subject says what it takes.
    def route(self, logits_TE, spec, expert_bias_E) -> Routing:
        tokens_TE = to_torch(logits_TE)
        router = build_for_logits(tuple((name, getattr(spec, name)) for name in (*FREE, "selector")))
        bias_E = None if expert_bias_E is None else to_torch(expert_bias_E)
        with torch.no_grad(), no_autocast_warning():
            weights_1TK, ids_1TK, scores_1TE = router(tokens_TE[None], bias_E)
        return Routing(
            expert_ids_TK=to_numpy(ids_1TK[0]), weights_TK=to_numpy(weights_1TK[0]), scores_TE=to_numpy(scores_1TE[0])
        )

    def gate(self, x_TD, gate_ED, gate_bias_E) -> np.ndarray:
        tokens_TD = to_torch(x_TD)
        num_experts, dim = gate_ED.shape
        fields = {"num_experts": num_experts, "top_k": 1}
        gate = build(fields, dim, gate_bias=gate_bias_E is not None).gate
        with torch.no_grad():
            gate.weight.copy_(to_torch(gate_ED))
            if gate_bias_E is not None:
                gate.bias.copy_(to_torch(gate_bias_E))
            # The router does not return its logits, so its gate is called alone.
            return to_numpy(gate(tokens_TD))

    def configure(self, fields: dict) -> None:
        """Config, router and a forward pass of two tokens, which is where it looks at the groups."""
        if why := why_not({name: value for name, value in fields.items() if name not in FREE}):
            raise Unsupported(why)
        dim = 4
        router = build({"num_experts": 8, "top_k": 1} | fields, dim)
        with torch.no_grad(), no_autocast_warning():
            router.gate.weight.zero_()
            router(torch.zeros(1, 2, dim), None)

    def supports_layer(self, spec: LayerSpec, layout=None) -> str | None:
        return self.supports(spec.router, layout) or why_not_layer(spec, GRANULE[self.expert_dtype])

    # They name their inputs, as route does.
    def layer(self, x_TD, params, spec):  # pyright: ignore[reportIncompatibleMethodOverride]
        moe = load(spec, params, self.expert_dtype)
        with torch.no_grad(), no_autocast_warning():
            return to_numpy(moe(to_torch(x_TD)[None])[0])

    def layer_gradients(self, x_TD, params, spec, d_output_TD):  # pyright: ignore[reportIncompatibleMethodOverride]
        """By autograd, brought back into the canonical layout; the balancing bias is a buffer and has none."""
        moe, tokens_TD = load(spec, params, self.expert_dtype), to_torch(x_TD).requires_grad_()
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

    def experts(self, rows_RD, tokens_per_expert_E, params, spec):
        experts = load(spec, params, self.expert_dtype).routed_experts.inner_experts
        # An empty NumPy array has strides of 0, which a grouped matmul refuses.
        rows = torch.empty(rows_RD.shape).copy_(to_torch(rows_RD))
        with torch.no_grad():
            return to_numpy(experts(rows, to_torch(tokens_per_expert_E)))

    def combine(self, rows_ND, order_N, weights_TK, spec):
        """What its dispatcher does with its own metadata, which are token and weight of each row."""
        from torchtitan.models.common.token_dispatcher import LocalDispatchMetadata

        (T, K), D = weights_TK.shape, rows_ND.shape[1]
        dispatcher = layer_config(spec).routed_experts.token_dispatcher.build()
        metadata = LocalDispatchMetadata(
            token_indices_experts_sorted_N=to_torch(order_N // K),
            topk_scores_experts_sorted_N=to_torch(weights_TK.reshape(-1)[order_N]),
        )
        return to_numpy(dispatcher.combine(to_torch(rows_ND), metadata, torch.empty(T, D)))


class TorchtitanFloat32(Torchtitan):
    """The same with experts that compute in float32: their `forward` is overridden, as they allow, to not cast."""

    name = "torchtitan-float32"
    expert_dtype = "float32"


@contextmanager
def no_autocast_warning():
    """Without the one warning that its float32 autocast brings on a CPU; with float32 tokens it changes nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="In CPU autocast")
        yield


def why_not(values: dict) -> str | None:
    """A sentence that names the first field whose value the router cannot have, or None."""
    for name, value in values.items():
        field = RouterSpec.__dataclass_fields__.get(name)
        allowed = FIXED.get(name, () if field is None else (field.default,))
        if (name in FREE and name not in FIXED) or value in allowed:
            continue
        return f"torchtitan's router has {name} {' or '.join(map(str, allowed)) or 'nowhere'}, not {value}"
    return None


@lru_cache(maxsize=512)
def build_for_logits(fields: tuple):
    """A router that takes logits: its gate is an identity."""
    values = dict(fields)
    router = build(values, values["num_experts"])
    give_identity_gate(router, "gate.weight")
    return router


def build(fields: dict, dim: int, *, gate_bias: bool = False):
    """The router from its own Config, with untrained weights."""
    return router_config(fields, dim, gate_bias=gate_bias).build().eval().requires_grad_(False)


def router_config(fields: dict, dim: int, *, gate_bias: bool):
    """The Config of the router."""
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import TokenChoiceTopKRouter

    num_experts = fields["num_experts"]
    return TokenChoiceTopKRouter.Config(
        gate=Linear.Config(in_features=dim, out_features=num_experts, bias=gate_bias),
        _debug_force_load_balance=fields.get("selector") == "round_robin",
        **{name: value for name, value in fields.items() if name in FREE},
    )


def why_not_layer(spec: LayerSpec, granule: int) -> str | None:
    """A sentence that names the first field of experts or shared experts that the layer cannot have, or None."""
    experts, shared = spec.experts, spec.shared
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


def load(spec: LayerSpec, params: LayerParams, expert_dtype: str):
    """The layer of a spec with these parameters."""
    layer = build_layer(spec, expert_dtype)
    with torch.no_grad():
        for path, parameter in layer.named_parameters():
            parameter.copy_(to_torch(to_native(PARAMETERS[path], params)).reshape(parameter.shape))
        bias_E = params.expert_bias_E
        layer.expert_bias_E.copy_(torch.zeros(len(layer.expert_bias_E)) if bias_E is None else to_torch(bias_E))
    return layer


def to_native(field: str, params: LayerParams) -> np.ndarray:
    """A parameter as the layer keeps it, up to leading axes of 1."""
    return turned(field, getattr(params, field))


def turned(field: str, values: np.ndarray) -> np.ndarray:
    """[in, out] and [out, in], either way; gates and biases stay as they are."""
    return np.swapaxes(values, -1, -2) if "w_" in field else values
