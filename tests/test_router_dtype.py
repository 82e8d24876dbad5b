"""A router's own dtype, in all three rooms: what is rounded, what is computed in float64, and what gradients pass."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import moe_jax
import moe_torch
from moe_jax.rounding import round_to as round_jax
from moe_ref import ExpertSpec, LayerParams, LayerSpec, RouterSpec, SharedSpec, moe_layer, route
from moe_ref.backward.routing import route_backward
from moe_ref.rounding import round_to
from moe_torch.rounding import round_to as round_torch

SIGMOID: dict[str, Any] = {"score_func": "sigmoid", "route_norm": True}
NARROW = (
    RouterSpec(num_experts=8, top_k=3, router_dtype="bfloat16", **SIGMOID, logit_scale=0.7, route_scale=2.5),
    RouterSpec(num_experts=8, top_k=3, router_dtype="float16", score_over="selected", select_by="logit"),
    RouterSpec(num_experts=8, top_k=3, router_dtype="bfloat16", **SIGMOID, num_scored_shared_experts=2,
               norm_with_shared=True),
)  # fmt: skip


def test_narrow_dtypes_hold_the_nearest_number_and_ties_go_to_even():
    near = np.array([1.00390625, 1.01171875, 1 + 2**-8 + 2**-20, -3.3, 1e-40, 2.0**-134, -np.inf, 0.0])
    held = round_to(near, "bfloat16")
    assert held.tolist() == [1.0, 1.015625, 1.0078125, -3.296875, 2.0**-133, 0.0, -np.inf, 0.0]
    assert round_to(np.array([6e-8, 1.0004, 65519.0]), "float16").tolist() == [2.0**-24, 1.0, 65504.0]
    with pytest.raises(ValueError, match="the largest number is 65504"):
        round_to(np.array([65520.0]), "float16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_all_three_rooms_round_alike(dtype):
    rng = np.random.default_rng(0)
    values = (rng.normal(size=4000) * 2.0 ** rng.uniform(-20, 10, 4000)).astype(np.float32)
    wanted = round_to(values.astype(np.float64), dtype)
    assert round_torch(torch.from_numpy(values), dtype).numpy().tolist() == wanted.tolist()
    flushed = np.where(np.abs(wanted) < 2.0**-14, 0, wanted)  # XLA has no subnormal numbers of float16
    found = np.asarray(jax.jit(round_jax, static_argnums=1)(jnp.asarray(values), dtype))
    np.testing.assert_array_equal(np.where(np.abs(wanted) < 2.0**-14, 0, found), flushed)


@pytest.mark.parametrize("spec", NARROW, ids=lambda spec: spec.router_dtype)
def test_routing_and_gradients_equal_the_reference(spec):
    rng = np.random.default_rng(3)
    logits_TE = rng.normal(size=(40, spec.num_logits)).astype(np.float32)
    factors_TK = rng.normal(size=(40, spec.top_k)).astype(np.float32)
    wanted = route(logits_TE, spec)
    shared_TS = None if wanted.shared_weights_TS is None else np.zeros_like(wanted.shared_weights_TS)
    d_wanted_TE, _ = route_backward(wanted, spec, None, factors_TK, shared_TS)

    logits = torch.from_numpy(logits_TE).requires_grad_()
    with_torch = moe_torch.route(logits, spec)
    (with_torch.weights_TK * torch.from_numpy(factors_TK)).sum().backward()

    def loss(logits_TE):
        found = moe_jax.route(logits_TE, spec)
        return (found.weights_TK * factors_TK).sum(), found

    d_jax_TE, with_jax = jax.jit(jax.grad(loss, has_aux=True))(logits_TE)
    # A score or weight next to the middle of two numbers may become the other one; gradients see it once more.
    unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[spec.router_dtype]
    for found, d_found_TE in (
        (
            SimpleNamespace(ids=with_torch.expert_ids_TK, weights=with_torch.weights_TK.detach()),
            np.asarray(logits.grad),
        ),
        (SimpleNamespace(ids=with_jax.expert_ids_TK, weights=with_jax.weights_TK), d_jax_TE),
    ):
        np.testing.assert_array_equal(found.ids, wanted.expert_ids_TK)
        weights_TK = np.asarray(found.weights, np.float64)
        assert (round_to(weights_TK, spec.router_dtype) == weights_TK).all()
        assert (weights_TK == wanted.weights_TK).mean() > 0.97
        np.testing.assert_allclose(weights_TK, wanted.weights_TK, rtol=2 * unit)
        np.testing.assert_allclose(d_found_TE, d_wanted_TE, rtol=2e-5, atol=4 * unit)
        assert (np.abs(np.asarray(d_found_TE) - d_wanted_TE) < 2e-6).mean() > 0.9


def test_logits_that_round_to_one_number_go_to_the_lower_id():
    logits_TE = np.array([[1.0, 1.001, 1.002, 0.5]], np.float32)
    spec = RouterSpec(num_experts=4, top_k=2, router_dtype="bfloat16", score_func="sigmoid")
    assert route(logits_TE, spec.replace(router_dtype="float32")).expert_ids_TK.tolist() == [[2, 1]]
    found = [route(logits_TE, spec), moe_jax.route(jnp.asarray(logits_TE), spec)]
    found.append(moe_torch.route(torch.from_numpy(logits_TE), spec))
    assert [each.expert_ids_TK.tolist() for each in found] == [[[0, 1]]] * 3


def test_a_layer_routes_in_float64_and_stays_in_its_own_dtype():
    router = RouterSpec(num_experts=6, top_k=2, router_dtype="float64", **SIGMOID)
    spec = LayerSpec(router=router, experts=ExpertSpec(dim=8, hidden_dim=4), shared=SharedSpec(hidden_dim=4))
    params = LayerParams.init(spec, 0)
    x_TD = np.random.default_rng(1).normal(size=(9, 8)).astype(np.float32)
    wanted = moe_layer(x_TD, params.astype(np.float32), spec)
    moe = moe_torch.MoE(spec)
    moe.load_params(params)
    output_TD, routing = moe.forward_and_routing(torch.from_numpy(x_TD))
    assert (output_TD.dtype, routing.weights_TK.dtype) == (torch.float32, torch.float64)
    # Weights of float32 parameters, summed in float64.
    np.testing.assert_allclose(routing.weights_TK.detach(), wanted.routing.weights_TK, rtol=1e-14)
    np.testing.assert_allclose(output_TD.detach(), wanted.output_TD, rtol=1e-4, atol=1e-6)
    output_TD.sum().backward()
    gradient_ED = moe.router.gate.weight.grad
    assert gradient_ED is not None
    assert gradient_ED.dtype == torch.float32

    narrow = params.astype(np.float32)
    with pytest.raises(ValueError, match="router_dtype is 'float64'; JAX has it with jax_enable_x64 alone"):
        moe_jax.sparse_matmul(jnp.asarray(x_TD), narrow, spec)
    with jax.enable_x64(True):
        output_TD, decided = jax.jit(moe_jax.sparse_matmul, static_argnames="spec")(x_TD, narrow, spec=spec)
    assert (output_TD.dtype, decided.weights_TK.dtype) == (np.float32, np.float64)
    np.testing.assert_allclose(decided.weights_TK, wanted.routing.weights_TK, rtol=1e-14)
    np.testing.assert_allclose(output_TD, wanted.output_TD, rtol=1e-4, atol=1e-6)
