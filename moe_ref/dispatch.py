"""moe_ref, dispatch: which rows each rank sends, receives and works on, for each strategy of a layout.

    all_to_all         a rank sends each slot to the owner of its expert
    ragged_all_to_all  the same, into a receive buffer; what finds no room is dropped
    ring_of_experts    a rank sends its tokens to every rank, which picks the rows of its own experts
    replicated         nothing is sent; each rank has the tokens, and picks the rows of its own experts
    node_dedup         a token is sent once to each node that has experts of it, then each slot to its owner there

A row is named by (source, slot): the rank of the expert axis whose token it is, and the flat number t * K + k of the
slot there. Unused slots (-1) and null experts (num_experts and above) are no rows. Everything is defined inside one
rank group (`layout.py`); tensor ranks do the same.

A rank sends to the ranks in their order, and what one rank gets is sorted by place, then by token. It receives from
the ranks in their order. Then it sorts what it received by its own experts, in the order of their places; the rows of
one expert stay in the order in which they arrived.

Legend: T tokens, K top_k, E experts, e experts on this rank, S ranks of a rank group, N rows sent, R rows worked on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moe_ref.specs.checks import array, entries, require
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.layout import ShardLayout
from moe_ref.specs.router import RouterSpec

Row = tuple[int, int]
"""(source, slot); or (source, token), where whole tokens are sent."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One rank's part in one exchange: rows [input_offsets[r], + send_sizes[r]) of what it has go to rank r."""

    sends_N2: np.ndarray
    """(source, slot), or (source, token): what it has to send, in sending order."""
    send_sizes_S: np.ndarray
    """Rows that go to each rank, itself included."""
    recv_sizes_S: np.ndarray
    """Rows that come from each rank, itself included."""
    input_offsets_S: np.ndarray
    """Where in `sends_N2` the rows for each rank begin."""
    output_offsets_S: np.ndarray
    """Where in the buffer of each rank the rows from this one begin."""


@dataclass(frozen=True, kw_only=True)
class RankPlan(Exchange):
    """What one rank sends, receives and works on. The exchange of node_dedup here is its second, inside a node."""

    group: int
    """The rank group: d * fsdp + f."""
    e: int
    """The rank on the expert axis."""
    order_R2: np.ndarray
    """(source, slot) of each row that it works on, sorted by its experts. A replicated row has itself as source."""
    arrival_R: np.ndarray
    """Where each of these rows lies in what it received: a row, or a token with ring_of_experts and replicated."""
    group_sizes_e: np.ndarray
    """Rows of each of its experts, in the order of their places."""
    dropped_slots_N: np.ndarray
    """Slots of its own tokens that found no room at their receiver."""
    overflow: int
    """Rows that it had no room for."""
    buffer_rows: int | None
    """Rows that it has room for; None where there is no fixed buffer."""
    across: Exchange | None
    """node_dedup alone: the first exchange, of tokens, between ranks of the same position on their nodes."""


def plan(expert_ids_by_shard, layout: ShardLayout, spec: RouterSpec | LayerSpec) -> list[RankPlan]:
    """What every rank sends, receives and works on, for ranks (data, fsdp, expert) in their order. [DSP-2 .. DSP-6]

    Args:
        expert_ids_by_shard: for each token shard (T, K) integers: expert ids, null experts, or -1 in unused slots. The
            experts of a token are distinct.
        layout: of one exchange; `plan_chunks` is for those with token chunks.
        spec: of the router or the layer.

    Raises:
        ValueError: the layout does not fit the spec, or the ids fit neither; it names field, value and bound.
    """
    router = spec.router if isinstance(spec, LayerSpec) else spec
    require(
        layout.num_token_chunks == 1,
        f"num_token_chunks is {layout.num_token_chunks}; plan is for one exchange, plan_chunks for one of each chunk",
    )
    layout.check(spec)
    ids_by_shard = checked_ids(expert_ids_by_shard, layout, router)
    plans = []
    for group in range(layout.num_rank_groups):
        ids_of_group = [ids_by_shard[shard] for shard in layout.shards_of_group(group)]
        plans += PLANNERS[layout.strategy](ids_of_group, layout, router, group)
    return plans


def plan_chunks(expert_ids_by_shard, layout: ShardLayout, spec: RouterSpec | LayerSpec) -> list[list[RankPlan]]:
    """A plan for each token chunk; its slots are numbered from the first token of the chunk."""
    router = spec.router if isinstance(spec, LayerSpec) else spec
    ids_by_shard = checked_ids(expert_ids_by_shard, layout, router)
    plans, begins = [], [0] * layout.num_token_shards
    for index in range(layout.num_token_chunks):
        chunk = layout.chunk(index)
        ends = [begin + size for begin, size in zip(begins, chunk.tokens_per_shard, strict=True)]
        parts = [ids[begin:end] for ids, begin, end in zip(ids_by_shard, begins, ends, strict=True)]
        plans.append(plan(parts, chunk, spec))
        begins = ends
    return plans


def checked_ids(expert_ids_by_shard, layout: ShardLayout, router: RouterSpec) -> list[np.ndarray]:
    """The ids as arrays: one for each token shard, of its tokens, in bounds, distinct for each token."""
    given = list(expert_ids_by_shard)
    require(
        len(given) == layout.num_token_shards,
        f"expert_ids_by_shard has {len(given)} entries; the layout has {layout.num_token_shards} token shards",
    )
    ids_by_shard = []
    for shard, (ids, num_tokens) in enumerate(zip(given, layout.tokens_per_shard, strict=True)):
        field = f"expert_ids_by_shard[{shard}]"
        ids_TK = array(field, ids, (num_tokens, router.top_k), kind="int").astype(np.int64)
        bound = router.num_choices
        entries(field, ids_TK, (ids_TK >= -1) & (ids_TK < bound), f"ids are -1, or at least 0 and less than {bound}")
        entries(field, ids_TK, _distinct(ids_TK), "the experts of a token are distinct")
        ids_by_shard.append(ids_TK)
    return ids_by_shard


def _distinct(ids_TK) -> np.ndarray:
    """Whether the used ids of each token are distinct."""
    used = [[int(i) for i in ids if i >= 0] for ids in ids_TK]
    return np.array([len(set(ids)) == len(ids) for ids in used], dtype=bool)


# One planner for each strategy: the ids of each source of a rank group -> a plan for each of its ranks.


def plan_all_to_all(ids_by_source, layout: ShardLayout, router: RouterSpec, group: int) -> list[RankPlan]:
    """A rank sends each slot to the owner of its expert."""
    return _plan_slots(ids_by_source, layout, router, group, room=None)


def plan_ragged_all_to_all(ids_by_source, layout: ShardLayout, router: RouterSpec, group: int) -> list[RankPlan]:
    """As all_to_all, but a receiver admits rows while it has room, source by source in sending order. [DSP-11]"""
    num_tokens = sum(len(ids_TK) for ids_TK in ids_by_source)
    room = layout.buffer_rows(num_tokens, router.num_experts, router.top_k)
    return _plan_slots(ids_by_source, layout, router, group, room=room)


def _plan_slots(ids_by_source, layout: ShardLayout, router: RouterSpec, group: int, room: int | None):
    E, ranks = router.num_experts, range(layout.expert)
    wanted = [[rows_for(ids_TK, source, layout.experts_of(r, E)) for r in ranks] for source, ids_TK in
              enumerate(ids_by_source)]  # fmt: skip
    exchanges, received = exchange(wanted, room)
    plans = []
    for e in ranks:
        order, arrival, sizes = sort_by_expert(received[e], ids_by_source, layout.experts_of(e, E))
        refused = [slot for r in ranks for _, slot in wanted[e][r][exchanges[e].send_sizes_S[r] :]]
        overflow = sum(len(wanted[source][e]) for source in ranks) - len(received[e])
        plans.append(
            _rank_plan(
                exchanges[e], group, e, order, arrival, sizes, dropped=sorted(refused), overflow=overflow, room=room
            )
        )
    return plans


def plan_ring_of_experts(ids_by_source, layout: ShardLayout, router: RouterSpec, group: int) -> list[RankPlan]:
    """A rank sends its tokens to every rank (an all-gather); each picks the rows of its own experts."""
    ranks = range(layout.expert)
    tokens = [[(source, token) for token in range(len(ids_TK))] for source, ids_TK in enumerate(ids_by_source)]
    exchanges, received = exchange([[tokens[source] for _ in ranks] for source in ranks], room=None)
    plans = []
    for e in ranks:
        # The same tokens go to every rank: there is one copy to send, and it begins at 0 for each.
        sent = Exchange(
            sends_N2=_rows(tokens[e]),
            send_sizes_S=exchanges[e].send_sizes_S,
            recv_sizes_S=exchanges[e].recv_sizes_S,
            input_offsets_S=np.zeros(layout.expert, np.int64),
            output_offsets_S=exchanges[e].output_offsets_S,
        )
        picked = pick_by_expert(received[e], ids_by_source, layout.experts_of(e, router.num_experts))
        plans.append(_rank_plan(sent, group, e, *picked))
    return plans


def plan_replicated(ids_by_source, layout: ShardLayout, router: RouterSpec, group: int) -> list[RankPlan]:
    """Nothing is sent: every rank has the tokens of the one shard, and picks the rows of its own experts."""
    (ids_TK,) = ids_by_source
    plans = []
    for e in range(layout.expert):
        nothing, _ = exchange([[[] for _ in range(layout.expert)] for _ in range(layout.expert)], room=None)
        copies = [(0, token) for token in range(len(ids_TK))]
        order, arrival, sizes = pick_by_expert(copies, [ids_TK], layout.experts_of(e, router.num_experts))
        plans.append(_rank_plan(nothing[e], group, e, [(e, slot) for _, slot in order], arrival, sizes))
    return plans


def plan_node_dedup(ids_by_source, layout: ShardLayout, router: RouterSpec, group: int) -> list[RankPlan]:
    """A token crosses to a node once, however many of its experts live there, and fans out inside it.

    It lands on the rank with the position on that node that its own rank has on its own (section 3.2.2 of
    arXiv:2412.19437), so on its own node it lands where it is. From there each slot of this node goes to the owner of
    its expert. Each landed token is followed by its ids and weights, which are not counted.
    """
    E, ranks = router.num_experts, range(layout.expert)
    crossing = [[tokens_for(ids_TK, source, r, layout, E) for r in ranks] for source, ids_TK in
                enumerate(ids_by_source)]  # fmt: skip
    across, landed = exchange(crossing, room=None)
    fanning = [[fan_out(landed[at], ids_by_source, at, r, layout, E) for r in ranks] for at in ranks]
    inside, received = exchange(fanning, room=None)
    plans = []
    for e in ranks:
        order, arrival, sizes = sort_by_expert(received[e], ids_by_source, layout.experts_of(e, E))
        plans.append(_rank_plan(inside[e], group, e, order, arrival, sizes, across=across[e]))
    return plans


PLANNERS: dict[str, Callable[..., list[RankPlan]]] = {
    "all_to_all": plan_all_to_all,
    "ragged_all_to_all": plan_ragged_all_to_all,
    "ring_of_experts": plan_ring_of_experts,
    "replicated": plan_replicated,
    "node_dedup": plan_node_dedup,
}


def rows_for(ids_TK, source: int, experts: tuple[int, ...]) -> list[Row]:
    """The rows of one source for the experts of one rank: by place, then by token."""
    flat_ids = ids_TK.reshape(-1).tolist()
    slots = [slot for slot, expert_id in enumerate(flat_ids) if expert_id in experts]
    # sorted is stable: what has the same place stays in its order.
    return [(source, slot) for slot in sorted(slots, key=lambda slot: experts.index(flat_ids[slot]))]


def tokens_for(ids_TK, source: int, receiver: int, layout: ShardLayout, num_experts: int) -> list[Row]:
    """The tokens of one source that cross to the node of the receiver, if that is where they land."""
    if receiver % layout.node_size != source % layout.node_size:
        return []
    there = layout.experts_of_node(layout.node_of(receiver), num_experts)
    return [(source, token) for token, ids in enumerate(ids_TK.tolist()) if any(i in there for i in ids)]


def fan_out(landed: list[Row], ids_by_source, at: int, receiver: int, layout: ShardLayout, num_experts: int):
    """The rows of what landed at one rank for the experts of a rank of its node: by place, then as it landed."""
    if layout.node_of(at) != layout.node_of(receiver):
        return []
    return pick_by_expert(landed, ids_by_source, layout.experts_of(receiver, num_experts))[0]


def exchange(wanted: list[list[list[Row]]], room: int | None) -> tuple[list[Exchange], list[list[Row]]]:
    """Every rank sends rows to every rank; a receiver admits sources in rank order, rows in sending order. [DSP-3]

    Args:
        wanted: wanted[s][r] are the rows that s has for r.
        room: rows that a receiver has room for; None: as many as come.

    Returns:
        the part of each rank, and the rows that each rank received.
    """
    ranks = range(len(wanted))
    sizes_SS = np.zeros((len(wanted), len(wanted)), np.int64)
    received: list[list[Row]] = [[] for _ in ranks]
    for r in ranks:
        for s in ranks:
            free = None if room is None else room - len(received[r])
            admitted = wanted[s][r][:free]
            received[r] += admitted
            sizes_SS[s, r] = len(admitted)
    parts = [
        Exchange(
            sends_N2=_rows([row for r in ranks for row in wanted[s][r]]),
            send_sizes_S=sizes_SS[s],
            recv_sizes_S=sizes_SS[:, s],
            input_offsets_S=np.array([sum(len(wanted[s][q]) for q in range(r)) for r in ranks]),
            output_offsets_S=np.array([sizes_SS[:s, r].sum() for r in ranks]),
        )
        for s in ranks
    ]
    return parts, received


def sort_by_expert(received: list[Row], ids_by_source, experts: tuple[int, ...]):
    """What arrived as slots, by expert; the rows of one expert stay in the order in which they arrived. [DSP-6, DSP-7]

    Returns:
        the rows, where each was among those that arrived, and the number of each expert.
    """
    flat_ids = [ids_TK.reshape(-1).tolist() for ids_TK in ids_by_source]
    places = [experts.index(flat_ids[source][slot]) for source, slot in received]
    arrival = sorted(range(len(received)), key=lambda at: places[at])
    return [received[at] for at in arrival], arrival, [places.count(place) for place in range(len(experts))]


def pick_by_expert(tokens: list[Row], ids_by_source, experts: tuple[int, ...]):
    """The slots of these experts among tokens that are here, by expert, then in the order of the tokens.

    Returns:
        the rows, where the token of each is, and the number of each expert.
    """
    picked, picked_from = [], []
    for at, (source, token) in enumerate(tokens):
        K = ids_by_source[source].shape[1]
        for k, expert_id in enumerate(ids_by_source[source][token].tolist()):
            if expert_id in experts:
                picked.append((source, token * K + k))
                picked_from.append(at)
    order, by_expert, sizes = sort_by_expert(picked, ids_by_source, experts)
    return order, [picked_from[at] for at in by_expert], sizes


def _rank_plan(part: Exchange, group, e, order, arrival, sizes, *, dropped=(), overflow=0, room=None, across=None):
    return RankPlan(
        **vars(part),
        group=group,
        e=e,
        order_R2=_rows(order),
        arrival_R=np.array(arrival, np.int64),
        group_sizes_e=np.array(sizes, np.int64),
        dropped_slots_N=np.array(dropped, np.int64),
        overflow=overflow,
        buffer_rows=room,
        across=across,
    )


def _rows(rows: list[Row]) -> np.ndarray:
    return np.array(rows, np.int64).reshape(-1, 2)
