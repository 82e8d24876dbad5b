"""moe_jax, balance: how tokens spread over experts, and how the balancing bias answers an uneven spread.

    expert ids -> tokens_per_expert -> bias_update, load_statistics      (what an uneven spread costs: `losses.py`)

All of it is pure: counts are returned and never kept, so that rematerialisation counts nothing twice. `axis_name` names
the mesh axes over which the tokens of a batch are spread, inside `jax.shard_map`; with it a count is that of the whole
batch, the same on every shard. What is computed is `moe_ref.balance`.

Legend: T tokens, E experts, K top_k, N = T * K slots, S ranks.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from moe_jax.arrays import AxisName, places_in, wide_dtype
from moe_jax.explicit import everywhere, in_any_mode
from moe_ref.specs.balance import BiasUpdateSpec


@in_any_mode(everywhere)
def tokens_per_expert(
    expert_ids_TK: jax.Array, num_experts: int, token_mask_T: jax.Array | None = None, *, axis_name: AxisName = None
) -> jax.Array:
    """The count of an expert is the number of slots of valid tokens that chose it. [LOD-2, LOD-3, MSK-1]

    Args:
        expert_ids_TK: (T, K) integers; unused slots (-1) and null experts (num_experts and above) are not counted.
        num_experts: E, static.
        token_mask_T: (T,) bools; a padding token (False) is not counted.
        axis_name: mesh axes over which the tokens are spread; None: these tokens alone.

    Returns:
        (E,) int32.
    """
    ids_TK = jnp.asarray(expert_ids_TK).astype(jnp.int32)
    if token_mask_T is not None:
        ids_TK = jnp.where(jnp.asarray(token_mask_T)[:, None], ids_TK, -1)
    return sum_over(axis_name, count(ids_TK.reshape(-1), num_experts))


def count(keys_N: jax.Array, num_keys: int) -> jax.Array:
    """How often each key in [0, num_keys) occurs."""
    # A sort and a search: XLA for CPU adds one entry at a time into a histogram, and for GPU in no fixed order.
    edges = places_in(jnp.sort(keys_N), jnp.arange(num_keys + 1, dtype=jnp.int32), side="left")
    return jnp.diff(edges).astype(jnp.int32)


def sum_over(axis_name: AxisName, values: Any) -> Any:
    """A tree of arrays, each summed over the mesh axes."""
    return values if axis_name is None else lax.psum(values, axis_name)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LoadStatistics:
    """How even a load is; the fields are those of `moe_ref.LoadStatistics`."""

    total: jax.Array
    mean: jax.Array
    largest: jax.Array
    smallest: jax.Array
    num_empty: jax.Array
    max_over_mean: jax.Array
    """The load of the busiest expert in units of the mean; 0 without tokens."""
    rows_of_rank_S: jax.Array
    required_buffer_factor: jax.Array
    """The busiest rank's rows in units of the mean over ranks: the smallest buffer factor that drops no row."""


def load_statistics(
    counts_E: jax.Array, *, num_ranks: int = 1, placement: tuple[int, ...] | None = None
) -> LoadStatistics:
    """Statistics of a count; ranks own equal shares of the places, in order.

    Args:
        counts_E: (E,) tokens per expert, summed over everything that is to be described.
        num_ranks: of the expert axis; it divides E.
        placement: the expert at each place; None: expert i is at place i.
    """
    counts_E = jnp.asarray(counts_E)
    E = counts_E.shape[0]
    if num_ranks < 1 or E % num_ranks:
        raise ValueError(f"num_ranks is {num_ranks}, which does not divide the {E} experts")
    if placement is not None:
        if sorted(placement) != list(range(E)):
            raise ValueError(f"placement is {placement}; it has each of the {E} expert ids once")
        placed_E = counts_E[np.asarray(placement)]
    else:
        placed_E = counts_E
    rows_of_rank_S = placed_E.reshape(num_ranks, -1).sum(axis=1)
    total = counts_E.sum()
    slots = jnp.maximum(total, 1).astype(jnp.float32)
    return LoadStatistics(
        total=total,
        mean=total.astype(jnp.float32) / E,
        largest=counts_E.max(),
        smallest=counts_E.min(),
        num_empty=(counts_E == 0).sum(),
        max_over_mean=counts_E.max() * E / slots,
        rows_of_rank_S=rows_of_rank_S,
        required_buffer_factor=rows_of_rank_S.max() * num_ranks / slots,
    )


def bias_update(
    counts_E: jax.Array,
    spec: BiasUpdateSpec,
    expert_bias_E: jax.Array,
    last_step_E: jax.Array | None = None,
    *,
    axis_name: AxisName = None,
) -> jax.Array:
    """An expert with less than its share of the load gets a larger bias, one with more a smaller. [LOD-19 .. LOD-24]

    Args:
        counts_E: (..., E) integers, leading axes are layers: counts of the whole step, summed over micro-batches and
            chunks. The sum over axis_name is taken here, before the sign.
        spec: static.
        expert_bias_E: the biases before, of the same shape.
        last_step_E: what `bias_step` returned at the step before, for a rule with momentum; None: there was none.
        axis_name: mesh axes over which the tokens are spread; None: these counts are of all.

    Returns:
        The biases after, in their own dtype.
    """
    counts_E, bias_E = jnp.asarray(counts_E), jnp.asarray(expert_bias_E)
    if counts_E.shape != bias_E.shape:
        raise ValueError(f"counts_E has shape {list(counts_E.shape)}; it is that of expert_bias_E, "
                         f"{list(bias_E.shape)}")  # fmt: skip
    dtype = wide_dtype(bias_E.dtype)
    step_E = bias_step(counts_E, spec, last_step_E, axis_name=axis_name, dtype=dtype)
    return (bias_E.astype(dtype) + step_E).astype(bias_E.dtype)


def bias_step(
    counts_E: jax.Array,
    spec: BiasUpdateSpec,
    last_step_E: jax.Array | None = None,
    *,
    axis_name: AxisName = None,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """What is added to the biases, and what momentum goes on from; arguments as in `bias_update`. [LOD-46]"""
    counts_E = jnp.asarray(counts_E)
    if not jnp.issubdtype(counts_E.dtype, jnp.integer):
        raise ValueError(
            f"counts_E is {counts_E.dtype}{list(counts_E.shape)}; it is integers of the shape of the biases"
        )
    E = counts_E.shape[-1]
    frozen_E = np.zeros(E, bool) if spec.frozen_E is None else np.array(spec.frozen_E)
    if frozen_E.shape != (E,):
        raise ValueError(f"frozen_E has {len(frozen_E)} entries; there are {E} biases")
    # Of each layer, where there are several.
    frozen_E = np.broadcast_to(frozen_E, counts_E.shape)
    free_E = ~frozen_E

    counts_E = sum_over(axis_name, counts_E)
    total_1 = jnp.where(free_E, counts_E, 0).sum(axis=-1, keepdims=True)
    # mean - count is whole_E + rest_1 / n with 0 <= rest_1 < n. In whole numbers, because a mean that is rounded gives
    # a balanced expert a sign; and divided, because n * count exceeds int32.
    n = E - sum(spec.frozen_E or ())
    whole_E, rest_1 = total_1 // n - counts_E, total_1 % n
    excess_E = whole_E.astype(dtype) + rest_1.astype(dtype) / n
    if spec.rule == "sign":
        step_E = jnp.where(whole_E != 0, jnp.sign(whole_E), jnp.sign(rest_1)).astype(dtype)
    elif spec.rule == "proportional":
        step_E = excess_E
    elif spec.rule == "share":
        every_1 = counts_E.sum(axis=-1, keepdims=True)
        share_E = counts_E.astype(dtype) / jnp.maximum(every_1, 1).astype(dtype)
        step_E = jnp.where(every_1 == 0, 0, spec.wanted_share / n - share_E)
    else:
        step_E = excess_E * n / jnp.maximum(total_1, 1).astype(dtype)
    if spec.rule == "tanh":
        step_E = jnp.tanh(spec.steepness * step_E)
    if spec.centred:
        step_E = step_E - jnp.where(free_E, step_E, 0).sum(axis=-1, keepdims=True) / n
    step_E = jnp.where(frozen_E, 0, spec.rate * step_E)
    if spec.momentum == 0:
        return step_E
    last_E = jnp.zeros_like(step_E) if last_step_E is None else last_step_E
    return spec.momentum * last_E + (1 - spec.momentum) * step_E
