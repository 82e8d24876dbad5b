"""moe_torch, parts: a module whose parameters may lie over ranks, asks here for what it computes with and how to start.

A whole module computes with its parameters as they are. `moe_torch.parallel` sets `part`, and this file needs none of
its imports.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Part(Protocol):
    """The part of a module's parameters that a rank has."""

    def own(self, name: str, parameter: Tensor) -> Tensor:
        """What this rank computes with, with the rule of its gradient."""
        ...

    def to_fill(self, parameter: Tensor) -> tuple[Tensor, torch.Generator | None]:
        """What this rank stores of a parameter, and where its random numbers come from; all ranks make this call.

        They are equal on ranks with equal parts, and others elsewhere.
        """
        ...


class OverRanks:
    """Mixed into a module: parameters are read through `own`."""

    part: Part | None = None

    def own(self, name: str) -> Tensor | None:
        """The parameter of this name as this rank computes with it; None where there is none."""
        parameter = getattr(self, name)
        return parameter if self.part is None or parameter is None else self.part.own(name, parameter)

    def to_fill(self, parameter: Tensor) -> tuple[Tensor, torch.Generator | None]:
        """What `reset_parameters` fills, and its random numbers; None: those of the process."""
        return (parameter, None) if self.part is None else self.part.to_fill(parameter)


class Linear(OverRanks, nn.Linear):
    """nn.Linear, whose weight may be a DTensor while its input and output are plain."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As nn.Linear: all numbers are within 1 / sqrt(fan-in)."""
        if self.part is None:
            return super().reset_parameters()
        bound = self.in_features**-0.5
        for parameter in self.parameters():
            own, generator = self.to_fill(parameter)
            own.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # nn.Linear calls it by the name of a builtin
        weight = self.own("weight")
        assert weight is not None
        return F.linear(x, weight, self.own("bias"))
