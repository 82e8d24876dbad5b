"""tests of sparsity: the L1 loss of ReMoE, its coefficient, and dynamic quantile balancing, in all three rooms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import moe_jax
import moe_torch
from moe_ref import (
    BalanceSpec,
    QuantileSpec,
    RouterSpec,
    SparsitySpec,
    balance_loss,
    balance_loss_backward,
    next_coefficient,
    quantile_update,
    route,
    tokens_per_expert,
)

REMOE = RouterSpec(num_experts=4, top_k=4, score_func="relu", selector="threshold")


def test_the_l1_loss_is_the_norm_of_each_expert_times_its_share_of_the_wanted_slots():
    logits_TE = np.array([[1.0, -1.0, 3.0, 0.0], [2.0, -2.0, -0.5, -4.0]])
    ids_TK = route(logits_TE, REMOE).expert_ids_TK
    loss = BalanceSpec.of("remoe", target_top_k=2, coeff=0.5)
    # E / (k T) * counts * mean scores: experts 0 and 2 have 2 tokens and 1, and mean scores of 1.5.
    wanted = 0.5 * 4 / (2 * 2) * (2 * 1.5 + 1 * 1.5)
    assert balance_loss(logits_TE, ids_TK, loss) == pytest.approx(wanted)
    d_logits_TE = balance_loss_backward(logits_TE, ids_TK, loss)
    np.testing.assert_allclose(d_logits_TE, [[0.5, 0, 0.25, 0], [0.5, 0, 0, 0]])
    # No share of all slots, of which most are unused.
    assert balance_loss(logits_TE, ids_TK, loss.replace(target_top_k=None)) == pytest.approx(wanted / 2)


def test_one_coefficient_follows_the_experts_of_all_layers():
    spec = SparsitySpec(target_top_k=2)
    counts_LE = np.array([[5, 0, 3], [4, 4, 1]])
    assert next_coefficient(1.0, counts_LE, 4, spec) == pytest.approx(1.2)  # 17 slots, 16 wanted
    assert next_coefficient(1.0, counts_LE, 5, spec) == pytest.approx(1 / 1.2)
    assert next_coefficient(1.0, counts_LE - [[1, 0, 0], [0, 0, 0]], 4, spec) == pytest.approx(1 / 1.2)  # as many


@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_no_number_of_layers_and_tokens_overflows_a_coefficient(excess):
    # 80 layers of 2 ** 22 tokens with 200 experts each: the sum is far past int32, and one slot decides.
    spec, T, L = SparsitySpec(target_top_k=4), 1 << 22, 80
    counts_LE = np.zeros((L, 200), np.int64)
    counts_LE[: L // 2] = 8 * T // 200
    counts_LE[: L // 2, 0] += 8 * T - counts_LE[0].sum()
    counts_LE[0, 1] += excess
    wanted = next_coefficient(0.5, counts_LE, T, spec)
    assert wanted == (0.6 if excess > 0 else 0.5 / 1.2)
    in_jax = jax.jit(moe_jax.next_coefficient, static_argnames="spec")
    assert in_jax(jnp.float32(0.5), counts_LE.astype(np.int32), T, spec=spec) == pytest.approx(wanted)
    assert moe_torch.next_coefficient(torch.tensor(0.5), torch.tensor(counts_LE), T, spec) == pytest.approx(wanted)


def test_a_quantile_against_the_threshold_gives_every_expert_its_share_in_one_step():
    rng = np.random.default_rng(0)
    router = RouterSpec(num_experts=8, top_k=8, score_func="sigmoid", selector="threshold")
    logits_TE, rule = rng.normal(size=(400, 8)) + rng.normal(size=8), QuantileSpec(centred=False, target_top_k=3)
    bias_E = quantile_update(logits_TE, router, rule, np.zeros(8))
    counts_E = tokens_per_expert(route(logits_TE, router, expert_bias_E=bias_E).expert_ids_TK, 8)
    np.testing.assert_array_equal(counts_E, np.full(8, 150))
    # beta = -bias is the (T k / E + 1)-th largest score of each expert.
    scores_TE = 1 / (1 + np.exp(-logits_TE))
    np.testing.assert_allclose(-bias_E, np.sort(scores_TE, axis=0)[::-1][150], rtol=1e-12)
    kept = QuantileSpec.of("dynamic", target_top_k=3)
    mixed_E = quantile_update(logits_TE, router, kept, np.full(8, -0.5))
    np.testing.assert_allclose(mixed_E, 0.9 * -0.5 + 0.1 * bias_E)


@pytest.mark.parametrize(
    ("changes", "of_router", "why"),
    [
        ({}, {}, "target_top_k is None"),
        ({"target_top_k": 4}, {}, "target_top_k is 4"),
        ({"target_top_k": 2, "centred": True}, {}, "centred is True"),
        ({"target_top_k": 2, "bins": 10}, {}, "bins is 10"),
        ({"target_top_k": 2}, {"selector": "top_k", "top_k": 2}, "target_top_k is 2, but selector is 'top_k'"),
    ],
)
def test_a_target_that_no_quantile_reaches_is_refused(changes, of_router, why):
    router = RouterSpec(**{"num_experts": 4, "top_k": 4, "selector": "threshold", "score_func": "sigmoid"} | of_router)
    with pytest.raises(ValueError, match=why):
        QuantileSpec(**{"centred": False} | changes).check(router)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"score_func": "relu", "counts": "unbiased"}, "whose scores may all be 0"),
        ({"score_func": "relu", "norm_scores": True}, "whose scores may all be 0"),
        ({"target_top_k": 2, "counts_over": "tokens"}, "counts_over is 'tokens', but with target_top_k"),
        ({"target_top_k": 2, "counted_slots": 1}, "counted_slots is 1, but with target_top_k"),
    ],
)
def test_a_loss_without_a_share_of_the_target_is_refused(fields, why):
    with pytest.raises(ValueError, match=why):
        BalanceSpec(**fields)
