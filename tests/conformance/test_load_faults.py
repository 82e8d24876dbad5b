"""tests of the judge: every fault of load is accused by its own requirement, and what is right is never accused."""

import json

import pytest
from conformance.faults.load_fault import STAGES, FaultyLoad, first_accusation
from conformance.faults.load_faults import LOAD_FAULTS

from conformance.balance.case import LoadCase
from conformance.core.judge import CHECKS, Judge
from conformance.core.register import REQUIREMENTS
from conformance.core.shrink import shrink
from conformance.core.subject import Subject
from conformance.core.trial import DEFAULT_EXAMPLES, accuse, load_suite
from conformance.layer.case import case_from_json
from conformance.run.report import failure_page, side_by_side
from conformance.subjects.reference import Reference

IDS = [id for id, requirement in REQUIREMENTS.items() if requirement.stage in STAGES]


def test_every_fault_is_accused_by_its_own_requirement():
    found = {fault.name: first_accusation(fault, seed=0, examples=DEFAULT_EXAMPLES) for fault in LOAD_FAULTS}
    accusers = {name: violation and violation.requirement for name, violation in found.items()}
    assert accusers == {fault.name: fault.requirement for fault in LOAD_FAULTS}


def test_every_requirement_of_load_has_a_fault_and_a_check():
    load_suite()
    assert {fault.requirement for fault in LOAD_FAULTS} == set(IDS)
    assert set(IDS) <= set(CHECKS)


class Float64(Reference):
    """The oracle itself."""

    compute_dtype = expert_dtype = "float64"


@pytest.mark.parametrize("subject", [Reference, Float64], ids=lambda subject: subject.__name__)
def test_what_is_right_is_not_accused(subject):
    judge = Judge(subject())
    accused = accuse(judge, seed=1, examples=20, ids=IDS)
    assert {id: (str(v), v.expected, v.received) for id, v in accused.items()} == {}
    assert {id for id in IDS if judge.ledger[id].judged == 0} == set()


def test_a_subject_without_load_is_unsupported_and_not_ok():
    class Empty(Subject):
        """Defines nothing."""

    judge = Judge(Empty())
    assert accuse(judge, seed=0, examples=3, ids=IDS) == {}
    assert {judge.ledger[id].status("MUST") for id in IDS} == {"unsupported"}


@pytest.mark.parametrize("name", ["f-is-not-divided-by-k", "the-bias-moves-towards-the-load", "padding-takes-places"])
def test_a_failure_shrinks_replays_and_reads_like_a_page(name):
    fault = next(fault for fault in LOAD_FAULTS if fault.name == name)
    judge = Judge(FaultyLoad(fault))
    violation = shrink(judge, accuse(judge, seed=0, examples=60, ids=[fault.requirement])[fault.requirement])
    case = violation.case
    assert isinstance(case, LoadCase)
    again = case_from_json(json.loads(json.dumps(case.to_json())))
    assert (again.digest, again.tags, again.spec) == (case.digest, case.tags, case.spec)
    page = failure_page(judge, violation)
    for part in (fault.requirement, "expected", "received", "rule", "tags", f"replay {fault.requirement}-"):
        assert part in page
    assert "rule" in side_by_side(judge, case)
