"""conformance, the kind balance: how tokens spread over experts, what an uneven spread costs, and who is dropped."""

from collections.abc import Iterable
from typing import Any

from conformance.balance import draw, page, picture
from conformance.balance.case import BalanceCase
from conformance.balance.check import BalanceCheck
from conformance.core.diagnosis import explaining
from conformance.core.fault import Fault, faulty
from conformance.core.judge import Judge, Violation
from conformance.core.kind import Kind
from conformance.core.picture import Panel
from conformance.core.subject import Subject
from conformance.subjects.reference import Reference


class BalanceKind(Kind):
    """Counts, balance losses, bias updates and capacities; with padding among the tokens as well."""

    name = "balance"
    stages = ("load", "capacity", "mask")
    check = BalanceCheck

    def settings(self, judge: Judge, check: BalanceCheck):
        return draw.settings(judge, check)

    def draw(self, judge: Judge, check: BalanceCheck, seed: int) -> BalanceCase:
        return draw.draw(judge, check, seed)

    def fixed(self, judge: Judge, check: BalanceCheck) -> Iterable[BalanceCase]:
        return draw.fixed(judge, check)

    def rows_of_page(self, case: BalanceCase, token: int | None) -> list[tuple[str, str]]:
        return page.rows_of_page(case, token)

    def side_by_side(self, judge: Judge, case: BalanceCase, most_tokens: int = 4) -> str:
        return page.side_by_side(judge, case, most_tokens)

    def picture(self, judge: Judge | None, violation: Violation, case: BalanceCase) -> list[Panel]:
        return picture.picture(judge, violation, case)

    def faulty(self, fault: Fault, **how: Any) -> Subject:
        return faulty(Reference(**how), fault)

    def diagnose(self, judge: Judge, violation: Violation, faults: Iterable[Fault]) -> list[Fault]:
        return explaining(judge, violation, faults, self.faulty)


BALANCE = BalanceKind()
requires = BALANCE.requires
