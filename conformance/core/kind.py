"""conformance, the kind: one sort of thing that is judged. A router, a layer, a sharded layer, a balance, a training.

The core asks the kind and never names one. A kind is a folder with a module `kind.py`; `conformance.run.kinds` has the
list of them.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

from conformance.core.case import Case
from conformance.core.check import CHECKS, Check
from conformance.core.judge import Judge, Violation
from conformance.core.picture import Panel
from conformance.core.register import REQUIREMENTS
from conformance.core.subject import Subject


class Kind(ABC):
    """What the judge, the report and the tests of the judge ask of a kind."""

    name: ClassVar[str]
    """That of its folder."""
    stages: ClassVar[tuple[str, ...]]
    """Its chapters, in the order of the data; each is a folder of the kind."""
    check: type[Check]
    cost: int = 1
    """A run tries its cases this many times less often: they cost that much more."""

    @property
    def case(self) -> type[Case]:
        """What its cases are."""
        return self.check.case

    def requires(self, requirement: str, **wants: Any) -> Callable:
        """The decorated function is the check of a requirement, over the cases that it wants.

        Args:
            requirement: its id.
            wants: fields of the kind's Check.
        """

        def decorate(run: Callable[[Judge, Any], None]) -> Callable:
            check = self.check(requirement=requirement, run=run, **wants)
            for name in (requirement, *check.after, *(name for _, names in check.simpler for name in names)):
                if name not in REQUIREMENTS:
                    raise ValueError(f"{run.__name__}: there is no row with the id {name!r} in a requirements.py")
            if requirement in CHECKS:
                raise ValueError(f"requirement {requirement} has a check already: {CHECKS[requirement].run.__name__}")
            CHECKS[requirement] = check
            return run

        return decorate

    # what is generated

    @abstractmethod
    def settings(self, judge: Judge, check: Any) -> tuple[list, Counter]:
        """What the check wants and the subject supports, of the kind's pool; and why the rest is not run."""

    @abstractmethod
    def draw(self, judge: Judge, check: Any, seed: int) -> Case:
        """The case of a seed; the same one whenever the settings are the same."""

    def fixed(self, judge: Judge, check: Any) -> Iterable[Case]:
        """Cases that no luck decides; each check is tried on them once."""
        return ()

    def worlds(self, judge: Judge) -> Iterator[tuple[Check, Case]]:
        """Small worlds, in which every case is tried; they need no luck. Nothing where the subject runs none."""
        return iter(())

    # what is shown

    @abstractmethod
    def rows_of_page(self, case: Any, token: int | None) -> list[tuple[str, str]]:
        """(name, text): what a page of a failure shows of a case."""

    @abstractmethod
    def side_by_side(self, judge: Judge, case: Any, most_tokens: int = 4) -> str:
        """Every stage of the reference, and what the subject returned beside it."""

    def picture(self, judge: Judge | None, violation: Violation, case: Any) -> list[Panel]:
        """What a drawn report shows of a failure besides its text.

        Args:
            judge: asks the subject again; None where it is not called, since it hung or died on the case.
        """
        return []

    # the faults that judge the judge

    @abstractmethod
    def faulty(self, fault: Any, **how: Any) -> Subject:
        """The reference with one Fault in it."""

    def diagnose(self, judge: Judge, violation: Violation, faults: Iterable[Any]) -> list[Any]:
        """The Faults that return what the subject returned on the case of a violation."""
        return []


KIND_OF_STAGE: dict[str, Kind] = {}
"""Every stage; `conformance.run.kinds` fills it."""


def kind_of(requirement: str) -> Kind:
    """The kind of a requirement."""
    return KIND_OF_STAGE[REQUIREMENTS[requirement].stage]


def settings_of(judge: Judge, check: Check) -> tuple[list, Counter]:
    """`Kind.settings`, found once for a judge."""
    key = "settings", check.requirement
    if key not in judge.memory:
        judge.memory[key] = kind_of(check.requirement).settings(judge, check)
    return judge.memory[key]
