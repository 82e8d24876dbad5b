"""conformance, diagnosis: which known fault returns what a subject returned, in the calls that a check makes."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, is_dataclass
from functools import wraps
from typing import Any
from unittest.mock import patch

import numpy as np

from conformance.core.check import CHECKS, Check
from conformance.core.fault import Fault
from conformance.core.judge import Crash, Judge, NotRun, Violation
from conformance.core.rounding import EPSILON, TINY
from conformance.core.subject import Subject

ROUNDINGS = 2**6
"""Granted to a number, of the largest one of its array: the reference of a fault and the subject are both rounded."""
MOST_ERROR = 2**-5
"""Beyond this part of the largest number nothing is called the same, however coarse the dtype."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a method of a subject."""

    arguments: tuple
    inputs: dict[str, Any]
    result: Any

    def repeats(self, method: Callable, tolerance: float, floor: float) -> bool:
        """Whether another method returns the same."""
        arguments, inputs = deepcopy((self.arguments, self.inputs))
        try:
            with np.errstate(all="ignore"):
                return same(method(*arguments, **inputs), self.result, tolerance, floor)
        except Exception:  # whatever a fault runs into in this call, it does not return the same
            return False


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
        method = getattr(subject_with(fault), check.method)
        return all(call.repeats(method, tolerance, floor) for call in calls)

    if not calls or returns_the_same(clean):
        return []
    found = [fault for fault in faults if fault.method == check.method and returns_the_same(fault)]
    return sorted(found, key=lambda fault: fault.requirement != violation.requirement)


def calls_of(judge: Judge, check: Check, case: Any) -> list[Call]:
    """What the check asks the subject on a case, and what it gets; nothing where the subject raises an error."""
    calls, method, entry = [], getattr(judge.subject, check.method), judge.ledger[check.requirement]
    near_ties = entry.near_ties

    @wraps(method)
    def recorded(*arguments, **inputs):
        given = deepcopy((arguments, inputs))
        result = method(*arguments, **inputs)
        calls.append(Call(arguments=given[0], inputs=given[1], result=deepcopy(result)))
        return result

    with patch.object(judge.subject, check.method, recorded):
        try:
            judge.run(check, case)
        except Crash:
            return []
        except (NotRun, Violation):
            pass
        finally:
            entry.near_ties = near_ties
    return calls


def same(found: Any, wanted: Any, tolerance: float, floor: float) -> bool:
    """Whether two results are the same: whole numbers and bools exactly, others but for rounding.

    Args:
        found, wanted: arrays, numbers, None; mappings, of which the names that both have are compared; dataclasses;
            lists.
        tolerance: granted to a number, as a part of the largest finite one of its array.
        floor: granted to each number besides.
    """
    if is_dataclass(found) and is_dataclass(wanted):
        found, wanted = vars(found), vars(wanted)
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        names = found.keys() & wanted.keys()
        return bool(names) and all(same(found[name], wanted[name], tolerance, floor) for name in names)
    if isinstance(found, (list, tuple)) and isinstance(wanted, (list, tuple)):
        pairs = zip(found, wanted, strict=False)
        return len(found) == len(wanted) and all(same(*pair, tolerance, floor) for pair in pairs)
    found, wanted = np.asarray(found), np.asarray(wanted)
    if found.shape != wanted.shape:
        return False
    exact = [each.dtype.kind in "biuOUS" for each in (found, wanted)]
    if any(exact):  # a count that became a fraction is another one
        return all(exact) and bool((found == wanted).all())
    try:
        found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    except (TypeError, ValueError):  # a number, and something that is none
        return False
    radius = floor + tolerance * np.abs(wanted[np.isfinite(wanted)]).max(initial=0)
    return bool(np.isclose(found, wanted, rtol=tolerance, atol=radius, equal_nan=True).all())
