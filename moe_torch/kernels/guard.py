"""moe_torch, kernels: an operator launches on the device of its tensors, whichever is the current one.

Triton launches on the current device and its stream. PyTorch's own operators go where their tensors are; an operator in
Python has to see to that itself.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def on_its_device(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator, within whose body the device of its first tensor is the current one."""

    @wraps(operator)
    def guarded(first, *rest):
        with torch.cuda.device_of(first):  # nothing, for a tensor elsewhere than on CUDA
            return operator(first, *rest)

    return guarded
