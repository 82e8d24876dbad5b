"""moe_ref, tests of replay: what a record holds, and what a router does with it."""

import sys

import numpy as np
import pytest
from derivatives import ROUTERS, T, router, router_inputs

from moe_ref import (
    CapacitySpec,
    ExpertSpec,
    LayerParams,
    LayerSpec,
    RouterInputs,
    RouterSpec,
    RoutingRecord,
    apply_capacity,
    capture,
    layer_backward,
    load_records,
    moe_layer,
    replay,
    replay_layer,
    route,
    save_records,
)
from moe_ref.specs.ids import UNUSED

MASK_T = np.array([True, True, False, True, True, False])
SPEC = RouterSpec(num_experts=8, top_k=3, score_func="sigmoid", route_norm=True, route_scale=2.5)


def recorded(name="sigmoid_norm", mask_T=MASK_T):
    spec = router(name)
    logits_TE = 2 * np.random.default_rng(5).standard_normal((T, spec.num_logits))
    inputs = router_inputs(spec)
    routing = route(logits_TE, spec, token_mask_T=mask_T, **inputs)
    record = capture(routing, spec, token_mask_T=mask_T, sequence_lengths=(4, 2))
    return record, routing, logits_TE, inputs.get("learned_scale")


def assert_same(found: RoutingRecord, expected: RoutingRecord):
    assert found.spec == expected.spec
    assert found.to_arrays().keys() == expected.to_arrays().keys()
    for name, value in expected.to_arrays().items():
        np.testing.assert_array_equal(found.to_arrays()[name], value)
        assert found.to_arrays()[name].dtype == value.dtype


def test_a_record_holds_the_choice_in_slot_order_with_float32_weights():
    record, routing, _, _ = recorded()
    np.testing.assert_array_equal(record.expert_ids_TK, routing.expert_ids_TK)
    np.testing.assert_array_equal(record.weights_TK, routing.weights_TK.astype(np.float32))
    assert (record.expert_ids_TK.dtype, record.weights_TK.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(record.sequence_starts_B, [0, 4])
    assert record.sequence_lengths == (4, 2)
    np.testing.assert_array_equal(record.expert_ids_TK[~MASK_T], UNUSED)
    whole = capture(routing, record.spec, token_mask_T=MASK_T)
    assert whole.sequence_lengths == (T,)
    with pytest.raises(ValueError, match="sequence_lengths sums to 5; there are 6 tokens"):
        capture(routing, record.spec, sequence_lengths=(2, 3))


SPARSE = {"sparsemixer"}
MASKED_GROUPS = {"groups_filled_with_0", "groups_top_1"}


@pytest.mark.parametrize("name", sorted(ROUTERS.keys() - SPARSE - MASKED_GROUPS))
def test_ids_alone_replayed_on_the_same_logits_give_the_same_weights(name):
    record, routing, logits_TE, learned_scale = recorded(name)
    found = replay(record, logits_TE, record.spec, learned_scale=learned_scale)
    np.testing.assert_array_equal(found.expert_ids_TK, routing.expert_ids_TK)
    np.testing.assert_allclose(found.weights_TK, routing.weights_TK, rtol=1e-14)


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_ids_with_weights_are_what_was_recorded_whatever_the_logits(name):
    record, _, logits_TE, learned_scale = recorded(name)
    found = replay(record, -3 * logits_TE, record.spec, with_weights=True, learned_scale=learned_scale)
    np.testing.assert_array_equal(found.expert_ids_TK, record.expert_ids_TK)
    np.testing.assert_array_equal(found.weights_TK.astype(np.float32), record.weights_TK)


def test_ids_alone_on_another_router_weigh_its_own_scores_of_those_ids():
    record, _, logits_TE, _ = recorded()
    other = RouterSpec(num_experts=8, top_k=3, num_expert_groups=4, num_limited_groups=2, route_scale=3.0)
    found = replay(record, logits_TE + 1.0, other)
    np.testing.assert_array_equal(found.expert_ids_TK, record.expert_ids_TK)
    scores_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(axis=-1, keepdims=True)
    expected_TK = 3.0 * np.take_along_axis(scores_TE, np.maximum(record.expert_ids_TK, 0), axis=-1)
    np.testing.assert_allclose(found.weights_TK, np.where(MASK_T[:, None], expected_TK, 0))


def test_weights_that_depend_on_how_the_choice_was_made_are_recorded_or_refused():
    record, _, logits_TE, _ = recorded("sparsemixer")
    with pytest.raises(ValueError, match="replay it with recorded weights"):
        replay(record, logits_TE, record.spec)


def test_unused_slots_stay_unused_and_dropped_ones_are_recorded_so():
    _, routing, logits_TE, _ = recorded()
    limited = apply_capacity(routing.expert_ids_TK, routing.weights_TK, CapacitySpec(slots=1), 8, token_mask_T=MASK_T)
    record = capture(limited, SPEC, token_mask_T=MASK_T)
    assert limited.dropped_TK.any()
    for with_weights in (False, True):
        found = replay(record, logits_TE, SPEC, with_weights=with_weights)
        np.testing.assert_array_equal(found.expert_ids_TK, limited.expert_ids_TK)
        np.testing.assert_array_equal(found.weights_TK[limited.dropped_TK], 0)


# in a layer


def layer_case():
    rng = np.random.default_rng(9)
    spec = LayerSpec(router=SPEC, experts=ExpertSpec(dim=5, hidden_dim=4))
    shapes = {"gate_ED": (8, 5), "w_gate_EDF": (8, 5, 4), "w_up_EDF": (8, 5, 4), "w_down_EFD": (8, 4, 5)}
    params = LayerParams(
        expert_bias_E=rng.standard_normal(8), **{name: rng.standard_normal(shape) for name, shape in shapes.items()}
    )
    return rng.standard_normal((T, 5)), params, spec


def test_a_replayed_layer_has_the_output_of_the_recorded_one():
    x_TD, params, spec = layer_case()
    rollout = moe_layer(x_TD, params, spec, token_mask_T=MASK_T)
    record = capture(rollout.routing, SPEC, token_mask_T=MASK_T)
    exact = replay_layer(record, x_TD, params, spec)
    np.testing.assert_allclose(exact.output_TD, rollout.output_TD, rtol=1e-13)
    close = replay_layer(record, x_TD, params, spec, with_weights=True)
    np.testing.assert_allclose(close.output_TD, rollout.output_TD, rtol=0, atol=1e-6 * np.abs(rollout.output_TD).max())


def test_the_choice_of_a_trainer_that_has_moved_on_is_still_the_recorded_one():
    x_TD, params, spec = layer_case()
    record = capture(moe_layer(x_TD, params, spec).routing, SPEC)
    moved = LayerParams(**params.__dict__ | {"gate_ED": params.gate_ED + 0.5 * params.gate_ED[::-1]})
    assert (moe_layer(x_TD, moved, spec).routing.expert_ids_TK != record.expert_ids_TK).any()
    for with_weights in (False, True):
        trace = replay_layer(record, x_TD, moved, spec, with_weights=with_weights)
        np.testing.assert_array_equal(trace.routing.expert_ids_TK, record.expert_ids_TK)


def test_recorded_weights_are_constants_and_recomputed_ones_train_the_gate():
    x_TD, params, spec = layer_case()
    record = capture(moe_layer(x_TD, params, spec).routing, SPEC)
    gradients = {}
    for with_weights in (False, True):
        trace = replay_layer(record, x_TD, params, spec, with_weights=with_weights)
        assert trace.routing.weights_are_given == with_weights
        forced = spec.replace(router=SPEC.replace(selector="given"))
        gradients[with_weights] = layer_backward(trace, params, forced, np.ones((T, 5)))
    np.testing.assert_array_equal(gradients[True].params.gate_ED, 0)
    np.testing.assert_array_equal(gradients[True].logits_TE, 0)
    assert np.abs(gradients[False].params.gate_ED).max() > 0.1
    assert np.abs(gradients[True].params.w_up_EDF).max() > 0.1


# sequences


def test_sequences_are_split_joined_and_padded():
    record, _, _, _ = recorded()
    first, second = record.split()
    np.testing.assert_array_equal(second.expert_ids_TK, record.expert_ids_TK[4:])
    assert_same(RoutingRecord.join([first, second]), record)
    assert_same(RoutingRecord.join([record]), record)
    padded = RoutingRecord.join([first, second], pad_to=5)
    assert padded.sequence_lengths == (5, 5)
    np.testing.assert_array_equal(padded.token_mask_T, [*MASK_T[:4], False, *MASK_T[4:], False, False, False])
    np.testing.assert_array_equal(padded.expert_ids_TK[padded.token_mask_T], record.expert_ids_TK[MASK_T])
    np.testing.assert_array_equal(padded.expert_ids_TK[~padded.token_mask_T], UNUSED)
    with pytest.raises(ValueError, match="pad_to is 3; the longest sequence has 4 tokens"):
        RoutingRecord.join([record], pad_to=3)
    with pytest.raises(ValueError, match="records is empty"):
        RoutingRecord.join([])
    with pytest.raises(ValueError, match=r"records\[1\].spec differs"):
        RoutingRecord.join([record, recorded("softmax")[0]])


def empty_record():
    return RoutingRecord(
        expert_ids_TK=np.zeros((0, 3), int),
        weights_TK=np.zeros((0, 3)),
        token_mask_T=np.zeros(0, bool),
        sequence_starts_B=np.zeros(0, int),
        spec=SPEC,
    )


def test_a_record_may_have_no_token():
    empty = empty_record()
    assert empty.sequence_lengths == ()
    assert_same(RoutingRecord.join([empty]), empty)
    assert empty.split() == []
    record = RoutingRecord(spec=SPEC, **recorded()[0].to_arrays())
    assert_same(RoutingRecord.join([empty, record, empty]), record)
    assert replay(empty, np.zeros((0, 8)), SPEC).weights_TK.shape == (0, 3)


def test_ids_alone_are_a_record_that_has_no_weights_to_replay():
    record, _, logits_TE, _ = recorded()
    alone = record.ids_alone()
    assert alone.weights_TK is None
    found, expected = replay(alone, logits_TE, alone.spec), replay(record, logits_TE, record.spec)
    np.testing.assert_array_equal(found.weights_TK, expected.weights_TK)
    assert_same(RoutingRecord.join(alone.split()), alone)
    with pytest.raises(ValueError, match="with_weights is True, but weights_TK of the record is None"):
        replay(alone, logits_TE, alone.spec, with_weights=True)
    with pytest.raises(ValueError, match="weights_TK is None in 1 of 2 records"):
        RoutingRecord.join([record, alone])


# files


def test_records_are_read_back_from_a_file(tmp_path):
    records = {
        "layers.0": recorded()[0],
        "layers.1/moe": recorded("inkling")[0],
        "empty": empty_record(),
        "ids": recorded()[0].ids_alone(),
    }
    save_records(tmp_path / "records.safetensors", records)
    found = load_records(tmp_path / "records.safetensors")
    assert found.keys() == records.keys()
    for name, record in records.items():
        assert_same(found[name], record)


def test_a_file_of_something_else_is_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"format of .* is None; it is 'moe-conformance routing record 1'"):
        load_records(tmp_path / "weights.safetensors")


def test_without_the_package_of_the_format_the_error_names_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save_records(tmp_path / "records.safetensors", {"a": recorded()[0]})
    with pytest.raises(ImportError, match="pip install safetensors"):
        load_records(tmp_path / "records.safetensors")


# what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_ids_TK": np.full((T, 3), 8)}, "ids are between -1 and 7"),
        ({"expert_ids_TK": np.zeros((T, 3), int)}, "the experts of a token are distinct"),
        ({"expert_ids_TK": np.zeros((T, 2), int)}, r"expert_ids_TK has shape \(6, 2\); it is \(any, 3\)"),
        ({"weights_TK": np.full((T, 3), np.nan)}, "entries are finite"),
        ({"weights_TK": np.ones((T, 3))}, "an unused slot weighs 0"),
        ({"token_mask_T": np.arange(T) > 0}, "a padding token has no expert"),
        ({"sequence_starts_B": np.array([1, 4])}, r"begins with \[1\], not 0"),
        ({"sequence_starts_B": np.array([0, 7])}, "starts ascend and are at most 6"),
        ({"sequence_starts_B": np.array([0, 4, 2])}, "starts ascend and are at most 6"),
        ({"sequence_starts_B": np.zeros(0, int)}, "sequence_starts_B is empty; there are 6 tokens"),
    ],
)
def test_a_wrong_record_is_refused(changes, message):
    record = recorded()[0]
    with pytest.raises(ValueError, match=message):
        RoutingRecord(**record.to_arrays() | {"spec": record.spec} | changes)


def test_a_record_of_other_sizes_is_refused():
    record, _, logits_TE, _ = recorded()
    with pytest.raises(ValueError, match="top_k is 2; the record has 3"):
        replay(record, logits_TE, SPEC.replace(top_k=2))
    with pytest.raises(ValueError, match="num_choices is 9; the record has 8"):
        replay(record, logits_TE, SPEC.replace(num_experts=9))


def test_an_unused_slot_weighs_0_whatever_weight_is_given_for_it():
    _, _, logits_TE, _ = recorded()
    ids_TK = np.tile([5, UNUSED, 2], (T, 1))
    found = route(
        logits_TE,
        SPEC.given(),
        inputs=RouterInputs(given_ids_TK=ids_TK, given_weights_TK=np.full((T, 3), 0.25)),
    )
    np.testing.assert_array_equal(found.weights_TK, np.tile([0.25, 0, 0.25], (T, 1)))


def test_given_weights_need_given_ids_and_are_finite():
    record, _, logits_TE, _ = recorded()
    with pytest.raises(ValueError, match="given_weights_TK is given, but selector 'top_k' takes none"):
        route(logits_TE, SPEC, inputs=RouterInputs(given_weights_TK=record.weights_TK))
    ids_TK, nan_TK = np.tile([0, 1, 2], (T, 1)), np.full((T, 3), np.nan)
    with pytest.raises(ValueError, match="weights of used slots are finite"):
        route(logits_TE, SPEC.given(), inputs=RouterInputs(given_ids_TK=ids_TK, given_weights_TK=nan_TK))
