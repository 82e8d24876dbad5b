"""moe_ref, strategy ring_of_experts: every rank gets the tokens of all and picks the rows of its own experts.

Out: tokens are gathered. Back: partial sums are reduced and scattered. With a buffer_factor a rank has room for a fixed
number of rows: it keeps the first of them, sorted as it works on them, so that its later experts lose theirs first
(MaxText's ragged_buffer_factor with use_ring_of_experts). What it drops is counted.

Legend: S ranks of a rank group.
"""

from collections.abc import Sequence

import numpy as np

from moe_ref.specs.layout import ShardLayout
from moe_ref.specs.router import RouterSpec
from moe_ref.strategies.base import Demand, Links, RankPlan, Strategy
from moe_ref.strategies.ring import gathered, reduced
from moe_ref.strategies.rows import exchange, one_copy, pick_by_expert, rank_plan


class RingOfExperts(Strategy):
    """Tokens travel, not slots."""

    name = "ring_of_experts"

    def plan(
        self, ids_by_source: Sequence[np.ndarray], layout: ShardLayout, router: RouterSpec, group: int
    ) -> list[RankPlan]:
        """A rank sends its tokens to every rank (an all-gather); each picks the rows of its own experts."""
        ranks, room = range(layout.expert), self.room(sum(map(len, ids_by_source)), layout, router)
        tokens = [[(source, token) for token in range(len(ids_TK))] for source, ids_TK in enumerate(ids_by_source)]
        exchanges, received = exchange([[tokens[source] for _ in ranks] for source in ranks], room=None)
        picked = [pick_by_expert(received[e], ids_by_source, layout.experts_of(e, router.num_experts)) for e in ranks]
        lost = [row for order, _, _ in picked for row in order[room:]] if room is not None else []
        plans = []
        for e in ranks:
            order, arrival, sizes = picked[e]
            kept_e = np.diff(np.minimum(np.cumsum(sizes), len(order) if room is None else room), prepend=0)
            plans.append(
                rank_plan(
                    one_copy(exchanges[e], tokens[e]), group, e, len(ids_by_source[e]), order[:room], arrival[:room],
                    kept_e.tolist(),
                    dropped=sorted(slot for source, slot in lost if source == e),
                    overflow=len(order) - len(order[:room]), room=room,
                )
            )  # fmt: skip
        return plans

    def room(self, num_tokens: int, layout: ShardLayout, router: RouterSpec) -> int | None:
        """Rows that a rank has room for, in a rank group of so many tokens; None: as many as are its own."""
        if layout.buffer_factor is None:
            return None
        return layout.buffer_rows(num_tokens, router.num_experts, router.top_k)

    def exact_links(self, plans: Sequence[RankPlan], layout: ShardLayout) -> Links:
        """Round the ring, both ways."""
        return _round(np.array([part.num_tokens for part in plans]))

    def counted_links(self, asked: Demand, layout: ShardLayout, router: RouterSpec) -> Links:
        """Round the ring, both ways."""
        return _round(asked.tokens_S)


def _round(tokens_S: np.ndarray) -> Links:
    return Links(gathered(tokens_S), reduced(tokens_S))


RING_OF_EXPERTS = RingOfExperts()
