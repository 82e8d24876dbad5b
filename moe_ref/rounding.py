"""moe_ref, rounding: numbers as the dtype of a router holds them (`RouterSpec.router_dtype`).

float32 and float64 are wide: the specification computes in float64 and rounds nothing. bfloat16 and float16 are narrow:
what is handed from stage to stage is rounded to them, and each stage computes in float32 at least.
"""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from moe_ref.specs.checks import entries
from moe_ref.specs.router import RouterSpec

NARROW = {"bfloat16": (8, -126, float.fromhex("0x1.fep127")), "float16": (11, -14, 65504.0)}
"""dtype -> bits of its significand, exponent of its smallest normal number, its largest number."""


def round_to(values: np.ndarray, router_dtype: str) -> np.ndarray:
    """The nearest numbers of a narrow dtype, ties to even, in the dtype of `values`; wide dtypes change nothing.

    Raises:
        ValueError: a finite number is beyond the largest of the dtype.
    """
    if router_dtype not in NARROW:
        return values
    bits, least, largest = NARROW[router_dtype]
    finite = np.isfinite(values)
    wide = np.where(finite, values, 0).astype(np.float64)
    # A number is fraction * 2 ** exponent with a fraction of 1/2 at least; subnormals share the smallest exponent.
    quantum = np.exp2(np.maximum(np.frexp(wide)[1], least + 1) - float(bits))
    rounded = np.rint(wide / quantum) * quantum
    entries(f"values in {router_dtype}", wide, np.abs(rounded) <= largest, f"the largest number is {largest:g}")
    return np.where(finite, rounded, values).astype(values.dtype)


def dtype_of_router(spec: RouterSpec, dtype: DTypeLike) -> Any:
    """What gate and router compute in, beside a layer of this dtype: float64 where the spec says so."""
    return np.float64 if spec.router_dtype == "float64" else dtype
