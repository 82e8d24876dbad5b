"""moe_jax, capacity: an expert takes a bounded number of slots, and the rest are dropped.

    route -> apply_capacity -> permute ...

A dropped slot becomes an unused one, id -1 and weight 0, so that no later stage knows of capacity. Which slots are kept
is a constant of the gradient. What is computed is `moe_ref.apply_capacity`.

Legend: T tokens, K top_k, E experts, N = T * K slots, U units (the batch, or its sequences), C places of an expert.
"""

from dataclasses import dataclass
from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from moe_jax.arrays import AxisName, places_in
from moe_jax.explicit import by_token, in_any_mode
from moe_jax.permute import _stable_order
from moe_ref.specs.balance import CapacitySpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KeptSlots:
    """What is left of a choice."""

    expert_ids_TK: jax.Array
    """-1 where a slot was dropped."""
    weights_TK: jax.Array
    """0 where a slot was dropped."""
    dropped_TK: jax.Array
    """Slots that had an expert and are dropped."""
    place_TK: jax.Array
    """The place of a kept slot among its expert's in its unit, in drop order; -1 for others."""


@in_any_mode(by_token)
def apply_capacity(
    expert_ids_TK: jax.Array,
    weights_TK: jax.Array,
    spec: CapacitySpec,
    num_experts: int,
    *,
    token_mask_T: jax.Array | None = None,
    sequence_of_T: jax.Array | None = None,
    num_sequences: int = 1,
    axis_name: AxisName = None,
) -> KeptSlots:
    """An expert keeps the first C slots of each unit, in drop order, and the others are dropped. [CAP-3 .. CAP-7]

    `pad_to_capacity` changes no value: `slot_table` has the padded form, on which `dense_matmul` always computes.

    Args:
        expert_ids_TK: (T, K) ints; -1 is an unused slot. Null experts (num_experts and above) drop nothing.
        weights_TK: (T, K).
        spec: static.
        num_experts: E, without null experts.
        token_mask_T: (T,) bools; a padding token (False) gets ids -1 and weights 0, and takes no place.
        sequence_of_T: (T,) ints in [0, num_sequences), for scope 'sequence'; None: one sequence.
        num_sequences: static.
        axis_name: mesh axes of `jax.shard_map` over which the batch is spread, and its sequences may be: for scopes
            'global' and 'sequence' the choices are gathered, T * K small numbers of each shard. None: all is here.
    """
    ids_TK, weights_TK = jnp.asarray(expert_ids_TK).astype(jnp.int32), jnp.asarray(weights_TK)
    valid_T = jnp.ones(len(ids_TK), bool) if token_mask_T is None else jnp.asarray(token_mask_T)
    given_ids_TK = jnp.where(valid_T[:, None], ids_TK, -1)
    given_TK = jnp.where(given_ids_TK >= 0, weights_TK, 0)
    unit_of_T, num_units = jnp.zeros(len(ids_TK), jnp.int32), 1
    if spec.scope == "sequence" and sequence_of_T is not None:
        unit_of_T, num_units = jnp.asarray(sequence_of_T).astype(jnp.int32), num_sequences

    choice = (given_ids_TK, lax.stop_gradient(given_TK), valid_T, unit_of_T)
    if spec.scope != "rank" and axis_name is not None:
        ids, weights, valid, unit = lax.all_gather(choice, axis_name, tiled=True)
        first = lax.axis_index(axis_name) * len(ids_TK)
        of_all = _kept(ids, weights, valid, unit, spec, num_experts, num_units)
        kept_TK, place_TK = (lax.dynamic_slice_in_dim(each, first, len(ids_TK)) for each in of_all)
    else:
        kept_TK, place_TK = _kept(*choice, spec, num_experts, num_units, all_valid=token_mask_T is None)
    first = KeptSlots(
        expert_ids_TK=jnp.where(kept_TK, given_ids_TK, -1),
        weights_TK=_renormalise(given_TK, kept_TK, spec),
        dropped_TK=(given_ids_TK >= 0) & ~kept_TK,
        place_TK=place_TK,
    )
    if spec.then is None:
        return first
    second = apply_capacity(
        first.expert_ids_TK, first.weights_TK, spec.then, num_experts, token_mask_T=token_mask_T,
        sequence_of_T=sequence_of_T, num_sequences=num_sequences, axis_name=axis_name,
    )  # fmt: skip
    return KeptSlots(
        expert_ids_TK=second.expert_ids_TK,
        weights_TK=second.weights_TK,
        dropped_TK=first.dropped_TK | second.dropped_TK,
        place_TK=second.place_TK,
    )


def _kept(
    ids_TK, weights_TK, valid_T, unit_of_T, spec: CapacitySpec, num_experts: int, num_units: int, *, all_valid=False
) -> tuple[jax.Array, jax.Array]:
    """Whether each slot keeps its expert, as slots of null experts do, and its place."""
    (T, K), E, U = ids_TK.shape, num_experts, num_units
    has_expert_TK = (ids_TK >= 0) & (ids_TK < E)
    keys_TK = jnp.where(has_expert_TK, ids_TK + unit_of_T[:, None] * E, U * E)
    if spec.drop_order == "slot_major":
        place_TK = _places(keys_TK.T.reshape(-1), U * E).reshape(K, T).T
    elif spec.drop_order == "by_best_weight":
        by_best_T = jnp.argsort(-weights_TK.max(axis=-1), stable=True)
        sorted_TK = _places(keys_TK[by_best_T].T.reshape(-1), U * E).reshape(K, T).T
        place_TK = jnp.zeros_like(sorted_TK).at[by_best_T].set(sorted_TK, unique_indices=True)
    elif spec.drop_order == "by_weight":
        order_N = jnp.argsort(-weights_TK.reshape(-1), stable=True)
        places_N = _places(keys_TK.reshape(-1)[order_N], U * E)
        place_TK = jnp.zeros_like(places_N).at[order_N].set(places_N, unique_indices=True).reshape(T, K)
    else:
        place_TK = _places(keys_TK.reshape(-1), U * E).reshape(T, K)
    if all_valid and U == 1:
        capacity_T = jnp.full(T, spec.capacity(T, K, E))
    else:
        tokens_U = (valid_T[:, None] & (unit_of_T[:, None] == jnp.arange(U)[None])).sum(axis=0, dtype=jnp.int32)
        # A table: the product in a capacity exceeds int32, and in float32 it would not be exact.
        capacity_T = jnp.asarray(capacities(spec, T, K, E))[tokens_U][unit_of_T]
    inside_TK = has_expert_TK & (place_TK < capacity_T[:, None])
    return inside_TK | ((ids_TK >= 0) & ~has_expert_TK), jnp.where(inside_TK, place_TK, -1)


def capacities(spec: CapacitySpec, max_tokens: int, top_k: int, num_experts: int) -> np.ndarray:
    """`spec.capacity` of 0, 1, .. max_tokens valid tokens. [CAP-3]"""
    tokens = np.arange(max_tokens + 1, dtype=np.int64)
    over, under = spec.factor_ratio
    if spec.slots is not None:
        wanted = np.full_like(tokens, spec.slots)
    elif spec.rounding == "ceil_then_floor":
        wanted = -(-tokens * top_k // num_experts) * over // under
    elif spec.rounding == "ceil":
        wanted = -(-tokens * top_k * over // (num_experts * under))
    else:
        wanted = tokens * top_k * over // (num_experts * under)
    return np.minimum(np.maximum(wanted, spec.min_slots), tokens).astype(np.int32)


def most_slots(spec: CapacitySpec, num_tokens: int, top_k: int, num_experts: int, num_sequences: int = 1) -> int:
    """A static bound on the slots that one expert keeps of all the tokens; the capacity itself where that is one."""
    units = num_sequences if spec.scope == "sequence" else 1
    if units == 1:
        bound = spec.capacity(num_tokens, top_k, num_experts)
    elif spec.slots is not None:
        bound = units * max(spec.slots, spec.min_slots)
    else:
        # Each unit rounds up once, by less than 1 or, before the factor, by less than the factor.
        factor = spec.factor or 0
        balanced = ceil(factor * num_tokens * top_k / num_experts) + 1
        bound = balanced + units * (max(1, ceil(factor)) + spec.min_slots)
    if spec.then is not None:
        bound = min(bound, most_slots(spec.then, num_tokens, top_k, num_experts, num_sequences))
    return min(bound, num_tokens)


def slot_table(
    kept: KeptSlots, num_experts: int, num_places: int, *, unit_of_T: ArrayLike | None = None, num_units: int = 1
) -> jax.Array:
    """(U, E, C) the flat slot number t * K + k at each place of each expert, -1 where it is empty. [CAP-13]

    Args:
        num_places: C, static; places beyond it are left off.
        unit_of_T: (T,) the unit (sequence or shard) of each token, in [0, num_units); None: all are one.
    """
    T, K = kept.expert_ids_TK.shape
    unit_T = jnp.zeros(T, jnp.int32) if unit_of_T is None else jnp.asarray(unit_of_T)
    # No place: past the end, which drops it. (-1 would be the last one.)
    place_TK = jnp.where(kept.place_TK < 0, num_places, kept.place_TK)
    table_UEC = jnp.full((num_units, num_experts, num_places), -1, jnp.int32)
    numbers_TK = lax.iota(jnp.int32, T * K).reshape(T, K)
    return table_UEC.at[unit_T[:, None], kept.expert_ids_TK, place_TK].set(numbers_TK, mode="drop")


def slot_places(expert_ids_TK: jax.Array, num_experts: int) -> jax.Array:
    """(T, K) the place of each slot among those of its expert, in the order of the tokens."""
    keys_TK = jnp.where((expert_ids_TK >= 0) & (expert_ids_TK < num_experts), expert_ids_TK, num_experts)
    return _places(keys_TK.reshape(-1), num_experts).reshape(keys_TK.shape)


def _places(keys_N, bound: int) -> jax.Array:
    """How many earlier entries have the same key, for keys in [0, bound]."""
    N = keys_N.size
    order_N = _stable_order(keys_N, bound + 1)
    sorted_N = keys_N[order_N]
    starts = places_in(sorted_N, jnp.arange(bound + 1, dtype=keys_N.dtype), side="left")
    places_N = lax.iota(jnp.int32, N) - starts[sorted_N]
    return jnp.zeros_like(places_N).at[order_N].set(places_N, unique_indices=True)


def _renormalise(given_TK, kept_TK, spec: CapacitySpec) -> jax.Array:
    """Kept weights stay, or are divided by the sum of a token's weights, before or after the drop. [CAP-9]"""
    kept_weights_TK = jnp.where(kept_TK, given_TK, 0)
    if spec.renormalise == "no":
        return kept_weights_TK
    in_sum_TK = given_TK if spec.renormalise == "before" else kept_weights_TK
    # In units of the largest weight: the gradient of a quotient holds sum ** -2, which is inf in float32 from 1e-20.
    largest_T1 = lax.stop_gradient(in_sum_TK.max(axis=-1, keepdims=True))
    zero_T1 = largest_T1 < jnp.finfo(in_sum_TK.dtype).tiny
    unit_T1 = jnp.where(zero_T1, 1, largest_T1)
    sum_T1 = jnp.where(zero_T1, 1, (in_sum_TK / unit_T1).sum(axis=-1, keepdims=True))
    return jnp.where(zero_T1, 0, spec.weight_sum * (kept_weights_TK / unit_T1) / sum_T1)
