"""moe_jax, arrays: the small moves that several stages make."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

AxisName = str | tuple[str, ...] | None
"""Mesh axes of `jax.shard_map`; None: what is here alone."""


def take(values: jax.Array, places: jax.Array) -> jax.Array:
    """values[places], without a bounds check: the places are known to exist. Of no values at all, 0."""
    values = jnp.asarray(values)
    if values.shape[0] == 0 and places.size:  # padding rows of a batch without tokens
        return lax.full_like(values, 0, shape=(*places.shape, *values.shape[1:]))
    return jnp.asarray(values).at[places].get(mode="promise_in_bounds")


def places_in(sorted_N: jax.Array, values: jax.Array, *, side: str) -> jax.Array:
    """int32, how many of the sorted numbers are below each value ("left"), or at most it ("right").

    `jnp.searchsorted`, which fails in a shard_map over some axes of a mesh (jax 0.10.2), and for a length left open.
    """
    sorted_N, values = vary_alike(jnp.asarray(sorted_N), jnp.asarray(values))
    N = sorted_N.shape[0]

    def halve(_, ends):
        low, high = ends
        middle = (low + high) // 2
        pivots = take(sorted_N, jnp.minimum(middle, N - 1))
        is_past = (low < high) & (pivots < values if side == "left" else pivots <= values)
        return jnp.where(is_past, middle + 1, low), jnp.where(is_past, high, middle)

    none = jnp.zeros_like(values, dtype=jnp.int32)
    steps = N.bit_length() if isinstance(N, int) else 31
    return lax.fori_loop(0, steps, halve, (none, none + N))[0]


def starts(sizes_S: jax.Array) -> jax.Array:
    """int32, where each of some runs of these sizes begins, which lie one after the other."""
    return jnp.cumsum(sizes_S, dtype=jnp.int32) - sizes_S


def column(values_T: jax.Array, ndim: int) -> jax.Array:
    """The values along the first of ndim axes."""
    return values_T.reshape(-1, *[1] * (ndim - 1))


def wide_dtype(*dtypes: DTypeLike) -> DTypeLike:
    """Routing and sums are computed in float64 where that is what comes in, else in float32."""
    return jnp.float64 if jnp.float64 in dtypes else jnp.float32


def array_like(array: Any, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """The type of an array that varies over the axes of a mesh that another type varies over."""
    sharding = array.sharding.update(spec=PartitionSpec(*[None] * len(shape)))
    return array.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


def vary_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Inside shard_map, arrays that vary over the same mesh axes; the gradient of one that did not is a sum."""
    axes = frozenset().union(*(jax.typeof(array).mat.varying for array in arrays))
    missing = [tuple(sorted(axes - jax.typeof(array).mat.varying)) for array in arrays]
    return [lax.pcast(a, axes, to="varying") if axes else a for a, axes in zip(arrays, missing, strict=True)]
