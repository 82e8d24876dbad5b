"""conformance, suite: dispatch. Slots travel to the ranks of their experts; every rank is judged, not rank 0."""

import numpy as np
import pytest

from conformance.core.check import requires
from conformance.core.judge import LayoutCheck, NotRun, Violation
from conformance.sharded.case import LayoutCase
from conformance.sharded.draw import given_ids
from conformance.sharded.plans import (
    accuse,
    hold_matching,
    hold_order,
    hold_plan,
    hold_rows,
    hold_sizes,
    hold_sorted,
    planned,
    wanted_plan,
)
from conformance.sharded.small_worlds import assignments, worlds_of_dispatch
from moe_ref import UNUSED

FILLED = ("equal", "uneven", "prime")
"""Counts of tokens that leave no rank without any."""


def unplaced(layout) -> bool:
    return layout.buffer_factor is None and layout.placement is None


def other_ids(case: LayoutCase, load: str) -> list[np.ndarray]:
    """Ids of another load for the same layout."""
    rng = np.random.default_rng(case.seed + 1)
    return case.by_shard(given_ids(case.spec.router, case.layout, case.num_tokens, load, rng))


@requires("DSP-1", method="dispatch", counts=FILLED, loads=("even",))
def test_dispatch_runs_and_returns_a_plan_for_every_rank(judge, case):
    planned(judge, case)


@requires("DSP-2", method="dispatch", layout=unplaced, counts=FILLED, after=("DSP-1",))
def test_the_slot_of_an_expert_is_a_row_of_its_owner_once(judge, case):
    hold_rows(case, planned(judge, case), case.plans)


@requires("DSP-3", method="dispatch", layout=lambda layout: True, after=("DSP-1",))
def test_what_a_sends_to_b_is_what_b_receives_from_a(judge, case):
    hold_matching(case, planned(judge, case))


@requires("DSP-4", method="dispatch", layout=unplaced, counts=FILLED, after=("DSP-1", "DSP-2", "DSP-3"))
def test_a_rank_sends_what_the_strategy_has_travel(judge, case):
    hold_sizes(case, planned(judge, case), case.plans, "send_sizes_S", "recv_sizes_S")


@requires("DSP-5", method="dispatch", layout=unplaced, counts=FILLED, after=("DSP-1", "DSP-2"))
def test_each_local_expert_has_the_rows_of_its_global_id(judge, case):
    hold_sizes(case, planned(judge, case), case.plans, "group_sizes_e")


@requires("DSP-6", method="dispatch", after=("DSP-1", "DSP-2", "DSP-14"))
def test_the_rows_of_a_rank_are_sorted_by_local_expert(judge, case):
    hold_sorted(case, planned(judge, case))


@requires("DSP-7", method="dispatch", after=("DSP-1", "DSP-2", "DSP-6", "DSP-14"))
def test_the_rows_of_an_expert_are_in_the_order_of_arrival(judge, case):
    hold_order(case, planned(judge, case), case.plans)


@requires("DSP-8", method="dispatch", layout=unplaced, counts=("some_empty", "empty"))
def test_a_rank_without_tokens_takes_part(judge, case):
    if 0 not in case.tokens_per_shard:
        raise NotRun("judged where a rank has no token")
    hold_plan(case, planned(judge, case), case.plans)


@requires("DSP-9", method="dispatch", layout=unplaced, loads=("unused", "nobody"))
def test_unused_slots_and_null_experts_are_no_rows(judge, case):
    ids = np.concatenate(case.ids_by_shard)
    if not ((ids == UNUSED) | (ids >= case.spec.router.num_experts)).any():
        raise NotRun("judged where a slot has no expert")
    hold_plan(case, planned(judge, case), case.plans)


@requires("DSP-10", method="dispatch", layout=lambda layout: unplaced(layout) and layout.expert > 1,
          loads=("one_expert", "one_rank"), after=("DSP-1",))  # fmt: skip
def test_no_load_loses_a_row(judge, case):
    for ids_by_shard in (case.ids_by_shard, other_ids(case, "one_rank")):
        found = planned(judge, case, ids_by_shard)
        hold_plan(case, found, wanted_plan(case, ids_by_shard))


def small_buffer(layout) -> bool:
    return layout.buffer_factor is not None and layout.expert > 1


@requires("DSP-11", method="dispatch", layout=small_buffer, loads=("skewed", "one_expert", "one_rank"),
          after=("DSP-1",))  # fmt: skip
def test_a_small_buffer_admits_rows_in_order(judge, case):
    hold_plan(case, planned(judge, case), case.plans)


@requires("DSP-12", method="dispatch", layout=small_buffer, loads=("skewed", "one_expert", "one_rank"),
          after=("DSP-1", "DSP-11"))  # fmt: skip
def test_rows_that_are_not_admitted_are_reported(judge, case):
    for rank, (found, wanted) in enumerate(zip(planned(judge, case), case.plans, strict=True)):
        if found.overflow != wanted.overflow:
            accuse(case, rank, "overflow is another", str(wanted.overflow), str(found.overflow))


@requires("DSP-13", method="dispatch", layout=lambda layout: unplaced(layout) and layout.num_rank_groups > 1,
          after=("DSP-1",))  # fmt: skip
def test_a_plan_depends_on_its_own_group_alone(judge, case):
    layout = case.layout
    others, group = other_ids(case, "skewed"), int(case.rng().integers(layout.num_rank_groups))
    mixed = [own if shard in layout.shards_of_group(group) else other
             for shard, (own, other) in enumerate(zip(case.ids_by_shard, others, strict=True))]  # fmt: skip
    before, after = planned(judge, case), planned(judge, case, mixed)
    for rank in range(group * layout.expert, (group + 1) * layout.expert):
        for name in ("send_sizes_S", "recv_sizes_S", "group_sizes_e", "order_R2"):
            first, second = getattr(before[rank], name), getattr(after[rank], name)
            if not np.array_equal(first, second):
                accuse(case, rank, f"other {name} with other tokens in other groups", first, second)


@requires("DSP-14", method="dispatch", layout=lambda layout: layout.placement is not None and layout.expert > 1
          and layout.buffer_factor is None, counts=FILLED, after=("DSP-1",))  # fmt: skip
def test_a_rank_owns_the_experts_of_its_places(judge, case):
    hold_plan(case, planned(judge, case), case.plans)


@requires("DSP-15", method="dispatch", layout=unplaced, after=("DSP-1",))
def test_nothing_of_an_earlier_plan_is_left(judge, case):
    # The fullest plan first, then one of few rows: what is not cleared shows.
    fuller, emptier = other_ids(case, "one_expert"), other_ids(case, "unused")
    for ids_by_shard in (fuller, emptier, case.ids_by_shard, fuller):
        found = planned(judge, case, ids_by_shard)
        hold_plan(case, found, wanted_plan(case, ids_by_shard))


@requires("DSP-16", method="dispatch", counts=("equal",), after=("DSP-1",))
def test_a_layout_that_does_not_divide_the_experts_is_refused(judge, case):
    E = case.spec.router.num_experts
    wrong = int(case.rng().choice([n for n in range(2, 9) if E % n]))
    layout = case.layout.replace(data=1, fsdp=1, tensor=1, expert=wrong, strategy="all_to_all", placement=None,
                                 ranks_per_node=None, buffer_factor=None)  # fmt: skip
    refused = case.with_(layout=layout, tokens_per_shard=(1,) * wrong)
    ids_by_shard = [np.arange(case.spec.router.top_k)[None]] * wrong
    try:
        judge.call(refused, "dispatch", ids_by_shard, layout, case.spec)
    except (NotRun, ValueError):
        return
    except Violation as violation:
        if violation.title == "raised an error":
            return
        raise
    accuse(f"{wrong} ranks share {E} experts", expected="a refusal", received="a plan")


def hold_everything(judge, case) -> None:
    """Each part of the plan, blamed on its own requirement."""
    found = planned(judge, case)
    hold_plan(case, found, case.plans)
    hold_sorted(case, found)


EVERYTHING = LayoutCheck(requirement="DSP-2", run=hold_everything, method="dispatch")


def test_every_assignment_of_few_tokens_on_two_and_three_ranks(judge):
    if "dispatch" not in judge.capabilities:
        pytest.skip("unsupported: dispatch() is not defined")
    supports = judge.why_not_laid_out
    worlds = [c for c in worlds_of_dispatch() if supports(c.spec, c.layout, c.tokens_per_shard) is None]
    if not worlds:
        pytest.skip("unsupported: no layout of two or three ranks")
    for world in worlds:
        for case in assignments(world):
            judge.examine(EVERYTHING, case)
