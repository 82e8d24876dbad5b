"""moe_ref, tests of the sharded layer: every rank holds, adds and keeps what the layout says."""

from dataclasses import replace

import numpy as np
import pytest
from derivatives import assert_close, router
from shardings import EXPERTS, ROUNDING, D, E, F, assert_same_gradients, layer_spec, uneven

from moe_ref import (
    LayerParams,
    LayerSpec,
    RouterInputs,
    RouterSpec,
    ShardLayout,
    sharded_backward,
    sharded_layer,
)
from moe_ref.holdings import gather, held, take, used
from moe_ref.strategies import STRATEGIES

MESH = ShardLayout(data=2, fsdp=4, expert=2, tensor=2, placement=(1, 0, 7, 6, 5, 4, 3, 2))
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
    layout = MESH.replace(strategy="replicated")
    xs = [rng.standard_normal((T, D)) for T in range(8)]
    trace = sharded_layer(xs, params, SPEC, layout)
    assert [len(output_TD) for output_TD in trace.outputs_by_rank] == [rank // 4 for rank in range(32)]


NUM_PARTIALS = {"all_to_all": 1, "ragged_all_to_all": 1, "ring_of_experts": 4, "replicated": 4, "node_dedup": 2,
                "replicated_ragged": 1}  # fmt: skip
"""Partial sums of a token, of every strategy, on four ranks of two nodes."""


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_partial_sums_add_up_to_the_routed_output(strategy):
    rng, spec = np.random.default_rng(8), layer_spec("null")
    spec = replace(spec, router=spec.router.replace(num_experts=E))
    layout = ShardLayout(strategy=strategy, expert=4, ranks_per_node=2)
    xs = [rng.standard_normal((T, D)) for T in uneven(layout, rng)]
    for shard in sharded_layer(xs, LayerParams.init(spec), spec, layout).shards:
        assert len(shard.partial_PTD) == NUM_PARTIALS[strategy]
        assert_close(shard.partial_PTD.sum(axis=0), shard.routed_TD, ROUNDING)


@pytest.mark.parametrize(("strategy", "partials_of_slots"), [
    ("all_to_all", [[0, 0, 0], [0, 0, 0]]), ("ring_of_experts", [[0, 3, 1], [1, 2, 3]]),
    ("replicated", [[0, 3, 0], [1, 2, 0]]), ("node_dedup", [[0, 1, 0], [0, 1, 1]]),
    ("replicated_ragged", [[0, 0, 0], [0, 0, 0]]),
])  # fmt: skip
def test_a_slot_is_part_of_the_sum_of_its_expert_rank_or_node(strategy, partials_of_slots):
    """Two tokens, on ranks 1 and 3 of four; experts 1 and 7, 2 and 5; the last slot is an identity expert."""
    router = RouterSpec(num_experts=E, top_k=3, num_null_experts=1, selector="given")
    spec = LayerSpec(router=router, experts=EXPERTS)
    ids = [[[1, 7, 8]], [[2, 5, 8]]]
    layout = ShardLayout(expert=4, ranks_per_node=2, strategy=strategy)
    tokens = (2,) if layout.facts.shares_tokens else (0, 1, 0, 1)
    at = np.cumsum(tokens)[:-1]
    xs = np.split(np.random.default_rng(3).standard_normal((2, D)), at)
    inputs = RouterInputs(given_ids_TK=np.concatenate(ids))
    shards = sharded_layer(xs, LayerParams.init(spec), spec, layout, inputs=inputs).shards
    outputs_TKD = np.concatenate([shard.slot_outputs_TKD for shard in shards])
    weights_TK = np.concatenate([shard.routing.weights_TK for shard in shards])
    partial_PTD = np.concatenate([shard.partial_PTD for shard in shards], axis=1)
    for token, partials in enumerate(partials_of_slots):
        for partial, found_D in enumerate(partial_PTD[:, token]):
            own_K = np.array(partials) == partial
            assert_close(found_D, (own_K * weights_TK[token]) @ outputs_TKD[token], ROUNDING)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_partial_gradients_sum_to_the_gradient_and_each_rank_keeps_its_piece(strategy):
    rng, params = np.random.default_rng(7), LayerParams.init(SPEC)
    layout = MESH.replace(strategy=strategy)
    xs = [rng.standard_normal((3, D)) for _ in range(layout.num_token_shards)]
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
    params, layout = LayerParams.init(spec), ShardLayout(expert=4)
    ids = [np.array([[0, 1, 2]] * 2), np.zeros((0, 3), int), np.zeros((0, 3), int), np.array([[0, 7, -1]])]
    xs = [np.ones((T, D)) for T in (2, 0, 0, 1)]
    trace = sharded_layer(xs, params, spec, layout, inputs=RouterInputs(given_ids_TK=np.concatenate(ids)))
    grads = sharded_backward(trace, params, spec, xs)
    used_E = [bool(np.any(grads.params.w_up_EDF[e])) for e in range(E)]
    assert used_E == [True, True, True, False, False, False, False, True]
    assert not grads.partial_by_rank[2]["w_up_EDF"].any()


def test_padding_is_not_read_on_any_rank():
    rng, params = np.random.default_rng(9), LayerParams.init(SPEC)
    layout = ShardLayout(expert=2, tensor=2, strategy="ring_of_experts")
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
