"""moe_ref, strategy replicated: every rank of a rank group has its tokens, and picks the rows of its own experts.

Out: nothing. Back: partial sums are reduced, scattered and gathered.

Legend: S ranks of a rank group.
"""

from collections.abc import Sequence

import numpy as np

from moe_ref.specs.layout import ShardLayout, even_pieces
from moe_ref.specs.router import RouterSpec
from moe_ref.strategies.base import Demand, Links, RankPlan, Strategy
from moe_ref.strategies.ring import gathered, reduced
from moe_ref.strategies.rows import exchange, pick_by_expert, rank_plan


class Replicated(Strategy):
    """One token shard for the whole rank group."""

    name = "replicated"

    def plan(
        self, ids_by_source: Sequence[np.ndarray], layout: ShardLayout, router: RouterSpec, group: int
    ) -> list[RankPlan]:
        """Nothing is sent: every rank has the tokens of the one shard. Its rows have itself as their source."""
        (ids_TK,) = ids_by_source
        ranks = range(layout.expert)
        nothing, _ = exchange([[[] for _ in ranks] for _ in ranks], room=None)
        tokens = [(0, token) for token in range(len(ids_TK))]
        plans = []
        for e in ranks:
            order, arrival, sizes = pick_by_expert(tokens, [ids_TK], layout.experts_of(e, router.num_experts))
            own_order = [(e, slot) for _, slot in order]
            plans.append(rank_plan(nothing[e], group, e, len(ids_TK), own_order, arrival, sizes))
        return plans

    def exact_links(self, plans: Sequence[RankPlan], layout: ShardLayout) -> Links:
        """An all-reduce of the one shard."""
        return _all_reduce(plans[0].num_tokens, layout.expert)

    def counted_links(self, asked: Demand, layout: ShardLayout, router: RouterSpec) -> Links:
        """An all-reduce of all tokens."""
        return _all_reduce(int(asked.tokens_S.sum()), layout.expert)


def _all_reduce(num_tokens: int, num_ranks: int) -> Links:
    """Round the ring twice: each rank reduces its piece of the tokens, and the sums are gathered."""
    pieces_S = np.array(even_pieces(num_tokens, num_ranks))
    back_SS = reduced(pieces_S) + gathered(pieces_S)
    return Links(np.zeros_like(back_SS), back_SS)


REPLICATED = Replicated()
