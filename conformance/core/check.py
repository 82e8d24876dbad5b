"""conformance, the check: a requirement as code. Which cases it wants, what it does with one, and who is to blame."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from conformance.core.case import Case


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What a case has to be, and the sentence that the report gives where it is not."""

    sentence: str
    """`judged where every choice is beyond doubt`"""
    holds: Callable[[Any, Any], bool]
    """Of a judge and a case."""


def given(sentence: str, holds: Callable[[Any], bool]) -> Condition:
    """A condition on the case alone."""
    return Condition(sentence=sentence, holds=lambda judge, case: holds(case))


@dataclass(frozen=True, kw_only=True)
class Check:
    """One requirement as code. A kind has a subclass with the kinds of data that its cases are made of.

    A violation is blamed in one way (`Judge.blame`): on the requirements of `after`, where one of them fails on the
    same case; on those of `simpler`, where one fails on a simpler case; on nobody, where something in `unless` or in
    `excuses` holds; else on this one.
    """

    case: ClassVar[type[Case]] = Case
    """What its cases are."""
    excuses: ClassVar[tuple[Condition, ...]] = ()
    """What explains a violation of any check of the kind; see `unless`."""

    requirement: str
    run: Callable[[Any, Any], None]
    """Of a judge and a case; raises a Violation, or NotRun."""
    method: str
    """Of the subject; one that does not define it is unsupported."""
    spec: Callable[[Any], bool] = lambda spec: True
    inputs: tuple[str, ...] = ()
    """Further inputs that its cases have."""
    tokens: tuple[int, ...] = (7, 1)
    """How many its cases have."""
    shows_case: bool = True
    """Whether a failure has a case that replays; a configuration has none."""

    given: tuple[Condition, ...] = ()
    """What a case has to be; one that is not is not run."""
    after: tuple[str, ...] = ()
    simpler: tuple[tuple[Callable[[Any], Case | None], tuple[str, ...]], ...] = ()
    """(simplify, requirements): what to judge on simplify(case); None where there is no simpler case."""
    unless: tuple[Condition, ...] = ()
    """What explains a violation though no requirement names it; then the case is not judged, and the sentence says why.
    """

    def wants(self, case: Case) -> bool:
        """Whether it has something to say about a case of another check."""
        return isinstance(case, self.case) and self.spec(case.spec)


CHECKS: dict[str, Check] = {}
"""Every check, by requirement; the chapters of the kinds fill it (`conformance.run.kinds`)."""
