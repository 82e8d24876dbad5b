"""Experts that take tokens, in all three rooms: what public code computes, what is refused, what it costs in rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import moe_jax
import moe_torch
from moe_ref import (
    CapacitySpec,
    ExpertSpec,
    LayerParams,
    LayerSpec,
    RouterSpec,
    ShardLayout,
    layer_backward,
    layer_of_each,
    moe_layer,
    route,
)

T, E = 12, 4
SPEC = RouterSpec(num_experts=E, top_k=E, selector="expert_choice", take_factor=1.5, take_rounding="round")
LAYER = LayerSpec(router=SPEC, experts=ExpertSpec(dim=8, hidden_dim=16))
LOGITS_TE = np.random.default_rng(0).normal(size=(T, E)).astype(np.float32)


def public(logits_TE: np.ndarray, capacity: int) -> np.ndarray:
    """(T, E) the combine weights of google/flaxformer's ExpertsChooseMaskedRouter, from its formula."""
    probs_TE = np.asarray(jax.nn.softmax(jnp.asarray(logits_TE), axis=-1))
    gates_EC, tokens_EC = jax.lax.top_k(jnp.asarray(probs_TE.T), capacity)
    combine_TE = np.zeros_like(probs_TE)
    for expert in range(E):
        combine_TE[np.asarray(tokens_EC[expert]), expert] = np.asarray(gates_EC[expert])
    return combine_TE


def by_expert(expert_ids_TK: np.ndarray, weights_TK: np.ndarray) -> np.ndarray:
    """(T, E) the weight of each expert; 0 where it did not take the token."""
    found_TE = np.zeros((len(expert_ids_TK), E + 1))
    np.put_along_axis(found_TE, np.asarray(expert_ids_TK, np.int64) % (E + 1), np.asarray(weights_TK), axis=1)
    return found_TE[:, :E]


def test_all_rooms_weigh_as_public_code_does():
    wanted_TE = public(LOGITS_TE, round(1.5 * T / E))
    found = jax.jit(moe_jax.route, static_argnames="spec")(jnp.asarray(LOGITS_TE), spec=SPEC)
    of_torch = moe_torch.route(torch.from_numpy(LOGITS_TE), SPEC)
    for routing in (route(LOGITS_TE, SPEC), found):
        np.testing.assert_allclose(by_expert(routing.expert_ids_TK, routing.weights_TK), wanted_TE, rtol=1e-5)
    found_TE = by_expert(of_torch.expert_ids_TK.numpy(), of_torch.weights_TK.numpy())
    np.testing.assert_allclose(found_TE, wanted_TE, rtol=1e-5)


def test_half_numbers_round_to_even_and_no_expert_takes_more_than_there_are():
    assert [SPEC.replace(take_factor=1.0).takes(n) for n in (2, 6, 10, 14)] == [0, 2, 2, 4]
    assert [SPEC.replace(take_rounding="ceil").takes(n) for n in (0, 1, 3, 5)] == [0, 1, 2, 2]
    assert [SPEC.replace(take_rounding="floor").takes(n) for n in (0, 1, 3, 5)] == [0, 0, 1, 1]
    assert [SPEC.replace(take_least=4).takes(n) for n in (0, 3, 8, 16)] == [0, 3, 4, 6]
    # In binary 1.1 is a little more than 11 / 10.
    assert SPEC.replace(take_factor=1.1, take_rounding="ceil").takes(40) == 11


def test_a_layer_and_its_gradients_are_those_of_the_reference_with_as_many_rows_as_are_taken():
    rng = np.random.default_rng(1)
    params = LayerParams.init(LAYER, 2)
    x_TD = rng.normal(size=(T, 8)).astype(np.float32)
    d_output_TD = rng.normal(size=(T, 8)).astype(np.float32)
    trace = moe_layer(x_TD, params, LAYER)
    wanted = layer_backward(trace, params, LAYER, d_output_TD)
    assert (trace.expert_ids_TK == -1).all(axis=-1).any(), "a token that no expert took"

    _, metadata = jax.eval_shape(partial(moe_jax.route_tokens, spec=SPEC), jnp.asarray(LOGITS_TE))
    assert metadata.slot_of_row_R.shape == (E * 4 + 1,)
    own = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)

    def loss(x_TD, params):
        output_TD, _ = moe_jax.sparse_matmul(x_TD, params, LAYER)
        return (output_TD * d_output_TD).sum(), output_TD

    (_, output_TD), (d_x_TD, d_params) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(jnp.asarray(x_TD), own)
    layer = moe_torch.MoE(LAYER)
    layer.load_params(params)
    of_torch = torch.from_numpy(x_TD).requires_grad_()
    out = layer(of_torch)
    out.backward(torch.from_numpy(d_output_TD))
    assert of_torch.grad is not None
    assert layer.router.gate.weight.grad is not None
    for found, expected in (
        (output_TD, trace.output_TD),
        (out.detach(), trace.output_TD),
        (d_x_TD, wanted.x_TD),
        (of_torch.grad, wanted.x_TD),
        (d_params.gate_ED, wanted.params.gate_ED),
        (layer.router.gate.weight.grad, wanted.params.gate_ED),
        (d_params.w_down_EFD, wanted.params.w_down_EFD),
    ):
        np.testing.assert_allclose(np.asarray(found), expected, rtol=2e-4, atol=2e-6)


def test_what_asks_for_experts_that_are_chosen_is_refused():
    capacity, params = CapacitySpec(factor=1.0), LayerParams.init(LAYER, 0)
    x_TD = np.zeros((T, 8), np.float32)
    for call in (
        lambda: moe_layer(x_TD, params, LAYER, capacity=capacity),
        lambda: moe_jax.sparse_matmul(jnp.asarray(x_TD), params, LAYER, capacity=capacity),
        lambda: moe_torch.MoE(LAYER, capacity=capacity),
    ):
        with pytest.raises(ValueError, match="selector is 'expert_choice', whose experts take"):
            call()
    with pytest.raises(ValueError, match="selector is 'expert_choice' and batch_invariant True"):
        layer_of_each(x_TD, params, LAYER)
    ShardLayout(expert=2, tensor=2, strategy="replicated").check(LAYER)
    for layout in (ShardLayout(data=2), ShardLayout(expert=2), ShardLayout(fsdp=2, strategy="replicated")):
        with pytest.raises(ValueError, match="selector is 'expert_choice' over 2 token shards"):
            layout.check(LAYER)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"top_k": 2}, r"top_k is 2 with selector 'expert_choice'; it is num_experts \(4\)"),
        ({"selector": "top_k"}, "take_factor is 1.5, but selector is 'top_k'"),
        ({"take_factor": 0.0}, "take_factor is 0.0"),
        ({"take_factor": 1 / 3}, "at most 6 decimals"),
        ({"take_rounding": "up"}, "take_rounding is 'up'"),
        ({"num_null_experts": 1}, "num_null_experts is 1; with selector 'expert_choice' it is 0"),
        ({"num_expert_groups": 2, "num_limited_groups": 2}, "selector is 'expert_choice'; with num_expert_groups"),
    ],
)
def test_a_router_whose_experts_cannot_take_is_refused(fields, why):
    with pytest.raises(ValueError, match=why):
        SPEC.replace(**fields)


@pytest.mark.parametrize("fields", [{}, {"take_least": 3}], ids=["factor", "least"])
def test_a_program_for_any_number_of_tokens_takes_its_share_of_each(fields):
    spec = SPEC.replace(**fields)

    def ids(logits_TE: torch.Tensor) -> torch.Tensor:
        return moe_torch.route(logits_TE, spec).expert_ids_TK

    class Router(torch.nn.Module):
        def forward(self, logits_TE: torch.Tensor) -> torch.Tensor:
            return ids(logits_TE)

    logits_TE, shapes = torch.from_numpy(LOGITS_TE), ({0: torch.export.Dim("T", min=2)},)
    exported = torch.export.export(Router(), (logits_TE,), dynamic_shapes=shapes).module()
    compiled = torch.compile(ids, fullgraph=True, dynamic=True, backend="eager")
    for n in (2, 5, 12):
        wanted_TK = ids(logits_TE[:n])
        assert torch.equal(exported(logits_TE[:n]), wanted_TK)
        assert torch.equal(compiled(logits_TE[:n]), wanted_TK)
