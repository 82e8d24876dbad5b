"""moe_ref, input checks: every ValueError names the field, the value and the bound."""

from difflib import get_close_matches

import numpy as np


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def nearest(name: str, valid) -> str:
    """A hint such as ' (did you mean top_k?)', or the valid names where none is near."""
    valid = sorted(map(str, valid))
    close = get_close_matches(str(name), valid, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else f" (valid: {', '.join(valid)})"


def one_of(field: str, value, valid) -> None:
    """The value is one of the valid names."""
    # Specs and layouts are made by the thousand: the nearest name is looked for where it is shown.
    if not (isinstance(value, str) and value in valid):
        raise ValueError(f"{field} is {value!r}, not one of {sorted(valid)}{nearest(value, valid)}")


def integer(field: str, value, low: int, high: int | None = None, *, why: str = "") -> None:
    """The value is an int in [low, high]."""
    bound = f"at least {low}" if high is None else f"between {low} and {high}"
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    require(
        is_int and bool(value >= low) and (high is None or bool(value <= high)),
        f"{field} is {value!r}; it is an integer {bound}{why and f' ({why})'}",
    )


def number(field: str, value, *, low: float = -np.inf, above: float = -np.inf) -> None:
    """The value is a finite number, at least `low` and greater than `above`."""
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    bound = f" greater than {above}" if above > -np.inf else f" of at least {low}" if low > -np.inf else ""
    require(
        is_number and bool(np.isfinite(value)) and bool(value >= low) and bool(value > above),
        f"{field} is {value!r}; it is a finite number{bound}",
    )


def array(field: str, value, shape: tuple[int | None, ...], *, kind: str = "float") -> np.ndarray:
    """`value` as an array of the wanted shape (None matches any length) and kind (float, int, bool)."""
    found = np.asarray(value)
    kinds = {"float": "f", "int": "iu", "bool": "b"}[kind]
    # ml_dtypes (bfloat16, float8) report kind 'V' but convert to float like any float.
    low_precision = kind == "float" and found.dtype.kind == "V" and found.dtype.names is None
    require(found.dtype.kind in kinds or low_precision, f"{field} has dtype {found.dtype}; it is {kind}")
    wanted = ", ".join("any" if n is None else str(n) for n in shape)
    require(
        found.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, found.shape, strict=True)),
        f"{field} has shape {found.shape}; it is ({wanted})",
    )
    return found


def entries(field: str, value: np.ndarray, holds: np.ndarray, fact: str) -> None:
    """Every entry, or row, of `value` for which `holds` has an entry does; the first that does not is named."""
    if not holds.all():
        where = tuple(int(i) for i in np.argwhere(~holds)[0])
        raise ValueError(f"{field}{list(where)} is {value[where].tolist()}; {fact}")
