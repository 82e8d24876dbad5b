"""conformance, the picture: what a failure shows besides its text, as plain data that any view can draw.

A kind makes the panels of its failures (`Kind.picture`); the report keeps them, and `run/` draws them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np

from conformance.core.case import Case, plain
from conformance.core.judge import Judge, NotRun, Violation
from conformance.core.rounding import equal

R = TypeVar("R")
C = TypeVar("C", bound=Case)

MOST_COLUMNS = 96
"""Of a panel; of more than these the ones that matter are shown."""
APART = 1e-3
"""The part of the larger of two numbers by which a reader sees them differ."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One figure: a title, and a sentence that says what is seen."""

    title: str
    note: str = ""

    def to_json(self) -> dict:
        """Plain data with the name of its form."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {"form": type(self).__name__.lower()} | {name: _listed(value) for name, value in found.items()}


def _listed(value):
    """Tuples as lists, and numbers that JSON has not as strings."""
    return [_listed(each) for each in value] if isinstance(value, tuple) else plain(value)


@dataclass(frozen=True, kw_only=True)
class Bars(Panel):
    """A number for each column, of the reference and of the subject; a column may lie in a group."""

    columns: tuple[str, ...]
    wanted: tuple[float, ...]
    """Of the reference."""
    found: tuple[float, ...] = ()
    """Of the subject; empty where it shows none."""
    wrong: tuple[int, ...] = ()
    """Columns on which the two differ."""
    groups: tuple[int, ...] = ()
    """The group of each column, in ascending order; empty where there are none."""
    kept: tuple[int, ...] = ()
    """Groups that the reference keeps."""
    kept_found: tuple[int, ...] | None = None
    """Groups that the subject keeps; None where it does not show them."""
    chosen: tuple[int, ...] = ()
    """Columns that the reference chooses."""
    chosen_found: tuple[int, ...] | None = None
    """Columns that the subject chooses; None where it returned nothing that can be shown."""
    choosing: bool = False
    """Whether columns are chosen at all."""


@dataclass(frozen=True, kw_only=True)
class Grid(Panel):
    """A number for each pair of a row and a column, of the reference and of the subject."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    wanted: tuple[tuple[float, ...], ...]
    found: tuple[tuple[float, ...], ...] = ()
    wrong: tuple[tuple[int, ...], ...] = ()
    """(row, column) of cells on which the two differ."""
    of_rows: str = ""
    """What a row is."""
    of_columns: str = ""


def panels_of(picture: Sequence[Panel]) -> list[dict]:
    """A picture as plain data."""
    return [panel.to_json() for panel in picture]


def asked(judge: Judge | None, call: Callable[[Judge, C], R], case: C) -> R | None:
    """What a subject returns for a case; None where it is not called, or returns nothing that can be shown."""
    try:
        return None if judge is None else call(judge, case)
    except (NotRun, Violation):
        return None


def differing(wanted: np.ndarray, found: np.ndarray, part: float = APART) -> np.ndarray:
    """Bools: where two numbers differ by more than a part of the larger one, or one alone is a number."""
    with np.errstate(all="ignore"):
        near = np.abs(found - wanted) <= part * np.maximum(np.abs(found), np.abs(wanted))
    return ~(near | equal(found, wanted))


def distance(wanted: np.ndarray, found: np.ndarray) -> float:
    """The largest difference of two arrays, as a part of the largest number wanted; 0 where a reader sees none.

    Infinite where one alone is a number.
    """
    wanted, found = np.asarray(wanted, np.float64), np.asarray(found, np.float64)
    with np.errstate(all="ignore"):
        apart = np.where(equal(found, wanted), 0, np.abs(found - wanted))
    largest = max(float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0)), float(np.finfo(np.float32).tiny))
    part = float(np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max(initial=0)) / largest
    return part if part > APART else 0.0


NOTE_OF_DISTANCES = f"The largest difference, as a part of the largest number; below {APART:g} it is shown as 0."


def bars(title: str, columns: Sequence[str], wanted: np.ndarray, found: np.ndarray | None, **more) -> Bars:
    """Bars of two rows of numbers; what differs is marked."""
    wrong = () if found is None else tuple(np.flatnonzero(differing(wanted, found)).tolist())
    shown = () if found is None else tuple(found.tolist())
    return Bars(title=title, columns=tuple(columns), wanted=tuple(wanted.tolist()), found=shown, wrong=wrong, **more)


def grid(
    title: str, rows: Sequence[str], columns: Sequence[str], wanted: np.ndarray, found: np.ndarray | None, **more
) -> Grid:
    """A grid of two tables of numbers; what differs is marked."""
    wrong = () if found is None else tuple(map(tuple, np.argwhere(differing(wanted, found)).tolist()))
    return Grid(
        title=title,
        rows=tuple(rows),
        columns=tuple(columns),
        wanted=tuple(map(tuple, wanted.tolist())),
        found=() if found is None else tuple(map(tuple, found.tolist())),
        wrong=wrong,
        **more,
    )
