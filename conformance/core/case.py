"""conformance, the case: one input of a subject, with an id, tags, and a JSON form that replays.

Each kind has a class of its own (`conformance/router/case.py` ...); this is what the core knows of all of them.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from typing import Any, ClassVar, ParamSpec, Self, TypeVar

import numpy as np

from conformance.core.rounding import Precision
from conformance.core.subject import Subject

P = ParamSpec("P")
R = TypeVar("R")

LARGE = 8.0
"""Larger numbers are hard to read."""


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """What a check is tried on. Arrays are float64 or int64; `dtype` says what the subject is given."""

    spec: Any
    inputs: dict = field(default_factory=dict)
    """Further inputs by name, where the case has them."""
    seed: int = 0
    """Of the draws that a requirement makes: permutations, constants, poison."""
    dtype: str = "float32"

    TAGS: ClassVar[Mapping[str, Callable[[Any], bool]]] = {}
    """name -> whether a case has it. Each is decided from the case alone, so that a replay decides alike."""
    KEYS: ClassVar[frozenset[str]] = frozenset()
    """Keys of its JSON form that no other kind has together; the kind with the most of them reads a file."""

    @cached_property
    def tags(self) -> frozenset[str]:
        """What is special about this case; deviations are declared by tags."""
        return frozenset(tag for tag, holds in self.TAGS.items() if holds(self))

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """T."""

    @property
    def valid_T(self) -> np.ndarray:
        """(T,) which tokens are not padding."""
        return self.inputs.get("token_mask_T", np.ones(self.num_tokens, dtype=bool))

    @property
    def place(self) -> str | None:
        """Names where the case runs, for kinds that count the different places; None for the others."""
        return None

    def part(self, kind: "type[Case]") -> "Case | None":
        """What of this case is one of a kind: itself, or a part of it, as the router of a layer is; or None."""
        return self if isinstance(self, kind) else None

    def rng(self) -> np.random.Generator:
        """The source of a requirement's draws."""
        return np.random.default_rng(self.seed)

    def with_(self, **changes) -> Self:
        """A copy with other values."""
        return replace(self, **changes)

    def with_inputs(self, **inputs) -> Self:
        """A copy with other further inputs; None takes one away."""
        merged = self.inputs | inputs
        return self.with_(inputs={name: value for name, value in merged.items() if value is not None})

    @abstractmethod
    def tokens(self, rows) -> Self:
        """The case of some of its tokens."""

    @abstractmethod
    def simpler(self) -> Iterator[Self]:
        """Simpler neighbours, the greatest simplification first; fewer tokens are tried before them."""

    @abstractmethod
    def why_not(self, subject: Subject, method: str) -> str | None:
        """None, or the subject's sentence that says why it cannot run this case with this method."""

    @abstractmethod
    def to_json(self) -> dict:
        """Plain data; -inf and NaN are strings, so that any JSON reader takes it."""

    @classmethod
    @abstractmethod
    def from_json(cls, data: dict) -> Self:
        """Reads what `to_json` wrote; an unknown or missing key is a ValueError."""

    @cached_property
    def digest(self) -> str:
        """Six hex digits that name the case."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:6]


def found_once(function: Callable[P, R]) -> Callable[P, R]:
    """What a function finds of a case, its first argument, and hashable others is kept with the case.

    An array is read-only.
    """

    @wraps(function)
    def found(*arguments: P.args, **named: P.kwargs) -> R:
        case, *others = arguments
        kept = vars(case).setdefault("_found", {})
        # A Precision is equal to the dtype without its coarse stages.
        keys = (each.words if isinstance(each, Precision) else each for each in others)
        key = (function, *keys, *named.items())
        if key not in kept:
            kept[key] = function(*arguments, **named)
            if isinstance(kept[key], np.ndarray):
                kept[key].flags.writeable = False
        return kept[key]

    return found


def plain(value):
    """Arrays as lists, and numbers that JSON has not as strings."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, np.ndarray):
        return [plain(entry) for entry in value] if value.ndim else plain(value.item())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value


def float32(values) -> np.ndarray:
    """What float32 holds exactly, in float64, so that subject and reference read the same numbers."""
    return np.asarray(values).astype(np.float32).astype(np.float64)


def rounder(values: np.ndarray) -> Iterator[np.ndarray]:
    """The values smaller, where they are large, and with fewer digits; only where that changes something."""
    largest = np.abs(values[np.isfinite(values)]).max(initial=0)
    if largest > LARGE:
        yield float32(values * (LARGE / 2 / largest))
    for step in (1.0, 0.5, 0.125):
        rounded = np.round(values / step) * step
        if not np.array_equal(rounded, values, equal_nan=True):
            yield rounded
