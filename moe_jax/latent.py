"""moe_jax, the latent: a width of the routed experts' own, before and after them.

Legend: T tokens, D model dim, H latent dim.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.params import LayerParams


def compress(x_TD: jax.Array, params: LayerParams, *, precision: lax.PrecisionLike = None) -> jax.Array:
    """What the routed experts see: (T, H), or the tokens where there is no latent."""
    if params.latent_w_down_DH is None:
        return x_TD
    return jnp.matmul(x_TD, params.latent_w_down_DH, precision=precision)


def expand(
    combined_TH: jax.Array, params: LayerParams, spec: LayerSpec, *, precision: lax.PrecisionLike = None
) -> jax.Array:
    """(T, D) the routed output, of the weighted sum of the experts; the norm is computed in float32 at least."""
    if spec.latent is None:
        return combined_TH
    assert params.latent_w_up_HD is not None
    if spec.latent.norm_eps is not None:
        assert params.latent_norm_H is not None
        wide_TH = combined_TH.astype(jnp.promote_types(combined_TH.dtype, jnp.float32))
        square_T1 = jnp.mean(jnp.square(wide_TH), axis=-1, keepdims=True)
        normed_TH = wide_TH * lax.rsqrt(square_T1 + spec.latent.norm_eps) * jnp.asarray(params.latent_norm_H)[None]
        combined_TH = normed_TH.astype(combined_TH.dtype)
    return jnp.matmul(combined_TH, params.latent_w_up_HD, precision=precision)
