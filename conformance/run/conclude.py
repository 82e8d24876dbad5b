"""conformance, from a finished test to records: shrinks, diagnoses and stores a failure, replays the witnesses."""

from pathlib import Path

import pytest

from conformance.core.check import CHECKS
from conformance.core.judge import Entry, Judge, Violation
from conformance.core.shrink import still_violated
from conformance.run.causes import shrunk_with_causes
from conformance.run.deviations import write_case
from conformance.run.report import failure_page, record
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
    for name, violation in accused.items():
        entry, page = judge.ledger[name], ""
        if violation is not None:
            causes = []
            if not isinstance(violation, Died):
                violation, causes = shrunk_with_causes(judge, violation)
            entry.violation = violation
            page = failure_page(judge, violation, causes)
            if violation.case is not None:
                write_case(CASES, name, violation.case, judge.name)
        found.append(record(judge, name, entry, page))
        entry.violation = None  # reported; a later test that finds another tells of its own
    return found


def stale(judge: Judge) -> list[dict]:
    """A record for each declared deviation whose witness no longer shows it, or whose date has passed."""
    found = []
    for deviation in judge.deviations:
        if deviation.expired:
            title = f"the declaration ran out on {deviation.until}"
        elif deviation.witness is None or still_happens(judge, deviation):
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
        row = record(judge, deviation.requirement, entry, failure_page(judge, violation))
        found.append(row | {"status": "STALE"})
    return found


def still_happens(judge: Judge, deviation) -> bool:
    """Whether the witness of a deviation still violates its requirement, inside the declared tags."""
    undeclared = Judge(judge.subject)
    violation = still_violated(undeclared, deviation.requirement, deviation.witness)
    return violation is not None and deviation.covers(violation)
