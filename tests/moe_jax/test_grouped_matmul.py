"""moe_jax, tests of the grouped matmul: value and gradients against moe_ref's experts, one expert at a time."""

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from moe_jax.blocked import BLOCK_SIZES
from moe_jax.choice import without_tokamax
from moe_jax.grouped_matmul import grouped_matmul
from moe_ref.backward.layer import project_backward
from moe_ref.experts import project

# Where tokamax is installed (a row of tools/matrix), on a CPU it does what it does without a kernel.
IMPLEMENTATIONS = ("blocked", "ragged", *(() if without_tokamax() else ("tokamax",)))
D, F = 11, 7
# Sums of some hundreds of float64 products, in another order than the reference's.
SAME: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
LARGEST = BLOCK_SIZES[-1]

SMALL = [  # R = 37
    [7, 0, 11, 2, 13],
    [0, 0, 37, 0, 0],
    [37, 0, 0, 0, 0],
    [0, 0, 0, 0, 36],
    [1, 1, 1, 1, 1],
    [8, 8, 8, 8, 5],
    [0, 0, 0, 0, 0],
]
LARGE = [  # R = 2 * LARGEST + 61: full blocks, remainders, and blocks that hang over the end of the rows
    [LARGEST, LARGEST, 61],
    [0, 2 * LARGEST + 61, 0],
    [LARGEST + 1, 0, LARGEST + 59],
    [2 * LARGEST + 1, 3, 50],
]
CASES = [*((37, sizes) for sizes in SMALL), *((2 * LARGEST + 61, sizes) for sizes in LARGE)]


def reference(rows_RD, kernel_EDF, group_sizes_E, d_rows_RF):
    """Value and gradients, expert by expert; rows of the tail stay 0."""
    value_RF = np.zeros((len(rows_RD), kernel_EDF.shape[2]))
    d_rows_RD, d_kernel_EDF = np.zeros(rows_RD.shape), np.zeros(kernel_EDF.shape)
    end = 0
    for expert_id, size in enumerate(group_sizes_E):
        own, end = slice(end, end + size), end + size
        value_RF[own] = project(rows_RD[own], kernel_EDF[expert_id])
        d_rows_RD[own], d_kernel_EDF[expert_id], _ = project_backward(
            d_rows_RF[own], rows_RD[own], kernel_EDF[expert_id], None
        )
    return value_RF, d_rows_RD, d_kernel_EDF


@lru_cache
def compiled(implementation):
    """Value and gradients in one jitted function, so that shapes alone decide what is compiled."""

    @jax.jit
    def run(rows_RD, kernel_EDF, group_sizes_E, d_rows_RF):
        matmul = partial(grouped_matmul, group_sizes_E=group_sizes_E, implementation=implementation)
        value_RF, pull = jax.vjp(matmul, rows_RD, kernel_EDF)
        return value_RF, *pull(d_rows_RF)

    return run


def arrays(num_rows, num_experts, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((num_rows, D), (num_experts, D, F), (num_rows, F))
    return tuple(rng.standard_normal(shape) for shape in shapes)


def run(implementation, rows_RD, kernel_EDF, group_sizes_E, d_rows_RF):
    with jax.enable_x64(True):
        found = compiled(implementation)(rows_RD, kernel_EDF, np.array(group_sizes_E, np.int32), d_rows_RF)
    return [np.asarray(array) for array in found]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("num_rows", "group_sizes_E"), CASES)
def test_each_row_meets_the_matrix_of_its_expert(num_rows, group_sizes_E, implementation):
    rows_RD, kernel_EDF, d_rows_RF = arrays(num_rows, len(group_sizes_E))
    found = run(implementation, rows_RD, kernel_EDF, group_sizes_E, d_rows_RF)
    for array, expected in zip(found, reference(rows_RD, kernel_EDF, group_sizes_E, d_rows_RF), strict=True):
        assert array.dtype == np.float64
        np.testing.assert_allclose(array, expected, **SAME)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e300])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_tail_is_zero_and_reaches_no_gradient(implementation, poison):
    sizes = [7, 0, 11, 2, 3]
    rows_RD, kernel_EDF, d_rows_RF = arrays(37, 5)
    expected = reference(rows_RD, kernel_EDF, sizes, d_rows_RF)
    rows_RD[sum(sizes) :] = poison
    d_rows_RF[sum(sizes) :] = -poison
    first = run(implementation, rows_RD, kernel_EDF, sizes, d_rows_RF)
    second = run(implementation, rows_RD, kernel_EDF, sizes, d_rows_RF)
    for array, again, wanted in zip(first, second, expected, strict=True):
        np.testing.assert_allclose(array, wanted, **SAME)
        np.testing.assert_array_equal(array, again)
    for rows in first[:2]:
        np.testing.assert_array_equal(rows[sum(sizes) :], 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_expert_without_rows_has_gradient_zero(implementation):
    sizes = [7, 0, 11, 0, 3]
    # Poisoned matrices too: nothing multiplies them.
    rows_RD, kernel_EDF, d_rows_RF = arrays(37, 5)
    kernel_EDF[[1, 3]] = np.nan if implementation == "blocked" else 0
    value_RF, d_rows_RD, d_kernel_EDF = run(implementation, rows_RD, kernel_EDF, sizes, d_rows_RF)
    np.testing.assert_array_equal(d_kernel_EDF[[1, 3]], 0)
    assert (d_kernel_EDF[[0, 2, 4]] != 0).all()
    assert np.isfinite(value_RF).all()
    assert np.isfinite(d_rows_RD).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_groups_end_where_the_rows_end(implementation):
    rows_RD, kernel_EDF, d_rows_RF = arrays(37, 5)
    found = run(implementation, rows_RD, kernel_EDF, [10, 20, 30, 40, 50], d_rows_RF)
    for array, expected in zip(found, reference(rows_RD, kernel_EDF, [10, 20, 7, 0, 0], d_rows_RF), strict=True):
        np.testing.assert_allclose(array, expected, **SAME)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_rows_give_no_rows_and_gradient_zero(implementation):
    rows_RD, kernel_EDF, d_rows_RF = arrays(0, 5)
    value_RF, d_rows_RD, d_kernel_EDF = run(implementation, rows_RD, kernel_EDF, [0] * 5, d_rows_RF)
    assert value_RF.shape == (0, F)
    assert d_rows_RD.shape == (0, D)
    np.testing.assert_array_equal(d_kernel_EDF, np.zeros((5, D, F)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "rounding"), [(jnp.bfloat16, 2**-8), (jnp.float16, 2**-11)])
def test_half_precision_is_rounded_once(dtype, rounding, implementation):
    # Positive numbers, over many blocks and wide rows: nothing cancels, and sums in half precision would drift.
    num_rows, width = 16 * LARGEST + 3, 512
    rng = np.random.default_rng(0)
    shapes = (num_rows, width), (2, width, 3), (num_rows, 3)
    rows_RD, kernel_EDF, d_rows_RF = (jnp.asarray(rng.uniform(0.5, 1, shape), dtype) for shape in shapes)
    found = compiled(implementation)(rows_RD, kernel_EDF, jnp.array([num_rows, 0]), d_rows_RF)
    exact = (np.asarray(array, np.float64) for array in (rows_RD, kernel_EDF, d_rows_RF))
    exact_rows_RD, exact_kernel_EDF, exact_d_rows_RF = exact
    expected = reference(exact_rows_RD, exact_kernel_EDF, [num_rows, 0], exact_d_rows_RF)
    for array, wanted in zip(found, expected, strict=True):
        assert array.dtype == dtype
        # One rounding, and float32 sums.
        np.testing.assert_allclose(np.asarray(array, np.float64), wanted, rtol=rounding + 1e-5)


def test_the_result_has_the_preferred_dtype():
    rows_RD, kernel_EDF = jnp.full((8, D), 1 / 3, jnp.bfloat16), jnp.ones((1, D, F), jnp.bfloat16)
    found = grouped_matmul(rows_RD, kernel_EDF, jnp.array([8]), preferred_element_type=jnp.float32)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, float(rows_RD[0, 0]) * D, rtol=1e-6)  # some float32 roundings


def test_no_array_of_the_size_of_the_kernel_is_made_in_between():
    E, R = 64, 512
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((R, 64), (E, 64, 128))]
    sizes, d_rows_RF = jax.ShapeDtypeStruct((E,), jnp.int32), jax.ShapeDtypeStruct((R, 128), jnp.float32)
    memory = compiled("blocked").lower(*shapes, sizes, d_rows_RF).compile().memory_analysis()
    assert memory is not None
    # Blocks of rows and one matrix; the gradients themselves are outputs.
    assert memory.temp_size_in_bytes < 4 * E * 64 * 128 / 2
    assert memory.temp_size_in_bytes < 4 * E * R * 128 / 8


def test_it_is_differentiable_any_number_of_times_forward_and_in_reverse():
    sizes_E = np.array([4, 0, 3], np.int32)
    rows_RD, kernel_EDF, _ = arrays(9, 3)

    def plain(rows_RD, kernel_EDF, sizes_E):
        own_RE = jnp.arange(9)[:, None] < jnp.cumsum(sizes_E)
        own_RE &= ~jnp.pad(own_RE, ((0, 0), (1, 0)))[:, :-1]
        return jnp.einsum("rd,edf,re->rf", rows_RD, kernel_EDF, own_RE)

    @partial(jax.jit, static_argnums=0)
    def derivatives(matmul, rows_RD, kernel_EDF):
        def value(rows_RD, kernel_EDF, sizes_E):
            return jnp.sin(matmul(jnp.sin(rows_RD), kernel_EDF**2, sizes_E)).sum()

        def along(rows_RD, kernel_EDF):
            gradient = jax.grad(lambda *at: value(*at, sizes_E), argnums=(0, 1))
            return jax.jvp(gradient, (rows_RD, kernel_EDF), (rows_RD + 1, kernel_EDF - 1))

        def length(rows_RD, kernel_EDF):
            return sum((part**2).sum() for part in jax.tree.leaves(along(rows_RD, kernel_EDF)))

        batches = rows_RD * jnp.arange(1, 3)[:, None, None], jnp.stack([sizes_E, sizes_E[::-1]])
        in_batches = jax.vmap(jax.grad(value, argnums=1), in_axes=(0, None, 0))
        third = jax.grad(length, argnums=(0, 1))(rows_RD, kernel_EDF)
        return along(rows_RD, kernel_EDF), third, in_batches(batches[0], kernel_EDF, batches[1])

    with jax.enable_x64(True):
        found, expected = (derivatives(matmul, rows_RD, kernel_EDF) for matmul in (grouped_matmul, plain))
    for array, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(array, wanted, rtol=1e-10, atol=1e-10)


def test_under_shard_map_the_gradient_of_a_replicated_kernel_is_the_sum():
    rows_RD, kernel_EDF, d_rows_RF = (jnp.asarray(array, jnp.float32) for array in arrays(8, 3))
    sizes = jnp.array([5, 0, 2])
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",), axis_types=(AxisType.Auto,))
    by_row, whole = PartitionSpec("x"), PartitionSpec()
    sharded = jax.shard_map(grouped_matmul, mesh=mesh, in_specs=(by_row, whole, by_row), out_specs=by_row)

    @partial(jax.jit, static_argnums=0)
    def gradients(matmul, rows_RD, kernel_EDF):
        value_RF, pull = jax.vjp(lambda rows, kernel: matmul(rows, kernel, sizes), rows_RD, kernel_EDF)
        return value_RF, *pull(d_rows_RF)

    both = (gradients(matmul, rows_RD, kernel_EDF) for matmul in (sharded, grouped_matmul))
    for found, expected in zip(*both, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows_RD": np.zeros((4, 3), np.float32)}, "rows_RD has width 3; kernel_EDF takes 2"),
        ({"rows_RD": np.zeros(4, np.float32)}, "rows_RD is float32"),
        ({"kernel_EDF": np.zeros((1, 2, 2), np.int32)}, "kernel_EDF is int32"),
        ({"group_sizes_E": np.zeros(3, np.int32)}, "group_sizes_E is int32.*it is 1 integers"),
        ({"group_sizes_E": np.zeros(1, np.float32)}, "group_sizes_E is float32"),
        ({"implementation": "dense"}, "implementation is 'dense'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    fitting = {"rows_RD": np.zeros((4, 2), np.float32), "kernel_EDF": np.zeros((1, 2, 2), np.float32)}
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**{**fitting, "group_sizes_E": np.zeros(1, np.int32), **change})


def test_matrices_of_some_groups_meet_the_rows_of_those_alone():
    rng = np.random.default_rng(0)
    rows_RD, kernel_EDF = rng.standard_normal((12, 3)).astype(np.float32), rng.standard_normal((2, 3, 4), np.float32)
    sizes_G = np.array([3, 0, 4, 2, 1], np.int32)
    starts_G = np.cumsum(sizes_G) - sizes_G

    @jax.jit
    def run(rows_RD, kernel_EDF, offset):
        def product(rows_RD, kernel_EDF):
            return grouped_matmul(rows_RD, kernel_EDF, sizes_G, group_offset=offset)

        out_RF, pull = jax.vjp(product, rows_RD, kernel_EDF)
        return out_RF, *pull(jnp.ones_like(out_RF))

    for offset in range(4):
        wanted_RF, d_rows_RD, d_kernel_EDF = np.zeros((12, 4)), np.zeros((12, 3)), np.zeros((2, 3, 4))
        for e in range(2):
            own = slice(starts_G[offset + e], starts_G[offset + e] + sizes_G[offset + e])
            wanted_RF[own] = rows_RD[own] @ kernel_EDF[e]
            d_rows_RD[own] = kernel_EDF[e].sum(axis=1)
            d_kernel_EDF[e] = rows_RD[own].sum(axis=0)[:, None]
        found = run(rows_RD, kernel_EDF, np.array([offset], np.int32))
        for own, wanted in zip(found, (wanted_RF, d_rows_RD, d_kernel_EDF), strict=True):
            np.testing.assert_allclose(own, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="group_offset is float32"):
        grouped_matmul(rows_RD, kernel_EDF, sizes_G, group_offset=0.5)
    with pytest.raises(ValueError, match="group_offset is 9"):
        grouped_matmul(rows_RD, kernel_EDF, sizes_G, group_offset=9)
