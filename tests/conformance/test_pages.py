"""tests of the judge: a page names the known fault that explains it, one fault has one page, and a crash its place."""

from types import SimpleNamespace

import numpy as np
import pytest

from conformance.core.check import CHECKS
from conformance.core.fault import first_killer
from conformance.core.judge import Crash, Judge, Violation
from conformance.core.show import shown_apart
from conformance.core.subject import Subject
from conformance.core.trial import accuse
from conformance.run import causes
from conformance.run.conclude import conclude
from conformance.run.kinds import load_faults
from conformance.run.report import SAME_CASE, SAME_FAULT, assemble, folded, is_told_elsewhere, markdown
from conformance.subjects.reference import Reference

FAULTS = load_faults()
SAMPLE = list(FAULTS.values())[::10]
ENOUGH = 0.95


def page_of_own_requirement(fault) -> causes.Named:
    """What the page of the requirement that a fault is meant to break says of it, or of another one of its stage."""
    violation = first_killer(fault)
    judge = Judge(fault.kind.faulty(fault))
    assert violation is not None, fault.name
    smaller, known = causes.shrunk_with_causes(judge, violation)
    return causes.Named(fault=fault, violation=smaller, causes=known)


def test_the_page_of_a_known_fault_names_it_or_one_that_returns_the_same():
    unnamed = [fault.name for fault in SAMPLE if not page_of_own_requirement(fault).is_named]
    assert len(unnamed) <= (1 - ENOUGH) * len(SAMPLE), unnamed


@pytest.mark.parametrize(
    "name",
    [
        "small-experts-vanish",  # smaller than rounding beside the larger ones
        "weights-by-atomics",  # draws
        "the-sum-has-no-order",  # keeps a count between calls, and is wrong in the last bit
        "uneven-groups-accepted",  # returns nothing
        "no-loss-is-collected",  # returns less
        "slots-ascending",  # another order of slots
    ],
)
def test_a_fault_is_named_whatever_it_shows(name):
    assert page_of_own_requirement(FAULTS[name]).is_named


def test_the_table_has_a_line_for_each_fault_and_the_share_of_those_that_are_named():
    # All cases of its kind are drawn for it: a kind that has few.
    lines = list(causes.table([FAULTS["biases-begin-with-what-the-memory-held"]]))
    assert lines[0].split()[:2] == ["biases-begin-with-what-the-memory-held", "STP-2"]
    assert lines[0].split()[2].startswith("itself")
    assert lines[1] == "1 faults, 1 named themselves or by an equal one: 100.0 %"


# one fault, one page


def records_of(judge: Judge, *requirements: str) -> list[dict]:
    """The records of a run of these requirements, in this order."""
    found = []
    for name in requirements:
        violation = accuse(judge, ids=[name]).get(name)
        judge.ledger[name].violation = None
        found += conclude(judge, name, None if violation is None else SimpleNamespace(value=violation))
    return found


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    """Cases are written below a folder of this test."""
    monkeypatch.chdir(tmp_path)


def judge_of(name: str) -> Judge:
    return Judge(FAULTS[name].kind.faulty(FAULTS[name]))


class NoTokens(Reference):
    """Zero tokens are an error, and with a capacity 1 is added to every output."""

    def layer(self, x_TD, params, spec, *, capacity=None):
        assert len(x_TD), "no tokens"
        return super().layer(x_TD, params, spec) + (capacity is not None)


def test_a_case_that_lacks_an_input_of_another_requirement_breaks_it_not(quiet):
    records = records_of(Judge(NoTokens()), "LAY-3", "LAY-19")
    assert [(record["id"], record["status"]) for record in records] == [("LAY-3", "NEW"), ("LAY-19", "NEW")]


def test_what_one_fault_breaks_is_one_page(quiet):
    records = records_of(judge_of("the-bias-never-moves"), "LOD-19", "LOD-22", "LOD-23")
    report = assemble([{"name": "x"}], records, {}, complete=True)["requirements"]
    assert [r["id"] for r in report if r["status"] == "NEW"] == ["LOD-19", "LOD-22", "LOD-23"]
    first, *others = report
    assert all(is_told_elsewhere(r) for r in others)
    assert not is_told_elsewhere(first)
    told = first["failure"]["also_broken"]
    assert sorted(name for names in told.values() for name in names) == ["LOD-22", "LOD-23"]
    assert told.keys() <= {SAME_CASE, SAME_FAULT}
    lines = " ".join(first["failure"]["page"].split())
    assert all(f"also broken by {why}: {', '.join(names)}" in lines for why, names in told.items())
    assert all(r["failure"]["page"].startswith(r["id"]) for r in others)


def test_a_page_looks_like_what_all_that_it_tells_of_looks_like(quiet):
    records = records_of(judge_of("each-rank-takes-its-sign"), "LOD-20", "LOD-21", "LOD-25")
    (first,) = [r for r in folded(records) if not is_told_elsewhere(r)]
    assert list(first["failure"]["looks_like"]) == ["each-rank-takes-its-sign"]


def test_an_unknown_fault_has_one_page_where_one_case_breaks_several_requirements(quiet):
    class Strange(Reference):
        """Wrong in a way that no known fault is."""

        def bias_update(self, counts_SE, update, expert_bias_E):
            return np.arange(len(expert_bias_E)) + 100.0

    found = {r["id"]: r for r in records_of(Judge(Strange()), "LOD-21", "LOD-20")}
    assert found["LOD-21"]["failure"]["first"] is None
    assert found["LOD-19"]["failure"]["first"] == {"requirement": "LOD-21", "why": SAME_CASE}


def test_a_requirement_that_is_found_broken_again_keeps_its_page(quiet):
    records = records_of(judge_of("the-bias-never-moves"), "LOD-19", "LOD-19")
    assert [r["failure"]["first"] for r in records] == [None, None]


def test_two_faults_have_two_pages(quiet):
    class Twice(Reference):
        """Two faults in two methods."""

        def bias_update(self, counts_SE, update, expert_bias_E):
            return np.float32(expert_bias_E)

        def z_loss(self, logits_TE, coeff, **inputs):
            return super().z_loss(logits_TE, 2 * coeff, **inputs)

    records = records_of(Judge(Twice()), "LOD-16", "LOD-19")
    assert [r["failure"]["first"] for r in records] == [None, None]
    assert "also broken" not in "".join(r["failure"]["page"] for r in folded(records))


def test_markdown_says_where_the_page_of_a_requirement_is(quiet):
    records = records_of(judge_of("the-bias-never-moves"), "LOD-19", "LOD-22")
    text = markdown(assemble([{"name": records[0]["subject"]}], records, {}, complete=True))
    assert f"LOD-22 NEW\n\nSee LOD-19: {records[1]['failure']['first']['why']}." in text


# the rows


def test_two_rows_are_shown_from_where_they_differ_with_as_many_digits_as_tell_them_apart():
    wanted, found = np.zeros(40), np.zeros(40)
    found[30] = 1
    expected, received = shown_apart(wanted, found, found != wanted)
    assert (expected.split()[:4], received.split()[:5]) == (
        ["from", "number", "30", "on"],
        ["from", "number", "30", "on", "[1"],
    )
    assert shown_apart(np.ones(2), np.array([1, 1 + 1e-8]), np.array([False, True])) == ("[1 1]", "[1 1.00000001]")
    assert shown_apart(np.ones(2), np.array([1, 2.0]), np.array([False, True])) == ("[1 1]", "[1 2]")


# a crash


class Breaking(Subject):
    """Raises deep in a library, called from here."""

    def load(self, expert_ids_TK, num_experts, token_mask_T=None):
        return np.linalg.inv(np.zeros((2, 2)))


def test_a_crash_names_the_line_of_the_subject_and_the_last_one():
    violation = accuse(Judge(Breaking()), ids=["LOD-1"])["LOD-1"]
    assert isinstance(violation, Crash)
    assert f"({__file__}:" in violation.received
    assert "in load, which called" in violation.received
    assert "linalg" in violation.received


def test_a_violation_keeps_the_case_that_it_was_found_on():
    assert not CHECKS["CFG-2"].shows_case
    fault = FAULTS["uneven-groups-accepted"]
    violation: Violation = accuse(Judge(fault.kind.faulty(fault)), ids=["CFG-2"])["CFG-2"]
    assert violation.case is None
    assert violation.tried is not None
