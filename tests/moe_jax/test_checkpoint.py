"""moe_jax, tests of checkpoints: parameters that orbax saves at one layout are the same bits at any other."""

import gc
from dataclasses import replace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_parallel import DEEPSEEK, INKLING

from moe_jax.parallel import abstract_params, make_mesh, place, shard, unplace
from moe_ref.specs.layout import ShardLayout
from moe_ref.specs.params import LayerParams

PLACEMENT = (3, 1, 2, 0, 7, 6, 4, 5)
LAYOUTS = {
    "one device": ShardLayout(),
    "EP 2": ShardLayout(expert=2),
    "EP 4, placement": ShardLayout(expert=4, placement=PLACEMENT),
    "EP 2 x FSDP 2 x TP 2, placement": ShardLayout(expert=2, fsdp=2, tensor=2, placement=PLACEMENT[::-1]),
}


def same_bits(found: LayerParams, wanted: LayerParams) -> None:
    """Every parameter that there is, the balancing bias included."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))
    assert len(pairs) == len(jax.tree.leaves(wanted)) > 3
    for mine, its in pairs:
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(its, mine.dtype))


# Where orbax refuses, it leaves coroutines behind that nobody awaits; they complain when they are collected.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


@pytest.mark.parametrize("saved_at", LAYOUTS)
def test_a_checkpoint_is_restored_at_every_layout_bit_for_bit(saved_at, tmp_path):
    spec, params, before = DEEPSEEK, LayerParams.init(DEEPSEEK), LAYOUTS[saved_at]
    assert params.expert_bias_E is not None
    lying = shard(place(params, before), spec, before, make_mesh(before))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", unplace(lying, before))
        checkpointer.wait_until_finished()
        for layout in LAYOUTS.values():
            target = abstract_params(lying, spec, layout, make_mesh(layout))
            restored = checkpointer.restore(tmp_path / "step", target)
            same_bits(restored, params)
            placed = place(restored, layout)
            same_bits(placed, place(params, layout))
            for array, wanted in zip(jax.tree.leaves(placed), jax.tree.leaves(target), strict=True):
                assert array.sharding == wanted.sharding


def test_a_checkpoint_of_another_layer_is_an_error(tmp_path):
    layout = ShardLayout(expert=2)
    mesh = make_mesh(layout)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", shard(LayerParams.init(DEEPSEEK), DEEPSEEK, layout, mesh))
        checkpointer.wait_until_finished()
        target = abstract_params(LayerParams.init(INKLING), INKLING, layout, mesh)
        with pytest.raises(ValueError, match="not compatible with the stored shape"):
            checkpointer.restore(tmp_path / "step", target)
    gc.collect()  # here, and not in a test that comes later


def test_no_bias_stays_no_bias(tmp_path):
    layout = ShardLayout(expert=2)
    mesh = make_mesh(layout)
    params = LayerParams.init(DEEPSEEK)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", shard(replace(params, expert_bias_E=None), DEEPSEEK, layout, mesh))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step", abstract_params(params, DEEPSEEK, layout, mesh))
    assert restored.expert_bias_E is None
