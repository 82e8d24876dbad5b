"""moe_jax, rounding: numbers as the dtype of a router holds them (`RouterSpec.router_dtype`)."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from moe_jax.arrays import wide_dtype
from moe_ref.specs.router import RouterSpec


def round_to(values: jax.Array, router_dtype: str) -> jax.Array:
    """The nearest numbers of a narrow dtype, in the dtype of `values`; the gradient passes as it is. [SCR-11]"""
    if router_dtype not in ("bfloat16", "float16"):
        return values
    bits = jnp.finfo(router_dtype)
    # XLA may leave out a cast there and back; this it may not. And a cast would round the gradient too.
    rounded = lax.reduce_precision(values, exponent_bits=bits.nexp, mantissa_bits=bits.nmant)
    return jnp.where(jnp.isfinite(values), values + lax.stop_gradient(rounded - values), values)


def dtype_of_router(spec: RouterSpec, *dtypes: DTypeLike) -> DTypeLike:
    """What gate and router compute in, for inputs of these dtypes: float64 where the spec says so. [SCR-12]

    Raises:
        ValueError: router_dtype is float64, which JAX has with jax_enable_x64 alone.
    """
    if spec.router_dtype != "float64":
        return wide_dtype(*dtypes)
    if jax.dtypes.canonicalize_dtype("float64") != jnp.float64:
        raise ValueError("router_dtype is 'float64'; JAX has it with jax_enable_x64 alone")
    return jnp.float64
