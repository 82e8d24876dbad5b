"""moe_jax, tests: a stand-in for tokamax 0.0.17 on an H100, which checks what its kernels check and leaves what they
leave.

Its kernels refuse operands of two dtypes or of float32, and widths that are no multiple of 128 bytes. They write no row
of the tail. Mosaic's for rows with rows reads whole tiles: it takes what is outside of a group out by a product with 0.
Triton's, up to 0.0.15, sums up rows of another group for one that is empty.
"""

from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.experimental import pallas as pl
from jax.extend.core import Primitive

TILE = 128
DEFAULT = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([1], [1]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


uncompiled_p = Primitive("uncompiled")
"""What can be traced, and not lowered."""
uncompiled_p.def_abstract_eval(lambda array: ShapedArray(array.shape, array.dtype))


def fake(*, kernels=("mosaic_gpu", "triton"), contracting=("mosaic_gpu", "triton"), without=(), old=()) -> ModuleType:
    """A module of the name. Kernels that it was built without are unknown; some have no product of rows with rows; of
    those that are old the compiler fails.
    """
    module = ModuleType("tokamax")
    module.calls = []

    def ragged_dot_general(
        lhs,
        rhs,
        group_sizes,
        ragged_dot_dimension_numbers,
        precision=None,
        preferred_element_type=None,
        group_offset=None,
        activation=None,
        manual_axis_type=None,
        *,
        implementation=None,
    ):
        module.calls.append(
            (implementation, lhs.shape, rhs.shape, lhs.dtype, rhs.dtype, jnp.dtype(preferred_element_type))
        )
        if group_offset is not None:
            raise NotImplementedError("`group_offset` is not yet supported.")
        if implementation is None:
            return lax.ragged_dot_general(
                lhs, rhs, group_sizes, ragged_dot_dimension_numbers, preferred_element_type=preferred_element_type
            )
        if implementation not in kernels:
            raise ValueError(f"Unknown implementation: {implementation}")
        if lhs.dtype != rhs.dtype:
            raise NotImplementedError(f"lhs and rhs must have same dtype (got {lhs.dtype=}, {rhs.dtype=}).")
        if lhs.dtype not in (jnp.bfloat16, jnp.float16):
            raise NotImplementedError(f"Only bfloat16/float16 inputs are supported (got {lhs.dtype=}).")
        if lhs.shape[1] % 64 or rhs.shape[-1] % 64 or lhs.shape[0] < TILE:
            raise NotImplementedError("a tile does not fit")
        if group_sizes.dtype != jnp.int32:
            raise TypeError("group sizes are no int32")
        if ragged_dot_dimension_numbers == DEFAULT:
            assert rhs.shape[:2] == (*group_sizes.shape, lhs.shape[1])
            product = _rows_with_matrices
        else:
            assert not ragged_dot_dimension_numbers.rhs_group_dimensions
            assert lhs.shape[0] == rhs.shape[0]
            if implementation not in contracting:
                raise NotImplementedError("Only default `ragged_dot_dimension_numbers` supported.")
            product = partial(_rows_with_rows, of_triton=implementation == "triton")
        wide = [side.astype(jnp.float32) for side in (lhs, rhs)]
        found = product(*wide, group_sizes).astype(preferred_element_type or lhs.dtype)
        if implementation in old:
            found = uncompiled_p.bind(found)
        # Sizes beyond the rows send a kernel out of its arrays.
        return jnp.where(group_sizes.sum() <= lhs.shape[0], _by_pallas(found), jnp.nan)

    module.ragged_dot_general = ragged_dot_general
    module.ragged_dot = lambda lhs, rhs, group_sizes, **rest: ragged_dot_general(lhs, rhs, group_sizes, DEFAULT, **rest)
    for name in without:
        delattr(module, name)
    return module


def _rows_with_matrices(lhs, rhs, group_sizes):
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(len(lhs))[:, None]
    group = jnp.searchsorted(ends, row[:, 0], side="right")
    found = jnp.einsum("rd,rdf->rf", lhs, rhs[jnp.minimum(group, len(rhs) - 1)])
    return jnp.where(row < ends[-1], found, jnp.nan)


def _rows_with_rows(lhs, rhs, group_sizes, *, of_triton: bool):
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(len(lhs))[:, None]

    def of_group(start, end):
        if of_triton:
            # Of an empty group its last step is all that there is, and it masks no row.
            start = jnp.where(end > start, start, start - 32)
            inside = (row >= start) & (row < end)
            return jnp.where(inside, lhs, 0).T @ jnp.where(inside, rhs, 0)
        tiles = (row >= start // TILE * TILE) & (row < -(-end // TILE) * TILE)
        inside = ((row >= start) & (row < end)).astype(lhs.dtype)
        return (jnp.where(tiles, lhs, 0) * inside).T @ jnp.where(tiles, rhs, 0)

    return jax.vmap(of_group)(ends - group_sizes, ends)


def _by_pallas(array):
    """A kernel whose result has no word on the axes of a mesh."""

    def copy(source, target):
        target[...] = source[...]

    return pl.pallas_call(copy, out_shape=jax.ShapeDtypeStruct(array.shape, array.dtype), interpret=True)(array)
