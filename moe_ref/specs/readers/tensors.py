"""moe_ref, checkpoints: the tensors of safetensors files by name, read one by one and never as a whole.

The format: 8 bytes with the length of a JSON header, the header (name -> dtype, shape, offsets), then the bytes.
"""

import json
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from moe_ref.specs.checks import nearest, require

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_, "BF16": np.uint16,
}  # fmt: skip
INDEX, ONE = "model.safetensors.index.json", "model.safetensors"


class Tensors(Mapping[str, np.ndarray]):
    """Name -> array of one file, of the files of an index, or of a folder that has either.

    bfloat16 is read as float32, which holds it exactly.

    Raises:
        ValueError: there is no such file, or it is not of the format.
    """

    def __init__(self, path: str | PathLike) -> None:
        path = Path(path)
        if path.is_dir():
            path = next((each for each in (path / INDEX, path / ONE) if each.is_file()), path / ONE)
        require(path.is_file(), f"{path} is no file; weights are a mapping, a .safetensors, an index or a folder")
        names = {path}
        if path.suffix == ".json":
            names = {path.parent / name for name in json.loads(path.read_text())["weight_map"].values()}
        self.where: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for file in sorted(names):
            self.where |= _header(file)

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, name: str) -> np.ndarray:
        file, start, entry = self.where[name]
        kind = entry["dtype"]
        require(kind in DTYPES, f"{name} has dtype {kind}, a quantised one{nearest(kind, DTYPES)}; dequantise it first")
        first, last = entry["data_offsets"]
        dtype = np.dtype(DTYPES[kind]).newbyteorder("<")
        with file.open("rb") as opened:
            opened.seek(start + first)
            read = opened.read(last - first)
        values = np.frombuffer(read, dtype).reshape(entry["shape"])
        return from_bfloat16(values) if kind == "BF16" else values.astype(dtype.newbyteorder("="))


def _header(file: Path) -> dict[str, tuple[Path, int, dict[str, Any]]]:
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        require(0 < size <= file.stat().st_size - 8, f"{file} is no safetensors file: a header of {size} bytes")
        try:
            entries = json.loads(opened.read(size))
        except ValueError as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from error
    entries.pop("__metadata__", None)
    return {name: (file, 8 + size, entry) for name, entry in entries.items()}


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 numbers as float32: their upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def numbers(name: str, value: Any) -> np.ndarray:
    """A tensor of NumPy, JAX or torch as a NumPy array; bfloat16 as float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    found = np.asarray(value)
    if found.dtype.name == "bfloat16":
        found = found.astype(np.float32)
    require(
        found.dtype.kind == "f", f"{name} has dtype {found.dtype}; the weights of a layer are floats, not quantised"
    )
    return found
