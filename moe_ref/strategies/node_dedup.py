"""moe_ref, strategy node_dedup: a token is sent once to each node that has experts of it, then each slot to its owner.

Out: tokens across nodes, slots inside. Back: the same, partial sums across nodes.

Legend: T tokens, K top_k, S ranks of a rank group, M nodes.
"""

from collections.abc import Sequence

import numpy as np

from moe_ref.specs.layout import ShardLayout
from moe_ref.specs.router import RouterSpec
from moe_ref.strategies.base import Demand, Links, RankPlan, Row, Strategy
from moe_ref.strategies.rows import exchange, pick_by_expert, rank_plan, sort_by_expert


class NodeDedup(Strategy):
    """A token crosses to a node once, and fans out inside it.

    It lands on the rank with the position on that node that its own rank has on its own (section 3.2.2 of
    arXiv:2412.19437), so on its own node it lands where it is. From there each slot of this node goes to the owner of
    its expert. Each landed token is followed by its ids and weights, which are not counted.
    """

    name = "node_dedup"

    def plan(
        self, ids_by_source: Sequence[np.ndarray], layout: ShardLayout, router: RouterSpec, group: int
    ) -> list[RankPlan]:
        """Two exchanges: of tokens across nodes, of slots inside each."""
        E, ranks = router.num_experts, range(layout.expert)
        crossing = [[tokens_for(ids_TK, source, r, layout, E) for r in ranks] for source, ids_TK in
                    enumerate(ids_by_source)]  # fmt: skip
        across, landed = exchange(crossing, room=None)
        fanning = [[fan_out(landed[at], ids_by_source, at, r, layout, E) for r in ranks] for at in ranks]
        inside, received = exchange(fanning, room=None)
        plans = []
        for e in ranks:
            worked = sort_by_expert(received[e], ids_by_source, layout.experts_of(e, E))
            plans.append(rank_plan(inside[e], group, e, len(ids_by_source[e]), *worked, across=across[e]))
        return plans

    def exact_links(self, plans: Sequence[RankPlan], layout: ShardLayout) -> Links:
        """Out: both exchanges. Back: as many rows, of which those across nodes are partial sums."""
        exchanges = [(part.across, part) for part in plans if part.across is not None]
        out_SS = np.stack([across.send_sizes_S + inside.send_sizes_S for across, inside in exchanges])
        return Links(out_SS, out_SS.T)

    def counted_links(self, asked: Demand, layout: ShardLayout, router: RouterSpec) -> Links:
        """Tokens go to where they land on each node, and from there each slot goes on."""
        out_SS = np.zeros_like(asked.slots_SS)
        for source in range(layout.expert):
            landing_M = np.arange(layout.num_nodes) * layout.node_size + source % layout.node_size
            out_SS[source, landing_M] += asked.tokens_SM[source]
            out_SS[np.repeat(landing_M, layout.node_size), np.arange(layout.expert)] += asked.slots_SS[source]
        return Links(out_SS, out_SS.T)


def tokens_for(ids_TK: np.ndarray, source: int, receiver: int, layout: ShardLayout, num_experts: int) -> list[Row]:
    """The tokens of one source that cross to the node of the receiver, if that is where they land."""
    if receiver % layout.node_size != source % layout.node_size:
        return []
    there = layout.experts_of_node(layout.node_of(receiver), num_experts)
    return [(source, token) for token, ids in enumerate(ids_TK.tolist()) if any(i in there for i in ids)]


def fan_out(
    landed: list[Row],
    ids_by_source: Sequence[np.ndarray],
    at: int,
    receiver: int,
    layout: ShardLayout,
    num_experts: int,
) -> list[Row]:
    """The rows of what landed at one rank for the experts of a rank of its node: by place, then as it landed."""
    if layout.node_of(at) != layout.node_of(receiver):
        return []
    return pick_by_expert(landed, ids_by_source, layout.experts_of(receiver, num_experts))[0]


NODE_DEDUP = NodeDedup()
