"""moe_torch, the fused form: shared experts in slots of their own behind the routed ones (`moe_ref/specs/fused.py`).

Legend: T tokens, K top_k, S slots of shared experts, D model dim, E routed experts.
"""

from dataclasses import replace

import torch
from torch import Tensor

from moe_ref.specs.fused import fuse_params, fused_spec, fused_weight, num_fused
from moe_ref.specs.ids import UNUSED
from moe_ref.specs.inputs import NO_INPUTS, RouterInputs
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.params import LayerParams
from moe_torch.dispatcher import LocalTokenDispatcher
from moe_torch.experts import run_experts
from moe_torch.moe import MoE
from moe_torch.router import NodeLimitedRouter
from moe_torch.routing import Routing


def fuse_routing(
    expert_ids_TK: Tensor, weights_TK: Tensor, spec: LayerSpec, *, token_mask_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(T, K + S) ids and weights: E .. E+S-1 behind a token's own, with the weight of 1 / output_scale. [LAY-25]"""
    T, S = expert_ids_TK.shape[0], num_fused(spec)
    own_S = torch.arange(S, device=expert_ids_TK.device, dtype=expert_ids_TK.dtype) + spec.router.num_experts
    ids_TS, weights_TS = own_S.expand(T, S), weights_TK.new_full((T, S), fused_weight(spec))
    if token_mask_T is not None:
        ids_TS = ids_TS.masked_fill(~token_mask_T[:, None], UNUSED)
        weights_TS = weights_TS.masked_fill(~token_mask_T[:, None], 0)
    return torch.cat([expert_ids_TK, ids_TS], dim=1), torch.cat([weights_TK, weights_TS], dim=1)


class FusedMoE(torch.nn.Module):
    """A layer in its fused form: a router of E experts, and E + S experts in one grouped matmul. [LAY-25, LAY-26]

    Its counts and its balancing bias are those of the E routed experts. One rank; `moe_torch.parallel` takes `MoE`.

    Args:
        spec: of the layer with its shared experts beside it.

    Raises:
        ValueError: the layer has no fused form.
    """

    def __init__(self, spec: LayerSpec, *, device=None, dtype=None):
        super().__init__()
        self.spec = spec
        self.router = NodeLimitedRouter(
            spec.experts.dim, spec.router, gate_bias=spec.gate_bias, device=device, dtype=dtype
        )
        fused = MoE(fused_spec(spec), device=device, dtype=dtype)
        self.experts = fused.experts
        self.dispatcher = LocalTokenDispatcher(fused.spec.router.num_experts)
        self.output_scale = fused.spec.router.output_scale

    def forward(self, x: Tensor, token_mask: Tensor | None = None, *, inputs: RouterInputs = NO_INPUTS) -> Tensor:
        """The output, of the shape of x; arguments as in `MoE.forward`."""
        return self.forward_and_routing(x, token_mask, inputs=inputs)[0]

    def forward_and_routing(
        self, x: Tensor, token_mask: Tensor | None = None, *, inputs: RouterInputs = NO_INPUTS
    ) -> tuple[Tensor, Routing]:
        """The output, and what the router decided, of the E routed experts."""
        x_TD = x.reshape(-1, x.shape[-1])
        mask_T = None if token_mask is None else token_mask.reshape(-1)
        if mask_T is not None:
            x_TD = x_TD.masked_fill(~mask_T[:, None], 0)
        routing = self.router.route(x_TD, token_mask_T=mask_T, inputs=inputs)
        ids, weights = fuse_routing(routing.expert_ids_TK, routing.weights_TK, self.spec, token_mask_T=mask_T)
        output_TD = run_experts(
            self.experts, self.dispatcher, x_TD, self.dispatcher.permute(ids), weights, on_input=False
        )
        return (output_TD * self.output_scale).reshape(x.shape), routing

    @torch.no_grad()
    def load_params(self, params: LayerParams) -> None:
        """Takes over the parameters of moe_ref of the layer with its shared experts beside it."""
        alone = self.spec.replace(shared=None)
        whole, own = MoE(alone, dtype=torch.float64), MoE(fused_spec(self.spec), dtype=torch.float64)
        shared = ("shared_w_up_SDF", "shared_w_down_SFD", "shared_w_gate_SDF", "shared_token_gate_D")
        whole.load_params(replace(params, **dict.fromkeys(shared)))
        own.load_params(fuse_params(params, self.spec))
        self.router.load_state_dict(whole.router.state_dict())
        self.experts.load_state_dict(own.experts.state_dict())
