"""conformance, watching a run: which case a subject is in, so that one that never returns or ends the process is named.

    the process of a subject      writes before each case: the test, and the number of the case in it
    the process that started it   reads that where the other one died or hung, and starts another one for the rest, in
                                  which the test that broke is a violation with the case that it broke on

A process that a subject has lost its device in ends by itself: every later call would fail there.

Cases are drawn by seeds alone, so that the number of a case says which it is, without a call of the subject.
"""

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import NoReturn

from conformance.core.case import Case
from conformance.core.check import Check
from conformance.core.judge import Judge, Violation

WIDTH = 200
"""Of the line that says where a process is."""
LOST = 70
"""The exit status of a process that has lost its device; none of pytest's."""


class Died(Violation):
    """The subject ended the process, or never returned; it is not called again on such a case."""


class Watch:
    """Writes where a process is, one short line in place of the last one."""

    def __init__(self, file: str):
        self.file, self.test, self.number = os.open(file, os.O_WRONLY | os.O_CREAT), "", 0
        self.last_words = Path(f"{file}.lost")

    def begin(self, test: str) -> None:
        """A test begins."""
        self.test, self.number = test, 0
        self._write("")

    def enter(self, check: Check, case: Case) -> None:
        """A check is about to be tried on a case."""
        self.number += 1
        self._write(check.requirement)

    def lost(self, text: str) -> NoReturn:
        """The device is lost; ends the process."""
        self.last_words.write_text(text)
        os._exit(LOST)

    def _write(self, requirement: str) -> None:
        os.pwrite(self.file, f"{self.test} {self.number} {requirement}".ljust(WIDTH).encode(), 0)


def where(file: Path) -> tuple[str, int, str] | None:
    """(test, number of the case, requirement) that a process wrote last; None before the first test."""
    text = file.read_text().split() if file.exists() else []
    return (text[0], int(text[1]), text[2]) if len(text) == 3 else None


def last_words(file: Path) -> str:
    """What a process said of the device that it lost; empty where it lost none."""
    said = Path(f"{file}.lost")
    return said.read_text() if said.exists() else ""


class _Found(BaseException):
    """Not an Exception: hypothesis does not try again what it takes for an interrupt."""

    def __init__(self, check: Check, case: Case):
        self.check, self.case = check, case


def broken(test: Callable, number: int, title: str, received: str) -> Callable:
    """The test as a violation by its case of a number, which the subject is not called on."""

    @wraps(test)
    def fails(judge: Judge, **others):
        seen = 0

        def examine(check: Check, case: Case) -> None:
            nonlocal seen
            seen += 1
            if seen == number:
                raise _Found(check, case)

        judge.examine = examine  # type: ignore[method-assign]
        try:
            test(judge=judge, **others)
        except _Found as found:
            case = found.case if found.check.shows_case else None
            raise Died(
                title, expected="a result", received=received, requirement=found.check.requirement, case=case
            ) from None
        finally:
            del judge.examine

    return fails


def found_before(test: Callable, title: str, expected: str, received: str) -> Callable:
    """The test, which found something in another process: where it finds nothing now, that is a violation."""

    @wraps(test)
    def fails(judge: Judge, **others):
        test(judge=judge, **others)
        if not any(entry.violation for entry in judge.ledger.values()):
            raise Violation(
                f"{title}; asked again for the same, the subject returned something else",
                expected=expected,
                received=received,
                requirement=getattr(test, "requirement", ""),
            )

    return fails
