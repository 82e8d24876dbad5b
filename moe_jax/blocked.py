"""moe_jax, blocked: both products of rows in groups, block by block, in loops over the experts that have rows.

The way of a CPU, where XLA lowers a ragged dot to one masked dot per expert over all rows, E times the work; and of an
accelerator without kernels, where that dot asks for the same memory: this way needs none but its result.

Legend: R rows, D width in, F width out, E experts, B rows of one block, I and O the widths in and out of a product.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.export  # jax alone does not import it
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from moe_jax.arrays import wide_dtype

BLOCK_SIZES = (8, 16, 24, 32, 48, 64, 80, 96, 128)
"""Rows of a block. A group is blocks of the last size, and one that is just large enough for the rest: a dot packs
the whole matrix of its expert, so one dot with a few unused rows is faster than several without."""
ONE_SIZE = BLOCK_SIZES[-1:]
"""Those of an accelerator: unused rows cost it nothing, and each size is one more product to compile and, on a GPU, to
tune, and one more loop for whose trips the host waits."""


class Groups(NamedTuple):
    """Where each expert's rows are. Groups end at R: what group sizes claim beyond it does not exist."""

    starts_E: jax.Array
    sizes_E: jax.Array
    occupied_E: jax.Array
    """Experts with rows first; only the first num_occupied are visited."""
    num_occupied: jax.Array


def rows_times_matrices(
    rows_RI: jax.Array,
    kernel_EDF: jax.Array,
    group_sizes_E: jax.Array,
    contract: int,
    out_dtype: DTypeLike,
    precision: lax.PrecisionLike,
    block_sizes: tuple[int, ...] = BLOCK_SIZES,
) -> jax.Array:
    """Each row times its expert's matrix; `contract` is the axis of the matrix that is summed over."""
    num_rows, rows_RI = rows_RI.shape[0], _with_a_block(rows_RI)
    R, width_out = rows_RI.shape[0], kernel_EDF.shape[2 - contract]
    zero_RO = lax.full_like(rows_RI, 0, out_dtype, (R, width_out))
    if R == 0 or kernel_EDF.shape[0] == 0:
        return zero_RO
    groups, load = groups_of(group_sizes_E, R), _loader(rows_RI.dtype, kernel_EDF.dtype)
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

        return _over_blocks(groups.starts_E[expert_id], groups.sizes_E[expert_id], R, block_sizes, rest, full, out_RO)

    made_RO = _floats(lax.fori_loop(0, groups.num_occupied, expert, _bits(zero_RO)), out_dtype)
    return made_RO[:num_rows]


def rows_times_rows(
    rows_RD: jax.Array,
    rows_RF: jax.Array,
    group_sizes_E: jax.Array,
    out_dtype: DTypeLike,
    precision: lax.PrecisionLike,
    block_sizes: tuple[int, ...] = BLOCK_SIZES,
) -> jax.Array:
    """For each expert the sum of outer products of its rows; 0 for an expert without rows."""
    rows_RD, rows_RF = _with_a_block(rows_RD), _with_a_block(rows_RF)
    R, D, F, E = rows_RD.shape[0], rows_RD.shape[1], rows_RF.shape[1], group_sizes_E.shape[0]
    zero_EDF = lax.full_like(rows_RD, 0, out_dtype, (E, D, F))
    if R == 0 or E == 0:
        return zero_EDF
    groups, load = groups_of(group_sizes_E, R), _loader(rows_RD.dtype, rows_RF.dtype)
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
        sum_DF = _over_blocks(
            groups.starts_E[expert_id], groups.sizes_E[expert_id], R, block_sizes, rest, full, zero_DF
        )
        return lax.dynamic_update_index_in_dim(out_EDF, _bits(sum_DF.astype(out_dtype)), expert_id, axis=0)

    return _floats(lax.fori_loop(0, groups.num_occupied, expert, _bits(zero_EDF)), out_dtype)


def _with_a_block(rows):
    """Where `jax.export` leaves their number open, the rows and then zeros, so that the largest block fits in."""
    if not jax.export.is_symbolic_dim(rows.shape[0]):
        return rows
    return jnp.pad(rows, ((0, BLOCK_SIZES[-1]), (0, 0)))


def sizes_on(platform: str) -> tuple[int, ...]:
    """The rows of a block on a platform."""
    return BLOCK_SIZES if platform == "cpu" else ONE_SIZE


def _over_blocks(start, size, num_rows: int, sizes: tuple[int, ...], rest: Callable, full: Callable, carry):
    """Every row of a group is in one block: the rest that fills no block comes first, then the full blocks.

    rest(carry, start, count, block_size) covers count rows; full(carry, start, block_size) covers block_size.
    """
    block_sizes = sorted({min(size, num_rows) for size in sizes})
    largest = block_sizes[-1]
    count = (size - 1) % largest + 1
    if len(block_sizes) == 1:
        carry, block_sizes = rest(carry, start, count, largest), []
    # A loop of no or one trip, not lax.cond, which copies its carry. The trip number is part of the offset, because
    # XLA hoists what does not depend on it out of the loop and computes it for every block size.
    for smaller, block_size in pairwise([0, *block_sizes]):
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


def groups_of(group_sizes_E: jax.Array, num_rows: int) -> Groups:
    """The groups of so many rows."""
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
