"""conformance, balance: capacity. An expert takes a bounded number of slots."""

import numpy as np

from conformance.balance.bounds import weight_gradient_radius, weights_radius
from conformance.balance.case import LENGTHS, BalanceCase
from conformance.balance.draw import weights_of_kind
from conformance.balance.kind import requires
from conformance.balance.predicates import SOME_UNUSED
from conformance.balance.verdicts import hold_arrays, hold_kept, kept_by_subject
from conformance.core.check import Condition
from conformance.core.holding import hold
from conformance.core.judge import Judge, NotRun, Violation, accuse
from conformance.core.show import shown
from moe_ref import UNUSED, tokens_per_expert

BEFORE = ("CAP-1", "CAP-2", "CAP-15")


def one_limit(spec) -> bool:
    return spec.capacity.then is None


def simple(spec) -> bool:
    """One limit on the whole batch, tokens in order, without null experts."""
    c = spec.capacity
    return c.scope == "global" and one_limit(spec) and c.drop_order == "first_come" and not spec.num_null_experts


def first_come(spec) -> bool:
    """One limit in parts of the batch, tokens in order."""
    return one_limit(spec) and spec.capacity.scope != "global" and spec.capacity.drop_order == "first_come"


def in_order(spec) -> bool:
    """One limit on the whole batch that looks at no weight."""
    order = spec.capacity.drop_order
    return one_limit(spec) and spec.capacity.scope == "global" and order in ("first_come", "slot_major")


def by_weight(spec) -> bool:
    return one_limit(spec) and spec.capacity.drop_order == "by_weight"


def keeps_other_slots(judge: Judge, case: BalanceCase) -> bool:
    """The subject drops other slots than the reference."""
    try:
        hold_kept(judge, case, "")
    except (NotRun, Violation):
        return True
    return False


KEEPS_OTHERS = Condition(sentence="judged where the right slots are kept", holds=keeps_other_slots)


@requires("CAP-1", method="capacity", inputs=LENGTHS, tokens=(12, 1, 0))
def a_slot_keeps_its_expert_or_none(judge, case):
    kept_by_subject(judge, case)


@requires("CAP-2", method="capacity", spec=simple, after=("CAP-1",))
def no_expert_keeps_more_than_its_capacity(judge, case):
    ids_TK = kept_by_subject(judge, case).expert_ids_TK
    counts_E, most = tokens_per_expert(ids_TK, case.spec.num_experts), int(case.capacity_trace.capacity_U[0])
    if (counts_E > most).any():
        accuse("an expert keeps too many", expected=f"at most {most}", received=shown(counts_E))


@requires("CAP-3", method="capacity", spec=simple, after=BEFORE)
def the_capacity_is_the_rounded_share(judge, case):
    ids_TK = kept_by_subject(judge, case).expert_ids_TK
    counts_E, wanted_E = tokens_per_expert(ids_TK, case.spec.num_experts), case.capacity_trace.taken_UE[0]
    if (counts_E != wanted_E).any():
        title = f"not full at {int(case.capacity_trace.capacity_U[0])} slots"
        accuse(title, expected=shown(wanted_E), received=shown(counts_E))


@requires("CAP-4", method="capacity", spec=lambda s: (s.capacity.factor or 0) >= 16)
def a_large_capacity_drops_nothing(judge, case):
    hold_kept(judge, case, "dropped under a capacity beyond the tokens")


@requires("CAP-5", method="capacity", inputs=LENGTHS, spec=first_come, after=BEFORE)
def the_capacity_is_of_its_scope(judge, case):
    hold_kept(judge, case, "not the capacity of its unit")


@requires("CAP-6", method="capacity", spec=in_order, after=BEFORE)
def the_first_ones_are_kept(judge, case):
    hold_kept(judge, case, "not the first ones")


@requires("CAP-7", method="capacity", inputs=LENGTHS, spec=by_weight, after=BEFORE)
def the_largest_weights_are_kept(judge, case):
    hold_kept(judge, case, "not the largest weights")


def hold_weights(judge: Judge, case: BalanceCase, title: str) -> None:
    """The weights are the reference's."""
    wanted_TK = case.capacity_trace.weights_TK
    hold(title, kept_by_subject(judge, case).weights_TK, wanted_TK, weights_radius(judge, wanted_TK))


@requires(
    "CAP-8",
    method="capacity",
    inputs=LENGTHS,
    spec=lambda s: s.capacity.renormalise == "no" and one_limit(s),
    unless=(KEEPS_OTHERS,),
)
def a_dropped_slot_weighs_0(judge, case):
    hold_weights(judge, case, "not the weights of the kept slots")


@requires(
    "CAP-9",
    method="capacity",
    inputs=LENGTHS,
    spec=lambda s: s.capacity.renormalise != "no" and one_limit(s),
    unless=(KEEPS_OTHERS,),
)
def renormalised_weights_are_shares(judge, case):
    hold_weights(judge, case, "not shares of the sum")


@requires("CAP-10", method="capacity", inputs=LENGTHS, after=("CAP-8", "CAP-9"), unless=(KEEPS_OTHERS,))
def a_dropped_slot_gets_no_gradient(judge, case):
    found_TK = kept_by_subject(judge, case, gradient=True).d_weights_TK
    assert found_TK is not None
    radius_TK = weight_gradient_radius(judge, case)
    hold("not the gradient of the weights", found_TK, case.capacity_gradient_TK, radius_TK)


@requires(
    "CAP-11",
    method="capacity",
    ids=("hot",),
    spec=lambda s: simple(s) and s.top_k == 1,
    tokens=(12,),
    after=("CAP-1",),
)
def a_hot_expert_costs_no_other_a_slot(judge, case):
    found_TK, given_TK, trace = kept_by_subject(judge, case).expert_ids_TK, case.expert_ids_TK, case.capacity_trace
    fits_E = trace.wanted_UE[0] <= trace.capacity_U[0]
    lost_TK = (given_TK != UNUSED) & (found_TK == UNUSED) & fits_E[given_TK]
    for t in np.flatnonzero(lost_TK.any(axis=-1)):
        crowd = f"dropped after the crowd of expert {int(trace.wanted_UE[0].argmax())}"
        accuse(crowd, token=int(t), expected=given_TK[t].tolist(), received=found_TK[t].tolist())


@requires("CAP-12", method="capacity", inputs=LENGTHS, tokens=(12,), after=("CAP-1",))
def the_same_input_drops_the_same_slots(judge, case):
    first_TK, second_TK = (kept_by_subject(judge, case).expert_ids_TK for _ in range(2))
    hold("another choice on the second call", second_TK, first_TK)


@requires(
    "CAP-13",
    method="capacity",
    inputs=LENGTHS,
    spec=lambda s: s.capacity.pad_to_capacity,
    after=("CAP-5", "CAP-6"),
    unless=(KEEPS_OTHERS,),
)
def each_kept_slot_has_one_place(judge, case):
    found, wanted = kept_by_subject(judge, case).slot_table_UEC, case.capacity_trace.slot_table_UEC
    if found is None:
        raise NotRun("capacity() returns no slot_table_UEC")
    if np.shape(found) != wanted.shape or (np.asarray(found) != wanted).any():
        accuse("not one place for each kept slot", expected=shown(wanted), received=shown(found))


@requires("CAP-14", method="capacity", inputs=LENGTHS, spec=lambda s: not one_limit(s), after=("CAP-1",))
def a_second_limit_holds_for_what_is_kept(judge, case):
    hold_kept(judge, case, "not what both limits keep")


@requires(
    "CAP-15",
    method="capacity",
    ids=("unused", "idle"),
    spec=lambda s: simple(s) and s.top_k > 1,
    given=(SOME_UNUSED,),
    after=("CAP-1",),
)
def unused_slots_take_no_place(judge, case):
    hold_kept(judge, case, "an unused slot or a null choice takes a place")


def distinct(case: BalanceCase) -> BalanceCase:
    """The same case with weights of which no two are equal."""
    return case.with_(weights_TK=weights_of_kind("distinct", case.expert_ids_TK, case.rng()))


@requires(
    "CAP-16",
    method="capacity",
    weights=("equal",),
    spec=lambda s: by_weight(s) and s.capacity.scope == "global",
    simpler=((distinct, ("CAP-7",)),),
)
def of_equal_weights_the_earlier_is_kept(judge, case):
    hold_kept(judge, case, "not the earlier of equal weights")


@requires("CAP-17", method="capacity", ids=("own", "unused"), after=("CAP-1",))
def a_capacity_changes_no_array(judge, case):
    hold_arrays(judge, case, kept_by_subject, {"expert_ids": case.expert_ids_TK, "weights": case.weights_TK})


@requires(
    "CAP-18",
    method="capacity",
    inputs=LENGTHS,
    spec=lambda s: one_limit(s) and s.capacity.drop_order == "by_best_weight",
    after=BEFORE,
)
def tokens_are_admitted_by_their_best_weight(judge, case):
    hold_kept(judge, case, "not in the order of the tokens' largest weights")
