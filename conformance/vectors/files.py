"""conformance, vectors: a set as files. For each case its JSON, its tensors as safetensors, and the same data alone.

    index.json                  the format, the version of the specification, each case with the SHA-256 of its files
    select/SEL-3-1f2e3d.json    what is called, and what returns
    select/SEL-3-1f2e3d.safetensors
    select/SEL-3-1f2e3d.bin

`docs/vectors.md` describes them for a reader in another language.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from conformance.core.case import plain
from conformance.core.register import REQUIREMENTS, SPEC_VERSION
from conformance.core.usage import UsageError
from conformance.vectors.choose import Stored
from conformance.vectors.container import FORMAT, laid_out, safetensors_bytes, to_json
from moe_ref import (
    BalanceSpec,
    BiasUpdateSpec,
    CapacitySpec,
    ExpertSpec,
    LayerSpec,
    RouterSpec,
    ShardLayout,
    SharedSpec,
)
from moe_ref.specs.readers.tensors import Tensors

INDEX = "index.json"
PLAIN = (str, int, float, bool, type(None))
SUFFIXES = (".json", ".safetensors", ".bin")
TOLERANCE = ".tolerance"
ORDERS = {
    "expert_ids_TK": "slots", "weights_TK": "slots", "group_ids_TL": "sorted", "order_N": "sorted",
}  # fmt: skip
"""Outputs whose order inside a row is free: slots are compared by expert id, the others as sets."""


def files_of(cases: list[Stored]) -> dict[str, bytes]:
    """Path -> content of every file of a set."""
    found: dict[str, bytes] = {}
    index: dict[str, Any] = {}
    for stored in sorted(cases, key=lambda stored: stored.name):
        own = files_of_case(stored)
        found |= own
        index[stored.name] = {
            "method": stored.call.method,
            "level": stored.level,
            "requirements": stored.requirements,
            "trials": [trial.to_dict() for trial in stored.trials],
            "key": stored.call.key,
            "sha256": {suffix: hashlib.sha256(own[stored.name + suffix]).hexdigest() for suffix in SUFFIXES},
        }
    head = {"format": FORMAT, "specification": SPEC_VERSION, "defaults": defaults()}
    return found | {INDEX: to_json(head | {"cases": index})}


def defaults() -> dict[str, Any]:
    """Spec -> field -> the value of a field that a case leaves out."""
    specs = (RouterSpec, ExpertSpec, SharedSpec, LayerSpec, ShardLayout, BalanceSpec, BiasUpdateSpec, CapacitySpec)
    return {
        spec.__name__: {f.name: plain(f.default) for f in fields(spec) if isinstance(f.default, PLAIN)}
        for spec in specs
    }


def files_of_case(stored: Stored) -> dict[str, bytes]:
    """Path -> content of the three files of a case."""
    call, expected = stored.call, stored.expected
    entries, data = data_of(stored)
    for name, entry in entries.items():
        if name.startswith("out.") and not name.endswith(TOLERANCE):
            bare = name.removeprefix("out.")
            entry["order"] = ORDERS.get(bare, "as_is") if call.method in ("route", "record", "permute") else "as_is"
            entry["tolerance"] = f"{name}{TOLERANCE}" if bare in expected.tolerances else None
    definition = {
        "format": FORMAT,
        "specification": SPEC_VERSION,
        "name": stored.name,
        "method": call.method,
        "level": stored.level,
        "requirements": {name: REQUIREMENTS[name].sentence for name in stored.requirements},
        "stage": stored.name.partition("/")[0],
        "families": sorted({trial.family for trial in stored.trials if trial.family}),
        "tags": sorted(stored.tags),
        "axes": axes_of(entries),
        "arguments": prefixed(call.json, "in."),
        "returns": prefixed(expected.json, "out."),
        "refused": expected.json is None,
        "same": {f"out.{name}": f"out.{first}" for name, first in expected.same.items()},
        "tensors": entries,
    }
    return {
        f"{stored.name}.json": to_json(definition),
        f"{stored.name}.safetensors": safetensors_bytes(entries, data),
        f"{stored.name}.bin": data,
    }


def data_of(stored: Stored) -> tuple[dict[str, dict[str, Any]], bytes]:
    """The tensors of a case, `in.` what is given and `out.` what returns, with their bytes."""
    expected = stored.expected
    tensors = {f"in.{name}": value for name, value in stored.call.tensors.items()}
    tensors |= {f"out.{name}": value for name, value in expected.values.items()}
    tensors |= {f"out.{name}{TOLERANCE}": value for name, value in expected.tolerances.items()}
    return laid_out(tensors)


def prefixed(data: Any, prefix: str) -> Any:
    """The form of a value with longer names of tensors."""
    if isinstance(data, dict):
        if data.keys() == {"tensor"}:
            return {"tensor": prefix + data["tensor"]}
        return {name: prefixed(each, prefix) for name, each in data.items()}
    return [prefixed(each, prefix) for each in data] if isinstance(data, list) else data


def axes_of(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Letter -> length, of those that have one length in all tensors."""
    found: dict[str, set[int]] = {}
    for entry in entries.values():
        for letter, length in zip(entry["axes"] or (), entry["shape"], strict=False):
            found.setdefault(letter, set()).add(length)
    return {letter: min(lengths) for letter, lengths in sorted(found.items()) if len(lengths) == 1 and letter.isalpha()}


def write(folder: Path, cases: list[Stored]) -> int:
    """Write a set; the number of its bytes."""
    files = files_of(cases)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return sum(map(len, files.values()))


@dataclass(frozen=True, kw_only=True, eq=False)
class Read:
    """A case of a set on disk."""

    folder: Path
    name: str
    entry: Mapping[str, Any]
    """Of the index."""

    @cached_property
    def definition(self) -> dict[str, Any]:
        return json.loads((self.folder / f"{self.name}.json").read_bytes())

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """All of them, from the safetensors file."""
        return dict(Tensors(self.folder / f"{self.name}.safetensors"))

    @cached_property
    def outputs(self) -> dict[str, np.ndarray]:
        """Name -> value of what returns, those that are stored once for several names too."""
        own = {name: value for name, value in self.tensors.items() if is_output(name)}
        own |= {name: own[first] for name, first in self.definition["same"].items()}
        return {name.removeprefix("out."): value for name, value in own.items()}

    def tolerance(self, name: str) -> np.ndarray | float:
        """That of an output; 0 where it is met exactly."""
        first = self.definition["same"].get(f"out.{name}", f"out.{name}")
        return self.tensors.get(f"{first}{TOLERANCE}", 0.0)

    def order(self, name: str) -> str:
        """as_is, sorted or slots."""
        first = self.definition["same"].get(f"out.{name}", f"out.{name}")
        return self.definition["tensors"][first]["order"]


def is_output(name: str) -> bool:
    """Whether a tensor is a value that returns."""
    return name.startswith("out.") and not name.endswith(TOLERANCE)


def read(folder: Path) -> list[Read]:
    """The cases of a set.

    Raises:
        UsageError: the folder has no index, or one of another format.
    """
    try:
        index = json.loads((folder / INDEX).read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} is no set of vectors: {error}") from None
    if index.get("format") != FORMAT:
        raise UsageError(f"{folder / INDEX} has the format {index.get('format')!r}; it is {FORMAT!r}")
    return [Read(folder=folder, name=name, entry=entry) for name, entry in index["cases"].items()]


def version_of(folder: Path) -> str:
    """The version of the specification that a set is of."""
    return json.loads((folder / INDEX).read_bytes())["specification"]


def digest(folder: Path) -> str:
    """The SHA-256 of the index, which has those of all files."""
    return hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()
