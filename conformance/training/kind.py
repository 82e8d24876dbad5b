"""conformance, the kind training: what several layers count over several steps, and how their biases move."""

from collections.abc import Iterable
from typing import Any

from conformance.core.diagnosis import explaining
from conformance.core.fault import Fault, faulty
from conformance.core.judge import Judge, Violation
from conformance.core.kind import Kind
from conformance.core.picture import Panel
from conformance.core.subject import Subject
from conformance.subjects.reference import Reference
from conformance.training import draw, page, picture
from conformance.training.case import TrainingCase
from conformance.training.check import TrainingCheck


class TrainingKind(Kind):
    """Scripts of training passes, evaluation passes and steps of the optimizer, on a stack of layers."""

    name = "training"
    stages = ("steps",)
    check = TrainingCheck
    cost = 4

    def settings(self, judge: Judge, check: TrainingCheck):
        return draw.settings(judge, check)

    def draw(self, judge: Judge, check: TrainingCheck, seed: int) -> TrainingCase:
        return draw.draw(judge, check, seed)

    def fixed(self, judge: Judge, check: TrainingCheck) -> Iterable[TrainingCase]:
        return draw.fixed(judge, check)

    def rows_of_page(self, case: TrainingCase, token: int | None) -> list[tuple[str, str]]:
        return page.rows_of_page(case, token)

    def side_by_side(self, judge: Judge, case: TrainingCase, most_tokens: int = 4) -> str:
        return page.side_by_side(judge, case, most_tokens)

    def picture(self, judge: Judge | None, violation: Violation, case: TrainingCase) -> list[Panel]:
        return picture.picture(judge, case)

    def faulty(self, fault: Fault, **how: Any) -> Subject:
        return faulty(Reference(**how), fault)

    def diagnose(self, judge: Judge, violation: Violation, faults: Iterable[Fault]) -> list[Fault]:
        return explaining(judge, violation, faults, self.faulty)


TRAINING = TrainingKind()
requires = TRAINING.requires
