"""moe_jax, permute: slots become rows sorted by expert, and come back as tokens (how: `rows.py`).

A slot is one (token, k) pair; slot (t, k) has the flat number t * K + k. Every slot is a row, so that shapes are
static; where fewer are promised to be used, the others share one. Rows of slots without an expert (unused, padding,
null experts) come last: they are the tail, which no expert reads and which contributes nothing, whatever it holds.

Legend: T tokens, D width of a row, K top_k, E experts, R = T * K rows.
"""

from dataclasses import dataclass

import jax
import jax.export  # jax alone does not import it
import jax.numpy as jnp
from jax import lax

from moe_jax.arrays import places_in
from moe_jax.explicit import everywhere, in_any_mode


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RouteMetadata:
    """Where each slot's row is: all that moving rows needs, and nothing about the rows themselves."""

    group_sizes_E: jax.Array
    """(E,) int32, rows of each expert; their sum is where the tail begins."""
    slot_of_row_R: jax.Array
    """(R,) int32: rows of expert 0 first, each expert's in the order of the slots, then the tail."""
    row_of_slot_TK: jax.Array
    """(T, K) int32, its inverse."""

    @property
    def token_of_row_R(self) -> jax.Array:
        """(R,) int32."""
        return self.slot_of_row_R // self.row_of_slot_TK.shape[1]

    @property
    def has_expert_TK(self) -> jax.Array:
        """(T, K) bools: whether each slot's row is before the tail."""
        return self.row_of_slot_TK < self.group_sizes_E.sum(dtype=jnp.int32)

    @property
    def has_expert_R(self) -> jax.Array:
        """(R,) bools: whether each row is before the tail."""
        return lax.iota(jnp.int32, self.slot_of_row_R.size) < self.group_sizes_E.sum(dtype=jnp.int32)

    @property
    def expert_of_row_R(self) -> jax.Array:
        """(R,) int32; E for rows of the tail."""
        return expert_of_row(self.group_sizes_E, lax.iota(jnp.int32, self.slot_of_row_R.size))

    def blank(self, rows_R: jax.Array) -> jax.Array:
        """The rows as they are: each is a slot's."""
        return rows_R

    def of_rows(self, values_TK: jax.Array) -> jax.Array:
        """(R,) the value of each row's slot."""
        return values_TK.reshape(-1).at[self.slot_of_row_R].get(mode="promise_in_bounds", unique_indices=True)


def expert_of_row(group_sizes_E: jax.Array, row_R: jax.Array) -> jax.Array:
    """int32, the expert of each of these rows, where rows are sorted by expert; E past the last."""
    return places_in(jnp.cumsum(group_sizes_E, dtype=jnp.int32), row_R, side="right")


@in_any_mode(everywhere)
def permute(expert_ids_TK: jax.Array, num_experts: int, *, most_rows: int | None = None) -> RouteMetadata:
    """Rows are sorted by expert id, and stay in the order of the tokens within an expert.

    Args:
        expert_ids_TK: (T, K) integers; ids outside [0, num_experts) belong to no expert.
        num_experts: E.
        most_rows: static; a promise that no more slots have an expert. There are so many rows, and one of the tail that
            all slots without an expert share. None: each slot has a row.
    """
    expert_ids_TK = jnp.asarray(expert_ids_TK)
    if expert_ids_TK.ndim != 2 or not jnp.issubdtype(expert_ids_TK.dtype, jnp.integer):
        found = f"{expert_ids_TK.dtype}{list(expert_ids_TK.shape)}"
        raise ValueError(f"expert_ids_TK is {found}; it is integers of 2 axes")
    R, E = expert_ids_TK.size, num_experts
    ids_R = expert_ids_TK.reshape(-1).astype(jnp.int32)
    expert_of_slot_R = jnp.where((ids_R >= 0) & (ids_R < E), ids_R, E)
    slot_of_row_R = _stable_order(expert_of_slot_R, E + 1)
    row_of_slot_R = inverse(slot_of_row_R)
    if most_rows is not None and most_rows + 1 < R:
        slot_of_row_R, row_of_slot_R = slot_of_row_R[: most_rows + 1], jnp.minimum(row_of_slot_R, most_rows)
    ends_E = places_in(expert_of_slot_R[slot_of_row_R], jnp.arange(E), side="right")
    return RouteMetadata(
        group_sizes_E=jnp.diff(ends_E, prepend=jnp.int32(0)),
        slot_of_row_R=slot_of_row_R,
        row_of_slot_TK=row_of_slot_R.reshape(expert_ids_TK.shape),
    )


def inverse(order_N: jax.Array) -> jax.Array:
    """The places of 0, 1, .. in a permutation of them."""
    return jnp.zeros_like(order_N).at[order_N].set(lax.iota(order_N.dtype, order_N.size), unique_indices=True)


def _stable_order(values_R, bound: int) -> jax.Array:
    """The stable sorting order of integers in [0, bound)."""
    R = values_R.size
    if jax.export.is_symbolic_dim(R) or bound * R >= 2**32:
        return jnp.argsort(values_R, stable=True).astype(jnp.int32)
    # Value and place in one integer: a sort of one array is 8 times as fast on CPU, and equal keys do not exist.
    keys_R = values_R.astype(jnp.uint32) * R + lax.iota(jnp.uint32, R)
    return (jnp.sort(keys_R) % max(R, 1)).astype(jnp.int32)
