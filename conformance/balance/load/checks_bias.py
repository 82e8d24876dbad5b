"""conformance, balance: load. The update of expert_bias by the counts of a step."""

import numpy as np

from conformance.balance.bounds import bias_radius
from conformance.balance.case import BalanceCase
from conformance.balance.kind import requires
from conformance.balance.verdicts import bias_of_subject, hold_unchanged
from conformance.core.check import given
from conformance.core.judge import Judge, accuse
from conformance.core.show import shown
from moe_ref import BiasUpdateSpec, bias_update

ONE_COUNT = given("judged on the counts of one rank or micro-batch", lambda case: len(case.counts_SE) == 1)


def summed(case: BalanceCase) -> BalanceCase:
    """The same case with the counts of all ranks and micro-batches in one."""
    return case.with_(counts_SE=case.counts_SE.sum(axis=0, keepdims=True))


def small(case: BalanceCase) -> BalanceCase:
    """The same case with counts that begin at 0; their differences are the same."""
    return summed(case.with_(counts_SE=case.counts_SE - case.counts_SE.min()))


def summed_and_small(case: BalanceCase) -> BalanceCase:
    """One rank's counts, which are small."""
    return summed(few(case))


def hold_bias(judge: Judge, case: BalanceCase, title: str, *, of_E: np.ndarray | bool = True) -> None:
    """The bias is the reference's, or that of some experts is."""
    counts_E = case.counts_SE.sum(axis=0)
    wanted_E, found_E = bias_update(counts_E, case.rule("update"), case.expert_bias_E), bias_of_subject(judge, case)
    right_E = np.abs(found_E - wanted_E) <= bias_radius(judge, case, wanted_E)
    if (~right_E & of_E).any():
        before = f"{title}; before {shown(case.expert_bias_E)}, counts {counts_E.tolist()}"
        accuse(before, expected=shown(wanted_E), received=shown(found_E))


@requires(
    "LOD-19",
    method="bias_update",
    spec=lambda s: s.update == BiasUpdateSpec(rate=s.update.rate),
    num_counts=(1,),
    given=(ONE_COUNT,),
)
def the_bias_moves_against_the_load(judge, case):
    hold_bias(judge, case, "not one step")


@requires(
    "LOD-20",
    method="bias_update",
    spec=lambda s: s.update.rule == "sign",
    simpler=((summed, ("LOD-19", "LOD-23", "LOD-24")),),
)
def counts_are_summed_before_the_sign_is_taken(judge, case):
    hold_bias(judge, case, "not the sign of the summed counts")


def few(case: BalanceCase) -> BalanceCase:
    """The same ranks with counts of which each sum is small."""
    return case.with_(counts_SE=case.counts_SE % 4)


@requires(
    "LOD-30",
    method="bias_update",
    counts=("many_ranks", "edges"),
    num_counts=(64,),
    spec=lambda s: s.update.rule == "sign" and s.update.frozen_E is None,
    simpler=((few, ("LOD-20",)), (summed_and_small, ("LOD-19", "LOD-23"))),
)
def the_counts_of_many_ranks_are_summed_exactly(judge, case):
    hold_bias(judge, case, "not the sign of the exact sum")


@requires("LOD-39", method="bias_update", spec=lambda s: s.update.frozen_E is None)
def an_update_changes_no_array(judge, case):
    bias_of_subject(judge, case)
    hold_unchanged(judge, {"counts": case.counts_SE, "expert_bias": case.expert_bias_E})


@requires(
    "LOD-21",
    method="bias_update",
    counts=("equal", "one_at_mean", "zero"),
    spec=lambda s: s.update.frozen_E is None,
)
def a_balanced_expert_keeps_its_bias(judge, case):
    counts_E = case.counts_SE.sum(axis=0)
    hold_bias(judge, case, "an expert with the mean count", of_E=counts_E * len(counts_E) == counts_E.sum())


@requires(
    "LOD-22",
    method="bias_update",
    spec=lambda s: s.update.rule in ("proportional", "relative") and s.update.frozen_E is None,
)
def a_proportional_step_is_as_large_as_the_excess(judge, case):
    hold_bias(judge, case, "not in proportion")


@requires(
    "LOD-23",
    method="bias_update",
    spec=lambda s: s.update.centred and s.update.frozen_E is None and s.update.rule != "tanh",
    counts=("mixed", "one_at_mean"),
    num_counts=(1,),
    given=(ONE_COUNT,),
)
def centred_steps_have_the_mean_0(judge, case):
    hold_bias(judge, case, "not centred")


@requires(
    "LOD-24",
    method="bias_update",
    spec=lambda s: s.update.frozen_E is not None and s.update.rule != "share",
    num_counts=(1,),
    given=(ONE_COUNT,),
)
def a_frozen_bias_stays(judge, case):
    hold_bias(judge, case, "with frozen experts")


@requires(
    "LOD-25",
    method="bias_update",
    counts=("large",),
    spec=lambda s: s.update.rule == "sign" and s.update.frozen_E is None,
    simpler=((small, ("LOD-19", "LOD-23")),),
)
def large_counts_move_the_bias(judge, case):
    hold_bias(judge, case, "not the sign of large counts")


@requires("LOD-46", method="bias_update", spec=lambda s: s.update.rule == "tanh", num_counts=(1,), given=(ONE_COUNT,))
def a_tanh_step_is_soft_and_momentum_takes_a_share(judge, case):
    hold_bias(judge, case, "not a soft step")


@requires("LOD-47", method="bias_update", spec=lambda s: s.update.rule == "share", num_counts=(1,), given=(ONE_COUNT,))
def a_share_step_is_of_all_slots(judge, case):
    hold_bias(judge, case, "not the wanted share less the own one")
