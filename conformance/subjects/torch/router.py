"""conformance, subject torch: the router of moe_torch."""

from typing import Any, Unpack

import numpy as np
import torch

from conformance.core.inputs import RouteInputs, split_inputs
from conformance.core.subject import Routing, Subject
from conformance.subjects.torch.arrays import device, numpy_if_any, tensor, tensor_if_any, to_inputs, to_numpy
from moe_ref import RouterSpec
from moe_torch.router import Gate, NodeLimitedRouter
from moe_torch.routing import route


class TorchRouter(Subject):
    """The function that routes logits, and the module of the router."""

    def route(
        self, logits_TE: np.ndarray, spec: RouterSpec, expert_bias_E: np.ndarray | None, **inputs: Unpack[RouteInputs]
    ) -> Routing:
        """Route without gradients; the seed becomes a generator."""
        own, rest = split_inputs(inputs, RouteInputs)
        with torch.no_grad():
            found = route(
                tensor(logits_TE),
                spec,
                expert_bias_E=tensor_if_any(expert_bias_E),
                learned_scale=tensor_if_any(rest.get("learned_scale")),
                inputs=to_inputs(own),
                token_mask_T=tensor_if_any(rest.get("token_mask_T")),
            )
        return Routing(
            expert_ids_TK=to_numpy(found.expert_ids_TK),
            weights_TK=to_numpy(found.weights_TK),
            scores_TE=numpy_if_any(found.scores_TE),
            group_ids_TL=numpy_if_any(found.group_ids_TL),
            shared_weights_TS=numpy_if_any(found.shared_weights_TS),
        )

    def gate(self, x_TD: np.ndarray, gate_ED: np.ndarray, gate_bias_E: np.ndarray | None) -> np.ndarray:
        """The logits of the router's own gate module."""
        gate = Gate(gate_ED.shape[1], gate_ED.shape[0], bias=gate_bias_E is not None)
        gate.weight = torch.nn.Parameter(tensor(gate_ED))
        if gate_bias_E is not None:
            gate.bias = torch.nn.Parameter(tensor(gate_bias_E))
        with torch.no_grad():
            return to_numpy(gate(tensor(x_TD)))

    def configure(self, fields: dict[str, Any]) -> None:
        """The module is built, with a small gate."""
        NodeLimitedRouter(4, RouterSpec.from_dict(fields), device=device())
