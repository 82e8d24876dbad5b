"""conformance, diagnosis: which known fault returns what a subject returned, in the calls that a check makes.

Whatever method the check calls; a fault that raises an error of the same type in the same call returns the same. The
calls are made twice, one after the other, so that a fault that keeps something between calls is found as well: it
returns the same from the first call on, or after the calls have been made once.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np

from conformance.core.case import Case
from conformance.core.check import CHECKS, Check
from conformance.core.fault import Fault
from conformance.core.judge import Crash, Judge, NotRun, Violation
from conformance.core.register import REQUIREMENTS
from conformance.core.rounding import EPSILON, TINY
from conformance.core.subject import Subject

ROUNDINGS = 2**6
"""Granted to a number, of the largest one of its array: the reference of a fault and the subject are both rounded."""
MOST_ERROR = 2**-5
"""Beyond this part of the largest number nothing is called the same, however coarse the dtype."""


@dataclass(frozen=True, kw_only=True)
class Raised:
    """In place of a result: the subject raised an error."""

    error: type


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a method of a subject."""

    case: Case
    method: str
    arguments: tuple
    """As they were before the subject could write to them."""
    inputs: dict[str, Any]
    result: Any


class Recorder(Judge):
    """A judge that keeps what its subject is asked and returns."""

    def __init__(self, subject: Subject):
        super().__init__(subject)
        self.calls = list[Call]()

    def call(self, case: Case, method: str, *arguments: Any, blame: str = "", **inputs: Any) -> Any:
        given = deepcopy((arguments, inputs))
        what = {"case": case, "method": method, "arguments": given[0], "inputs": given[1]}
        try:
            result = super().call(case, method, *arguments, blame=blame, **inputs)
        except Crash as crash:
            self.calls.append(Call(**what, result=Raised(error=type(crash.__cause__))))
            raise
        self.calls.append(Call(**what, result=deepcopy(result)))
        return result


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How much two results that are the same may differ by."""

    dtype: str
    """In which the subject computes."""
    tolerance: float
    """Granted to a number, as a part of the largest finite one of its array."""
    floor: float
    """Granted to each number besides."""

    @classmethod
    def of(cls, subject: Subject) -> "Rounding":
        """That of the subject's coarsest dtype, and of the reference's float32."""
        dtypes = ("float32", subject.compute_dtype, subject.expert_dtype)
        tolerance = min(MOST_ERROR, ROUNDINGS * max(EPSILON[dtype] for dtype in dtypes))
        return cls(dtype=subject.compute_dtype, tolerance=tolerance, floor=max(TINY[dtype] for dtype in dtypes))


def same_result(call: Call, found: Any, rounding: Rounding) -> bool:
    """Whether what another subject returns in a call is what this one returned."""
    return same(found, call.result, rounding.tolerance, rounding.floor)


def explaining(
    judge: Judge,
    violation: Violation,
    faults: Iterable[Fault],
    subject_with: Callable[[Fault], Subject],
    alike: Callable[[Call, Any, Rounding], bool] = same_result,
) -> list[Fault]:
    """The faults that return what the subject returned, in every call that the check makes on the violation's case.

    The likeliest comes first: one that breaks this very requirement, then one of its stage, one whose own requirement
    has not been found to hold, and one that is about the method of the check. None, where the clean reference returns
    the same.

    Args:
        judge: of the subject.
        violation: with a case.
        faults: that may explain it; those of methods that the check does not call do not.
        subject_with: the reference in float32 with a fault in it, whose memory is empty.
        alike: whether a result is that of a call, of which no error was raised.
    """
    check, rounding = CHECKS[violation.requirement], Rounding.of(judge.subject)
    clean = Judge(subject_with(Fault(name="none", summary="The reference as it is.", requirement=check.requirement)))
    first, second = calls_of(judge, check, violation.case)
    telling = [call for call in first if not repeats(call, clean, rounding, alike)]
    # Where only the second time tells something, the first one is the way to it.
    if not telling and all(repeats(call, clean, rounding, alike) for call in second):
        return []
    methods = {call.method for call in first}

    def returns_the_same(fault: Fault) -> bool:
        if telling and fault.around is None:  # nothing is kept between calls, so that their order is free
            calls = [*telling, *(call for call in first if not any(call is other for other in telling))]
            return _repeats_all(calls, Judge(subject_with(fault)), rounding, alike)
        fresh = Judge(subject_with(fault))
        if telling and _repeats_all(first, fresh, rounding, alike):
            return True
        if telling and not fresh.subject.memory:  # type: ignore[attr-defined]
            return False
        warmed = Judge(subject_with(fault))
        for call in first:
            repeats(call, warmed, rounding, alike)
        return _repeats_all(second, warmed, rounding, alike)

    found = [fault for fault in faults if fault.method in methods and returns_the_same(fault)]
    stage = REQUIREMENTS[violation.requirement].stage
    return sorted(
        found,
        key=lambda fault: (
            fault.requirement != violation.requirement,
            fault.stage != stage,
            judge.ledger[fault.requirement].judged > 0,
            fault.method != check.method,
        ),
    )


def calls_of(judge: Judge, check: Check, case: Any) -> tuple[list[Call], list[Call]]:
    """What the check asks the subject on a case and what it gets, twice, one after the other."""
    recorder, passes = Recorder(judge.subject), []
    for _ in range(2):
        recorder.calls = []
        recorder.memory.clear()
        with suppress(NotRun, Violation):
            recorder.run(check, case)
        passes.append(recorder.calls)
    return passes[0], passes[1]


def _repeats_all(calls: Iterable[Call], judge: Judge, rounding: Rounding, alike: Callable) -> bool:
    return all(repeats(call, judge, rounding, alike) for call in calls)


def repeats(call: Call, judge: Judge, rounding: Rounding, alike: Callable = same_result) -> bool:
    """Whether another subject returns the same in a call."""
    arguments, inputs = deepcopy((call.arguments, call.inputs))
    try:
        found = judge.call(call.case, call.method, *arguments, **inputs)
    except Crash as crash:
        return call.result == Raised(error=type(crash.__cause__))
    except NotRun:
        return False
    if isinstance(call.result, Raised):
        return False
    try:
        return alike(call, found, rounding)
    except (ValueError, TypeError, IndexError):  # a result of another form
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
