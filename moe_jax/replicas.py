"""moe_jax, redundant experts: a choice of experts becomes one of places, and what places have comes home to experts.

    place_ids_TK = place_slots(decided.expert_ids_TK, replicas)
    params_of_places = replicate(params, replicas)          # differentiated through, its gradient is `home` of that

Legend: T tokens, K top_k, E experts, P places, R replicas.
"""

from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.arrays import places_in
from moe_ref.specs.params import LayerParams
from moe_ref.specs.replicas import ReplicaSpec


def place_slots(expert_ids_TK: jax.Array, spec: ReplicaSpec) -> jax.Array:
    """A slot goes to one place of its expert; -1 stays -1, and null experts are numbered on past the places."""
    table_ER, counts_E = spec.table()
    return place_by_table(
        expert_ids_TK, jnp.asarray(table_ER, jnp.int32), jnp.asarray(counts_E, jnp.int32), spec.num_places,
        in_turn=spec.choice == "in_turn",
    )  # fmt: skip


def place_by_table(
    expert_ids_TK: jax.Array,
    table_ER: jax.Array,
    counts_E: jax.Array,
    num_places: jax.Array | int,
    *,
    in_turn: bool = False,
) -> jax.Array:
    """The same of a table that changes while a program runs: `ReplicaSpec.table`, R as large as it ever is."""
    E, ids_S = len(counts_E), expert_ids_TK.reshape(-1)
    number_S = jnp.arange(len(ids_S), dtype=ids_S.dtype)
    if in_turn:
        # A stable sort has the slots of an expert side by side, in their order.
        order_S = jnp.argsort(ids_S, stable=True)
        sorted_S = ids_S[order_S]
        turn_S = number_S - places_in(sorted_S, sorted_S, side="left").astype(ids_S.dtype)
        number_S = jnp.zeros_like(ids_S).at[order_S].set(turn_S)
    expert_S = jnp.clip(ids_S, 0, E - 1)
    place_S = table_ER[expert_S, number_S % counts_E[expert_S]].astype(ids_S.dtype)
    null_S = ids_S - E + jnp.asarray(num_places, ids_S.dtype)
    place_S = jnp.where(ids_S >= E, null_S, jnp.where(ids_S < 0, ids_S, place_S))
    return place_S.reshape(expert_ids_TK.shape)


def home(values_P: jax.Array, spec: ReplicaSpec) -> jax.Array:
    """(E, ...) the sums over the places of each expert, of counts or of gradients."""
    placement_P = jnp.asarray(np.array(spec.placement), jnp.int32)
    return jax.ops.segment_sum(values_P, placement_P, num_segments=spec.num_experts)


def replicate(params: LayerParams, spec: ReplicaSpec) -> LayerParams:
    """The routed experts at their places; the gradient of a place is added to that of its expert."""
    order_P, changes = np.array(spec.placement), {}
    for field in fields(LayerParams):
        value: Any = getattr(params, field.name)
        if field.name.startswith(("w_", "b_")) and value is not None:
            changes[field.name] = jnp.asarray(value)[order_P]
    return replace(params, **changes)
