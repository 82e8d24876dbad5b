"""conformance, causes: which known faults explain a violation, and how often they do: the table of diagnoses."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from conformance.core.case import Case
from conformance.core.check import CHECKS, Check
from conformance.core.fault import Fault
from conformance.core.judge import Judge, Violation
from conformance.core.kind import Kind, kind_of
from conformance.core.register import MUST, REQUIREMENTS, of_stage, stage_order
from conformance.core.shrink import shrink
from conformance.core.subject import Subject
from conformance.core.trial import accuse
from conformance.run.kinds import load_faults

MOST_SHOWN = 3
"""Of the faults that explain a violation."""


def diagnoses(judge: Judge, *violations: Violation) -> list[Fault]:
    """The known faults that return what the subject returned, the likeliest first.

    Args:
        judge: of the subject.
        violations: of one requirement, on the case as it was drawn and on smaller ones. What explains all of them comes
            alone; where nothing does, what explains one of them.
    """
    found: list[Fault] = []
    for violation in violations:
        if violation.tried is not None:
            kind = kind_of(violation.requirement)
            faults = found or [fault for fault in load_faults().values() if fault.kind is kind]
            found = kind.diagnose(judge, violation, faults) or found
    return found


def shrunk_with_causes(judge: Judge, violation: Violation) -> tuple[Violation, list[Fault]]:
    """The violation of a smaller case, and the faults that explain it."""
    smaller = shrink(judge, violation)
    if smaller is violation:
        return smaller, diagnoses(judge, violation)
    return smaller, diagnoses(judge, smaller, violation)


# how often a fault is named


@dataclass(frozen=True, kw_only=True)
class Named:
    """What the first page of a fault says of it."""

    fault: Fault
    violation: Violation | None
    """That of the page; None where no page is made."""
    causes: list[Fault] = field(default_factory=list)

    @property
    def shown(self) -> list[str]:
        """The names on the page."""
        return [fault.name for fault in self.causes[:MOST_SHOWN]]

    @property
    def is_named(self) -> bool:
        """Whether the fault, or one that returns the same on the case, is on the page."""
        return self.fault in self.causes

    def __str__(self) -> str:
        if self.violation is None:
            return "no page"
        if not self.causes:
            return "none"
        if not self.is_named:
            return f"another: {', '.join(self.shown)}"
        if self.fault.name in self.shown:
            others = ", ".join(name for name in self.shown if name != self.fault.name)
            return f"itself, equal here: {others}" if others else "itself"
        return f"equal: {', '.join(self.shown)}"


def diagnosed(fault: Fault) -> Named:
    """The first page that a user of a subject with this fault would see."""
    judge = Judge(fault.kind.faulty(fault))
    violation = first_violation(judge, fault)
    if violation is None:
        return Named(fault=fault, violation=None)
    smaller, causes = shrunk_with_causes(judge, violation)
    return Named(fault=fault, violation=smaller, causes=causes)


def first_violation(judge: Judge, fault: Fault) -> Violation | None:
    """What a run finds first: a MUST in the order of the stages; a SHOULD where there is none."""
    tried = [name for name, (methods, _) in cases_of_kind(fault.kind).items() if fault.method in methods]
    for level in (MUST, "SHOULD"):
        for requirement in tried:
            if REQUIREMENTS[requirement].level == level:
                for check, case in cases_of_kind(fault.kind)[requirement][1]:
                    try:
                        judge.examine(check, case)
                    except Violation as violation:
                        judge.ledger[violation.requirement].violation = violation
                        break
            found = {name: entry.violation for name, entry in judge.ledger.items() if entry.violation is not None}
            of_level = [name for name in found if REQUIREMENTS[name].level == level]
            if of_level:
                return found[min(of_level, key=stage_order)]
    return None


class _Asking(Judge):
    """A judge that keeps which methods are called, and on which cases its checks are tried."""

    def __init__(self, subject: Subject):
        super().__init__(subject)
        self.methods, self.cases = set[str](), list[tuple[Check, Case]]()
        self.watch = lambda check, case: self.cases.append((check, case))

    def call(self, case: Case, method: str, *arguments: Any, blame: str = "", **inputs: Any) -> Any:
        self.methods.add(method)
        return super().call(case, method, *arguments, blame=blame, **inputs)


@cache
def cases_of_kind(kind: Kind) -> dict[str, tuple[set[str], list[tuple[Check, Case]]]]:
    """For each requirement of a kind: the methods that its check calls, and the cases of a run, in order.

    They depend on the requirement alone, so that one right subject tells them for all faults.
    """
    found = {}
    for requirement in of_stage(*kind.stages):
        right = Fault(name="none", summary="The reference as it is.", requirement=requirement)
        judge = _Asking(kind.faulty(right))
        accuse(judge, ids=[requirement])
        found[requirement] = judge.methods | {CHECKS[requirement].method}, judge.cases
    return found


def table(faults: list[Fault]) -> Iterator[str]:
    """A line for each fault, and the share of those that are named at the end."""
    named = 0
    for fault in faults:
        row = diagnosed(fault)
        named += row.is_named
        first = "-" if row.violation is None else row.violation.requirement
        yield f"{fault.name:<50} {first:<7} {row}"
    yield f"{len(faults)} faults, {named} named themselves or by an equal one: {100 * named / len(faults):.1f} %"
