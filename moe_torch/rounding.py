"""moe_torch, rounding: numbers as the dtype of a router holds them (`RouterSpec.router_dtype`)."""

import torch
from torch import Tensor

from moe_ref.specs.router import RouterSpec

NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def round_to(values: Tensor, router_dtype: str) -> Tensor:
    """The nearest numbers of a narrow dtype, in the dtype of `values`; the gradient passes as it is. [SCR-11]"""
    if router_dtype not in NARROW:
        return values
    fixed = values.detach()
    # A cast alone would round the gradient too. The difference is exact: the two numbers are neighbours.
    shift = fixed.to(NARROW[router_dtype]).to(values.dtype) - fixed
    return values + torch.where(torch.isfinite(fixed), shift, 0)


def dtype_of_router(spec: RouterSpec, dtype: torch.dtype) -> torch.dtype:
    """What gate and router compute in, for inputs of this dtype: float32 at least, and as the spec says. [SCR-12]"""
    least = torch.float64 if spec.router_dtype == "float64" else torch.float32
    return torch.promote_types(dtype, least)
