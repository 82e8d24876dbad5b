"""moe_ref, replay: a choice of experts that was recorded once is forced on any router.

    route -> record -> save ... load -> replay

Reinforcement learning samples with one implementation and trains with another; where their routers disagree, the
training gradient is of another model. A record carries the choice across: ids alone, so that the weights are those of
the router it is forced on, or ids with weights.

Legend: T tokens, K top_k, B sequences.
"""

import json
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from moe_ref.checks import array, entries, require
from moe_ref.layer import LayerTrace, moe_layer
from moe_ref.load import mask_array
from moe_ref.routing import UNUSED, RoutingTrace, ids_array, route
from moe_ref.spec import LayerSpec, RouterSpec
from moe_ref.weights import LayerParams

FORMAT = "moe-conformance routing record 1"


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingRecord:
    """The choice of one layer for a batch of tokens, in slot order.

    Raises:
        ValueError: wrong shapes, dtypes or values; it names field, value and bound.
    """

    expert_ids_TK: np.ndarray
    """int32; -1 is an unused slot, and every slot of a padding token is unused."""
    weights_TK: np.ndarray
    """float32, final: after norm and scales; 0 for unused slots."""
    token_mask_T: np.ndarray
    sequence_starts_B: np.ndarray
    """int64; the first token of each consecutive sequence, the first one being 0."""
    spec: RouterSpec
    """The router that chose."""

    def __post_init__(self):
        ids_TK = ids_array("expert_ids_TK", self.expert_ids_TK, (None, self.spec.top_k), self.spec.num_choices, low=-1)
        T = len(ids_TK)
        mask_T = mask_array(self.token_mask_T, T)
        weights_TK = array("weights_TK", self.weights_TK, ids_TK.shape).astype(np.float32)
        entries("weights_TK", weights_TK, np.isfinite(weights_TK), "entries are finite")
        unused_TK = ids_TK == UNUSED
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
        for name, fill in (("expert_ids_TK", UNUSED), ("weights_TK", 0), ("token_mask_T", False)):
            rows = np.concatenate([getattr(record, name) for record in records])
            arrays[name] = np.full((room.sum(), *rows.shape[1:]), fill, rows.dtype)
            arrays[name][own_T] = rows
        return cls(sequence_starts_B=starts_B, spec=records[0].spec, **arrays)

    def _rows(self, rows: slice) -> "RoutingRecord":
        return RoutingRecord(
            expert_ids_TK=self.expert_ids_TK[rows],
            weights_TK=self.weights_TK[rows],
            token_mask_T=self.token_mask_T[rows],
            sequence_starts_B=np.zeros(1, np.int64),
            spec=self.spec,
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, for any container."""
        names = ("expert_ids_TK", "weights_TK", "token_mask_T", "sequence_starts_B")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], spec: RouterSpec) -> "RoutingRecord":
        """The record of those arrays and that router."""
        return cls(spec=spec, **arrays)


def capture(routing: RoutingTrace, spec: RouterSpec, *, token_mask_T=None, sequence_lengths=None) -> RoutingRecord:
    """A record holds what a router chose, in slot order, with float32 weights.

    `routing` is a RoutingTrace or a CapacityTrace, or anything with expert_ids_TK and weights_TK.
    """
    T = len(routing.expert_ids_TK)
    lengths = np.asarray([T] if sequence_lengths is None else sequence_lengths, dtype=np.int64)
    require(int(lengths.sum()) == T, f"sequence_lengths sums to {int(lengths.sum())}; there are {T} tokens")
    return RoutingRecord(
        expert_ids_TK=routing.expert_ids_TK,
        weights_TK=routing.weights_TK,
        token_mask_T=mask_array(token_mask_T, T),
        sequence_starts_B=np.cumsum(lengths) - lengths,
        spec=spec,
    )


def replay_spec(spec: RouterSpec, *, with_weights: bool = False) -> RouterSpec:
    """The same router with its choice replaced by a given one: no selection, no groups, no bias on the choice.

    Raises:
        ValueError: its weights are not a function of the chosen ids alone (sparsemixer).
    """
    require(
        with_weights or spec.selector != "sparsemixer",
        "selector is 'sparsemixer', whose weights depend on how it chose; replay it with recorded weights",
    )
    return spec.replace(
        selector="given", num_expert_groups=None, num_limited_groups=None, group_score_k=2, mask_fill=-np.inf,
        weights_from="scores",
    )  # fmt: skip


def replay(
    record: RoutingRecord, logits_TE, spec: RouterSpec, *, with_weights: bool = False, learned_scale=None,
    dtype: DTypeLike = np.float64,
) -> RoutingTrace:  # fmt: skip
    """The recorded choice on this router: its weights are those of these logits, or the recorded ones.

    An unused slot stays unused. Recorded weights are constants: no gradient goes to the logits.
    """
    return route(
        logits_TE, replay_spec(spec, with_weights=with_weights), learned_scale=learned_scale, dtype=dtype,
        **replay_inputs(record, spec, with_weights=with_weights),
    )  # fmt: skip


def replay_layer(
    record: RoutingRecord, x_TD, params: LayerParams, spec: LayerSpec, *, with_weights: bool = False,
    dtype: DTypeLike = np.float64,
) -> LayerTrace:  # fmt: skip
    """The layer with the recorded choice; expert_bias takes part in a choice alone, and is not asked."""
    inputs = replay_inputs(record, spec.router, with_weights=with_weights)
    forced = spec.replace(router=replay_spec(spec.router, with_weights=with_weights))
    return moe_layer(x_TD, replace(params, expert_bias_E=None), forced, dtype=dtype, **inputs)


def replay_inputs(record: RoutingRecord, spec: RouterSpec, *, with_weights: bool = False) -> dict[str, Any]:
    """What `route` and `moe_layer` take beside the tokens to replay a record on a router with as many choices."""
    for field in ("top_k", "num_choices"):
        recorded, wanted = getattr(record.spec, field), getattr(spec, field)
        require(recorded == wanted, f"{field} is {wanted}; the record has {recorded}")
    inputs = {"given_ids_TK": record.expert_ids_TK, "token_mask_T": record.token_mask_T}
    return inputs | {"given_weights_TK": record.weights_TK} if with_weights else inputs


def save_records(path, records: dict[str, RoutingRecord]) -> None:
    """Records by name (a layer's, say) in one file of the safetensors format."""
    arrays = {f"{name}/{key}": value for name, record in records.items() for key, value in record.to_arrays().items()}
    metadata = {"format": FORMAT, "specs": json.dumps({name: r.spec.to_dict() for name, r in records.items()})}
    _safetensors("safetensors.numpy").save_file(arrays, path, metadata=metadata)


def load_records(path) -> dict[str, RoutingRecord]:
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
