"""moe_torch, kernels: Triton launches on the current device, which need not be that of the tensors."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def on_its_device(operator: Callable) -> Callable:
    """The body of a custom operator, run with the device of its first tensor as the current one."""

    @wraps(operator)
    def run(first: torch.Tensor, *others: Any) -> Any:
        with torch.cuda.device_of(first):
            return operator(first, *others)

    return run
