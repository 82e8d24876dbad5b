"""conformance, precision: how exactly a subject routes, and the coarsest stage that it takes to explain it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from conformance.core.judge import Judge, NotRun, Violation
from conformance.core.rounding import COARSE, Precision
from conformance.core.subject import Subject
from conformance.precision.audit import Batch, Effect, difference
from conformance.router.case import RouterCase
from conformance.router.observation import Observation, observe
from conformance.router.verdicts import selection_differs, weights_differ
from moe_ref import gate

UNEXPLAINED = "none of ours"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a subject does with a batch, against float64."""

    effect: Effect
    explained_by: str
    """The narrowest class whose bounds hold: float32, or one stage that is coarser."""


class Declared(Subject):
    """A subject of which nothing is asked but its dtype."""

    def __init__(self, dtype: str):
        self.compute_dtype = dtype


def classes() -> Iterator[Precision]:
    """float32, then each stage in each coarser dtype, the finer ones first."""
    yield Precision("float32")
    for coarse in ("packed_index", "float16", "bfloat16"):
        yield from (Precision("float32", **{stage: coarse}) for stage, known in COARSE.items() if coarse in known)


def measured(subject: Subject, own: Batch) -> Measured | None:
    """What a subject does with the logits of a batch in float32; None where it does not run them."""
    logits_TE = gate(own.x_TD, own.gate_ED).astype(np.float32).astype(np.float64)
    case = RouterCase(spec=own.spec, logits_TE=logits_TE, expert_bias_E=own.expert_bias_E, inputs=own.inputs)
    try:
        seen = observe(Judge(subject), case)
    except (NotRun, Violation):
        return None
    effect = difference(case.reference, seen.expert_ids_TK, seen.weights_TK)
    name = next((found.words for found in classes() if explains(found, seen)), UNEXPLAINED)
    return Measured(effect=effect, explained_by=name)


def explains(dtype: Precision, seen: Observation) -> bool:
    """Whether the judge accepts a result of a subject that declares this class."""
    judge = Judge(Declared(dtype))
    if seen.case.spec.selector == "top_k" and selection_differs(judge, seen):
        return False
    return not weights_differ(judge, seen)
