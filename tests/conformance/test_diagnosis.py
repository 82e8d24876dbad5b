"""tests of the judge: a diagnosis names the fault that returns what the subject returned, if there is one."""

from dataclasses import dataclass

import numpy as np
import pytest

from conformance.balance.kind import BALANCE
from conformance.core.check import CHECKS
from conformance.core.diagnosis import calls_of, same
from conformance.core.judge import Crash, Judge, Violation
from conformance.core.trial import accuse
from conformance.run.kinds import load_faults
from conformance.subjects.reference import Reference
from moe_ref import RouterSpec, RoutingRecord

FAULTS = [fault for fault in load_faults().values() if fault.kind is BALANCE]
BIAS = "LOD-19"


class Sleeping(Reference):
    """Written without knowing the fault `the-bias-never-moves`."""

    def bias_update(self, counts_SE, update, expert_bias_E):
        return np.float32(expert_bias_E)


@dataclass(frozen=True)
class Frozen(Sleeping):
    """The same, as a class whose objects cannot be written to."""


class Strange(Reference):
    """Wrong in a way that no fault has."""

    def bias_update(self, counts_SE, update, expert_bias_E):
        return np.arange(len(expert_bias_E))


class Raising(Reference):
    """No result at all."""

    def bias_update(self, counts_SE, update, expert_bias_E):
        raise TypeError("no bias")


def judged(subject: Reference) -> tuple[Judge, Violation]:
    judge = Judge(subject)
    return judge, accuse(judge, ids=[BIAS])[BIAS]


@pytest.mark.parametrize("subject", [Sleeping, Frozen], ids=lambda subject: subject.__name__)
def test_the_fault_that_returns_the_same_is_named(subject):
    judge, violation = judged(subject())
    assert [fault.name for fault in BALANCE.diagnose(judge, violation, FAULTS)] == ["the-bias-never-moves"]


@pytest.mark.parametrize("subject", [Strange, Raising], ids=lambda subject: subject.__name__)
def test_what_no_fault_returns_is_not_named(subject):
    judge, violation = judged(subject())
    assert isinstance(violation, Crash) == (subject is Raising)
    assert BALANCE.diagnose(judge, violation, FAULTS) == []


def test_what_the_clean_reference_returns_too_is_not_named():
    _, violation = judged(Sleeping())
    assert BALANCE.diagnose(Judge(Reference()), violation, FAULTS) == []


def test_a_diagnosis_leaves_the_subject_and_the_ledger_as_they_were():
    judge, violation = judged(Sleeping())
    before = judge.ledger[BIAS].near_ties, judge.ledger[BIAS].judged, vars(judge.subject).copy()
    (call,), again = calls_of(judge, CHECKS[BIAS], violation.case)
    assert (judge.ledger[BIAS].near_ties, judge.ledger[BIAS].judged, vars(judge.subject)) == before
    np.testing.assert_array_equal(call.result, violation.case.expert_bias_E)
    np.testing.assert_array_equal(call.arguments[0], violation.case.counts_SE)
    np.testing.assert_array_equal(again[0].result, call.result)


@pytest.mark.parametrize(("wanted", "found", "alike"), [
    (np.array([1, 2]), np.array([1, 2], np.int32), True),
    (np.array([1, 2]), np.array([1, 3]), False),
    (np.array([10**9]), np.array([10**9 + 1]), False),
    (np.array([1.0, 2.0]), np.array([1.0, 2.0 + 1e-5], np.float32), True),
    (np.array([1.0, 2.0]), np.array([1.0, 2.1]), False),
    (np.array([np.nan, np.inf]), np.array([np.nan, np.inf]), True),
    (np.array([np.inf]), np.array([-np.inf]), False),
    (np.zeros((2, 1)), np.zeros((1, 2)), False),
    ({"loss": 1.0}, {"loss": 1.0, "more": 2}, True),
    ({"loss": 1.0, "more": 2}, {"loss": 1.0}, False),
    ([np.ones(2), np.zeros(0)], [np.ones(2), np.zeros(0)], True),
    ([np.ones(2)], [np.ones(2), np.ones(2)], False),
    (None, None, True),
    (None, np.ones(()), False),
    ((None, np.ones(2)), np.ones(2), False),
])  # fmt: skip
def test_results_are_the_same_but_for_rounding(wanted, found, alike):
    assert same(found, wanted, 2.0**-16, 0.0) is alike


def test_records_are_compared_field_by_field():
    def record(expert: int) -> RoutingRecord:
        return RoutingRecord(
            expert_ids_TK=np.array([[expert]]),
            weights_TK=None,
            token_mask_T=np.ones(1, dtype=bool),
            sequence_starts_B=np.zeros(1, dtype=np.int64),
            spec=RouterSpec(num_experts=2, top_k=1),
        )

    assert same(record(0), record(0), 0.0, 0.0)
    assert not same(record(0), record(1), 0.0, 0.0)
