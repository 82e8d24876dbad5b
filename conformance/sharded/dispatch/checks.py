"""conformance, sharded: dispatch. Slots travel to the ranks of their experts; every rank is judged, not rank 0.

Legend: E experts.
"""

import numpy as np

from conformance.core.check import given
from conformance.core.judge import Crash, NotRun, accuse
from conformance.sharded.case import ShardedCase
from conformance.sharded.check import PAST_A_BYTE
from conformance.sharded.draw import ids_of_kind
from conformance.sharded.kind import requires
from conformance.sharded.plans import (
    PARTS,
    accuse_rank,
    hold_exchanged_sizes,
    hold_group_sizes,
    hold_matching,
    hold_order,
    hold_plan,
    hold_rows,
    hold_sorted,
    plans_of_reference,
    plans_of_subject,
)
from conformance.sharded.predicates import AN_EMPTY_RANK, FILLED, any_layout, lossless, small_buffer, unplaced
from moe_ref import UNUSED, ShardLayout

CROWDED = ("skewed", "one_expert", "one_rank")
"""Loads that are more than a small buffer holds."""


def has_slots_without_an_expert(case: ShardedCase) -> bool:
    """Unused slots, or null experts."""
    ids = np.concatenate(case.ids_by_shard)
    return bool(((ids == UNUSED) | (ids >= case.spec.router.num_experts)).any())


def ids_of_load(case: ShardedCase, load: str) -> list[np.ndarray]:
    """Ids of another load for the same layout."""
    rng = np.random.default_rng(case.seed + 1)
    return case.by_shard(ids_of_kind(load, case.num_tokens, case.spec.router, case.layout, rng))


@requires("DSP-1", method="dispatch", counts=FILLED, loads=("even",))
def dispatch_runs_and_returns_a_plan_for_every_rank(judge, case):
    plans_of_subject(judge, case)


@requires(
    "DSP-2",
    method="dispatch",
    layout=unplaced,
    counts=FILLED,
    crowd=PAST_A_BYTE,
    greatest_crowd=(16385, 2),
    after=("DSP-1",),
)
def the_slot_of_an_expert_is_a_row_of_its_owner_once(judge, case):
    hold_rows(case, plans_of_subject(judge, case), case.plans)


@requires("DSP-3", method="dispatch", layout=any_layout, crowd=PAST_A_BYTE, after=("DSP-1",))
def what_a_sends_to_b_is_what_b_receives_from_a(judge, case):
    hold_matching(case, plans_of_subject(judge, case))


def returns_rows(layout: ShardLayout) -> bool:
    """The rows of each rank come back to every rank."""
    return layout.strategy == "replicated_ragged"


@requires(
    "DSP-4",
    method="dispatch",
    layout=lambda layout: unplaced(layout) and not returns_rows(layout),
    counts=FILLED,
    crowd=PAST_A_BYTE,
    after=("DSP-1", "DSP-2", "DSP-3"),
)
def a_rank_sends_what_the_strategy_has_travel(judge, case):
    hold_exchanged_sizes(case, plans_of_subject(judge, case), case.plans)


@requires(
    "DSP-5",
    method="dispatch",
    layout=unplaced,
    counts=FILLED,
    crowd=PAST_A_BYTE,
    greatest_crowd=(16385, 16385),
    after=("DSP-1", "DSP-2"),
)
def each_local_expert_has_the_rows_of_its_global_id(judge, case):
    hold_group_sizes(case, plans_of_subject(judge, case), case.plans)


@requires("DSP-6", method="dispatch", crowd=PAST_A_BYTE, after=("DSP-1", "DSP-2", "DSP-14"))
def the_rows_of_a_rank_are_sorted_by_local_expert(judge, case):
    hold_sorted(case, plans_of_subject(judge, case))


@requires("DSP-7", method="dispatch", after=("DSP-1", "DSP-2", "DSP-6", "DSP-14"))
def the_rows_of_an_expert_are_in_the_order_of_arrival(judge, case):
    hold_order(case, plans_of_subject(judge, case), case.plans)


@requires("DSP-8", method="dispatch", layout=unplaced, counts=("some_empty", "empty"), given=(AN_EMPTY_RANK,))
def a_rank_without_tokens_takes_part(judge, case):
    hold_plan(case, plans_of_subject(judge, case), case.plans)


@requires(
    "DSP-9",
    method="dispatch",
    layout=unplaced,
    loads=("unused", "nobody"),
    given=(given("judged where a slot has no expert", has_slots_without_an_expert),),
)
def unused_slots_and_null_experts_are_no_rows(judge, case):
    hold_plan(case, plans_of_subject(judge, case), case.plans)


@requires(
    "DSP-10",
    method="dispatch",
    layout=lambda layout: unplaced(layout) and layout.expert > 1,
    loads=("one_expert", "one_rank"),
    crowd=PAST_A_BYTE,
    after=("DSP-1",),
)
def no_load_loses_a_row(judge, case):
    for ids_by_shard in (case.ids_by_shard, ids_of_load(case, "one_rank")):
        found = plans_of_subject(judge, case, ids_by_shard)
        hold_plan(case, found, plans_of_reference(case, ids_by_shard))


def of_the_ring(layout: ShardLayout) -> bool:
    """Every rank has the tokens of all, and a buffer that may be too small for its rows."""
    return small_buffer(layout) and layout.strategy == "ring_of_experts"


@requires(
    "DSP-11",
    method="dispatch",
    layout=lambda layout: small_buffer(layout) and not of_the_ring(layout),
    loads=CROWDED,
    after=("DSP-1",),
)
def a_small_buffer_admits_rows_in_order(judge, case):
    hold_plan(case, plans_of_subject(judge, case), case.plans)


@requires("DSP-12", method="dispatch", layout=small_buffer, loads=CROWDED, after=("DSP-1", "DSP-11", "DSP-17"))
def rows_that_are_not_admitted_are_reported(judge, case):
    for rank, (found, wanted) in enumerate(zip(plans_of_subject(judge, case), case.plans, strict=True)):
        if found.overflow != wanted.overflow:
            accuse_rank(case, rank, "overflow is another", str(wanted.overflow), str(found.overflow))


@requires(
    "DSP-13",
    method="dispatch",
    layout=lambda layout: unplaced(layout) and layout.num_rank_groups > 1,
    after=("DSP-1",),
)
def a_plan_depends_on_its_own_group_alone(judge, case):
    layout = case.layout
    others, group = ids_of_load(case, "skewed"), int(case.rng().integers(layout.num_rank_groups))
    mixed = [
        own if shard in layout.shards_of_group(group) else other
        for shard, (own, other) in enumerate(zip(case.ids_by_shard, others, strict=True))
    ]
    before, after = plans_of_subject(judge, case), plans_of_subject(judge, case, mixed)
    for rank in range(group * layout.expert, (group + 1) * layout.expert):
        for name in PARTS:
            first, second = getattr(before[rank], name), getattr(after[rank], name)
            if not np.array_equal(first, second):
                accuse_rank(case, rank, f"other {name} with other tokens in other groups", first, second)


@requires(
    "DSP-14",
    method="dispatch",
    layout=lambda layout: lossless(layout) and layout.placement is not None and layout.expert > 1,
    counts=FILLED,
    after=("DSP-1",),
)
def a_rank_owns_the_experts_of_its_places(judge, case):
    hold_plan(case, plans_of_subject(judge, case), case.plans)


@requires("DSP-15", method="dispatch", layout=unplaced, after=("DSP-1",))
def nothing_of_an_earlier_plan_is_left(judge, case):
    # The fullest plan first, then one of few rows: what is not cleared shows.
    fuller, emptier = ids_of_load(case, "one_expert"), ids_of_load(case, "unused")
    for ids_by_shard in (fuller, emptier, case.ids_by_shard, fuller):
        found = plans_of_subject(judge, case, ids_by_shard)
        hold_plan(case, found, plans_of_reference(case, ids_by_shard))


@requires("DSP-16", method="dispatch", counts=("equal",), after=("DSP-1",))
def a_layout_that_does_not_divide_the_experts_is_refused(judge, case):
    E = case.spec.router.num_experts
    wrong = int(case.rng().choice([n for n in range(2, 9) if E % n]))
    plain = {"strategy": "all_to_all", "placement": None, "ranks_per_node": None, "buffer_factor": None}
    layout = case.layout.replace(data=1, fsdp=1, tensor=1, expert=wrong, **plain)
    refused = case.with_(layout=layout, tokens_per_shard=(1,) * wrong)
    ids_by_shard = [np.arange(case.spec.router.top_k)[None]] * wrong
    try:
        judge.call(refused, "dispatch", ids_by_shard, layout, case.spec)
    except (NotRun, Crash, ValueError):
        return
    accuse(f"{wrong} ranks share {E} experts", expected="a refusal", received="a plan")


@requires("DSP-17", method="dispatch", layout=of_the_ring, loads=CROWDED, after=("DSP-1",))
def a_small_buffer_of_the_ring_keeps_the_first_rows(judge, case):
    hold_plan(case, plans_of_subject(judge, case), case.plans)


@requires(
    "DSP-18",
    method="dispatch",
    layout=returns_rows,
    counts=FILLED,
    crowd=(300, 300),
    after=("DSP-1", "DSP-2", "DSP-3"),
)
def all_rows_of_a_rank_go_back_to_every_rank(judge, case):
    hold_exchanged_sizes(case, plans_of_subject(judge, case), case.plans)
