"""conformance, router: its check, with the kinds of data that its cases are made of."""

from dataclasses import dataclass

from conformance.core.check import Check
from conformance.router.case import RouterCase


@dataclass(frozen=True, kw_only=True)
class RouterCheck(Check):
    """A requirement of a router; its cases are RouterCases."""

    case = RouterCase

    method: str = "route"
    logits: tuple[str, ...] = ("separated", "normal", "large", "negative")
    bias: tuple[str, ...] = ("none", "mixed", "negative", "positive")
    """Kinds of expert_bias."""
