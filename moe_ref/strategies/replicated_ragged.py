"""moe_ref, strategy replicated_ragged: as replicated, and each rank sends what its experts return to every rank.

Out: nothing. Back: one ragged all-to-all, into a buffer with a row for each slot. The rows of a rank, sorted by its
experts, come to lie behind those of the ranks before it: every rank has all rows sorted by place, and sums those of
each token itself. MaxText's form where the batch is not spread over the expert axis (`get_all_to_all_params` with
is_batch_sharded False).

Legend: T tokens, K top_k, S ranks of a rank group.
"""

from collections.abc import Sequence

import numpy as np

from moe_ref.specs.layout import ShardLayout
from moe_ref.specs.router import RouterSpec
from moe_ref.strategies.base import Demand, Links, RankPlan, Strategy
from moe_ref.strategies.rows import exchange, one_copy, pick_by_expert, rank_plan


class ReplicatedRagged(Strategy):
    """One token shard for the whole rank group; the exchange of a plan is the one on the way back."""

    name = "replicated_ragged"

    def plan(
        self, ids_by_source: Sequence[np.ndarray], layout: ShardLayout, router: RouterSpec, group: int
    ) -> list[RankPlan]:
        """A rank picks the rows of its own experts, as replicated does, and what they become goes to every rank."""
        (ids_TK,) = ids_by_source
        ranks, tokens = range(layout.expert), [(0, token) for token in range(len(ids_TK))]
        picked = [pick_by_expert(tokens, [ids_TK], layout.experts_of(e, router.num_experts)) for e in ranks]
        orders = [[(e, slot) for _, slot in picked[e][0]] for e in ranks]
        back, _ = exchange([[orders[e] for _ in ranks] for e in ranks], room=None)
        return [
            rank_plan(one_copy(back[e], orders[e]), group, e, len(ids_TK), orders[e], *picked[e][1:]) for e in ranks
        ]

    def exact_links(self, plans: Sequence[RankPlan], layout: ShardLayout) -> Links:
        """Out: nothing. Back: what each rank is told to send."""
        back_SS = np.stack([part.send_sizes_S for part in plans])
        return Links(np.zeros_like(back_SS), back_SS)

    def counted_links(self, asked: Demand, layout: ShardLayout, router: RouterSpec) -> Links:
        """The rows of each rank's experts to every rank."""
        back_SS = np.repeat(asked.slots_SS.sum(axis=0)[:, None], layout.expert, axis=1)
        return Links(np.zeros_like(back_SS), back_SS)


REPLICATED_RAGGED = ReplicatedRagged()
