"""conformance, sharing the tests of a subject between processes: each claims stages, and leaves what it finds.

A stage is claimed by making the file of its name; a later process judges what was left in order, so that the pages are
those of one process.
"""

from pathlib import Path
from typing import Any

import pytest

from conformance.core.check import CHECKS
from conformance.core.judge import Judge, Violation
from conformance.core.register import REQUIREMENTS, STAGES
from conformance.run.report import record


class Claims:
    """The stages that a process has claimed."""

    def __init__(self, folder: Path, number: int):
        self.folder, self.number = folder, number
        self.mine: dict[str, bool] = {}
        """stage -> whether this process has it, of those it has asked for."""

    def order(self, items: list) -> None:
        """The first process goes through the stages from the first one on, each other one from the last."""
        backwards = -1 if self.number else 1
        items.sort(key=lambda item: backwards * _place(item))

    def has(self, item) -> bool:
        """Whether the stage of a test is this process's; it becomes so where no other one has it."""
        stage = _stage(item)
        if stage not in self.mine:
            try:
                (self.folder / stage).touch(exist_ok=False)
                self.mine[stage] = True
            except FileExistsError:
                self.mine[stage] = False
        return self.mine[stage]


def _stage(item) -> str:
    """Of the requirement of a test; a test that judges several is a stage of its own."""
    requirement = getattr(item.obj, "requirement", None)
    return item.name if requirement is None else REQUIREMENTS[requirement].stage


def _place(item) -> int:
    stage = _stage(item)
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def what_was_found(judge: Judge, requirement: str | None, excinfo) -> dict[str, Any] | None:
    """What a test found that makes a page: in words, and as it is told where nobody comes to look into it; None where
    it makes none. The ledger forgets it.

    Args:
        requirement: the test's; None for the tests that judge several.
        excinfo: pytest's, or None where nothing was raised.
    """
    found: BaseException | None = None
    for entry in judge.ledger.values():
        found, entry.violation = entry.violation or found, None
    if excinfo is not None and not isinstance(excinfo.value, pytest.skip.Exception):
        if hasattr(excinfo.value, "records"):
            return None  # of suite/test_deviations.py: a page that stands alone
        found = excinfo.value
    if found is None:
        return None
    if not isinstance(found, Violation):
        title = f"{type(found).__name__}: {str(found)[:200]}"
        blamed = requirement or next(iter(CHECKS))
        found = Violation(title, expected="a verdict", received="none", requirement=blamed)
    entry = judge.ledger[found.requirement]
    entry.violation = found
    told = record(judge, found.requirement, entry)
    entry.violation = None
    return {"title": found.title, "expected": found.expected, "received": found.received, "record": told}
