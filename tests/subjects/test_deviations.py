"""Tests: what is declared of a subject still happens, where its package is installed. In its own environment, too:

.peers/maxtext/bin/python -m pytest tests/subjects/test_deviations.py
"""

import pytest

from conformance.core.judge import Judge
from conformance.run import conclude, running
from conformance.run.subjects_by_name import BUILT_IN, declared, subject_named

DECLARED = {name: deviations for name in BUILT_IN if (deviations := declared(name, []))}


@pytest.mark.parametrize("name", DECLARED)
def test_every_declared_deviation_of_a_subject_still_happens(name):
    if (why := running.missing(name)) is not None:
        pytest.skip(why)
    if name.startswith("transformers"):  # which an environment may have without it
        pytest.importorskip("torch", reason="transformers has its models with torch alone")
    judge = Judge(subject_named(name), deviations=DECLARED[name])
    found = [f"{name} {record['failure']['title']}" for record in conclude.stale(judge)]
    assert not found, "\n".join(found)


def test_a_declaration_that_is_gone_is_named_with_a_witness_and_without():
    wrong = [d for d in DECLARED["transformers"] if d.requirement in ("CFG-1", "SEL-5")]
    judge = Judge(subject_named("reference"), deviations=wrong)
    assert sorted(record["id"] for record in conclude.stale(judge)) == ["CFG-1", "SEL-5"]
