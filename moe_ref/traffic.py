"""moe_ref, traffic: how many rows each rank sends to each other rank, from a plan, and from counts alone.

Traffic is that of one rank group in one pass forward: out, to the experts, and back. A row has D numbers, whether it
is a token or a partial sum; ids, weights and sizes are not counted. The pass backward moves as much again, the other
way. What a rank has for itself is counted on the diagonal, and crosses no link.

Which rows go where is the strategy's (`strategies/`).

Legend: K top_k, B tokens of a block, E experts, S ranks of a rank group, M nodes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from moe_ref.specs.checks import array, integer
from moe_ref.specs.layout import ShardLayout
from moe_ref.specs.router import RouterSpec
from moe_ref.strategies import STRATEGIES
from moe_ref.strategies.base import Demand, RankPlan


@dataclass(frozen=True, kw_only=True)
class Split:
    """Rows by how far they go."""

    on_rank: int
    inside: int
    """To another rank of the same node."""
    across: int
    """To another node."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Rows on every link of one rank group; row: the sender, column: the receiver."""

    node_size: int
    """Ranks of one node."""
    out_SS: np.ndarray
    back_SS: np.ndarray

    @property
    def out(self) -> Split:
        """All rows on the way to the experts."""
        return split(self.out_SS, self.node_size)

    @property
    def back(self) -> Split:
        """All rows on the way back."""
        return split(self.back_SS, self.node_size)

    @property
    def between_nodes_MM(self) -> np.ndarray:
        """Rows out and back between each two nodes; on the diagonal those inside a node."""
        M, n = len(self.out_SS) // self.node_size, self.node_size
        return (self.out_SS + self.back_SS).reshape(M, n, M, n).sum(axis=(1, 3))

    @property
    def across_by_rank_S(self) -> np.ndarray:
        """Rows that each rank sends to or gets from other nodes, whichever is more: what its link has to carry."""
        both_SS = self.out_SS + self.back_SS
        far_SS = np.where(_same_node(len(both_SS), self.node_size), 0, both_SS)
        return np.maximum(far_SS.sum(axis=0), far_SS.sum(axis=1))


def split(rows_SS: np.ndarray, node_size: int) -> Split:
    """Rows that stay on a rank, go to another rank of the node, and go to another node."""
    on_rank = int(np.trace(rows_SS))
    near = int(rows_SS[_same_node(len(rows_SS), node_size)].sum())
    return Split(on_rank=on_rank, inside=near - on_rank, across=int(rows_SS.sum()) - near)


def bytes_of(rows: int, dim: int, bytes_per_number: int) -> int:
    """Bytes of rows of this width."""
    return rows * dim * bytes_per_number


def _same_node(num_ranks: int, node_size: int) -> np.ndarray:
    node_S = np.arange(num_ranks) // node_size
    return node_S[:, None] == node_S


# From a plan: what each rank is told to send, link by link.


def exact_traffic(plans: Sequence[RankPlan], layout: ShardLayout) -> Traffic:
    """The traffic of one rank group, from the plans of its ranks.

    Args:
        plans: those of the ranks of one rank group, in their order.
        layout: that of the plans.
    """
    links = STRATEGIES[layout.strategy].exact_links(plans, layout)
    return Traffic(node_size=layout.node_size, out_SS=links.out_SS, back_SS=links.back_SS)


# From counts alone: no row is named, so that a million tokens on thousands of ranks fit in memory.


def demand(blocks: Iterable[tuple[int, np.ndarray]], layout: ShardLayout, router: RouterSpec) -> list[Demand]:
    """The demand of each rank group.

    Args:
        blocks: (token shard, (B, K) expert ids) in any order and of any size, each token once; -1 in unused slots.
        layout, router: which shards there are, and who owns which expert.
    """
    layout.check(router)
    S, M, sources = layout.expert, layout.num_nodes, layout.shards_per_group
    owner_E = np.zeros(router.num_experts, np.int64)
    for e in range(S):
        owner_E[list(layout.experts_of(e, router.num_experts))] = e
    found = [
        Demand(
            tokens_S=np.zeros(sources, np.int64),
            slots_SS=np.zeros((sources, S), np.int64),
            tokens_SM=np.zeros((sources, M), np.int64),
        )
        for _ in range(layout.num_rank_groups)
    ]
    for shard, ids in blocks:
        integer("shard", shard, 0, layout.num_token_shards - 1, why="num_token_shards")
        ids_BK = array("expert_ids", ids, (None, router.top_k), kind="int")
        group, source = divmod(shard, sources)
        is_row_BK = (ids_BK >= 0) & (ids_BK < router.num_experts)
        owner_BK = owner_E[np.where(is_row_BK, ids_BK, 0)]
        found[group].tokens_S[source] += len(ids_BK)
        found[group].slots_SS[source] += np.bincount(owner_BK[is_row_BK], minlength=S)
        # One column more, for slots that are no rows.
        has_BM = np.zeros((len(ids_BK), M + 1), bool)
        node_BK = np.where(is_row_BK, owner_BK // layout.node_size, M)
        has_BM[np.arange(len(ids_BK))[:, None], node_BK] = True
        found[group].tokens_SM[source] += has_BM[:, :M].sum(axis=0)
    return found


def counted_traffic(asked: Demand, layout: ShardLayout, router: RouterSpec) -> Traffic:
    """The traffic of one rank group, from the demand of its tokens."""
    links = STRATEGIES[layout.strategy].counted_links(asked, layout, router)
    return Traffic(node_size=layout.node_size, out_SS=links.out_SS, back_SS=links.back_SS)
