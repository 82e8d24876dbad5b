"""conformance, sharded: plans of dispatch. What a subject plans for a case, held against the reference on every rank.

An error, and a plan of another form, violate the requirement of the check that runs.

Legend: K top_k, E experts, e experts on this rank, R rows on this rank, S ranks of a rank group.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from conformance.core.holding import array_from
from conformance.core.judge import Judge, NotRun, accuse
from conformance.sharded.case import ShardedCase
from moe_ref.dispatch import plan
from moe_ref.strategies.base import RankPlan

SIZES = ("send_sizes_S", "recv_sizes_S", "group_sizes_e")
PARTS = (*SIZES, "order_R2")
"""What a plan has for each rank."""
MOST_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a subject plans for one rank, as int64."""

    send_sizes_S: np.ndarray
    recv_sizes_S: np.ndarray
    group_sizes_e: np.ndarray
    order_R2: np.ndarray
    overflow: int | None


def plans_of_subject(judge: Judge, case: ShardedCase, ids_by_shard: Sequence[np.ndarray] | None = None) -> list[Plan]:
    """The subject's plan for every rank, tensor ranks counted once; of other ids, where they are given."""
    layout, given = case.layout, case.ids_by_shard if ids_by_shard is None else ids_by_shard
    returned = judge.call(case, "dispatch", [ids_TK.copy() for ids_TK in given], layout, case.spec)
    ranks = layout.num_rank_groups * layout.expert
    if not isinstance(returned, (list, tuple)) or len(returned) != ranks:
        received = f"{len(returned)} of them" if isinstance(returned, (list, tuple)) else str(type(returned))
        accuse("not one plan for each rank", expected=f"a list of {ranks}", received=received)
    return [_plan(case, rank, each) for rank, each in enumerate(returned)]


def _plan(case: ShardedCase, rank: int, returned: Any) -> Plan:
    """What a subject returned for one rank, with the names, shapes and kinds of a plan."""
    ep = case.layout.expert
    shapes = dict(zip(PARTS, ((ep,), (ep,), (case.spec.router.num_experts // ep,), (None, 2)), strict=True))
    if not isinstance(returned, dict) or shapes.keys() - returned.keys():
        received = ", ".join(sorted(returned)) if isinstance(returned, dict) else str(type(returned))
        accuse(f"{name_of_place(case, rank)}: no plan", expected=", ".join(shapes), received=received)
    found = {}
    for name, shape in shapes.items():
        value = array_from(returned[name], f"{name_of_place(case, rank)}: {name}: no array")
        fits = value.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, value.shape, strict=True))
        if value.dtype.kind not in "iu" or not fits:
            title = f"{name_of_place(case, rank)}: {name} of another kind"
            accuse(title, expected=f"integers {shape}", received=f"{value.dtype} {value.shape}")
        found[name] = value.astype(np.int64)
    overflow = returned.get("overflow")
    return Plan(**found, overflow=None if overflow is None else int(overflow))


def plans_of_reference(case: ShardedCase, ids_by_shard: Sequence[np.ndarray]) -> list[RankPlan]:
    """The reference's plan for other ids on the same layout."""
    return plan(ids_by_shard, case.layout, case.spec)


# where something is


def name_of_place(case: ShardedCase, rank: int) -> str:
    """A rank by its group and its place on the expert axis."""
    group, e = divmod(rank, case.layout.expert)
    return f"rank {e} of group {group}" if case.layout.num_rank_groups > 1 else f"rank {e}"


def accuse_rank(
    case: ShardedCase, rank: int, title: str, expected: object, received: object, token: int | None = None
) -> NoReturn:
    """The plan of one rank violates the requirement of the check that runs."""
    shown = [str(np.asarray(each).tolist())[:MOST_CHARACTERS] for each in (expected, received)]
    accuse(f"{name_of_place(case, rank)}: {title}", token=token, expected=shown[0], received=shown[1])


def _token_of(case: ShardedCase, rank: int, source: int, slot: int) -> int:
    """The number of a row's token among those of all shards."""
    group, layout = rank // case.layout.expert, case.layout
    shard = group * layout.shards_per_group + (source if layout.shards_per_group > 1 else 0)
    return sum(case.tokens_per_shard[:shard]) + slot // case.spec.router.top_k


def _expert_of(case: ShardedCase, group: int, source: int, slot: int) -> int:
    """The expert of a row; -1 where there is no such slot."""
    shards = case.layout.shards_of_group(group)
    place = source if len(shards) > 1 else 0
    flat = case.ids_by_shard[shards[place]].reshape(-1) if 0 <= place < len(shards) else np.zeros(0, int)
    return int(flat[slot]) if 0 <= slot < len(flat) else -1


# holding a plan against the reference


def hold_rows(case: ShardedCase, found: Sequence[Plan], wanted: Sequence[RankPlan]) -> None:
    """Every rank works on its own rows, each once."""
    for rank, (plan_found, plan_wanted) in enumerate(zip(found, wanted, strict=True)):
        rows, own = (Counter(map(tuple, each.order_R2.tolist())) for each in (plan_found, plan_wanted))
        orders = plan_wanted.order_R2, plan_found.order_R2
        for source, slot in sorted((own - rows).elements()):
            title = f"slot {slot} of rank {source} is missing"
            accuse_rank(case, rank, title, *orders, _token_of(case, rank, source, slot))
        for source, slot in sorted((rows - own).elements()):
            again = "again" if (source, slot) in own else "that is not its own"
            accuse_rank(case, rank, f"slot {slot} of rank {source} is a row {again}", *orders)


def hold_sizes(case: ShardedCase, found: Sequence[Plan], wanted: Sequence[RankPlan], names: Sequence[str]) -> None:
    """These sizes are the reference's on every rank."""
    for rank, (plan_found, plan_wanted) in enumerate(zip(found, wanted, strict=True)):
        for name in names:
            sizes, own = getattr(plan_found, name), getattr(plan_wanted, name)
            if (sizes != own).any():
                accuse_rank(case, rank, f"{name} are others", own, sizes)


def hold_exchanged_sizes(case: ShardedCase, found: Sequence[Plan], wanted: Sequence[RankPlan]) -> None:
    """The sizes that a rank sends and receives are the reference's."""
    hold_sizes(case, found, wanted, ("send_sizes_S", "recv_sizes_S"))


def hold_group_sizes(case: ShardedCase, found: Sequence[Plan], wanted: Sequence[RankPlan]) -> None:
    """The sizes of the local experts are the reference's."""
    hold_sizes(case, found, wanted, ("group_sizes_e",))


def hold_matching(case: ShardedCase, found: Sequence[Plan], wanted: Sequence[RankPlan] = ()) -> None:
    """recv_sizes of b from a is send_sizes of a to b, within each group; the reference is not asked."""
    ep = case.layout.expert
    for rank, plan_found in enumerate(found):
        group = rank // ep
        sent_S = np.array([found[group * ep + source].send_sizes_S[rank % ep] for source in range(ep)])
        if (sent_S != plan_found.recv_sizes_S).any():
            accuse_rank(case, rank, "does not receive what the others send it", sent_S, plan_found.recv_sizes_S)


def hold_plan(case: ShardedCase, found: Sequence[Plan], wanted: Sequence[RankPlan]) -> None:
    """All of it but the order of the rows."""
    for hold in (hold_rows, hold_matching, hold_exchanged_sizes, hold_group_sizes):
        hold(case, found, wanted)


def hold_sorted(case: ShardedCase, found: Sequence[Plan], wanted: Sequence[RankPlan] = ()) -> None:
    """Rows are in the order of the local experts, where they are rows of this rank at all."""
    E, layout = case.spec.router.num_experts, case.layout
    for rank, plan_found in enumerate(found):
        group, e = divmod(rank, layout.expert)
        own = layout.experts_of(e, E)
        experts = [_expert_of(case, group, source, slot) for source, slot in plan_found.order_R2.tolist()]
        if any(expert not in own for expert in experts):
            raise NotRun("judged where every row is of an own expert")
        places = [own.index(expert) for expert in experts]
        if places != sorted(places):
            accuse_rank(case, rank, "rows are not sorted by local expert", sorted(places), places)


def hold_order(case: ShardedCase, found: Sequence[Plan], wanted: Sequence[RankPlan]) -> None:
    """Rows are in the very order of the reference; where they are the same rows."""
    rows = [Counter(map(tuple, each.order_R2.tolist())) for each in (*found, *wanted)]
    if rows[: len(found)] != rows[len(found) :]:
        raise NotRun("judged where the rows are right")
    for rank, (plan_found, plan_wanted) in enumerate(zip(found, wanted, strict=True)):
        if (plan_found.order_R2 != plan_wanted.order_R2).any():
            title = "rows of an expert in another order"
            accuse_rank(case, rank, title, plan_wanted.order_R2, plan_found.order_R2)
