"""tests of the judge: the kind balance accuses each of its faults by its own requirement, and nothing that is right."""

import json
from pathlib import Path

import pytest

import conformance
from conformance.balance.case import BalanceCase
from conformance.balance.kind import BALANCE
from conformance.core.judge import Judge, Violation
from conformance.core.register import of_stage
from conformance.core.shrink import shrink
from conformance.core.subject import Subject
from conformance.core.trial import accuse
from conformance.run.causes import diagnoses
from conformance.run.kinds import case_of_json, load_faults
from conformance.run.report import failure_page
from conformance.subjects.reference import Reference

REQUIREMENTS = of_stage(*BALANCE.stages)
FAULTS = [fault for fault in load_faults().values() if fault.kind is BALANCE]


def fault_named(name: str):
    return next(fault for fault in FAULTS if fault.name == name)


def shrunk(name: str) -> tuple[Judge, Violation]:
    """The judge of a fault, and the smallest case that breaks the fault's requirement."""
    fault = fault_named(name)
    judge = Judge(BALANCE.faulty(fault))
    return judge, shrink(judge, accuse(judge, ids=[fault.requirement])[fault.requirement])


class Float64(Reference):
    """The oracle itself."""

    compute_dtype = expert_dtype = "float64"


@pytest.mark.parametrize("subject", [Reference, Float64], ids=lambda subject: subject.__name__)
def test_what_is_right_is_not_accused(subject):
    judge = Judge(subject())
    accused = accuse(judge, seed=1, examples=20, ids=REQUIREMENTS)
    assert {name: (str(v), v.expected, v.received) for name, v in accused.items()} == {}
    assert {name for name in REQUIREMENTS if judge.ledger[name].judged == 0} == set()


def test_a_subject_without_these_methods_is_unsupported_and_not_ok():
    class Empty(Subject):
        """Defines nothing."""

    judge = Judge(Empty())
    assert accuse(judge, examples=3, ids=REQUIREMENTS) == {}
    assert {judge.ledger[name].status("MUST") for name in REQUIREMENTS} == {"unsupported"}


SHOWN = ["f-is-not-divided-by-k", "the-bias-moves-towards-the-load", "padding-takes-places", "z-loss-over-experts-too"]


@pytest.mark.parametrize("name", SHOWN)
def test_a_failure_shrinks_replays_and_reads_like_a_page(name):
    judge, violation = shrunk(name)
    case = violation.case
    assert isinstance(case, BalanceCase)
    assert case.num_tokens <= 2
    again = case_of_json(json.loads(json.dumps(case.to_json())))
    assert (again.digest, again.tags, again.spec) == (case.digest, case.tags, case.spec)
    page = failure_page(judge, violation, diagnoses(judge, violation))
    for part in (violation.requirement, "expected", "received", "rule", "tags", f"replay {violation.requirement}-"):
        assert part in page
    assert f"looks like     {name}: {fault_named(name).summary}" in page


@pytest.mark.parametrize("name", [*SHOWN, "only-the-first-choice-is-counted"])
def test_a_replay_shows_what_the_subject_returned_beside_the_reference(name):
    judge, violation = shrunk(name)
    text = BALANCE.side_by_side(judge, violation.case)
    assert "reference" in text
    assert f" {name} " in text
    assert "nothing that can be shown" not in text


def test_a_replay_says_what_cannot_be_shown():
    judge, violation = shrunk("no-loss-is-collected")
    text = BALANCE.side_by_side(judge, violation.case)
    assert "balance_loss() returned nothing that can be shown: no loss and d_logits_TE" in text


def test_a_stored_witness_keeps_its_name():
    witnesses = [json.loads(file.read_text()) for file in STORED]
    cases = [case_of_json(witness["case"]) for witness in witnesses]
    assert [f"{w['requirement']}-{c.digest}" for w, c in zip(witnesses, cases, strict=True)] == [f.stem for f in STORED]
    assert {type(case) for case in cases} == {BalanceCase}


STORED = sorted((Path(conformance.__file__).parent / "deviations_of" / "witnesses").glob("MSK-*.json"))


def test_a_case_of_balance_with_a_key_that_none_has_is_refused():
    data = json.loads(STORED[0].read_text())["case"]
    with pytest.raises(ValueError, match="a case of balance has the keys"):
        case_of_json(data | {"token_ids_T": [0]})
    with pytest.raises(ValueError, match="a case has the keys of a kind"):
        case_of_json({name: value for name, value in data.items() if name != "counts_SE"})
