"""moe_jax, align: the rows of each expert are padded up to a multiple, in static shapes; gathers only.

    permute -> align_rows -> dispatch -> gmm_up ...

Legend: T tokens, K top_k, E experts, R rows, A aligned rows, the tail included.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.arrays import column, places_in, take
from moe_jax.permute import RouteMetadata
from moe_ref.specs.align import AlignSpec
from moe_ref.specs.ids import UNUSED


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AlignedMetadata(RouteMetadata):
    """Where each slot's row is among A aligned ones, of which all but the slots' own are zeros and get no gradient.

    `group_sizes_E` are multiples; `slot_of_row_R` is (A,), -1 in padding rows and in the tail.
    """

    @property
    def has_expert_R(self) -> jax.Array:
        """(A,) bools: whether each row is a slot."""
        return self.slot_of_row_R != UNUSED

    @property
    def token_of_row_R(self) -> jax.Array:
        """(A,) int32; any token in a padding row."""
        return jnp.maximum(self.slot_of_row_R, 0) // self.row_of_slot_TK.shape[1]

    def blank(self, rows_R: jax.Array) -> jax.Array:
        """Rows that are no slot are 0."""
        return jnp.where(column(self.has_expert_R, rows_R.ndim), rows_R, 0)

    def of_rows(self, values_TK: jax.Array) -> jax.Array:
        """(A,) the value of each row's slot; 0 in a padding row."""
        return self.blank(take(values_TK.reshape(-1), jnp.maximum(self.slot_of_row_R, 0)))


def align_rows(metadata: RouteMetadata, spec: AlignSpec) -> AlignedMetadata:
    """Each expert has its rows rounded up to the multiple: its slots first, then sentinels. [PRM-10 .. PRM-12]

    Args:
        metadata: of `permute`.
        spec: static; `spec.max_rows` of all slots is A, so that no shape depends on the choice.
    """
    counts_E, (R,), E = metadata.group_sizes_E, metadata.slot_of_row_R.shape, len(metadata.group_sizes_E)
    A = spec.max_rows(R, E)
    blocks_E = jnp.where(counts_E == 0, spec.idle_blocks, -(-counts_E // spec.multiple))
    sizes_E = (blocks_E * spec.multiple).astype(jnp.int32)
    ends_E, aligned_ends_E = (jnp.cumsum(sizes, dtype=jnp.int32) for sizes in (counts_E, sizes_E))
    starts_E, aligned_starts_E = ends_E - counts_E, aligned_ends_E - sizes_E
    if R == 0:
        slot_of_row_A, row_of_slot_TK = jnp.full(A, UNUSED, jnp.int32), metadata.row_of_slot_TK
    else:
        row_A = lax.iota(jnp.int32, A)
        expert_A = jnp.minimum(places_in(aligned_ends_E, row_A, side="right"), E - 1)
        place_A = row_A - take(aligned_starts_E, expert_A)
        is_slot_A = place_A < take(counts_E, expert_A)
        row_of_own_A = jnp.where(is_slot_A, take(starts_E, expert_A) + place_A, 0)
        slot_of_row_A = jnp.where(is_slot_A, take(metadata.slot_of_row_R, row_of_own_A), UNUSED)
        shift_E = aligned_starts_E - starts_E
        expert_R = jnp.minimum(metadata.expert_of_row_R, E - 1)
        shifted_TK = metadata.row_of_slot_TK + take(take(shift_E, expert_R), metadata.row_of_slot_TK)
        # With a slot that has no expert there is a tail, and the last row is in it.
        row_of_slot_TK = jnp.where(metadata.has_expert_TK, shifted_TK, A - 1)
    return AlignedMetadata(group_sizes_E=sizes_E, slot_of_row_R=slot_of_row_A, row_of_slot_TK=row_of_slot_TK)
