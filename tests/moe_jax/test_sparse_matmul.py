"""moe_jax, tests of the layer: output and every gradient against moe_ref, and each stage alone."""

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dense_matmul import dense_matmul
from moe_jax.experts import hide
from moe_jax.parallel import make_mesh, sharded_sparse_matmul
from moe_jax.permute import permute
from moe_jax.rows import dispatch, unpermute
from moe_jax.sparse_matmul import gmm_down, gmm_up, route_tokens, sparse_matmul
from moe_ref.backward.layer import hide_backward, layer_backward
from moe_ref.experts import hide as reference_hide
from moe_ref.layer import moe_layer
from moe_ref.permute import dispatch as reference_dispatch
from moe_ref.permute import permute as reference_permute
from moe_ref.permute import unpermute as reference_unpermute
from moe_ref.specs.align import AlignSpec
from moe_ref.specs.balance import CapacitySpec
from moe_ref.specs.inputs import RouterInputs
from moe_ref.specs.layer import ExpertSpec, LayerSpec, SharedSpec
from moe_ref.specs.layout import ShardLayout
from moe_ref.specs.params import LayerParams
from moe_ref.specs.router import RouterSpec

T, D, F = 8, 6, 5
PADDING = 3
# Sums of some tens of float64 products, in another order than the reference's.
SAME: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}

LAYERS = {
    "gpt_oss": LayerSpec(
        router=RouterSpec(num_experts=6, top_k=3, score_over="selected", select_by="logit"),
        experts=ExpertSpec(dim=D, hidden_dim=F, alpha=1.702, up_offset=1.0, clamp=0.7, bias=True),
        gate_bias=True,
    ),
    "deepseek_v3": LayerSpec(
        router=RouterSpec(
            num_experts=8, top_k=3, score_func="sigmoid", num_expert_groups=4, num_limited_groups=2,
            route_norm=True, norm_eps=1e-20, route_scale=2.5,
        ),
        experts=ExpertSpec(dim=D, hidden_dim=F),
        shared=SharedSpec(hidden_dim=3, gate="sigmoid", combine="average"),
    ),
    "llama4, with null experts": LayerSpec(
        router=RouterSpec(
            num_experts=3, top_k=2, score_func="sigmoid", weight_on="input", num_null_experts=2, output_scale=3.0
        ),
        experts=ExpertSpec(dim=D, hidden_dim=F, activation="gelu", bias=True),
    ),
    "inkling": LayerSpec(
        router=RouterSpec(
            num_experts=4, top_k=2, score_func="sigmoid", route_norm=True, norm_with_shared=True,
            num_scored_shared_experts=2, learned_scale="global", route_scale=8.0,
        ),
        experts=ExpertSpec(dim=D, hidden_dim=F, clamp=0.2, clamp_at="after"),
        shared=SharedSpec(hidden_dim=3, clamp=0.1),
    ),
    "longcat_flash": LayerSpec(
        router=RouterSpec(num_experts=3, top_k=3, num_null_experts=3),
        experts=ExpertSpec(dim=D, hidden_dim=F, gated=False, activation="relu2", bias=True, clamp=1.0),
    ),
    "zaya": LayerSpec(
        router=RouterSpec(num_experts=3, top_k=2, num_null_experts=2, null_kind="skip", learned_scale="per_expert"),
        experts=ExpertSpec(dim=D, hidden_dim=F, activation="gelu_tanh"),
    ),
}  # fmt: skip
CHUNKED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"num_token_chunks": 2, "num_emb_chunks": 2},
    "llama4, with null experts": {
        "num_token_chunks": 2, "num_emb_chunks": 2, "align": AlignSpec(multiple=16, idle_blocks=1),
    },
}  # fmt: skip


def case(spec, seed=0):
    """Tokens, parameters and output gradients; what belongs to a padding token is NaN."""
    rng = np.random.default_rng(seed)
    x_TD, d_output_TD = rng.standard_normal((2, T, D))
    params = LayerParams.init(spec, seed)
    x_TD[PADDING], d_output_TD[PADDING] = np.nan, np.nan
    return x_TD, params, d_output_TD


MASK = np.arange(T) != PADDING


@lru_cache
def compiled(layer, spec, **options):
    @jax.jit
    def run(x_TD, params, d_output_TD):
        def forward(x_TD, params):
            return layer(x_TD, params, spec, token_mask_T=MASK, **options)

        output_TD, pull, decided = jax.vjp(forward, x_TD, params, has_aux=True)
        return output_TD, decided, *pull(d_output_TD)

    return run


def check(found, x_TD, params, spec, d_output_TD):
    """Output, choice and all gradients are the reference's."""
    output_TD, decided, d_x_TD, d_params = found
    trace = moe_layer(x_TD, params, spec, token_mask_T=MASK)
    expected = layer_backward(trace, params, spec, d_output_TD)
    np.testing.assert_allclose(output_TD, trace.output_TD, **SAME)
    np.testing.assert_array_equal(decided.expert_ids_TK, trace.routing.expert_ids_TK)
    np.testing.assert_allclose(decided.weights_TK, trace.routing.weights_TK, **SAME)
    np.testing.assert_allclose(d_x_TD, expected.x_TD, **SAME)
    np.testing.assert_array_equal(np.asarray(output_TD)[PADDING], 0)
    np.testing.assert_array_equal(np.asarray(d_x_TD)[PADDING], 0)
    wanted = jax.tree_util.tree_leaves_with_path(expected.params)
    for (path, gradient), array in zip(wanted, jax.tree.leaves(d_params), strict=True):
        np.testing.assert_allclose(array, gradient, err_msg=jax.tree_util.keystr(path), **SAME)


@pytest.mark.parametrize("layer", [sparse_matmul, dense_matmul])
@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients_are_the_reference_s(name, layer):
    x_TD, params, d_output_TD = case(LAYERS[name])
    with jax.enable_x64(True):
        found = compiled(layer, LAYERS[name])(x_TD, params, d_output_TD)
    check(found, x_TD, params, LAYERS[name], d_output_TD)


@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_and_aligned_rows_change_nothing(name):
    x_TD, params, d_output_TD = case(LAYERS[name])
    with jax.enable_x64(True):
        found = compiled(sparse_matmul, LAYERS[name], **CHUNKED[name])(x_TD, params, d_output_TD)
    check(found, x_TD, params, LAYERS[name], d_output_TD)


def test_one_compiled_layer_serves_every_load():
    spec = LAYERS["deepseek_v3"]
    for seed, bias in enumerate((0.0, 100.0, -100.0)):
        x_TD, params, d_output_TD = case(spec, seed)
        # A bias on one group makes experts crowded, and others empty.
        loaded = jax.tree.map(np.array, params)
        loaded = LayerParams(**{**vars(loaded), "expert_bias_E": np.where(np.arange(8) < 4, bias, 0.0)})
        with jax.enable_x64(True):
            found = compiled(sparse_matmul, spec)(x_TD, loaded, d_output_TD)
        check(found, x_TD, loaded, spec, d_output_TD)
        if bias:
            idle = slice(4, 8) if bias > 0 else slice(0, 4)
            np.testing.assert_array_equal(np.asarray(found[3].w_up_EDF)[idle], 0)


@pytest.mark.parametrize(("num_tokens", "align"), [(0, AlignSpec(multiple=16, idle_blocks=1)), (1, None)])
def test_no_token_and_one_token_are_layers_too(num_tokens, align):
    spec = LAYERS["deepseek_v3"]
    x_TD, params, _ = case(spec)
    with jax.enable_x64(True):
        output_TD, _ = jax.jit(partial(sparse_matmul, spec=spec, align=align))(x_TD[:num_tokens], params)
    np.testing.assert_allclose(output_TD, moe_layer(x_TD[:num_tokens], params, spec).output_TD, **SAME)


def test_bfloat16_is_within_its_rounding_of_the_reference():
    spec = LAYERS["gpt_oss"]
    x_TD, params, _ = case(spec)
    low_x_TD, low_params = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (x_TD[MASK], params))
    output_TD, decided = jax.jit(partial(sparse_matmul, spec=spec))(low_x_TD, low_params)
    exact_x_TD, exact_params = jax.tree.map(lambda a: np.asarray(a, np.float64), (low_x_TD, low_params))
    trace = moe_layer(exact_x_TD, exact_params, spec)
    assert output_TD.dtype == jnp.bfloat16
    np.testing.assert_array_equal(decided.expert_ids_TK, trace.routing.expert_ids_TK)
    error_T = np.linalg.norm(np.asarray(output_TD, np.float64) - trace.output_TD, axis=-1)
    # Four roundings to 8 bits in a row (projections, hidden, rows, output), each at most 2 ** -8.
    assert (error_T <= 4 * 2**-8 * np.linalg.norm(trace.output_TD, axis=-1)).all()


IDS_TK = np.array([[0, 2], [2, -1], [5, 4], [-1, -1], [2, 0], [4, 2**30]])
NUM_EXPERTS = 5  # the ids beyond are null experts, or none


def test_rows_are_in_the_order_of_the_reference():
    metadata, expected = permute(IDS_TK, NUM_EXPERTS), reference_permute(IDS_TK, NUM_EXPERTS)
    rows = len(expected.order_N)
    np.testing.assert_array_equal(metadata.group_sizes_E, expected.tokens_per_expert_E)
    np.testing.assert_array_equal(metadata.slot_of_row_R[:rows], expected.order_N)
    np.testing.assert_array_equal(metadata.token_of_row_R[:rows], expected.token_of_row_N)
    np.testing.assert_array_equal(metadata.expert_of_row_R[:rows], expected.expert_of_row_N)
    np.testing.assert_array_equal(metadata.expert_of_row_R[rows:], NUM_EXPERTS)
    np.testing.assert_array_equal(metadata.has_expert_TK, (IDS_TK >= 0) & (IDS_TK < NUM_EXPERTS))
    np.testing.assert_array_equal(np.sort(metadata.slot_of_row_R), np.arange(IDS_TK.size))
    np.testing.assert_array_equal(metadata.slot_of_row_R[metadata.row_of_slot_TK.reshape(-1)], np.arange(IDS_TK.size))


def test_many_rows_and_experts_are_sorted_as_few_are():
    # 2 ** 16 rows times 2 ** 16 + 1 ids: the packed sort would overflow.
    ids_TK = np.random.default_rng(0).integers(-1, 2**16, (2**15, 2))
    metadata, expected = permute(ids_TK, 2**16), reference_permute(ids_TK, 2**16)
    np.testing.assert_array_equal(metadata.slot_of_row_R[: len(expected.order_N)], expected.order_N)
    np.testing.assert_array_equal(metadata.group_sizes_E, expected.tokens_per_expert_E)


def move_both_ways(x_TD, rows_RD, weights_TK, d_rows_RD, d_output_TD):
    """Dispatch of x and its gradient; unpermute of the rows and its two gradients."""
    metadata = permute(IDS_TK, NUM_EXPERTS)
    dispatched_RD, pull_rows = jax.vjp(lambda x_TD: dispatch(x_TD, metadata), x_TD)
    output_TD, pull_output = jax.vjp(lambda r, w: unpermute(r, metadata, w), rows_RD, weights_TK)
    return dispatched_RD, *pull_rows(d_rows_RD), output_TD, *pull_output(d_output_TD)


@pytest.mark.parametrize("weighted", [True, False])
def test_dispatch_and_unpermute_move_rows_and_gradients_as_the_reference_does(weighted):
    rng = np.random.default_rng(0)
    (num_tokens, K), width = IDS_TK.shape, 3
    order_N = reference_permute(IDS_TK, NUM_EXPERTS).order_N
    rows_RD, d_rows_RD = rng.standard_normal((2, num_tokens * K, width))
    x_TD, d_output_TD = rng.standard_normal((2, num_tokens, width))
    weights_TK = rng.standard_normal(IDS_TK.shape) if weighted else None
    factors_TK1 = weights_TK[:, :, None] if weights_TK is not None else np.ones((num_tokens, K, 1))
    own_rows_ND = rows_RD[: len(order_N)].copy()
    # The tail is poisoned in both directions.
    rows_RD[len(order_N) :] = d_rows_RD[len(order_N) :] = np.nan
    with jax.enable_x64(True):
        moved = jax.jit(move_both_ways)(x_TD, rows_RD, weights_TK, d_rows_RD, d_output_TD)
    dispatched_RD, d_x_TD, output_TD, d_own_RD, d_weights_TK = moved

    slots_TKD = np.repeat(x_TD[:, None], K, axis=1)
    np.testing.assert_array_equal(dispatched_RD[: len(order_N)], reference_dispatch(slots_TKD, order_N))
    d_slots_TKD = reference_unpermute(d_rows_RD[: len(order_N)], order_N, K, num_tokens)
    np.testing.assert_allclose(d_x_TD, d_slots_TKD.sum(axis=1), **SAME)
    slot_outputs_TKD = reference_unpermute(own_rows_ND, order_N, K, num_tokens)
    np.testing.assert_allclose(output_TD, (factors_TK1 * slot_outputs_TKD).sum(axis=1), **SAME)
    d_slot_outputs_TKD = factors_TK1 * d_output_TD[:, None]
    np.testing.assert_allclose(d_own_RD[: len(order_N)], reference_dispatch(d_slot_outputs_TKD, order_N), **SAME)
    np.testing.assert_array_equal(d_own_RD[len(order_N) :], 0)
    if weighted:
        np.testing.assert_allclose(d_weights_TK, (slot_outputs_TKD * d_output_TD[:, None]).sum(axis=-1), **SAME)


def test_the_tail_of_a_projection_is_not_read_even_with_a_bias():
    params = LayerParams.init(LAYERS["gpt_oss"], 0).astype(np.float32)

    @jax.jit
    def project(rows_RD):
        metadata = permute(np.array([[0, 2], [-1, 1], [2, 7]]), 6)
        gate_RF, up_RF = gmm_up(rows_RD, params.w_gate_EDF, params.w_up_EDF, metadata)
        hidden_RF = up_RF.at[4:].set(jnp.nan)
        return gate_RF, up_RF, gmm_down(hidden_RF, params.w_down_EFD, params.b_down_ED, metadata)

    rows_RD = np.random.default_rng(0).standard_normal((6, D)).astype(np.float32)
    rows_RD[4:] = np.nan
    for projected in project(rows_RD):
        np.testing.assert_array_equal(np.asarray(projected)[4:], 0)
        assert (np.asarray(projected)[:4] != 0).all()


@pytest.mark.parametrize("spec", [layer.experts for layer in LAYERS.values()], ids=LAYERS)
def test_a_value_at_its_limit_passes_the_gradient(spec):
    limit = spec.clamp or 1.0
    at = np.array([-2 * limit, -limit, -0.1, 0.0, 0.1, limit, 2 * limit])
    gate_RF, up_RF = np.meshgrid(at, at)
    gate_RF = gate_RF if spec.gated else None
    with jax.enable_x64(True):
        hidden_RF, pull = jax.vjp(lambda gate, up: hide(gate, up, spec), gate_RF, up_RF)
        d_gate_RF, d_up_RF = pull(np.ones((7, 7)))
    expected_gate_RF, expected_up_RF = hide_backward(np.ones((7, 7)), gate_RF, up_RF, spec)
    np.testing.assert_allclose(hidden_RF, reference_hide(gate_RF, up_RF, spec), **SAME)
    np.testing.assert_allclose(d_up_RF, expected_up_RF, **SAME)
    if expected_gate_RF is not None:
        np.testing.assert_allclose(d_gate_RF, expected_gate_RF, **SAME)


def test_routing_never_sees_the_tokens():
    spec = RouterSpec(num_experts=4, top_k=2)
    decided, metadata = jax.eval_shape(
        lambda logits: route_tokens(logits, spec), jax.ShapeDtypeStruct((T, 4), jnp.float32)
    )
    assert decided.weights_TK.shape == (T, 2)
    assert {leaf.size for leaf in jax.tree.leaves(metadata)} == {4, 2 * T}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_token_chunks": 3}, "num_token_chunks is 3, which does not divide the 8 tokens"),
        ({"num_emb_chunks": 4}, "num_emb_chunks is 4, which does not divide the model dim, 6"),
        ({"inputs": RouterInputs(given_ids_TK=np.zeros((T, 3), int))}, "given_ids_TK is given"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    spec = LAYERS["deepseek_v3"]
    params = LayerParams.init(spec).astype(np.float32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: sparse_matmul(np.zeros((T, D), np.float32), params, spec, **options))
    with pytest.raises(ValueError, match=r"x is float32\[8, 5\]; it is floats of shape \(\.\.\., 6\)"):
        sparse_matmul(np.zeros((T, 5), np.float32), params, spec)
    with pytest.raises(ValueError, match=r"token_mask_T is bool\[2, 3\]; tokens are \[2, 4\]"):
        sparse_matmul(np.zeros((2, 4, D), np.float32), params, spec, token_mask_T=np.ones((2, 3), bool))


def test_tokens_of_any_leading_shape_are_the_same_tokens():
    spec, layout = LAYERS["llama4, with null experts"], ShardLayout(strategy="replicated")
    x_TD, params, _ = case(spec)
    # What one sequence of two keeps is not what one of both does.
    capacity = CapacitySpec(slots=2, scope="sequence")
    flat = {"token_mask_T": MASK, "sequence_of_T": np.arange(T) // 4, "num_sequences": 2}

    @jax.jit
    def run(x_TD, x_BLD):
        mask_BL = MASK.reshape(2, 4)
        sharded = partial(sharded_sparse_matmul, params=params, spec=spec, layout=layout, mesh=make_mesh(layout))
        of_shards = [sharded(x_TD, token_mask_T=MASK), sharded(x_BLD, token_mask_T=mask_BL)]
        return [
            (sparse_matmul(x_TD, params, spec, capacity=capacity, **flat),
             sparse_matmul(x_BLD, params, spec, capacity=capacity, token_mask_T=mask_BL)),
            (dense_matmul(x_TD, params, spec, capacity=capacity, **flat),
             dense_matmul(x_BLD, params, spec, capacity=capacity, token_mask_T=mask_BL)),
            tuple((found.output_TD, found.decided) for found in of_shards),
        ]  # fmt: skip

    for (output_TD, decided), (output_BLD, again) in run(x_TD, x_TD.reshape(2, 4, D)):
        np.testing.assert_array_equal(output_BLD, output_TD.reshape(2, 4, D))
        jax.tree.map(np.testing.assert_array_equal, again, decided)
    assert jax.eval_shape(lambda: sparse_matmul(x_TD[0], params, spec)[0]).shape == (D,)


def test_exact_gelu_differentiates_any_number_of_times_inside_shard_map():
    mesh, spec = make_mesh(ShardLayout(expert=2)), ExpertSpec(dim=1, hidden_dim=1, activation="gelu")
    own = jax.sharding.PartitionSpec("expert")
    z_F = np.linspace(-6, 6, 32, dtype=np.float32)
    mine, its = (lambda z: hide(z, jnp.ones_like(z), spec)), partial(jax.nn.gelu, approximate=False)
    for _ in range(3):
        for found in (mine, jax.shard_map(mine, mesh=mesh, in_specs=own, out_specs=own)):
            np.testing.assert_allclose(jax.jit(found)(z_F), its(z_F), rtol=1e-5, atol=1e-6)
        mine, its = (jax.grad(lambda z, f=f: f(z).sum()) for f in (mine, its))


QUOTAS = RouterSpec(num_experts=8, top_k=2, selector="group_top_k", quota_groups=2)


@pytest.mark.parametrize("router", [LAYERS["deepseek_v3"].router, QUOTAS])
def test_batch_invariant_tokens_have_their_own_bits(router):
    spec = LayerSpec(router=router, experts=ExpertSpec(dim=96, hidden_dim=130))
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), LayerParams.init(spec, 0))
    x_TD = np.random.default_rng(0).standard_normal((33, 96)).astype(np.float32)
    run = jax.jit(partial(sparse_matmul, spec=spec, batch_invariant=True))
    output_TD, decided = jax.tree.map(np.asarray, run(x_TD, params))
    np.testing.assert_array_equal(run(x_TD[::-1], params)[0], output_TD[::-1])
    np.testing.assert_array_equal(run(x_TD[[20]], params)[0], output_TD[[20]])
    assert decided.expert_ids_TK.shape == (33, router.top_k)
    with pytest.raises(ValueError, match="batch_invariant"):
        sparse_matmul(x_TD, params, spec, batch_invariant=True, capacity=CapacitySpec(slots=1))


def test_a_layer_is_differentiable_forward_and_twice_and_promotes_no_rank():
    spec = LayerSpec(
        router=RouterSpec(num_experts=4, top_k=3, score_func="sigmoid", selector="threshold", threshold=0.5),
        experts=ExpertSpec(dim=4, hidden_dim=4),
    )
    params = jax.tree.map(jnp.asarray, LayerParams.init(spec).astype(np.float32))
    x_TD, tangent_TD = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)

    def loss(x_TD):
        return (sparse_matmul(x_TD, params, spec)[0] ** 2).sum()

    @jax.jit
    def derivatives(x_TD, tangent_TD):
        gradient_TD, forward_over_reverse_TD = jax.jvp(jax.grad(loss), (x_TD,), (tangent_TD,))
        twice_reverse_TD = jax.grad(lambda x_TD: (jax.grad(loss)(x_TD) * tangent_TD).sum())(x_TD)
        return gradient_TD, jax.jvp(loss, (x_TD,), (tangent_TD,))[1], forward_over_reverse_TD, twice_reverse_TD

    with jax.numpy_rank_promotion("raise"):
        gradient_TD, forward, forward_over_reverse_TD, twice_reverse_TD = derivatives(x_TD, tangent_TD)
    np.testing.assert_allclose(forward, (gradient_TD * tangent_TD).sum(), rtol=1e-4)
    np.testing.assert_allclose(forward_over_reverse_TD, twice_reverse_TD, rtol=1e-3, atol=1e-4)
