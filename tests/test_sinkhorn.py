"""Sinkhorn's choice, in all three rooms: what public code computes, in which batch, and with which gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import moe_jax
import moe_torch
from moe_ref import RouterInputs, RouterSpec, route

SPEC = RouterSpec(num_experts=8, top_k=2, selector="sinkhorn", select_by="logit")
SKEWED_TE = (np.random.default_rng(0).normal(size=(64, 8)) * 2 + np.linspace(0, 3, 8)).astype(np.float32)


def public(logits_TE: torch.Tensor) -> torch.Tensor:
    """(T, 2) the choice as NVIDIA/Megatron-LM computes it, from its formula: scaled until factors stand still."""
    cost_TE, factors_E, factors_T1 = logits_TE.exp(), torch.ones(8), torch.ones(64, 1)
    for _ in range(50):
        factors_T1 = 1 / 64 / ((factors_E * cost_TE).sum(1, keepdim=True) + 1e-8)
        before_E, factors_E = factors_E, 1 / 8 / ((factors_T1 * cost_TE).sum(0) + 1e-8)
        if (factors_E - before_E).abs().mean() <= 1e-4:
            break
    return (factors_E * cost_TE * factors_T1).topk(2, dim=1).indices


def rooms(logits_TE, mask_T=None) -> list[np.ndarray]:
    """(T, K) ids of the reference, of JAX and of torch."""
    of_torch = None if mask_T is None else torch.from_numpy(mask_T)
    found = jax.jit(moe_jax.route, static_argnames="spec")(jnp.asarray(logits_TE), spec=SPEC, token_mask_T=mask_T)
    return [
        route(logits_TE, SPEC, token_mask_T=mask_T).expert_ids_TK,
        np.asarray(found.expert_ids_TK),
        moe_torch.route(torch.from_numpy(logits_TE), SPEC, token_mask_T=of_torch).expert_ids_TK.numpy(),
    ]


def test_all_rooms_choose_what_public_code_chooses_and_share_the_batch_evenly():
    for found_TK in rooms(SKEWED_TE):
        np.testing.assert_array_equal(found_TK, public(torch.from_numpy(SKEWED_TE)))
        assert np.bincount(found_TK.ravel(), minlength=8).max() <= 20  # of 128; the best logits give one of them 42
    assert np.bincount(route(SKEWED_TE, SPEC.at_evaluation()).expert_ids_TK.ravel()).max() == 42


def test_padding_takes_no_part_in_the_batch_and_logits_of_any_size_are_evened():
    mask_T = np.arange(64) % 3 > 0
    poisoned_TE = np.where(mask_T[:, None], SKEWED_TE, np.nan).astype(np.float32)
    alone_TK = rooms(SKEWED_TE[mask_T])[0]
    for found_TK in rooms(poisoned_TE, mask_T):
        np.testing.assert_array_equal(found_TK[mask_T], alone_TK)
        assert (found_TK[~mask_T] == -1).all()
    for found_TK in rooms((SKEWED_TE + np.float32(500)).astype(np.float32)):  # exp overflows
        np.testing.assert_array_equal(found_TK, rooms(SKEWED_TE + np.float32(500))[0])
    for found_TK in rooms(SKEWED_TE[:0]):
        assert found_TK.shape == (0, 2)


def test_the_choice_is_a_constant_of_the_gradient():
    forced = RouterInputs(given_ids_TK=route(SKEWED_TE, SPEC).expert_ids_TK)
    given = SPEC.replace(selector="given", select_by="score")
    factors_TK = np.linspace(-1, 1, 128, dtype=np.float32).reshape(64, 2)

    def of_jax(spec, inputs):
        def loss(logits_TE):
            return (moe_jax.route(logits_TE, spec, inputs=inputs).weights_TK * factors_TK).sum()

        return jax.jit(jax.grad(loss))(SKEWED_TE)

    def of_torch(spec, inputs):
        logits = torch.from_numpy(SKEWED_TE).requires_grad_()
        (moe_torch.route(logits, spec, inputs=inputs).weights_TK * torch.from_numpy(factors_TK)).sum().backward()
        return np.asarray(logits.grad)

    np.testing.assert_allclose(of_jax(SPEC, RouterInputs()), of_jax(given, forced), rtol=1e-6)
    np.testing.assert_allclose(of_torch(SPEC, RouterInputs()), of_torch(given, forced.map(torch.from_numpy)), rtol=1e-6)


def test_a_loop_that_looks_at_no_value_evens_as_many_rounds_as_are_needed():
    # Without a look at the data there are always all rounds, and those past the tolerance change nothing.
    evened_E = moe_torch.sinkhorn._rounds(torch.from_numpy(SKEWED_TE), None, ends_early=False)
    early_E = moe_torch.sinkhorn.sinkhorn(torch.from_numpy(SKEWED_TE), None)
    assert evened_E.tolist() == early_E.tolist()


def test_a_bias_and_groups_are_refused():
    with pytest.raises(ValueError, match="expert_bias_E is given, but selector 'sinkhorn' takes none"):
        route(SKEWED_TE, SPEC, expert_bias_E=np.zeros(8))
    with pytest.raises(ValueError, match="then select_by is 'logit'"):
        RouterSpec(num_experts=8, top_k=2, selector="sinkhorn")
    with pytest.raises(ValueError, match="with num_expert_groups it is 'top_k'"):
        SPEC.replace(num_expert_groups=4, num_limited_groups=2)
