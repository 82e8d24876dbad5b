"""moe_ref, strategies: rows are chosen, exchanged and sorted; what the planners share.

A row is named by (source, slot): the rank of the expert axis whose token it is, and the flat number t * K + k of the
slot there. Unused slots (-1) and null experts (num_experts and above) are no rows.

A rank sends to the ranks in their order, and what one rank gets is sorted by place, then by token. It receives from
the ranks in their order. Then it sorts what it received by its own experts, in the order of their places; the rows of
one expert stay in the order in which they arrived.

Legend: T tokens, K top_k, e experts on this rank, S ranks of a rank group, N rows sent, R rows worked on.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moe_ref.strategies.base import Exchange, RankPlan, Row


def rows_for(ids_TK: np.ndarray, source: int, experts: tuple[int, ...]) -> list[Row]:
    """The rows of one source for the experts of one rank: by place, then by token."""
    flat_ids = ids_TK.reshape(-1).tolist()
    slots = [slot for slot, expert_id in enumerate(flat_ids) if expert_id in experts]
    # sorted is stable: what has the same place stays in its order.
    return [(source, slot) for slot in sorted(slots, key=lambda slot: experts.index(flat_ids[slot]))]


def exchange(wanted: list[list[list[Row]]], room: int | None) -> tuple[list[Exchange], list[list[Row]]]:
    """Every rank sends rows to every rank; a receiver admits sources in rank order, rows in sending order.

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
            sends_N2=pairs([row for r in ranks for row in wanted[s][r]]),
            send_sizes_S=sizes_SS[s],
            recv_sizes_S=sizes_SS[:, s],
            input_offsets_S=np.array([sum(len(wanted[s][q]) for q in range(r)) for r in ranks]),
            output_offsets_S=np.array([sizes_SS[:s, r].sum() for r in ranks]),
        )
        for s in ranks
    ]
    return parts, received


def one_copy(part: Exchange, rows: list[Row]) -> Exchange:
    """The part of a rank that sends the same rows to every rank: there is one copy, and it begins at 0 for each."""
    return replace(part, sends_N2=pairs(rows), input_offsets_S=np.zeros_like(part.input_offsets_S))


def sort_by_expert(
    received: list[Row], ids_by_source: Sequence[np.ndarray], experts: tuple[int, ...]
) -> tuple[list[Row], list[int], list[int]]:
    """What arrived as slots, by expert; the rows of one expert stay in the order in which they arrived.

    Returns:
        the rows, where each was among those that arrived, and the number of each expert.
    """
    flat_ids = [ids_TK.reshape(-1).tolist() for ids_TK in ids_by_source]
    places = [experts.index(flat_ids[source][slot]) for source, slot in received]
    arrival = sorted(range(len(received)), key=lambda at: places[at])
    return [received[at] for at in arrival], arrival, [places.count(place) for place in range(len(experts))]


def pick_by_expert(
    tokens: list[Row], ids_by_source: Sequence[np.ndarray], experts: tuple[int, ...]
) -> tuple[list[Row], list[int], list[int]]:
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


def rank_plan(
    part: Exchange,
    group: int,
    e: int,
    num_tokens: int,
    order: list[Row],
    arrival: list[int],
    sizes: list[int],
    *,
    dropped: Sequence[int] = (),
    overflow: int = 0,
    room: int | None = None,
    across: Exchange | None = None,
) -> RankPlan:
    """The plan of one rank, from its part in the exchange and what it works on."""
    return RankPlan(
        **vars(part),
        group=group,
        e=e,
        num_tokens=num_tokens,
        order_R2=pairs(order),
        arrival_R=np.array(arrival, np.int64),
        group_sizes_e=np.array(sizes, np.int64),
        dropped_slots_N=np.array(dropped, np.int64),
        overflow=overflow,
        buffer_rows=room,
        across=across,
    )


def pairs(rows: list[Row]) -> np.ndarray:
    """(R, 2) the rows as an array, also where there is none."""
    return np.array(rows, np.int64).reshape(-1, 2)
