"""conformance, holding: an array that a subject returned against the wanted one, row by row."""

from collections.abc import Callable
from typing import Any

import numpy as np

from conformance.core.judge import Violation, accuse
from conformance.core.show import shown_apart


def array_from(value: object, title: str, *, expected: object = "an array of numbers", **blame: Any) -> np.ndarray:
    """What a subject returned, as an array.

    Args:
        blame: the requirement and the case of the violation, as `Violation` takes them.

    Raises:
        Violation: it is not of numbers, or NumPy does not read it: a tensor that has a gradient, or is on a device.
    """
    try:
        found = np.asarray(value)
        if found.dtype.kind not in "biuf":
            found.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        said = f"{type(value).__name__}: {error}".splitlines()[0][:200]
        raise Violation(title, expected=expected, received=said, **blame) from None
    return found


def hold(
    title: str,
    found: np.ndarray,
    wanted: np.ndarray,
    radius: np.ndarray | float = 0.0,
    *,
    rows: np.ndarray | None = None,
    label: Callable[[int], str] | None = None,
    name: str = "",
) -> None:
    """Every number is within its radius of the wanted one; the first row with another number is accused.

    Args:
        title: what is wrong with such a row.
        found, wanted, radius: of shapes that broadcast. NaN is never within a radius; with 0 the numbers are equal.
        rows: bools, the rows that are judged; None: all of them.
        label: what a row is; None: a token.
        name: of the array, printed before the numbers.

    Raises:
        Violation: of the check that runs.
    """
    found, wanted, radius = (np.atleast_1d(each) for each in (found, wanted, radius))
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(found - wanted) <= radius)
    wrong_R = wrong.any(axis=tuple(range(1, wrong.ndim)))
    for row in np.flatnonzero(wrong_R if rows is None else wrong_R & rows).tolist():
        rows_apart = shown_apart(wanted[row % len(wanted)], found[row % len(found)], wrong[row])
        expected, received = (f"{name} {numbers}".lstrip() for numbers in rows_apart)
        where = {"token": row} if label is None else {}
        accuse(title if label is None else f"{title}: {label(row)}", expected=expected, received=received, **where)
