"""conformance, rounding: how coarse each dtype is, and when two numbers are the same but for it."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from moe_ref.specs.checks import nearest, one_of, require

# The distance of 1 to the next number: one rounding is half of it. TF32 is what tensor cores make of float32 operands:
# the bits past the tenth are left off, which is up to twice as far away as rounding them would be.
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "tf32": 2.0**-9, "float16": 2.0**-10, "bfloat16": 2.0**-7}
TINY = {"float64": 2.0**-1020, "float32": 2.0**-124, "tf32": 2.0**-124, "float16": 2.0**-12, "bfloat16": 2.0**-124}
"""Below this a number is subnormal or flushed to 0, and has no relative accuracy."""
ARRAYS = tuple(name for name in EPSILON if name != "tf32")
"""dtypes that an array can have; the others are of products alone."""


def equal(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Bools: which numbers are the same ones; NaN is equal to NaN."""
    return (one == other) | (np.isnan(one) & np.isnan(other))


def close(found, expected, relative_error, floor) -> np.ndarray:
    """Entry by entry: |found - expected| <= relative_error * |expected| + floor. NaN and inf are never close."""
    with np.errstate(invalid="ignore"):
        return np.abs(found - expected) <= relative_error * np.abs(expected) + floor


# stages of a router that are coarser than the rest of it

PACKED = "packed_index"
"""float32 whose lowest bits of mantissa are the number of the expert, as kernels do that sort one word."""
COARSE = {
    "scores": ("bfloat16", PACKED),
    "bias": ("bfloat16", "float16"),
    "selection": ("bfloat16", PACKED),
    "weights": ("bfloat16",),
}
"""What of a router can be coarse by itself, and how: the scores, expert_bias, what is ranked, the weights.

float16 is no class of scores, or of what is made of them: those that it flushes to 0 have no bound.
"""


class Precision(str):
    """The dtype in which a subject computes, with those stages of its router that are coarser.

    It is what `compute_dtype` of a subject can be: `Precision("float32", scores="bfloat16")`. The judge then grants one
    rounding of that stage, and what follows from it: no more.

    Raises:
        ValueError: an unknown stage or dtype.
    """

    stages: dict[str, str]

    def __new__(cls, dtype: str = "float32", **stages: str) -> "Precision":
        one_of("dtype", dtype, tuple(EPSILON))
        for stage, coarse in stages.items():
            require(stage in COARSE, f"stage is {stage!r}; it is one of {', '.join(COARSE)}{nearest(stage, COARSE)}")
            one_of(stage, coarse, COARSE[stage])
        found = super().__new__(cls, dtype)
        found.stages = stages
        return found

    @property
    def words(self) -> str:
        """float32, scores in bfloat16"""
        return ", ".join([str.__str__(self), *(f"{stage} in {dtype}" for stage, dtype in self.stages.items())])

    def __reduce__(self) -> Any:
        return _made, (str.__str__(self), self.stages)


def _made(dtype: str, stages: dict[str, str]) -> Precision:
    return Precision(dtype, **stages)


def coarse_dtype(dtype: str, stage: str) -> str | None:
    """The coarser dtype of a stage, where a Precision has one."""
    return dtype.stages.get(stage) if isinstance(dtype, Precision) else None


def coarse(dtype: str, stage: str, num_choices: int) -> float:
    """Relative error that the coarser dtype of a stage adds; 0 where it has none."""
    found = coarse_dtype(dtype, stage)
    if found is None:
        return 0.0
    return EPSILON["float32"] * 2 ** index_bits(num_choices) if found == PACKED else EPSILON[found] / 2


def index_bits(num_choices: int) -> int:
    """Bits that the number of an expert takes."""
    return max(num_choices - 1, 0).bit_length()


def rounded_to(values: np.ndarray, dtype: str, *, to: DTypeLike = np.float64) -> np.ndarray:
    """The nearest numbers of a dtype; of packed_index, float32 with the number of the last axis in its lowest bits.

    Of two that are equal but for these bits the one of the lower number is larger.
    """
    if dtype != PACKED and dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return np.asarray(values).astype(dtype).astype(to)
    single = np.ascontiguousarray(values, dtype=np.float32)
    bits = single.view(np.uint32)
    if dtype == "bfloat16":
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    else:
        mask = np.uint32(2 ** index_bits(single.shape[-1]) - 1)
        number = np.arange(single.shape[-1], dtype=np.uint32)
        # A negative number is smaller the larger its mantissa is.
        rounded = (bits & ~mask) | np.where(single < 0, number, mask - number)
    return np.where(np.isfinite(single), rounded.view(np.float32), single).astype(to).reshape(np.shape(values))
