"""conformance, the trial: every check of the suite on one subject without pytest, for the tests of the judge."""

import importlib
from pathlib import Path

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import FlakyFailure

from conformance.core.check import as_test
from conformance.core.judge import CHECKS, Judge, Violation, stage_order

DEFAULT_EXAMPLES = 60
"""Cases per requirement."""
LAYERS_COST = 4
"""A run tries a whole layer this many times less often than a router: it costs that much more."""


# A case is built by NumPy from a few drawn choices: what hypothesis finds slow or large is neither.
UNHELPFUL = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.large_base_example,
]


def hypothesis_settings(examples: int, **more) -> settings:
    """The settings under which a check runs, in a trial and under pytest."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=UNHELPFUL,
        **more,
    )


def load_suite() -> None:
    """Import the checks of every chapter, so that all of them are registered."""
    root = Path(__file__).parents[1]
    for path in sorted(root.glob("*/*/checks*.py")):
        importlib.import_module(".".join(("conformance", *path.relative_to(root).with_suffix("").parts)))


def accuse(judge: Judge, *, seed: int, examples: int = DEFAULT_EXAMPLES, ids=None, first: bool = False):
    """Violations of a subject, by requirement, earliest stage first, not shrunk.

    Args:
        judge: of the subject.
        seed: of the generated cases.
        examples: cases per requirement.
        ids: requirements to judge; None is all.
        first: stop at the first violation.
    """
    load_suite()
    profile = hypothesis_settings(examples, phases=[Phase.generate])
    for id in sorted(CHECKS, key=stage_order) if ids is None else ids:
        try:
            hypothesis.seed(seed)(profile(as_test(CHECKS[id])))(judge)
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
    found = {id: entry.violation for id, entry in judge.ledger.items() if entry.violation}
    return dict(sorted(found.items(), key=lambda item: stage_order(item[0])))
