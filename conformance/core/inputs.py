"""conformance, core: the further inputs that a method may get by name, so that `**inputs: Unpack[...]` names them.

Legend: T tokens, K top_k, E experts, V rows of a table.
"""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from moe_ref import CapacitySpec


class SelectorInputs(TypedDict, total=False):
    """What the selector of a router reads besides the logits."""

    token_ids_T: np.ndarray
    table_VK: np.ndarray
    given_ids_TK: np.ndarray
    seed: int


class RouteInputs(SelectorInputs, total=False):
    """Of `route`."""

    learned_scale: np.ndarray
    token_mask_T: np.ndarray


class LayerInputs(SelectorInputs, total=False):
    """Of `layer`, `layer_gradients` and `record`, on one rank."""

    given_weights_TK: np.ndarray
    token_mask_T: np.ndarray
    capacity: CapacitySpec
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
