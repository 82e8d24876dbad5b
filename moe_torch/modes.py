"""moe_torch, modes: which of PyTorch's transforms is at work."""

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work, which an operator with one derivative cannot follow."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
