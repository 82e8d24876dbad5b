"""moe_jax, collectives: the ragged all-to-all, on every platform, and a gather by it. To be called inside shard_map.

Both move rows and change none: they are primitives of JAX, linear in rows, each with another move as its transpose, so
that their derivatives of any order and mode are such moves too.

Legend: N rows to send, M rows of the output, S ranks of the axis, C rows of a block; of the gather R rows here, N in
all, D their width.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from moe_jax.arrays import array_like, column, starts, take
from moe_jax.linear import one_by_one


def ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets_S: jax.Array,
    send_sizes_S: jax.Array,
    output_offsets_S: jax.Array,
    recv_sizes_S: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    """Each rank sends a run of rows to each rank; rows of `output` that nobody sent keep what they hold.

    `jax.lax.ragged_all_to_all` where the platform has it. XLA has none for CPU (jax-ml/jax#34755): there it is an
    all_to_all of blocks. Differentiable any number of times, forward and in reverse; the runs that a rank sends do not
    overlap.

    Args:
        operand: (N, ...) rows to send.
        output: (M, ...) of the same dtype and width.
        input_offsets_S: (S,) int32, where in `operand` the run for each rank begins.
        send_sizes_S: (S,) int32, its rows.
        output_offsets_S: (S,) int32, where in the output of each rank the run from this one begins.
        recv_sizes_S: (S,) int32, rows that come from each rank.
        axis_name: of the mesh.

    Returns:
        (M, ...) rows.
    """
    if operand.shape[1:] != output.shape[1:] or operand.dtype != output.dtype:
        found = f"{operand.dtype}{list(operand.shape)} and {output.dtype}{list(output.shape)}"
        raise ValueError(f"operand and output are {found}; they differ in their number of rows alone")
    axes = jax.typeof(operand).mat.varying | jax.typeof(output).mat.varying | {axis_name}
    if len(operand) == 0 or len(output) == 0:
        return vary(output, axes)
    sizes = (input_offsets_S, send_sizes_S, output_offsets_S, recv_sizes_S)
    varying = (vary(array, axes) for array in (operand, output, *(size.astype(jnp.int32) for size in sizes)))
    return ragged_p.bind(*varying, axis_name=axis_name)


def rows_of_all(rows_RD: jax.Array, output_ND: jax.Array, sizes_S: jax.Array, *, axis_name: str) -> jax.Array:
    """Every rank gets the first sizes_S[s] rows of each rank s, one rank after the other; the same on all of them.

    A ragged all-gather. The gradient of a row is in that of the result, which every rank has: nothing is sent for it.

    Args:
        rows_RD: (R, D) rows of this rank.
        output_ND: (N, D), what the result holds past those rows; it has no gradient.
        sizes_S: (S,) int32, the same on all ranks.

    Returns:
        (N, D) rows, which do not vary over the axis.
    """
    axes = jax.typeof(rows_RD).mat.varying | jax.typeof(output_ND).mat.varying | {axis_name}
    if len(rows_RD) == 0 or len(output_ND) == 0:
        return same_on_ranks(vary(output_ND, axes), axis_name)
    arrays = (rows_RD, lax.stop_gradient(output_ND), sizes_S.astype(jnp.int32))
    return gather_p.bind(*(vary(array, axes) for array in arrays), axis_name=axis_name)


# the two as primitives, linear in the rows that are sent and in those that lie there


ragged_p, gather_p = Primitive("ragged_all_to_all_of_rows"), Primitive("rows_of_all_ranks")


@ragged_p.def_abstract_eval
def _(operand, output, *_: Any, axis_name: str):
    return array_like(output, output.shape, output.dtype)


@gather_p.def_abstract_eval
def _(rows_RD, output_ND, _, *, axis_name: str):
    return _unvaried(array_like(output_ND, output_ND.shape, output_ND.dtype), axis_name)


def _gather(axis_name: str, rows_RD, output_ND, sizes_S):
    """Each rank sends the same run to all."""
    me, none_S = lax.axis_index(axis_name), jnp.zeros_like(sizes_S)
    sent = (none_S, none_S + sizes_S[me], none_S + starts(sizes_S)[me], sizes_S)
    return same_on_ranks(ragged_p.bind(rows_RD, output_ND, *sent, axis_name=axis_name), axis_name)


def _jvp(product: Primitive):
    """Rows that were sent, and rows that lay there, move as their numbers do."""

    def rule(primals, tangents, **static):
        out = product.bind(*primals, **static)
        moved = [
            jnp.zeros_like(primal) if type(tangent) is ad.Zero else tangent
            for primal, tangent in zip(primals[:2], tangents[:2], strict=True)
        ]
        return out, product.bind(*moved, *primals[2:], **static)

    return rule


def _ragged_transpose(d_result, operand, output, input_offsets_S, send_sizes_S, output_offsets_S, recv_sizes_S, *,
                      axis_name: str):  # fmt: skip
    """What was received goes back to where it came from; what was not sent has gradient 0."""
    d_operand = d_output = None
    if type(d_result) is not ad.Zero:
        begins_S, back_to_S = _begins(axis_name, output_offsets_S), _begins(axis_name, input_offsets_S)
        if ad.is_undefined_primal(operand):
            there = vary(jnp.zeros(operand.aval.shape, d_result.dtype), jax.typeof(d_result).mat.varying)
            d_operand = ragged_p.bind(
                d_result, there, begins_S, recv_sizes_S, back_to_S, send_sizes_S, axis_name=axis_name
            )
        if ad.is_undefined_primal(output):
            _, received_M = _source_of_row(begins_S, recv_sizes_S, len(d_result))
            d_output = jnp.where(column(received_M, d_result.ndim), 0, d_result)
    return d_operand, d_output, None, None, None, None


def _gather_transpose(d_result_ND, rows_RD, output_ND, sizes_S, *, axis_name: str):
    """A rank reads the part that its own rows are in."""
    if type(d_result_ND) is ad.Zero:
        return None, None, None
    assert not ad.is_undefined_primal(output_ND)
    me, row_R = lax.axis_index(axis_name), lax.iota(jnp.int32, rows_RD.aval.shape[0])
    place_R = starts(sizes_S)[me] + row_R
    found_RD = take(vary(d_result_ND, {axis_name}), jnp.minimum(place_R, len(d_result_ND) - 1))
    return jnp.where(column(row_R < sizes_S[me], found_RD.ndim), found_RD, 0), None, None


def _computed(function: Callable) -> Callable:
    """As a function of arrays and of the axis by name."""
    return lambda *arrays, axis_name: function(axis_name, *arrays)


def _native(axis_name: str, *arrays):
    return lax.ragged_all_to_all(*arrays, axis_name=axis_name)


def _in_blocks(axis_name: str, operand, output, input_offsets_S, send_sizes_S, output_offsets_S, recv_sizes_S):
    """The run for each rank in a block that holds any run; what of it is another's rows is not read there."""
    N, M = len(operand), len(output)
    C = min(N, M)
    places_SC = jnp.minimum(input_offsets_S[:, None] + lax.iota(jnp.int32, C)[None], N - 1)
    blocks = take(operand, places_SC.reshape(-1))
    arrived = lax.all_to_all(blocks, axis_name, split_axis=0, concat_axis=0, tiled=True)
    begins_S = _begins(axis_name, output_offsets_S)
    source_M, received_M = _source_of_row(begins_S, recv_sizes_S, M)
    places_M = source_M * C + lax.iota(jnp.int32, M) - begins_S[source_M]
    found = take(arrived, jnp.where(received_M, places_M, 0))
    return jnp.where(column(received_M, output.ndim), found, output)


def _begins(axis_name: str, offsets_S) -> jax.Array:
    """Offsets that each rank has for each: to those that each rank has from each."""
    return lax.all_to_all(offsets_S, axis_name, split_axis=0, concat_axis=0, tiled=True)


def _source_of_row(begins_S, sizes_S, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """The rank that each row came from, and whether it came at all."""
    row_M1 = lax.iota(jnp.int32, num_rows)[:, None]
    from_MS = (begins_S[None] <= row_M1) & (row_M1 < (begins_S + sizes_S)[None])
    return jnp.argmax(from_MS, axis=1).astype(jnp.int32), from_MS.any(axis=1)


def vary(array: jax.Array, axes: Iterable[str]) -> jax.Array:
    """The array as one that varies over these mesh axes too; its gradient is the sum over those that are new."""
    missing = tuple(sorted(set(axes) - jax.typeof(array).mat.varying))
    return lax.pcast(array, missing, to="varying") if missing else array


def _unvaried(array: Any, axis_name: str) -> Any:
    """The type of an array that does not vary over an axis."""
    return array.update(manual_axis_type=array.mat.update(varying=array.mat.varying - {axis_name}))


_same_on_ranks = Primitive("same_on_ranks")
_same_on_ranks.def_abstract_eval(lambda array, *, axis_name: _unvaried(array, axis_name))
mlir.register_lowering(_same_on_ranks, lambda _, array, *, axis_name: [array])
batching.primitive_batchers[_same_on_ranks] = lambda arrays, axes, **static: (
    _same_on_ranks.bind(*arrays, **static),
    axes[0],
)


def same_on_ranks(array: jax.Array, axis_name: str) -> jax.Array:
    """The array as one that does not vary over a mesh axis: every rank has computed the same. It has no gradient.

    JAX knows that of its own collectives alone, and the ragged all-to-all is none of those; a sum or a gather would
    send once more what every rank has.
    """
    return _same_on_ranks.bind(array, axis_name=axis_name) if axis_name in jax.typeof(array).mat.varying else array


for _product, _way, _transpose in ((ragged_p, _native, _ragged_transpose), (gather_p, _gather, _gather_transpose)):
    _product.def_impl(jax.jit(partial(_product.bind), static_argnames="axis_name"))
    ad.primitive_jvps[_product] = _jvp(_product)
    ad.primitive_transposes[_product] = _transpose
    batching.primitive_batchers[_product] = one_by_one(_product)
    mlir.register_lowering(_product, mlir.lower_fun(_computed(_way), multiple_results=False))
# The one place where a platform is told from another, at lowering time.
mlir.register_lowering(ragged_p, mlir.lower_fun(_computed(_in_blocks), multiple_results=False), platform="cpu")
