"""moe_ref, strategies: what a strategy is asked, and what its answers are made of.

Everything is defined inside one rank group (`specs/layout.py`); tensor ranks do the same.

Legend: T tokens, K top_k, E experts, e experts on this rank, S ranks of a rank group, M nodes, N rows sent,
R rows worked on.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moe_ref.specs.layout import STRATEGY_FACTS, ShardLayout, StrategyFacts
from moe_ref.specs.router import RouterSpec

Row = tuple[int, int]
"""(source, slot); or (source, token), where whole tokens are sent."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One rank's part in one exchange: rows [input_offsets[r], + send_sizes[r]) of what it has go to rank r."""

    sends_N2: np.ndarray
    """(source, slot), or (source, token): what it has to send, in sending order."""
    send_sizes_S: np.ndarray
    """Rows that go to each rank, itself included."""
    recv_sizes_S: np.ndarray
    """Rows that come from each rank, itself included."""
    input_offsets_S: np.ndarray
    """Where in `sends_N2` the rows for each rank begin."""
    output_offsets_S: np.ndarray
    """Where in the buffer of each rank the rows from this one begin."""


@dataclass(frozen=True, kw_only=True)
class RankPlan(Exchange):
    """What one rank sends, receives and works on. The exchange of node_dedup here is its second, inside a node; that of
    replicated_ragged is of the rows that come back."""

    group: int
    """The rank group: d * fsdp + f."""
    e: int
    """The rank on the expert axis."""
    num_tokens: int
    """Tokens of its token shard."""
    order_R2: np.ndarray
    """(source, slot) of each row that it works on, sorted by its experts. A replicated row has itself as source."""
    arrival_R: np.ndarray
    """Where each of these rows lies in what it received: a row, or a token with ring_of_experts and what is
    replicated."""
    group_sizes_e: np.ndarray
    """Rows of each of its experts, in the order of their places."""
    dropped_slots_N: np.ndarray
    """Slots of its own tokens that found no room at their receiver."""
    overflow: int
    """Rows that it had no room for."""
    buffer_rows: int | None
    """Rows that it has room for; None where there is no fixed buffer."""
    across: Exchange | None
    """node_dedup alone: the first exchange, of tokens, between ranks of the same position on their nodes."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What the tokens of one rank group ask for, in numbers. Sources are its token shards."""

    tokens_S: np.ndarray
    """Tokens of each source."""
    slots_SS: np.ndarray
    """(source, rank): slots of each source whose expert each rank owns."""
    tokens_SM: np.ndarray
    """(source, node): tokens of each source with at least one expert on each node."""


class Links(NamedTuple):
    """Rows on every link of one rank group; row: the sender, column: the receiver, diagonal: what stays."""

    out_SS: np.ndarray
    """To the experts."""
    back_SS: np.ndarray
    """And back."""


class Strategy(ABC):
    """One way in which rows reach their experts and come back. A file of this folder has one, and says which."""

    name: str

    @property
    def facts(self) -> StrategyFacts:
        """What a layout knows of it."""
        return STRATEGY_FACTS[self.name]

    @abstractmethod
    def plan(
        self, ids_by_source: Sequence[np.ndarray], layout: ShardLayout, router: RouterSpec, group: int
    ) -> list[RankPlan]:
        """A plan for each rank of one rank group.

        Args:
            ids_by_source: for each token shard of the group (T, K) expert ids, checked.
            group: the number of the rank group.
        """

    @abstractmethod
    def exact_links(self, plans: Sequence[RankPlan], layout: ShardLayout) -> Links:
        """What travels, from the plans of the ranks of one rank group, in their order."""

    @abstractmethod
    def counted_links(self, asked: Demand, layout: ShardLayout, router: RouterSpec) -> Links:
        """The same, from counts alone."""

    def num_partials(self, layout: ShardLayout) -> int:
        """The routed output of a token is the sum of so many partial sums; 1 where its rows come back as they went."""
        return {"one": 1, "rank": layout.expert, "node": layout.num_nodes}[self.facts.partial_sums]

    def partial_of(self, e: int, layout: ShardLayout) -> int:
        """The partial sum that the rows of rank e of the expert axis are part of."""
        return {"one": 0, "rank": e, "node": layout.node_of(e)}[self.facts.partial_sums]
