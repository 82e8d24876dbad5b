"""moe_jax, taking: each expert takes the tokens of the batch that rank best for it.

Legend: T tokens, E experts, C tokens that each expert takes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.permute import inverse
from moe_ref.specs.router import RouterSpec


def take_tokens(ranked_TE: jax.Array, valid_T1: jax.Array | None, spec: RouterSpec) -> jax.Array:
    """Each expert takes the C valid tokens that rank best for it, ties to the lower token. [SEL-30 .. SEL-34]

    Args:
        ranked_TE: (T, E) choice scores.
        valid_T1: (T, 1) bools, False for padding; None: no token is.
        spec: static.

    Returns:
        scores_for_choice_TE: -inf where the expert did not take the token.
    """
    T = ranked_TE.shape[0]
    if valid_T1 is None:
        most = jnp.int32(spec.takes(T))
    else:
        ranked_TE = jnp.where(valid_T1, ranked_TE, -jnp.inf)
        # A table: how many are valid is known on the device alone, and the product may exceed int32.
        most = jnp.asarray(spec.takes(np.arange(T + 1, dtype=np.int64)), jnp.int32)[valid_T1.sum(dtype=jnp.int32)]
    # Signed zeros tie in a sort of jax.
    order_ET = jnp.argsort(-ranked_TE.T, axis=-1, stable=True).astype(jnp.int32)
    rank_ET = jax.vmap(inverse)(order_ET)
    return lax.stop_gradient(jnp.where(most > rank_ET.T, ranked_TE, -jnp.inf))
