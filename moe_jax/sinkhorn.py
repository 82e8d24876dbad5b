"""moe_jax, sinkhorn: a choice that is evened over the batch; what is computed is `moe_ref.sinkhorn`.

Legend: T tokens, E choices.
"""

import jax
import jax.numpy as jnp
from jax import lax

EPS, TOLERANCE, MOST_ROUNDS = 1e-8, 1e-4, 100


def sinkhorn(logits_TE: jax.Array, valid_T1: jax.Array) -> jax.Array:
    """(E,) logarithms of the experts' factors; padding tokens take no part in the batch. [SEL-19, SEL-20]

    A constant of the gradient. Over a mesh each shard evens its own tokens, as in Megatron.
    """
    fixed_TE, E = lax.stop_gradient(logits_TE), logits_TE.shape[1]
    largest_T1 = fixed_TE.max(axis=-1, keepdims=True, initial=-jnp.inf)
    exp_TE = jnp.exp(fixed_TE - jnp.where(jnp.isneginf(largest_T1), 0, largest_T1))
    share_TE = jnp.where(valid_T1, exp_TE, 0)
    tokens = jnp.maximum(valid_T1.sum(), 1).astype(fixed_TE.dtype)

    def step(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        before_E, _, rounds = state
        factors_T1 = 1 / (tokens * ((share_TE * before_E[None]).sum(axis=-1, keepdims=True) + EPS))
        factors_E = 1 / (E * ((share_TE * factors_T1).sum(axis=0) + EPS))
        return factors_E, jnp.abs(factors_E - before_E).mean(), rounds + 1

    # Made of the data, so that inside shard_map all three vary over the same ranks.
    zero_E = share_TE.sum(axis=0) * 0
    first = (zero_E + 1, zero_E.sum() + jnp.inf, zero_E.sum())
    return jnp.log(lax.while_loop(lambda s: (s[1] > TOLERANCE) & (s[2] < MOST_ROUNDS), step, first)[0])
