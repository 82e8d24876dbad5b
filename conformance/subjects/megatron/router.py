"""conformance, subject megatron: `TopKRouter` of megatron.core, which is its gate and `routing`, as they are."""

from typing import Any, Unpack

import numpy as np
import torch

from conformance.core.inputs import SelectorInputs
from conformance.core.subject import Routing, Subject, Unsupported
from conformance.subjects.megatron.module import (
    built_router,
    config_of,
    groups_of_one,
    replaying,
    routed,
    routed_ids,
    routers,
    set_bias,
)
from conformance.subjects.megatron.settings import DTYPES, GROUPS, SCALE, SIZES, router_entries
from conformance.subjects.torch.arrays import tensor as exact
from conformance.subjects.torch.arrays import to_numpy, to_torch
from moe_ref import RouterSpec, ShardLayout

LOW = -30.0
"""A sigmoid of it is 1e-13, in which 1e-20 is no digit of float32."""


class MegatronRouter(Subject):
    """A softmax over all or the selected, sigmoids, groups, a balancing bias, a scale, sinkhorn, quantiles, replay."""

    def supports(self, spec: RouterSpec, layout: ShardLayout | None = None) -> str | None:
        router_entries(spec)  # a ValueError is the sentence
        return None if layout is None else "Megatron's router has no layout"

    def route(
        self,
        logits_TE: np.ndarray,
        spec: RouterSpec,
        expert_bias_E: np.ndarray | None,
        **inputs: Unpack[SelectorInputs],
    ) -> Routing:
        """`routing`, which comes after its gate. Slots are in the order of the experts: its arrays are dense."""
        router = built_router(spec, expert_bias=expert_bias_E is not None)
        set_bias(router, expert_bias_E)
        logits_T1E = (exact(logits_TE) if spec.router_dtype == "float64" else to_torch(logits_TE))[:, None]
        given_TK = inputs.get("given_ids_TK")
        with torch.no_grad(), replaying(router, given_TK):
            probs_TE, map_TE = routed(router, logits_T1E)
        ids_TK, weights_TK = routed_ids(probs_TE, map_TE, spec.top_k)
        small_T = np.take_along_axis(logits_TE, ids_TK, axis=-1).max(axis=-1) < LOW
        if given_TK is not None and spec.score_func != "softmax" and spec.norm_eps == 0 and small_T.any():
            raise Unsupported("Megatron adds 1e-20 to the sum of the scores, beside which these are not large")
        if given_TK is not None and (np.sort(given_TK) == ids_TK).all():  # each in its slot
            ids_TK, weights_TK = given_TK, np.take_along_axis(to_numpy(probs_TE), given_TK, axis=-1)
        return Routing(expert_ids_TK=ids_TK, weights_TK=weights_TK)

    def gate(self, x_TD: np.ndarray, gate_ED: np.ndarray, gate_bias_E: np.ndarray | None) -> np.ndarray:
        """`gating`, in float32."""
        E, D = gate_ED.shape
        more = {"hidden_size": D, "add_bias_linear": gate_bias_E is not None}
        plain = RouterSpec(num_experts=E, top_k=1, score_func="sigmoid")
        router = built_router(plain, expert_bias=False, more=tuple(more.items()))
        with torch.no_grad():
            router.weight.copy_(to_torch(gate_ED))
            if gate_bias_E is not None:
                router.bias.copy_(to_torch(gate_bias_E))
            return to_numpy(router.gating(to_torch(x_TD)))

    def configure(self, fields: dict[str, Any]) -> None:
        """The config with all its validation, a router, and a run of two tokens."""
        values: dict[str, Any] = {"num_experts": 8, "top_k": 2, "score_func": "sigmoid"} | fields
        names = SIZES | GROUPS | SCALE | {"score_func": "moe_router_score_function"}
        own = {"route_norm": True, "norm_eps": 1e-20, "norm_form": "add_eps", "router_dtype": next(iter(DTYPES))}
        if unknown := [name for name in fields if name not in names and own.get(name) != fields[name]]:
            raise Unsupported(f"Megatron's normed sigmoids have another {', '.join(unknown)}")
        entries = {names[name]: value for name, value in values.items() if name in names}
        router = routers.TopKRouter(config=config_of(entries), pg_collection=groups_of_one())
        with torch.no_grad():
            router.routing(torch.zeros(2, 1, values["num_experts"]))
