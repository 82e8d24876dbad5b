"""conformance, the kind router: from logits to expert ids and weights."""

from collections.abc import Iterable, Iterator
from typing import Any

from conformance.core.check import CHECKS, Check
from conformance.core.diagnosis import explaining
from conformance.core.fault import Fault
from conformance.core.judge import Judge, Violation
from conformance.core.kind import Kind
from conformance.core.picture import Panel
from conformance.router import draw, page, pairs, picture, sizes, small_worlds
from conformance.router.case import RouterCase
from conformance.router.check import RouterCheck
from conformance.router.diagnosis import same_routing, same_slots
from conformance.router.faulty import FaultyRouter


class RouterKind(Kind):
    """What chooses experts and weighs them."""

    name = "router"
    stages = ("config", "run", "gate", "score", "groups", "select", "weights")
    check = RouterCheck

    def settings(self, judge: Judge, check: RouterCheck):
        return draw.settings(judge, check)

    def draw(self, judge: Judge, check: RouterCheck, seed: int) -> RouterCase:
        return draw.draw(judge, check, seed)

    def fixed(self, judge: Judge, check: RouterCheck) -> Iterator[RouterCase]:
        if judge.chosen is None:
            yield from pairs.cases(judge, check)
            yield from sizes.cases(judge, check)

    def worlds(self, judge: Judge) -> Iterator[tuple[Check, RouterCase]]:
        for requirement, case in small_worlds.worlds_of(judge):
            yield CHECKS[requirement], case

    def rows_of_page(self, case: RouterCase, token: int | None) -> list[tuple[str, str]]:
        return page.rows_of_page(case, token)

    def side_by_side(self, judge: Judge, case: RouterCase, most_tokens: int = 4) -> str:
        return page.side_by_side(judge, case, most_tokens)

    def picture(self, judge: Judge | None, violation: Violation, case: RouterCase) -> list[Panel]:
        return picture.picture(judge, case, violation.token)

    def faulty(self, fault: Fault, **how: Any) -> FaultyRouter:
        return FaultyRouter(fault, **how)

    def diagnose(self, judge: Judge, violation: Violation, faults: Iterable[Fault]) -> list[Fault]:
        return explaining(judge, violation, faults, self.faulty, (same_routing, same_slots))


ROUTER = RouterKind()
requires = ROUTER.requires
