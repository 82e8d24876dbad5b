"""moe_ref, tests of capacity: how many slots an expert takes, which are kept, and what a dropped slot is afterwards."""

import math
from itertools import permutations, product

import numpy as np
import pytest
from derivatives import assert_close, slope_along
from load_cases import E, K, T, one_hot, routed

from moe_ref import (
    CapacitySpec,
    ExpertSpec,
    LayerParams,
    LayerSpec,
    RouterSpec,
    apply_capacity,
    layer_backward,
    moe_layer,
    tokens_per_expert,
)
from moe_ref.specs.balance import DROP_ORDERS
from moe_ref.specs.ids import UNUSED

_, IDS_TK, WEIGHTS_TK = routed()
IDS_53 = np.array([[0, 1, 3], [0, 2, 1], [0, 1, 2], [1, 0, 2], [0, 3, 2]])
"""Five tokens; expert 0 is chosen by all, in slot 1 by token 3."""
WEIGHTS_53 = np.array([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.4, 0.35, 0.25], [0.6, 0.3, 0.1], [0.9, 0.06, 0.04]])

# how many


@pytest.mark.parametrize(
    ("rounding", "factor", "num_tokens", "top_k", "num_experts", "expected"),
    [
        ("ceil", 1.0, 15, 2, 7, 5),  # 4.29
        ("floor", 1.0, 15, 2, 7, 4),
        ("ceil_then_floor", 1.0, 15, 2, 7, 5),
        ("ceil", 1.5, 15, 2, 7, 7),  # 6.43
        ("floor", 1.5, 15, 2, 7, 6),
        ("ceil_then_floor", 1.5, 15, 2, 7, 7),  # 7.5
        ("ceil", 0.1, 3, 1, 7, 1),
        ("floor", 0.1, 3, 1, 7, 0),
        ("ceil", 1.1, 30, 2, 6, 11),  # 11 exactly, which 1.1 as a float exceeds
        ("floor", 0.7, 30, 2, 6, 7),  # 7 exactly, which 0.7 as a float does not reach
        ("ceil", 8.0, 15, 2, 7, 15),  # never more than the tokens
        ("ceil", 1.0, 0, 2, 7, 0),
    ],
)
def test_a_capacity_is_the_rounded_multiple_of_the_balanced_load(
    rounding, factor, num_tokens, top_k, num_experts, expected
):
    spec = CapacitySpec(factor=factor, rounding=rounding)
    assert spec.capacity(num_tokens, top_k, num_experts) == expected


def test_the_published_rules_of_rounding():
    for num_tokens, top_k, factor in ((64, 2, 1.25), (100, 1, 1.0), (37, 3, 2.0), (11, 2, 0.5)):
        sizes, slots = (num_tokens, top_k, E), num_tokens * top_k
        megatron = math.ceil(slots / E * factor)
        switch = int(slots / E * factor)
        maxtext = int(max(math.ceil(slots / E) * factor, factor))
        for rounding, rule in (("ceil", megatron), ("floor", switch), ("ceil_then_floor", maxtext)):
            assert CapacitySpec(factor=factor, rounding=rounding).capacity(*sizes) == min(rule, num_tokens)


def test_a_capacity_has_a_minimum_or_is_given():
    assert CapacitySpec(factor=0.1, min_slots=4).capacity(15, 2, 7) == 4
    assert CapacitySpec(factor=0.1, min_slots=4).capacity(3, 2, 7) == 3
    assert CapacitySpec(slots=6).capacity(15, 2, 7) == 6
    assert CapacitySpec(slots=0).capacity(15, 2, 7) == 0
    assert CapacitySpec(factor=1.25).factor_ratio == (5, 4)
    assert CapacitySpec(factor=1.1).factor_ratio == (11, 10)
    assert CapacitySpec(slots=6).factor_ratio == (0, 1)


# which


def kept(spec, **inputs):
    return apply_capacity(IDS_53, WEIGHTS_53, spec, 4, **inputs)


def test_the_first_tokens_are_kept_by_default():
    found = kept(CapacitySpec(slots=2))
    np.testing.assert_array_equal(found.expert_ids_TK, [[0, 1, 3], [0, 2, 1], [-1, -1, 2], [-1, -1, -1], [-1, 3, -1]])
    np.testing.assert_array_equal(found.wanted_UE, [[5, 4, 4, 2]])
    np.testing.assert_array_equal(found.taken_UE, [[2, 2, 2, 2]])


def test_slot_major_admits_every_first_choice_before_a_second_one():
    found = kept(CapacitySpec(slots=2, drop_order="slot_major"))
    # Expert 1: token 3 in slot 0, then token 0 in slot 1; first come keeps tokens 0 and 1.
    np.testing.assert_array_equal(found.expert_ids_TK, [[0, 1, 3], [0, 2, -1], [-1, -1, 2], [1, -1, -1], [-1, 3, -1]])


def test_by_weight_keeps_the_largest_and_breaks_ties_by_token():
    found = kept(CapacitySpec(slots=2, drop_order="by_weight"))
    # Expert 0: 0.9 of token 4, 0.6 of token 1. Expert 1: 0.6 of token 3, 0.35 of token 2.
    np.testing.assert_array_equal(found.expert_ids_TK, [[-1, -1, 3], [0, 2, -1], [-1, 1, 2], [1, -1, -1], [0, 3, -1]])
    tied = apply_capacity(np.zeros((4, 1), int), np.full((4, 1), 0.5), CapacitySpec(slots=2, drop_order="by_weight"), 2)
    np.testing.assert_array_equal(tied.dropped_TK[:, 0], [False, False, True, True])


@pytest.mark.parametrize("drop_order", DROP_ORDERS)
def test_the_published_orders_of_dropping(drop_order):
    spec, capacity = CapacitySpec(slots=3, drop_order=drop_order), 3
    found = apply_capacity(IDS_TK, WEIGHTS_TK, spec, E)
    chosen_TKE = one_hot(IDS_TK)
    if drop_order == "first_come":  # MaxText: a running count over (token, slot)
        place_TKE = (np.cumsum(chosen_TKE.reshape(T * K, E), axis=0) * chosen_TKE.reshape(T * K, E)).reshape(T, K, E)
        expected_TK = ((place_TKE > 0) & (place_TKE <= capacity)).any(axis=-1)
    elif drop_order in ("slot_major", "by_best_weight"):  # GShard: the second choices start where the first ones ended
        taken_E, expected_TK = np.zeros(E), np.zeros((T, K), bool)
        # V-MoE, algorithm 2: the same with the tokens of the largest weights first.
        order_T = (
            np.argsort(-WEIGHTS_TK.max(axis=-1), kind="stable") if drop_order == "by_best_weight" else np.arange(T)
        )
        for slot in range(K):
            place_TE = (np.cumsum(chosen_TKE[order_T, slot], axis=0) + taken_E) * chosen_TKE[order_T, slot]
            expected_TK[order_T, slot] = ((place_TE > 0) & (place_TE <= capacity)).any(axis=-1)
            taken_E = taken_E + chosen_TKE[:, slot].sum(axis=0)
    else:  # Megatron: the top C tokens of each column of the masked probabilities
        weight_TE = (chosen_TKE * WEIGHTS_TK[:, :, None]).sum(axis=1)
        top_CE = np.argsort(-weight_TE, axis=0)[:capacity]
        expected_TK = np.array([[token in top_CE[:, e] for e in IDS_TK[token]] for token in range(T)])
    np.testing.assert_array_equal(found.kept_TK, expected_TK)
    assert not found.kept_TK.all()


ORDERS = {
    "first_come": lambda token, slot, weight: (token, slot),
    "slot_major": lambda token, slot, weight: (slot, token),
    "by_weight": lambda token, slot, weight: (-weight[slot], token, slot),
    "by_best_weight": lambda token, slot, weight: (slot, -max(weight), token),
}


@pytest.mark.parametrize("drop_order", ORDERS)
def test_in_a_small_world_a_slot_is_kept_where_fewer_than_the_capacity_precede_it(drop_order):
    choices = list(permutations(range(3), 2))
    weights_TK = np.array([[0.6, 0.4], [0.4, 0.4], [0.9, 0.1]])
    rank = {(t, k): ORDERS[drop_order](t, k, weights_TK[t]) for t in range(3) for k in range(2)}
    for ids_TK in map(np.array, product(choices, repeat=3)):
        rivals = {own: sum(ids_TK[other] == ids_TK[own] and rank[other] < rank[own] for other in rank) for own in rank}
        for slots in range(4):
            found = apply_capacity(ids_TK, weights_TK, CapacitySpec(slots=slots, drop_order=drop_order), 3)
            for own, before in rivals.items():
                assert found.kept_TK[own] == (before < slots), (ids_TK, slots, own)


@pytest.mark.parametrize("drop_order", DROP_ORDERS)
@pytest.mark.parametrize("factor", [0.3, 1.0, 2.0])
def test_no_expert_takes_more_than_its_capacity_and_none_drops_below_it(factor, drop_order):
    found = apply_capacity(IDS_TK, WEIGHTS_TK, CapacitySpec(factor=factor, drop_order=drop_order), E)
    np.testing.assert_array_equal(found.taken_UE[0], np.minimum(tokens_per_expert(IDS_TK, E), found.capacity_U[0]))
    np.testing.assert_array_equal(found.taken_UE[0], tokens_per_expert(found.expert_ids_TK, E))


@pytest.mark.parametrize("slots", [T, 10**6])
def test_a_capacity_of_all_tokens_drops_nothing(slots):
    # deepspeedai/DeepSpeed#8155, marin-community/marin#8578
    found = apply_capacity(IDS_TK, WEIGHTS_TK, CapacitySpec(slots=slots), E)
    np.testing.assert_array_equal(found.expert_ids_TK, IDS_TK)
    np.testing.assert_array_equal(found.weights_TK, WEIGHTS_TK)
    assert not found.dropped_TK.any()


def test_null_experts_and_unused_slots_take_no_place():
    ids_TK = np.array([[0, 4], [4, 0], [UNUSED, 0], [5, 4]])
    found = apply_capacity(ids_TK, np.ones((4, 2)), CapacitySpec(slots=2), 4)
    np.testing.assert_array_equal(found.expert_ids_TK, [[0, 4], [4, 0], [-1, -1], [5, 4]])
    np.testing.assert_array_equal(found.weights_TK, [[1, 1], [1, 1], [0, 0], [1, 1]])
    np.testing.assert_array_equal(found.dropped_TK, [[0, 0], [0, 0], [0, 1], [0, 0]])
    np.testing.assert_array_equal(found.place_TK, [[0, -1], [-1, 1], [-1, -1], [-1, -1]])


# where


def test_a_capacity_holds_in_each_sequence_or_rank_or_in_the_batch():
    lengths = (6, 0, 9)
    for scope, field in (("sequence", "sequence_lengths"), ("rank", "tokens_per_shard")):
        spec = CapacitySpec(factor=0.6, scope=scope)
        found = apply_capacity(IDS_TK, WEIGHTS_TK, spec, E, **{field: lengths})
        parts = [apply_capacity(IDS_TK[own], WEIGHTS_TK[own], spec, E) for own in (slice(6), slice(6, T))]
        np.testing.assert_array_equal(found.expert_ids_TK, np.concatenate([p.expert_ids_TK for p in parts]))
        np.testing.assert_array_equal(found.capacity_U, [parts[0].capacity_U[0], 0, parts[1].capacity_U[0]])
    whole = apply_capacity(IDS_TK, WEIGHTS_TK, CapacitySpec(factor=0.6), E)
    cut = apply_capacity(
        IDS_TK, WEIGHTS_TK, CapacitySpec(factor=0.6), E, sequence_lengths=lengths, tokens_per_shard=lengths
    )
    np.testing.assert_array_equal(cut.expert_ids_TK, whole.expert_ids_TK)
    assert (whole.expert_ids_TK != found.expert_ids_TK).any()


def test_a_second_limit_sees_what_the_first_one_kept():
    first, second = CapacitySpec(slots=2, scope="rank", drop_order="by_weight"), CapacitySpec(slots=3)
    found = apply_capacity(IDS_TK, WEIGHTS_TK, first.replace(then=second), E, tokens_per_shard=(7, 8))
    by_rank = apply_capacity(IDS_TK, WEIGHTS_TK, first, E, tokens_per_shard=(7, 8))
    both = apply_capacity(by_rank.expert_ids_TK, by_rank.weights_TK, second, E)
    np.testing.assert_array_equal(found.expert_ids_TK, both.expert_ids_TK)
    np.testing.assert_array_equal(found.dropped_TK, by_rank.dropped_TK | both.dropped_TK)
    np.testing.assert_array_equal(found.first.expert_ids_TK, by_rank.expert_ids_TK)
    assert both.dropped_TK.any()
    assert by_rank.dropped_TK.any()


@pytest.mark.parametrize("drop_order", DROP_ORDERS)
@pytest.mark.parametrize("scope", ["global", "sequence"])
def test_padding_takes_no_place_and_makes_none(scope, drop_order):
    mask_T = np.arange(T) % 3 != 1
    ids_TK, weights_TK = IDS_TK.copy(), WEIGHTS_TK.copy()
    ids_TK[~mask_T], weights_TK[~mask_T] = 0, np.nan
    spec = CapacitySpec(factor=0.7, scope=scope, drop_order=drop_order, renormalise="after")
    padded = apply_capacity(ids_TK, weights_TK, spec, E, token_mask_T=mask_T, sequence_lengths=(6, 9))
    lengths = (int(mask_T[:6].sum()), int(mask_T[6:].sum()))
    compact = apply_capacity(IDS_TK[mask_T], WEIGHTS_TK[mask_T], spec, E, sequence_lengths=lengths)
    np.testing.assert_array_equal(padded.expert_ids_TK[mask_T], compact.expert_ids_TK)
    np.testing.assert_array_equal(padded.weights_TK[mask_T], compact.weights_TK)
    np.testing.assert_array_equal(padded.capacity_U, compact.capacity_U)
    np.testing.assert_array_equal(padded.expert_ids_TK[~mask_T], UNUSED)
    np.testing.assert_array_equal(padded.weights_TK[~mask_T], 0)


# afterwards


def test_weights_are_renormalised_before_or_after_the_drop_or_not():
    weights_TK = np.array([[0.6, 0.2], [0.3, 0.1], [0.1, 0.4]])
    ids_TK = np.array([[0, 1], [0, 2], [0, 1]])
    found = {
        how: apply_capacity(ids_TK, weights_TK, CapacitySpec(slots=1, renormalise=how), 3).weights_TK
        for how in ("no", "before", "after")
    }
    np.testing.assert_allclose(found["no"], [[0.6, 0.2], [0, 0.1], [0, 0]])
    np.testing.assert_allclose(found["before"], [[0.75, 0.25], [0, 0.25], [0, 0]])
    np.testing.assert_allclose(found["after"], [[0.75, 0.25], [0, 1], [0, 0]])
    scaled = apply_capacity(ids_TK, weights_TK, CapacitySpec(slots=1, renormalise="after", weight_sum=2.5), 3)
    np.testing.assert_allclose(scaled.weights_TK, 2.5 * found["after"])


def test_a_padded_table_holds_each_kept_slot_once_at_its_place():
    spec = CapacitySpec(factor=1.0, scope="sequence", drop_order="slot_major", pad_to_capacity=True)
    found = apply_capacity(IDS_TK, WEIGHTS_TK, spec, E, sequence_lengths=(4, 11))
    U, C = 2, found.capacity_U.max()
    assert found.slot_table_UEC.shape == (U, E, C)
    held = found.slot_table_UEC[found.slot_table_UEC >= 0]
    np.testing.assert_array_equal(np.sort(held), np.flatnonzero(found.kept_TK))
    for unit, expert, place in np.argwhere(found.slot_table_UEC >= 0):
        token, slot = divmod(int(found.slot_table_UEC[unit, expert, place]), K)
        assert (found.unit_of_T[token], IDS_TK[token, slot], found.place_TK[token, slot]) == (unit, expert, place)
    # Places are 0 .. n - 1 without a hole (lucidrains/st-moe-pytorch#13).
    np.testing.assert_array_equal((found.slot_table_UEC >= 0).sum(axis=-1), found.taken_UE)
    np.testing.assert_array_equal(found.slot_table_UEC[:, :, 0] >= 0, found.taken_UE > 0)
    assert apply_capacity(IDS_TK, WEIGHTS_TK, spec.replace(pad_to_capacity=False), E).slot_table_UEC is None


# in a layer

LAYER = LayerSpec(
    router=RouterSpec(num_experts=5, top_k=2, score_func="sigmoid", route_norm=True, route_scale=2.0),
    experts=ExpertSpec(dim=3, hidden_dim=4),
)


def layer_case(**router):
    rng = np.random.default_rng(4)
    spec = LAYER.replace(router=LAYER.router.replace(**router))
    params = LayerParams(
        gate_ED=rng.standard_normal((5, 3)),
        w_gate_EDF=rng.standard_normal((5, 3, 4)),
        w_up_EDF=rng.standard_normal((5, 3, 4)),
        w_down_EFD=rng.standard_normal((5, 4, 3)),
    )
    return rng.standard_normal((11, 3)), params, spec, rng.standard_normal((11, 3))


def test_a_dropped_slot_adds_exactly_0_to_the_output():
    x_TD, params, spec, _ = layer_case()
    capacity = CapacitySpec(factor=0.5)
    limited = moe_layer(x_TD, params, spec, capacity=capacity)
    free = moe_layer(x_TD, params, spec)
    dropped_TK = limited.capacity.dropped_TK
    kept_TKD = np.where(dropped_TK[:, :, None], 0, free.weights_TK[:, :, None] * free.slot_outputs_TKD)
    np.testing.assert_allclose(limited.output_TD, kept_TKD.sum(axis=1), rtol=1e-14)
    all_dropped_T = dropped_TK.all(axis=-1)
    assert all_dropped_T.any()
    np.testing.assert_array_equal(limited.output_TD[all_dropped_T], 0)
    np.testing.assert_array_equal(limited.routing.expert_ids_TK, free.routing.expert_ids_TK)
    assert free.capacity is None
    # It is no row: no expert works on it.
    np.testing.assert_array_equal(limited.permutation.tokens_per_expert_E, limited.capacity.taken_UE[0])
    np.testing.assert_array_equal(limited.slot_outputs_TKD[dropped_TK], 0)


def test_a_large_capacity_is_the_layer_without_one():
    x_TD, params, spec, _ = layer_case()
    np.testing.assert_array_equal(
        moe_layer(x_TD, params, spec, capacity=CapacitySpec(factor=9.0)).output_TD,
        moe_layer(x_TD, params, spec).output_TD,
    )


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("renormalise", ["no", "after"])
def test_the_gradient_of_a_layer_with_a_capacity_is_its_difference_quotient(renormalise, weight_on):
    x_TD, params, spec, d_output_TD = layer_case(weight_on=weight_on)
    mask_T = np.arange(11) != 4
    weight_sum = 1.0 if renormalise == "no" else 2.0
    capacity = CapacitySpec(factor=0.8, scope="rank", renormalise=renormalise, weight_sum=weight_sum)
    inputs = {"capacity": capacity, "token_mask_T": mask_T, "tokens_per_shard": (5, 6)}

    def value(moved_TD, gate_ED):
        moved = LayerParams(**params.__dict__ | {"gate_ED": gate_ED})
        return (moe_layer(moved_TD, moved, spec, **inputs).output_TD * d_output_TD).sum()

    trace = moe_layer(x_TD, params, spec, **inputs)
    found = layer_backward(trace, params, spec, d_output_TD, capacity=capacity)
    assert trace.capacity.dropped_TK.any()
    np.testing.assert_array_equal(found.weights_TK[trace.capacity.dropped_TK], 0)
    rng = np.random.default_rng(8)
    for _ in range(3):
        dx_TD, dg_ED = rng.standard_normal(x_TD.shape), rng.standard_normal((5, 3))
        slope = slope_along(lambda x, dx=dx_TD: value(x, params.gate_ED), x_TD, dx_TD)
        assert_close(np.array((found.x_TD * dx_TD).sum()), np.array(slope))
        slope = slope_along(lambda gate: value(x_TD, gate), params.gate_ED, dg_ED)
        assert_close(np.array((found.params.gate_ED * dg_ED).sum()), np.array(slope))


# what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "factor is None and slots is None; one of them is given"),
        ({"factor": 1.0, "slots": 3}, "factor is 1.0 and slots is 3"),
        ({"factor": 0.0}, "factor is 0.0; it is a finite number greater than 0.0"),
        ({"slots": -1}, "slots is -1"),
        ({"slots": 3, "rounding": "floor"}, "rounding is 'floor', but factor is None"),
        ({"factor": 1.0, "scope": "token"}, "scope is 'token'"),
        ({"factor": 1.0, "rounding": "round"}, "rounding is 'round'"),
        ({"factor": 1.0, "min_slots": -2}, "min_slots is -2"),
        ({"factor": 1.0, "drop_order": "last_come"}, "did you mean first_come"),
        ({"factor": 1.0, "renormalise": True}, "renormalise is True"),
        ({"factor": 1.0, "weight_sum": 2.0}, "weight_sum is 2.0, but renormalise is 'no'"),
        ({"factor": 1.0, "renormalise": "after", "weight_sum": 0.0}, "weight_sum is 0.0"),
        ({"factor": 1.0, "pad_to_capacity": 1}, "pad_to_capacity is 1; it is a bool"),
        ({"factor": 1.0, "then": 2}, "then is 2; it is a CapacitySpec without another"),
        (
            {"factor": 1.0, "then": CapacitySpec(slots=1, then=CapacitySpec(slots=1))},
            "it is a CapacitySpec without another",
        ),
    ],
)
def test_a_wrong_capacity_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CapacitySpec(**changes)


def test_a_capacity_is_read_back_from_its_dict():
    two = CapacitySpec(factor=1.25, scope="rank", then=CapacitySpec(slots=3, drop_order="slot_major"))
    assert two.to_dict() == {"factor": 1.25, "scope": "rank", "then": {"slots": 3, "drop_order": "slot_major"}}
    for spec in (two, CapacitySpec(slots=4)):
        assert CapacitySpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(ValueError, match="did you mean factor"):
        CapacitySpec.from_dict({"facter": 1.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0"),
        ({"expert_ids_TK": np.zeros((T, K), int)}, "the experts of a token are distinct"),
        ({"expert_ids_TK": IDS_TK - 2}, "ids are between -1 and"),
        ({"weights_TK": WEIGHTS_TK[:3]}, r"weights_TK has shape \(3, 2\); it is \(15, 2\)"),
        ({"weights_TK": np.full((T, K), np.inf)}, "weights of used slots are finite"),
        ({"tokens_per_shard": (3, 4), "spec": CapacitySpec(slots=1, scope="rank")}, "tokens_per_shard sums to 7"),
    ],
)
def test_wrong_inputs_are_refused(changes, message):
    given = {"expert_ids_TK": IDS_TK, "weights_TK": WEIGHTS_TK, "spec": CapacitySpec(slots=1), "num_experts": E}
    with pytest.raises(ValueError, match=message):
        apply_capacity(**given | changes)
