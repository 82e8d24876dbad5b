"""conformance, the trial: how a check becomes a hypothesis test, and every check on one subject without pytest."""

import zlib
from collections import Counter
from collections.abc import Callable, Iterable

import hypothesis
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure

from conformance.core.check import CHECKS, Check
from conformance.core.judge import Judge, Violation
from conformance.core.kind import kind_of, settings_of
from conformance.core.register import REQUIREMENTS, SPEC_VERSION, stage_order

DEFAULT_EXAMPLES = 60
"""Cases for each requirement of a kind whose cost is 1."""
NOTHING_WANTED = "nothing that was chosen is of this requirement"
# A case is built by NumPy from one seed: what hypothesis finds slow or large is neither.
UNHELPFUL = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.large_base_example,
]

# Not integers: among these hypothesis mixes the literals of the user's own modules, so that one more constant in a
# subject's file would draw other cases. No source has literals of these characters, which are for private use; and a
# string costs a third of the time of 32 booleans.
BYTES = st.characters(min_codepoint=0xE000, max_codepoint=0xE0FF, categories=["Co"])
SEEDS = st.text(BYTES, min_size=4, max_size=4).map(lambda text: int.from_bytes(ord(byte) & 0xFF for byte in text))
TOGETHER = 10
"""Cases of one example of hypothesis, at most: an example costs it as much as some small cases cost."""


def as_test(check: Check, *, examples: int = DEFAULT_EXAMPLES, seed: int | None = None) -> Callable[[Judge], None]:
    """A hypothesis test of a check: called with a judge, it draws cases until one fails.

    The cases depend on the requirement and the version of the specification alone, and on the seed where one is given:
    the same commit gets the same verdict.

    Args:
        examples: cases, where one costs 1.
        seed: draws other cases.
    """

    kind = kind_of(check.requirement)
    cases = -(-examples // kind.cost)
    drawn = -(-cases // TOGETHER)
    each = -(-cases // drawn)

    @given(number=SEEDS)
    def test(judge: Judge, number: int):
        if sentence := why_not(judge, check):
            pytest.skip(f"unsupported: {sentence}")
        examine_fixed(judge, check)
        for own in np.random.SeedSequence(number).generate_state(each):
            judge.examine(check, kind.draw(judge, check, int(own)))

    row = REQUIREMENTS[check.requirement]
    # `pytest -k select`, `-k SEL_3` and `-k dropped` find it.
    test.__name__ = test.__qualname__ = f"test_{row.stage}_{row.id.replace('-', '_')}_{check.run.__name__}"
    test.__module__ = check.run.__module__
    test.__doc__ = f"{row.id}: {row.sentence}"
    test.requirement = check.requirement  # type: ignore[attr-defined]
    of_case = zlib.crc32(f"{check.requirement} {SPEC_VERSION} {'' if seed is None else seed}".encode())
    profile = settings(
        max_examples=drawn,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=UNHELPFUL,
        phases=[Phase.generate],  # simpler seeds say nothing; `core.shrink` makes the case itself smaller
    )
    return hypothesis.seed(of_case)(profile(test))


def why_not(judge: Judge, check: Check) -> str | None:
    """Before the cases of a check: why none can be run, or None."""
    entry = judge.ledger[check.requirement]
    if check.method not in judge.capabilities:
        entry.reasons = Counter([f"{check.method}() is not defined"])
        return f"{check.method}() is not defined"
    found, entry.reasons = settings_of(judge, check)
    if not found and not entry.reasons:
        entry.reasons = Counter([NOTHING_WANTED])
    return None if found else "; ".join(entry.reasons)


def examine_fixed(judge: Judge, check: Check) -> None:
    """Examine the fixed cases of a check, once; what they found is raised each time, so that none is flaky."""
    done: dict[str, Exception | None] = judge.memory.setdefault("fixed cases", {})
    if check.requirement not in done:
        done[check.requirement] = None
        try:
            for case in kind_of(check.requirement).fixed(judge, check):
                judge.examine(check, case)
        except Exception as error:  # a violation, or an error of the judge
            done[check.requirement] = error
    if found := done[check.requirement]:
        raise found


def accuse(
    judge: Judge,
    *,
    seed: int | None = None,
    examples: int = DEFAULT_EXAMPLES,
    ids: Iterable[str] | None = None,
    first: bool = False,
) -> dict[str, Violation]:
    """Violations of a subject, by requirement, earliest stage first, not shrunk.

    Args:
        judge: of the subject.
        seed: of the generated cases; None: those of a run.
        examples: cases for each requirement.
        ids: requirements to judge; None: every one.
        first: stop at the first violation.
    """
    for name in sorted(CHECKS, key=stage_order) if ids is None else ids:
        try:
            as_test(CHECKS[name], examples=examples, seed=seed)(judge)
        except Violation as violation:
            judge.ledger[violation.requirement].violation = violation
        except FlakyFailure as flaky:
            # hypothesis runs a failing case again, and a subject that is not deterministic may pass then.
            violations = [each for each in flaky.exceptions if isinstance(each, Violation)]
            if not violations:
                raise
            judge.ledger[violations[0].requirement].violation = violations[0]
        except pytest.skip.Exception:
            continue  # unsupported, and in the ledger as such
        if first and any(entry.violation for entry in judge.ledger.values()):
            break
    found = {name: entry.violation for name, entry in judge.ledger.items() if entry.violation}
    return dict(sorted(found.items(), key=lambda item: stage_order(item[0])))
