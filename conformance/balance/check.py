"""conformance, balance: its check, with the kinds of data that its cases are made of."""

from dataclasses import dataclass

from conformance.balance.case import BalanceCase, BatchSpec
from conformance.core.check import Check


@dataclass(frozen=True, kw_only=True)
class BalanceCheck(Check):
    """A requirement of load, of capacity or of the mask of both; its cases are BalanceCases."""

    case = BalanceCase

    logits: tuple[str, ...] = ("normal",)
    ids: tuple[str, ...] = ("own", "collapsed")
    """Kinds of choices: of biased scores, the same for every token, with unused slots, with tokens that have none, of
    one hot expert."""
    weights: tuple[str, ...] = ("distinct",)
    counts: tuple[str, ...] = ("mixed",)
    """Kinds of counts of one step."""
    num_counts: tuple[int, ...] = (1, 2, 3)
    """Ranks or micro-batches that have counts of their own."""
    masks: tuple[str, ...] = ("some", "some", "some", "all")
    """Which tokens are padding, where the case has a mask: some, all, or all of a sequence or shard."""
    tokens: tuple[int, ...] = (12, 1)
    sizes: tuple[int, ...] = ()
    """Further numbers of tokens, each tried once, of which every one has the same experts; the largest come first.

    Of a subject that compiles the first is tried.
    """
    routers: bool = False
    """Whether its cases have routers that do more than score."""

    def wants_spec(self, spec: BatchSpec) -> bool:
        """Whether a spec has the rule that the method gets, and is one that the check asks for."""
        return spec.is_for(self.method) and (self.routers or spec.router is None) and self.spec(spec)

    def wants(self, case) -> bool:
        return isinstance(case, BalanceCase) and self.wants_spec(case.spec)
