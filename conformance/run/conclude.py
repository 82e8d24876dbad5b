"""conformance, from a finished test to records: shrinks, diagnoses and stores a failure, replays the witnesses."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from conformance.core.check import CHECKS
from conformance.core.fault import Fault
from conformance.core.judge import Entry, Judge, Violation
from conformance.core.register import MUST, REQUIREMENTS, stage_order
from conformance.core.shrink import still_violated
from conformance.core.trial import accuse
from conformance.run.causes import shrunk_with_causes
from conformance.run.deviations import write_case
from conformance.run.report import SAME_CASE, SAME_FAULT, record
from conformance.run.watch import Died

CASES = Path(".moe-conformance") / "cases"
"""Where failing cases are kept, below the current folder."""


def conclude(judge: Judge, requirement: str | None, excinfo) -> list[dict]:
    """The records that a test leaves: of its own requirement, and of others that it found violated.

    Args:
        requirement: the test's; None for the tests that judge several.
        excinfo: pytest's, or None where nothing was raised.
    """
    if excinfo is not None and hasattr(excinfo.value, "records"):
        return excinfo.value.records  # of suite/test_deviations.py
    accused: dict[str, Violation | None] = {requirement: None} if requirement is not None else {}
    if excinfo is not None and isinstance(excinfo.value, Violation):
        accused[excinfo.value.requirement] = excinfo.value
    for other, entry in judge.ledger.items():
        if entry.violation is not None and other not in accused:
            accused[other] = entry.violation
    if excinfo is not None and not isinstance(excinfo.value, (Violation, pytest.skip.Exception)):
        # An error of the judge, or a hypothesis that could not draw: never a pass.
        text = f"the judge broke off: {type(excinfo.value).__name__}: {str(excinfo.value).splitlines()[0][:200]}"
        blamed = requirement or next(iter(CHECKS))
        accused[blamed] = Violation(text, expected="a verdict", received="none", requirement=blamed)
    found = []
    for name, violation in sorted(accused.items(), key=lambda item: stage_order(item[0])):
        entry, causes, first = judge.ledger[name], list[Fault](), None
        if violation is not None:
            if not isinstance(violation, Died):
                violation, causes = shrunk_with_causes(judge, violation)
            entry.violation = violation
            first = _told_on(judge, violation, causes)
            if violation.case is not None:
                write_case(CASES, name, violation.case, judge.name)
        for deviation in entry.known:
            if deviation.witness is not None:  # its page in the report says how it replays
                write_case(CASES, name, deviation.witness, judge.name)
        found.append(record(judge, name, entry, causes, first))
        entry.violation = None  # reported; a later test that finds another tells of its own
    return found


@dataclass(frozen=True, kw_only=True)
class Told:
    """A page that has been made of this subject."""

    violation: Violation
    causes: frozenset[str]


def _told_on(judge: Judge, violation: Violation, causes: list[Fault]) -> dict | None:
    """Which earlier page tells of a violation as well, and why; None where it gets a page of its own.

    One fault has one page: the first that it is found by. Two violations are of one fault where one known fault
    explains both; or, where none explains the later one, where the case of the earlier one breaks this requirement too.
    A MUST is never told on the page of a SHOULD.
    """
    pages: list[Told] = judge.memory.setdefault("pages", [])
    requirement, names = violation.requirement, frozenset(fault.name for fault in causes)
    if any(told.violation.requirement == requirement for told in pages):
        return None  # found again, by another test
    must = REQUIREMENTS[requirement].level == MUST
    earlier = [told for told in pages if not must or REQUIREMENTS[told.violation.requirement].level == MUST]
    for told in earlier:
        if told.causes & names:
            pages[pages.index(told)] = replace(told, causes=told.causes & names)
            return {"requirement": told.violation.requirement, "why": _why(judge, told, requirement)}
    if not names and not isinstance(violation, Died):
        for told in earlier:
            if _breaks(judge, told, requirement):
                return {"requirement": told.violation.requirement, "why": SAME_CASE}
    pages.append(Told(violation=violation, causes=names))
    return None


def _why(judge: Judge, told: Told, requirement: str) -> str:
    return SAME_CASE if _breaks(judge, told, requirement) else SAME_FAULT


def _breaks(judge: Judge, told: Told, requirement: str) -> bool:
    """Whether the case of a page breaks another requirement."""
    case = told.violation.case
    if case is None or isinstance(told.violation, Died):
        return False
    near_ties = judge.ledger[requirement].near_ties
    try:
        return not judge.holds(requirement, case)
    except (ValueError, KeyError):  # the case is none that this requirement is about, or lacks an input of its
        return False
    finally:
        judge.ledger[requirement].near_ties = near_ties


def stale(judge: Judge) -> list[dict]:
    """A record for each declared deviation that no longer happens, or whose date has passed."""
    found = []
    for deviation in judge.deviations:
        if deviation.expired:
            title = f"the declaration ran out on {deviation.until}"
        elif still_happens(judge, deviation):
            continue
        else:
            title = "no longer happens; delete the declaration"
        violation = Violation(
            f"declared deviation {deviation}: {title}",
            expected="the declared failure",
            received="none",
            requirement=deviation.requirement,
            case=deviation.witness,
        )
        entry = Entry(violation=violation)
        row = record(judge, deviation.requirement, entry)
        found.append(row | {"status": "STALE"})
    return found


def still_happens(judge: Judge, deviation) -> bool:
    """Whether the witness of a deviation, or some configuration, still violates it inside the declared tags."""
    undeclared, requirement = Judge(judge.subject), deviation.requirement
    if deviation.witness is None:
        violation = accuse(undeclared, ids=[requirement], examples=1).get(requirement)
    else:
        violation = still_violated(undeclared, requirement, deviation.witness)
    return violation is not None and deviation.covers(violation)
