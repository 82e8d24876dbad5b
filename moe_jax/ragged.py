"""moe_jax, ragged: both products of rows in groups by a ragged dot, JAX's own or that of tokamax.

What the two have in common is that rows of the tail are not theirs: they are read, and may be left unwritten. So all
that could reach a result is masked here.

Legend: R rows, D width in, F width out, E experts, I and O the widths in and out of a product.
"""

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from moe_jax.arrays import wide_dtype
from moe_jax.blocked import groups_of

OUTER = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([0], [0]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)
"""Both sides are rows, which are summed over: a matrix for each group."""
LEAST_ROWS, WIDTHS = 128, 64
"""Those kernels take their operands in tiles of 128 bytes: widths are filled up with zeros to a multiple of 64, and
rows to at least one tile."""


# JAX's own


def rows_times_matrices(
    rows_RI: jax.Array,
    kernel_EDF: jax.Array,
    group_sizes_E: jax.Array,
    contract: int,
    out_dtype: DTypeLike,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """Each row times its expert's matrix; `contract` is the axis of the matrix that is summed over."""
    groups, own_R1 = _owned(group_sizes_E, rows_RI.shape[0])
    rows_RO = lax.ragged_dot(
        jnp.where(own_R1, rows_RI, 0),
        kernel_EDF if contract == 0 else kernel_EDF.swapaxes(1, 2),
        groups.sizes_E,
        precision=precision,
        preferred_element_type=_sum_dtype(rows_RI, kernel_EDF, out_dtype),
    )
    return jnp.where(own_R1, rows_RO, 0).astype(out_dtype)


def rows_times_rows(
    rows_RD: jax.Array,
    rows_RF: jax.Array,
    group_sizes_E: jax.Array,
    out_dtype: DTypeLike,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """For each expert the sum of outer products of its rows; 0 for an expert without rows."""
    groups, own_R1 = _owned(group_sizes_E, rows_RD.shape[0])
    return lax.ragged_dot_general(
        jnp.where(own_R1, rows_RD, 0),
        jnp.where(own_R1, rows_RF, 0),
        groups.sizes_E,
        OUTER,
        precision=precision,
        preferred_element_type=_sum_dtype(rows_RD, rows_RF, out_dtype),
    ).astype(out_dtype)


def _sum_dtype(a, b, out_dtype):
    return jnp.promote_types(wide_dtype(a.dtype, b.dtype), out_dtype)


def _owned(group_sizes_E, num_rows: int):
    groups = groups_of(group_sizes_E, num_rows)
    return groups, (lax.iota(jnp.int32, num_rows) < groups.sizes_E.sum())[:, None]


# tokamax's
# Its ragged dot is differentiable, but where the result is wider than the operands its backward pass multiplies two
# dtypes, which its kernels refuse, and the next in its list is XLA's, which asks for E times the memory. So both
# products are called by name here, and moe_jax.grouped_matmul says which are the gradients of which.


def tokamax_rows_times_matrices(
    rows_RI: jax.Array,
    kernel_EDF: jax.Array,
    group_sizes_E: jax.Array,
    contract: int,
    out_dtype: DTypeLike,
    *,
    kernel: str | None,
) -> jax.Array:
    """Each row times its expert's matrix; `contract` is the axis of the matrix that is summed over.

    There is no precision to ask for: products of half precision are exact, and sums are in float32.

    Args:
        kernel: the name that tokamax has for it; None: it chooses, XLA included.
    """
    R, width_out = rows_RI.shape[0], kernel_EDF.shape[2 - contract]
    groups, own_R1 = _owned(group_sizes_E, R)
    matrices_EIO = kernel_EDF if contract == 0 else kernel_EDF.swapaxes(1, 2)
    # Rows do not meet in this product, so the tail needs no mask before it.
    total_RO = jnp.zeros((R, width_out), wide_dtype(out_dtype))
    if R and width_out and kernel_EDF.shape[0] and rows_RI.shape[1]:
        parts = _of_one_dtype(rows_RI, matrices_EIO)
        dtype = out_dtype if len(parts) == 1 else wide_dtype(out_dtype)
        found = [
            _tokamax().ragged_dot(
                *_filled(kernel, rows_RI, matrices_EIO), groups.sizes_E, preferred_element_type=dtype,
                implementation=kernel,
            )[:R, :width_out]
            for rows_RI, matrices_EIO in parts
        ]  # fmt: skip
        total_RO = sum(found[1:], start=found[0])
    return jnp.where(own_R1, total_RO, 0).astype(out_dtype)


def tokamax_rows_times_rows(
    rows_RD: jax.Array, rows_RF: jax.Array, group_sizes_E: jax.Array, out_dtype: DTypeLike, *, kernel: str | None
) -> jax.Array:
    """For each expert the sum of outer products of its rows; 0 for an expert without rows. Arguments as above."""
    (R, D), F, E = rows_RD.shape, rows_RF.shape[1], group_sizes_E.shape[0]
    if not (R and D and F and E):
        return jnp.zeros((E, D, F), out_dtype)
    groups, own_R1 = _owned(group_sizes_E, R)
    # Both sides: its kernels mask one by a product, 0 * NaN is NaN, and tiles of the last group have rows of the tail.
    parts = _of_one_dtype(jnp.where(own_R1, rows_RD, 0), jnp.where(own_R1, rows_RF, 0))
    dtype = out_dtype if len(parts) == 1 else wide_dtype(out_dtype)
    found = [
        _tokamax().ragged_dot_general(
            *_filled(kernel, rows_RD, rows_RF), groups.sizes_E, OUTER, preferred_element_type=dtype,
            implementation=kernel,
        )[:, :D, :F]
        for rows_RD, rows_RF in parts
    ]  # fmt: skip
    # Up to tokamax 0.0.15 its Triton kernel sums up rows of other groups for one that is empty.
    occupied_E11 = (groups.sizes_E > 0)[:, None, None]
    return jnp.where(occupied_E11, sum(found[1:], start=found[0]), 0).astype(out_dtype)


def _of_one_dtype(a, b) -> list[tuple[jax.Array, jax.Array]]:
    """Pairs whose products add up to a times b, each of one dtype.

    A side in float32 beside one in bfloat16, as a gradient of a wide result is, becomes the sum of two in bfloat16: 16
    bits of it count.
    """
    if a.dtype == b.dtype:
        return [(a, b)]
    if jnp.bfloat16 not in (a.dtype, b.dtype) or jnp.float32 not in (a.dtype, b.dtype):
        wide = jnp.promote_types(a.dtype, b.dtype)
        return [(a.astype(wide), b.astype(wide))]
    if a.dtype == jnp.float32:
        return [(part, b) for part in _in_two(a)]
    return [(a, part) for part in _in_two(b)]


def _in_two(array) -> Iterator[jax.Array]:
    high = lax.reduce_precision(array, exponent_bits=8, mantissa_bits=7)
    yield high.astype(jnp.bfloat16)
    # Of an infinity nothing is left.
    yield jnp.where(jnp.isfinite(high), array - high, 0).astype(jnp.bfloat16)


def _filled(kernel: str | None, rows_RI, other):
    """Both operands with zeros up to what a kernel takes; as they are where tokamax chooses."""
    if kernel is None:
        return rows_RI, other
    more_rows = max(0, LEAST_ROWS - rows_RI.shape[0])
    rows = ((0, more_rows), (0, -rows_RI.shape[1] % WIDTHS))
    if other.ndim == 2:
        return jnp.pad(rows_RI, rows), jnp.pad(other, ((0, more_rows), (0, -other.shape[1] % WIDTHS)))
    return jnp.pad(rows_RI, rows), jnp.pad(other, ((0, 0), rows[1], (0, -other.shape[2] % WIDTHS)))


def _tokamax():
    return importlib.import_module("tokamax")


def without_types_of_meshes() -> AbstractContextManager:
    """Within it, Pallas takes a kernel that does not say over which axes of a mesh its result varies, as those of
    tokamax do not; `grouped_matmul` says it for them. JAX has no public name for that.
    """
    from jax._src import config

    return config._check_vma(False) if hasattr(config, "_check_vma") else nullcontext()
