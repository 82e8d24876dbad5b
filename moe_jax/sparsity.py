"""moe_jax, sparsity: the coefficient of an L1 loss, moved by how many experts tokens had.

What is computed is `moe_ref.next_coefficient`. The coefficient is an array: a loss of coeff 1 is multiplied by it, so
that no step compiles anew.

Legend: L layers, E experts.
"""

import jax
import jax.numpy as jnp

from moe_jax.arrays import AxisName
from moe_jax.balance import sum_over
from moe_ref.specs.sparsity import SparsitySpec

HALF = 1 << 15
"""What int32 is split at, so that sums over layers stay in it."""


def next_coefficient(
    coeff: jax.Array,
    counts_LE: jax.Array,
    num_tokens: jax.Array | int,
    spec: SparsitySpec,
    *,
    axis_name: AxisName = None,
) -> jax.Array:
    """The coefficient is multiplied by factor where tokens had more experts than they are to, else divided. [LOD-49]

    Args:
        coeff: (), before.
        counts_LE: (L, E) int32, the slots of each expert in each layer, over the micro-batches of the step.
        num_tokens: (), their valid tokens, each of which all layers saw; times target_top_k it is below 2 ** 31.
        spec: static.
        axis_name: mesh axes over which the tokens are spread; None: these tokens alone.

    Returns:
        (), in the dtype of coeff.
    """
    counts_LE, num_tokens = sum_over(axis_name, (jnp.asarray(counts_LE), jnp.asarray(num_tokens, jnp.int32)))
    excess_L = counts_LE.astype(jnp.int32).sum(axis=-1) - spec.target_top_k * num_tokens
    # Exact, though the sum over layers may exceed int32: high * HALF + low, with low from 0 to HALF - 1.
    low = (excess_L % HALF).sum()
    high, low = (excess_L // HALF).sum() + low // HALF, low % HALF
    coeff = jnp.asarray(coeff)
    return jnp.where((high > 0) | ((high == 0) & (low > 0)), coeff * spec.factor, coeff / spec.factor)
