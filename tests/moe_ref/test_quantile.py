"""moe_ref, tests of quantile balancing and of soft steps, by hand."""

import numpy as np
import pytest

from moe_ref import (
    QUANTILE_FORMS,
    SMEBU,
    BiasUpdateSpec,
    ExpertSpec,
    LayerSpec,
    QuantileSpec,
    RouterSpec,
    StackSpec,
    bias_step,
    bias_update,
    quantile_update,
    route,
    tokens_per_expert,
)
from moe_ref.quantile import needs, quantile, quantile_bias

LOGITS = RouterSpec(num_experts=4, top_k=1, select_by="logit")


def test_the_bias_is_the_quantile_of_what_an_expert_needs():
    # Expert 0 wins every token; the cutoff is the second best, and each expert is to win a quarter of the 4 tokens.
    logits_TE = np.array([[5.0, 1, 0, 0], [6, 0, 2, 0], [7, 0, 0, 3], [8, 4, 0, 0]])
    wanted_TE = np.array([[-4.0, 0, 1, 1], [-4, 2, 0, 2], [-4, 3, 3, 0], [-4, 0, 4, 4]])
    np.testing.assert_array_equal(needs(logits_TE, np.zeros(4), 1), wanted_TE)
    found_E = quantile_update(logits_TE, LOGITS, QuantileSpec(centred=False), np.zeros(4))
    np.testing.assert_array_equal(found_E, [-4, 0, 1, 1])  # the second smallest of each column
    centred_E = quantile_update(logits_TE, LOGITS, QuantileSpec(), np.zeros(4))
    np.testing.assert_array_equal(centred_E, [-3.5, 0.5, 1.5, 1.5])
    kept_E = quantile_update(logits_TE, LOGITS, QuantileSpec(centred=False, keep=0.75), np.full(4, 4.0))
    np.testing.assert_array_equal(kept_E, [3 + (-4 + 4) / 4, 3 + 4 / 4, 3 + 5 / 4, 3 + 5 / 4])
    both_E = quantile_update(logits_TE, LOGITS, QuantileSpec(keep=0.75), np.array([8.0, 4, 4, 0]))
    assert abs(both_E.mean()) < 1e-12  # what stays is centred, too


@pytest.mark.parametrize("form", sorted(QUANTILE_FORMS.keys() - {"dynamic"}))  # that one: tests/test_sparsity.py
def test_a_few_steps_balance_the_load(form):
    rng = np.random.default_rng(0)
    router = RouterSpec(
        num_experts=8, top_k=3, score_func="sigmoid", select_by="logit" if form == "megatron" else "score"
    )
    logits_TE, bias_E = rng.normal(size=(400, 8)) + 1.5 * rng.normal(size=8), np.zeros(8)
    for _ in range(6):
        bias_E = quantile_update(logits_TE, router, QuantileSpec.of(form), bias_E)
    counts_E = tokens_per_expert(route(logits_TE, router, expert_bias_E=bias_E).expert_ids_TK, 8)
    assert np.abs(counts_E - 150).max() < 20


def test_a_quantile_of_bins_is_less_than_a_bin_from_an_exact_one():
    rng = np.random.default_rng(1)
    for N, K, bins in ((40, 2, 10), (41, 3, 100), (7, 1, 1000)):
        bias_E = rng.uniform(-0.5, 0.5, 5)
        needs_NE = needs(rng.random((N, 5)), bias_E, K)
        exact_E, sorted_NE = quantile(needs_NE, QuantileSpec(), bias_E, K), np.sort(needs_NE, axis=0)
        found_E = quantile(needs_NE, QuantileSpec(bins=bins), bias_E, K)
        width = (bias_E.max() - bias_E.min() + 2) / bins
        assert (found_E < exact_E + width).all()
        assert (found_E > sorted_NE[-(-N * K // 5) - 1] - width).all()


def test_a_pool_has_a_quantile_that_is_no_mean_of_quantiles():
    parts = [np.array([[0.0, 9], [1, 9]]), np.array([[10.0, 9], [11, 9], [12, 9], [13, 9]])]
    rule = QuantileSpec(centred=False)
    np.testing.assert_array_equal(quantile_bias(parts, rule, np.zeros(2), 1), [11, 9])
    of_batches = rule.replace(over="batches")
    np.testing.assert_array_equal(quantile_bias([*parts, np.zeros((0, 2))], of_batches, np.zeros(2), 1), [6.5, 9])


def test_every_token_twice_is_the_same_quantile():
    # Ranks that see the same tokens may count them: all of them do.
    rng = np.random.default_rng(2)
    for N in range(1, 12):
        needs_NE = rng.random((N, 5))
        for rule in (QuantileSpec(), QuantileSpec.of("kimi_k3")):
            once_E, twice_E = (quantile_bias([needs_NE] * times, rule, np.zeros(5), 2) for times in (1, 2))
            np.testing.assert_allclose(once_E, twice_E, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"selector": "random"}, "selector"),
        ({"num_expert_groups": 2, "num_limited_groups": 1}, "num_expert_groups"),
        ({"num_null_experts": 1}, "num_null_experts"),
        ({"top_k": 4}, "top_k is 4"),
        ({"score_func": "sqrtsoftplus"}, "bins is 1000"),
    ],
)
def test_a_router_that_no_quantile_balances_is_refused(changes, why):
    router = RouterSpec(**{"num_experts": 4, "top_k": 1} | changes)
    layer = LayerSpec(router=router, experts=ExpertSpec(dim=2, hidden_dim=2))
    with pytest.raises(ValueError, match=why):
        StackSpec(layers=(layer,), updates=(QuantileSpec.of("kimi_k3"),))


def test_a_stack_of_every_rule_is_read_back():
    layer = LayerSpec(router=RouterSpec(num_experts=4, top_k=1), experts=ExpertSpec(dim=2, hidden_dim=2))
    rules = (QuantileSpec.of("kimi_k3"), QuantileSpec(), BiasUpdateSpec(**SMEBU), None)
    stack = StackSpec(layers=(layer,) * 4, updates=rules)
    assert StackSpec.from_dict(stack.to_dict()) == stack


def test_a_soft_step_is_a_tanh_and_momentum_goes_on():
    rule, counts_E = BiasUpdateSpec(**SMEBU), np.array([2, 6])
    step_E = 5e-4 * np.tanh([1.0, -1.0]) / 2
    np.testing.assert_allclose(bias_step(counts_E, rule), step_E)
    np.testing.assert_allclose(bias_update(counts_E, rule, np.ones(2), step_E), 1 + 1.5 * step_E)


def test_a_share_step_counts_the_slots_of_frozen_experts():
    # LongCat: 2 experts with an FFN are to have half of all slots, a quarter each; the third choice is a null expert.
    rule = BiasUpdateSpec(rule="share", rate=1.0, wanted_share=0.5, frozen_E=(False, False, True))
    np.testing.assert_array_equal(bias_step(np.array([1, 4, 3]), rule), [0.125, -0.25, 0])
    np.testing.assert_array_equal(bias_step(np.zeros(3, int), rule), np.zeros(3))
    with pytest.raises(ValueError, match="wanted_share is 2"):
        rule.replace(wanted_share=2.0)
