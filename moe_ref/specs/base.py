"""moe_ref, what every spec shares: reading, writing, and a changed copy.

A spec says *what* is computed, never how: frozen, validated data.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar, Self

import numpy as np

from moe_ref.specs.checks import LARGEST, in_words_of, nearest, one_of, require


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What the specs share: reading, writing, and a changed copy."""

    ALIASES: ClassVar[Mapping[str, str]] = {}
    """Names of other frameworks -> the field."""

    def __post_init__(self):
        for field in fields(self):
            given = value = getattr(self, field.name)
            if isinstance(value, np.generic):  # a spec is plain data
                value = value.item()
            if isinstance(value, int) and abs(value) > LARGEST and field.type in ("float", float, "float | None"):
                with suppress(OverflowError):  # which its check then refuses
                    value = float(value)
            if value is not given:
                object.__setattr__(self, field.name, value)

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        """A spec from the names of its fields, or their aliases, of which a null says nothing.

        Raises:
            ValueError: a name is unknown, a field is given under two names, or the spec is not valid; it speaks of the
                names that were given.
        """
        own = {field.name for field in fields(cls)}
        found: dict[str, Any] = {}
        names: dict[str, str] = {}
        for name, value in values.items():
            field = name if name in own else cls.ALIASES.get(name, name)
            if field not in own:
                raise ValueError(f"unknown field {name!r} of {cls.__name__}{nearest(name, own | cls.ALIASES.keys())}")
            if value is None and field != name:
                continue
            twice = f"{names.get(field)!r} is {found.get(field)!r}, and {name!r} is {value!r}"
            require(field not in found, f"field {field} is given twice: {twice}")
            found[field], names[field] = value, name
        missing = {field.name for field in fields(cls) if field.default is MISSING} - found.keys()
        require(not missing, f"{cls.__name__} needs {', '.join(sorted(missing))}")
        try:
            return cls(**found)
        except ValueError as error:
            raise ValueError(in_words_of(names, str(error))) from None

    def to_dict(self) -> dict:
        """The fields that differ from their default, JSON-ready; `from_dict` reads it back."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, validated again."""
        return replace(self, **changes)


def first_difference(one: Spec, other: Spec) -> str:
    """The first field in which two specs differ, with both values; '' where they are equal."""
    for field in fields(one):
        here, there = getattr(one, field.name), getattr(other, field.name)
        if isinstance(here, Spec) and isinstance(there, Spec) and here != there:
            return f"{field.name}.{first_difference(here, there)}"
        if here != there:
            return f"{field.name} {here!r} and {there!r}"
    return ""


@dataclass(frozen=True, kw_only=True)
class SpecWithForms(Spec):
    """A spec of which some forms were published under a name."""

    FORMS: ClassVar[Mapping[str, dict[str, Any]]] = {}
    """Name -> the fields by which the form differs from the defaults."""

    @classmethod
    def of(cls, form: str, **changes: Any) -> Self:
        """The published form of that name (`FORMS`), with other values for some fields."""
        one_of("form", form, tuple(cls.FORMS))
        return cls(**cls.FORMS[form] | changes)

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        """A spec from the names of its fields, over those of a `form` where one is named."""
        values, named = dict(values), {}
        if "form" in values:
            form = values.pop("form")
            one_of("form", form, tuple(cls.FORMS))
            named = cls.FORMS[form]
        return super().from_dict(named | values)
