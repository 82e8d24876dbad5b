"""conformance, suite: mask. Padding tokens change no count, no loss and no capacity."""

import numpy as np

from conformance.balance.verdicts import (
    counted,
    hold_gradient,
    hold_kept,
    hold_loss,
    limited,
    loss_radius,
    lost,
    wanted_loss,
    wanted_z,
    weights_radius,
    z_lost,
    z_radius,
)
from conformance.core.check import requires
from conformance.core.judge import NotRun, Violation
from conformance.layer.verdicts import blaming, hold
from moe_ref import tokens_per_expert

MASK = ("token_mask_T",)
MASKED = (*MASK, "sequence_lengths", "tokens_per_shard")
LOSS = ("LOD-5", "LOD-6", "LOD-7", "LOD-8", "LOD-9", "LOD-11", "LOD-14")
POISON = (np.nan, np.inf, 1e30)
"""What the logits of padding hold, in calls one after the other."""


def unmasked(judge, case, *ids: str) -> None:
    """NotRun where these requirements do not hold without a mask: they are to blame."""
    if not judge.sound(case.with_inputs(token_mask_T=None), *ids):
        raise NotRun("judged where the batch without a mask is right")


def needs_valid(case) -> None:
    """NotRun where all is padding, which has a requirement of its own."""
    if not case.valid_T.any():
        raise NotRun("judged where some token is valid")


def one_batch(spec) -> bool:
    """Whether a batch that is not cut into shards has one mean; then no scope makes a difference."""
    return spec.balance.per == "batch"


def in_units(spec) -> bool:
    """Whether each sequence or each shard may have a mean of its own."""
    return spec.balance.per == "sequence" or spec.balance.scope != "global"


@requires("MSK-1", method="load", inputs=MASK, tokens=(12,))
def test_padding_is_counted_for_nobody(judge, case):
    unmasked(judge, case)
    wanted_E = tokens_per_expert(case.expert_ids_TK, case.spec.num_experts, case.valid_T)
    found_E = counted(judge, case)
    if (found_E != wanted_E).any():
        accuse("padding is counted", expected=str(wanted_E.tolist()), received=str(found_E.tolist()))  # fmt: skip


@requires("MSK-2", method="balance_loss", inputs=MASK, spec=one_batch, tokens=(12,))
def test_padding_is_in_no_mean_of_a_loss(judge, case):
    needs_valid(case)
    unmasked(judge, case, *LOSS)
    found = lost(judge, case)
    hold_loss(case, "not the loss of the valid tokens", found, wanted_loss(case), loss_radius(judge, case),
              gradient=False)  # fmt: skip


@requires("MSK-3", method="balance_loss", inputs=MASK, spec=one_batch, tokens=(12,), after=("MSK-2",))
def test_the_gradient_of_padding_is_0(judge, case):
    needs_valid(case)
    unmasked(judge, case, *LOSS)
    found, wanted = lost(judge, case).d_logits_TE, wanted_loss(case).d_logits_TE
    radius_TE = np.where(case.valid_T[:, None], loss_radius(judge, case).d_logits_TE, 0)
    hold_gradient(case, "not the gradient of the valid tokens", found, wanted, radius_TE)


@requires("MSK-4", method="balance_loss", inputs=MASKED, spec=in_units, tokens=(12,))
def test_a_unit_of_padding_is_in_no_mean(judge, case):
    unmasked(judge, case, *LOSS)
    first = case.balance.unit_of_T == case.balance.unit_of_T[-1]
    if first.all():
        raise NotRun("judged where there are several units")
    padded = case.with_inputs(token_mask_T=case.valid_T & ~first)
    found = lost(judge, padded)
    title = "a unit of padding is in the mean"
    hold_loss(padded, title, found, wanted_loss(padded), loss_radius(judge, padded))


@requires("MSK-5", method="z_loss", inputs=MASK, spec=lambda s: not s.num_null_experts, tokens=(12,))  # fmt: skip
def test_padding_is_in_no_mean_of_the_z_loss(judge, case):
    unmasked(judge, case)
    hold_loss(case, "not the z-loss of the valid tokens", z_lost(judge, case), wanted_z(case),
              z_radius(judge, case))  # fmt: skip


@requires("MSK-6", method="balance_loss", inputs=MASK, spec=one_batch, tokens=(12,), after=("MSK-2", "MSK-3"))
def test_what_padding_holds_reaches_no_loss(judge, case):
    needs_valid(case)
    unmasked(judge, case, *LOSS)
    for poison in POISON:
        spoiled = case.with_(logits_TE=np.where(case.valid_T[:, None], case.logits_TE, poison))
        found = lost(judge, spoiled)
        hold_loss(case, f"with {poison:g} in the padding", found, wanted_loss(case), loss_radius(judge, case))


@requires("MSK-7", method="capacity", inputs=MASKED, tokens=(12,), after=("CAP-1",))
def test_padding_takes_no_place(judge, case):
    unmasked(judge, case)
    found, wanted = limited(judge, case), case.limited
    hold_kept(case, "not what is kept without padding", found.expert_ids_TK, wanted.expert_ids_TK)
    hold(case, "not the weights without padding", found.weights_TK, wanted.weights_TK,
         weights_radius(judge, wanted.weights_TK))  # fmt: skip


@requires("MSK-8", method="balance_loss", inputs=MASKED, tokens=(12, 1), after=("LOD-5",))
def test_padding_alone_has_the_loss_0(judge, case):
    empty = case.with_inputs(token_mask_T=np.zeros(case.num_tokens, dtype=bool))
    found = lost(judge, empty)
    nothing = type(found)(loss=np.zeros(()), d_logits_TE=np.zeros(case.logits_TE.shape))
    hold_loss(empty, "not 0 for padding alone", found, nothing, nothing)
