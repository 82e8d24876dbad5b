"""moe_ref, served records: the routing that an inference engine hands over, as records of our own, and back.

    vLLM      `enable_return_routed_experts`: an integer array (T, L, K), `CompletionOutput.routed_experts`
    SGLang    `meta_info["routed_experts"]`: the same as int32 in base64, flat, or as nested lists
    NeMo-RL   pads with arange(K) where it has no record

The ids are logical: before experts are replicated or moved (EPLB). Where there is no route an id is -1; an engine that
fills with 0 has lost its records, which shows, since the experts of a token are distinct.

Legend: T tokens, L layers, K top_k.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_ref.specs.checks import array, integer, one_of, require
from moe_ref.specs.ids import UNUSED
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.record import RoutingRecord
from moe_ref.specs.router import RouterSpec

Spec = RouterSpec | LayerSpec | None
"""Of a layer; None where it is dense."""
PADDINGS = ("-1", "arange")
LOST = "vllm-project/vllm-ascend#16314"


def served_array(value: Any, *, num_layers: int | None = None, top_k: int | None = None) -> np.ndarray:
    """What an engine handed over, as an int64 array (T, L, K).

    Args:
        value: an integer array or nested lists of that shape; base64 of int32, which needs num_layers and top_k; or a
            dict with `data` in base64, `shape` and, unless it is int32, `dtype`.
        num_layers, top_k: L and K, where they are known.

    Raises:
        ValueError: another shape, no integers, or text that is no base64 of int32 of these sizes.
    """
    if isinstance(value, Mapping):
        require(
            {"data", "shape"} <= value.keys(), f"routed_experts has the keys {sorted(value)}; it has data and shape"
        )
        flat_N = _decoded(value["data"], str(value.get("dtype", "int32")))
        shape = tuple(value["shape"])
        require(
            len(shape) == 3 and int(np.prod(shape)) == len(flat_N),
            f"routed_experts has shape {shape} and {len(flat_N)} ids",
        )
        value = flat_N.reshape(shape)
    elif isinstance(value, str | bytes):
        require(
            num_layers is not None and top_k is not None,
            "routed_experts is base64, which has no shape: num_layers and top_k are needed",
        )
        assert num_layers is not None
        assert top_k is not None
        flat_N, row = _decoded(value, "int32"), num_layers * top_k
        require(
            row > 0 and len(flat_N) % row == 0,
            f"routed_experts has {len(flat_N)} ids, no multiple of {num_layers} layers x {top_k}",
        )
        value = flat_N.reshape(-1, num_layers, top_k)
    return array("routed_experts", value, (None, num_layers, top_k), kind="int").astype(np.int64)


def _decoded(text: str | bytes, dtype: str) -> np.ndarray:
    try:
        data = base64.b64decode(text, validate=True)
        kind = np.dtype(dtype).newbyteorder("<")
        require(kind.kind in "iu", f"routed_experts has dtype {dtype}; it is int")
        return np.frombuffer(data, dtype=kind).astype(np.int64)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"routed_experts is no base64 of {dtype}: {error}") from None


def records_from_served(
    routed_experts: Any, specs: Spec | Sequence[Spec], *, num_tokens: int | None = None, padding: str = "-1"
) -> dict[str, RoutingRecord]:
    """The record of each layer that routes, by the number of the layer; ids alone, for an engine hands over no weights.

    A token without a route is padding in the record: a row of -1, and the last token where an engine has one row less
    than tokens, since it never ran the one that it sampled last.

    Args:
        routed_experts: see `served_array`.
        specs: of each layer, as `LayerSpec.layers_from_hf` returns them, None where a layer is dense; or one of all.
        num_tokens: of prompt and answer, where it is known; there are as many rows, or one less.
        padding: "-1", or "arange" where rows of arange(K) in all layers are padding too (NeMo-RL).

    Raises:
        ValueError: rows of 0, ids that are not logical, rows that are missing; it names the token and the layer.
    """
    one_of("padding", padding, PADDINGS)
    by_layer: list[Spec] = list(specs) if isinstance(specs, Sequence) else [specs]
    known = next((_router(spec) for spec in by_layer if spec is not None), None)
    require(known is not None, "specs has no layer that routes")
    assert known is not None
    K = known.top_k
    ids_TLK = served_array(routed_experts, num_layers=len(by_layer) if isinstance(specs, Sequence) else None, top_k=K)
    if not isinstance(specs, Sequence):
        by_layer *= ids_TLK.shape[1]
    ids_TLK = _whole(ids_TLK, num_tokens)
    routing = [layer for layer, spec in enumerate(by_layer) if spec is not None]
    if padding == "arange":
        padded_T = (ids_TLK[:, routing] == np.arange(K)).all(axis=(1, 2))
        ids_TLK = np.where(padded_T[:, None, None], UNUSED, ids_TLK)
    records = {}
    for layer, spec in enumerate(by_layer):
        ids_TK = ids_TLK[:, layer]
        if spec is None:
            # Engines size the array by all layers, and leave what a dense one has as it was made.
            require(bool(np.isin(ids_TK, (0, UNUSED)).all()), f"routed_experts: layer {layer} is dense, and has ids")
            continue
        router = _router(spec)
        require(router.top_k == K, f"specs: top_k of layer {layer} is {router.top_k}, that of the first one {K}")
        _refuse(ids_TK, layer, router)
        used_T = (ids_TK != UNUSED).any(axis=-1)
        records[str(layer)] = RoutingRecord.of_choice(ids_TK, None, router, token_mask_T=used_T)
    return records


def _router(spec: RouterSpec | LayerSpec) -> RouterSpec:
    return spec.router if isinstance(spec, LayerSpec) else spec


def _whole(ids_TLK: np.ndarray, num_tokens: int | None) -> np.ndarray:
    """With a row of -1 for the last token, where it has none."""
    if num_tokens is None:
        return ids_TLK
    integer("num_tokens", num_tokens, 0)
    missing = num_tokens - len(ids_TLK)
    require(missing in (0, 1), f"routed_experts has {len(ids_TLK)} rows; {num_tokens} tokens have as many, or one less")
    return np.pad(ids_TLK, ((0, missing), (0, 0), (0, 0)), constant_values=UNUSED)


def _refuse(ids_TK: np.ndarray, layer: int, router: RouterSpec) -> None:
    """What is no record, told by what it is."""
    zeros_T = (ids_TK == 0).sum(axis=-1) > 1
    if zeros_T.any():
        t, lost = int(np.argmax(zeros_T)), int(zeros_T.sum())
        raise ValueError(
            f"routed_experts[{t}, {layer}] is {ids_TK[t].tolist()}: the experts of a token are distinct, so that a "
            f"repeated 0 is a record that was lost and filled with 0 ({LOST}); a missing one is -1. "
            f"{lost} of {len(ids_TK)} tokens of this layer are like this; a dense layer has None in specs"
        )
    largest = int(ids_TK.max(initial=UNUSED))
    require(
        largest < router.num_choices,
        f"routed_experts has id {largest} in layer {layer}; ids are below {router.num_choices}, and logical: before "
        "experts are replicated or moved",
    )


def served_from_records(
    records: Mapping[str, RoutingRecord], *, num_layers: int | None = None, padding: str = "-1"
) -> np.ndarray:
    """(T, L, K) int32, as engines hand it over and trainers take it; a layer without a record has -1.

    Args:
        records: by the number of the layer.
        num_layers: L; None: up to the last record.
        padding: what a token without a route has: -1, or arange(K) (NeMo-RL), which a router takes for a choice.

    Raises:
        ValueError: names that are no layers, records of other tokens or top_k, or an unused slot beside used ones.
    """
    one_of("padding", padding, PADDINGS)
    require(len(records) > 0, "records is empty")
    require(
        all(name.isdecimal() for name in records), f"records are named {sorted(records)}; a name is a layer's number"
    )
    L = 1 + max(int(name) for name in records)
    if num_layers is not None:
        integer("num_layers", num_layers, L, why="layers with a record")
        L = num_layers
    shapes = {record.expert_ids_TK.shape for record in records.values()}
    require(len(shapes) == 1, f"records have the shapes {sorted(shapes)}; an array has one")
    ((T, K),) = shapes
    ids_TLK = np.full((T, L, K), UNUSED, dtype=np.int32)
    for name, record in records.items():
        unused_TK = record.expert_ids_TK == UNUSED
        ids_TLK[:, int(name)] = record.expert_ids_TK
        if padding == "arange":
            empty_T = unused_TK.all(axis=-1)
            t = int(np.argmax(unused_TK.any(axis=-1) & ~empty_T)) if T else 0
            require(
                bool((unused_TK.any(axis=-1) == empty_T).all()),
                f"records[{name!r}]: token {t} has some unused slots; with padding 'arange' it has all or none",
            )
            ids_TLK[empty_T, int(name)] = np.arange(K)
    return ids_TLK


def served_base64(ids_TLK: np.ndarray) -> str:
    """The array as SGLang hands it over: int32, flat, in base64."""
    return base64.b64encode(np.ascontiguousarray(ids_TLK, dtype="<i4").tobytes()).decode("ascii")
