"""moe_jax, permute: slots become rows sorted by expert, and come back as tokens; gathers only, in both directions.

A slot is one (token, k) pair; slot (t, k) has the flat number t * K + k. Every slot is a row, so that shapes are
static; where fewer are promised to be used, the others share one. Rows of slots without an expert (unused, padding,
null experts) come last: they are the tail, which no expert reads and which contributes nothing, whatever it holds.

Legend: T tokens, D width of a row, K top_k, E experts, R = T * K rows.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.arrays import column, take, wide_dtype


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
        ends_E = jnp.cumsum(self.group_sizes_E, dtype=jnp.int32)
        return jnp.searchsorted(ends_E, lax.iota(jnp.int32, self.slot_of_row_R.size), side="right").astype(jnp.int32)

    def blank(self, rows_R: jax.Array) -> jax.Array:
        """The rows as they are: each is a slot's."""
        return rows_R

    def of_rows(self, values_TK: jax.Array) -> jax.Array:
        """(R,) the value of each row's slot."""
        return values_TK.reshape(-1).at[self.slot_of_row_R].get(mode="promise_in_bounds", unique_indices=True)


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
    ends_E = jnp.searchsorted(expert_of_slot_R[slot_of_row_R], jnp.arange(E), side="right").astype(jnp.int32)
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
    if bound * R >= 2**32:
        return jnp.argsort(values_R, stable=True).astype(jnp.int32)
    # Value and place in one integer: a sort of one array is 8 times as fast on CPU, and equal keys do not exist.
    keys_R = values_R.astype(jnp.uint32) * R + lax.iota(jnp.uint32, R)
    return (jnp.sort(keys_R) % max(R, 1)).astype(jnp.int32)


@jax.custom_vjp
def dispatch(x_TD: jax.Array, metadata: RouteMetadata) -> jax.Array:
    """A row is the token of its slot; any (T, ...) array can be dispatched.

    Rows of the tail hold tokens too, and their gradient is not read.

    Returns:
        rows_RD: (R, D), in the order of `metadata.slot_of_row_R`.
    """
    return metadata.blank(take(x_TD, metadata.token_of_row_R))


def _dispatch_forward(x_TD, metadata: RouteMetadata):
    return dispatch(x_TD, metadata), metadata


def _dispatch_backward(metadata: RouteMetadata, d_rows_RD):
    """A token's gradient is the sum over its slots, in slot order: gathers, whose order is fixed, unlike scatters'."""
    return _sum_of_slots(d_rows_RD, metadata, None).astype(d_rows_RD.dtype), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def unpermute(rows_RD: jax.Array, metadata: RouteMetadata, weights_TK: jax.Array | None = None) -> jax.Array:
    """A token's output is the weighted sum of its slots' rows, in slot order; rows of the tail are 0 in it.

    Args:
        rows_RD: (R, D), in the order of `dispatch`.
        weights_TK: (T, K); None is all ones.

    Returns:
        output_TD: (T, D), in the dtype of the rows; summed in float32 at least.
    """
    return _sum_of_slots(rows_RD, metadata, weights_TK).astype(rows_RD.dtype)


def _unpermute_forward(rows_RD, metadata: RouteMetadata, weights_TK):
    # Without weights the rows are not needed backward.
    return unpermute(rows_RD, metadata, weights_TK), (None if weights_TK is None else rows_RD, metadata, weights_TK)


def _unpermute_backward(residuals, d_output_TD):
    rows_RD, metadata, weights_TK = residuals
    own_R1 = metadata.has_expert_R[:, None]
    d_gathered_RD = jnp.where(own_R1, take(d_output_TD, metadata.token_of_row_R), 0)
    if weights_TK is None:
        return d_gathered_RD, None, None
    weight_R1 = metadata.of_rows(weights_TK)[:, None]
    d_rows_RD = jnp.where(own_R1, d_gathered_RD * weight_R1, 0).astype(rows_RD.dtype)
    dtype = wide_dtype(rows_RD.dtype, weights_TK.dtype)
    products_RD = jnp.where(own_R1, rows_RD, 0).astype(dtype) * d_gathered_RD.astype(dtype)
    d_weights_TK = jnp.where(metadata.has_expert_TK, take(products_RD.sum(axis=-1), metadata.row_of_slot_TK), 0).astype(
        weights_TK.dtype
    )
    return d_rows_RD, None, d_weights_TK


unpermute.defvjp(_unpermute_forward, _unpermute_backward)


def _sum_of_slots(rows_RD, metadata: RouteMetadata, weights_TK) -> jax.Array:
    """One gather per slot, which the compiler fuses with the sum: no (T, K, D) array."""
    T, K = metadata.row_of_slot_TK.shape
    dtypes = [rows_RD.dtype] if weights_TK is None else [rows_RD.dtype, weights_TK.dtype]
    dtype = wide_dtype(*dtypes)
    output_TD = jnp.zeros((T, *rows_RD.shape[1:]), dtype)
    for slot in range(K):
        # Selected, not multiplied by a weight of 0: the tail may hold NaN.
        own_T1 = column(metadata.has_expert_TK[:, slot], rows_RD.ndim)
        rows_TD = jnp.where(own_T1, take(rows_RD, metadata.row_of_slot_TK[:, slot]), 0).astype(dtype)
        output_TD += rows_TD if weights_TK is None else rows_TD * weights_TK[:, slot, None].astype(dtype)
    return output_TD
