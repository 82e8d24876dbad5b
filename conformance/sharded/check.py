"""conformance, sharded: its check, with the kinds of data that its cases are made of."""

from collections.abc import Callable
from dataclasses import dataclass

from conformance.core.case import Case
from conformance.layer.check import LayerCheck
from conformance.sharded.case import ShardedCase
from moe_ref.specs.layout import ShardLayout

PAST_A_BYTE = (300, 7)
"""A crowd past what a byte counts, and what bfloat16 does exactly."""


@dataclass(frozen=True, kw_only=True)
class ShardedCheck(LayerCheck):
    """A requirement of a layer laid over devices; its cases are ShardedCases."""

    case = ShardedCase

    layout: Callable[[ShardLayout], bool] = lambda layout: layout.buffer_factor is None
    """A small buffer loses rows, and most requirements are about layouts that lose none."""
    bias: tuple[str, ...] = ("none", "mixed", "crowded", "one_rank")
    """Kinds of expert_bias; with one_rank every token prefers the experts of one rank."""
    loads: tuple[str, ...] = ("even", "skewed", "one_expert", "one_rank", "unused")
    """Kinds of ids where they are given."""
    counts: tuple[str, ...] = ("equal", "uneven", "prime", "some_empty")
    """Kinds of token counts of the shards."""

    crowd: tuple[int, int] | None = None
    """Tokens of the first shard and of each other one, past what small dtypes count, in a further case of each
    strategy; None: there is no such case."""
    greatest_crowd: tuple[int, int] | None = None
    """The same in one case, of 4 slots for each token: past 65,535 slots, or past 32,767 rows of one expert."""

    def wants(self, case: Case) -> bool:
        return isinstance(case, ShardedCase) and super().wants(case) and self.layout(case.layout)
