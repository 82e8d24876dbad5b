"""conformance, how a requirement becomes a test: one decorator, used by every file of `conformance.suite`."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance.balance.draw import load_cases, survey_load_cases
from conformance.core.judge import (
    CHECKS,
    LAYOUT_METHODS,
    LOAD_RULES,
    REPLAY_METHODS,
    Check,
    Judge,
    LayerCheck,
    LayoutCheck,
    LoadCheck,
    Violation,
)
from conformance.core.register import REQUIREMENTS
from conformance.layer.draw import layer_cases, survey_cases
from conformance.layer.verdicts import FORM
from conformance.router.draw import cases
from conformance.sharded.draw import layout_cases, survey_layout_cases


def requires(id: str, **wants) -> Callable:
    """Register a check for a requirement and make it a hypothesis test over the cases that it wants.

    Args:
        id: of the requirement.
        wants: fields of `Check`: which specs, logits, biases and inputs the check is about.
    """

    method = wants.get("method")
    kind = LayoutCheck if method in LAYOUT_METHODS else LoadCheck if method in LOAD_RULES else Check
    kind = LayerCheck if method in FORM or method in REPLAY_METHODS else kind

    def decorate(run: Callable[[Judge, Any], None]) -> Callable:
        if id in CHECKS:
            raise ValueError(f"requirement {id} has a check already: {CHECKS[id].run.__qualname__}")
        CHECKS[id] = kind(requirement=id, run=run, **wants)
        return as_test(CHECKS[id])

    return decorate


def as_test(check: Check) -> Callable:
    """A fresh hypothesis test of a check; called with a judge, it draws cases until one fails."""

    @given(data=st.data())
    def test(judge: Judge, data):
        judge.begin(check)
        specs, reasons = judge.specs(check)
        if check.method not in judge.capabilities:
            pytest.skip(f"unsupported: {check.method}() is not defined")
        if not specs:
            pytest.skip(f"unsupported: {'; '.join(reasons)}")
        if isinstance(check, (LayerCheck, LoadCheck)):
            survey(judge, check)
        judge.examine(check, data.draw(drawn_cases(judge, check)))

    test.__name__ = check.run.__name__
    test.__qualname__ = check.run.__qualname__
    test.__module__ = check.run.__module__
    test.__doc__ = f"{check.requirement}: {REQUIREMENTS[check.requirement].sentence}"
    test.requirement = check.requirement  # type: ignore[attr-defined]
    return test


def drawn_cases(judge: Judge, check: Check) -> st.SearchStrategy:
    """Cases of the kind that the check is about."""
    if isinstance(check, LayoutCheck):
        return layout_cases(judge, check)
    if isinstance(check, LoadCheck):
        return load_cases(judge, check)
    return layer_cases(judge, check) if isinstance(check, LayerCheck) else cases(judge, check)


def survey(judge: Judge, check: LayerCheck | LoadCheck) -> None:
    """Examine the fixed cases of a check, once; what they found is raised in every example, so that none is flaky."""
    if check.requirement not in judge.surveys:
        judge.surveys[check.requirement] = None
        try:
            for case in fixed_cases(judge, check):
                judge.examine(check, case)
        except Violation as violation:
            judge.surveys[check.requirement] = violation
    if found := judge.surveys[check.requirement]:
        raise found


def fixed_cases(judge: Judge, check: LayerCheck | LoadCheck) -> Iterable:
    """Cases of the kind that the check is about, which no luck decides."""
    if isinstance(check, LoadCheck):
        return survey_load_cases(judge, check)
    return survey_layout_cases(judge, check) if isinstance(check, LayoutCheck) else survey_cases(judge, check)
