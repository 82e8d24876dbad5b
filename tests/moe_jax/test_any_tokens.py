"""moe_jax, tests of tokens whose number is left open, and of those that lie over explicit axes of a mesh."""

import importlib.util
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from moe_jax.arrays import places_in
from moe_jax.balance import tokens_per_expert
from moe_jax.dense_matmul import dense_matmul
from moe_jax.losses import balance_loss
from moe_jax.parallel import make_mesh, sharded_sparse_matmul
from moe_jax.sparse_matmul import sparse_matmul
from moe_ref.specs.align import AlignSpec
from moe_ref.specs.balance import BalanceSpec, CapacitySpec
from moe_ref.specs.layer import ExpertSpec, LayerSpec
from moe_ref.specs.layout import ShardLayout
from moe_ref.specs.params import LayerParams
from moe_ref.specs.router import RouterSpec

D = 4
SPEC = LayerSpec(
    router=RouterSpec(num_experts=4, top_k=2, score_func="sigmoid", num_expert_groups=2, num_limited_groups=1),
    experts=ExpertSpec(dim=D, hidden_dim=3, bias=True),
)
PARAMS = jax.tree.map(lambda a: np.asarray(a, np.float32), LayerParams.init(SPEC, 0))
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def tokens(*lead):
    return np.random.default_rng(sum(lead)).standard_normal((*lead, D)).astype(np.float32)


def exported(spec=SPEC, layer=sparse_matmul, **options):
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"T, {D}"), jnp.float32)
    return jax.export.export(jax.jit(partial(layer, spec=spec, **options)))(x, PARAMS)


def test_a_layer_is_exported_for_every_number_of_tokens():
    program, layer = exported(), jax.jit(partial(sparse_matmul, spec=SPEC))
    # Less than the smallest block, and more than the largest.
    for num_tokens in (1, 150):
        x_TD = tokens(num_tokens)
        output_TD, decided = program.call(x_TD, PARAMS)
        wanted_TD, wanted = layer(x_TD, PARAMS)
        np.testing.assert_allclose(output_TD, wanted_TD, **CLOSE)
        np.testing.assert_array_equal(decided.expert_ids_TK, wanted.expert_ids_TK)
    if importlib.util.find_spec("flatbuffers"):  # which JAX writes programs with
        program = jax.export.deserialize(program.serialize(vjp_order=1))
    found, expected = (
        jax.jit(jax.grad(lambda x_TD, params, run=run: (run(x_TD, params)[0] ** 2).sum(), argnums=(0, 1)))(
            tokens(5), PARAMS
        )
        for run in (program.call, layer)
    )
    jax.tree.map(partial(np.testing.assert_allclose, **CLOSE), found, expected)
    assert str(exported(layer=dense_matmul).out_avals[0].shape) == f"(T, {D})"


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (SPEC, {"capacity": CapacitySpec(slots=1)}, "capacity is CapacitySpec.* x has T tokens"),
        (SPEC, {"align": AlignSpec(multiple=8)}, "align is AlignSpec"),
        (SPEC, {"num_token_chunks": 2}, "num_token_chunks is 2, which may not divide"),
        (
            SPEC.replace(router=RouterSpec(num_experts=4, top_k=4, selector="expert_choice", take_factor=1.0)),
            {},
            "selector is 'expert_choice'",
        ),
    ],
)
def test_what_makes_a_number_of_the_number_of_tokens_is_refused_by_name(spec, options, message):
    with pytest.raises(ValueError, match=message):
        exported(spec, **options)


def test_tokens_over_explicit_axes_are_the_same_tokens():
    x_BLD = tokens(4, 2)
    wanted_BLD, wanted = jax.jit(partial(sparse_matmul, spec=SPEC))(x_BLD, PARAMS)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))):
        x = jax.sharding.reshard(x_BLD, PartitionSpec("data"))
        by_expert = jax.tree.map(
            lambda a: jax.sharding.reshard(a, PartitionSpec("data") if a.ndim == 3 else PartitionSpec()), PARAMS
        )
        run = jax.jit(lambda x, params: (sparse_matmul(x, params, SPEC), jax.grad(loss, has_aux=True)(x, params)))

        def loss(x, params):
            output, decided = sparse_matmul(x, params, SPEC)
            balance = balance_loss(decided.logits_TE, decided.expert_ids_TK, BalanceSpec.of("switch"))
            return (output**2).sum() + balance, tokens_per_expert(decided.expert_ids_TK, 4)

        (output_BLD, decided), (d_x_BLD, counts_E) = run(x, by_expert)
        wanted_d_x_BLD, wanted_counts_E = run(x_BLD, PARAMS)[1]  # nothing is sharded, under the same mesh
    assert jax.typeof(output_BLD).sharding.spec[0] == jax.typeof(decided.weights_TK).sharding.spec[0] == "data"
    np.testing.assert_allclose(output_BLD, wanted_BLD, **CLOSE)
    np.testing.assert_array_equal(decided.expert_ids_TK, wanted.expert_ids_TK)
    np.testing.assert_allclose(d_x_BLD, wanted_d_x_BLD, **CLOSE)
    np.testing.assert_array_equal(counts_E, wanted_counts_E)
    with pytest.raises(ValueError, match=r"'data'.* of an explicit mesh; call sparse_matmul under jax\.set_mesh"):
        jax.eval_shape(lambda: sparse_matmul(x, PARAMS, SPEC))


def test_a_mesh_of_explicit_axes_is_a_mesh():
    layout = ShardLayout(expert=2)
    mesh = make_mesh(layout)
    explicit = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * 4)
    run = jax.jit(lambda x_TD, params, mesh: sharded_sparse_matmul(x_TD, params, SPEC, layout, mesh), static_argnums=2)
    wanted = run(tokens(4), PARAMS, mesh)
    jax.tree.map(np.testing.assert_array_equal, run(tokens(4), PARAMS, explicit), wanted)
    with jax.set_mesh(explicit):
        x_TD = jax.sharding.reshard(tokens(4), PartitionSpec(None, "expert"))
        jax.tree.map(np.testing.assert_array_equal, run(x_TD, PARAMS, explicit), wanted)
        with pytest.raises(ValueError, match="give the layer the mesh that is set"):
            run(tokens(4), PARAMS, mesh)


def test_the_output_has_the_dtype_of_the_tokens_also_where_parameters_are_wider():
    x_TD, layout = jax.ShapeDtypeStruct((2, D), jnp.bfloat16), ShardLayout()
    sharded = partial(sharded_sparse_matmul, spec=SPEC, layout=layout, mesh=make_mesh(layout))
    for layer in (partial(sparse_matmul, spec=SPEC), partial(dense_matmul, spec=SPEC), sharded):
        output = jax.tree.leaves(jax.eval_shape(layer, x_TD, PARAMS))[0]
        assert (output.shape, output.dtype) == ((2, D), jnp.bfloat16)


def test_a_layer_runs_in_a_shard_map_over_some_axes_of_a_mesh():
    """As a stage of a pipeline does: the other axes stay the compiler's."""
    mesh = jax.make_mesh((2, 2), ("stage", "other"), axis_types=(AxisType.Auto,) * 2)
    by_stage, x_TD = PartitionSpec("stage"), tokens(4)

    def stage(x_TD, params):
        return sparse_matmul(x_TD, params, SPEC)[0]

    specs = {"in_specs": (by_stage, PartitionSpec()), "out_specs": by_stage, "axis_names": {"stage"}}
    found_TD = jax.jit(jax.shard_map(stage, mesh=mesh, **specs))(x_TD, PARAMS)
    np.testing.assert_allclose(found_TD, jax.jit(stage)(x_TD, PARAMS), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_places_in_sorted_numbers_are_those_of_numpy(side):
    sought = np.arange(-1, 11, dtype=np.int32)
    for size in (0, 1, 7):
        sorted_N = np.sort(np.random.default_rng(size).integers(0, 9, size)).astype(np.int32)
        wanted = np.searchsorted(sorted_N, sought, side=side)
        np.testing.assert_array_equal(places_in(sorted_N, sought, side=side), wanted)
