"""moe_jax, grouped matmul: rows sorted by expert, each multiplied by the matrix of its expert.

Rows beyond sum(group_sizes_E), the tail, come out as exactly 0 and reach no gradient, whatever they hold. On CPU it
is a loop over the experts that have rows (`_blocked`); elsewhere the platform's ragged dot (`_ragged`).

Legend: R rows, D width in, F width out, E experts, B rows of one block.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from moe_jax.arrays import wide_dtype

BLOCK_SIZES = (8, 16, 24, 32, 48, 64, 80, 96, 128)
"""Rows of a block. A group is blocks of the last size, and one that is just large enough for the rest: a dot packs
the whole matrix of its expert, so one dot with a few unused rows is faster than several without."""

IMPLEMENTATIONS = ("auto", "blocked", "ragged")


class Groups(NamedTuple):
    """Where each expert's rows are. Groups end at R: what group sizes claim beyond it does not exist."""

    starts_E: jax.Array
    sizes_E: jax.Array
    occupied_E: jax.Array
    """Experts with rows first; only the first num_occupied are visited."""
    num_occupied: jax.Array


class Options(NamedTuple):
    """What is static: hashable, and the same forward and backward."""

    precision: Any
    out_dtype: Any
    implementation: str


def grouped_matmul(
    rows_RD: ArrayLike,
    kernel_EDF: ArrayLike,
    group_sizes_E: ArrayLike,
    *,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Each row is multiplied by the matrix of its expert; rows of the tail are exactly 0.

    Sums are in float32 at least. The gradient of the kernel is exactly 0 for an expert without rows. Differentiable
    in reverse mode, once.

    Args:
        rows_RD: (R, D) floats, sorted by expert.
        kernel_EDF: (E, D, F) floats.
        group_sizes_E: (E,) integers, rows of each expert; where their sum exceeds R the last groups are cut off.
        precision: as in jax.lax.dot.
        preferred_element_type: dtype of the result; None is that of rows and kernel.
        implementation: blocked, ragged, or auto: blocked on CPU, else ragged.

    Returns:
        rows_RF: (R, F).
    """
    rows_RD, kernel_EDF, group_sizes_E = jnp.asarray(rows_RD), jnp.asarray(kernel_EDF), jnp.asarray(group_sizes_E)
    _check(rows_RD, kernel_EDF, group_sizes_E, implementation)
    out_dtype = jnp.dtype(preferred_element_type or jnp.promote_types(rows_RD.dtype, kernel_EDF.dtype))
    options = Options(lax.Precision(precision) if isinstance(precision, str) else precision, out_dtype, implementation)
    return _grouped_matmul(options, *_vary_alike(rows_RD, kernel_EDF, group_sizes_E.astype(jnp.int32)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(options: Options, rows_RD, kernel_EDF, group_sizes_E):
    return _on_platform(
        options.implementation,
        partial(_blocked, options=options),
        partial(_ragged, options=options),
        rows_RD,
        kernel_EDF,
        group_sizes_E,
    )


def _forward(options: Options, rows_RD, kernel_EDF, group_sizes_E):
    return _grouped_matmul(options, rows_RD, kernel_EDF, group_sizes_E), (rows_RD, kernel_EDF, group_sizes_E)


def _backward(options: Options, residuals, d_rows_RF):
    rows_RD, kernel_EDF, group_sizes_E = residuals
    d_rows_RD, d_kernel_EDF = _on_platform(
        options.implementation,
        partial(_blocked_backward, options=options),
        partial(_ragged_backward, options=options),
        rows_RD,
        kernel_EDF,
        group_sizes_E,
        d_rows_RF,
    )
    return d_rows_RD, d_kernel_EDF, None


_grouped_matmul.defvjp(_forward, _backward)


def _on_platform(implementation: str, blocked: Callable, ragged: Callable, *arrays):
    """The one place where a platform is told from another, at lowering time."""
    if implementation == "auto":
        return lax.platform_dependent(*arrays, cpu=blocked, default=ragged)
    return (blocked if implementation == "blocked" else ragged)(*arrays)


# --- blocked: CPU --------------------------------------------------------------------------------------------------
# XLA lowers ragged_dot on CPU to one masked dot per expert over all rows: E times the work.


def _blocked(rows_RD, kernel_EDF, group_sizes_E, *, options: Options):
    """Rows of each expert times its matrix, block by block, written in place."""
    return _rows_times_matrices(rows_RD, kernel_EDF, group_sizes_E, 0, options.out_dtype, options.precision)


def _blocked_backward(rows_RD, kernel_EDF, group_sizes_E, d_rows_RF, *, options: Options):
    """d_rows = d_out @ matrix.T, and d_matrix = rows.T @ d_out, for each expert."""
    # The axis is told to the dot: a transposed kernel would be a second kernel in memory.
    d_rows_RD = _rows_times_matrices(d_rows_RF, kernel_EDF, group_sizes_E, 1, rows_RD.dtype, options.precision)
    return d_rows_RD, _rows_times_rows(rows_RD, d_rows_RF, group_sizes_E, kernel_EDF.dtype, options.precision)


def _rows_times_matrices(rows_RI, kernel_EDF, group_sizes_E, contract: int, out_dtype, precision):
    """Each row times its expert's matrix; `contract` is the axis of the matrix that is summed over."""
    R, width_out = rows_RI.shape[0], kernel_EDF.shape[2 - contract]
    zero_RO = lax.full_like(rows_RI, 0, out_dtype, (R, width_out))
    if R == 0 or kernel_EDF.shape[0] == 0:
        return zero_RO
    groups, load = _groups(group_sizes_E, R), _loader(rows_RI.dtype, kernel_EDF.dtype)
    rows_bits_RI, kernel_bits_EDF = _bits(rows_RI), _bits(kernel_EDF)

    def expert(i, out_RO):
        expert_id = groups.occupied_E[i]
        matrix_DF = load(kernel_bits_EDF[expert_id], kernel_EDF.dtype)

        def product(at, size: int):
            rows_BI = load(lax.dynamic_slice_in_dim(rows_bits_RI, at, size), rows_RI.dtype)
            product_BO = lax.dot_general(rows_BI, matrix_DF, (((1,), (contract,)), ((), ())), precision=precision)
            return _bits(product_BO.astype(out_dtype))

        def full(out_RO, start, size: int):
            return lax.dynamic_update_slice_in_dim(out_RO, product(start, size), start, axis=0)

        def rest(out_RO, start, count, size: int):
            at, own_B1 = _cover(start, count, size, R)
            other_BO = lax.dynamic_slice_in_dim(out_RO, at, size)
            return lax.dynamic_update_slice_in_dim(out_RO, jnp.where(own_B1, product(at, size), other_BO), at, axis=0)

        return _over_blocks(groups.starts_E[expert_id], groups.sizes_E[expert_id], R, rest, full, out_RO)

    return _floats(lax.fori_loop(0, groups.num_occupied, expert, _bits(zero_RO)), out_dtype)


def _rows_times_rows(rows_RD, rows_RF, group_sizes_E, out_dtype, precision):
    """For each expert the sum of outer products of its rows; 0 for an expert without rows."""
    R, D, F, E = rows_RD.shape[0], rows_RD.shape[1], rows_RF.shape[1], group_sizes_E.shape[0]
    zero_EDF = lax.full_like(rows_RD, 0, out_dtype, (E, D, F))
    if R == 0 or E == 0:
        return zero_EDF
    groups, load = _groups(group_sizes_E, R), _loader(rows_RD.dtype, rows_RF.dtype)
    bits_RD, bits_RF = _bits(rows_RD), _bits(rows_RF)

    def expert(i, out_EDF):
        expert_id = groups.occupied_E[i]

        def product(at, size: int, own_B1):
            # Both sides: 0 * NaN is NaN, and the rows that are not this expert's may be the tail.
            rows_BD = jnp.where(own_B1, load(lax.dynamic_slice_in_dim(bits_RD, at, size), rows_RD.dtype), 0)
            rows_BF = jnp.where(own_B1, load(lax.dynamic_slice_in_dim(bits_RF, at, size), rows_RF.dtype), 0)
            return lax.dot_general(rows_BD, rows_BF, (((0,), (0,)), ((), ())), precision=precision)

        def full(sum_DF, start, size: int):
            return sum_DF + product(start, size, True)

        def rest(sum_DF, start, count, size: int):
            at, own_B1 = _cover(start, count, size, R)
            # It is the first block of the group: nothing to add to.
            return product(at, size, own_B1)

        zero_DF = lax.full_like(rows_RD, 0, wide_dtype(rows_RD.dtype, rows_RF.dtype), (D, F))
        sum_DF = _over_blocks(groups.starts_E[expert_id], groups.sizes_E[expert_id], R, rest, full, zero_DF)
        return lax.dynamic_update_index_in_dim(out_EDF, _bits(sum_DF.astype(out_dtype)), expert_id, axis=0)

    return _floats(lax.fori_loop(0, groups.num_occupied, expert, _bits(zero_EDF)), out_dtype)


def _over_blocks(start, size, num_rows: int, rest: Callable, full: Callable, carry):
    """Every row of a group is in one block: the rest that fills no block comes first, then the full blocks.

    rest(carry, start, count, block_size) covers count rows; full(carry, start, block_size) covers block_size.
    """
    block_sizes = sorted({min(size, num_rows) for size in BLOCK_SIZES})
    largest = block_sizes[-1]
    count = (size - 1) % largest + 1
    # A loop of no or one trip, not lax.cond, which copies its carry. The trip number is part of the offset, because
    # XLA hoists what does not depend on it out of the loop and computes it for every block size.
    for smaller, block_size in zip([0, *block_sizes[:-1]], block_sizes, strict=True):
        trips = ((smaller < count) & (count <= block_size)).astype(jnp.int32)
        carry = lax.fori_loop(
            0, trips, lambda trip, carry, block_size=block_size: rest(carry, start + trip, count, block_size), carry
        )
    return lax.fori_loop(
        0, (size - count) // largest, lambda trip, carry: full(carry, start + count + trip * largest, largest), carry
    )


def _cover(start, count, size: int, num_rows: int):
    """Where a block of `size` rows over `count` rows from `start` lies inside the array, and which rows are those."""
    at = jnp.minimum(start, num_rows - size)
    row_B = at + lax.iota(jnp.int32, size)
    return at, ((row_B >= start) & (row_B < start + count))[:, None]


def _groups(group_sizes_E, num_rows: int) -> Groups:
    ends_E = jnp.minimum(jnp.cumsum(group_sizes_E, dtype=jnp.int32), num_rows)
    starts_E = jnp.concatenate([lax.full_like(ends_E, 0, shape=(1,)), ends_E[:-1]])
    empty_E = ends_E == starts_E
    return Groups(
        starts_E=starts_E,
        sizes_E=ends_E - starts_E,
        occupied_E=jnp.argsort(empty_E, stable=True).astype(jnp.int32),
        num_occupied=jnp.sum(~empty_E, dtype=jnp.int32),
    )


def _bits(array):
    """A half-precision array as integers; others as they are.

    XLA on CPU widens the array that a bfloat16 slice is taken from, the whole kernel, and not the slice.
    """
    if array.dtype.itemsize >= 4:
        return array
    return lax.bitcast_convert_type(array, jnp.uint16 if array.dtype.itemsize == 2 else jnp.uint8)


def _floats(array, dtype):
    """The inverse of `_bits`."""
    return array if array.dtype == dtype else lax.bitcast_convert_type(array, dtype)


def _loader(*dtypes) -> Callable:
    """From a slice of `_bits`, and the dtype it had, to the dtype of the sums."""
    return lambda bits, dtype: _floats(bits, dtype).astype(wide_dtype(*dtypes))


# --- ragged: GPU and TPU -------------------------------------------------------------------------------------------


def _ragged(rows_RD, kernel_EDF, group_sizes_E, *, options: Options):
    """The platform's ragged dot, between two masks: kernels leave rows of the tail unwritten."""
    groups = _groups(group_sizes_E, rows_RD.shape[0])
    own_R1 = (lax.iota(jnp.int32, rows_RD.shape[0]) < groups.sizes_E.sum())[:, None]
    sum_dtype = wide_dtype(rows_RD.dtype, kernel_EDF.dtype)
    rows_RF = _ragged_dot()(
        jnp.where(own_R1, rows_RD, 0),
        kernel_EDF,
        groups.sizes_E,
        precision=options.precision,
        preferred_element_type=jnp.promote_types(sum_dtype, options.out_dtype),
    )
    return jnp.where(own_R1, rows_RF, 0).astype(options.out_dtype)


def _ragged_backward(rows_RD, kernel_EDF, group_sizes_E, d_rows_RF, *, options: Options):
    """The masks of `_ragged` keep the tail out of both gradients."""

    def matmul(rows_RD, kernel_EDF):
        return _ragged(rows_RD, kernel_EDF, group_sizes_E, options=options)

    return jax.vjp(matmul, rows_RD, kernel_EDF)[1](d_rows_RF)


def _ragged_dot() -> Callable:
    """That of tokamax where it is installed: its kernels skip empty groups (openxla/tokamax)."""
    if importlib.util.find_spec("tokamax") is None:
        return lax.ragged_dot
    return importlib.import_module("tokamax").ragged_dot


# --- checks --------------------------------------------------------------------------------------------------------


def _vary_alike(*arrays):
    """Inside shard_map, arrays that vary over the same mesh axes; the gradient of one that did not is a sum."""
    axes = frozenset().union(*(jax.typeof(array).mat.varying for array in arrays))
    missing = [tuple(sorted(axes - jax.typeof(array).mat.varying)) for array in arrays]
    return [lax.pcast(a, axes, to="varying") if axes else a for a, axes in zip(arrays, missing, strict=True)]


def _check(rows_RD, kernel_EDF, group_sizes_E, implementation: str):
    for field, array, ndim in (("rows_RD", rows_RD, 2), ("kernel_EDF", kernel_EDF, 3)):
        if array.ndim != ndim or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{field} is {array.dtype}{list(array.shape)}; it is floats of {ndim} axes")
    E, D, _ = kernel_EDF.shape
    if rows_RD.shape[1] != D:
        raise ValueError(f"rows_RD has width {rows_RD.shape[1]}; kernel_EDF takes {D}")
    if group_sizes_E.shape != (E,) or not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        found = f"{group_sizes_E.dtype}{list(group_sizes_E.shape)}"
        raise ValueError(f"group_sizes_E is {found}; it is {E} integers, one per matrix of kernel_EDF")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}, not one of {IMPLEMENTATIONS}")
