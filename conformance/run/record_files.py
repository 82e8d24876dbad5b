"""conformance, running: files of routing records, ours and those of inference engines, as records by layer.

*.safetensors   `moe_ref.save_records`, with specs and weights
*.npy           an integer array (T, L, K): vLLM's `routed_experts`
*.json          a response with `routed_experts`, or `meta_info.routed_experts` (SGLang): base64 or lists
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conformance.core.usage import UsageError
from moe_ref import UNUSED, RouterSpec, RoutingRecord, load_records, records_from_served, served_array

OURS = ".safetensors"
SUFFIXES = (OURS, ".npy", ".json")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a file does not say of itself."""

    num_layers: int | None = None
    top_k: int | None = None
    num_experts: int | None = None
    """None: as many as the ids of both files need."""
    dense: tuple[int, ...] = ()
    """Layers that do not route, of an array that has a place for them."""
    padding: str = "-1"
    """See `moe_ref.records_from_served`."""


def is_file(name: str) -> bool:
    """Whether this names a file of records, by its ending."""
    return name.endswith(SUFFIXES)


def read_two(one: str, other: str, sizes: Sizes) -> tuple[dict[str, RoutingRecord], dict[str, RoutingRecord]]:
    """The records of two files, by layer. An engine's file beside one of ours has the routers of that.

    Raises:
        UsageError: a file cannot be read, or is no record; it says why.
    """
    try:
        ours = {name: load_records(name) for name in (one, other) if name.endswith(OURS)}
        arrays = {name: _array(Path(name), sizes) for name in (one, other) if name not in ours}
        read = {name: _records(ids_TLK, ours, arrays, sizes) for name, ids_TLK in arrays.items()}
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from None
    found = ours | read
    return found[one], found[other]


def _array(file: Path, sizes: Sizes) -> np.ndarray:
    try:
        value = np.load(file) if file.suffix == ".npy" else _routed_experts(json.loads(file.read_text()))
        return served_array(value, num_layers=sizes.num_layers, top_k=sizes.top_k)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _routed_experts(data: Any) -> Any:
    """What a response says that its experts are."""
    if not isinstance(data, Mapping) or "data" in data:
        return data
    within = data.get("meta_info", data)
    if not isinstance(within, Mapping) or "routed_experts" not in within:
        raise ValueError(f"there is no routed_experts among {sorted(data)}, nor in meta_info")
    return within["routed_experts"]


def _records(
    ids_TLK: np.ndarray, ours: Mapping[str, Mapping[str, RoutingRecord]], arrays: Mapping[str, np.ndarray], sizes: Sizes
) -> dict[str, RoutingRecord]:
    """The records of an array: of the layers that our file has, or else of all that are not said to be dense."""
    L, K = ids_TLK.shape[1:]
    if ours:
        (known,) = ours.values()
        layers = [layer for layer in range(L) if str(layer) in known]
        if not layers:
            raise ValueError(f"records are named {sorted(known)}; beside an engine's file a name is a layer's number")
        specs = [known[str(layer)].spec for layer in layers]
    else:
        if outside := sorted(set(sizes.dense) - set(range(L))):
            raise ValueError(f"--dense {outside[0]}: there are {L} layers, from 0 on")
        largest = max(int(each.max(initial=0)) for each in arrays.values())
        spec = RouterSpec(num_experts=sizes.num_experts or max(largest + 1, K), top_k=K)
        layers = [layer for layer in range(L) if layer not in sizes.dense]
        specs = [spec] * len(layers)
    found = records_from_served(ids_TLK[:, layers], specs, padding=sizes.padding)
    return {str(layer): found[str(place)] for place, layer in enumerate(layers)}


def aligned(one: RoutingRecord, other: RoutingRecord) -> tuple[RoutingRecord, RoutingRecord, int]:
    """The two with padding where either has no route, and how many tokens that takes from the comparison.

    An engine has one row less than tokens: the last one that it sampled was never run.
    """
    lengths = [len(record.expert_ids_TK) for record in (one, other)]
    if max(lengths) - min(lengths) > 1:
        raise ValueError(f"the files have {lengths[0]} and {lengths[1]} tokens")
    T = max(lengths)
    masks = [np.pad(record.token_mask_T, (0, T - len(record.token_mask_T))) for record in (one, other)]
    both_T = masks[0] & masks[1]
    return _cut(one, both_T), _cut(other, both_T), int((masks[0] ^ masks[1]).sum())


def _cut(record: RoutingRecord, mask_T: np.ndarray) -> RoutingRecord:
    """The record with these tokens alone, the others being padding."""
    missing = len(mask_T) - len(record.expert_ids_TK)
    ids_TK = np.pad(record.expert_ids_TK, ((0, missing), (0, 0)), constant_values=UNUSED)
    weights_TK = None if record.weights_TK is None else np.pad(record.weights_TK, ((0, missing), (0, 0)))
    return RoutingRecord.of_choice(
        np.where(mask_T[:, None], ids_TK, UNUSED),
        None if weights_TK is None else np.where(mask_T[:, None], weights_TK, 0),
        record.spec,
        token_mask_T=mask_T,
    )
