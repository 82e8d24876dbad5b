"""conformance, the kind layer: from tokens and parameters to outputs and gradients, stage by stage and whole."""

from collections.abc import Iterable
from typing import Any

from conformance.core.diagnosis import explaining
from conformance.core.fault import Fault, faulty
from conformance.core.judge import Judge, Violation
from conformance.core.kind import Kind
from conformance.core.picture import Panel
from conformance.core.subject import Subject
from conformance.layer import draw, page, picture
from conformance.layer.case import LayerCase
from conformance.layer.check import LayerCheck
from conformance.subjects.reference import Reference


class LayerKind(Kind):
    """What experts make of tokens, on one rank."""

    name = "layer"
    stages = ("permute", "experts", "combine", "layer", "latent", "null", "backward", "replay")
    check = LayerCheck
    cost = 4

    def settings(self, judge: Judge, check: LayerCheck):
        return draw.settings(judge, check)

    def draw(self, judge: Judge, check: LayerCheck, seed: int) -> LayerCase:
        return draw.draw(judge, check, seed)

    def fixed(self, judge: Judge, check: LayerCheck) -> Iterable[LayerCase]:
        return draw.fixed(judge, check)

    def rows_of_page(self, case: LayerCase, token: int | None) -> list[tuple[str, str]]:
        return page.rows_of_page(case, token)

    def side_by_side(self, judge: Judge, case: LayerCase, most_tokens: int = 4) -> str:
        return page.side_by_side(judge, case, most_tokens)

    def picture(self, judge: Judge | None, violation: Violation, case: LayerCase) -> list[Panel]:
        return picture.picture(judge, violation, case)

    def faulty(self, fault: Fault, **how: Any) -> Subject:
        return faulty(Reference(**how), fault)

    def diagnose(self, judge: Judge, violation: Violation, faults: Iterable[Fault]) -> list[Fault]:
        return explaining(judge, violation, faults, self.faulty)


LAYER = LayerKind()
requires = LAYER.requires
