"""conformance, small worlds of dispatch: every assignment of a few tokens to a few experts, on two and three ranks.

A slot is unused, or has any expert; the experts of a token are distinct, in any order. What this covers needs no
luck. It leaves out more tokens, more experts, and loads that only many tokens make.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from conformance.layer.draw import SIGMOID
from conformance.sharded.case import LayoutCase
from moe_ref import UNUSED, ExpertSpec, LayerParams, LayerSpec, RouterSpec
from moe_ref.specs.layout import STRATEGY_FACTS, ShardLayout

SIZES = (
    # ranks, experts, top_k, tokens of each shard
    (2, 4, 1, (2, 1)),
    (2, 4, 1, (1, 1)),
    (2, 2, 2, (1, 2)),
    (2, 4, 2, (1, 1)),
    (3, 3, 1, (1, 2, 1)),
    (3, 3, 1, (1, 1, 1)),
)


def worlds_of_dispatch() -> list[LayoutCase]:
    """One case of each world, with every slot unused; where nodes count, with one for each rank."""
    found = []
    for (ranks, E, K, tokens), (strategy, facts) in product(SIZES, STRATEGY_FACTS.items()):
        shards = tokens[:1] if facts.shares_tokens else tokens
        nodes: dict[str, Any] = {"ranks_per_node": 1} if facts.by_node else {}
        layout = ShardLayout(expert=ranks, strategy=strategy, **nodes)
        router = RouterSpec(num_experts=E, top_k=K, **SIGMOID, selector="given")
        spec = LayerSpec(router=router, experts=ExpertSpec(dim=2, hidden_dim=2))
        found.append(_case(spec, layout, shards, LayerParams.init(spec, 0), np.full((sum(shards), K), UNUSED)))
    return found


def assignments(world: LayoutCase) -> Iterator[LayoutCase]:
    """Every assignment of a world."""
    router = world.spec.router
    slots = product((UNUSED, *range(router.num_experts)), repeat=router.top_k)
    tokens = [ids for ids in slots if len({i for i in ids if i >= 0}) == sum(i >= 0 for i in ids)]
    for assignment in product(tokens, repeat=world.num_tokens):
        ids_TK = np.array(assignment, dtype=np.int64).reshape(-1, router.top_k)
        yield _case(world.spec, world.layout, world.tokens_per_shard, world.params, ids_TK)


def _case(spec: LayerSpec, layout: ShardLayout, tokens_per_shard, params: LayerParams, ids_TK) -> LayoutCase:
    nothing = np.zeros((len(ids_TK), spec.experts.dim))
    inputs = {"given_ids_TK": ids_TK}
    return LayoutCase(spec=spec, layout=layout, tokens_per_shard=tokens_per_shard, params=params, x_TD=nothing,
                      d_output_TD=nothing, inputs=inputs)  # fmt: skip
