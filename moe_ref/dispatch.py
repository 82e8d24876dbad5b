"""moe_ref, dispatch: which rows each rank sends, receives and works on, as the strategy of a layout plans it.

Each rank group plans by itself. How rows are named, sent and sorted is in `strategies/rows.py`; what each strategy
does with them is in its own file there.

Legend: T tokens, K top_k.
"""

from collections.abc import Sequence

import numpy as np

from moe_ref.specs.checks import array, entries, require
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.layout import ShardLayout
from moe_ref.specs.router import RouterSpec
from moe_ref.strategies import STRATEGIES
from moe_ref.strategies.base import RankPlan


def plan(
    expert_ids_by_shard: Sequence[np.ndarray], layout: ShardLayout, spec: RouterSpec | LayerSpec
) -> list[RankPlan]:
    """What every rank sends, receives and works on, for ranks (data, fsdp, expert) in their order. [DSP-2 .. DSP-6]

    Args:
        expert_ids_by_shard: for each token shard (T, K) integers: expert ids, null experts, or -1 in unused slots. The
            experts of a token are distinct.
        layout: of one exchange; `plan_chunks` is for those with token chunks.
        spec: of the router or the layer.

    Raises:
        ValueError: the layout does not fit the spec, or the ids fit neither; it names field, value and bound.
    """
    router = spec.router if isinstance(spec, LayerSpec) else spec
    require(
        layout.num_token_chunks == 1,
        f"num_token_chunks is {layout.num_token_chunks}; plan is for one exchange, plan_chunks for one of each chunk",
    )
    layout.check(spec)
    ids_by_shard = checked_ids(expert_ids_by_shard, layout, router)
    plans = []
    for group in range(layout.num_rank_groups):
        ids_of_group = [ids_by_shard[shard] for shard in layout.shards_of_group(group)]
        plans += STRATEGIES[layout.strategy].plan(ids_of_group, layout, router, group)
    return plans


def plan_chunks(
    expert_ids_by_shard: Sequence[np.ndarray], layout: ShardLayout, spec: RouterSpec | LayerSpec
) -> list[list[RankPlan]]:
    """A plan for each token chunk; its slots are numbered from the first token of the chunk."""
    router = spec.router if isinstance(spec, LayerSpec) else spec
    ids_by_shard = checked_ids(expert_ids_by_shard, layout, router)
    chunks_by_shard = [[ids_TK[chunk] for chunk in layout.chunks(len(ids_TK))] for ids_TK in ids_by_shard]
    one_exchange = layout.replace(num_token_chunks=1)
    return [plan(ids_of_chunk, one_exchange, spec) for ids_of_chunk in zip(*chunks_by_shard, strict=True)]


def checked_ids(expert_ids_by_shard: Sequence[np.ndarray], layout: ShardLayout, router: RouterSpec) -> list[np.ndarray]:
    """The ids as arrays: one for each token shard, of its tokens, in bounds, distinct for each token."""
    given = list(expert_ids_by_shard)
    require(
        len(given) == layout.num_token_shards,
        f"expert_ids_by_shard has {len(given)} entries; the layout has {layout.num_token_shards} token shards",
    )
    ids_by_shard = []
    for shard, ids in enumerate(given):
        field = f"expert_ids_by_shard[{shard}]"
        ids_TK = array(field, ids, (None, router.top_k), kind="int").astype(np.int64)
        bound = router.num_choices
        entries(field, ids_TK, (ids_TK >= -1) & (ids_TK < bound), f"ids are -1, or at least 0 and less than {bound}")
        entries(field, ids_TK, _distinct(ids_TK), "the experts of a token are distinct")
        ids_by_shard.append(ids_TK)
    return ids_by_shard


def _distinct(ids_TK: np.ndarray) -> np.ndarray:
    """Whether the used ids of each token are distinct."""
    used = [[int(i) for i in ids if i >= 0] for ids in ids_TK]
    return np.array([len(set(ids)) == len(ids) for ids in used], dtype=bool)
