"""moe_ref, what every spec shares: reading, writing, and a changed copy.

A spec says *what* is computed, never how: frozen, validated data.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar, Self

import numpy as np

from moe_ref.specs.checks import LARGEST, nearest, require


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What the specs share: reading, writing, and a changed copy."""

    ALIASES: ClassVar[Mapping[str, str]] = {}
    """Names of other frameworks -> the field."""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.generic):  # a spec is plain data
                value = value.item()
            if isinstance(value, int) and abs(value) > LARGEST and field.type in ("float", float, "float | None"):
                with suppress(OverflowError):  # which its check then refuses
                    value = float(value)
            object.__setattr__(self, field.name, value)

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        """A spec from the names of its fields, or their aliases; an unknown name is a ValueError."""
        own = {field.name for field in fields(cls)}
        found = {}
        for name, value in values.items():
            field = name if name in own else cls.ALIASES.get(name, name)
            if field not in own:
                raise ValueError(f"unknown field {name!r} of {cls.__name__}{nearest(name, own | cls.ALIASES.keys())}")
            require(field not in found, f"field {field} is given twice (once as {name!r})")
            found[field] = value
        missing = {field.name for field in fields(cls) if field.default is MISSING} - found.keys()
        require(not missing, f"{cls.__name__} needs {', '.join(sorted(missing))}")
        return cls(**found)

    def to_dict(self) -> dict:
        """The fields that differ from their default, JSON-ready; `from_dict` reads it back."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, validated again."""
        return replace(self, **changes)
