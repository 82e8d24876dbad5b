"""conformance, the checks: requirements as code, which cases each wants, and the register of all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conformance.balance.case import LoadCase
from conformance.sharded.case import LayoutCase

if TYPE_CHECKING:
    from conformance.core.judge import Judge


@dataclass(frozen=True, kw_only=True)
class Check:
    """One requirement as code: which cases it wants, and what it does with one."""

    requirement: str
    run: Callable[["Judge", Any], None]
    method: str = "route"
    spec: Callable[[Any], bool] = lambda spec: True
    """Of a RouterSpec; of a LayerSpec where the check is a LayerCheck."""
    logits: tuple[str, ...] = ("separated", "normal", "large", "negative")
    bias: tuple[str, ...] = ("none", "mixed", "negative", "positive")
    inputs: tuple[str, ...] = ()
    dtype: str = "float32"
    tokens: tuple[int, ...] = (7, 1)
    after: tuple[str, ...] = ()
    """Requirements of earlier stages: where one of them fails on the same case, it is accused instead."""

    def wants(self, case) -> bool:
        """Whether it has something to say about a case of another check."""
        return self.spec(case.spec)


@dataclass(frozen=True, kw_only=True)
class LayerCheck(Check):
    """A requirement of a stage past the router, or of the whole layer; its cases are LayerCases."""

    x: tuple[str, ...] = ("normal",)
    """Kinds of tokens."""
    bias: tuple[str, ...] = ("none", "mixed", "crowded")
    """Kinds of expert_bias; a crowded one leaves experts without tokens."""


@dataclass(frozen=True, kw_only=True)
class LayoutCheck(LayerCheck):
    """A requirement of a layer laid over devices; its cases are LayoutCases."""

    layout: Callable[[Any], bool] = lambda layout: layout.buffer_factor is None
    """Of a ShardLayout. A small buffer loses rows, and most requirements are about layouts that lose none."""
    bias: tuple[str, ...] = ("none", "mixed", "crowded", "one_rank")
    loads: tuple[str, ...] = ("even", "skewed", "one_expert", "one_rank", "unused")
    """Kinds of ids where they are given."""
    counts: tuple[str, ...] = ("equal", "uneven", "prime", "some_empty")
    """Kinds of token counts of the shards."""

    def wants(self, case) -> bool:
        return isinstance(case, LayoutCase) and super().wants(case) and self.layout(case.layout)


LAYOUT_METHODS = ("dispatch", "sharded_layer", "sharded_gradients")
"""Methods that get a layout."""


@dataclass(frozen=True, kw_only=True)
class LoadCheck(Check):
    """A requirement of load, of capacity or of the mask of both; its cases are LoadCases."""

    logits: tuple[str, ...] = ("normal",)
    ids: tuple[str, ...] = ("own", "collapsed")
    """Kinds of choices: of biased scores, the same for every token, or with unused slots."""
    counts: tuple[str, ...] = ("mixed",)
    """Kinds of counts of the ranks of a step."""
    tokens: tuple[int, ...] = (12, 1)

    def wants_spec(self, spec) -> bool:
        """Whether a LoadSpec has the rule that the method is about, and no other one."""
        rule = LOAD_RULES[self.method]
        own = spec.rule is None if rule is None else getattr(spec, rule) is not None
        return own and self.spec(spec)

    def wants(self, case) -> bool:
        return isinstance(case, LoadCase) and self.wants_spec(case.spec)


LOAD_RULES = {"load": None, "z_loss": None, "balance_loss": "balance", "bias_update": "update", "capacity": "capacity"}
"""Methods of load, and the rule that each gets."""
REPLAY_METHODS = ("record", "replay")
"""Methods of a whole layer that get or return a record."""

CHECKS: dict[str, Check] = {}
"""Every check, by requirement; filled as the modules of `conformance.suite` are imported."""
