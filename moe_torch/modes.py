"""moe_torch, modes: which of PyTorch's transforms is at work, and whether a value may be looked at."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work, which an operator with one derivative cannot follow."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def host_reads_are_free(values: Tensor) -> bool:
    """Whether a branch on a value costs nothing: not in a compiled graph, not on an accelerator, and vmap has none."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()
