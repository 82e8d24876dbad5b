"""moe_torch, constant experts: null experts that mix what they see with a vector of their own (MoE++).

Legend: T tokens, K top_k, D model dim, Z constant experts.
"""

import torch
from torch import Tensor, nn

from moe_torch.parts import OverRanks


class ConstantExperts(OverRanks, nn.Module):
    """a1 * x + a2 * v with (a1, a2) = softmax(w x), of each of Z experts."""

    def __init__(self, num_experts: int, dim: int, *, device=None, dtype=None):
        super().__init__()
        self.num_experts = num_experts
        self.w_Z2D = nn.Parameter(torch.empty(num_experts, 2, dim, device=device, dtype=dtype))
        self.v_ZD = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """w has variance 1 / D, v variance 1."""
        for parameter, std in ((self.w_Z2D, self.w_Z2D.shape[-1] ** -0.5), (self.v_ZD, 1.0)):
            own, generator = self.to_fill(parameter)
            nn.init.normal_(own, std=std, generator=generator)

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, *, on_input: bool) -> Tensor:
        """The sum over a token's slots of weight * mixture, or of the mixture of weight * token.

        Args:
            expert_ids_TK: 0 to Z - 1; other slots add nothing.
        """
        w_Z2D, v_ZD = self.own("w_Z2D"), self.own("v_ZD")
        assert w_Z2D is not None
        assert v_ZD is not None
        output_TD = torch.zeros_like(x_TD)
        for z in range(self.num_experts):
            is_own_TK = expert_ids_TK == z
            weight_T1 = torch.where(is_own_TK, weights_TK, 0).sum(-1, keepdim=True).to(x_TD.dtype)
            seen_TD = weight_T1 * x_TD if on_input else x_TD
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            a_T2 = torch.softmax((seen_TD @ w_Z2D[z].t()).to(wide), -1).to(x_TD.dtype)
            mixed_TD = a_T2[:, :1] * seen_TD + a_T2[:, 1:] * v_ZD[z]
            mixed_TD = mixed_TD if on_input else weight_T1 * mixed_TD
            output_TD = output_TD + torch.where(is_own_TK.any(-1, keepdim=True), mixed_TD, 0)
        return output_TD
