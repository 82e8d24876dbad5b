"""conformance, showing numbers: on one line, shortened, the same way on every page."""

import numpy as np

MOST_NUMBERS = 12
"""Of a row that is shown as what was expected or received."""
MOST_CHARACTERS = 400
"""Of a text that is shown in part."""
DIGITS, MORE_DIGITS = 6, 10
"""Of a number; more where two rows look alike with fewer."""


def shown(values: np.ndarray, digits: int = DIGITS) -> str:
    """A row of numbers, its first ones."""
    flat = np.ravel(values)
    numbers = " ".join(f"{v:.{digits}g}" for v in flat[:MOST_NUMBERS])
    return f"[{numbers}{' ...' if len(flat) > MOST_NUMBERS else ''}]"


def shown_apart(wanted: np.ndarray, found: np.ndarray, wrong: np.ndarray) -> tuple[str, str]:
    """Two rows of numbers, from the first one that a reader has to see, with as many digits as tell them apart.

    Args:
        wanted, found: two rows.
        wrong: bools, of the same shape: which numbers differ by too much.
    """
    wanted, found, wrong = (np.ravel(each) for each in np.broadcast_arrays(wanted, found, wrong))
    first = int(np.argmax(wrong)) if wrong.any() else 0
    start = first if first >= MOST_NUMBERS else 0
    at = f"from number {start} on " if start else ""
    for digits in (DIGITS, MORE_DIGITS):
        rows = [shown(each[start:], digits) for each in (wanted, found)]
        if rows[0] != rows[1]:
            break
    return f"{at}{rows[0]}", f"{at}{rows[1]}"


def numbers(values) -> str:
    """Numbers, rows of numbers, or anything else, all of it."""
    found = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(found, (list, tuple)):
        if found and isinstance(found[0], (list, tuple)):
            return " ".join(numbers(row) for row in found)
        return "[" + " ".join(numbers(each) for each in found) + "]"
    return f"{found:.6g}" if isinstance(found, float) else str(found)


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """The beginning of a long text."""
    return text if len(text) <= most else f"{text[:most]} ..."


def spec_fields(spec) -> str:
    """A spec by its fields that are not the default."""
    return " ".join(f"{name}={value}" for name, value in spec.to_dict().items())
