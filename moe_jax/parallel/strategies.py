"""moe_jax, strategies: how the rows of a token shard reach the ranks of their experts and come back, a class each.

To be called inside shard_map. Rows travel sorted by the place of their expert, then by token; a rank sorts what arrived
by its own experts, and the rows of one expert stay in the order of their source ranks. Null experts and unused slots
never travel. `moe_ref.strategies` says the same, rank by rank.

Legend: T tokens of a shard, K top_k, D model dim, E experts, e experts on this rank, S ranks of the expert axis,
C rows of a block, A rows that arrive, R rows worked on.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.align import AlignedMetadata, align_rows
from moe_jax.arrays import places_in, starts, take
from moe_jax.parallel.collectives import ragged_all_to_all, rows_of_all, same_on_ranks, vary
from moe_jax.permute import RouteMetadata, expert_of_row
from moe_jax.permute import permute as local_permute
from moe_jax.rows import dispatch as local_dispatch
from moe_jax.rows import unpermute as local_unpermute
from moe_ref.specs.align import AlignSpec
from moe_ref.specs.layout import ShardLayout
from moe_ref.specs.router import RouterSpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SentMetadata(RouteMetadata):
    """Where each slot's row is among what a rank sends: some slots send no row, and some rows are nobody's."""

    sent_TK: jax.Array
    sent_R: jax.Array

    @property
    def has_expert_TK(self) -> jax.Array:
        """(T, K) bools: whether each slot has a row, and it was admitted."""
        return self.sent_TK

    @property
    def has_expert_R(self) -> jax.Array:
        """(R,) bools: whether each row is a slot's."""
        return self.sent_R


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AlignedRows(AlignedMetadata):
    """What arrived as aligned rows of local experts; a rank that is full has no tail to point the other slots to."""

    sent_TK: jax.Array

    @property
    def has_expert_TK(self) -> jax.Array:
        """(T, K) bools: whether each slot has a row here."""
        return self.sent_TK


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ShardMetadata:
    """One rank's part in an exchange: all that moving rows needs, there and back."""

    slots: RouteMetadata | None
    """From the slots of this shard to the rows it sends; None where it sends whole tokens, or none."""
    rows: RouteMetadata
    """From what arrived to rows sorted by local expert."""
    send_sizes_S: jax.Array
    """(S,) int32: rows for each rank of the expert axis; tokens with ring_of_experts."""
    recv_sizes_S: jax.Array
    input_offsets_S: jax.Array
    """(S,) int32: where among the rows that it sends those for each rank begin."""
    output_offsets_S: jax.Array
    """(S,) int32: where in the buffer of each rank the rows from this one begin."""
    overflow_1: jax.Array
    """(1,) int32: rows that this rank had no room for."""


def aligned(metadata: ShardMetadata, align: AlignSpec) -> ShardMetadata:
    """The same exchange, with the rows of each local expert rounded up to the multiple where the experts are."""
    rows = metadata.rows
    return replace(metadata, rows=AlignedRows(**vars(align_rows(rows, align)), sent_TK=rows.has_expert_TK))


class Exchange:
    """How one strategy moves the rows of this rank."""

    sends_tokens = False
    """Whole tokens travel, not the rows of slots."""
    returns_alike = False
    """All ranks of the expert axis sum the same rows with the same weights; else each has rows of its own."""

    def plan(self, places_TK: jax.Array, layout: ShardLayout, router: RouterSpec) -> ShardMetadata:
        """Where the slots of a shard go, by the places of their experts."""
        raise NotImplementedError

    def dispatch(
        self, x_TD: jax.Array, weights_TK: jax.Array | None, metadata: ShardMetadata, fill: jax.Array
    ) -> jax.Array:
        """The rows of this rank's experts, sorted by expert, times their weights where weights are given."""
        raise NotImplementedError

    def unpermute(
        self, rows_RD: jax.Array, weights_TK: jax.Array | None, metadata: ShardMetadata, fill: jax.Array
    ) -> jax.Array:
        """Each token's weighted sum of its rows, which come back."""
        raise NotImplementedError


class _OfSlots(Exchange):
    """The row of each slot travels to the rank of its expert, and the same row comes back."""

    def plan(self, places_TK: jax.Array, layout: ShardLayout, router: RouterSpec) -> ShardMetadata:
        home = local_permute(places_TK, router.num_experts)
        sizes_SSe = lax.all_gather(home.group_sizes_E, "expert").reshape(layout.expert, layout.expert, -1)
        return self.plan_rows(home, sizes_SSe, layout, router)

    def plan_rows(
        self, home: RouteMetadata, sizes_SSe: jax.Array, layout: ShardLayout, router: RouterSpec
    ) -> ShardMetadata:
        """The plan, from this shard's rows sorted by place, and how many each rank has for each expert of each."""
        raise NotImplementedError

    def send(self, sent_RD: jax.Array, metadata: ShardMetadata, fill: jax.Array) -> jax.Array:
        """The rows that arrive here."""
        raise NotImplementedError

    def bring_back(self, done_AD: jax.Array, metadata: ShardMetadata, fill: jax.Array) -> jax.Array:
        """The rows that this rank sent, as the experts return them."""
        raise NotImplementedError

    def dispatch(
        self, x_TD: jax.Array, weights_TK: jax.Array | None, metadata: ShardMetadata, fill: jax.Array
    ) -> jax.Array:
        assert metadata.slots is not None
        sent_RD = _weighed(local_dispatch(x_TD, metadata.slots), weights_TK, metadata.slots)
        return local_dispatch(self.send(sent_RD, metadata, fill), metadata.rows)

    def unpermute(
        self, rows_RD: jax.Array, weights_TK: jax.Array | None, metadata: ShardMetadata, fill: jax.Array
    ) -> jax.Array:
        assert metadata.slots is not None
        back_RD = self.bring_back(local_unpermute(rows_RD, metadata.rows), metadata, fill)
        return local_unpermute(back_RD, metadata.slots, weights_TK)


class Blocks(_OfSlots):
    """all_to_all: a block of rows for each rank, as large as any rank may need; one plain collective."""

    def plan_rows(
        self, home: RouteMetadata, sizes_SSe: jax.Array, layout: ShardLayout, router: RouterSpec
    ) -> ShardMetadata:
        """A block of C rows for each rank; the rows of its run come first in it."""
        S, (T, K) = layout.expert, home.row_of_slot_TK.shape
        C, me = T * slots_per_rank(layout, router), lax.axis_index("expert")
        wanted_SS = sizes_SSe.sum(axis=-1, dtype=jnp.int32)
        begins_S = starts(wanted_SS[me])
        in_block_SC = jnp.broadcast_to(lax.iota(jnp.int32, C), (S, C))
        sent_R = (in_block_SC < wanted_SS[me][:, None]).reshape(-1)
        row_SC = jnp.minimum(begins_S[:, None] + in_block_SC, max(T * K - 1, 0))
        # A place without a row reads any slot; it is not read in turn.
        owner_TK = jnp.clip(places_in(begins_S, home.row_of_slot_TK, side="right") - 1, 0, S - 1)
        block_row_TK = owner_TK * C + home.row_of_slot_TK - begins_S[owner_TK]
        slots = SentMetadata(
            group_sizes_E=home.group_sizes_E,
            slot_of_row_R=home.slot_of_row_R[row_SC.reshape(-1)],
            row_of_slot_TK=jnp.where(home.has_expert_TK, block_row_TK, 0),
            sent_TK=home.has_expert_TK,
            sent_R=sent_R,
        )
        arrived_Se = sizes_SSe[:, me]
        expert_SC = jax.vmap(expert_of_row)(arrived_Se, in_block_SC)
        block_begins_S = C * lax.iota(jnp.int32, S)
        return ShardMetadata(
            slots=slots,
            rows=local_permute(expert_SC.reshape(-1, 1), router.num_experts // S),
            send_sizes_S=wanted_SS[me],
            recv_sizes_S=wanted_SS[:, me],
            input_offsets_S=block_begins_S,
            output_offsets_S=jnp.full_like(block_begins_S, C) * me,
            overflow_1=jnp.zeros_like(me, jnp.int32)[None],
        )

    def send(self, sent_RD: jax.Array, metadata: ShardMetadata, fill: jax.Array) -> jax.Array:
        assert metadata.slots is not None
        return _swap(jnp.where(metadata.slots.has_expert_R[:, None], sent_RD, fill))

    def bring_back(self, done_AD: jax.Array, metadata: ShardMetadata, fill: jax.Array) -> jax.Array:
        return _swap(done_AD)


class Runs(_OfSlots):
    """ragged_all_to_all: exact runs of rows into one buffer, which may be too small; the rest is dropped."""

    def plan_rows(
        self, home: RouteMetadata, sizes_SSe: jax.Array, layout: ShardLayout, router: RouterSpec
    ) -> ShardMetadata:
        """Receivers admit sources in rank order, each source's rows in sending order, while there is room."""
        S, (T, K) = layout.expert, home.row_of_slot_TK.shape
        me, room = lax.axis_index("expert"), buffer_rows(layout, router, T)
        wanted_SS = sizes_SSe.sum(axis=-1, dtype=jnp.int32)
        ends_SS = jnp.minimum(jnp.cumsum(wanted_SS, axis=0), room)
        begins_SS = jnp.concatenate([jnp.zeros_like(ends_SS[:1]), ends_SS[:-1]])
        admitted_SS = ends_SS - begins_SS
        input_offsets_S = starts(wanted_SS[me])
        row_R = lax.iota(jnp.int32, T * K)
        owner_R = jnp.clip(places_in(input_offsets_S, row_R, side="right") - 1, 0, S - 1)
        sent_R = row_R - input_offsets_S[owner_R] < admitted_SS[me][owner_R]
        slots = SentMetadata(
            group_sizes_E=home.group_sizes_E,
            slot_of_row_R=home.slot_of_row_R,
            row_of_slot_TK=home.row_of_slot_TK,
            sent_TK=sent_R[home.row_of_slot_TK],
            sent_R=sent_R,
        )
        # Of each source the first rows are admitted: its later experts lose theirs.
        ends_Se = jnp.minimum(jnp.cumsum(sizes_SSe[:, me], axis=-1), admitted_SS[:, me, None])
        kept_Se = jnp.diff(ends_Se, axis=-1, prepend=0)
        flat_expert_A = expert_of_row(kept_Se.reshape(-1), lax.iota(jnp.int32, room))
        e = router.num_experts // S
        expert_A = jnp.where(flat_expert_A < S * e, flat_expert_A % e, e)
        return ShardMetadata(
            slots=slots,
            rows=local_permute(expert_A[:, None], e),
            send_sizes_S=admitted_SS[me],
            recv_sizes_S=admitted_SS[:, me],
            input_offsets_S=input_offsets_S,
            output_offsets_S=begins_SS[me],
            overflow_1=(wanted_SS[:, me].sum(dtype=jnp.int32) - ends_SS[-1, me])[None],
        )

    def send(self, sent_RD: jax.Array, metadata: ShardMetadata, fill: jax.Array) -> jax.Array:
        return ragged_all_to_all(
            sent_RD,
            jnp.full((metadata.rows.row_of_slot_TK.size, sent_RD.shape[1]), fill),
            metadata.input_offsets_S,
            metadata.send_sizes_S,
            metadata.output_offsets_S,
            metadata.recv_sizes_S,
            axis_name="expert",
        )

    def bring_back(self, done_AD: jax.Array, metadata: ShardMetadata, fill: jax.Array) -> jax.Array:
        assert metadata.slots is not None
        return ragged_all_to_all(
            done_AD,
            jnp.full((metadata.slots.slot_of_row_R.size, done_AD.shape[1]), fill),
            _swap(metadata.output_offsets_S),
            metadata.recv_sizes_S,
            _swap(metadata.input_offsets_S),
            metadata.send_sizes_S,
            axis_name="expert",
        )


class Ring(Exchange):
    """ring_of_experts: tokens, ids and weights are gathered, partial outputs reduce-scattered."""

    sends_tokens = True

    def plan(self, places_TK: jax.Array, layout: ShardLayout, router: RouterSpec) -> ShardMetadata:
        """Each rank has the tokens of all, in the order of the ranks, and picks the rows of its own experts."""
        T = len(places_TK)
        here = _plan_here(_gather_tokens(places_TK), layout, router, room=buffer_rows(layout, router, T))
        whole_S = jnp.full((layout.expert,), T, jnp.int32)
        return replace(
            here, send_sizes_S=whole_S, recv_sizes_S=whole_S, output_offsets_S=whole_S * lax.axis_index("expert")
        )

    def dispatch(
        self, x_TD: jax.Array, weights_TK: jax.Array | None, metadata: ShardMetadata, fill: jax.Array
    ) -> jax.Array:
        x_TD, weights_TK = jax.tree.map(_gather_tokens, (x_TD, weights_TK))
        return _weighed(local_dispatch(x_TD, metadata.rows), weights_TK, metadata.rows)

    def unpermute(
        self, rows_RD: jax.Array, weights_TK: jax.Array | None, metadata: ShardMetadata, fill: jax.Array
    ) -> jax.Array:
        partial_TD = local_unpermute(rows_RD, metadata.rows, jax.tree.map(_gather_tokens, weights_TK))
        if len(partial_TD) == 0:
            return partial_TD
        return lax.psum_scatter(partial_TD, "expert", scatter_dimension=0, tiled=True)


class Replicated(Exchange):
    """replicated: every rank has the tokens; partial outputs are summed."""

    def plan(self, places_TK: jax.Array, layout: ShardLayout, router: RouterSpec) -> ShardMetadata:
        return _plan_here(vary(places_TK, ("expert",)), layout, router)

    def dispatch(
        self, x_TD: jax.Array, weights_TK: jax.Array | None, metadata: ShardMetadata, fill: jax.Array
    ) -> jax.Array:
        return _weighed(local_dispatch(x_TD, metadata.rows), weights_TK, metadata.rows)

    def unpermute(
        self, rows_RD: jax.Array, weights_TK: jax.Array | None, metadata: ShardMetadata, fill: jax.Array
    ) -> jax.Array:
        return lax.psum(local_unpermute(rows_RD, metadata.rows, weights_TK), "expert")


class ReplicatedRagged(Replicated):
    """replicated_ragged: every rank has the tokens; each sends its rows to all, and all sum those of every token."""

    returns_alike = True

    def plan(self, places_TK: jax.Array, layout: ShardLayout, router: RouterSpec) -> ShardMetadata:
        """The rows of a rank come to lie behind those of the ranks before it: all rows, sorted by place."""
        places_TK, me = vary(places_TK, ("expert",)), lax.axis_index("expert")
        home = local_permute(places_TK, router.num_experts)
        sizes_S = home.group_sizes_E.reshape(layout.expert, -1).sum(axis=1, dtype=jnp.int32)
        return replace(
            _plan_here(places_TK, layout, router),
            slots=home,
            send_sizes_S=jnp.full_like(sizes_S, sizes_S[me]),
            recv_sizes_S=sizes_S,
            output_offsets_S=jnp.full_like(sizes_S, starts(sizes_S)[me]),
        )

    def unpermute(
        self, rows_RD: jax.Array, weights_TK: jax.Array | None, metadata: ShardMetadata, fill: jax.Array
    ) -> jax.Array:
        assert metadata.slots is not None
        slots = jax.tree.map(partial(same_on_ranks, axis_name="expert"), metadata.slots)
        back_ND = rows_of_all(
            _unpadded(rows_RD, metadata, metadata.slots),
            jnp.full((slots.slot_of_row_R.size, rows_RD.shape[1]), fill),
            metadata.recv_sizes_S,
            axis_name="expert",
        )
        return local_unpermute(back_ND, slots, weights_TK)


def _unpadded(rows_RD, metadata: ShardMetadata, home: RouteMetadata):
    """The rows of this rank without gaps: aligned ones have some."""
    if not isinstance(metadata.rows, AlignedRows):
        return rows_RD
    N = home.slot_of_row_R.size
    place_N = jnp.minimum(metadata.output_offsets_S[0] + lax.iota(jnp.int32, N), N - 1)
    return take(rows_RD, take(metadata.rows.row_of_slot_TK.reshape(-1), take(home.slot_of_row_R, place_N)))


class Alone(Replicated):
    """A strategy on an expert axis of one rank: nothing is exchanged, and its tokens are its own."""

    def __init__(self, strategy: Exchange):
        self.sends_tokens = strategy.sends_tokens

    def plan(self, places_TK: jax.Array, layout: ShardLayout, router: RouterSpec) -> ShardMetadata:
        """It sends itself its rows, or its tokens where the strategy sends tokens."""
        here = super().plan(places_TK, layout, router)
        sizes_1 = here.rows.group_sizes_E.sum(dtype=jnp.int32)[None]
        if self.sends_tokens:
            sizes_1 = jnp.array([len(places_TK)], jnp.int32)
        return replace(here, send_sizes_S=sizes_1, recv_sizes_S=sizes_1)

    def unpermute(
        self, rows_RD: jax.Array, weights_TK: jax.Array | None, metadata: ShardMetadata, fill: jax.Array
    ) -> jax.Array:
        return local_unpermute(rows_RD, metadata.rows, weights_TK)


def slots_per_rank(layout: ShardLayout, router: RouterSpec) -> int:
    """Rows that a token sends to one rank at most."""
    # Ids that come from outside may repeat: a repeated one is a row of its own, and finds room.
    distinct = router.selector not in ("given", "table")
    return min(router.top_k, router.num_experts // layout.expert) if distinct else router.top_k


def buffer_rows(layout: ShardLayout, router: RouterSpec, num_tokens: int) -> int:
    """Rows of the receive buffer for shards of so many tokens; more than the layout's where ids may repeat."""
    if layout.buffer_factor is None:
        return layout.expert * num_tokens * slots_per_rank(layout, router)
    return layout.buffer_rows(layout.expert * num_tokens, router.num_experts, router.top_k)


def _plan_here(places_TK, layout: ShardLayout, router: RouterSpec, room: int | None = None) -> ShardMetadata:
    """The rows of this rank's experts among tokens that are here, as far as there is room; None: there always is."""
    e, S = router.num_experts // layout.expert, layout.expert
    local_TK = places_TK - e * lax.axis_index("expert")
    found = local_permute(jnp.where((local_TK >= 0) & (local_TK < e), local_TK, -1), e)
    # Rows past the most that can be worked on are of the tail.
    R = len(places_TK) * slots_per_rank(layout, router) if room is None else room
    ends_e = jnp.cumsum(found.group_sizes_E, dtype=jnp.int32)
    kept_TK = found.has_expert_TK & (found.row_of_slot_TK < R)
    # What has an expert is said slot by slot: where all R rows are used, no row is left to point the others to.
    rows = SentMetadata(
        # Rows are sorted by expert: the later ones lose theirs.
        group_sizes_E=jnp.diff(jnp.minimum(ends_e, R), prepend=jnp.int32(0)),
        slot_of_row_R=found.slot_of_row_R[:R],
        row_of_slot_TK=jnp.where(kept_TK, found.row_of_slot_TK, 0),
        sent_TK=kept_TK,
        sent_R=found.has_expert_R[:R],
    )
    none_S = jnp.zeros((S,), jnp.int32)
    return ShardMetadata(
        slots=None,
        rows=rows,
        send_sizes_S=none_S,
        recv_sizes_S=none_S,
        input_offsets_S=none_S,
        output_offsets_S=none_S,
        overflow_1=jnp.maximum(ends_e[-1:] - R, 0),
    )


def _weighed(rows_RD, weights_TK, metadata: RouteMetadata):
    """Each row times the weight of its slot; rows of no slot stay as they are."""
    if weights_TK is None:
        return rows_RD
    weight_R = take(weights_TK.reshape(-1), jnp.maximum(metadata.slot_of_row_R, 0))
    return rows_RD * jnp.where(metadata.has_expert_R, weight_R, 1)[:, None]


def _gather_tokens(values_TD):
    """The tokens of all ranks of the expert axis, in their order."""
    if len(values_TD) == 0:
        return values_TD  # a gather, or a reduce-scatter, of no rows never ends on CPU
    return lax.all_gather(values_TD, "expert", axis=0, tiled=True)


def _swap(of_each: jax.Array) -> jax.Array:
    """What this rank has for each rank, in equal parts: what each rank has for this one."""
    return lax.all_to_all(of_each, "expert", split_axis=0, concat_axis=0, tiled=True)
