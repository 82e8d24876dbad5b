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
    """Kinds of logits; `draw.py` has them all."""
    bias: tuple[str, ...] = ("none", "mixed", "negative", "positive")
    """Kinds of expert_bias."""
    dtypes: tuple[str, ...] = ("float32", "float64", "bfloat16", "float16")
    """Of the logits; of these, those that the subject declares."""
    sweeps: bool = False
    """Whether it is tried at every size of `sizes.py`; the others share them."""
    published: bool = False
    """Whether it is tried at the sizes of public models too, and where tokens fill a tile to its end."""
    pairs: bool = False
    """Whether it is tried on every pair of what a case is made of (`pairs.py`)."""
    few: bool = False
    """Whether each of its cases costs programs of its own; then a subject that compiles is tried on few specs."""
