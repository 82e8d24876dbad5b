"""moe_torch, tests of capacity: what is kept, weights, gradients and whole layers, against moe_ref."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_ref
from moe_ref import CapacitySpec, ExpertSpec, LayerParams, LayerSpec, RouterSpec
from moe_ref.specs.balance import CAPACITY_SCOPES, DROP_ORDERS, ROUNDINGS
from moe_torch.capacity import apply_capacity, capacities, slot_table
from moe_torch.moe import MoE

E, K, D = 5, 2, 6
SAME: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
LAYER = LayerSpec(
    router=RouterSpec(num_experts=E, top_k=K, num_null_experts=1, route_norm=True),
    experts=ExpertSpec(dim=D, hidden_dim=4),
)


@st.composite
def limits(draw, then=True):
    """Any capacity; its second limit has none of its own."""
    renormalise = draw(st.sampled_from(["no", "before", "after"]))
    fields: dict[str, Any] = {
        "scope": draw(st.sampled_from(CAPACITY_SCOPES)),
        "drop_order": draw(st.sampled_from(DROP_ORDERS)),
        "min_slots": draw(st.integers(0, 2)),
        "renormalise": renormalise,
        "weight_sum": 1.0 if renormalise == "no" else draw(st.sampled_from([1.0, 2.5])),
        "then": draw(st.none() | limits(then=False)) if then else None,
    }
    if draw(st.booleans()):
        return CapacitySpec(slots=draw(st.integers(0, 4)), **fields)
    return CapacitySpec(
        factor=draw(st.sampled_from([0.3, 0.75, 1.1, 3.0])), rounding=draw(st.sampled_from(ROUNDINGS)), **fields
    )


@st.composite
def choices(draw):
    """Ids with unused slots and null experts, weights with ties, a mask, and sequences."""
    lengths = draw(st.lists(st.integers(0, 7), max_size=3))
    rng, T = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), sum(lengths)
    skewed_TE = rng.standard_normal((T, E + 1)) + np.linspace(3, 0, E + 1)
    ids_TK = np.argsort(-skewed_TE, axis=1)[:, :K]
    ids_TK[rng.random((T, K)) < 0.1] = -1
    weights_TK = np.round(rng.random((T, K)), draw(st.sampled_from([1, 8])))
    return ids_TK, weights_TK, rng.random(T) < draw(st.sampled_from([0.6, 1.0])), lengths


@settings(max_examples=200, deadline=None)
@given(choices(), limits())
def test_what_is_kept_and_its_gradient_are_the_reference_s(choice, spec):
    ids_TK, weights_TK, mask_T, lengths = choice
    expected = moe_ref.apply_capacity(ids_TK, weights_TK, spec, E, token_mask_T=mask_T, sequence_lengths=lengths)
    weights = torch.tensor(weights_TK, requires_grad=True)
    found = apply_capacity(
        torch.tensor(ids_TK),
        weights,
        spec,
        E,
        token_mask_T=torch.tensor(mask_T),
        sequence_of_T=torch.tensor(np.repeat(np.arange(len(lengths)), lengths)),
        num_sequences=len(lengths),
    )
    np.testing.assert_array_equal(found.expert_ids_TK, expected.expert_ids_TK)
    np.testing.assert_array_equal(found.dropped_TK, (expected.expert_ids_TK < 0) & (ids_TK >= 0) & mask_T[:, None])
    np.testing.assert_allclose(found.weights_TK.detach(), expected.weights_TK, rtol=1e-14)
    np.testing.assert_array_equal(found.place_TK, expected.place_TK)
    d_weights_TK = np.random.default_rng(1).standard_normal(ids_TK.shape)
    found.weights_TK.backward(torch.tensor(d_weights_TK))
    np.testing.assert_allclose(weights.grad, moe_ref.capacity_backward(expected, spec, d_weights_TK), **SAME)


@pytest.mark.parametrize("drop_order", DROP_ORDERS)
def test_the_padded_form_has_each_kept_slot_at_its_place(drop_order):
    spec = CapacitySpec(factor=1.1, scope="sequence", drop_order=drop_order, pad_to_capacity=True)
    rng, lengths = np.random.default_rng(0), (5, 0, 7)
    ids_TK = np.argsort(rng.random((12, E + 1)), axis=1)[:, :K]
    weights_TK, unit_of_T = rng.random((12, K)), torch.tensor(np.repeat(np.arange(3), lengths))
    expected = moe_ref.apply_capacity(ids_TK, weights_TK, spec, E, sequence_lengths=lengths)
    limited = apply_capacity(
        torch.tensor(ids_TK), torch.tensor(weights_TK), spec, E, sequence_of_T=unit_of_T, num_sequences=3
    )
    C = int(expected.capacity_U.max())
    found_UEC = slot_table(limited, E, C, unit_of_T=unit_of_T, num_units=3)
    np.testing.assert_array_equal(found_UEC, expected.slot_table_UEC)


@settings(max_examples=50, deadline=None)
@given(limits(then=False))
def test_capacities_are_exact(spec):
    tokens = range(60)
    np.testing.assert_array_equal(
        capacities(torch.tensor(tokens), spec, K, E), [spec.capacity(n, K, E) for n in tokens]
    )


SPECS = {
    "per sequence": CapacitySpec(factor=0.75, scope="sequence", drop_order="by_weight", renormalise="after"),
    "two levels": CapacitySpec(factor=0.9, drop_order="slot_major", then=CapacitySpec(slots=3)),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_layer_with_a_capacity_is_the_reference_s(name):
    B, L = 3, 5
    rng, spec = np.random.default_rng(0), SPECS[name]
    x_TD, d_output_TD = rng.standard_normal((2, B * L, D))
    mask_T = np.arange(B * L) % 6 != 2
    x_TD[~mask_T] = np.nan
    params = LayerParams.init(LAYER, 0)
    trace = moe_ref.moe_layer(x_TD, params, LAYER, token_mask_T=mask_T, capacity=spec, sequence_lengths=[L] * B)
    grads = moe_ref.layer_backward(trace, params, LAYER, d_output_TD, capacity=spec)
    assert trace.capacity is not None
    assert trace.capacity.dropped_TK.any()

    moe = MoE(LAYER, capacity=spec, dtype=torch.float64)
    moe.load_params(params)
    x = torch.tensor(x_TD, requires_grad=True)
    output, routing = moe.forward_and_routing(x.view(B, L, D), torch.tensor(mask_T).view(B, L))
    output.view(-1, D).backward(torch.tensor(d_output_TD))
    np.testing.assert_allclose(output.detach().view(-1, D), trace.output_TD, **SAME)
    np.testing.assert_array_equal(routing.expert_ids_TK, trace.expert_ids_TK)
    np.testing.assert_allclose(x.grad, grads.x_TD, **SAME)
    np.testing.assert_allclose(moe.router.gate.weight.grad, grads.params.gate_ED, **SAME)
    np.testing.assert_allclose(moe.experts.w2_EDF.grad, np.swapaxes(grads.params.w_down_EFD, 1, 2), **SAME)
    # The load that the bias is to even out is the choice, before the capacity.
    counts_E = moe_ref.tokens_per_expert(trace.routing.expert_ids_TK, LAYER.router.num_choices)
    np.testing.assert_array_equal(moe.tokens_per_expert, counts_E)
    np.testing.assert_array_equal(routing.chosen_ids_TK, trace.routing.expert_ids_TK)


def test_sequences_of_a_packed_batch_are_named_by_their_lengths():
    spec, lengths = SPECS["per sequence"], (7, 0, 4)
    x_TD = np.random.default_rng(1).standard_normal((11, D))
    params = LayerParams.init(LAYER, 0)
    trace = moe_ref.moe_layer(x_TD, params, LAYER, capacity=spec, sequence_lengths=lengths)
    moe = MoE(LAYER, capacity=spec, dtype=torch.float64)
    moe.load_params(params)
    np.testing.assert_allclose(moe(torch.tensor(x_TD), sequence_lengths=lengths).detach(), trace.output_TD, **SAME)


def test_a_capacity_that_all_fit_in_changes_nothing():
    x = torch.randn(9, D, dtype=torch.float64)
    params = LayerParams.init(LAYER, 0)
    layers = [MoE(LAYER, dtype=torch.float64), MoE(LAYER, capacity=CapacitySpec(factor=100.0), dtype=torch.float64)]
    for layer in layers:
        layer.load_params(params)
    np.testing.assert_array_equal(layers[0](x).detach(), layers[1](x).detach())


def test_padding_that_is_appended_changes_no_output():
    # Padding takes no place, and makes none.
    x = torch.randn(9, D, dtype=torch.float64)
    moe = MoE(LAYER, capacity=replace(SPECS["two levels"], factor=0.6), dtype=torch.float64)
    moe.load_params(LayerParams.init(LAYER, 0))
    padded = torch.cat([torch.full((4, D), torch.nan, dtype=torch.float64), x])
    mask = torch.arange(13) >= 4
    np.testing.assert_array_equal(moe(padded, mask)[4:].detach(), moe(x).detach())
