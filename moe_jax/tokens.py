"""moe_jax, tokens: an array (..., D) is T tokens, in the order of its leading axes.

Legend: T tokens, D model dim, L tokens of a sequence.
"""

import math

import jax
import jax.export  # jax alone does not import it
import jax.numpy as jnp
from jax import lax

from moe_ref.specs.align import AlignSpec
from moe_ref.specs.balance import CapacitySpec
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.router import RouterSpec


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


def check_open(
    x_TD: jax.Array,
    router: RouterSpec,
    *,
    capacity: CapacitySpec | None = None,
    align: AlignSpec | None = None,
    num_token_chunks: int = 1,
) -> None:
    """Where `jax.export` leaves the number of tokens open, nothing is asked for that is a number made of it.

    Raises:
        ValueError: it names what is.
    """
    T = x_TD.shape[0]
    if not jax.export.is_symbolic_dim(T):
        return
    by_share = router.selector == "expert_choice"
    asked = {
        f"selector is {router.selector!r}, of which each expert takes a share of the tokens": by_share,
        f"capacity is {capacity}, a number of slots for each number of tokens": capacity is not None,
        f"align is {align}, which bounds the number of rows": align is not None,
        f"num_token_chunks is {num_token_chunks}, which may not divide the tokens": num_token_chunks != 1,
    }
    for what, is_asked in asked.items():
        if is_asked:
            raise ValueError(f"{what}; x has {T} tokens, which is no number yet: export with one")


def sequences_of(x: jax.Array, sequence_of_T: jax.Array | None, num_sequences: int) -> tuple[jax.Array | None, int]:
    """The number of each token's sequence, and how many there are; not given, each (L, D) of (..., L, D) is one."""
    if sequence_of_T is not None or jnp.ndim(x) <= 2:
        return flat("sequence_of_T", sequence_of_T, x), num_sequences
    *lead, L = jnp.shape(x)[:-1]
    return lax.iota(jnp.int32, math.prod(lead) * L) // max(L, 1), math.prod(lead)


def like_tokens(output_TD: jax.Array, x: jax.Array) -> jax.Array:
    """The output in the shape and the dtype of the tokens, also where parameters are wider."""
    return (output_TD if jnp.ndim(x) == 2 else output_TD.reshape(jnp.shape(x))).astype(jnp.result_type(x))
