"""moe_ref, input checks: every ValueError names the field, the value and the bound."""

import re
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from math import isfinite
from typing import Any

import numpy as np

LARGEST = 2**63 - 1
"""The largest integer that arrays hold."""
NUMPY_KINDS = {"f": "float", "i": "int", "u": "int", "b": "bool"}
"""NumPy's letter of a dtype -> its kind."""


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint such as ' (did you mean top_k?)', or the valid names where none is near."""
    valid = sorted(map(str, valid))
    close = get_close_matches(str(name), valid, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else f" (valid: {', '.join(valid)})"


def in_words_of(names: Mapping[str, str], message: str) -> str:
    """A message about our fields as one about another's names for them (field -> name)."""
    for field, name in sorted(names.items(), key=lambda pair: -len(pair[0])):
        if field != name:
            # Not inside a word, a quoted value, or a name with dots.
            message = re.sub(rf"(?<![\w.'\"]){re.escape(field)}(?![\w(])", name, message)
    return message


def one_of(field: str, value: Any, valid: Collection[str]) -> None:
    """The value is one of the valid names."""
    # Specs and layouts are made by the thousand: the nearest name is looked for where it is shown.
    if not (isinstance(value, str) and value in valid):
        raise ValueError(f"{field} is {value!r}, not one of {sorted(valid)}{nearest(value, valid)}")


def only(spec: Any, when: str, **values: Any) -> None:
    """Fields of a spec have the one value that they can have `when`: "with selector 'top_p'"."""
    for field, value in values.items():
        found = getattr(spec, field)
        require(found == value, f"{field} is {found!r}; {when} it is {value!r}")


def integer(field: str, value: Any, low: int, high: int | None = None, *, why: str = "") -> None:
    """The value is an int in [low, high]."""
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if high is None and is_int and value > LARGEST:
        high = LARGEST
    if not (is_int and value >= low and (high is None or value <= high)):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{field} is {value!r}; it is an integer {bound}{why and f' ({why})'}")


def number(field: str, value: Any, *, low: float = -np.inf, above: float = -np.inf) -> None:
    """The value is a finite number, at least `low` and greater than `above`."""
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not (is_number and _fits_float64(value) and value >= low and value > above):
        bound = f" greater than {above}" if above > -np.inf else f" of at least {low}" if low > -np.inf else ""
        raise ValueError(f"{field} is {value!r}; it is a finite number{bound}")


def _fits_float64(value: Any) -> bool:
    try:
        return isfinite(float(value))
    except OverflowError:  # an integer beyond all floats
        return False


def one_axis(field: str, value: Any) -> tuple:
    """The entries of a tuple, a list or an array of one axis; NumPy's numbers as Python's."""
    array_of_one_axis = isinstance(value, np.ndarray) and value.ndim == 1
    require(array_of_one_axis or isinstance(value, (tuple, list)), f"{field} is {value!r}; it is a tuple")
    return tuple(entry.item() if isinstance(entry, np.generic) else entry for entry in value)


def array(field: str, value: Any, shape: tuple[int | None, ...], *, kind: str = "float") -> np.ndarray:
    """`value` as an array of the wanted shape (None matches any length) and kind (float, int, bool)."""
    found = np.asarray(value)
    shape_and_kind(field, found, shape, kind)
    return found


def shape_and_kind(field: str, value: Any, shape: tuple[int | None, ...], kind: str) -> None:
    """`value`, an array of NumPy, JAX (traced too) or torch, has that shape (None matches any length) and kind."""
    found = value if hasattr(value, "dtype") else np.asarray(value)
    if kind_of(found.dtype) != kind:
        raise ValueError(f"{field} has dtype {found.dtype}; it is {kind}")
    matches = len(found.shape) == len(shape) and all(
        n is None or n == m for n, m in zip(shape, found.shape, strict=True)
    )
    if not matches:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{field} has shape {tuple(found.shape)}; it is ({wanted})")


def kind_of(dtype: Any) -> str:
    """float, int or bool, of a dtype of any framework; other kinds have other names."""
    if found := NUMPY_KINDS.get(getattr(dtype, "kind", "")):  # before the name, which NumPy makes anew each time
        return found
    # torch's say torch.int64; ml_dtypes (bfloat16, float8) report kind 'V' but convert to float like any float.
    name = str(getattr(dtype, "name", dtype)).rpartition(".")[2]
    if name.startswith(("float", "bfloat")):
        return "float"
    return "int" if name.startswith(("int", "uint")) else name


def mask_array(token_mask_T: np.ndarray | None, num_tokens: int) -> np.ndarray:
    """The mask; all tokens are valid without one."""
    if token_mask_T is None:
        return np.ones(num_tokens, dtype=bool)
    return array("token_mask_T", token_mask_T, (num_tokens,), kind="bool")


def entries(field: str, value: np.ndarray, holds: np.ndarray, fact: str) -> None:
    """Every entry, or row, of `value` for which `holds` has an entry does; the first that does not is named."""
    if not holds.all():
        where = tuple(int(i) for i in np.argwhere(~holds)[0])
        raise ValueError(f"{field}{list(where)} is {value[where].tolist()}; {fact}")
