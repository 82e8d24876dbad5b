"""moe_ref, the record: a choice of experts as data, which any implementation can write and any other can read.

In a file of the safetensors format each array of a record is named `record/array`, and the metadata holds `format` and
`specs`, the routers by record as JSON.

Legend: T tokens, K top_k, B sequences.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from os import PathLike
from typing import Any

import numpy as np

from moe_ref.specs.checks import array, entries, mask_array, require
from moe_ref.specs.ids import UNUSED, ids_array
from moe_ref.specs.inputs import RouterInputs
from moe_ref.specs.router import RouterSpec

FORMAT = "moe-conformance routing record 1"
FILLS = {"expert_ids_TK": UNUSED, "weights_TK": 0, "token_mask_T": False}
"""The arrays with a row for each token, and what a padding token has in them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingRecord:
    """The choice of one layer for a batch of tokens, in slot order.

    Raises:
        ValueError: wrong shapes, dtypes or values; it names field, value and bound.
    """

    expert_ids_TK: np.ndarray
    """int32; -1 is an unused slot, and every slot of a padding token is unused."""
    weights_TK: np.ndarray | None
    """float32, final: after norm and scales; 0 for unused slots. None where the ids alone are recorded."""
    token_mask_T: np.ndarray
    sequence_starts_B: np.ndarray
    """int64; the first token of each consecutive sequence, the first one being 0."""
    spec: RouterSpec
    """The router that chose."""

    def __post_init__(self):
        ids_TK = ids_array("expert_ids_TK", self.expert_ids_TK, (None, self.spec.top_k), self.spec.num_choices, low=-1)
        T = len(ids_TK)
        mask_T = array("token_mask_T", self.token_mask_T, (T,), kind="bool")
        unused_TK, weights_TK = ids_TK == UNUSED, None
        if self.weights_TK is not None:
            weights_TK = array("weights_TK", self.weights_TK, ids_TK.shape).astype(np.float32)
            entries("weights_TK", weights_TK, np.isfinite(weights_TK), "entries are finite")
            entries("weights_TK", weights_TK, ~unused_TK | (weights_TK == 0), "an unused slot weighs 0")
        entries("expert_ids_TK", ids_TK, np.asarray((unused_TK | mask_T[:, None]).all(axis=-1)),
                "a padding token has no expert")  # fmt: skip
        starts_B = array("sequence_starts_B", self.sequence_starts_B, (None,), kind="int").astype(np.int64)
        steps = np.diff(np.append(starts_B, T))
        require(len(starts_B) == 0 or starts_B[0] == 0, f"sequence_starts_B begins with {starts_B[:1].tolist()}, not 0")
        require(len(starts_B) > 0 or T == 0, f"sequence_starts_B is empty; there are {T} tokens")
        entries("sequence_starts_B", starts_B, steps >= 0, f"starts ascend and are at most {T}")
        for field, value in (("expert_ids_TK", ids_TK.astype(np.int32)), ("weights_TK", weights_TK),
                             ("token_mask_T", mask_T), ("sequence_starts_B", starts_B)):  # fmt: skip
            object.__setattr__(self, field, value)

    def _rows(self, rows: slice) -> "RoutingRecord":
        own = {name: value[rows] for name, value in self.to_arrays().items() if name in FILLS}
        return RoutingRecord.from_arrays(own | {"sequence_starts_B": np.zeros(1, np.int64)}, self.spec)

    @property
    def sequence_lengths(self) -> tuple[int, ...]:
        """The lengths of the sequences."""
        return tuple(np.diff(np.append(self.sequence_starts_B, len(self.expert_ids_TK))).tolist())

    def split(self) -> list["RoutingRecord"]:
        """One record for each sequence."""
        bounds = zip(self.sequence_starts_B, self.sequence_lengths, strict=True)
        return [self._rows(slice(start, start + length)) for start, length in bounds]

    @classmethod
    def join(cls, records: list["RoutingRecord"], *, pad_to: int | None = None) -> "RoutingRecord":
        """One record of all sequences, in order; with `pad_to`, each is followed by padding up to that length."""
        require(len(records) > 0, "records is empty; a record has a spec, and there is none")
        for index, record in enumerate(records):
            require(record.spec == records[0].spec, f"records[{index}].spec differs from that of records[0]")
        lengths = [length for record in records for length in record.sequence_lengths]
        longest = max(lengths, default=0)
        require(pad_to is None or pad_to >= longest, f"pad_to is {pad_to}; the longest sequence has {longest} tokens")
        room = np.array([length if pad_to is None else pad_to for length in lengths], dtype=np.int64)
        starts_B = np.cumsum(room) - room
        own_T = np.concatenate([np.arange(0), *map(np.arange, starts_B, starts_B + lengths)]).astype(np.int64)
        arrays = {}
        for name, fill in FILLS.items():
            parts = [getattr(record, name) for record in records]
            missing = sum(part is None for part in parts)
            require(missing in (0, len(parts)), f"{name} is None in {missing} of {len(parts)} records; it is in all")
            if not missing:
                rows = np.concatenate(parts)
                arrays[name] = np.full((room.sum(), *rows.shape[1:]), fill, rows.dtype)
                arrays[name][own_T] = rows
        return cls.from_arrays(arrays | {"sequence_starts_B": starts_B}, records[0].spec)

    @classmethod
    def of_choice(
        cls, expert_ids_TK: np.ndarray, weights_TK: np.ndarray | None, spec: RouterSpec, *,
        token_mask_T: np.ndarray | None = None, sequence_lengths: Sequence[int] | None = None,
    ) -> "RoutingRecord":  # fmt: skip
        """The record of a choice, final weights included, by the router of that spec. [RPL-8]

        Args:
            token_mask_T: False where a token is padding; None: all are valid.
            sequence_lengths: of consecutive sequences; None: one.
        """
        T = len(expert_ids_TK)
        lengths_B = np.asarray([T] if sequence_lengths is None else sequence_lengths, dtype=np.int64)
        total = int(lengths_B.sum())
        require(total == T, f"sequence_lengths sums to {total}; there are {T} tokens")
        return cls(
            expert_ids_TK=expert_ids_TK,
            weights_TK=weights_TK,
            token_mask_T=mask_array(token_mask_T, T),
            sequence_starts_B=np.cumsum(lengths_B) - lengths_B,
            spec=spec,
        )

    def inputs(
        self, spec: RouterSpec, *, with_weights: bool = False, num_tokens: int | None = None
    ) -> tuple[RouterInputs, np.ndarray]:
        """What a router with as many choices reads to replay this record (`RouterSpec.given`), and the token mask.

        Recorded weights are constants: no gradient goes to the logits.

        Args:
            spec: of the router that replays.
            with_weights: whether the recorded weights are replayed too.
            num_tokens: of the batch, where it is known; the record has as many.
        """
        T = len(self.expert_ids_TK)
        require(num_tokens in (None, T), f"the record has {T} tokens and the batch {num_tokens}")
        for field in ("top_k", "num_choices"):
            recorded, wanted = getattr(self.spec, field), getattr(spec, field)
            require(recorded == wanted, f"{field} is {wanted}; the record has {recorded}")
        require(
            not with_weights or self.weights_TK is not None,
            "with_weights is True, but weights_TK of the record is None",
        )
        weights_TK = self.weights_TK if with_weights else None
        return RouterInputs(given_ids_TK=self.expert_ids_TK, given_weights_TK=weights_TK), self.token_mask_T

    def ids_alone(self) -> "RoutingRecord":
        """The record without its weights."""
        return replace(self, weights_TK=None)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, for any container; without weights where there are none."""
        arrays = {name: getattr(self, name) for name in (*FILLS, "sequence_starts_B")}
        return {name: value for name, value in arrays.items() if value is not None}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], spec: RouterSpec) -> "RoutingRecord":
        """The record of those arrays and that router."""
        fields: dict[str, Any] = {"weights_TK": None} | arrays
        return cls(spec=spec, **fields)


def save_records(path: str | PathLike[str], records: dict[str, RoutingRecord]) -> None:
    """Records by name (a layer's, say) in one file of the safetensors format."""
    arrays = {f"{name}/{key}": value for name, record in records.items() for key, value in record.to_arrays().items()}
    metadata = {"format": FORMAT, "specs": json.dumps({name: r.spec.to_dict() for name, r in records.items()})}
    _safetensors("safetensors.numpy").save_file(arrays, path, metadata=metadata)


def load_records(path: str | PathLike[str]) -> dict[str, RoutingRecord]:
    """The records of a file that `save_records` wrote, here or in another implementation."""
    safetensors = _safetensors("safetensors")
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        require(metadata.get("format") == FORMAT, f"format of {path} is {metadata.get('format')!r}; it is {FORMAT!r}")
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return {
        name: RoutingRecord.from_arrays(
            {key.rpartition("/")[2]: value for key, value in arrays.items() if key.rpartition("/")[0] == name},
            RouterSpec.from_dict(spec),
        )
        for name, spec in json.loads(metadata["specs"]).items()
    }


def _safetensors(module: str) -> Any:
    """The safetensors package: it comes with every framework, and nothing else here needs more than NumPy."""
    try:
        return import_module(module)
    except ImportError as missing:
        raise ImportError("records are saved and loaded with safetensors: pip install safetensors") from missing
