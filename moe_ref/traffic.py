"""moe_ref, traffic: how many rows each rank sends to each other rank, from a plan, and from counts alone.

Traffic is that of one rank group in one pass forward: out, to the experts, and back. A row has D numbers, whether it
is a token or a partial sum; ids, weights and sizes are not counted. The pass backward moves as much again, the other
way. What a rank has for itself is counted on the diagonal, and crosses no link.

    all_to_all, ragged_all_to_all   out: each slot to the owner of its expert; back: the same rows return
    node_dedup                      out: tokens across nodes, slots inside; back: the same, partial sums across nodes
    ring_of_experts                 out: tokens are gathered; back: partial sums are reduced and scattered
    replicated                      out: nothing; back: partial sums are reduced, scattered and gathered

Gathering and reducing go round the ring of ranks, as on a TPU or with the ring algorithm of NCCL: a rank sends to the
next one alone, and passes on what it got.

Legend: T tokens, K top_k, E experts, S ranks of a rank group, N nodes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from moe_ref.dispatch import Exchange, RankPlan
from moe_ref.specs.checks import array, integer
from moe_ref.specs.layout import ShardLayout
from moe_ref.specs.router import RouterSpec


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
    def between_nodes_NN(self) -> np.ndarray:
        """Rows out and back between each two nodes; on the diagonal those inside a node."""
        N, n = len(self.out_SS) // self.node_size, self.node_size
        return (self.out_SS + self.back_SS).reshape(N, n, N, n).sum(axis=(1, 3))

    @property
    def across_by_rank_S(self) -> np.ndarray:
        """Rows that each rank sends to or gets from other nodes, whichever is more: what its link has to carry."""
        both_SS = self.out_SS + self.back_SS
        far_SS = np.where(_same_node(len(both_SS), self.node_size), 0, both_SS)
        return np.maximum(far_SS.sum(axis=0), far_SS.sum(axis=1))


def split(rows_SS, node_size: int) -> Split:
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
    out_SS = np.zeros((layout.expert, layout.expert), np.int64)
    back_SS = np.zeros_like(out_SS)
    if layout.strategy in ("ring_of_experts", "replicated"):
        tokens_S = plans[0].recv_sizes_S
        if layout.strategy == "replicated":
            tokens_S = np.array(even_pieces(layout.tokens_of_group(plans[0].group), layout.expert))
            _add_ring(back_SS, tokens_S, gathered=True)
        else:
            _add_ring(out_SS, tokens_S, gathered=True)
        _add_ring(back_SS, tokens_S, gathered=False)
        return Traffic(node_size=layout.node_size, out_SS=out_SS, back_SS=back_SS)
    for e, part in enumerate(plans):
        exchanges: list[Exchange] = [part] if part.across is None else [part.across, part]
        for exchange in exchanges:
            for receiver, rows in enumerate(exchange.send_sizes_S):
                out_SS[e, receiver] += rows
                back_SS[receiver, e] += rows
    return Traffic(node_size=layout.node_size, out_SS=out_SS, back_SS=back_SS)


def even_pieces(num_tokens: int, num_pieces: int) -> tuple[int, ...]:
    """Pieces as even as can be, the earlier ones larger: what each rank reduces of a replicated batch."""
    size, larger = divmod(num_tokens, num_pieces)
    return tuple(size + (piece < larger) for piece in range(num_pieces))


def _add_ring(rows_SS, tokens_S, *, gathered: bool) -> None:
    """Adds what each rank sends to the next: of all tokens, when gathering all but those the next one began with, when
    reducing all but its own, whose sum ends here. One rank sends nothing."""
    num_ranks = len(tokens_S)
    for e in range(num_ranks if num_ranks > 1 else 0):
        after = (e + 1) % num_ranks
        rows_SS[e, after] += tokens_S.sum() - tokens_S[after if gathered else e]


# From counts alone: no row is named, so that a million tokens on thousands of ranks fit in memory.


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What the tokens of one rank group ask for, in numbers. Sources are its token shards."""

    tokens_S: np.ndarray
    """Tokens of each source."""
    slots_SS: np.ndarray
    """(source, rank): slots of each source whose expert each rank owns."""
    tokens_SN: np.ndarray
    """(source, node): tokens of each source with at least one expert on each node."""


def demand(blocks: Iterable[tuple[int, np.ndarray]], layout: ShardLayout, router: RouterSpec) -> list[Demand]:
    """The demand of each rank group.

    Args:
        blocks: (token shard, (B, K) expert ids) in any order and of any size, each token once; -1 in unused slots.
        layout, router: which shards there are, and who owns which expert. tokens_per_shard is not looked at.
    """
    layout.check(router)
    S, N, sources = layout.expert, layout.num_nodes, layout.shards_per_group
    owner_E = np.zeros(router.num_experts, np.int64)
    for e in range(S):
        owner_E[list(layout.experts_of(e, router.num_experts))] = e
    found = [
        Demand(
            tokens_S=np.zeros(sources, np.int64),
            slots_SS=np.zeros((sources, S), np.int64),
            tokens_SN=np.zeros((sources, N), np.int64),
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
        has_BN = np.zeros((len(ids_BK), N + 1), bool)
        node_BK = np.where(is_row_BK, owner_BK // layout.node_size, N)
        has_BN[np.arange(len(ids_BK))[:, None], node_BK] = True
        found[group].tokens_SN[source] += has_BN[:, :N].sum(axis=0)
    return found


def counted_traffic(asked: Demand, layout: ShardLayout, router: RouterSpec) -> Traffic:
    """The traffic of one rank group, from the demand of its tokens."""
    S = layout.expert
    out_SS, back_SS = np.zeros((S, S), np.int64), np.zeros((S, S), np.int64)
    if layout.strategy == "replicated":
        pieces_S = np.array(even_pieces(int(asked.tokens_S.sum()), S))
        _add_ring(back_SS, pieces_S, gathered=False)
        _add_ring(back_SS, pieces_S, gathered=True)
    elif layout.strategy == "ring_of_experts":
        _add_ring(out_SS, asked.tokens_S, gathered=True)
        _add_ring(back_SS, asked.tokens_S, gathered=False)
    else:
        out_SS = _sent(asked, layout, router)
        back_SS = out_SS.T
    return Traffic(node_size=layout.node_size, out_SS=out_SS, back_SS=back_SS)


def _sent(asked: Demand, layout: ShardLayout, router: RouterSpec) -> np.ndarray:
    """Rows that each rank sends to each: slots, as far as there is room, or tokens across nodes and slots inside."""
    S = layout.expert
    if layout.strategy == "node_dedup":
        sent_SS = np.zeros((S, S), np.int64)
        for source in range(S):
            # Where its tokens land on each node, and from there each slot goes on.
            landing_N = np.arange(layout.num_nodes) * layout.node_size + source % layout.node_size
            sent_SS[source, landing_N] += asked.tokens_SN[source]
            sent_SS[np.repeat(landing_N, layout.node_size), np.arange(S)] += asked.slots_SS[source]
        return sent_SS
    if layout.strategy == "all_to_all":
        return asked.slots_SS
    room = layout.buffer_rows(int(asked.tokens_S.sum()), router.num_experts, router.top_k)
    before_SS = np.cumsum(asked.slots_SS, axis=0) - asked.slots_SS
    return np.clip(room - before_SS, 0, asked.slots_SS)
