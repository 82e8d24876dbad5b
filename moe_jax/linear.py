"""moe_jax, linear: derivatives and batches of JAX primitives that are linear in some of their arrays."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad


def jvp_in_each(product: Primitive, num_others: Callable[[dict[str, Any]], int]) -> Callable:
    """The rule of a product that is linear in each of its first arrays, and has no derivative by the others.

    Args:
        num_others: how many these are, by the static arguments.
    """

    def rule(primals, tangents, **static):
        out, count = product.bind(*primals, **static), len(primals) - num_others(static)
        parts = [
            product.bind(*primals[:at], tangent, *primals[at + 1 :], **static)
            for at, tangent in enumerate(tangents[:count])
            if type(tangent) is not ad.Zero
        ]
        return out, sum(parts[1:], start=parts[0]) if parts else jnp.zeros_like(out)

    return rule


def one_by_one(product: Primitive) -> Callable:
    """The rule of vmap for what no single call does for a batch: a loop."""

    def rule(arrays, axes, **static):
        moved = [a if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in zip(arrays, axes, strict=True)]
        in_batch = [a for a, axis in zip(moved, axes, strict=True) if axis is not None]

        def one(own):
            left = iter(own)
            return product.bind(
                *(a if axis is None else next(left) for a, axis in zip(moved, axes, strict=True)), **static
            )

        return lax.map(one, in_batch), 0

    return rule
