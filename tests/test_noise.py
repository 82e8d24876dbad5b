"""Noise on the logits: what is drawn, and that all three rooms read the same array."""

import jax
import numpy as np
import pytest
import torch

import moe_jax
import moe_torch
from moe_ref import RouterInputs, RouterSpec, route
from moe_ref.backward.routing import route_backward
from moe_ref.noise import gumbel, jitter, normal

SPEC = RouterSpec(num_experts=6, top_k=2, score_func="sigmoid", route_norm=True, logit_scale=0.7)
T = 40
LOGITS_TE = np.random.default_rng(0).normal(size=(T, 6)).astype(np.float32)
INPUTS = RouterInputs(
    logit_factors_TE=jitter(7, T, 6, eps=0.3).astype(np.float32), logit_noise_TE=normal(8, T, 6).astype(np.float32)
)


def test_a_shard_draws_what_the_whole_batch_would():
    for draw in (normal, gumbel):
        whole = draw(3, 10, 4)
        np.testing.assert_array_equal(draw(3, 4, 4, first_token=6), whole[6:])
        assert (draw(4, 10, 4) != whole).all()


def test_draws_have_their_distributions():
    factors, found, maxima = jitter(0, 20_000, 5, eps=0.1), normal(0, 20_000, 5), gumbel(0, 20_000, 5)
    assert 0.9 < factors.min() < 0.9001
    assert 1.0999 < factors.max() < 1.1
    # Some 5 standard errors of a mean over 100,000.
    np.testing.assert_allclose([factors.mean(), found.mean(), found.std()], [1, 0, 1], atol=0.016)
    np.testing.assert_allclose([maxima.mean(), maxima.std()], [np.euler_gamma, np.pi / 6**0.5], atol=0.02)
    assert np.abs(np.corrcoef(found.T) - np.eye(5)).max() < 0.04
    # Gumbel: the best of log p plus noise is drawn from p.
    p = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    drawn = np.bincount((np.log(p) + maxima).argmax(axis=-1), minlength=5) / 20_000
    np.testing.assert_allclose(drawn, p, atol=0.02)


def test_all_rooms_route_the_noisy_logits_and_pass_its_factors_to_the_gradient():
    mask_T = np.arange(T) % 5 > 0
    wanted = route(LOGITS_TE, SPEC, inputs=INPUTS, token_mask_T=mask_T)
    noisy = route(LOGITS_TE * INPUTS.logit_factors_TE + INPUTS.logit_noise_TE, SPEC, token_mask_T=mask_T)
    np.testing.assert_array_equal(wanted.expert_ids_TK, noisy.expert_ids_TK)
    assert (wanted.expert_ids_TK != route(LOGITS_TE, SPEC, token_mask_T=mask_T).expert_ids_TK).any()
    factors_TK = np.linspace(-1, 1, 2 * T, dtype=np.float32).reshape(T, 2)
    d_wanted_TE, _ = route_backward(wanted, SPEC, None, factors_TK, token_mask_T=mask_T)

    logits = torch.from_numpy(LOGITS_TE).requires_grad_()
    found = moe_torch.route(logits, SPEC, inputs=INPUTS.map(torch.from_numpy), token_mask_T=torch.from_numpy(mask_T))
    np.testing.assert_array_equal(found.expert_ids_TK, wanted.expert_ids_TK)
    np.testing.assert_allclose(found.weights_TK.detach(), wanted.weights_TK, rtol=1e-5)
    (found.weights_TK * torch.from_numpy(factors_TK)).sum().backward()
    np.testing.assert_allclose(np.asarray(logits.grad), d_wanted_TE, rtol=1e-4, atol=1e-6)

    def loss(logits_TE, inputs):
        trace = moe_jax.route(logits_TE, SPEC, inputs=inputs, token_mask_T=jax.numpy.asarray(mask_T))
        return (trace.weights_TK * factors_TK).sum(), trace

    d_found_TE, trace = jax.jit(jax.grad(loss, has_aux=True))(LOGITS_TE, INPUTS)
    np.testing.assert_array_equal(trace.expert_ids_TK, wanted.expert_ids_TK)
    np.testing.assert_allclose(d_found_TE, d_wanted_TE, rtol=1e-4, atol=1e-6)


def test_a_factor_of_0_and_noise_of_a_table_are_refused():
    with pytest.raises(ValueError, match=r"logit_factors_TE\[0, 0\] is 0.0; entries are finite and above 0"):
        route(LOGITS_TE, SPEC, inputs=RouterInputs(logit_factors_TE=np.zeros((T, 6))))
    with pytest.raises(ValueError, match="logit_noise_TE is given, but selector 'round_robin' takes none"):
        route(LOGITS_TE, SPEC.replace(selector="round_robin"), inputs=RouterInputs(logit_noise_TE=np.zeros((T, 6))))
