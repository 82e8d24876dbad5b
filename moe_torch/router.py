"""moe_torch, the router: a gate, a balancing bias, and `routing.route` with a fixed spec, as modules."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_ref.specs.inputs import NO_INPUTS, RouterInputs
from moe_ref.specs.router import RouterSpec
from moe_torch.parts import Linear, OverRanks
from moe_torch.rounding import dtype_of_router
from moe_torch.routing import Routing, route


class Gate(Linear):
    """The logits are x @ weight.T, plus the learned gate bias, in float32 at least. [GAT-1, GAT-2]"""

    least: torch.dtype = torch.float32
    """What it computes in at least: float64 for a router of that router_dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., num_logits) logits of (..., D) tokens."""
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), self.least)
        weight_ED, bias_E = (None if own is None else own.to(dtype) for own in (self.own("weight"), self.own("bias")))
        assert weight_ED is not None
        # Autocast would take the product back to bfloat16, which flips choices (NVIDIA-NeMo/Automodel#3650).
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), weight_ED, bias_E)


class NodeLimitedRouter(OverRanks, nn.Module):
    """A gate, a balancing bias, and `route` with a fixed spec.

    `expert_bias` stays float32 under .to(bfloat16): its steps of about 1e-3 vanish next to a bfloat16 bias of 0.5.

    Args:
        dim: D, of the tokens.
        spec: what is computed; `RouterSpec.from_dict` reads the names of other frameworks.
        gate_bias: whether the gate has a learned bias, part of the logits.
    """

    expert_bias: Tensor | None
    learned_scale: nn.Parameter | None

    def __init__(self, dim: int, spec: RouterSpec, *, gate_bias: bool = False, device=None, dtype=None):
        super().__init__()
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim is {dim!r}; it is an integer of at least 1")
        self.spec = spec
        self.gate = Gate(dim, spec.num_logits, bias=gate_bias, device=device, dtype=dtype)
        self.gate.least = dtype_of_router(spec, torch.float32)
        choices_E = torch.zeros(spec.num_choices, dtype=torch.float32, device=device)
        self.register_buffer("expert_bias", choices_E if spec.takes_bias else None)
        # A global scale is kept as (1,): FSDP2 shards no scalar parameter.
        sizes = {"none": None, "per_expert": spec.num_choices, "global": 1}[spec.learned_scale]
        self.learned_scale = None if sizes is None else nn.Parameter(torch.ones(sizes, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """The gate as nn.Linear, no balancing bias, learned scales of 1."""
        self.gate.reset_parameters()
        if self.expert_bias is not None:
            self.expert_bias.zero_()
        if self.learned_scale is not None:
            nn.init.ones_(self.learned_scale)

    def _apply(self, fn, recurse=True):
        before_E = self.expert_bias
        super()._apply(fn, recurse)
        if before_E is not None and self.expert_bias is not None and self.expert_bias.dtype != torch.float32:
            # From the value before the cast: what bfloat16 rounded away does not come back.
            self.expert_bias = before_E.to(self.expert_bias.device)
        if before_E is not None and self.expert_bias is not None and before_E.is_meta and not self.expert_bias.is_meta:
            # to_empty leaves what the memory held (NVIDIA/Megatron-LM#4154).
            self.expert_bias.zero_()
        return self

    def route(
        self,
        x_TD: Tensor,
        *,
        token_mask_T: Tensor | None = None,
        inputs: RouterInputs = NO_INPUTS,
        router_spec: RouterSpec | None = None,
    ) -> Routing:
        """Everything that `route` knows about (T, D) tokens.

        Args:
            x_TD: (T, D) tokens.
            token_mask_T, inputs: as in `route`.
            router_spec: in place of the router's own, for this call: to replay a choice (`RouterSpec.given`).
        """
        spec = self.spec if router_spec is None else router_spec
        scale = self.own("learned_scale")
        if scale is not None and spec.learned_scale == "global":
            scale = scale[0]
        bias_E = self.expert_bias if spec.takes_bias else None
        return route(
            self.gate(x_TD), spec, expert_bias_E=bias_E, learned_scale=scale, inputs=inputs, token_mask_T=token_mask_T
        )

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weights (..., K), expert ids (..., K) and scores (..., E) of tokens (..., D).

        token_mask (...) is False where a token is padding: its ids are -1, its weights 0.
        """
        lead = x.shape[:-1]
        mask_T = None if token_mask is None else token_mask.flatten()
        found = self.route(x.reshape(-1, x.shape[-1]), token_mask_T=mask_T)
        scores = None if found.scores_TE is None else found.scores_TE.reshape(*lead, self.spec.num_choices)
        K = self.spec.top_k
        return found.weights_TK.reshape(*lead, K), found.expert_ids_TK.reshape(*lead, K), scores
