"""moe_jax, collectives: the ragged all-to-all, on every platform. To be called inside shard_map.

Legend: N rows to send, M rows of the output, S ranks of the axis, C rows of a block.
"""

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from moe_jax.arrays import column, take


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
    all_to_all of blocks. Differentiable in reverse mode, once; the runs that a rank sends do not overlap.

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
    return _ragged_all_to_all(axis_name, *varying)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged_all_to_all(axis_name: str, *arrays):
    return _on_platform(partial(_in_blocks, axis_name), partial(_native, axis_name), *arrays)


def _forward(axis_name: str, operand, output, *sizes):
    return _ragged_all_to_all(axis_name, operand, output, *sizes), (operand, sizes)


def _backward(axis_name: str, residuals, d_result):
    """What was received goes back to where it came from; what was not sent has gradient 0."""
    operand, (input_offsets_S, send_sizes_S, output_offsets_S, recv_sizes_S) = residuals
    begins_S, back_to_S = _begins(axis_name, output_offsets_S), _begins(axis_name, input_offsets_S)
    d_operand = _ragged_all_to_all(
        axis_name, d_result, jnp.zeros_like(operand), begins_S, recv_sizes_S, back_to_S, send_sizes_S
    )
    _, received_M = _source_of_row(begins_S, recv_sizes_S, len(d_result))
    return d_operand, jnp.where(column(received_M, d_result.ndim), 0, d_result), None, None, None, None


_ragged_all_to_all.defvjp(_forward, _backward)


def _on_platform(in_blocks: Callable, native: Callable, *arrays):
    """The one place where a platform is told from another, at lowering time."""
    return lax.platform_dependent(*arrays, cpu=in_blocks, default=native)


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


_same_on_ranks = Primitive("same_on_ranks")
_same_on_ranks.def_abstract_eval(
    lambda array, *, axis_name: array.update(manual_axis_type=array.mat.update(varying=array.mat.varying - {axis_name}))
)
mlir.register_lowering(_same_on_ranks, lambda _, array, *, axis_name: [array])


def same_on_ranks(array: jax.Array, axis_name: str) -> jax.Array:
    """The array as one that does not vary over a mesh axis: every rank has computed the same. It has no gradient.

    JAX knows that of its own collectives alone, and the ragged all-to-all is none of those; a sum or a gather would
    send once more what every rank has.
    """
    return _same_on_ranks.bind(array, axis_name=axis_name) if axis_name in jax.typeof(array).mat.varying else array
