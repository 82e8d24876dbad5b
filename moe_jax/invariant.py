"""moe_jax, the batch-invariant mode: one program for one token, run on each.

Legend: T tokens, D model dim.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_ref.specs.inputs import BY_TOKEN, RouterInputs
from moe_ref.specs.router import RouterSpec


def of_each_token(
    layer: Callable[..., Any], x_TD: jax.Array, token_mask_T: jax.Array | None, inputs: RouterInputs, router: RouterSpec
) -> Any:
    """What a layer returns for each token alone, arrays of them along the first axis.

    The loop has one body, whatever T is, and barriers keep the compiler from fusing it with what is around it: fused,
    a product and a sum are rounded once, not twice.

    Args:
        layer: of (1, D) tokens and, by name, `token_mask_T` and `inputs`; its arrays have one token first.
    """
    T = x_TD.shape[0]
    own = {name: jnp.asarray(value) for name in BY_TOKEN if (value := getattr(inputs, name)) is not None}
    if router.selector == "round_robin":
        own["first_token"] = (0 if inputs.first_token is None else inputs.first_token) + lax.iota(jnp.int32, T)
    valid_T = jnp.ones(T, bool) if token_mask_T is None else jnp.asarray(token_mask_T)

    def one(token):
        x_D, valid, own = lax.optimization_barrier(token)
        of_token = {name: value if name == "first_token" else value[None] for name, value in own.items()}
        made = layer(x_D[None], token_mask_T=valid[None], inputs=replace(inputs, **of_token))
        return lax.optimization_barrier(jax.tree.map(lambda array: array[0], made))

    return lax.map(one, (jnp.asarray(x_TD), valid_T, own))
