"""conformance, vectors: values as JSON and named tensors, and tensors as bytes, the same ones on every machine.

Two forms of the same bytes: safetensors (8 bytes with the length of a JSON header, the header, the data), and the data
alone, whose offsets are in the JSON of a case. All numbers are little-endian.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from conformance.core.case import plain

FORMAT = "moe-conformance vectors 1"
NAMES = {"float64": "F64", "float32": "F32", "int64": "I64", "int32": "I32", "bool": "BOOL"}
"""dtype -> its name in safetensors; no tensor of a set has another one."""


def settled(value: np.ndarray) -> np.ndarray:
    """The array in a dtype of `NAMES`, C-contiguous: integers in int32 where it holds them, floats in float32 too."""
    value = np.ascontiguousarray(value).reshape(np.shape(value))
    if value.dtype.kind == "b":
        return value
    if value.dtype.kind in "iu":
        fits = value.size == 0 or (value.min() >= -(2**31) and value.max() < 2**31)
        return value.astype(np.int32 if fits else np.int64)
    with np.errstate(over="ignore"):
        narrow = value.astype(np.float32)
    return narrow if np.array_equal(narrow, value, equal_nan=True) else value.astype(np.float64)


def packed(value: Any, path: str, tensors: dict[str, np.ndarray]) -> Any:
    """A value as JSON; each array in it becomes {"tensor": path} and an entry of `tensors`. None says nothing."""
    if isinstance(value, np.ndarray):
        tensors[path] = settled(value)
        return {"tensor": path}
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        inside = {str(name): each for name, each in value.items() if each is not None}
        return {name: packed(each, f"{path}.{name}" if path else name, tensors) for name, each in inside.items()}
    if isinstance(value, (list, tuple)):
        return [packed(each, f"{path}.{number}" if path else str(number), tensors) for number, each in enumerate(value)]
    return plain(value)


def unpacked(data: Any, tensors: Mapping[str, np.ndarray]) -> Any:
    """What `packed` made, as lists, dicts and arrays; a dict lacks what `tensors` lacks."""
    if isinstance(data, dict):
        if data.keys() == {"tensor"}:
            return tensors[data["tensor"]]
        missing = {name for name, each in data.items() if _is_tensor(each) and each["tensor"] not in tensors}
        return {name: unpacked(each, tensors) for name, each in data.items() if name not in missing}
    return [unpacked(each, tensors) for each in data] if isinstance(data, list) else data


def _is_tensor(data: Any) -> bool:
    return isinstance(data, dict) and data.keys() == {"tensor"}


def laid_out(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, dict[str, Any]], bytes]:
    """(name -> dtype, shape, axes, offset and crc32; the bytes): wide dtypes first, so that each is aligned."""
    entries, parts, offset = {}, [], 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        value = tensors[name]
        data = value.astype(value.dtype.newbyteorder("<")).tobytes()
        entry = {"dtype": value.dtype.name, "shape": list(value.shape), "offset": offset}
        entries[name] = entry | {"axes": axes_of(name, value.ndim), "crc32": f"{zlib.crc32(data):08x}"}
        parts.append(data)
        offset += len(data)
    return entries, b"".join(parts)


def axes_of(name: str, ndim: int) -> list[str] | None:
    """The letters of the shape suffix of a name, where it has one of that length."""
    suffix = name.split(".tolerance")[0].rpartition(".")[2].rpartition("_")[2]
    return list(suffix) if len(suffix) == ndim and all(c.isupper() or c in "e2" for c in suffix) else None


def safetensors_bytes(entries: Mapping[str, Mapping[str, Any]], data: bytes) -> bytes:
    """A file of the safetensors format, with what `laid_out` returned."""
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT}}
    for name, entry in entries.items():
        size = int(np.prod(entry["shape"], dtype=np.int64)) * np.dtype(entry["dtype"]).itemsize
        offsets = [entry["offset"], entry["offset"] + size]
        header[name] = {"dtype": NAMES[entry["dtype"]], "shape": entry["shape"], "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def to_json(data: Any) -> bytes:
    """JSON that is the same on every machine: sorted, a line for each entry of the first two levels."""
    if not isinstance(data, dict):
        return _line(data).encode()
    lines = []
    for name, value in sorted(data.items()):
        if isinstance(value, dict) and value:
            inside = ",\n".join(f"  {_line(key)}: {_line(each)}" for key, each in sorted(value.items()))
            lines.append(f" {_line(name)}: {{\n{inside}\n }}")
        else:
            lines.append(f" {_line(name)}: {_line(value)}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _line(data: Any) -> str:
    return json.dumps(data, sort_keys=True, allow_nan=False)
