"""conformance, subject torchtitan: the token-choice router of pytorch/torchtitan, as it is.

It is built from its own Config, without a trainer or a mesh. To route logits, its gate is replaced by an identity
(`identity_gate`).
"""

import dataclasses
import warnings
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from conformance.core.subject import Routing, Subject, Unsupported
from conformance.subjects.identity_gate import give_identity_gate
from conformance.subjects.torch.arrays import to_numpy, to_torch
from moe_ref import RouterSpec, ShardLayout

FREE = ("num_experts", "top_k", "score_func", "num_expert_groups", "num_limited_groups", "route_norm", "route_scale")
"""Fields of its Config, under the names of RouterSpec."""
FIXED = {"score_func": ("softmax", "sigmoid"), "selector": ("top_k", "round_robin"), "norm_eps": (1e-20,)}
"""Values that differ from the identity, or are a choice."""


class TorchtitanRouter(Subject):
    """TokenChoiceTopKRouter of torchtitan.models.common.moe."""

    def supports(self, spec: RouterSpec, layout: ShardLayout | None = None) -> str | None:
        if layout is not None:
            return "torchtitan's router has no layout"
        values = {each.name: getattr(spec, each.name) for each in dataclasses.fields(spec)}
        if not spec.route_norm:
            values |= {"norm_eps": 1e-20, "norm_form": "add_eps", "norm_p": 1.0}
        values |= {} if spec.selector == "sparsemixer" else {"mixer_eps": 0.01}
        values |= {} if spec.num_null_experts else {"null_kind": "identity"}
        return why_not(values)

    def route(self, logits_TE: np.ndarray, spec: RouterSpec, expert_bias_E: np.ndarray | None) -> Routing:
        tokens_TE = to_torch(logits_TE)
        fields = tuple((name, getattr(spec, name)) for name in (*FREE, "selector"))
        router = build_for_logits(fields, tokens_TE.dtype)
        bias_E = None if expert_bias_E is None else to_torch(expert_bias_E)
        with torch.no_grad(), no_autocast_warning():
            weights_1TK, ids_1TK, scores_1TE = router(tokens_TE[None], bias_E)
        return Routing(
            expert_ids_TK=to_numpy(ids_1TK[0]), weights_TK=to_numpy(weights_1TK[0]), scores_TE=to_numpy(scores_1TE[0])
        )

    def gate(self, x_TD: np.ndarray, gate_ED: np.ndarray, gate_bias_E: np.ndarray | None) -> np.ndarray:
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

    def configure(self, fields: dict[str, Any]) -> None:
        """Config, router and a forward pass of two tokens, which is where it looks at the groups."""
        if why := why_not({name: value for name, value in fields.items() if name not in FREE}):
            raise Unsupported(why)
        dim = 4
        router = build({"num_experts": 8, "top_k": 1} | fields, dim)
        with torch.no_grad(), no_autocast_warning():
            router.gate.weight.zero_()
            router(torch.zeros(1, 2, dim), None)


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
def build_for_logits(fields: tuple, dtype: torch.dtype):
    """A router that takes logits: its gate is an identity. Its parameters have the dtype of the logits."""
    values = dict(fields)
    router = build(values, values["num_experts"]).to(dtype)
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
