"""moe_ref, strategy all_to_all: a rank sends each slot to the owner of its expert, and the same rows return.

Legend: S ranks of a rank group.
"""

from collections.abc import Sequence

import numpy as np

from moe_ref.specs.layout import ShardLayout
from moe_ref.specs.router import RouterSpec
from moe_ref.strategies.base import Demand, Links, RankPlan, Strategy
from moe_ref.strategies.rows import exchange, rank_plan, rows_for, sort_by_expert


class AllToAll(Strategy):
    """Exact splits: every row finds room."""

    name = "all_to_all"

    def plan(
        self, ids_by_source: Sequence[np.ndarray], layout: ShardLayout, router: RouterSpec, group: int
    ) -> list[RankPlan]:
        """A receiver admits rows while it has room: source by source, each in sending order."""
        E, ranks = router.num_experts, range(layout.expert)
        room = self.room(sum(map(len, ids_by_source)), layout, router)
        wanted = [[rows_for(ids_TK, source, layout.experts_of(r, E)) for r in ranks] for source, ids_TK in
                  enumerate(ids_by_source)]  # fmt: skip
        exchanges, received = exchange(wanted, room)
        plans = []
        for e in ranks:
            worked = sort_by_expert(received[e], ids_by_source, layout.experts_of(e, E))
            refused = [slot for r in ranks for _, slot in wanted[e][r][exchanges[e].send_sizes_S[r] :]]
            overflow = sum(len(wanted[source][e]) for source in ranks) - len(received[e])
            plans.append(
                rank_plan(
                    exchanges[e], group, e, len(ids_by_source[e]), *worked,
                    dropped=sorted(refused), overflow=overflow, room=room,
                )
            )  # fmt: skip
        return plans

    def room(self, num_tokens: int, layout: ShardLayout, router: RouterSpec) -> int | None:
        """Rows that a receiver has room for, in a rank group of so many tokens; None: as many as come."""
        return None

    def exact_links(self, plans: Sequence[RankPlan], layout: ShardLayout) -> Links:
        """Out: what each rank is told to send. Back: the same rows."""
        out_SS = np.stack([part.send_sizes_S for part in plans])
        return Links(out_SS, out_SS.T)

    def counted_links(self, asked: Demand, layout: ShardLayout, router: RouterSpec) -> Links:
        """Each slot to the owner of its expert, as far as there is room."""
        room = self.room(int(asked.tokens_S.sum()), layout, router)
        out_SS = asked.slots_SS
        if room is not None:
            before_SS = np.cumsum(out_SS, axis=0) - out_SS
            out_SS = np.clip(room - before_SS, 0, out_SS)
        return Links(out_SS, out_SS.T)


ALL_TO_ALL = AllToAll()
