"""conformance, diagnosis: which known fault returns what a subject returned, in the calls that a check makes.

Whatever method the check calls; a fault that raises an error of the same type in the same call returns the same. The
calls are made twice, one after the other, so that a fault that keeps something between calls is found as well: it
returns the same from the first call on, or after the calls have been made once.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np

from conformance.core.capabilities import capabilities
from conformance.core.case import Case
from conformance.core.check import CHECKS, Check
from conformance.core.fault import Fault
from conformance.core.judge import Crash, Judge, NotRun, Violation
from conformance.core.register import REQUIREMENTS
from conformance.core.rounding import EPSILON, TINY
from conformance.core.subject import Subject

ROUNDINGS = 2**6
"""Granted to a number, of the largest one of its array: the reference of a fault and the subject are both rounded."""
MOST_TOKENS = 2**20
"""Of a case that is diagnosed: every known fault is tried on it."""
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
    written: frozenset = frozenset()
    """Places and names of arguments that the subject wrote to."""


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
        self.calls.append(Call(**what, result=deepcopy(result), written=_written(self, *given)))
        return result


def _written(judge: Judge, arguments: tuple, inputs: dict[str, Any]) -> frozenset:
    """Which arguments of the last call are no longer what was given."""
    after = dict(enumerate(judge.handed[0])) | judge.handed[1]
    before = dict(enumerate(arguments)) | inputs
    return frozenset(name for name in after if not same(after[name], before[name], EPSILON["float32"], 0.0))


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


Alike = Callable[[Call, Any, Rounding], bool]
"""Whether what another subject returns in a call is what this one returned, where neither raised an error."""


def same_result(call: Call, found: Any, rounding: Rounding) -> bool:
    """Number by number, whatever further names the other one has."""
    return same(found, call.result, rounding.tolerance, rounding.floor)


def same_rows(call: Call, found: Any, rounding: Rounding) -> bool:
    """Number by number, each as exact as its own row."""
    return same(found, call.result, rounding.tolerance, rounding.floor, by_row=True)


def same_form(call: Call, found: Any, rounding: Rounding) -> bool:
    """Number by number, with the very same names."""
    return same_result(call, found, rounding) and same(call.result, found, rounding.tolerance, rounding.floor)


class _Caller(Judge):
    """A judge that calls a subject and keeps no ledger: many are made."""

    def __init__(self, subject: Subject):
        self.subject, self.capabilities, self.handed = subject, capabilities(subject), ((), {})


def explaining(
    judge: Judge,
    violation: Violation,
    faults: Iterable[Fault],
    subject_with: Callable[[Fault], Subject],
    alike: Sequence[Alike] = (same_result, same_rows, same_form),
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
        alike: when two results are the same; a stricter one is asked where the clean reference returns the same. At
            last it is asked what is the same bit for bit.
    """
    check, case = CHECKS[violation.requirement], violation.case or violation.tried
    if case is None or case.num_tokens > MOST_TOKENS:
        return []
    clean = Fault(name="none", summary="The reference as it is.", requirement=check.requirement)
    calls = calls_of(judge, check, case)
    methods = {call.method for call in calls[0]}
    asked = [fault for fault in faults if fault.method in methods]
    found: list[Fault] = []
    for likeness in (*(_Numbers(calls, each, judge) for each in alike), _Bits(calls, judge)):
        if likeness.tells(subject_with(clean)):
            found = [fault for fault in asked if likeness.holds(lambda fault=fault: subject_with(fault))]
        if found:
            break
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


class _Numbers:
    """Another subject is like this one where its results are: from the first call on, or once it has been called."""

    def __init__(self, calls: tuple[list[Call], list[Call]], alike: Alike, judge: Judge):
        self.first, self.second, self.alike = *calls, alike
        self.rounding, self.telling = Rounding.of(judge.subject), list[Call]()

    def tells(self, clean: Subject) -> bool:
        other = _Caller(clean)
        self.telling = [call for call in self.first if not self._repeats(call, other)]
        return bool(self.telling) or not self._repeats_all(self.second, other)

    def holds(self, subject: Callable[[], Subject]) -> bool:
        fresh = _Caller(subject())
        if self.telling and self._repeats_all(self.first, fresh):
            return True
        if self.telling and not getattr(fresh.subject, "memory", None):
            return False
        warmed = _Caller(subject())
        for call in self.first:
            self._repeats(call, warmed)
        return self._repeats_all(self.second, warmed)

    def _repeats(self, call: Call, judge: Judge) -> bool:
        return repeats(call, judge, self.rounding, self.alike)

    def _repeats_all(self, calls: list[Call], judge: Judge) -> bool:
        return all(self._repeats(call, judge) for call in calls)


class _Bits:
    """Another subject is like this one where the same arrays are equal to each other, bit for bit.

    Within a result, and among the results of calls with the same arguments. A subject that does not repeat itself is
    known by that alone; of the others the numbers are the same as well.
    """

    TRIES = 3
    """A fault that draws may by chance be even."""

    def __init__(self, calls: tuple[list[Call], list[Call]], judge: Judge):
        self.calls, self.rounding = [*calls[0], *calls[1]], Rounding.of(judge.subject)
        self.groups = _groups(self.calls)
        self.pattern = _pattern(self.groups, [call.result for call in self.calls])
        results = [call.result for call in self.calls]
        self.uneven = {n for group in self.groups for n in group if not _is_even(group, results)}

    def tells(self, clean: Subject) -> bool:
        results = self._results(clean)
        return results is not None and _pattern(self.groups, results) != self.pattern

    def holds(self, subject: Callable[[], Subject]) -> bool:
        return any(self._holds_once(subject()) for _ in range(self.TRIES))

    def _holds_once(self, subject: Subject) -> bool:
        results = self._results(subject)
        return results is not None and _pattern(self.groups, results) == self.pattern

    def _results(self, subject: Subject) -> list | None:
        """What the subject returns in the calls; None where it cannot be like this one."""
        judge, results = _Caller(subject), []
        for number, call in enumerate(self.calls):
            arguments, inputs = deepcopy((call.arguments, call.inputs))
            try:
                results.append(deepcopy(judge.call(call.case, call.method, *arguments, **inputs)))
            except (NotRun, Violation):
                return None
            if number not in self.uneven and not _like(call, results[-1], self.rounding):
                return None
        return results


def _groups(calls: list[Call]) -> list[list[int]]:
    """The numbers of the calls that have the same method and arguments."""
    groups: list[list[int]] = []
    for number, call in enumerate(calls):
        given = call.method, call.arguments, call.inputs
        for group in groups:
            first = calls[group[0]]
            if first.method == call.method and same(given, (first.method, first.arguments, first.inputs), 0.0, 0.0):
                group.append(number)
                break
        else:
            groups.append([number])
    return groups


def _pattern(groups: list[list[int]], results: list) -> list[list[int]]:
    """For each group: each array by the place of the first one that is equal to it."""
    found = []
    for group in groups:
        leaves = [leaf for number in group for leaf in _leaves(results[number])]
        found.append([leaves.index(leaf) for leaf in leaves])
    return found


def _is_even(group: list[int], results: list) -> bool:
    return all(_leaves(results[number]) == _leaves(results[group[0]]) for number in group)


def _leaves(result: Any) -> list[tuple]:
    """The arrays of a result as shape and bytes."""
    if isinstance(result, Raised) or result is None:
        return [(str(result), b"")]
    if is_dataclass(result):
        return _leaves(vars(result))
    if isinstance(result, Mapping):
        return [leaf for name in sorted(result) for leaf in _leaves(result[name])]
    if isinstance(result, (list, tuple)):
        return [leaf for each in result for leaf in _leaves(each)]
    array = np.asarray(result)
    return [(array.shape, array.tobytes())]


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


def repeats(call: Call, judge: Judge, rounding: Rounding, alike: Alike = same_result) -> bool:
    """Whether another subject returns the same in a call, or raises an error of the same type."""
    arguments, inputs = deepcopy((call.arguments, call.inputs))
    try:
        found = judge.call(call.case, call.method, *arguments, **inputs)
    except Crash as crash:
        return isinstance(call.result, Raised) and call.result.error is type(crash.__cause__)
    except NotRun:
        return False
    if call.written and _written(judge, call.arguments, call.inputs) != call.written:
        return False
    return not isinstance(call.result, Raised) and _like(call, found, rounding, alike)


def _like(call: Call, found: Any, rounding: Rounding, alike: Alike = same_result) -> bool:
    try:
        return alike(call, found, rounding)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError):  # a result of another form
        return False


def same(found: Any, wanted: Any, tolerance: float, floor: float, *, by_row: bool = False) -> bool:
    """Whether two results are the same: whole numbers and bools exactly, others but for rounding.

    Args:
        found, wanted: arrays, numbers, None; lists; dataclasses; mappings, of which `found` may have more names.
        tolerance: granted to a number, as a part of the largest finite one of its array.
        floor: granted to each number besides.
        by_row: the largest number is that of the row, along the last axis.
    """
    if is_dataclass(found) and is_dataclass(wanted):
        found, wanted = vars(found), vars(wanted)
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        return wanted.keys() <= found.keys() and all(
            same(found[name], wanted[name], tolerance, floor, by_row=by_row) for name in wanted
        )
    if isinstance(found, (list, tuple)) and isinstance(wanted, (list, tuple)):
        pairs = zip(found, wanted, strict=False)
        return len(found) == len(wanted) and all(same(*pair, tolerance, floor, by_row=by_row) for pair in pairs)
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
    sizes = np.abs(np.where(np.isfinite(wanted), wanted, 0))
    by_row = by_row and wanted.ndim > 0
    radius = floor + tolerance * (sizes.max(axis=-1, keepdims=True, initial=0) if by_row else sizes.max(initial=0))
    return bool(np.isclose(found, wanted, rtol=tolerance, atol=radius, equal_nan=True).all())
