"""moe_jax, tokens: an array (..., D) is T tokens, in the order of its leading axes.

Legend: T tokens, D model dim, L tokens of a sequence.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from moe_ref.specs.layer import LayerSpec


def flat_tokens(x: jax.Array, spec: LayerSpec) -> jax.Array:
    """(T, D): the tokens, one after the other.

    Raises:
        ValueError: x is not floats of the spec's width.
    """
    shape, D = jnp.shape(x), spec.experts.dim
    if not shape or shape[-1] != D or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise ValueError(f"x is {jnp.result_type(x)}{list(shape)}; it is floats of shape (..., {D})")
    x = jnp.asarray(x)
    return x if x.ndim == 2 else x.reshape(-1, D)


def flat(field: str, values: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """(T,): one value of each token, which came in the leading shape of x, or flat; None stays None.

    Raises:
        ValueError: there is not one for each token; it names the field.
    """
    if values is None:
        return None
    shape, lead = jnp.shape(values), jnp.shape(x)[:-1]
    if shape == lead:
        return jnp.asarray(values) if len(lead) == 1 else jnp.asarray(values).reshape(-1)
    flat_T = jnp.asarray(values)
    if len(lead) == 1 or len(shape) != 1 or shape[0] != math.prod(lead):
        raise ValueError(f"{field} is {flat_T.dtype}{list(shape)}; tokens are {list(lead)}")
    return flat_T


def sequences_of(x: jax.Array, sequence_of_T: jax.Array | None, num_sequences: int) -> tuple[jax.Array | None, int]:
    """The number of each token's sequence, and how many there are; not given, each (L, D) of (..., L, D) is one."""
    if sequence_of_T is not None or jnp.ndim(x) <= 2:
        return flat("sequence_of_T", sequence_of_T, x), num_sequences
    *lead, L = jnp.shape(x)[:-1]
    return lax.iota(jnp.int32, math.prod(lead) * L) // max(L, 1), math.prod(lead)


def like_tokens(output_TD: jax.Array, x: jax.Array) -> jax.Array:
    """The output in the shape of the tokens."""
    return output_TD if jnp.ndim(x) == 2 else output_TD.reshape(jnp.shape(x))
