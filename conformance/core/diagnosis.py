"""conformance, diagnosis: which known fault returns what a subject returned, in the calls that a check makes."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np

from conformance.core.case import Case
from conformance.core.check import CHECKS, Check
from conformance.core.fault import Fault
from conformance.core.judge import Judge, NotRun, Violation
from conformance.core.rounding import EPSILON, TINY
from conformance.core.subject import Subject

ROUNDINGS = 2**6
"""Granted to a number, of the largest one of its array: the reference of a fault and the subject are both rounded."""
MOST_ERROR = 2**-5
"""Beyond this part of the largest number nothing is called the same, however coarse the dtype."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a method of a subject."""

    case: Case
    arguments: tuple
    """As they were before the subject could write to them."""
    inputs: dict[str, Any]
    result: Any


class Recorder(Judge):
    """A judge that keeps what a method of its subject is asked and returns."""

    def __init__(self, subject: Subject, method: str):
        super().__init__(subject)
        self.method, self.calls, self.crashed = method, list[Call](), False

    def call(self, case: Case, method: str, *arguments: Any, blame: str = "", **inputs: Any) -> Any:
        given = deepcopy((arguments, inputs))
        try:
            result = super().call(case, method, *arguments, blame=blame, **inputs)
        except Violation:
            self.crashed = True
            raise
        if method == self.method:
            self.calls.append(Call(case=case, arguments=given[0], inputs=given[1], result=deepcopy(result)))
        return result


def explaining(
    judge: Judge, violation: Violation, faults: Iterable[Fault], subject_with: Callable[[Fault], Subject]
) -> list[Fault]:
    """The faults that return what the subject returned, in every call that the check makes on the violation's case.

    Those that break its own requirement come first. None, where the clean reference returns the same, or where the
    subject raises an error.

    Args:
        judge: of the subject.
        violation: with a case.
        faults: that may explain it; those of other methods do not.
        subject_with: the reference in float32 with a fault in it, whose memory is empty.
    """
    check = CHECKS[violation.requirement]
    clean = Fault(name="none", summary="The reference as it is.", requirement=check.requirement)
    dtypes = ("float32", judge.subject.compute_dtype, judge.subject.expert_dtype)
    tolerance = min(MOST_ERROR, ROUNDINGS * max(EPSILON[dtype] for dtype in dtypes))
    floor, calls = max(TINY[dtype] for dtype in dtypes), calls_of(judge, check, violation.case)

    def returns_the_same(fault: Fault) -> bool:
        other = Judge(subject_with(fault))
        return all(repeats(call, other, check.method, tolerance, floor) for call in calls)

    if not calls or returns_the_same(clean):
        return []
    found = [fault for fault in faults if fault.method == check.method and returns_the_same(fault)]
    return sorted(found, key=lambda fault: fault.requirement != violation.requirement)


def calls_of(judge: Judge, check: Check, case: Any) -> list[Call]:
    """What the check asks the subject on a case, and what it gets; nothing where the subject raises an error."""
    recorder = Recorder(judge.subject, check.method)
    with suppress(NotRun, Violation):
        recorder.run(check, case)
    return [] if recorder.crashed else recorder.calls


def repeats(call: Call, judge: Judge, method: str, tolerance: float, floor: float) -> bool:
    """Whether another subject returns the same in a call."""
    arguments, inputs = deepcopy((call.arguments, call.inputs))
    try:
        return same(judge.call(call.case, method, *arguments, **inputs), call.result, tolerance, floor)
    except (NotRun, Violation):  # whatever a fault runs into in this call, it does not return the same
        return False


def same(found: Any, wanted: Any, tolerance: float, floor: float) -> bool:
    """Whether two results are the same: whole numbers and bools exactly, others but for rounding.

    Args:
        found, wanted: arrays, numbers, None; lists; dataclasses; mappings, of which `found` may have more names.
        tolerance: granted to a number, as a part of the largest finite one of its array.
        floor: granted to each number besides.
    """
    if is_dataclass(found) and is_dataclass(wanted):
        found, wanted = vars(found), vars(wanted)
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        return wanted.keys() <= found.keys() and all(
            same(found[name], wanted[name], tolerance, floor) for name in wanted
        )
    if isinstance(found, (list, tuple)) and isinstance(wanted, (list, tuple)):
        pairs = zip(found, wanted, strict=False)
        return len(found) == len(wanted) and all(same(*pair, tolerance, floor) for pair in pairs)
    try:
        found, wanted = np.asarray(found), np.asarray(wanted)
        if found.shape != wanted.shape:
            return False
        exact = [each.dtype.kind in "biuOUS" for each in (found, wanted)]
        if any(exact):  # a count that became a fraction is another one
            return all(exact) and bool((found == wanted).all())
        found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    except (TypeError, ValueError):  # a number or an array, and something that is none
        return False
    radius = floor + tolerance * np.abs(wanted[np.isfinite(wanted)]).max(initial=0)
    return bool(np.isclose(found, wanted, rtol=tolerance, atol=radius, equal_nan=True).all())
