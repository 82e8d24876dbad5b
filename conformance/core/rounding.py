"""conformance, rounding: how coarse each dtype is, and when two numbers are the same but for it."""

import numpy as np

# The distance of 1 to the next number: one rounding is half of it. TF32 is what tensor cores make of float32 operands:
# the bits past the tenth are left off, which is up to twice as far away as rounding them would be.
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "tf32": 2.0**-9, "float16": 2.0**-10, "bfloat16": 2.0**-7}
TINY = {"float64": 2.0**-1020, "float32": 2.0**-124, "tf32": 2.0**-124, "float16": 2.0**-12, "bfloat16": 2.0**-124}
"""Below this a number is subnormal or flushed to 0, and has no relative accuracy."""
ARRAYS = tuple(name for name in EPSILON if name != "tf32")
"""dtypes that an array can have; the others are of products alone."""


def close(found, expected, relative_error, floor) -> np.ndarray:
    """Entry by entry: |found - expected| <= relative_error * |expected| + floor. NaN and inf are never close."""
    with np.errstate(invalid="ignore"):
        return np.abs(found - expected) <= relative_error * np.abs(expected) + floor
