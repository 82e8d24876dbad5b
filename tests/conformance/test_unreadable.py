"""tests of the judge: what a subject returns and NumPy does not read is a violation, and no error of the judge."""

from functools import wraps

import numpy as np
import pytest

from conformance.core.judge import Judge
from conformance.core.trial import accuse
from conformance.run import kinds  # noqa: F401  (its chapters register)
from conformance.subjects.reference import Reference


class Held:
    """An array as a tensor that has a gradient: it is read when it is told to be, and not by NumPy."""

    def __init__(self, array):
        self.shape, self.dtype = array.shape, array.dtype

    def __array__(self, *arguments, **named):
        raise RuntimeError("it has a gradient")


def held(value):
    """The floats of what a method returns are of that kind."""
    if isinstance(value, np.ndarray):
        return Held(value) if value.dtype.kind == "f" else value
    if isinstance(value, dict):
        return {name: held(each) for name, each in value.items()}
    return [held(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("method", "requirement"),
    [
        ("gate", "GAT-1"), ("experts", "EXP-1"), ("combine", "CMB-1"), ("layer", "LAY-1"), ("layer_gradients", "BWD-1"),
        ("balance_loss", "LOD-5"), ("z_loss", "LOD-16"), ("bias_update", "LOD-19"), ("quantile_update", "LOD-40"),
        ("capacity", "CAP-1"), ("train", "STP-1"),
    ],
)  # fmt: skip
def test_what_numpy_does_not_read_is_a_violation(method, requirement):
    clean = getattr(Reference, method)

    @wraps(clean)
    def returns_held(self, *arguments, **inputs):
        return held(clean(self, *arguments, **inputs))

    subject = type("Unread", (Reference,), {method: returns_held})()
    found = accuse(Judge(subject), ids=[requirement], examples=1)
    assert "Held: it has a gradient" in found[requirement].received
