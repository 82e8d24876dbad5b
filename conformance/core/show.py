"""conformance, showing numbers: on one line, shortened, the same way on every page."""

import numpy as np

MOST_NUMBERS = 12
"""Of a row that is shown as what was expected or received."""
MOST_CHARACTERS = 400


def shown(values) -> str:
    """A row of numbers, its first ones."""
    flat = np.ravel(values)
    numbers = " ".join(f"{v:.6g}" for v in flat[:MOST_NUMBERS])
    return f"[{numbers}{' ...' if len(flat) > MOST_NUMBERS else ''}]"


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
