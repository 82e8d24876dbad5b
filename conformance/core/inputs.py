"""conformance, core: the further inputs that a method may get by name, so that `**inputs: Unpack[...]` names them.

Legend: T tokens, K top_k, E experts, V rows of a table.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from moe_ref import AlignSpec, CapacitySpec, RouterInputs


class SelectorInputs(TypedDict, total=False):
    """What the selector of a router reads besides the logits."""

    token_ids_T: np.ndarray
    table_VK: np.ndarray
    given_ids_TK: np.ndarray
    seed: int


class RouteInputs(SelectorInputs, total=False):
    """Of `route`."""

    learned_scale: np.ndarray
    logit_factors_TE: np.ndarray
    logit_noise_TE: np.ndarray
    token_mask_T: np.ndarray


class LayerInputs(SelectorInputs, total=False):
    """Of `layer`, `layer_gradients` and `record`, on one rank."""

    given_weights_TK: np.ndarray
    token_mask_T: np.ndarray
    capacity: CapacitySpec
    align: AlignSpec
    sequence_lengths: Sequence[int]


class CutLayerInputs(LayerInputs, total=False):
    """The same, of tokens that may be cut into shards."""

    tokens_per_shard: Sequence[int]


class ShardedInputs(TypedDict, total=False):
    """Of `sharded_layer` and `sharded_gradients`, but for a draw."""

    token_mask_by_shard: list[np.ndarray]
    token_ids_by_shard: list[np.ndarray]
    table_VK: np.ndarray
    given_ids_by_shard: list[np.ndarray]


class DrawnShardedInputs(ShardedInputs, total=False):
    """The same, of a subject that draws alike on all ranks."""

    seed: int


def split_inputs(inputs: Mapping[str, Any], kind: type) -> tuple[RouterInputs, dict[str, Any]]:
    """What the selector reads of named inputs, and the rest of them.

    Raises:
        TypeError: a name that the typed dict lacks; it would be silently ignored.
    """
    known = kind.__annotations__.keys()
    if unknown := inputs.keys() - known:
        raise TypeError(f"unknown inputs {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    return RouterInputs.from_named(inputs)
