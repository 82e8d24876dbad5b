"""conformance, training: its check, with the kinds of scripts that its cases are made of."""

from dataclasses import dataclass

from conformance.core.check import Check
from conformance.training.case import TrainingCase


@dataclass(frozen=True, kw_only=True)
class TrainingCheck(Check):
    """A requirement of training; its cases are TrainingCases."""

    case = TrainingCase

    method: str = "train"
    scripts: tuple[str, ...]
    """A letter for each event (`draw.LETTERS`): 'btts' builds, trains on two micro-batches, and steps."""
    bias: tuple[str, ...] = ("none", "mixed")
    """Kinds of biases that layers are built with."""
    tokens: tuple[int, ...] = (6,)
