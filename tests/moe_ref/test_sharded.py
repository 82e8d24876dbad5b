"""moe_ref, tests of the sharded layer: no layout changes a result; drops, chunks, padding and errors."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from derivatives import ROUTERS, assert_close, router, slope_along
from shardings import EXPERTS, MESHES, ROUNDING, D, E, F, assert_same_gradients, inputs_of, layer_spec, uneven

from moe_ref import (
    ExpertSpec,
    LayerParams,
    LayerSpec,
    RouterInputs,
    ShardLayout,
    layer_backward,
    moe_layer,
    sharded_backward,
    sharded_layer,
)
from moe_ref.experts import combine, join
from moe_ref.strategies import STRATEGIES

SPEC, GIVEN = layer_spec("groups"), layer_spec("given")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mesh", range(len(MESHES)))
@pytest.mark.parametrize("name", ["groups", "null", "inkling", "by_logit", "given", "table", "round_robin", "latent"])
def test_no_layout_changes_outputs_or_gradients(strategy, mesh, name):
    rng = np.random.default_rng(mesh)
    spec = layer_spec(name)
    if spec.router.num_experts != E:
        spec = replace(spec, router=spec.router.replace(num_experts=E))
    layout, params = ShardLayout(strategy=strategy, **MESHES[mesh]), LayerParams.init(spec, seed=mesh)
    xs, d_outputs, whole_inputs, shard_inputs = inputs_of(spec, uneven(layout, rng), rng)
    whole = moe_layer(np.concatenate(xs), params, spec, **whole_inputs)
    trace = sharded_layer(xs, params, spec, layout, **shard_inputs)
    assert_close(np.concatenate(trace.outputs_by_shard), whole.output_TD, ROUNDING)
    assert trace.overflow == 0
    np.testing.assert_array_equal(trace.tokens_per_expert_E, whole.permutation.tokens_per_expert_E)
    expected = layer_backward(whole, params, spec, np.concatenate(d_outputs))
    found = sharded_backward(trace, params, spec, d_outputs)
    assert_close(np.concatenate(found.x_by_shard), expected.x_TD, ROUNDING)
    assert_close(np.concatenate(found.weights_by_shard), expected.weights_TK, ROUNDING)
    assert_same_gradients(found.params, expected.params, ROUNDING)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", [*ROUTERS, "latent"])
def test_one_rank_is_the_plain_layer_to_the_last_bit(strategy, name):
    rng, spec = np.random.default_rng(3), layer_spec(name)
    layout, params = ShardLayout(strategy=strategy), LayerParams.init(spec)
    xs, d_outputs, whole_inputs, shard_inputs = inputs_of(spec, [7], rng)
    for dtype in (np.float64, np.float32):
        whole = moe_layer(xs[0], params, spec, dtype=dtype, **whole_inputs)
        trace = sharded_layer(xs, params, spec, layout, dtype=dtype, **shard_inputs)
        np.testing.assert_array_equal(trace.outputs_by_shard[0], whole.output_TD, strict=True)
        expected = layer_backward(whole, params, spec, d_outputs[0])
        found = sharded_backward(trace, params, spec, d_outputs)
        np.testing.assert_array_equal(found.x_by_shard[0], expected.x_TD, strict=True)
        assert_same_gradients(found.params, expected.params, bound=0)


def test_each_shard_is_a_plain_layer_where_the_choice_is_random():
    spec = LayerSpec(router=router("random"), experts=EXPERTS)
    params, rng = LayerParams.init(spec), np.random.default_rng(0)
    xs = [rng.standard_normal((4, D)) for _ in range(2)]
    trace = sharded_layer(xs, params, spec, ShardLayout(expert=2), inputs=RouterInputs(seed=9))
    for x_TD, seed, found_TD in zip(xs, (9, (9, 1)), trace.outputs_by_shard, strict=True):
        assert_close(found_TD, moe_layer(x_TD, params, spec, inputs=RouterInputs(seed=seed)).output_TD, ROUNDING)


def test_not_gated_experts_without_bias_or_shared_expert_are_sharded_alike():
    spec = LayerSpec(router=router("softmax"), experts=ExpertSpec(dim=D, hidden_dim=F, gated=False))
    params, rng = LayerParams.init(spec), np.random.default_rng(0)
    params = replace(params, expert_bias_E=None)
    layout = ShardLayout(expert=2, tensor=2, fsdp=2, num_emb_chunks=2)
    xs = [rng.standard_normal((T, D)) for T in (3, 4, 0, 2)]
    whole, trace = moe_layer(np.concatenate(xs), params, spec), sharded_layer(xs, params, spec, layout)
    assert_close(np.concatenate(trace.outputs_by_shard), whole.output_TD, ROUNDING)
    expected = layer_backward(whole, params, spec, np.concatenate(xs))
    assert_same_gradients(sharded_backward(trace, params, spec, xs).params, expected.params, ROUNDING)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_layout_without_any_token_returns_none_and_gradients_of_0(strategy):
    spec = layer_spec("groups")
    layout = ShardLayout(expert=4, tensor=2, strategy=strategy, num_token_chunks=2)
    params, nothing = LayerParams.init(spec), [np.zeros((0, D))] * layout.num_token_shards
    trace = sharded_layer(nothing, params, spec, layout)
    assert {output_TD.shape for output_TD in trace.outputs_by_rank} == {(0, D)}
    grads = sharded_backward(trace, params, spec, nothing).params
    assert not any(np.any(getattr(grads, field.name)) for field in fields(grads))


# Drops

DROPPING = ShardLayout(expert=4, strategy="ragged_all_to_all", buffer_factor=0.6)
TOKENS = (5, 0, 3, 6)
"""Of its shards."""


@pytest.mark.parametrize("name", ["groups", "null", "by_logit", "inkling"])
def test_a_dropped_slot_adds_exactly_0_and_no_weight_is_renormalised(name):
    rng, spec = np.random.default_rng(1), layer_spec(name)
    spec = replace(spec, router=spec.router.replace(num_experts=E))
    params = LayerParams.init(spec)
    xs = [rng.standard_normal((T, D)) for T in TOKENS]
    trace = sharded_layer(xs, params, spec, DROPPING)
    dropped = [chunk.plan.dropped_slots_N for (chunk,) in trace.ranks]
    assert trace.overflow == sum(map(len, dropped)) > 0
    whole = moe_layer(np.concatenate(xs), params, spec)
    np.testing.assert_array_equal(trace.tokens_per_expert_E, whole.permutation.tokens_per_expert_E)
    for x_TD, slots_N, shard in zip(xs, dropped, trace.shards, strict=True):
        alone = moe_layer(x_TD, params, spec)
        np.testing.assert_array_equal(shard.routing.weights_TK, alone.routing.weights_TK)
        left_TKD = alone.slot_outputs_TKD.copy()
        left_TKD.reshape(-1, D)[slots_N] = 0
        assert (shard.slot_outputs_TKD.reshape(-1, D)[slots_N] == 0).all()
        routed_TD = combine(left_TKD, alone.routing.weights_TK, spec.router)
        assert_close(shard.output_TD, join(routed_TD, alone.shared_TD, spec), ROUNDING)


@pytest.mark.parametrize(("mesh", "tokens"), [
    (DROPPING, TOKENS),
    (DROPPING.replace(tensor=2, num_token_chunks=2, placement=(3, 0, 7, 1, 4, 2, 6, 5)), TOKENS),
    (DROPPING.replace(fsdp=2, num_emb_chunks=2, buffer_factor=0.3), (*TOKENS, 1, 2, 0, 0)),
])  # fmt: skip
@pytest.mark.parametrize("name", ["groups", "null", "by_logit", "per_expert_scale"])
def test_gradients_are_derivatives_where_slots_are_dropped(mesh, tokens, name):
    rng, spec = np.random.default_rng(2), layer_spec(name)
    spec = replace(spec, router=spec.router.replace(num_experts=E))
    params = LayerParams.init(spec)
    xs = [rng.standard_normal((T, D)) for T in tokens]
    d_outputs = [rng.standard_normal(x_TD.shape) for x_TD in xs]
    trace = sharded_layer(xs, params, spec, mesh)
    assert trace.overflow > 0
    grads = sharded_backward(trace, params, spec, d_outputs)

    def loss(moved_xs, moved_params):
        outputs = sharded_layer(moved_xs, moved_params, spec, mesh).outputs_by_shard
        return sum((output_TD * d_TD).sum() for output_TD, d_TD in zip(outputs, d_outputs, strict=True))

    whole_TD, ends = np.concatenate(xs), np.cumsum(tokens)[:-1]
    direction_TD = rng.standard_normal(whole_TD.shape)
    slope = slope_along(lambda x_TD: loss(np.split(x_TD, ends), params), whole_TD, direction_TD)
    assert_close(np.sum(np.concatenate(grads.x_by_shard) * direction_TD), np.array(slope))
    for field in fields(LayerParams):
        value = getattr(params, field.name)
        # The choice is constant, so expert_bias_E has gradient 0.
        if value is not None and field.name != "expert_bias_E":
            direction = rng.standard_normal(value.shape)
            slope = slope_along(lambda v, name=field.name: loss(xs, replace(params, **{name: v})), value, direction)
            assert_close(np.sum(getattr(grads.params, field.name) * direction), np.array(slope))


def test_what_is_dropped_is_decided_by_the_ids_alone():
    spec = layer_spec("given")
    rng = np.random.default_rng(5)
    ids = [np.array([rng.permutation(E)[:3] for _ in range(T)], int).reshape(T, 3) for T in TOKENS]
    found = []
    for seed in range(3):
        params, xs = LayerParams.init(spec, seed), [np.full((T, D), seed + 0.5) for T in TOKENS]
        trace = sharded_layer(xs, params, spec, DROPPING, inputs=RouterInputs(given_ids_TK=np.concatenate(ids)))
        found.append([chunk.plan.dropped_slots_N.tolist() for (chunk,) in trace.ranks])
    assert found[0] == found[1] == found[2] != [[]] * 4


# Chunks


@pytest.mark.parametrize("chunks", [{"num_token_chunks": 2}, {"num_token_chunks": 7}, {"num_emb_chunks": 3}])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_chunks_change_neither_results_nor_counts(strategy, chunks):
    rng, spec = np.random.default_rng(4), layer_spec("groups")
    layout, params = ShardLayout(strategy=strategy, expert=4, ranks_per_node=2), LayerParams.init(spec)
    xs = [rng.standard_normal((T, D)) for T in uneven(layout, rng)]
    plain, chunked = (sharded_layer(xs, params, spec, each) for each in (layout, layout.replace(**chunks)))
    assert_close(np.concatenate(chunked.outputs_by_shard), np.concatenate(plain.outputs_by_shard), ROUNDING)
    for one, other in zip(plain.shards, chunked.shards, strict=True):
        np.testing.assert_array_equal(one.routing.expert_ids_TK, other.routing.expert_ids_TK)
    np.testing.assert_array_equal(plain.tokens_per_expert_E, chunked.tokens_per_expert_E)
    for one, other in zip(plain.ranks, chunked.ranks, strict=True):
        expected_e, found_e = (np.sum([c.plan.group_sizes_e for c in of_rank], axis=0) for of_rank in (one, other))
        np.testing.assert_array_equal(found_e, expected_e)
    found, expected = (sharded_backward(trace, params, spec, xs) for trace in (chunked, plain))
    assert_same_gradients(found.params, expected.params, ROUNDING)


# Errors


@pytest.mark.parametrize(("changes", "message"), [
    ({"x_by_shard": [np.zeros((2, D))]}, "x_by_shard has 1 entries; the layout has 2 token shards"),
    ({"x_by_shard": [np.zeros((2, D)), np.zeros((2, 7))]}, r"x_by_shard\[1\] has shape \(2, 7\); it is \(any, 6\)"),
    ({"token_mask_by_shard": [None]}, "token_mask_by_shard has 1 entries; the layout has 2 token shards"),
    ({"inputs": RouterInputs(given_ids_TK=np.zeros((3, 3), int))}, "given_ids_TK is given, but selector 'top_k'"),
    ({"inputs": RouterInputs(given_ids_TK=np.zeros((4, 3), int)), "spec": GIVEN, "params": LayerParams.init(GIVEN)},
     r"given_ids_TK has shape \(4, 3\); it is \(3, 3\)"),
    ({"token_mask_by_shard": [np.ones(2, bool), np.ones(1)]}, "token_mask_T has dtype float64; it is bool"),
    ({"layout": ShardLayout(expert=2, tensor=3)}, "tensor is 3, which does not divide"),
    ({"params": replace(LayerParams.init(SPEC), b_down_ED=None)}, "b_down_ED is None; the spec needs an array"),
])  # fmt: skip
def test_an_input_that_does_not_fit_is_an_error(changes, message):
    given: dict[str, Any] = {
        "x_by_shard": [np.zeros((2, D)), np.zeros((1, D))],
        "params": LayerParams.init(SPEC),
        "spec": SPEC,
        "layout": ShardLayout(expert=2),
    }
    with pytest.raises(ValueError, match=message):
        sharded_layer(**given | changes)


def test_gradients_of_outputs_that_do_not_fit_are_an_error():
    params, layout = LayerParams.init(SPEC), ShardLayout(expert=2)
    trace = sharded_layer([np.zeros((2, D)), np.zeros((1, D))], params, SPEC, layout)
    with pytest.raises(ValueError, match="d_output_by_shard has 1 entries; the layout has 2 token shards"):
        sharded_backward(trace, params, SPEC, [np.zeros((2, D))])
    with pytest.raises(ValueError, match=r"d_output_by_shard\[1\] has shape \(2, 6\); it is \(1, 6\)"):
        sharded_backward(trace, params, SPEC, [np.zeros((2, D)), np.zeros((2, D))])
