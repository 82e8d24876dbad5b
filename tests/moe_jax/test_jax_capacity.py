"""moe_jax, tests of capacity: what is kept, weights, gradients, whole layers in both forms, and over a mesh."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import moe_ref
from moe_jax.capacity import apply_capacity, capacities, most_slots, slot_table
from moe_jax.dense_matmul import dense_matmul
from moe_jax.sparse_matmul import sparse_matmul
from moe_ref import CapacitySpec, ExpertSpec, LayerParams, LayerSpec, RouterSpec

T, E, K, D = 12, 5, 2, 6
SEQUENCES = (5, 0, 7)
SEQUENCE_OF_T = np.repeat(np.arange(3), SEQUENCES)
MASK = np.arange(T) % 6 != 2
SAME: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
SPECS = {
    "first come": CapacitySpec(factor=0.7, rounding="floor", min_slots=1),
    "slot major per sequence": CapacitySpec(
        factor=0.75, scope="sequence", rounding="ceil_then_floor", drop_order="slot_major", renormalise="before"
    ),
    "by weight, two levels": CapacitySpec(
        factor=1.1,
        scope="rank",
        drop_order="by_weight",
        renormalise="after",
        weight_sum=2.5,
        then=CapacitySpec(factor=0.6, scope="global", drop_order="by_weight"),
    ),
    "slots per sequence": CapacitySpec(slots=2, scope="sequence", drop_order="by_best_weight"),
}


def choice(seed: int):
    """Ids with unused slots and null experts, and weights with ties."""
    rng = np.random.default_rng(seed)
    skewed_TE = rng.standard_normal((T, E + 1)) + np.linspace(2, 0, E + 1)
    ids_TK = np.argsort(-skewed_TE, axis=1)[:, :K]
    ids_TK[rng.random((T, K)) < 0.1] = -1
    return ids_TK, np.round(rng.random((T, K)), 1)


@pytest.mark.parametrize("name", SPECS)
def test_what_is_kept_and_its_gradient_are_the_reference_s(name):
    spec = SPECS[name]

    @jax.jit
    def run(ids_TK, weights_TK, mask_T, d_weights_TK):
        def limited(weights_TK):
            found = apply_capacity(
                ids_TK, weights_TK, spec, E, token_mask_T=mask_T, sequence_of_T=SEQUENCE_OF_T, num_sequences=3
            )
            return found.weights_TK, found

        _, pull, found = jax.vjp(limited, weights_TK, has_aux=True)
        return found, pull(d_weights_TK)[0]

    for seed in range(20):
        ids_TK, weights_TK = choice(seed)
        d_weights_TK = np.random.default_rng(seed).standard_normal((T, K))
        mask_T = MASK | (seed % 2 == 0)
        inputs = {"token_mask_T": mask_T, "sequence_lengths": SEQUENCES}
        expected = moe_ref.apply_capacity(ids_TK, weights_TK, spec, E, **inputs)
        with jax.enable_x64(True):
            found, d_given_TK = run(ids_TK, weights_TK, mask_T, d_weights_TK)
        np.testing.assert_array_equal(found.expert_ids_TK, expected.expert_ids_TK)
        np.testing.assert_array_equal(found.dropped_TK, (expected.expert_ids_TK < 0) & (ids_TK >= 0) & mask_T[:, None])
        np.testing.assert_allclose(found.weights_TK, expected.weights_TK, rtol=1e-14)
        np.testing.assert_array_equal(found.place_TK, expected.place_TK)
        np.testing.assert_allclose(d_given_TK, moe_ref.capacity_backward(expected, spec, d_weights_TK), **SAME)
        kept = expected.expert_ids_TK[(expected.expert_ids_TK >= 0) & (expected.expert_ids_TK < E)]
        assert np.bincount(kept, minlength=E).max() <= most_slots(spec, T, K, E, 3)


def test_the_padded_form_has_each_kept_slot_at_its_place():
    spec = CapacitySpec(factor=1.1, scope="sequence", drop_order="by_weight", pad_to_capacity=True)
    ids_TK, weights_TK = choice(0)
    expected = moe_ref.apply_capacity(ids_TK, weights_TK, spec, E, sequence_lengths=SEQUENCES)
    C = int(expected.capacity_U.max())

    @jax.jit
    def table(ids_TK, weights_TK):
        limited = apply_capacity(ids_TK, weights_TK, spec, E, sequence_of_T=SEQUENCE_OF_T, num_sequences=3)
        return slot_table(limited, E, C, unit_of_T=SEQUENCE_OF_T, num_units=3)

    np.testing.assert_array_equal(table(ids_TK, weights_TK), expected.slot_table_UEC)


@pytest.mark.parametrize("name", SPECS)
def test_the_table_of_capacities_is_exact(name):
    np.testing.assert_array_equal(capacities(SPECS[name], 60, K, E), [SPECS[name].capacity(n, K, E) for n in range(61)])


@pytest.mark.parametrize(
    ("scope", "drop_order"), [("global", "first_come"), ("global", "slot_major"), ("sequence", "by_weight")]
)
def test_a_capacity_over_a_mesh_is_that_of_the_whole_batch(scope, drop_order):
    spec = CapacitySpec(
        factor=0.9,
        scope="rank",
        drop_order=drop_order,
        then=CapacitySpec(factor=0.7, scope=scope, drop_order=drop_order),
    )
    own = PartitionSpec("shards")

    def run(ids_TK, weights_TK, mask_T, sequence_of_T):
        inputs = {"token_mask_T": mask_T, "sequence_of_T": sequence_of_T, "num_sequences": 3, "axis_name": "shards"}
        return apply_capacity(ids_TK, weights_TK, spec, E, **inputs).expert_ids_TK

    mesh = Mesh(np.array(jax.devices("cpu")[:4]), ("shards",))
    over_mesh = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(own,) * 4, out_specs=own))
    for seed in range(10):
        ids_TK, weights_TK = choice(seed)
        inputs = {"token_mask_T": MASK, "sequence_lengths": SEQUENCES, "tokens_per_shard": (3, 3, 3, 3)}
        expected = moe_ref.apply_capacity(ids_TK, weights_TK, spec, E, **inputs)
        np.testing.assert_array_equal(over_mesh(ids_TK, weights_TK, MASK, SEQUENCE_OF_T), expected.expert_ids_TK)


LAYERS = {
    "bias and null experts": LayerSpec(
        router=RouterSpec(num_experts=E, top_k=K, num_null_experts=1, route_norm=True),
        experts=ExpertSpec(dim=D, hidden_dim=4, bias=True),
    ),
    "weight on the input": LayerSpec(
        router=RouterSpec(num_experts=E, top_k=K, score_func="sigmoid", weight_on="input"),
        experts=ExpertSpec(dim=D, hidden_dim=4, gated=False, activation="relu2"),
    ),
}


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        ("bias and null experts", "slot major per sequence"),
        ("bias and null experts", "by weight, two levels"),
        ("weight on the input", "first come"),
    ],
)
@pytest.mark.parametrize("form", [sparse_matmul, dense_matmul])
def test_both_forms_of_a_layer_are_the_reference_s(layer, name, form):
    spec, capacity = LAYERS[layer], SPECS[name]
    rng, params = np.random.default_rng(0), LayerParams.init(LAYERS[layer], 0)
    x_TD, d_output_TD = rng.standard_normal((2, T, D))
    x_TD[~MASK] = np.nan
    trace = moe_ref.moe_layer(x_TD, params, spec, token_mask_T=MASK, capacity=capacity, sequence_lengths=SEQUENCES)
    expected = moe_ref.layer_backward(trace, params, spec, d_output_TD, capacity=capacity)
    assert trace.capacity is not None
    assert trace.capacity.dropped_TK.any()

    run = partial(form, spec=spec, token_mask_T=MASK, capacity=capacity, sequence_of_T=SEQUENCE_OF_T, num_sequences=3)

    @jax.jit
    def both(x_TD, params, d_output_TD):
        output_TD, pull, decided = jax.vjp(run, x_TD, params, has_aux=True)
        return output_TD, decided, *pull(d_output_TD)

    with jax.enable_x64(True):
        output_TD, decided, d_x_TD, d_params = both(x_TD, params, d_output_TD)
    np.testing.assert_allclose(output_TD, trace.output_TD, **SAME)
    np.testing.assert_array_equal(decided.expert_ids_TK, trace.expert_ids_TK)
    np.testing.assert_array_equal(decided.chosen_ids_TK, trace.routing.expert_ids_TK)
    np.testing.assert_allclose(d_x_TD, expected.x_TD, **SAME)
    for gradient, wanted in zip(jax.tree.leaves(d_params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(gradient, wanted, **SAME)
