"""moe_ref, a foreign configuration: every key is read, known to be irrelevant, or an error that names it.

A reader asks for keys under the names of its code base; nothing is guessed. Absent: the default of the code base.
Null: none, where the field knows a none.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import copy
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from os import PathLike, fspath
from pathlib import Path
from typing import Any, cast

from moe_ref.specs.checks import in_words_of, integer, nearest, require

ABSENT: Any = object()
"""No value, and no default either."""


def load(config: Any, *, parse: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    """A configuration as a dict: of a mapping, a file path, or an object of its framework.

    Raises:
        ValueError: the file does not hold a mapping, or the object cannot be read as one.
    """
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, (str, PathLike)):
        path = Path(fspath(config))
        path = path / "config.json" if path.is_dir() else path
        require(path.is_file(), f"{path} is no file; a configuration is a dict, a file or an object of its framework")
        try:
            found = parse(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        require(isinstance(found, Mapping), f"{path} holds a {type(found).__name__}, not a mapping of keys")
        return dict(found)
    for method in ("to_dict", "get_keys"):  # of transformers, of MaxText's pyconfig
        found: Any = getattr(config, method, None)
        if callable(found):
            return dict(cast(Mapping[str, Any], found()))
    if is_dataclass(config) and not isinstance(config, type):
        return asdict(config)
    found = getattr(config, "__dict__", None)
    require(bool(found), f"config is a {type(config).__name__}; it is a dict, a file path or an object with attributes")
    return dict(found or {})


class Config:
    """The keys of one configuration, and which of them were read."""

    def __init__(self, values: Mapping[str, Any], what: str, *, defaults: Mapping[str, Any] | None = None,
                 synonyms: Mapping[str, str] | None = None) -> None:  # fmt: skip
        """`what` says in messages whose keys these are; `synonyms` maps another name to the name it stands for."""
        self.values, self.what = dict(values), what
        self.defaults, self.synonyms = dict(defaults or {}), dict(synonyms or {})
        self.read: set[str] = set()
        self.names: dict[str, str] = {}
        """Our field -> the user's key."""
        self.layer: int | None = None
        self.per_layer: frozenset[str] = frozenset()
        """Keys that may hold a list with an entry for each layer."""

    def at(self, layer: int) -> "Config":
        """The same configuration, whose lists with an entry for each layer are read at that layer."""
        there = copy(self)
        there.layer = layer
        return there

    def names_of(self, name: str) -> list[str]:
        """The name and its synonyms, as far as the file has them."""
        return [each for each in (name, *(s for s, n in self.synonyms.items() if n == name)) if each in self.values]

    def has(self, name: str) -> bool:
        """Whether the file says something of this key that is not null."""
        return any(self.values[each] is not None for each in self.names_of(name))

    def get(self, name: str, default: Any = ABSENT, *, field: str = "") -> Any:
        """The value of a key or of a synonym: None for a null, the default where the file does not have it.

        Args:
            name: the key.
            default: in place of the code base's; without any, an absent key is an error.
            field: our field that it becomes, for messages.

        Raises:
            ValueError: it is missing, or two of its names contradict each other.
        """
        there = self.names_of(name)
        self.read |= {name, *there}
        said = [each for each in there if self.values[each] is not None]
        for other in said[1:]:
            require(
                self._value(other) == self._value(said[0]),
                f"{said[0]} is {self._value(said[0])!r}, but {other} is {self._value(other)!r}; in {self.what} both "
                "are names of one thing",
            )
        key = (said or there or [name])[0]
        if field:
            self.names[field] = key
        if said:
            return self._value(key)
        if there:
            return None
        value = self.defaults.get(name, ABSENT) if default is ABSENT else default
        require(value is not ABSENT, f"{name} is missing; {self.what} needs it")
        return self._pick(name, value)

    def whole(self, name: str, default: Any = ABSENT, *, low: int = 0, none: int | None = None) -> int:
        """As `get`, for a key that is an integer of at least `low`; a null is `none`, or an error.

        Raises:
            ValueError: it is not.
        """
        value = self.get(name, default)
        value = none if value is None else value
        integer(next(iter(self.names_of(name)), name), value, low)
        return int(cast(int, value))  # as was just checked

    def flag(self, name: str) -> bool:
        """As `get`, for a key that is a bool; a null is False.

        Raises:
            ValueError: it is another thing, such as the text "False".
        """
        value = self.get(name)
        require(value is None or isinstance(value, bool), f"{name} is {value!r}; it is a bool")
        return bool(value)

    def _value(self, key: str) -> Any:
        return self._pick(key, self.values[key])

    def _pick(self, key: str, value: Any) -> Any:
        """The entry of the layer, of a list with one for each."""
        if not isinstance(value, (list, tuple)) or self.synonyms.get(key, key) not in self.per_layer:
            return value
        if self.layer is None:
            require(len(set(value)) <= 1, f"{key} has a value for each layer, and they differ")
            return value[0] if len(value) else None
        require(self.layer < len(value), f"{key} has {len(value)} entries; layer {self.layer} has none")
        return value[self.layer]

    def only(self, name: str, valid: Collection[Any], why: str = "") -> None:
        """The key is absent, null, or one of the values that the code base computes."""
        for each in self.names_of(name):
            value = self.values[each]
            self.read.add(each)
            listed = set(map(repr, value)) if isinstance(value, list) and name in self.per_layer else {repr(value)}
            wrong = listed - {repr(each) for each in valid}
            require(
                value is None or not wrong,
                f"{each} is {value!r}; {self.what} computes {' or '.join(map(repr, valid))} alone{why and f' ({why})'}",
            )

    def finish(self, irrelevant: "Irrelevant", ignore: Iterable[str] = ()) -> None:
        """Every key was read, or is irrelevant; a key to `ignore` is there.

        Raises:
            ValueError: a key is unknown; it names the nearest one.
        """
        ignored = set(ignore)
        strangers = ignored - self.values.keys()
        require(not strangers, f"ignore names {sorted(strangers)}, which the config does not have")
        known = self.read | set(self.synonyms)
        unknown = sorted(
            key
            for key, value in self.values.items()
            if key not in known | ignored
            and (key not in irrelevant or (key not in irrelevant.names and _near(key, self.read)))
            and (value is not None or irrelevant.speaks_of_routing(key))
        )
        if unknown:
            hint = nearest(unknown[0], known)
            more = f", nor are {', '.join(map(repr, unknown[1:8]))}" if len(unknown) > 1 else ""
            raise ValueError(
                f"{unknown[0]!r} is no key that {self.what} is known to have"
                f"{hint if 'did you mean' in hint else ''}{more}; keys that do not concern the MoE layers are "
                f"passed over with ignore={unknown!r}"
            )

    def renamed(self, message: str) -> str:
        """A message about our fields as one about the user's keys."""
        return in_words_of(self.names, message)


def _near(key: str, names: Iterable[str]) -> bool:
    """Whether a key looks like one of the names, misspelt."""
    return bool(get_close_matches(key, names, n=1, cutoff=0.9))


class Irrelevant:
    """Keys that say nothing of the MoE layers: by name, or by a word of another part where no word of routing is."""

    def __init__(self, names: Iterable[str], *, words: Iterable[str] = (), tokens: Iterable[str] = (),
                 routing_words: Iterable[str] = ()) -> None:  # fmt: skip
        self.names, self.words = frozenset(names), tuple(words)
        self.tokens, self.routing_words = frozenset(tokens), tuple(routing_words)

    def __contains__(self, key: str) -> bool:
        last = key.rpartition(".")[2]  # of a nested part made flat
        if key in self.names or last in self.names or last.startswith("_"):
            return True
        if self.speaks_of_routing(last):
            return False
        last = last.lower()
        return any(word in last for word in self.words) or not self.tokens.isdisjoint(last.split("_"))

    def speaks_of_routing(self, key: str) -> bool:
        """Whether a word of routing is in the key."""
        return any(word in key.lower() for word in self.routing_words)

    def and_also(self, names: Iterable[str]) -> "Irrelevant":
        """These, and more names."""
        return Irrelevant(
            self.names | set(names), words=self.words, tokens=self.tokens, routing_words=self.routing_words
        )
