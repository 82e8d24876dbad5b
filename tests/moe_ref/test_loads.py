"""moe_ref, tests of chosen loads: the drawn choice follows the shares."""

from typing import Any

import numpy as np
import pytest

from moe_ref import RouterSpec, route, tokens_per_expert
from moe_ref.loads import logits_of_load, shares


def load_of(distribution: str, spec: RouterSpec, num_tokens: int = 40_000) -> np.ndarray:
    """(E,) slots of each expert for a token."""
    logits_TE = logits_of_load(distribution, num_tokens, spec, np.random.default_rng(0))
    return tokens_per_expert(route(logits_TE, spec).expert_ids_TK, spec.num_experts) / num_tokens


def test_shares_are_those_of_their_names():
    np.testing.assert_allclose(shares("uniform", 4), 0.25)
    np.testing.assert_allclose(shares("zipf:1", 3), np.array([6, 3, 2]) / 11)
    np.testing.assert_allclose(shares("hot:0.7", 4), [0.7, 0.1, 0.1, 0.1])
    np.testing.assert_allclose(shares("3,1,0", 3), [0.75, 0.25, 0])
    np.testing.assert_allclose(shares(np.array([1, 1]), 2), 0.5)


@pytest.mark.parametrize("distribution", ["uniform", "zipf:1.2", "hot:0.6", "5,0,1,1,1,1,1,0"])
@pytest.mark.parametrize("fields", [{}, {"score_func": "sigmoid", "logit_scale": 0.5}])
def test_with_one_slot_the_expected_load_is_the_share(distribution, fields: dict[str, Any]):
    spec = RouterSpec(num_experts=8, top_k=1, **fields)
    # Five standard errors of a share of one half.
    np.testing.assert_allclose(load_of(distribution, spec), shares(distribution, 8), atol=5 * 0.5 / 200)


def test_with_two_slots_they_are_drawn_without_replacement():
    p = shares("zipf:1", 4)
    second = [sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)]
    np.testing.assert_allclose(load_of("zipf:1", RouterSpec(num_experts=4, top_k=2)), p + second, atol=0.0125)


def test_scored_shared_experts_have_columns_and_no_share():
    spec = RouterSpec(num_experts=4, top_k=2, score_func="sigmoid", num_null_experts=1, num_scored_shared_experts=2)
    assert logits_of_load("uniform", 5, spec, np.random.default_rng(0)).shape == (5, 7)


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        ("even", "distribution is 'even'; it is one of uniform, zipf:S, hot:P, or 4 numbers"),
        ("zipf", "distribution is 'zipf'"),
        ("zipf:x", "'x' is no number"),
        ("hot:1.5", "the share of hot is 1.5; it is between 0 and 1"),
        ("1,2,3", r"distribution has shape \(3,\); it is \(4,\)"),
        ("1,-2,3,4", r"distribution\[1\] is -2.0; shares are finite and at least 0"),
        ("0,0,0,0", "distribution is 0 for every expert"),
        ("hot:1", "distribution has 1 experts with a share; top_k is 2"),
    ],
)
def test_other_distributions_are_refused(distribution, message):
    with pytest.raises(ValueError, match=message):
        logits_of_load(distribution, 3, RouterSpec(num_experts=4, top_k=2), np.random.default_rng(0))
