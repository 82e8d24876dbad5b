"""moe_jax, tests of the ways of a grouped matmul: which one is taken where, and what tokamax's kernels are given.

There is no GPU here. `fake_tokamax` stands in for tokamax, and what is compiled for a CPU takes the way of CUDA.
"""

import importlib
import sys
import warnings
from functools import partial

import fake_tokamax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec
from test_grouped_matmul import reference

from moe_jax import blocked, choice, grouped_matmul, ragged

R, D, F = 45, 11, 7
SIZES_E = [7, 0, 30, 2]


@pytest.fixture(autouse=True)
def forget():
    """What was found out about one tokamax is not said of the next."""
    yield
    for remembered in (choice.without_tokamax, choice.refusal, choice._say):
        remembered.cache_clear()


def install(monkeypatch, module) -> None:
    """This tokamax is the one that is imported; None: there is none."""
    monkeypatch.setitem(sys.modules, "tokamax", module)


@pytest.fixture
def on_cuda(monkeypatch):
    """A tokamax, and what is compiled here goes the way of CUDA."""
    module = fake_tokamax.fake()
    install(monkeypatch, module)
    module_of_matmul = importlib.import_module("moe_jax.grouped_matmul")
    monkeypatch.setattr(module_of_matmul, "chosen", lambda platform, dtype: choice.chosen("cuda", dtype=dtype))
    return module


# which one


def test_a_cpu_takes_the_blocked_way():
    assert choice.chosen("cpu") == choice.Chosen(way="blocked")
    assert choice.chosen() == choice.Chosen(way="blocked")


def test_cuda_takes_the_kernels_of_tokamax(monkeypatch):
    install(monkeypatch, fake_tokamax.fake())
    for dtype in (jnp.bfloat16, jnp.float16):
        assert choice.chosen("cuda", dtype=dtype) == choice.Chosen(
            way="tokamax", kernel="mosaic_gpu", weight_gradient="triton"
        )


class Broken:
    """Finds tokamax, and fails to import it."""

    def find_spec(self, name, *_):
        if name == "tokamax":
            raise RuntimeError("xprof is too old")


def test_a_tokamax_that_cannot_be_imported_is_a_sentence(monkeypatch):
    install(monkeypatch, None)
    assert "tokamax cannot be imported: ModuleNotFoundError" in choice.chosen("cuda").why
    assert choice.chosen("cuda").way == "blocked"
    assert choice.chosen("tpu").way == "ragged"
    choice.without_tokamax.cache_clear()
    monkeypatch.delitem(sys.modules, "tokamax")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert choice.chosen("cuda").why == "tokamax cannot be imported: RuntimeError('xprof is too old')"


@pytest.mark.parametrize(
    ("module", "dtype", "why"),
    [
        (fake_tokamax.fake(), jnp.float32, "it computes in float32"),
        (fake_tokamax.fake(kernels=()), jnp.bfloat16, "refuses: Unknown implementation: mosaic_gpu"),
        (fake_tokamax.fake(without=("ragged_dot_general",)), jnp.bfloat16, "has no ragged_dot_general"),
    ],
)
def test_what_tokamax_has_no_kernel_for_is_blocked(module, dtype, why, monkeypatch):
    install(monkeypatch, module)
    found = choice.chosen("cuda", dtype=dtype)
    assert found.way == "blocked"
    assert why in found.why


def test_the_gradient_of_weights_is_the_fastest_that_there_is(monkeypatch):
    install(monkeypatch, fake_tokamax.fake(kernels=("mosaic_gpu",)))
    found = choice.chosen("cuda")
    assert (found.way, found.weight_gradient) == ("tokamax", "mosaic_gpu")
    assert "tokamax's triton refuses: Unknown implementation: triton (pip install 'tokamax[cuda]'" in found.why
    choice.refusal.cache_clear()
    install(monkeypatch, fake_tokamax.fake(contracting=()))
    found = choice.chosen("cuda")
    assert (found.way, found.weight_gradient) == ("tokamax", "blocked")
    assert "Only default `ragged_dot_dimension_numbers` supported" in found.why


def test_a_kernel_that_can_be_traced_and_not_compiled_is_not_taken(monkeypatch):
    install(monkeypatch, fake_tokamax.fake(old=("triton",)))
    found = choice.chosen("cuda")
    assert (found.way, found.weight_gradient) == ("tokamax", "mosaic_gpu")
    assert "tokamax's triton refuses: MLIR translation rule for primitive 'uncompiled'" in found.why
    choice.refusal.cache_clear()
    install(monkeypatch, fake_tokamax.fake(old=("triton", "mosaic_gpu")))
    assert choice.chosen("cuda").way == "blocked"


def lowered_for_cuda(dtype) -> str:
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((512, 64), (32, 64, 48))]
    sizes = jax.ShapeDtypeStruct((32,), jnp.int32)

    def both(rows_RD, kernel_EDF, sizes_E):
        matmul = partial(grouped_matmul, group_sizes_E=sizes_E)
        out_RF, pull = jax.vjp(matmul, rows_RD, kernel_EDF)
        return pull(out_RF)

    return jax.jit(both).trace(*shapes, sizes).lower(lowering_platforms=("cuda",)).as_text()


def test_a_fallback_on_cuda_warns_once_and_expands_nothing(monkeypatch):
    install(monkeypatch, None)
    with pytest.warns(UserWarning, match="takes the way 'blocked': tokamax cannot be imported") as said:
        text = lowered_for_cuda(jnp.bfloat16)
    assert len(said) == 1
    assert "ragged_dot" not in text
    assert "32x512x" not in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowered_for_cuda(jnp.bfloat16)


def test_on_cuda_a_block_has_one_size(monkeypatch):
    # A rest and full blocks, of the value and of both gradients; on a CPU a rest has nine sizes.
    install(monkeypatch, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert lowered_for_cuda(jnp.bfloat16).count("stablehlo.dot_general") == 6


@pytest.mark.parametrize("sizes_E", [[7, 0, 30, 2], [200, 1, 0, 128], [0, 0, 0, 0], [129, 130, 0, 90]])
def test_blocks_of_one_size_hold_every_row(sizes_E, monkeypatch):
    monkeypatch.setattr(blocked, "sizes_on", lambda platform: blocked.ONE_SIZE)
    rng, R = np.random.default_rng(0), 349
    rows_RD, kernel_EDF, d_rows_RF = (rng.standard_normal(shape) for shape in ((R, D), (len(sizes_E), D, F), (R, F)))

    @jax.jit
    def run(rows_RD, kernel_EDF, sizes_E, d_rows_RF):
        value_RF, pull = jax.vjp(partial(grouped_matmul, group_sizes_E=sizes_E), rows_RD, kernel_EDF)
        return value_RF, *pull(d_rows_RF)

    arrays = [jnp.asarray(array, jnp.float32) for array in (rows_RD, kernel_EDF, d_rows_RF)]
    found = run(*arrays[:2], jnp.array(sizes_E), arrays[2])
    for array, wanted in zip(found, reference(rows_RD, kernel_EDF, np.array(sizes_E), d_rows_RF), strict=True):
        np.testing.assert_allclose(array, wanted, atol=1e-4)


# what the kernels are given


def agrees(dtype=jnp.bfloat16, out_dtype=jnp.bfloat16, sizes_E=SIZES_E, poison=None, rounding=2**-7) -> None:
    """Value and gradients are the reference's; rounding is of one result and of what it is the sum of."""
    rng = np.random.default_rng(0)
    shapes = ((R, D), (len(sizes_E), D, F), (R, F))
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    rows_RD, kernel_EDF, d_rows_RF = arrays[0], arrays[1], jnp.asarray(rng.standard_normal(shapes[2]), out_dtype)
    cut = np.diff(np.minimum(np.cumsum([0, *sizes_E]), R))
    exact = [np.asarray(array, np.float64) for array in (rows_RD, kernel_EDF, d_rows_RF)]
    expected = reference(exact[0], exact[1], cut, exact[2])
    size = reference(*map(np.abs, exact[:2]), cut, np.abs(exact[2]))
    if poison is not None:
        rows_RD, d_rows_RF = rows_RD.at[cut.sum() :].set(poison), d_rows_RF.at[cut.sum() :].set(poison)

    @jax.jit
    def run(rows_RD, kernel_EDF, sizes_E, d_rows_RF):
        matmul = partial(grouped_matmul, group_sizes_E=sizes_E, preferred_element_type=out_dtype)
        value_RF, pull = jax.vjp(matmul, rows_RD, kernel_EDF)
        return value_RF, *pull(d_rows_RF)

    found = run(rows_RD, kernel_EDF, jnp.array(sizes_E), d_rows_RF)
    for array, wanted, scale, wanted_dtype in zip(found, expected, size, (out_dtype, dtype, dtype), strict=True):
        assert array.dtype == wanted_dtype
        error = np.abs(np.asarray(array, np.float64) - wanted)
        assert (error <= rounding * scale).all(), error.max()


def test_the_kernels_give_the_value_and_gradients_of_the_reference(on_cuda):
    agrees(poison=np.nan)
    assert {call[0] for call in on_cuda.calls} == {"mosaic_gpu", "triton"}
    assert {call[3] for call in on_cuda.calls} == {jnp.dtype(jnp.bfloat16)}


def test_the_gradient_of_a_wide_result_keeps_more_than_half_precision(on_cuda):
    # Rounded to bfloat16 first, the gradient would be off by 2^-9 of each product before the result is rounded.
    agrees(out_dtype=jnp.float32, rounding=2**-8)
    assert {call[3] for call in on_cuda.calls} == {jnp.dtype(jnp.bfloat16)}
    assert {call[5] for call in on_cuda.calls} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}


def test_groups_end_where_the_rows_end(on_cuda):
    agrees(sizes_E=[10, 20, 60, 70])


def test_an_empty_expert_has_gradient_zero_with_the_kernel_that_reads_other_rows(on_cuda):
    agrees(sizes_E=[40, 0, 0, 2])


def test_without_jax_triton_the_kernels_of_mosaic_give_all_gradients(on_cuda, monkeypatch):
    module = fake_tokamax.fake(kernels=("mosaic_gpu",))
    install(monkeypatch, module)
    agrees(sizes_E=[40, 0, 0, 2], poison=np.nan)
    assert {call[0] for call in module.calls} == {"mosaic_gpu", "triton"}  # triton was asked, and refused


def test_over_a_mesh_the_kernels_are_taken_too(on_cuda):
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec("x"), PartitionSpec(), PartitionSpec("x"))
    rows_RD, kernel_EDF = jnp.ones((8, D), jnp.bfloat16), jnp.ones((2, D, F), jnp.bfloat16)

    @jax.jit
    def gradient(kernel_EDF):
        matmul = jax.shard_map(grouped_matmul, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("x"))
        return jax.grad(lambda kernel_EDF: matmul(rows_RD, kernel_EDF, jnp.array([5, 3])).sum())(kernel_EDF)

    assert gradient(kernel_EDF)[:, 0, 0].tolist() == [5, 3]
    # Two of 128 rows and more are questions; widths of 64 are what was filled up here.
    assert any(call[1] == (128, 64) for call in on_cuda.calls)


def unmasked(group_sizes_E, num_rows):
    groups = ragged.groups_of(group_sizes_E, num_rows)
    return groups, jnp.ones((num_rows, 1), bool)


FAULTS = {
    # name -> what is replaced, by what, and what is asked
    "the tail is not masked": ("_owned", unmasked, {"poison": np.nan}),
    "two dtypes meet": ("_of_one_dtype", lambda a, b: [(a, b)], {"out_dtype": jnp.float32}),
    "a side is rounded": (
        "_in_two", lambda a: [a.astype(jnp.bfloat16)], {"out_dtype": jnp.float32, "rounding": 2**-8}
    ),
    "sizes are as they were given": (
        "groups_of", lambda sizes_E, num_rows: type("Groups", (), {"sizes_E": sizes_E}), {"sizes_E": [10, 20, 60, 70]}
    ),
    "widths are as they are": ("_filled", lambda kernel, a, b: (a, b), {}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_is_seen(fault, on_cuda, monkeypatch):
    name, wrong, asked = FAULTS[fault]
    monkeypatch.setattr(ragged, name, wrong)
    with pytest.raises((AssertionError, NotImplementedError)):
        agrees(**asked)


def test_over_a_mesh_pallas_would_refuse_a_result_without_types(on_cuda, monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr(ragged, "without_types_of_meshes", nullcontext)
    with pytest.raises(ValueError, match="check_vma"):
        test_over_a_mesh_the_kernels_are_taken_too(on_cuda)
