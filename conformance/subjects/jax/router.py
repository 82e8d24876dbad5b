"""conformance, subject jax: the router of moe_jax, compiled."""

from typing import Any, Unpack

import jax
import numpy as np

from conformance.core.inputs import RouteInputs, split_inputs
from conformance.core.subject import Routing, Subject
from conformance.subjects.jax.arrays import narrow, narrow_inputs, to_numpy
from moe_jax import routing
from moe_jax.rounding import dtype_of_router
from moe_ref import RouterSpec, ShardLayout

# The spec is static: one program for each spec and shape.
_route = jax.jit(routing.route, static_argnames="spec")
_gate = jax.jit(routing.gate)


class JaxRouter(Subject):
    """`moe_jax.routing`."""

    def supports(self, spec: RouterSpec, layout: ShardLayout | None = None) -> str | None:
        """A router of float64 where JAX has float64."""
        try:
            dtype_of_router(spec)
        except ValueError as error:
            return str(error)
        return None

    def route(
        self, logits_TE: np.ndarray, spec: RouterSpec, expert_bias_E: np.ndarray | None, **inputs: Unpack[RouteInputs]
    ) -> Routing:
        """Route on the default device; the seed becomes a key where the selector draws."""
        if expert_bias_E is None and spec.takes_bias:
            expert_bias_E = np.zeros(spec.num_choices, np.float32)  # one program less to compile
        own, rest = split_inputs(inputs, RouteInputs)
        found = _route(
            narrow(logits_TE),
            spec=spec,
            expert_bias_E=narrow(expert_bias_E),
            learned_scale=narrow(rest.get("learned_scale")),
            inputs=narrow_inputs(own, spec),
            token_mask_T=rest.get("token_mask_T"),
        )
        return Routing(
            expert_ids_TK=np.asarray(found.expert_ids_TK),
            weights_TK=np.asarray(found.weights_TK),
            scores_TE=to_numpy(found.scores_TE),
            group_ids_TL=to_numpy(found.group_ids_TL),
            shared_weights_TS=to_numpy(found.shared_weights_TS),
        )

    def gate(self, x_TD: np.ndarray, gate_ED: np.ndarray, gate_bias_E: np.ndarray | None) -> np.ndarray:
        """The logits, summed in float32."""
        return np.asarray(_gate(narrow(x_TD), narrow(gate_ED), narrow(gate_bias_E)))

    def configure(self, fields: dict[str, Any]) -> None:
        """moe_jax takes the reference's own RouterSpec."""
        RouterSpec.from_dict(fields)
