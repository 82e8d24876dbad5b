"""moe_jax, arrays: the small moves that several stages make."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

AxisName = str | tuple[str, ...] | None
"""Mesh axes of `jax.shard_map`; None: what is here alone."""


def take(values: jax.Array, places: jax.Array) -> jax.Array:
    """values[places], without a bounds check: the places are known to exist. Of no values at all, 0."""
    values = jnp.asarray(values)
    if values.shape[0] == 0 and places.size:  # padding rows of a batch without tokens
        return lax.full_like(values, 0, shape=(*places.shape, *values.shape[1:]))
    return jnp.asarray(values).at[places].get(mode="promise_in_bounds")


def column(values_T: jax.Array, ndim: int) -> jax.Array:
    """The values along the first of ndim axes."""
    return values_T.reshape(-1, *[1] * (ndim - 1))


def wide_dtype(*dtypes: DTypeLike) -> DTypeLike:
    """Routing and sums are computed in float64 where that is what comes in, else in float32."""
    return jnp.float64 if jnp.float64 in dtypes else jnp.float32
