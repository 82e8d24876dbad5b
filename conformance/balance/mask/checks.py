"""conformance, balance: mask. Padding tokens change no count, no loss and no capacity."""

import numpy as np

from conformance.balance.bounds import (
    Loss,
    loss_radius,
    wanted_loss,
    wanted_z_loss,
    weights_radius,
    z_loss_radius,
)
from conformance.balance.case import LENGTHS, BalanceCase
from conformance.balance.kind import requires
from conformance.balance.verdicts import (
    hold_balance,
    hold_counts,
    hold_cut_z_losses,
    hold_gradient,
    hold_loss,
    kept_by_subject,
    loss_of_subject,
    z_loss_of_subject,
)
from conformance.core.check import given
from conformance.core.holding import hold
from moe_ref import tokens_per_expert

MASK = ("token_mask_T",)
MASK_AND_LENGTHS = (*MASK, *LENGTHS)
LOSS = ("LOD-5", "LOD-6", "LOD-7", "LOD-8", "LOD-9", "LOD-11", "LOD-14", "LOD-26")
LOSS_AND_GRADIENT = (*LOSS, "LOD-12")
CAPACITY = ("CAP-3", "CAP-5", "CAP-6", "CAP-7", "CAP-8", "CAP-9", "CAP-14")
POISON = (np.nan, np.inf, -np.inf, 1e30)
"""What the logits of padding hold, in calls one after the other."""
POISONED_IDS = (10**6, -7)
"""What the ids of padding hold, and its weights beside them: NaN, then inf."""

SOME_VALID = given("judged where some token is valid", lambda case: case.valid_T.any())
ALL_PADDING = given("judged where all is padding", lambda case: not case.valid_T.any())


def has_padded_unit(case: BalanceCase) -> bool:
    """Whether the tokens of one unit are padding, and some of another are not."""
    units = set(case.balance_trace.unit_of_T)
    valid_units = set(case.balance_trace.unit_of_T[case.valid_T])
    return bool(valid_units) and units != valid_units


PADDED_UNIT = given("judged where one of several units is padding alone", has_padded_unit)


def unmasked(case: BalanceCase) -> BalanceCase:
    """The same case without a mask."""
    return case.with_inputs(token_mask_T=None)


def poisoned(case: BalanceCase, **held: float) -> BalanceCase:
    """The same case with these in the rows of padding, each in the array of its name."""
    return case.with_(
        **{name: np.where(case.valid_T[:, None], getattr(case, name), poison) for name, poison in held.items()}
    )


def of_batches(spec) -> bool:
    """A batch that is not cut into shards has one mean; then no scope makes a difference."""
    return spec.balance.per == "batch"


def of_units(spec) -> bool:
    """Each sequence or each shard may have a mean of its own; that of 'running_mean' counts padding by definition."""
    balance = spec.balance
    return balance.scope != "running_mean" and (balance.per == "sequence" or balance.scope != "global")


@requires("MSK-1", method="load", inputs=MASK, tokens=(12, 257, 2049), simpler=((unmasked, ("LOD-2",)),))
def padding_is_counted_for_nobody(judge, case):
    wanted_E = tokens_per_expert(case.expert_ids_TK, case.spec.num_experts, case.valid_T)
    hold_counts(judge, case, wanted_E, "padding is counted")


@requires(
    "MSK-2",
    method="balance_loss",
    inputs=MASK,
    spec=of_batches,
    masks=("some",),
    tokens=(12,),
    given=(SOME_VALID,),
    simpler=((unmasked, LOSS),),
)
def padding_is_in_no_mean_of_a_loss(judge, case):
    hold_balance(judge, case, "not the loss of the valid tokens")


@requires(
    "MSK-3",
    method="balance_loss",
    inputs=MASK,
    spec=of_batches,
    masks=("some",),
    tokens=(12,),
    given=(SOME_VALID,),
    after=("MSK-2",),
    simpler=((unmasked, LOSS_AND_GRADIENT),),
)
def the_gradient_of_padding_is_0(judge, case):
    of_valid = loss_radius(judge, case)
    radius = Loss(loss=of_valid.loss, d_logits_TE=np.where(case.valid_T[:, None], of_valid.d_logits_TE, 0))
    hold_gradient("not the gradient of the valid tokens", loss_of_subject(judge, case), wanted_loss(case), radius)


@requires(
    "MSK-4",
    method="balance_loss",
    inputs=MASK_AND_LENGTHS,
    spec=of_units,
    masks=("unit",),
    tokens=(12,),
    given=(PADDED_UNIT,),
    simpler=((unmasked, LOSS_AND_GRADIENT),),
)
def a_unit_of_padding_is_in_no_mean(judge, case):
    hold_balance(judge, case, "a unit of padding is in the mean", gradient=True)


@requires(
    "MSK-5",
    method="z_loss",
    inputs=MASK,
    spec=lambda s: not s.num_null_experts,
    tokens=(12,),
    simpler=((unmasked, ("LOD-16", "LOD-17")),),
)
def padding_is_in_no_mean_of_the_z_loss(judge, case):
    found, radius = z_loss_of_subject(judge, case), z_loss_radius(judge, case)
    hold_loss("not the z-loss of the valid tokens", found, wanted_z_loss(case), radius)


@requires(
    "MSK-6",
    method="balance_loss",
    inputs=MASK,
    spec=of_batches,
    masks=("some",),
    tokens=(12,),
    given=(SOME_VALID,),
    after=("MSK-2", "MSK-3"),
    simpler=((unmasked, LOSS_AND_GRADIENT),),
)
def what_padding_holds_reaches_no_loss(judge, case):
    for poison in POISON:
        found, radius = loss_of_subject(judge, poisoned(case, logits_TE=poison)), loss_radius(judge, case)
        hold_loss(f"with {poison:g} in the padding", found, wanted_loss(case), radius)


@requires(
    "MSK-7",
    method="capacity",
    inputs=MASK_AND_LENGTHS,
    tokens=(12,),
    after=("CAP-1",),
    simpler=((unmasked, CAPACITY),),
)
def padding_takes_no_place(judge, case):
    found, wanted = kept_by_subject(judge, case), case.capacity_trace
    hold("not what is kept without padding", found.expert_ids_TK, wanted.expert_ids_TK)
    radius_TK = weights_radius(judge, wanted.weights_TK)
    hold("not the weights without padding", found.weights_TK, wanted.weights_TK, radius_TK)


@requires(
    "MSK-8",
    method="balance_loss",
    inputs=MASK_AND_LENGTHS,
    masks=("all",),
    tokens=(12, 1),
    given=(ALL_PADDING,),
    after=("LOD-5",),
)
def padding_alone_has_the_loss_0(judge, case):
    hold_loss("not 0 for padding alone", loss_of_subject(judge, case), Loss.zero(case), Loss.zero(case))


def without_null_with_two_slots(spec) -> bool:
    """One size, as the slots of a batch are nothing to a z-loss."""
    return not spec.num_null_experts and spec.top_k == 2


@requires(
    "MSK-9",
    method="z_loss",
    inputs=MASK,
    spec=without_null_with_two_slots,
    masks=("some",),
    tokens=(12,),
    after=("MSK-5",),
    simpler=((unmasked, ("LOD-16", "LOD-17", "LOD-28")),),
)
def the_z_loss_of_unequal_ranks_is_the_mean_over_valid_tokens(judge, case):
    hold_cut_z_losses(judge, case)


@requires(
    "MSK-10",
    method="z_loss",
    inputs=MASK,
    spec=without_null_with_two_slots,
    masks=("some",),
    tokens=(12,),
    after=("MSK-5",),
    simpler=((unmasked, ("LOD-16", "LOD-17")),),
)
def what_padding_holds_reaches_no_z_loss(judge, case):
    for poison in POISON:
        found, radius = z_loss_of_subject(judge, poisoned(case, logits_TE=poison)), z_loss_radius(judge, case)
        hold_loss(f"with {poison:g} in the padding", found, wanted_z_loss(case), radius)


@requires(
    "MSK-11",
    method="capacity",
    inputs=MASK_AND_LENGTHS,
    masks=("some",),
    tokens=(12,),
    after=("CAP-1", "MSK-7"),
    simpler=((unmasked, CAPACITY),),
)
def what_padding_holds_takes_no_place(judge, case):
    wanted = case.capacity_trace
    for poison, weight in zip(POISONED_IDS, (np.nan, np.inf), strict=True):
        found = kept_by_subject(judge, poisoned(case, expert_ids_TK=poison, weights_TK=weight))
        hold(f"with the ids {poison} in the padding", found.expert_ids_TK, wanted.expert_ids_TK)
        hold("with other weights in the padding", found.weights_TK, wanted.weights_TK,
             weights_radius(judge, wanted.weights_TK))  # fmt: skip


@requires(
    "MSK-12",
    method="load",
    inputs=MASK,
    masks=("some",),
    tokens=(12, 257),
    after=("MSK-1",),
    simpler=((unmasked, ("LOD-2", "LOD-29")),),
)
def the_ids_of_padding_are_counted_for_nobody(judge, case):
    wanted_E = tokens_per_expert(case.expert_ids_TK, case.spec.num_experts, case.valid_T)
    for poison in POISONED_IDS:
        hold_counts(judge, poisoned(case, expert_ids_TK=poison), wanted_E, f"with the ids {poison} in the padding")
