"""moe_torch, the latent: a width of the routed experts' own, before and after them.

Legend: T tokens, D model dim, H latent dim.
"""

import torch
from torch import Tensor, nn

from moe_ref.specs.layer import LatentSpec
from moe_torch.parts import Linear, OverRanks


class RMSNorm(OverRanks, nn.Module):
    """Rows over the root of the mean of their squares, with eps inside the root, times a learned scale.

    Computed in float32 at least, and returned in the dtype of the rows.
    """

    def __init__(self, dim: int, eps: float, *, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A scale of 1."""
        self.to_fill(self.weight)[0].fill_(1)

    def forward(self, rows: Tensor) -> Tensor:
        wide, weight = rows.to(torch.promote_types(rows.dtype, torch.float32)), self.own("weight")
        assert weight is not None
        root = (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (wide * root * weight).to(rows.dtype)


class Latent(nn.Module):
    """up(norm(sum of weight * expert(down(x)))): what stands around the routed experts."""

    norm: RMSNorm | None

    def __init__(self, dim: int, spec: LatentSpec, *, device=None, dtype=None):
        super().__init__()
        self.down = Linear(dim, spec.dim, bias=False, device=device, dtype=dtype)
        self.norm = None if spec.norm_eps is None else RMSNorm(spec.dim, spec.norm_eps, device=device, dtype=dtype)
        self.up = Linear(spec.dim, dim, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """The maps as nn.Linear, the scale 1."""
        for module in (self.down, self.norm, self.up):
            if module is not None:
                module.reset_parameters()

    def expand(self, combined_TH: Tensor) -> Tensor:
        """The routed output, of the weighted sum of the experts."""
        return self.up(combined_TH if self.norm is None else self.norm(combined_TH))
