"""moe_ref, tests of the sharded layer: no layout changes a result, and every rank holds what the layout says."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from derivatives import ROUTERS, assert_close, router, slope_along

from moe_ref import (
    ExpertSpec,
    LayerParams,
    LayerSpec,
    ShardLayout,
    SharedSpec,
    layer_backward,
    moe_layer,
    sharded_backward,
    sharded_layer,
)
from moe_ref.experts import combine, join
from moe_ref.holdings import gather, held, take, used
from moe_ref.layout import STRATEGIES

D, F, E = 6, 4, 8
ROUNDING = 1e-13
"""Relative to the largest entry; sums have at most a few dozen terms near 1, in another order."""
EXPERTS = ExpertSpec(dim=D, hidden_dim=F, bias=True, activation="gelu")

MESHES: list[dict[str, Any]] = [
    {"expert": 2},
    {"expert": 4, "ranks_per_node": 2, "placement": (3, 0, 7, 1, 4, 2, 6, 5)},
    {"data": 2, "expert": 2, "tensor": 2, "num_token_chunks": 2},
    {"fsdp": 3, "tensor": 4, "num_emb_chunks": 3},
    {"data": 2, "fsdp": 2, "expert": 2, "tensor": 2, "ranks_per_node": 1, "num_token_chunks": 3, "num_emb_chunks": 2},
    {"expert": 8, "ranks_per_node": 4, "fsdp": 5},
]


def layer_spec(name):
    """A layer around one of the routers: with a shared expert, the one the router scores where it scores any."""
    spec = router(name)
    shared = SharedSpec(hidden_dim=5) if spec.num_scored_shared_experts else SharedSpec(hidden_dim=5, gate="sigmoid")
    return LayerSpec(router=spec, experts=EXPERTS, shared=shared, gate_bias=True)


def layout_of(strategy, mesh, rng, most=5):
    """A layout with uneven shards, one of them empty where there are several."""
    num_ranks = mesh.get("data", 1) * mesh.get("fsdp", 1) * mesh.get("expert", 1)
    num_shards = num_ranks // mesh.get("expert", 1) if strategy == "replicated" else num_ranks
    tokens = rng.integers(0, most + 1, num_shards).tolist()
    tokens[0] = most
    return ShardLayout(strategy=strategy, tokens_per_shard=tuple(tokens), **mesh)


def inputs_of(spec, layout, rng):
    """Tokens, gradients, masks and what the selector needs: by shard, and for the whole batch."""
    sizes = layout.tokens_per_shard
    by_shard: dict[str, Any] = {
        "x": [rng.standard_normal((T, D)) for T in sizes],
        "d_output": [rng.standard_normal((T, D)) for T in sizes],
        "token_mask": [rng.random(T) < 0.8 for T in sizes],
    }
    more: dict[str, Any] = {}
    if spec.router.selector == "table":
        by_shard["token_ids"] = [rng.integers(0, 2, T) for T in sizes]
        more["table_VK"] = np.array([[0, 3, 7], [5, 2, 1]])
    if spec.router.selector == "given":
        by_shard["given_ids"] = [
            np.array([rng.permutation(9)[:3] - 1 for _ in range(T)], int).reshape(T, 3) for T in sizes
        ]
    suffix = {"token_mask": "token_mask_T", "token_ids": "token_ids_T", "given_ids": "given_ids_TK"}
    whole: dict[str, Any] = {suffix[name]: np.concatenate(v) for name, v in by_shard.items() if name in suffix}
    sharded: dict[str, Any] = {f"{name}_by_shard": value for name, value in by_shard.items() if name in suffix}
    return by_shard["x"], by_shard["d_output"], whole | more, sharded | more


def assert_same_gradients(found: LayerParams, expected: LayerParams, bound):
    for field in fields(LayerParams):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert (one is None) == (other is None), field.name
        if one is not None:
            assert_close(one, other, bound)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mesh", range(len(MESHES)))
@pytest.mark.parametrize("name", ["groups", "null", "inkling", "by_logit", "given", "table", "round_robin"])
def test_no_layout_changes_outputs_or_gradients(strategy, mesh, name):
    rng = np.random.default_rng(mesh)
    spec = layer_spec(name)
    if spec.router.num_experts != E:
        spec = replace(spec, router=spec.router.replace(num_experts=E))
    layout, params = layout_of(strategy, MESHES[mesh], rng), LayerParams.init(spec, seed=mesh)
    xs, d_outputs, whole_inputs, shard_inputs = inputs_of(spec, layout, rng)
    whole = moe_layer(np.concatenate(xs), params, spec, **whole_inputs)
    trace = sharded_layer(xs, params, spec, layout, **shard_inputs)
    assert_close(np.concatenate(trace.outputs_by_shard), whole.output_TD, ROUNDING)
    assert trace.overflow == 0
    expected = layer_backward(whole, params, spec, np.concatenate(d_outputs))
    found = sharded_backward(trace, params, spec, d_outputs)
    assert_close(np.concatenate(found.x_by_shard), expected.x_TD, ROUNDING)
    assert_close(np.concatenate(found.weights_by_shard), expected.weights_TK, ROUNDING)
    assert_same_gradients(found.params, expected.params, ROUNDING)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ROUTERS)
def test_one_rank_is_the_plain_layer_to_the_last_bit(strategy, name):
    rng, spec = np.random.default_rng(3), layer_spec(name)
    layout, params = ShardLayout(tokens_per_shard=(7,), strategy=strategy), LayerParams.init(spec)
    xs, d_outputs, whole_inputs, shard_inputs = inputs_of(spec, layout, rng)
    for dtype in (np.float64, np.float32):
        whole = moe_layer(xs[0], params, spec, seed=5, dtype=dtype, **whole_inputs)
        trace = sharded_layer(xs, params, spec, layout, seed=5, dtype=dtype, **shard_inputs)
        np.testing.assert_array_equal(trace.outputs_by_shard[0], whole.output_TD, strict=True)
        expected = layer_backward(whole, params, spec, d_outputs[0])
        found = sharded_backward(trace, params, spec, d_outputs)
        np.testing.assert_array_equal(found.x_by_shard[0], expected.x_TD, strict=True)
        assert_same_gradients(found.params, expected.params, bound=0)


def test_each_shard_is_a_plain_layer_where_the_choice_is_random():
    spec = LayerSpec(router=router("random"), experts=EXPERTS)
    params, rng = LayerParams.init(spec), np.random.default_rng(0)
    xs = [rng.standard_normal((4, D)) for _ in range(2)]
    trace = sharded_layer(xs, params, spec, ShardLayout(expert=2, tokens_per_shard=(4, 4)), seed=9)
    for x_TD, seed, found_TD in zip(xs, (9, (9, 1)), trace.outputs_by_shard, strict=True):
        assert_close(found_TD, moe_layer(x_TD, params, spec, seed=seed).output_TD, ROUNDING)


def test_not_gated_experts_without_bias_or_shared_expert_are_sharded_alike():
    spec = LayerSpec(router=router("softmax"), experts=ExpertSpec(dim=D, hidden_dim=F, gated=False))
    params, rng = LayerParams.init(spec), np.random.default_rng(0)
    params = replace(params, expert_bias_E=None)
    layout = ShardLayout(expert=2, tensor=2, fsdp=2, tokens_per_shard=(3, 4, 0, 2), num_emb_chunks=2)
    xs = [rng.standard_normal((T, D)) for T in layout.tokens_per_shard]
    whole, trace = moe_layer(np.concatenate(xs), params, spec), sharded_layer(xs, params, spec, layout)
    assert_close(np.concatenate(trace.outputs_by_shard), whole.output_TD, ROUNDING)
    expected = layer_backward(whole, params, spec, np.concatenate(xs))
    assert_same_gradients(sharded_backward(trace, params, spec, xs).params, expected.params, ROUNDING)


# Drops

DROPPING = ShardLayout(expert=4, strategy="ragged_all_to_all", tokens_per_shard=(5, 0, 3, 6), buffer_factor=0.6)


@pytest.mark.parametrize("name", ["groups", "null", "by_logit", "inkling"])
def test_a_dropped_slot_adds_exactly_0_and_no_weight_is_renormalised(name):
    rng, spec = np.random.default_rng(1), layer_spec(name)
    spec = replace(spec, router=spec.router.replace(num_experts=E))
    params = LayerParams.init(spec)
    xs = [rng.standard_normal((T, D)) for T in DROPPING.tokens_per_shard]
    trace = sharded_layer(xs, params, spec, DROPPING)
    dropped = [chunk.plan.dropped_slots_N for (chunk,) in trace.ranks]
    assert trace.overflow == sum(map(len, dropped)) > 0
    for x_TD, slots_N, shard in zip(xs, dropped, trace.shards, strict=True):
        alone = moe_layer(x_TD, params, spec)
        np.testing.assert_array_equal(shard.routing.weights_TK, alone.routing.weights_TK)
        left_TKD = alone.slot_outputs_TKD.copy()
        left_TKD.reshape(-1, D)[slots_N] = 0
        assert (shard.slot_outputs_TKD.reshape(-1, D)[slots_N] == 0).all()
        routed_TD = combine(left_TKD, alone.routing.weights_TK, spec.router)
        assert_close(shard.output_TD, join(routed_TD, alone.shared_TD, spec), ROUNDING)


@pytest.mark.parametrize("mesh", [
    DROPPING, DROPPING.replace(tensor=2, num_token_chunks=2, placement=(3, 0, 7, 1, 4, 2, 6, 5)),
    DROPPING.replace(fsdp=2, tokens_per_shard=(5, 0, 3, 6, 1, 2, 0, 0), num_emb_chunks=2, buffer_factor=0.3),
])  # fmt: skip
@pytest.mark.parametrize("name", ["groups", "null", "by_logit", "per_expert_scale"])
def test_gradients_are_derivatives_where_slots_are_dropped(mesh, name):
    rng, spec = np.random.default_rng(2), layer_spec(name)
    spec = replace(spec, router=spec.router.replace(num_experts=E))
    params = LayerParams.init(spec)
    xs = [rng.standard_normal((T, D)) for T in mesh.tokens_per_shard]
    d_outputs = [rng.standard_normal(x_TD.shape) for x_TD in xs]
    trace = sharded_layer(xs, params, spec, mesh)
    assert trace.overflow > 0
    grads = sharded_backward(trace, params, spec, d_outputs)

    def loss(moved_xs, moved_params):
        outputs = sharded_layer(moved_xs, moved_params, spec, mesh).outputs_by_shard
        return sum((output_TD * d_TD).sum() for output_TD, d_TD in zip(outputs, d_outputs, strict=True))

    whole_TD, ends = np.concatenate(xs), np.cumsum(mesh.tokens_per_shard)[:-1]
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
    ids = [np.array([rng.permutation(E)[:3] for _ in range(T)], int).reshape(T, 3) for T in DROPPING.tokens_per_shard]
    found = []
    for seed in range(3):
        params, xs = LayerParams.init(spec, seed), [np.full((T, D), seed + 0.5) for T in DROPPING.tokens_per_shard]
        trace = sharded_layer(xs, params, spec, DROPPING, given_ids_by_shard=ids)
        found.append([chunk.plan.dropped_slots_N.tolist() for (chunk,) in trace.ranks])
    assert found[0] == found[1] == found[2] != [[]] * 4


# Chunks


@pytest.mark.parametrize("chunks", [{"num_token_chunks": 2}, {"num_token_chunks": 7}, {"num_emb_chunks": 3}])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_chunks_change_neither_results_nor_counts(strategy, chunks):
    rng, spec = np.random.default_rng(4), layer_spec("groups")
    layout, params = layout_of(strategy, {"expert": 4, "ranks_per_node": 2}, rng), LayerParams.init(spec)
    xs = [rng.standard_normal((T, D)) for T in layout.tokens_per_shard]
    plain, chunked = (sharded_layer(xs, params, spec, each) for each in (layout, layout.replace(**chunks)))
    assert_close(np.concatenate(chunked.outputs_by_shard), np.concatenate(plain.outputs_by_shard), ROUNDING)
    for one, other in zip(plain.shards, chunked.shards, strict=True):
        np.testing.assert_array_equal(one.routing.expert_ids_TK, other.routing.expert_ids_TK)
    for one, other in zip(plain.ranks, chunked.ranks, strict=True):
        expected_e, found_e = (np.sum([c.plan.group_sizes_e for c in of_rank], axis=0) for of_rank in (one, other))
        np.testing.assert_array_equal(found_e, expected_e)
    found, expected = (sharded_backward(trace, params, spec, xs) for trace in (chunked, plain))
    assert_same_gradients(found.params, expected.params, ROUNDING)


# What each rank holds

MESH = ShardLayout(data=2, fsdp=4, expert=2, tensor=2, tokens_per_shard=(2,) * 16, placement=(1, 0, 7, 6, 5, 4, 3, 2))
SPEC = layer_spec("groups")


def test_the_pieces_of_the_fsdp_ranks_make_up_what_each_uses():
    params = LayerParams.init(SPEC)
    for rank in range(MESH.num_ranks):
        gathered = gather(params, rank, MESH, SPEC)
        for name, part in used(rank, MESH, SPEC).items():
            if name != "b_down_ED":
                np.testing.assert_array_equal(getattr(gathered, name), take(getattr(params, name), part))
    # D is 6: pieces of 2, 2, 1, 1.
    assert [held(MESH.rank(1, f, 0, 1), MESH, SPEC)["gate_ED"][1].tolist() for f in range(4)] == [
        [0, 1],
        [2, 3],
        [4],
        [5],
    ]


def test_a_rank_has_its_experts_its_slice_of_them_and_all_of_the_rest():
    parts = used(MESH.rank(1, 2, 1, 1), MESH, SPEC)
    assert [indices.tolist() for indices in parts["w_up_EDF"]] == [[5, 4, 3, 2], [0, 1, 2, 3, 4, 5], [2, 3]]
    assert [indices.tolist() for indices in parts["w_down_EFD"]] == [[5, 4, 3, 2], [2, 3], [0, 1, 2, 3, 4, 5]]
    assert [indices.tolist() for indices in parts["b_down_ED"]] == [[5, 4, 3, 2], [0, 1, 2, 3, 4, 5]]
    assert [len(indices) for indices in parts["gate_ED"]] == [E, D]
    assert [len(indices) for indices in parts["shared_w_up_SDF"]] == [1, D, 5]


@pytest.mark.parametrize(("name", "sizes"), [("per_expert_scale", [E]), ("global_scale", [])])
def test_learned_scales_are_whole_on_every_rank(name, sizes):
    spec = LayerSpec(router=router(name), experts=EXPERTS)
    for rank in range(MESH.num_ranks):
        assert [len(indices) for indices in held(rank, MESH, spec)["learned_scale"]] == sizes


def test_the_down_bias_is_on_the_first_tensor_rank_alone():
    params = LayerParams.init(SPEC)
    assert [gather(params, MESH.rank(0, 0, 0, t), MESH, SPEC).b_down_ED is None for t in range(2)] == [False, True]


def test_partial_outputs_of_tensor_ranks_sum_to_what_the_experts_return():
    rng, params = np.random.default_rng(6), LayerParams.init(SPEC)
    xs = [rng.standard_normal((2, D)) for _ in range(16)]
    whole = sharded_layer(xs, params, SPEC, MESH.replace(tensor=1))
    split = sharded_layer(xs, params, SPEC, MESH)
    for rank, (chunk,) in enumerate(split.ranks):
        first, second = (split.ranks[rank - rank % 2 + t][0].experts.output_RD for t in range(2))
        assert_close(chunk.output_RD, first + second, ROUNDING)
        assert_close(chunk.output_RD, whole.ranks[rank // 2][0].output_RD, ROUNDING)
        assert chunk.experts.hidden_RF.shape[1] == F // 2
        assert (first != second).any() or not len(first)


def test_every_rank_returns_the_output_of_its_shard():
    rng, params = np.random.default_rng(6), LayerParams.init(SPEC)
    layout = MESH.replace(strategy="replicated", tokens_per_shard=tuple(range(8)))
    xs = [rng.standard_normal((T, D)) for T in layout.tokens_per_shard]
    trace = sharded_layer(xs, params, SPEC, layout)
    assert [len(output_TD) for output_TD in trace.outputs_by_rank] == [rank // 4 for rank in range(32)]


@pytest.mark.parametrize(("strategy", "num_partials"), [
    ("all_to_all", 1), ("ragged_all_to_all", 1), ("ring_of_experts", 4), ("replicated", 4), ("node_dedup", 2),
])  # fmt: skip
def test_partial_sums_add_up_to_the_routed_output(strategy, num_partials):
    rng, spec = np.random.default_rng(8), layer_spec("null")
    spec = replace(spec, router=spec.router.replace(num_experts=E))
    layout = layout_of(strategy, {"expert": 4, "ranks_per_node": 2}, rng)
    xs = [rng.standard_normal((T, D)) for T in layout.tokens_per_shard]
    for shard in sharded_layer(xs, LayerParams.init(spec), spec, layout).shards:
        assert len(shard.partial_PTD) == num_partials
        assert_close(shard.partial_PTD.sum(axis=0), shard.routed_TD, ROUNDING)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_partial_gradients_sum_to_the_gradient_and_each_rank_keeps_its_piece(strategy):
    rng, params = np.random.default_rng(7), LayerParams.init(SPEC)
    layout = MESH.replace(strategy=strategy, tokens_per_shard=(3,) * (8 if strategy == "replicated" else 16))
    xs = [rng.standard_normal((3, D)) for _ in layout.tokens_per_shard]
    grads = sharded_backward(sharded_layer(xs, params, SPEC, layout), params, SPEC, xs)
    for name in used(0, layout, SPEC):
        total = np.zeros_like(getattr(params, name))
        for rank, partial in enumerate(grads.partial_by_rank):
            part = used(rank, layout, SPEC)[name]
            assert partial[name].shape == tuple(map(len, part))
            total[np.ix_(*part)] += partial[name]
        assert_close(total, getattr(grads.params, name), ROUNDING)
    for rank, pieces in enumerate(grads.held_by_rank):
        for name, part in held(rank, layout, SPEC).items():
            np.testing.assert_array_equal(pieces[name], take(getattr(grads.params, name), part))


def test_an_expert_without_rows_gets_gradient_0_on_its_rank():
    spec = layer_spec("given")
    params, layout = LayerParams.init(spec), ShardLayout(expert=4, tokens_per_shard=(2, 0, 0, 1))
    ids = [np.array([[0, 1, 2]] * 2), np.zeros((0, 3), int), np.zeros((0, 3), int), np.array([[0, 7, -1]])]
    xs = [np.ones((T, D)) for T in layout.tokens_per_shard]
    trace = sharded_layer(xs, params, spec, layout, given_ids_by_shard=ids)
    grads = sharded_backward(trace, params, spec, xs)
    used_E = [bool(np.any(grads.params.w_up_EDF[e])) for e in range(E)]
    assert used_E == [True, True, True, False, False, False, False, True]
    assert not grads.partial_by_rank[2]["w_up_EDF"].any()


def test_padding_is_not_read_on_any_rank():
    rng, params = np.random.default_rng(9), LayerParams.init(SPEC)
    layout = ShardLayout(expert=2, tensor=2, tokens_per_shard=(4, 3), strategy="ring_of_experts")
    masks = [np.array([True, False, True, True]), np.array([False, True, False])]
    xs = [rng.standard_normal((T, D)) for T in (4, 3)]
    d_outputs = [rng.standard_normal((T, D)) for T in (4, 3)]
    clean = sharded_layer(xs, params, SPEC, layout, token_mask_by_shard=masks)
    clean_grads = sharded_backward(clean, params, SPEC, d_outputs)
    for values in (*xs, *d_outputs):
        values[~masks[0 if len(values) == 4 else 1]] = np.nan
    poisoned = sharded_layer(xs, params, SPEC, layout, token_mask_by_shard=masks)
    grads = sharded_backward(poisoned, params, SPEC, d_outputs)
    for shard in range(2):
        np.testing.assert_array_equal(poisoned.outputs_by_shard[shard], clean.outputs_by_shard[shard])
        np.testing.assert_array_equal(grads.x_by_shard[shard], clean_grads.x_by_shard[shard])
        assert (grads.x_by_shard[shard][~masks[shard]] == 0).all()
    assert_same_gradients(grads.params, clean_grads.params, bound=0)


# Errors


@pytest.mark.parametrize(("changes", "message"), [
    ({"x_by_shard": [np.zeros((2, D))]}, "x_by_shard has 1 entries; the layout has 2 token shards"),
    ({"x_by_shard": [np.zeros((2, D)), np.zeros((2, D))]}, r"x_by_shard\[1\] has shape \(2, 6\); it is \(1, 6\)"),
    ({"token_mask_by_shard": [None]}, "token_mask_by_shard has 1 entries; the layout has 2 token shards"),
    ({"given_ids_by_shard": [None] * 3}, "given_ids_by_shard has 3 entries; the layout has 2 token shards"),
    ({"token_ids_by_shard": [None] * 3}, "token_ids_by_shard has 3 entries; the layout has 2 token shards"),
    ({"token_mask_by_shard": [np.ones(2, bool), np.ones(1)]}, "token_mask_T has dtype float64; it is bool"),
    ({"layout": ShardLayout(tokens_per_shard=(2, 1), expert=2, tensor=3)}, "tensor is 3, which does not divide"),
    ({"params": replace(LayerParams.init(SPEC), b_down_ED=None)}, "b_down_ED is None; the spec needs an array"),
])  # fmt: skip
def test_an_input_that_does_not_fit_is_an_error(changes, message):
    given: dict[str, Any] = {
        "x_by_shard": [np.zeros((2, D)), np.zeros((1, D))],
        "params": LayerParams.init(SPEC),
        "spec": SPEC,
        "layout": ShardLayout(tokens_per_shard=(2, 1), expert=2),
    }
    with pytest.raises(ValueError, match=message):
        sharded_layer(**given | changes)


def test_gradients_of_outputs_that_do_not_fit_are_an_error():
    params, layout = LayerParams.init(SPEC), ShardLayout(tokens_per_shard=(2, 1), expert=2)
    trace = sharded_layer([np.zeros((2, D)), np.zeros((1, D))], params, SPEC, layout)
    with pytest.raises(ValueError, match="d_output_by_shard has 1 entries; the layout has 2 token shards"):
        sharded_backward(trace, params, SPEC, [np.zeros((2, D))])
    with pytest.raises(ValueError, match=r"d_output_by_shard\[1\] has shape \(2, 6\); it is \(1, 6\)"):
        sharded_backward(trace, params, SPEC, [np.zeros((2, D)), np.zeros((2, D))])
