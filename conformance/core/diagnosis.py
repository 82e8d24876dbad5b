"""conformance, the diagnosis: which known fault returns what a subject returned, call by call."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from conformance.core.case import Case
from conformance.core.check import CHECKS
from conformance.core.fault import Fault
from conformance.core.judge import Judge, NotRun, Violation
from conformance.core.rounding import EPSILON, TINY
from conformance.core.subject import Subject

ROUNDINGS, NARROW_ROUNDINGS = 32, 4
"""Granted to what is the same but for rounding, relative to the largest number of an array; in the dtype in which a
subject computes, and in that of its experts, which add up in a wider one."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a subject: what it was given, before the subject could write to it, and what it returned."""

    case: Case
    method: str
    arguments: tuple
    inputs: dict[str, Any]
    returned: Any


class Recorder(Judge):
    """A judge that keeps every call of its subject."""

    def __init__(self, subject: Subject):
        super().__init__(subject)
        self.calls: list[Call] = []
        self.crashed = False

    def call(self, case: Case, method: str, *arguments: Any, blame: str = "", **inputs: Any) -> Any:
        kept_arguments, kept_inputs = deepcopy((arguments, inputs))
        try:
            returned = super().call(case, method, *arguments, blame=blame, **inputs)
        except Violation:
            self.crashed = True
            raise
        kept = {"arguments": kept_arguments, "inputs": kept_inputs, "returned": deepcopy(returned)}
        self.calls.append(Call(case=case, method=method, **kept))
        return returned


def explaining(
    judge: Judge, violation: Violation, faults: Iterable[Fault], subject_with: Callable[[Fault], Subject]
) -> list[Fault]:
    """The faults that return what the subject returned in every call that the check made of it.

    None where the subject raised an error; none where it returned what the clean reference does, but for rounding.

    Args:
        judge: of the subject.
        violation: with its case.
        faults: that may explain it; those of a method that the check does not call do not.
        subject_with: the reference with a fault in it, whose memory is empty.
    """
    if violation.case is None:
        return []
    recorder = Recorder(judge.subject)
    with suppress(NotRun, Violation):
        recorder.run(CHECKS[violation.requirement], violation.case)
    subject = judge.subject
    tolerance = ROUNDINGS * EPSILON[subject.compute_dtype] + NARROW_ROUNDINGS * EPSILON[subject.expert_dtype]
    floor = max(TINY[dtype] for dtype in (subject.compute_dtype, subject.expert_dtype))

    def returns_the_same(fault: Fault) -> bool:
        other = subject_with(fault)
        other.compute_dtype = "float64"
        return all(repeats(call, Judge(other), tolerance, floor) for call in recorder.calls)

    none = Fault(name="none", summary="Nothing is wrong.", requirement=violation.requirement)
    if recorder.crashed or not recorder.calls or returns_the_same(none):
        return []
    methods = {call.method for call in recorder.calls}
    return [fault for fault in faults if fault.method in methods and returns_the_same(fault)]


def repeats(call: Call, judge: Judge, tolerance: float, floor: float) -> bool:
    """Whether another subject returns the same in a call, but for rounding."""
    arguments, inputs = deepcopy((call.arguments, call.inputs))
    try:
        return same(judge.call(call.case, call.method, *arguments, **inputs), call.returned, tolerance, floor)
    except (NotRun, Violation):
        return False


def same(found: Any, wanted: Any, tolerance: float, floor: float) -> bool:
    """Whether two results are the same but for rounding.

    Args:
        found, wanted: numbers, arrays, and lists, mappings and dataclasses of them. Integers, NaN and inf are equal.
        tolerance: relative to the largest number of an array.
        floor: absolute.
    """
    if is_dataclass(found) and is_dataclass(wanted):
        found, wanted = ({f.name: getattr(each, f.name) for f in fields(each)} for each in (found, wanted))
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        return found.keys() == wanted.keys() and all(same(found[n], wanted[n], tolerance, floor) for n in wanted)
    if isinstance(found, (list, tuple)) and isinstance(wanted, (list, tuple)):
        pairs = zip(found, wanted, strict=False)
        return len(found) == len(wanted) and all(same(a, b, tolerance, floor) for a, b in pairs)
    try:
        a, b = np.asarray(found), np.asarray(wanted)
        if a.dtype.kind in "biuf" and b.dtype.kind in "biuf":
            return a.shape == b.shape and _close(a, b, tolerance, floor)
        return bool(found == wanted)
    except (TypeError, ValueError):
        return False


def _close(a: np.ndarray, b: np.ndarray, tolerance: float, floor: float) -> bool:
    if a.dtype.kind != "f" or b.dtype.kind != "f":
        return a.dtype.kind != "f" and b.dtype.kind != "f" and bool((a == b).all())
    a, b = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(b)
    with np.errstate(invalid="ignore"):
        near = np.abs(a - b) <= tolerance * np.abs(b[finite]).max(initial=0) + floor
    return bool(np.where(finite, near, (a == b) | (np.isnan(a) & np.isnan(b))).all())
