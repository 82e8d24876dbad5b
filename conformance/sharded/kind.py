"""conformance, the kind sharded: a layer laid over devices. What travels between them, and what comes of it."""

from collections.abc import Iterable, Iterator
from typing import Any

from conformance.core.check import Check
from conformance.core.diagnosis import explaining
from conformance.core.fault import Fault, faulty
from conformance.core.judge import Judge, Violation
from conformance.core.kind import Kind
from conformance.core.picture import Panel
from conformance.core.subject import Subject
from conformance.sharded import draw, page, picture, small_worlds
from conformance.sharded.case import ShardedCase
from conformance.sharded.check import ShardedCheck
from conformance.subjects.reference import Reference


class ShardedKind(Kind):
    """The plan of an exchange, and the outputs and gradients of a layer on every rank."""

    name = "sharded"
    stages = ("dispatch", "layout")
    check = ShardedCheck
    cost = 4

    def settings(self, judge: Judge, check: ShardedCheck):
        return draw.settings(judge, check)

    def draw(self, judge: Judge, check: ShardedCheck, seed: int) -> ShardedCase:
        return draw.draw(judge, check, seed)

    def fixed(self, judge: Judge, check: ShardedCheck) -> Iterable[ShardedCase]:
        return draw.fixed(judge, check)

    def worlds(self, judge: Judge) -> Iterator[tuple[Check, ShardedCase]]:
        return small_worlds.worlds_of(judge)

    def rows_of_page(self, case: ShardedCase, token: int | None) -> list[tuple[str, str]]:
        return page.rows_of_page(case, token)

    def side_by_side(self, judge: Judge, case: ShardedCase, most_tokens: int = 4) -> str:
        return page.side_by_side(judge, case, most_tokens)

    def picture(self, judge: Judge | None, violation: Violation, case: ShardedCase) -> list[Panel]:
        return picture.picture(judge, violation, case)

    def faulty(self, fault: Fault, **how: Any) -> Subject:
        return faulty(Reference(**how), fault)

    def diagnose(self, judge: Judge, violation: Violation, faults: Iterable[Fault]) -> list[Fault]:
        return explaining(judge, violation, faults, self.faulty)


SHARDED = ShardedKind()
requires = SHARDED.requires
