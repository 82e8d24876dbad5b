"""moe_jax, tests of the sharded layer: output and every gradient on every device, against moe_ref on one rank."""

from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.parallel import (
    make_mesh,
    param_specs,
    place,
    shard,
    sharded_sparse_matmul,
    token_axes,
    unplace,
    use_cpu_devices,
)
from moe_jax.sparse_matmul import sparse_matmul
from moe_ref.backward.layer import layer_backward
from moe_ref.backward.sharded import sharded_backward
from moe_ref.layer import moe_layer
from moe_ref.sharded import sharded_layer
from moe_ref.specs.align import AlignSpec
from moe_ref.specs.inputs import NO_INPUTS, RouterInputs
from moe_ref.specs.layer import ExpertSpec, LatentSpec, LayerSpec, SharedSpec
from moe_ref.specs.layout import ShardLayout
from moe_ref.specs.params import LayerParams
from moe_ref.specs.router import RouterSpec

D, F = 16, 6
# Sums of some tens of float64 products, in another order than the reference's.
SAME: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}
POISONS = (np.nan, 1e30)

DEEPSEEK = LayerSpec(
    router=RouterSpec(
        num_experts=8, top_k=3, score_func="sigmoid", num_expert_groups=4, num_limited_groups=2,
        route_norm=True, norm_eps=1e-20, route_scale=2.5,
    ),
    experts=ExpertSpec(dim=D, hidden_dim=F, bias=True),
    shared=SharedSpec(hidden_dim=4, gate="sigmoid", combine="average"),
    latent=LatentSpec(dim=8, norm_eps=0.1),
)  # fmt: skip
LLAMA = LayerSpec(
    router=RouterSpec(
        num_experts=4,
        top_k=3,
        score_func="sigmoid",
        weight_on="input",
        num_null_experts=2,
        num_constant_experts=1,
        output_scale=3.0,
    ),
    experts=ExpertSpec(dim=D, hidden_dim=F, activation="gelu", bias=True),
)
PLAIN = LayerSpec(router=RouterSpec(num_experts=4, top_k=2), experts=ExpertSpec(dim=D, hidden_dim=F))
INKLING = LayerSpec(
    router=RouterSpec(
        num_experts=4, top_k=2, score_func="sigmoid", route_norm=True, norm_with_shared=True,
        num_scored_shared_experts=2, learned_scale="global", route_scale=8.0,
    ),
    experts=ExpertSpec(dim=D, hidden_dim=F, clamp=0.2, clamp_at="after"),
    shared=SharedSpec(hidden_dim=3, clamp=0.1),
    latent=LatentSpec(dim=6),
)  # fmt: skip
EVERY = LayerSpec(
    router=RouterSpec(num_experts=4, top_k=4, score_func="sigmoid"), experts=ExpertSpec(dim=8, hidden_dim=F, bias=True)
)
GIVEN = LayerSpec(
    router=RouterSpec(num_experts=8, top_k=2, score_func="sigmoid", selector="given"),
    experts=ExpertSpec(dim=D, hidden_dim=F),
)


PLACEMENT = (3, 1, 2, 0, 7, 6, 4, 5)
RAGGED = ShardLayout(data=2, expert=4, strategy="ragged_all_to_all")
RING = ShardLayout(fsdp=2, expert=4, strategy="ring_of_experts", num_emb_chunks=2)
CASES = {
    "all_to_all, tensor parallel": (DEEPSEEK, ShardLayout(expert=4, tensor=2, placement=PLACEMENT), 5),
    "ragged_all_to_all, data parallel": (LLAMA, RAGGED, 5),
    "ring_of_experts, fsdp, chunks of the model dim": (DEEPSEEK, RING, 4),
    "replicated, fsdp, tensor parallel, uneven chunks of tokens": (
        LLAMA,
        ShardLayout(fsdp=2, expert=2, tensor=2, strategy="replicated", num_token_chunks=2),
        5,
    ),
    "replicated, and rows come back by a ragged all_to_all, tensor parallel": (
        DEEPSEEK,
        ShardLayout(expert=4, tensor=2, strategy="replicated_ragged", placement=PLACEMENT, num_token_chunks=2),
        5,
    ),
    # K = E: each rank has as many rows as it ever can, and no tail.
    "ring_of_experts, every expert of every token": (EVERY, ShardLayout(expert=2, strategy="ring_of_experts"), 3),
    "fsdp alone": (INKLING, ShardLayout(fsdp=8), 3),
    "fsdp that does not divide D, tensor that does not divide shared F": (INKLING, ShardLayout(fsdp=3, tensor=2), 7),
}


def case(spec, layout, tokens, seed=0, crowded=None):
    """So many tokens on each shard, parameters, output gradients and a mask; what belongs to padding is NaN."""
    rng = np.random.default_rng(seed)
    x_TD, d_output_TD = rng.standard_normal((2, layout.num_token_shards * tokens, spec.experts.dim))
    mask_T = rng.random(len(x_TD)) > 0.2
    x_TD[~mask_T], d_output_TD[~mask_T] = np.nan, np.nan
    params = LayerParams.init(spec, seed)
    if crowded is not None:
        assert params.expert_bias_E is not None
        params.expert_bias_E[crowded] += 100
    return x_TD, params, d_output_TD, mask_T


@lru_cache
def compiled(spec, layout, **options):
    """What the layer returns, and its gradients, where they lie by the specs of the layer."""
    mesh, tokens = make_mesh(layout), PartitionSpec(token_axes(layout))
    specs: Any = param_specs(LayerParams.init(spec), spec, layout)

    def run(x_TD, params, d_output_TD, mask_T, buffer_fill, inputs):
        def forward(x_TD, params):
            found = sharded_sparse_matmul(
                x_TD,
                params,
                spec,
                layout,
                mesh,
                token_mask_T=mask_T,
                inputs=inputs,
                buffer_fill=buffer_fill,
                **options,
            )
            return found.output_TD, found

        _, pull, found = jax.vjp(forward, x_TD, params, has_aux=True)
        return found, *pull(d_output_TD)

    # What each device computed stays where it is: nothing is copied over a device that has it wrong.
    by_token, by_param = NamedSharding(mesh, tokens), jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.jit(run, out_shardings=(None, by_token, by_param))


def ran(spec, layout, x_TD, params, d_output_TD, mask_T, fill=0.0, inputs=NO_INPUTS, **options):
    run = compiled(spec, layout, **options)
    with jax.enable_x64(True):
        return run(x_TD, place(params, layout), d_output_TD, mask_T, np.float64(fill), inputs)


def on_every_device(array, expected, num_devices, **close):
    """Each device's own shard is its part of what is expected."""
    assert len(array.addressable_shards) == num_devices
    for piece in array.addressable_shards:
        np.testing.assert_allclose(piece.data, expected[piece.index], err_msg=str(piece.device), **close)


def check(found, expected_output_TD, trace, expected_x_TD, expected_params, layout):
    """Everything that the layer and its gradients return, on every device."""
    output, d_x_TD, d_params = found
    on_every_device(output.output_TD, expected_output_TD, layout.num_ranks, **SAME)
    on_every_device(d_x_TD, expected_x_TD, layout.num_ranks, **SAME)
    on_every_device(output.tokens_per_expert_E, trace.permutation.tokens_per_expert_E, layout.num_ranks)
    np.testing.assert_array_equal(output.decided.expert_ids_TK, trace.routing.expert_ids_TK)
    np.testing.assert_allclose(output.decided.weights_TK, trace.routing.weights_TK, **SAME)
    for field in fields(LayerParams):
        gradient, wanted = getattr(d_params, field.name), getattr(place(expected_params, layout), field.name)
        if wanted is not None:
            on_every_device(gradient, wanted, layout.num_ranks, **SAME)


def check_whole(spec, layout, x_TD, params, d_output_TD, mask_T, fill=0.0, **options):
    """Against the layer on one rank."""
    found = ran(spec, layout, x_TD, params, d_output_TD, mask_T, fill, **options)
    trace = moe_layer(x_TD, params, spec, token_mask_T=mask_T)
    expected = layer_backward(trace, params, spec, d_output_TD)
    check(found, trace.output_TD, trace, expected.x_TD, expected.params, layout)
    np.testing.assert_array_equal(found[0].overflow_S, 0)


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_one_rank_on_every_device(name):
    spec, layout, tokens = CASES[name]
    check_whole(spec, layout, *case(spec, layout, tokens))


ALIGNED = AlignSpec(multiple=8, idle_blocks=1)


@pytest.mark.parametrize("name", [
    "ragged_all_to_all, data parallel", "ring_of_experts, every expert of every token",
    "replicated, and rows come back by a ragged all_to_all, tensor parallel",
])  # fmt: skip
def test_aligned_rows_of_each_rank_change_neither_output_nor_gradient(name):
    spec, layout, tokens = CASES[name]
    align = AlignSpec(multiple=1) if spec is EVERY else ALIGNED  # a rank that is full has no row to spare then
    check_whole(spec, layout, *case(spec, layout, tokens, seed=3, crowded=[0]), np.nan, align=align)


@pytest.mark.parametrize("fill", POISONS)
@pytest.mark.parametrize("name", [name for name in CASES if "all_to_all" in name])
def test_what_buffer_rows_held_that_nobody_sent_reaches_nothing(name, fill):
    spec, layout, tokens = CASES[name]
    check_whole(spec, layout, *case(spec, layout, tokens, seed=1), fill)


@lru_cache
def moved_gradients(strategy: str | None):
    """The gradients of a layer, and how they move with its tokens and parameters; None: on one device."""
    layout = ShardLayout(expert=2, strategy=strategy or "all_to_all")
    mesh, (x_TD, v_TD) = make_mesh(layout), np.random.default_rng(0).normal(size=(2, 6, D))

    def loss(x_TD, params):
        if strategy is None:
            return (sparse_matmul(x_TD, params, PLAIN)[0] ** 2).sum()
        return (sharded_sparse_matmul(x_TD, params, PLAIN, layout, mesh).output_TD ** 2).sum()

    def run(x_TD, v_TD, params):
        return jax.jvp(jax.grad(loss, argnums=(0, 1)), (x_TD, params), (v_TD, params))

    with jax.enable_x64(True):
        return jax.jit(run)(x_TD, v_TD, LayerParams.init(PLAIN))


@pytest.mark.parametrize("strategy", ["ragged_all_to_all", "replicated_ragged"])
def test_forward_derivatives_of_gradients_are_those_of_one_device(strategy):
    """The other strategies have collectives of JAX alone."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11),
        moved_gradients(strategy),
        moved_gradients(None),
    )


@pytest.mark.parametrize("crowded", [[0], [3, 5], slice(0, 2)])
@pytest.mark.parametrize("name", ["all_to_all, tensor parallel", "ring_of_experts, fsdp, chunks of the model dim"])
def test_crowded_and_empty_experts_and_ranks_are_right(name, crowded):
    spec, layout, tokens = CASES[name]
    check_whole(spec, layout, *case(spec, layout, tokens, seed=2, crowded=crowded))


def test_parameters_lie_where_their_specs_say():
    spec, layout, _ = CASES["all_to_all, tensor parallel"]
    params, mesh = LayerParams.init(spec), make_mesh(layout)
    lying = shard(place(params, layout), spec, layout, mesh)
    for device, piece in zip(mesh.devices.flat, lying.w_up_EDF.addressable_shards, strict=True):
        assert piece.device == device
        _, _, e, t = layout.coordinates(int(device.id))
        own = params.w_up_EDF[list(layout.experts_of(e, 8)), :, 3 * t : 3 * t + 3]
        np.testing.assert_array_equal(piece.data, own.astype(np.float32))
    for name in ("w_up_EDF", "b_down_ED"):
        np.testing.assert_array_equal(getattr(unplace(place(params, layout), layout), name), getattr(params, name))


# the buffer


@lru_cache
def truncating(strategy):
    return replace(RAGGED, data=1, strategy=strategy, buffer_factor=0.75, num_token_chunks=2)


def given_case(load: str, layout: ShardLayout):
    rng = np.random.default_rng(3)
    x_TD, params, d_output_TD, mask_T = case(GIVEN, layout, 6, seed=3)
    ids_TK = np.argsort(rng.random((len(x_TD), 8)), axis=-1)[:, :2]
    if load == "one rank":
        ids_TK = np.argsort(rng.random((len(x_TD), 2)), axis=-1)
    ids_TK[rng.random(ids_TK.shape) < 0.1] = -1
    return x_TD, params, d_output_TD, mask_T, ids_TK


@pytest.mark.parametrize("fill", POISONS)
@pytest.mark.parametrize("load", ["spread", "one rank"])
@pytest.mark.parametrize("strategy", ["ragged_all_to_all", "ring_of_experts"])
def test_a_full_buffer_drops_the_slots_that_the_reference_drops(strategy, load, fill):
    layout = truncating(strategy)
    x_TD, params, d_output_TD, mask_T, ids_TK = given_case(load, layout)
    inputs = RouterInputs(given_ids_TK=ids_TK)
    found = ran(GIVEN, layout, x_TD, params, d_output_TD, mask_T, fill, inputs)
    parts = [np.split(array, 4) for array in (x_TD, mask_T, d_output_TD)]
    trace = sharded_layer(parts[0], params, GIVEN, layout, inputs=inputs, token_mask_by_shard=parts[1])
    expected = sharded_backward(trace, params, GIVEN, parts[2])
    whole = moe_layer(x_TD, params, GIVEN, inputs=inputs, token_mask_T=mask_T)
    output_TD = np.concatenate([shard.output_TD for shard in trace.shards])
    check(found, output_TD, whole, np.concatenate(expected.x_by_shard), expected.params, layout)
    overflow_S = [sum(chunk.plan.overflow for chunk in chunks) for chunks in trace.ranks]
    np.testing.assert_array_equal(found[0].overflow_S, overflow_S)
    assert sum(overflow_S) > 0


# errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "node_dedup"}, "strategy is 'node_dedup'"),
        ({"data": 3}, "x_TD has 40 tokens, which the layout's 12 token shards do not divide"),
        ({"data": 1, "tensor": 2}, "the layout needs {'data': 1"),
        ({"expert": 2, "data": 4, "num_emb_chunks": 3}, "num_emb_chunks is 3"),
    ],
)
def test_a_layout_that_does_not_fit_is_an_error(changes, message):
    x_TD, params, _, _ = case(LLAMA, RAGGED, 5)
    with pytest.raises(ValueError, match=message):
        sharded_sparse_matmul(x_TD, params, LLAMA, replace(RAGGED, **changes), make_mesh(RAGGED))


def test_a_mesh_needs_a_device_for_each_rank():
    with pytest.raises(ValueError, match="the layout has 16 ranks; there are 8 devices"):
        make_mesh(ShardLayout(expert=4, data=4))
    with pytest.raises(RuntimeError, match="JAX has started with 8 CPU devices, 9 are needed"):
        use_cpu_devices(9)
