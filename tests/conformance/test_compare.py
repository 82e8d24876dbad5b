"""tests of the judge: the comparison itself. What rounding explains, and what it does not."""

import json

import numpy as np
import pytest

from conformance.core.check import CHECKS
from conformance.core.judge import Judge, Violation
from conformance.core.rounding import close
from conformance.core.shrink import shrink
from conformance.core.trial import accuse
from conformance.router.bounds import admissible
from conformance.router.case import RouterCase
from conformance.router.observation import observe
from conformance.router.small_worlds import lattice, weak_orderings, worlds
from conformance.run import kinds  # noqa: F401  (its chapters register)
from moe_ref import RouterSpec
from tests.conformance.routers import MaskedZero, Sigmoid

GROUPED = RouterSpec(num_experts=6, top_k=2, score_func="sigmoid", num_expert_groups=3, num_limited_groups=1)
PLAIN = RouterSpec(num_experts=4, top_k=2, score_func="sigmoid")
ERROR = 0.01


def explained(ids, choice, spec=PLAIN, error=ERROR) -> bool:
    choice_E = np.array(choice, dtype=float)
    return admissible(np.array(ids), choice_E, np.full(len(choice_E), error), spec, "float32")


def test_a_choice_within_twice_the_error_is_explained_and_beyond_it_is_not():
    assert explained([0, 1], [0.5, 0.40, 0.41, 0.1])
    assert not explained([0, 1], [0.5, 0.40, 0.43, 0.1])


def test_a_group_within_the_error_of_its_sum_is_explained():
    # Group 1 leads group 0 by 0.03; each of four entries may move by 0.01.
    choice = [0.5, 0.4, 0.5, 0.43, 0.1, 0.1]
    assert explained([0, 1], choice, GROUPED)
    assert not explained([0, 1], [0.5, 0.4, 0.5, 0.45, 0.1, 0.1], GROUPED)


def test_groups_and_experts_are_explained_together_or_not_at_all():
    # Keeping group 0 needs expert 1 high; selecting expert 2 of three needs it low.
    spec = RouterSpec(num_experts=6, top_k=2, num_expert_groups=2, num_limited_groups=1, score_func="sigmoid")
    choice = [0.50, 0.42, 0.40, 0.50, 0.43, 0.10]
    assert explained([0, 1], choice, spec)
    assert explained([0, 2], choice, spec)
    assert not explained([0, 2], [0.50, 0.42, 0.40, 0.50, 0.45, 0.10], spec)


def test_experts_of_two_groups_are_never_explained_where_one_is_kept():
    assert not explained([0, 2], [0.5] * 6, GROUPED)


def test_nothing_is_close_to_nan():
    assert close(np.array([1.0, np.nan, np.inf]), np.array([1.0, 1.0, 1.0]), 1e-6, 1e-9).tolist() == [
        True,
        False,
        False,
    ]


def test_every_weak_ordering_is_there_once():
    counts = [len(weak_orderings(n)) for n in range(1, 7)]
    assert counts == [1, 3, 13, 75, 541, 4683]
    assert len(np.unique(weak_orderings(5), axis=0)) == 541
    assert len(lattice(4, 3)) == 81


def test_every_world_is_a_valid_spec():
    assert len([RouterSpec(**sizes) for sizes in worlds()]) == len(worlds())


def test_a_failing_case_shrinks_to_one_token_that_still_fails():
    judge = Judge(MaskedZero())
    violation = shrink(judge, accuse(judge, seed=0, ids=["SEL-3"])["SEL-3"])
    assert violation.case is not None
    assert violation.case.num_tokens == 1
    assert (np.round(2 * violation.case.logits_TE) == 2 * violation.case.logits_TE).all(), "round numbers suffice"


def test_what_is_forgiven_is_counted():
    class LowerByALittle(Sigmoid):
        def route(self, logits_TE, spec, expert_bias_E):
            # A near tie that float32 may see either way.
            return super().route(logits_TE - 1e-7 * np.arange(logits_TE.shape[1])[::-1], spec, expert_bias_E)

    judge = Judge(LowerByALittle())
    logits_TE = np.array([[1.0, 0.0, 0.0, -1.0]])
    judge.examine(CHECKS["SEL-2"], RouterCase(spec=PLAIN, logits_TE=logits_TE))
    assert judge.ledger["SEL-2"].near_ties == 1


@pytest.mark.parametrize(
    ("returned", "title"),
    [
        ({"expert_ids_TK": np.zeros((2, 3), int)}, "expert ids of another shape"),
        ({"weights_TK": np.zeros(2)}, "weights of another shape"),
        ({"expert_ids_TK": np.zeros((2, 2))}, "expert ids are not integers"),
        ({"expert_ids_TK": np.array([[0, 4], [0, 1]])}, "an expert id is out of range"),
        ({"expert_ids_TK": np.array([[0, -1], [0, 1]])}, "an expert id is out of range"),
        ({"expert_ids_TK": np.array([[1, 1], [0, 1]])}, "an expert is selected twice"),
        ({"scores_TE": np.zeros((2, 5))}, "scores_TE of another shape"),
    ],
)
def test_a_result_of_the_wrong_form_is_a_violation_of_sel_1(returned, title):
    class Malformed(Sigmoid):
        def route(self, logits_TE, spec, expert_bias_E):
            good = super().route(logits_TE, spec, expert_bias_E)
            return type(good)(**({"expert_ids_TK": good.expert_ids_TK, "weights_TK": good.weights_TK} | returned))

    with pytest.raises(Violation, match=f"SEL-1 {title}"):
        observe(Judge(Malformed()), RouterCase(spec=PLAIN, logits_TE=np.zeros((2, 4))))


def test_a_case_survives_json():
    case = RouterCase(
        spec=GROUPED.replace(mask_fill=0.0),
        logits_TE=np.array([[0.1, -np.inf, np.nan, 1e30, 2.0, -3.0]]),
        expert_bias_E=np.arange(6.0),
        inputs={"token_mask_T": np.array([False])},
        dtype="bfloat16",
        seed=3,
    )
    again = RouterCase.from_json(json.loads(json.dumps(case.to_json())))
    assert again.digest == case.digest
    assert again.spec == case.spec
    np.testing.assert_array_equal(again.logits_TE, case.logits_TE)
    with pytest.raises(ValueError, match="a case has the keys"):
        RouterCase.from_json({"spec": {}, "logit": []})


def test_a_subject_with_an_unknown_dtype_is_refused():
    class Half(Sigmoid):
        compute_dtype = "half"

    with pytest.raises(ValueError, match="dtype 'half' is not one of"):
        Judge(Half())
