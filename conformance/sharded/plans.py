"""conformance, the verdicts on dispatch: calls a subject for its plan, and holds every rank against the reference.

Legend: K top_k, E experts, e experts on this rank, R rows on this rank, S ranks of a rank group.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from conformance.core.judge import Judge, NotRun
from conformance.sharded.case import LayoutCase
from moe_ref.dispatch import plan
from moe_ref.strategies.base import RankPlan


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a subject plans for one rank, as int64."""

    send_sizes_S: np.ndarray
    recv_sizes_S: np.ndarray
    group_sizes_e: np.ndarray
    order_R2: np.ndarray
    overflow: int | None


def planned(judge: Judge, case: LayoutCase, ids_by_shard=None) -> list[Plan]:
    """The subject's plan for every rank, tensor ranks counted once."""
    layout, given = case.layout, case.ids_by_shard if ids_by_shard is None else ids_by_shard
    returned = judge.call(case, "dispatch", [ids.copy() for ids in given], layout, case.spec)
    ranks = layout.num_rank_groups * layout.expert
    if not isinstance(returned, (list, tuple)) or len(returned) != ranks:
        received = f"{len(returned)} of them" if isinstance(returned, (list, tuple)) else str(type(returned))
        accuse("not one plan for each rank", expected=f"a list of {ranks}", received=received)
    return [_formed(case, rank, each) for rank, each in enumerate(returned)]


def _formed(case: LayoutCase, rank: int, returned) -> Plan:
    layout = case.layout
    shapes = {
        "send_sizes_S": (layout.expert,),
        "recv_sizes_S": (layout.expert,),
        "group_sizes_e": (case.spec.router.num_experts // layout.expert,),
        "order_R2": (None, 2),
    }
    if not isinstance(returned, dict) or shapes.keys() - returned.keys():
        received = ", ".join(sorted(returned)) if isinstance(returned, dict) else str(type(returned))
        accuse(f"{name_of(case, rank)}: no plan", expected=", ".join(shapes), received=received)
    found = {}
    for name, shape in shapes.items():
        value = np.asarray(returned[name])
        fits = value.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, value.shape, strict=True))
        if value.dtype.kind not in "iu" or not fits:
            accuse(f"{name_of(case, rank)}: {name} of another kind", expected=f"integers {shape}", received=f"{value.dtype} {value.shape}")  # fmt: skip
        found[name] = value.astype(np.int64)
    overflow = returned.get("overflow")
    return Plan(**found, overflow=None if overflow is None else int(overflow))


def name_of(case: LayoutCase, rank: int) -> str:
    """A rank by its group and its place on the expert axis."""
    group, e = divmod(rank, case.layout.expert)
    return f"rank {e} of group {group}" if case.layout.num_rank_groups > 1 else f"rank {e}"


def accuse(case: LayoutCase, rank: int, title: str, expected, received, token: int | None = None):
    """Raise the violation of one rank."""
    shown = [str(np.asarray(each).tolist())[:200] for each in (expected, received)]
    accuse(f"{name_of(case, rank)}: {title}", token=token, expected=shown[0], received=shown[1])


def hold_rows(case: LayoutCase, found: list[Plan], wanted: list[RankPlan], *, only=None) -> None:
    """Every rank works on its own rows, each once."""
    for rank, (plan_found, plan_wanted) in enumerate(zip(found, wanted, strict=True)):
        if only is not None and rank not in only:
            continue
        rows, own = (Counter(map(tuple, each.order_R2.tolist())) for each in (plan_found, plan_wanted))
        for source, slot in sorted((own - rows).elements()):
            title = f"slot {slot} of rank {source} is missing"
            accuse(case, rank, title, plan_wanted.order_R2, plan_found.order_R2, _token(case, rank, source, slot))
        for source, slot in sorted((rows - own).elements()):
            title = (
                f"slot {slot} of rank {source} is a row {'again' if (source, slot) in own else 'that is not its own'}"
            )
            accuse(case, rank, title, plan_wanted.order_R2, plan_found.order_R2)


def _token(case: LayoutCase, rank: int, source: int, slot: int) -> int:
    """The number of a token among those of all shards."""
    group, layout = rank // case.layout.expert, case.layout
    shard = group * layout.shards_per_group + (source if layout.shards_per_group > 1 else 0)
    return sum(case.tokens_per_shard[:shard]) + slot // case.spec.router.top_k


def hold_sizes(case: LayoutCase, found: list[Plan], wanted: list[RankPlan], *names: str) -> None:
    """These sizes are the reference's on every rank."""
    for rank, (plan_found, plan_wanted) in enumerate(zip(found, wanted, strict=True)):
        for name in names:
            sizes, own = getattr(plan_found, name), getattr(plan_wanted, name)
            if (sizes != own).any():
                accuse(case, rank, f"{name} are others", own, sizes)


def hold_matching(case: LayoutCase, found: list[Plan]) -> None:
    """recv_sizes of b from a is send_sizes of a to b, within each group."""
    ep = case.layout.expert
    for rank, plan_found in enumerate(found):
        group = rank // ep
        sent_S = np.array([found[group * ep + source].send_sizes_S[rank % ep] for source in range(ep)])
        if (sent_S != plan_found.recv_sizes_S).any():
            accuse(case, rank, "does not receive what the others send it", sent_S, plan_found.recv_sizes_S)


def hold_sorted(case: LayoutCase, found: list[Plan]) -> None:
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
            accuse(case, rank, "rows are not sorted by local expert", sorted(places), places)


def _expert_of(case: LayoutCase, group: int, source: int, slot: int) -> int:
    shards = case.layout.shards_of_group(group)
    place = source if len(shards) > 1 else 0
    flat = case.ids_by_shard[shards[place]].reshape(-1) if 0 <= place < len(shards) else np.zeros(0, int)
    return int(flat[slot]) if 0 <= slot < len(flat) else -1


def hold_order(case: LayoutCase, found: list[Plan], wanted: list[RankPlan]) -> None:
    """Rows are in the very order of the reference; where they are the same rows."""
    rows = [Counter(map(tuple, p.order_R2.tolist())) for p in (*found, *wanted)]
    if rows[: len(found)] != rows[len(found) :]:
        raise NotRun("judged where the rows are right")
    for rank, (plan_found, plan_wanted) in enumerate(zip(found, wanted, strict=True)):
        if (plan_found.order_R2 != plan_wanted.order_R2).any():
            accuse(case, rank, "rows of an expert in another order", plan_wanted.order_R2, plan_found.order_R2)


def hold_plan(case: LayoutCase, found: list[Plan], wanted: list[RankPlan]) -> None:
    """All of it but the order within an expert; without an id each part is blamed on its own requirement."""
    hold_rows(case, found, wanted, id or "DSP-2")
    hold_matching(case, found, id or "DSP-3")
    hold_sizes(case, found, wanted, id or "DSP-4", "send_sizes_S", "recv_sizes_S")
    hold_sizes(case, found, wanted, id or "DSP-5", "group_sizes_e")


def wanted_plan(case: LayoutCase, ids_by_shard) -> list[RankPlan]:
    """The reference's plan for other ids on the same layout."""
    return plan(ids_by_shard, case.layout, case.spec)
