"""Shared experts inside the routed slots, in all three rooms: packing, padding, gradients, refusals."""

from dataclasses import fields

import jax
import numpy as np
import pytest
import torch

from moe_jax.fused import fused_matmul
from moe_jax.sparse_matmul import sparse_matmul
from moe_ref import ExpertSpec, LayerParams, LayerSpec, RouterSpec, SharedSpec, moe_layer
from moe_ref.fused import fuse_routing, fused_layer
from moe_ref.specs.fused import fuse_params, fused_spec, unfuse_params
from moe_torch.fused import FusedMoE
from moe_torch.moe import MoE

ROUTER = RouterSpec(num_experts=6, top_k=2, score_func="sigmoid", route_norm=True, output_scale=2.5)
SPEC = LayerSpec(router=ROUTER, experts=ExpertSpec(dim=8, hidden_dim=4, bias=True), shared=SharedSpec(hidden_dim=8))
PARAMS = LayerParams.init(SPEC, 0)
X_TD = np.random.default_rng(1).normal(size=(9, 8)).astype(np.float32)
MASK_T = np.arange(9) % 4 > 0


def test_ids_follow_the_routed_ones_and_their_weight_cancels_the_factor():
    ids, weights = fuse_routing(
        np.array([[3, 0], [-1, -1]]), np.ones((2, 2)), SPEC, token_mask_T=np.array([True, False])
    )
    assert ids.tolist() == [[3, 0, 6, 7], [-1, -1, -1, -1]]
    assert weights.tolist() == [[1, 1, 0.4, 0.4], [1, 1, 0, 0]]
    form = fused_spec(SPEC)
    assert (form.router.num_experts, form.router.top_k, form.router.selector, form.shared) == (8, 4, "given", None)


def test_unpacking_undoes_packing_bit_for_bit():
    back = unfuse_params(fuse_params(PARAMS, SPEC), PARAMS, SPEC)
    for field in fields(LayerParams):
        np.testing.assert_array_equal(getattr(back, field.name), getattr(PARAMS, field.name), err_msg=field.name)


@pytest.mark.parametrize("combine", ["sum", "average"])
def test_all_rooms_give_the_output_and_the_counts_of_the_unfused_layer(combine):
    spec = SPEC.replace(shared=SharedSpec(hidden_dim=8, combine=combine))
    wanted = moe_layer(X_TD, PARAMS, spec, token_mask_T=MASK_T)
    found_TD, counts_E = fused_layer(X_TD, PARAMS, spec, token_mask_T=MASK_T)
    np.testing.assert_allclose(found_TD, wanted.output_TD, rtol=1e-13, atol=1e-15)
    assert counts_E.tolist() == wanted.permutation.tokens_per_expert_E.tolist()

    moe = FusedMoE(spec)
    moe.load_params(PARAMS)
    found, routing = moe.forward_and_routing(torch.from_numpy(X_TD), torch.from_numpy(MASK_T))
    np.testing.assert_allclose(found.detach(), wanted.output_TD, rtol=1e-5, atol=1e-6)
    assert routing.expert_ids_TK.shape == (9, 2)

    narrow, fused = PARAMS.astype(np.float32), fuse_params(PARAMS, spec).astype(np.float32)
    run = jax.jit(fused_matmul, static_argnames="spec")
    found_TD, decided = run(X_TD, narrow, fused, spec=spec, token_mask_T=MASK_T)
    np.testing.assert_allclose(found_TD, wanted.output_TD, rtol=1e-5, atol=1e-6)
    assert decided.expert_ids_TK.shape == (9, 2)


def test_gradients_of_the_fused_form_are_those_of_the_unfused_layer():
    plain, moe = MoE(SPEC), FusedMoE(SPEC)
    for each in (plain, moe):
        each.load_params(PARAMS)
        (each(torch.from_numpy(X_TD)) ** 2).sum().backward()
    assert plain.shared_experts is not None
    torch.testing.assert_close(moe.router.gate.weight.grad, plain.router.gate.weight.grad, rtol=1e-4, atol=1e-5)
    packed, whole = moe.experts.w1_EFD.grad, plain.experts.w1_EFD.grad
    shared = plain.shared_experts.w1.weight.grad
    assert packed is not None
    assert whole is not None
    assert shared is not None
    torch.testing.assert_close(packed, torch.cat([whole, shared.view(2, 4, 8)]), rtol=1e-4, atol=1e-5)

    narrow, fused = PARAMS.astype(np.float32), fuse_params(PARAMS, SPEC).astype(np.float32)
    d_plain = jax.jit(jax.grad(lambda p: (sparse_matmul(jax.numpy.asarray(X_TD), p, SPEC)[0] ** 2).sum()))(narrow)
    loss = lambda p, f: (fused_matmul(jax.numpy.asarray(X_TD), p, f, SPEC)[0] ** 2).sum()  # noqa: E731
    d_router, d_fused = jax.jit(jax.grad(loss, (0, 1)))(narrow, fused)
    np.testing.assert_allclose(d_router.gate_ED, d_plain.gate_ED, rtol=1e-4, atol=1e-5)
    back = unfuse_params(d_fused, d_router, SPEC)
    assert back.shared_w_down_SFD is not None
    np.testing.assert_allclose(back.shared_w_down_SFD, d_plain.shared_w_down_SFD, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(back.w_up_EDF, d_plain.w_up_EDF, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared": None}, "shared is None"),
        ({"shared": SharedSpec(hidden_dim=8, gate="sigmoid")}, "shared.gate is 'sigmoid'"),
        ({"shared": SharedSpec(hidden_dim=6)}, "shared.hidden_dim is 6, no multiple"),
        ({"shared": SharedSpec(hidden_dim=8, clamp=1.0)}, "shared.clamp is 1.0"),
        ({"router": ROUTER.replace(weight_on="input")}, "router.weight_on is 'input'"),
        ({"router": ROUTER.replace(num_null_experts=1)}, "router.num_null_experts is 1"),
        ({"router": ROUTER.replace(num_scored_shared_experts=2)}, "router.num_scored_shared_experts is 2"),
        ({"router": ROUTER.replace(output_scale=0.0)}, "router.output_scale is 0"),
    ],
)
def test_a_layer_without_a_fused_form_is_refused_by_the_name_of_its_field(changes, message):
    with pytest.raises(ValueError, match=message):
        fused_spec(SPEC.replace(**changes))
