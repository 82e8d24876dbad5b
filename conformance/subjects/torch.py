"""conformance, subject torch: moe_torch on the CPU, in eager mode."""

import numpy as np
import torch

from conformance.subject import Routing, Subject
from moe_ref import RouterSpec
from moe_torch.router import Gate, NodeLimitedRouter, route


class Torch(Subject):
    """`moe_torch.router`: the function that routes logits, and the module for its gate and its configuration."""

    name = "torch"
    version = torch.__version__
    url = "https://github.com/pytorch/pytorch"
    logit_dtypes = ("float32", "float64", "bfloat16")

    def __init__(self):
        torch.set_num_threads(1)  # a call on a few tokens is too small to share

    def route(
        self,
        logits_TE,
        spec,
        expert_bias_E,
        *,
        learned_scale=None,
        token_ids_T=None,
        table_VK=None,
        given_ids_TK=None,
        token_mask_T=None,
        seed=0,
        **inputs,
    ):
        """Route without gradients; the seed becomes a generator."""
        with torch.no_grad():
            found = route(
                _tensor(logits_TE),
                spec,
                expert_bias_E=_maybe(expert_bias_E),
                learned_scale=_maybe(learned_scale),
                token_ids_T=_maybe(token_ids_T),
                table_VK=_maybe(table_VK),
                given_ids_TK=_maybe(given_ids_TK),
                token_mask_T=_maybe(token_mask_T),
                generator=torch.Generator().manual_seed(seed),
            )
        return Routing(
            expert_ids_TK=found.expert_ids_TK.numpy(),
            weights_TK=found.weights_TK.numpy(),
            scores_TE=_numpy(found.scores_TE),
            group_ids_TL=_numpy(found.group_ids_TL),
            shared_weights_TS=_numpy(found.shared_weights_TS),
        )

    def gate(self, x_TD, gate_ED, gate_bias_E):
        """The logits of the router's own gate module."""
        gate = Gate(gate_ED.shape[1], gate_ED.shape[0], bias=gate_bias_E is not None)
        gate.weight = torch.nn.Parameter(_tensor(gate_ED))
        if gate_bias_E is not None:
            gate.bias = torch.nn.Parameter(_tensor(gate_bias_E))
        with torch.no_grad():
            return gate(_tensor(x_TD)).numpy()

    def configure(self, fields):
        """The module is built, with a small gate."""
        NodeLimitedRouter(4, RouterSpec.from_dict(fields))


def _tensor(array) -> torch.Tensor:
    """A tensor of the same dtype, with its own memory; bfloat16 arrives as ml_dtypes arrays, unknown to torch."""
    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _maybe(array) -> torch.Tensor | None:
    return None if array is None else _tensor(array)


def _numpy(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.numpy()
