"""conformance, the smallest case: a failing case loses what it does not need to fail."""

from collections.abc import Iterator

import numpy as np

from conformance.core.case import Case
from conformance.core.check import CHECKS
from conformance.core.judge import Judge, NotRun, Violation

TRIES = 400
MOST_TOKENS = 2**20
"""A case of more is shown as it is: each try takes seconds."""
TOKENS_TRIED = 20
"""So many tokens are taken away one by one; of more, parts."""


def shrink(judge: Judge, violation: Violation) -> Violation:
    """The violation of a smaller case: fewer tokens, less of what it has besides, rounder numbers."""
    tries = 0
    changed = violation.case is not None and violation.case.num_tokens <= MOST_TOKENS
    while changed:
        changed = False
        assert violation.case is not None
        for smaller in _smaller(violation.case, violation.token):
            tries += 1
            if tries > TRIES:
                return violation
            if found := still_violated(judge, violation.requirement, smaller):
                violation, changed = found, True
                break
    return violation


def still_violated(judge: Judge, requirement: str, case: Case) -> Violation | None:
    """The undeclared violation of this very requirement by a case, or None."""
    check, near_ties = CHECKS[requirement], judge.ledger[requirement].near_ties
    if not check.wants(case):
        return None
    try:
        judge.run(check, case)
    except Violation as violation:
        try:
            same = violation.requirement == requirement and judge.covering(violation) is None
            return violation if same and judge.blame(check, violation) is violation else None
        except NotRun:
            return None
    except Exception:
        return None  # a smaller case may be no case at all: NotRun, or inputs that the reference refuses
    finally:
        judge.ledger[requirement].near_ties = near_ties
    return None


def _smaller(case: Case, token: int | None) -> Iterator[Case]:
    """Simpler neighbours of a case, the greatest simplification first."""
    if case.num_tokens > 1:
        if token is not None and token < case.num_tokens:  # a check may make further tokens
            yield case.tokens(np.array([token]))
        if case.num_tokens > TOKENS_TRIED:  # one by one would take as many runs as there are tokens
            rows = np.arange(case.num_tokens)
            yield from (case.tokens(each) for each in np.array_split(rows, 2))
            yield from (case.tokens(np.setdiff1d(rows, each)) for each in np.array_split(rows, 8))
        else:
            for t in range(case.num_tokens):
                yield case.tokens(np.delete(np.arange(case.num_tokens), t))
    yield from case.simpler()
