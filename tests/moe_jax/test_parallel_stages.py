"""moe_jax, tests of the stages of the sharded layer: each under a shard_map of its own, with poison between them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_parallel import CASES, DEEPSEEK, POISONS, SAME, case, check_whole

from moe_jax.parallel.exchange import EXCHANGES, plan
from moe_jax.parallel.layer import make_mesh, place, unplace
from moe_jax.parallel.stages import BY_RANK, HIDDEN, ROWS, P, Stages, param_specs, split, stage_specs
from moe_ref.backward.layer import layer_backward
from moe_ref.dispatch import plan as reference_plan
from moe_ref.layer import moe_layer
from moe_ref.specs.align import AlignSpec
from moe_ref.specs.inputs import NO_INPUTS
from moe_ref.specs.layer import ExpertSpec, LayerSpec
from moe_ref.specs.layout import ShardLayout
from moe_ref.specs.params import LayerParams
from moe_ref.specs.router import RouterSpec

TAILED = ShardLayout(expert=4, fsdp=2, strategy="ragged_all_to_all", placement=(3, 1, 2, 0, 7, 6, 4, 5))

CHUNKED = ShardLayout(fsdp=2, expert=2, num_token_chunks=2)
PLAIN = LayerSpec(
    router=RouterSpec(num_experts=4, top_k=2, score_func="sigmoid"), experts=ExpertSpec(dim=16, hidden_dim=4)
)


def test_split_stages_are_the_layer_of_one_rank():
    check_whole(PLAIN, CHUNKED, *case(PLAIN, CHUNKED, 5, seed=4), split_stages=True)


@partial(jax.custom_vjp, nondiff_argnums=())
def soil(rows_RD, used_R, poison):
    """Rows that belong to nobody hold poison, forward and backward."""
    return jnp.where(used_R[:, None], rows_RD, poison)


def _soil_backward(residuals, d_rows_RD):
    used_R, poison = residuals
    return jnp.where(used_R[:, None], d_rows_RD, poison), None, None


soil.defvjp(lambda rows, used, poison: (soil(rows, used, poison), (used, poison)), _soil_backward)


def soiled_layer(get, stages, mesh):
    """The stages one by one; what is behind the last expert's rows is soiled after each."""

    def dirty(spec):
        def soil_rank(rows, metadata, poison):
            return soil(rows, metadata.rows.has_expert_R, poison)

        return jax.shard_map(soil_rank, mesh=mesh, in_specs=(spec, BY_RANK, P()), out_specs=spec)

    def run(x_TD, params, poison):
        decided = get("route")(x_TD, params, None, NO_INPUTS)
        metadata = get("plan")(decided.expert_ids_TK)
        input_TD = get("compress")(x_TD, params)
        rows_RD = dirty(ROWS)(get("dispatch")(input_TD, decided, metadata, poison), metadata, poison)
        gate_RF, up_RF = (dirty(HIDDEN)(part, metadata, poison) for part in get("gmm_up")(rows_RD, params, metadata))
        hidden_RF = dirty(HIDDEN)(get("activate")(gate_RF, up_RF, params, metadata, dtype=x_TD.dtype), metadata, poison)
        done_RD = dirty(ROWS)(get("gmm_down")(hidden_RF, params, metadata), metadata, poison)
        return get("join")(get("unpermute")(done_RD, decided, metadata, poison), input_TD, x_TD, decided, params)

    @jax.jit
    def with_gradients(x_TD, params, d_output_TD, poison):
        output_TD, pull = jax.vjp(lambda x_TD, params: run(x_TD, params, poison), x_TD, params)
        return output_TD, *pull(d_output_TD)

    return with_gradients


def test_poison_in_every_tail_between_stages_reaches_nothing_forward_or_backward():
    spec, layout = DEEPSEEK, TAILED
    rng = np.random.default_rng(5)
    x_TD, d_output_TD = rng.standard_normal((2, 4 * layout.num_token_shards, spec.experts.dim))
    params, mesh, stages = LayerParams.init(spec, 5), make_mesh(layout), Stages(spec, layout)
    trace = moe_layer(x_TD, params, spec)
    expected = layer_backward(trace, params, spec, d_output_TD)
    run = soiled_layer(split(stages, params, mesh), stages, mesh)
    for poison in (*POISONS, *POISONS):
        with jax.enable_x64(True):
            output_TD, d_x_TD, d_params = run(x_TD, place(params, layout), d_output_TD, np.float64(poison))
        np.testing.assert_allclose(output_TD, trace.output_TD, **SAME)
        np.testing.assert_allclose(d_x_TD, expected.x_TD, **SAME)
        for found, wanted in zip(
            jax.tree.leaves(unplace(d_params, layout)), jax.tree.leaves(expected.params), strict=True
        ):
            np.testing.assert_allclose(found, wanted, **SAME)


@pytest.mark.parametrize("name", CASES)
def test_every_stage_has_specs_and_every_parameter_a_place(name):
    spec, layout, _ = CASES[name]
    params = LayerParams.init(spec)
    specs = stage_specs(params, spec, layout)
    assert list(specs)[:1] == ["route"]
    assert all(hasattr(Stages, stage) for stage in specs)
    assert jax.tree.structure(param_specs(params, spec, layout)) == jax.tree.structure(params)


@pytest.mark.parametrize("strategy", EXCHANGES)
def test_sizes_and_offsets_are_those_of_the_reference(strategy):
    tested = ShardLayout(data=2, expert=4, strategy=strategy, placement=TAILED.placement)
    rng = np.random.default_rng(6)
    ids_TK = np.argsort(rng.random((3 * tested.num_token_shards, 8)), axis=-1)[:, :3]
    ids_TK[rng.random(ids_TK.shape) < 0.3] = -1
    tokens = P(("data", "fsdp") if tested.facts.shares_tokens else ("data", "fsdp", "expert"))
    planned = jax.shard_map(
        lambda ids_TK: plan(ids_TK, tested, DEEPSEEK.router), mesh=make_mesh(tested), in_specs=tokens, out_specs=BY_RANK
    )
    found = jax.jit(planned)(ids_TK.astype(np.int32))
    expected = reference_plan(np.split(ids_TK, tested.num_token_shards), tested, DEEPSEEK)
    for name in ("send_sizes_S", "recv_sizes_S"):
        np.testing.assert_array_equal(getattr(found, name), np.concatenate([getattr(p, name) for p in expected]))
    sizes = np.concatenate([p.group_sizes_e for p in expected])
    np.testing.assert_array_equal(found.rows.group_sizes_E, sizes)
    if strategy in ("ragged_all_to_all", "ring_of_experts", "replicated_ragged"):  # the others have blocks, or nothing
        for name in ("input_offsets_S", "output_offsets_S"):
            np.testing.assert_array_equal(getattr(found, name), np.concatenate([getattr(p, name) for p in expected]))


@pytest.mark.parametrize("strategy", EXCHANGES)
def test_aligned_rows_of_a_rank_are_multiples_that_hold_its_rows(strategy):
    layout, align = ShardLayout(expert=4, strategy=strategy), AlignSpec(multiple=4, idle_blocks=1)
    stages = split(Stages(DEEPSEEK, layout, align=align), LayerParams.init(DEEPSEEK), make_mesh(layout))
    ids_TK = np.argsort(np.random.default_rng(7).random((8, 8)), axis=-1)[:, :3].astype(np.int32)
    ids_TK[ids_TK == 5] = -1
    found = jax.jit(stages("plan"))(ids_TK).rows
    counts_E = np.bincount(ids_TK[ids_TK >= 0], minlength=8)
    np.testing.assert_array_equal(found.group_sizes_E, np.maximum(-(-counts_E // 4), 1) * 4)
    assert found.slot_of_row_R.size % (4 * 4) == 0
    assert (np.asarray(found.slot_of_row_R) >= 0).sum() == counts_E.sum()


@pytest.mark.parametrize("strategy", EXCHANGES)
def test_no_tokens_are_planned_without_waiting_for_any(strategy):
    empty = ShardLayout(expert=4, strategy=strategy)
    stage = split(Stages(DEEPSEEK, empty), LayerParams.init(DEEPSEEK), make_mesh(empty))("plan")
    found = jax.jit(stage)(np.zeros((0, 3), np.int32))
    np.testing.assert_array_equal(found.rows.group_sizes_E, np.zeros(8))
