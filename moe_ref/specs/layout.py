"""moe_ref, the layout: how one layer lies over ranks. A layout says where, never what: no layout changes a result.

    mesh: data x fsdp x expert x tensor          rank = ((d * fsdp + f) * expert + e) * tensor + t

* data, fsdp: other tokens, the same layer. Over fsdp each parameter is stored in pieces and gathered before use.
* expert: each rank of this axis owns num_experts / expert experts. The ranks that differ in it alone are a
  rank group; rows travel inside it and nowhere else. Nodes are runs of consecutive ranks of this axis.
* tensor: each rank has a slice of F of the routed experts; its outputs are partial sums. Shared experts are whole.

A token shard is the tokens of one rank, counted before the tensor axis: tensor ranks share their shard's tokens.
How many tokens a shard has is the batch's, not the layout's: uneven, and 0, is allowed.
With some strategies ("replicated") the ranks of a rank group share them too.

Legend: T tokens, D model dim, F expert hidden dim, E experts, e experts on this rank, K top_k, S ranks, R rows.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

from moe_ref.specs.base import Spec
from moe_ref.specs.checks import integer, number, one_axis, one_of, require
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.router import RouterSpec

AXES = ("data", "fsdp", "expert", "tensor")
"""The axes of the mesh; ranks are numbered with the last one fastest."""


@dataclass(frozen=True, kw_only=True)
class StrategyFacts:
    """What a dispatch strategy is to a layout, and to whoever lays out a layer. How it moves rows is not data."""

    summary: str
    """What travels, in one sentence."""
    shares_tokens: bool = False
    """The ranks of a rank group have the same tokens: they are one token shard."""
    has_buffer: bool = False
    """A receiver has a buffer of fixed size, which buffer_factor may make too small."""
    by_node: bool = False
    """Which ranks are on one node decides what travels."""
    partial_sums: str = "one"
    """How the output of a token is added up: "one" sum of all its rows; or partial sums, one of each "rank" of the
    expert axis, or of each "node"."""


STRATEGY_FACTS: dict[str, StrategyFacts] = {
    "all_to_all": StrategyFacts(summary="A rank sends each slot to the owner of its expert, in exact splits."),
    "ragged_all_to_all": StrategyFacts(
        summary="The same, into a receive buffer of fixed size; what finds no room is dropped.", has_buffer=True
    ),
    "ring_of_experts": StrategyFacts(
        summary="Tokens are gathered over the rank group, and partial outputs reduce-scattered; what finds no room in "
        "a bounded buffer is dropped.",
        has_buffer=True,
        partial_sums="rank",
    ),
    "replicated": StrategyFacts(
        summary="The rank group shares its tokens, nothing is sent, and partial outputs are summed.",
        shares_tokens=True,
        partial_sums="rank",
    ),
    "node_dedup": StrategyFacts(
        summary="A token crosses once to each node that has experts of it, then fans out inside the node.",
        by_node=True,
        partial_sums="node",
    ),
    "replicated_ragged": StrategyFacts(
        summary="The rank group shares its tokens, nothing is sent, and what the experts of a rank return goes to all, "
        "by a ragged all-to-all.",
        shares_tokens=True,
    ),
}
"""The strategies by name, and the one list of them that needs no algorithm. `moe_ref.strategies` has those."""


def even_pieces(total: int, num_pieces: int) -> tuple[int, ...]:
    """Sizes of pieces as even as can be: the first total % num_pieces have one more."""
    size, larger = divmod(total, num_pieces)
    return tuple(size + (piece < larger) for piece in range(num_pieces))


@dataclass(frozen=True, kw_only=True)
class ShardLayout(Spec):
    """Where the tokens and the parameters of a layer are, and how rows reach their experts.

    Raises:
        ValueError: a field is out of its range, or two fields contradict each other. What depends on the sizes of a
            layer is checked by `check(spec)`.
    """

    # mesh
    data: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

    strategy: str = "all_to_all"
    """A name of `STRATEGY_FACTS`, which says what each is."""
    placement: tuple[int, ...] | None = None
    """placement[i] is the expert at place i; rank e of the expert axis owns places [e*E/expert, (e+1)*E/expert).
    None: expert i at place i."""
    ranks_per_node: int | None = None
    """Of the expert axis; None: the whole axis is one node."""
    groups_per_node: int | None = None
    """A promise that `check` holds the router to: each node has this many whole expert groups of the router, so that
    node-limited routing limits nodes. None: groups may lie anyhow."""
    num_token_chunks: int = 1
    """Each shard's tokens are worked on in this many chunks, one exchange each. See `chunk_sizes`."""
    num_emb_chunks: int = 1
    """The gate and up projections are summed over this many equal pieces of D."""
    buffer_factor: float | None = None
    """Of a strategy that has a buffer: a receiver has room for this many times the rows of balanced load. None: for the
    worst case. See `buffer_rows`."""

    def __post_init__(self):
        super().__post_init__()
        for field in ("data", "fsdp", "expert", "tensor", "num_token_chunks", "num_emb_chunks"):
            integer(field, getattr(self, field), 1)
        one_of("strategy", self.strategy, STRATEGY_FACTS)
        if self.placement is not None:
            object.__setattr__(self, "placement", _ints("placement", self.placement))
            require(
                sorted(self.placement) == list(range(len(self.placement))),
                f"placement is {self.placement}; it has each of 0 .. {len(self.placement) - 1} once",
            )
        self._check_nodes()
        self._check_buffer()

    def _check_nodes(self):
        if self.ranks_per_node is not None:
            integer("ranks_per_node", self.ranks_per_node, 1, self.expert, why="the expert axis")
            require(
                self.expert % self.ranks_per_node == 0,
                f"ranks_per_node is {self.ranks_per_node}, which does not divide the expert axis ({self.expert})",
            )
        if self.groups_per_node is not None:
            integer("groups_per_node", self.groups_per_node, 1)

    def _check_buffer(self):
        if self.buffer_factor is not None:
            number("buffer_factor", self.buffer_factor, above=0.0)
            with_buffer = ", ".join(repr(name) for name, facts in STRATEGY_FACTS.items() if facts.has_buffer)
            require(
                self.facts.has_buffer,
                f"buffer_factor is {self.buffer_factor!r} with strategy {self.strategy!r}; it is of {with_buffer}",
            )

    def check(self, spec: RouterSpec | LayerSpec) -> None:
        """The layout fits the layer: what is split is split evenly, and groups lie where groups_per_node says."""
        router = spec.router if isinstance(spec, LayerSpec) else spec
        integer("expert", self.expert, 1, router.num_experts, why="num_experts")
        require(
            router.selector != "expert_choice" or self.num_token_shards == 1,
            f"selector is 'expert_choice' over {self.num_token_shards} token shards; an expert takes tokens of a whole "
            "batch, and a rank sees its own shard alone",
        )
        _divides("expert", self.expert, "num_experts", router.num_experts)
        if self.placement is not None:
            require(
                len(self.placement) == router.num_experts,
                f"placement has {len(self.placement)} entries; num_experts is {router.num_experts}",
            )
        if self.groups_per_node is not None:
            self._check_groups(router, self.groups_per_node)
        if isinstance(spec, LayerSpec):
            _divides("tensor", self.tensor, "hidden_dim", spec.experts.hidden_dim)
            _divides("num_emb_chunks", self.num_emb_chunks, "dim", spec.routed_experts.dim)

    def _check_groups(self, router: RouterSpec, groups_per_node: int):
        groups = router.num_expert_groups
        require(
            groups is not None, f"groups_per_node is {groups_per_node}, but num_expert_groups of the router is None"
        )
        require(
            groups_per_node * self.num_nodes == groups,
            f"groups_per_node is {groups_per_node}; {self.num_nodes} nodes of that many groups are not the router's "
            f"{groups}",
        )
        for expert_id in range(router.num_experts):
            first_of_group = expert_id - expert_id % router.experts_per_group
            node = self.node_of(self.owner_of(expert_id, router.num_experts))
            home = self.node_of(self.owner_of(first_of_group, router.num_experts))
            require(
                node == home,
                f"groups_per_node is {groups_per_node}, but group {expert_id // router.experts_per_group} straddles "
                f"nodes: expert {first_of_group} is on node {home}, expert {expert_id} on node {node}",
            )

    @property
    def facts(self) -> StrategyFacts:
        """What its strategy is."""
        return STRATEGY_FACTS[self.strategy]

    # ranks and shards

    @property
    def num_ranks(self) -> int:
        """All ranks of the mesh."""
        return self.data * self.fsdp * self.expert * self.tensor

    @property
    def num_rank_groups(self) -> int:
        """Sets of ranks that exchange rows with each other, not counting the tensor axis: data * fsdp."""
        return self.data * self.fsdp

    @property
    def num_token_shards(self) -> int:
        """Token shards of the mesh: (data, fsdp, expert) in rank order; (data, fsdp) where ranks share tokens."""
        return self.num_rank_groups * self.shards_per_group

    @property
    def shards_per_group(self) -> int:
        """Token shards of one rank group: one for each of its ranks, or one in all where it is replicated."""
        return 1 if self.facts.shares_tokens else self.expert

    def rank(self, d: int, f: int, e: int, t: int = 0) -> int:
        """The number of the rank at these coordinates."""
        return ((d * self.fsdp + f) * self.expert + e) * self.tensor + t

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """(d, f, e, t) of a rank; the inverse of `rank`."""
        integer("rank", rank, 0, self.num_ranks - 1)
        rest, t = divmod(rank, self.tensor)
        rest, e = divmod(rest, self.expert)
        return *divmod(rest, self.fsdp), e, t

    def group_of(self, rank: int) -> int:
        """The rank group of a rank: d * fsdp + f."""
        d, f, _, _ = self.coordinates(rank)
        return d * self.fsdp + f

    def shard_of(self, rank: int) -> int:
        """The token shard of a rank."""
        _, _, e, _ = self.coordinates(rank)
        return self.group_of(rank) * self.shards_per_group + (0 if self.shards_per_group == 1 else e)

    def shards_of_group(self, group: int) -> range:
        """The token shards of a rank group, in rank order."""
        return range(group * self.shards_per_group, (group + 1) * self.shards_per_group)

    # experts

    def experts_of(self, e: int, num_experts: int) -> tuple[int, ...]:
        """The experts that rank e of the expert axis owns, in the order of their places."""
        integer("e", e, 0, self.expert - 1, why="the expert axis")
        per_rank = num_experts // self.expert
        return self._placed(num_experts)[e * per_rank : (e + 1) * per_rank]

    def place_of(self, expert_id: int, num_experts: int) -> int:
        """The place of an expert: places count through the ranks of the expert axis."""
        return self._placed(num_experts).index(expert_id)

    def owner_of(self, expert_id: int, num_experts: int) -> int:
        """The rank of the expert axis that owns an expert."""
        return self.place_of(expert_id, num_experts) // (num_experts // self.expert)

    def experts_of_node(self, node: int, num_experts: int) -> tuple[int, ...]:
        """The experts that the ranks of a node own, in the order of their places."""
        integer("node", node, 0, self.num_nodes - 1, why="num_nodes")
        per_node = num_experts // self.num_nodes
        return self._placed(num_experts)[node * per_node : (node + 1) * per_node]

    def _placed(self, num_experts: int) -> tuple[int, ...]:
        return tuple(range(num_experts)) if self.placement is None else self.placement

    # nodes

    @property
    def node_size(self) -> int:
        """Ranks of the expert axis on one node."""
        return self.expert if self.ranks_per_node is None else self.ranks_per_node

    @property
    def num_nodes(self) -> int:
        """Nodes of one rank group."""
        return self.expert // self.node_size

    def node_of(self, e: int) -> int:
        """The node of rank e of the expert axis."""
        return e // self.node_size

    # chunks and buffers

    def chunk_sizes(self, num_tokens: int) -> tuple[int, ...]:
        """Chunks are consecutive tokens, as even as can be: the first num_tokens % num_token_chunks have one more."""
        return even_pieces(num_tokens, self.num_token_chunks)

    def chunks(self, num_tokens: int) -> list[slice]:
        """The tokens of each chunk, of a shard of so many."""
        ends = accumulate(self.chunk_sizes(num_tokens), initial=0)
        return [slice(begin, end) for begin, end in pairwise(ends)]

    def buffer_rows(self, num_tokens: int, num_experts: int, top_k: int) -> int:
        """Rows that a rank has room for, for a rank group of num_tokens tokens (of one chunk): ragged_all_to_all
        receives them, ring_of_experts picks them out of the tokens of all.

        Balanced load is B = num_tokens * top_k / expert rows on each rank. The experts of a token are distinct, so a
        rank receives at most min(top_k, E / expert) rows of a token: never more than the worst case
        num_tokens * min(top_k, E / expert), which is B * min(expert, E / top_k). The buffer has that many rows, or
        ceil(B * buffer_factor) where that is less; the factor is the decimal number it prints as.
        """
        worst = num_tokens * min(top_k, num_experts // self.expert)
        if self.buffer_factor is None:
            return worst
        balanced = Fraction(num_tokens * top_k, self.expert)
        return min(worst, math.ceil(balanced * Fraction(repr(float(self.buffer_factor)))))


def _ints(field: str, values: Any) -> tuple[int, ...]:
    """Natural numbers as a tuple, from any sequence of them (JSON has lists)."""
    found = one_axis(field, values)
    for index, value in enumerate(found):
        integer(f"{field}[{index}]", value, 0)
    return found


def _divides(field: str, value: int, of_field: str, of_value: int) -> None:
    require(of_value % value == 0, f"{field} is {value}, which does not divide {of_field} ({of_value})")
