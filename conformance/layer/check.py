"""conformance, layer: its check, with the kinds of data that its cases are made of."""

from dataclasses import dataclass

from conformance.core.check import Check
from conformance.layer.case import LayerCase


@dataclass(frozen=True, kw_only=True)
class LayerCheck(Check):
    """A requirement of a stage past the router, or of the whole layer; its cases are LayerCases."""

    case = LayerCase

    x: tuple[str, ...] = ("normal",)
    """Kinds of tokens."""
    bias: tuple[str, ...] = ("none", "mixed", "crowded")
    """Kinds of expert_bias; a crowded one leaves experts without tokens."""
    routed: bool = False
    """Whether it is tried on the layers of `routed.py`, whose logits are prescribed."""
    large: int = 0
    """Every so many of the layers of `large.py`, past the limits of tiles and tables, are tried as well; 0: none."""
    published: bool = False
    """Whether it is tried on the experts of public models too, and where tokens fill a tile to its end."""
    few: bool = False
    """Whether each of its cases costs a program of its own; then a subject that compiles is tried on one spec."""
