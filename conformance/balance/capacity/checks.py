"""conformance, suite: capacity. An expert takes a bounded number of slots."""

import numpy as np

from conformance.balance.verdicts import hold_kept, limited, weights_radius
from conformance.core.check import requires
from conformance.core.judge import NotRun, Violation
from conformance.layer.verdicts import hold, shown
from moe_ref import UNUSED, tokens_per_expert

CUTS = ("sequence_lengths", "tokens_per_shard")
SCOPED = (("sequence", "first_come"), ("rank", "first_come"))
ORDERED = (("global", "first_come"), ("global", "slot_major"))
BEFORE = ("CAP-1", "CAP-2", "CAP-15")


def simple(spec) -> bool:
    """One limit on the whole batch, tokens in order, without null experts."""
    c = spec.capacity
    return c.scope == "global" and c.then is None and c.drop_order == "first_come" and not spec.num_null_experts


def one_limit(spec) -> bool:
    return spec.capacity.then is None


def hold_choice(judge, case, title: str) -> None:
    """The kept slots are the reference's."""
    hold_kept(case, title, limited(judge, case).expert_ids_TK, case.limited.expert_ids_TK)


def as_kept(judge, case, **how):
    """What the subject returned, where it keeps the right slots."""
    found = limited(judge, case, **how)
    if (found.expert_ids_TK != case.limited.expert_ids_TK).any():
        raise NotRun("judged where the right slots are kept")
    return found


@requires("CAP-1", method="capacity", inputs=CUTS, tokens=(12, 1, 0))
def test_a_slot_keeps_its_expert_or_none(judge, case):
    limited(judge, case)


@requires("CAP-2", method="capacity", spec=simple, after=("CAP-1",))
def test_no_expert_keeps_more_than_its_capacity(judge, case):
    ids_TK = limited(judge, case).expert_ids_TK
    counts_E, most = tokens_per_expert(ids_TK, case.spec.num_experts), int(case.limited.capacity_U[0])
    if (counts_E > most).any():
        accuse("an expert keeps too many", expected=f"at most {most}", received=shown(counts_E))


@requires("CAP-3", method="capacity", spec=simple, after=BEFORE)
def test_the_capacity_is_the_rounded_share(judge, case):
    ids_TK = limited(judge, case).expert_ids_TK
    counts_E, wanted_E = tokens_per_expert(ids_TK, case.spec.num_experts), case.limited.taken_UE[0]
    if (counts_E != wanted_E).any():
        title = f"not full at {int(case.limited.capacity_U[0])} slots"
        accuse(title, expected=shown(wanted_E), received=shown(counts_E))


@requires("CAP-4", method="capacity", spec=lambda s: (s.capacity.factor or 0) >= 16)
def test_a_large_capacity_drops_nothing(judge, case):
    hold_choice(judge, case, "dropped under a capacity beyond the tokens")


@requires("CAP-5", method="capacity", inputs=CUTS, after=BEFORE,
          spec=lambda s: one_limit(s) and (s.capacity.scope, s.capacity.drop_order) in SCOPED)  # fmt: skip
def test_the_capacity_is_of_its_scope(judge, case):
    hold_choice(judge, case, "not the capacity of its unit")


@requires("CAP-6", method="capacity", after=BEFORE,
          spec=lambda s: one_limit(s) and (s.capacity.scope, s.capacity.drop_order) in ORDERED)  # fmt: skip
def test_the_first_ones_are_kept(judge, case):
    hold_choice(judge, case, "not the first ones")


@requires("CAP-7", method="capacity", inputs=CUTS, after=BEFORE,
          spec=lambda s: one_limit(s) and s.capacity.drop_order == "by_weight")  # fmt: skip
def test_the_largest_weights_are_kept(judge, case):
    hold_choice(judge, case, "not the largest weights")


@requires("CAP-8", method="capacity", inputs=CUTS, spec=lambda s: s.capacity.renormalise == "no" and one_limit(s))
def test_a_dropped_slot_weighs_0(judge, case):
    found, wanted_TK = as_kept(judge, case), case.limited.weights_TK
    hold(case, "not the weights of the kept slots", found.weights_TK, wanted_TK,
         weights_radius(judge, wanted_TK))  # fmt: skip


@requires("CAP-9", method="capacity", inputs=CUTS, spec=lambda s: s.capacity.renormalise != "no" and one_limit(s))
def test_renormalised_weights_are_shares(judge, case):
    found, wanted_TK = as_kept(judge, case), case.limited.weights_TK
    hold(case, "not shares of the sum", found.weights_TK, wanted_TK, weights_radius(judge, wanted_TK))


@requires("CAP-10", method="capacity", inputs=CUTS, after=("CAP-8", "CAP-9"))
def test_a_dropped_slot_gets_no_gradient(judge, case):
    found, wanted_TK = as_kept(judge, case, gradient=True), case.d_limited_TK
    assert found.d_weights_TK is not None
    # A quotient's gradient is a difference of terms as large as the pull over the sum.
    sum_T1 = np.maximum(np.where(case.limited.kept_TK, case.limited.given_weights_TK, 0).sum(axis=-1), 1 / 64)[:, None]
    size_TK = np.abs(case.d_weights_TK).sum(axis=-1, keepdims=True) * (1 + 4 / sum_T1)
    dropped_TK = (wanted_TK == 0) & ~case.limited.kept_TK
    radius_TK = np.where(dropped_TK, 0, weights_radius(judge, size_TK))
    hold(case, "not the gradient of the weights", found.d_weights_TK, wanted_TK, radius_TK)


@requires("CAP-11", method="capacity", spec=lambda s: simple(s) and s.top_k == 1, tokens=(12,), after=("CAP-1",))
def test_a_hot_expert_costs_no_other_a_slot(judge, case):
    E, T = case.spec.num_experts, case.num_tokens
    for hot in range(E):
        ids_TK = np.full((T, 1), hot)
        ids_TK[-1, 0] = (hot + 1) % E
        skewed = case.with_(expert_ids_TK=ids_TK)
        if skewed.limited.capacity_U[0] > 0 and limited(judge, skewed).expert_ids_TK[-1, 0] == UNUSED:
            accuse(f"dropped after the crowd of expert {hot}", token=T - 1, expected=str(ids_TK[-1].tolist()), received="[-1]")  # fmt: skip


@requires("CAP-12", method="capacity", inputs=CUTS, tokens=(12,), after=("CAP-1",))
def test_the_same_input_drops_the_same_slots(judge, case):
    first, second = limited(judge, case), limited(judge, case)
    hold_kept(case, "another choice on the second call", second.expert_ids_TK, first.expert_ids_TK)


@requires("CAP-13", method="capacity", inputs=CUTS, spec=lambda s: s.capacity.pad_to_capacity, after=("CAP-5", "CAP-6"))
def test_each_kept_slot_has_one_place(judge, case):
    found, wanted = as_kept(judge, case).slot_table_UEC, case.limited.slot_table_UEC
    if found is None:
        raise NotRun("capacity() returns no slot_table_UEC")
    if np.shape(found) != wanted.shape or (np.asarray(found) != wanted).any():
        accuse("not one place for each kept slot", expected=shown(wanted), received=shown(found))  # fmt: skip


@requires("CAP-14", method="capacity", inputs=CUTS, spec=lambda s: not one_limit(s), after=("CAP-1",))
def test_a_second_limit_holds_for_what_is_kept(judge, case):
    hold_choice(judge, case, "not what both limits keep")


@requires("CAP-15", method="capacity", ids=("unused",), spec=lambda s: simple(s) and s.top_k > 1, after=("CAP-1",))
def test_unused_slots_take_no_place(judge, case):
    hold_choice(judge, case, "an unused slot or a null choice takes a place")


@requires("CAP-16", method="capacity",
          spec=lambda s: s.capacity.drop_order == "by_weight" and s.capacity.scope == "global")  # fmt: skip
def test_of_equal_weights_the_earlier_is_kept(judge, case):
    if not judge.sound(case, "CAP-7"):
        raise NotRun("judged where the largest weights are kept")
    equal = case.with_(weights_TK=np.where(case.expert_ids_TK == UNUSED, 0, 0.5))
    hold_choice(judge, equal, "not the earlier of equal weights")
