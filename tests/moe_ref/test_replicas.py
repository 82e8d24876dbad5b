"""moe_ref, tests of redundant experts: a layer of places is that of experts; counts and gradients come home."""

from dataclasses import fields, replace

import numpy as np
import pytest
from derivatives import assert_close

from moe_ref import (
    ExpertSpec,
    LayerParams,
    LayerSpec,
    ReplicaSpec,
    RouterInputs,
    RouterSpec,
    home,
    home_gradients,
    layer_backward,
    moe_layer,
    place_slots,
    replicate,
)

PLACEMENT = (2, 0, 1, 2, 3, 2, 0)
SPEC = LayerSpec(
    router=RouterSpec(num_experts=4, top_k=3, score_func="sigmoid", num_null_experts=2),
    experts=ExpertSpec(dim=5, hidden_dim=3, bias=True),
)


@pytest.mark.parametrize("choice", ["by_slot", "in_turn"])
def test_a_layer_of_places_is_the_layer_of_experts(choice):
    replicas = ReplicaSpec(num_experts=4, placement=PLACEMENT, choice=choice)
    params, rng = LayerParams.init(SPEC), np.random.default_rng(0)
    x_TD, d_output_TD = rng.standard_normal((2, 11, 5))
    trace = moe_layer(x_TD, params, SPEC)
    expected = layer_backward(trace, params, SPEC, d_output_TD)

    # The choice and the weights of the experts, forced on a layer of as many experts as there are places.
    placed = SPEC.replace(
        router=RouterSpec(num_experts=7, top_k=3, score_func="sigmoid", num_null_experts=2, selector="given")
    )
    inputs = RouterInputs(given_ids_TK=place_slots(trace.expert_ids_TK, replicas), given_weights_TK=trace.weights_TK)
    of_places = replace(replicate(params, replicas), gate_ED=np.zeros((9, 5)), expert_bias_E=None)
    found = moe_layer(x_TD, of_places, placed, inputs=inputs)
    grads = layer_backward(found, of_places, placed, d_output_TD)
    assert_close(found.output_TD, trace.output_TD, 1e-13)
    assert_close(grads.weights_TK, expected.weights_TK, 1e-13)
    counts_P = found.permutation.tokens_per_expert_E
    np.testing.assert_array_equal(home(counts_P, replicas), trace.permutation.tokens_per_expert_E)
    if choice == "in_turn":
        assert np.ptp(counts_P[[0, 3, 5]]) <= 1
    again = home_gradients(grads.params, replicas)
    for field in fields(LayerParams):
        if field.name.startswith(("w_", "b_")):
            assert_close(getattr(again, field.name), getattr(expected.params, field.name), 1e-13)


def test_each_choice_by_hand():
    ids_TK = np.array([[2, 0], [2, -1], [5, 2], [2, 1]])
    by_slot = ReplicaSpec(num_experts=4, placement=PLACEMENT)
    # Flat slots 0, 2, 5 and 6 of expert 2, whose places are 0, 3 and 5; expert 0 is at 1 and 6.
    assert place_slots(ids_TK, by_slot).tolist() == [[0, 6], [5, -1], [8, 5], [0, 2]]
    in_turn = by_slot.replace(choice="in_turn")
    assert place_slots(ids_TK, in_turn).tolist() == [[0, 1], [3, -1], [8, 5], [0, 2]]
    table_ER, counts_E = by_slot.table()
    assert table_ER.tolist() == [[1, 6, 1], [2, 2, 2], [0, 3, 5], [4, 4, 4]]
    assert counts_E.tolist() == [2, 1, 3, 1]


def test_an_expert_without_a_place_is_refused():
    with pytest.raises(ValueError, match=r"it has no place for the experts \[1, 3\]"):
        ReplicaSpec(num_experts=4, placement=(0, 2, 0))
    with pytest.raises(ValueError, match=r"placement\[1\] is 4; it is an integer between 0 and 3"):
        ReplicaSpec(num_experts=4, placement=(0, 4, 1, 2, 3))
    with pytest.raises(ValueError, match="choice is 'random'"):
        ReplicaSpec(num_experts=1, placement=(0, 0), choice="random")
