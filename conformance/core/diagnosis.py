"""conformance, diagnosis: which known fault returns what a subject returned, in the calls that a check makes."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, is_dataclass
from functools import wraps
from typing import Any
from unittest.mock import patch

import numpy as np

from conformance.core.check import CHECKS, Check
from conformance.core.fault import Fault
from conformance.core.judge import Crash, Judge, NotRun, Violation
from conformance.core.rounding import EPSILON

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


def explaining(judge: Judge, violation: Violation, faults: Iterable[Fault]) -> list[Fault]:
    """The faults that return what the subject returned, in every call that the check makes on the violation's case.

    Those that break its own requirement come first. None, where the clean reference returns the same, or where the
    subject raises an error.

    Args:
        judge: of the subject.
        violation: with a case.
        faults: that may explain it; those of other methods do not.
    """
    check = CHECKS[violation.requirement]
    clean = Fault(name="none", summary="The reference as it is.", requirement=check.requirement)
    dtypes = ("float32", judge.subject.compute_dtype, judge.subject.expert_dtype)
    error = min(MOST_ERROR, ROUNDINGS * max(EPSILON[dtype] for dtype in dtypes))
    calls = calls_of(judge, check, violation.case)
    if not calls or _returns(clean, calls, error):
        return []
    found = [fault for fault in faults if fault.method == check.method and _returns(fault, calls, error)]
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


def _returns(fault: Fault, calls: list[Call], error: float) -> bool:
    """Whether the reference with a fault in it returns the same in each of the calls."""
    method = getattr(fault.kind.faulty(fault), fault.method)
    try:
        with np.errstate(all="ignore"):
            return all(
                same(method(*deepcopy(call.arguments), **deepcopy(call.inputs)), call.result, error) for call in calls
            )
    except Exception:  # whatever a fault runs into in these calls, it does not return the same
        return False


def same(wanted: Any, found: Any, error: float) -> bool:
    """Whether two results are the same: whole numbers and bools exactly, others but for rounding.

    Args:
        wanted, found: arrays, numbers, None; dicts, of which the names that both have are compared; dataclasses; lists.
        error: granted to a number, as a part of the largest finite one of its array.
    """
    if is_dataclass(wanted) and is_dataclass(found):
        wanted, found = vars(wanted), vars(found)
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        names = wanted.keys() & found.keys()
        return bool(names) and all(same(wanted[name], found[name], error) for name in names)
    if isinstance(wanted, (list, tuple)) and isinstance(found, (list, tuple)):
        return len(wanted) == len(found) and all(same(*pair, error) for pair in zip(wanted, found, strict=True))
    wanted, found = np.asarray(wanted), np.asarray(found)
    if wanted.shape != found.shape:
        return False
    if wanted.dtype.kind in "biuOUS" and found.dtype.kind in "biuOUS":
        return bool((wanted == found).all())
    try:
        wanted, found = wanted.astype(np.float64), found.astype(np.float64)
    except (TypeError, ValueError):  # a number, and something that is none
        return False
    largest = np.abs(wanted[np.isfinite(wanted)]).max(initial=0)
    return bool(np.isclose(found, wanted, rtol=error, atol=error * largest, equal_nan=True).all())
