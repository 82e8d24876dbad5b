"""conformance, balance: what a subject returns for a case, checked for its form, and held against the reference.

An error, and a result of another form, violate the requirement of the check that runs.

Legend: T tokens, K top_k, E experts, U units, C capacity.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from conformance.balance.bounds import (
    Loss,
    loss_radius,
    mask_of,
    wanted_loss,
    wanted_z_loss,
    z_loss_radius,
)
from conformance.balance.case import BalanceCase
from conformance.balance.draw import cut
from conformance.core.holding import array_from, hold
from conformance.core.judge import Judge, NotRun, Violation, accuse
from moe_ref import UNUSED, next_coefficient, quantile_update


def counts_of_subject(judge: Judge, case: BalanceCase) -> np.ndarray:
    """The subject's (E,) counts, as int64."""
    E = case.spec.num_experts
    found = array_from(judge.call(case, "load", case.expert_ids_TK.copy(), E, **mask_of(case)), "counts: no array")
    if found.dtype.kind not in "iu" or found.shape != (E,):
        received = f"{found.dtype}{list(found.shape)}"
        accuse("not a count for each expert", expected=f"{E} integers", received=received)
    return found.astype(np.int64)


def loss_of_subject(judge: Judge, case: BalanceCase, **inputs: Any) -> Loss:
    """The subject's balance loss; `inputs` are given besides those of the case."""
    given = (case.logits_TE.astype(np.float32), case.expert_ids_TK.copy(), case.spec.balance, case.router)
    return _loss(case, judge.call(case, "balance_loss", *given, **case.inputs, **inputs))


def z_loss_of_subject(judge: Judge, case: BalanceCase) -> Loss:
    """The subject's z-loss."""
    given = (case.logits_TE.astype(np.float32), case.spec.coeff)
    return _loss(case, judge.call(case, "z_loss", *given, **case.inputs))


def _loss(case: BalanceCase, returned: Any) -> Loss:
    """A number and a gradient of the shape of the logits, in float64."""
    try:
        named = {name: returned[name] for name in ("loss", "d_logits_TE")}
    except (TypeError, KeyError):
        raise Violation("no loss and d_logits_TE", expected="both", received=str(returned)[:200]) from None
    loss, d_logits_TE = (array_from(v, f"{name}: no array").astype(np.float64) for name, v in named.items())
    if loss.shape or d_logits_TE.shape != case.logits_TE.shape:
        expected, received = f"() and {case.logits_TE.shape}", f"{loss.shape} and {d_logits_TE.shape}"
        accuse("loss or gradient of another shape", expected=expected, received=received)
    return Loss(loss=loss, d_logits_TE=d_logits_TE)


def bias_of_subject(judge: Judge, case: BalanceCase) -> np.ndarray:
    """The subject's (E,) bias after a step."""
    given = (case.counts_SE.copy(), case.spec.update, case.expert_bias_E.astype(np.float32))
    found = array_from(judge.call(case, "bias_update", *given), "bias: no array").astype(np.float64)
    if found.shape != case.expert_bias_E.shape:
        accuse("bias of another shape", expected=case.expert_bias_E.shape, received=found.shape)
    return found


def quantile_of_subject(judge: Judge, case: BalanceCase) -> np.ndarray:
    """The subject's (E,) bias after a step of quantile balancing."""
    given = (case.logits_TE.astype(np.float32), case.router, case.spec.quantile, case.expert_bias_E.astype(np.float32))
    returned = judge.call(case, "quantile_update", *given, **case.inputs)
    found = array_from(returned, "bias: no array").astype(np.float64)
    if found.shape != case.expert_bias_E.shape:
        accuse("bias of another shape", expected=case.expert_bias_E.shape, received=found.shape)
    return found


COEFF = 2.0**-27
"""A coefficient before a step, about that with which ReMoE begins."""


def tokens_of_counts(case: BalanceCase) -> int:
    """How many tokens had the counts: they had about as many experts as they are to, more, fewer or just that."""
    wanted = case.rule("sparsity").target_top_k * len(case.counts_SE)
    return max(0, int(case.counts_SE.sum()) // wanted + int(case.rng().integers(-1, 2)))


def coefficient_of_subject(judge: Judge, case: BalanceCase) -> float:
    """The subject's coefficient after a step of that many tokens; the counts are those of its layers."""
    given = (COEFF, case.counts_SE.copy(), tokens_of_counts(case), case.spec.sparsity)
    found = array_from(judge.call(case, "next_coefficient", *given), "no number").astype(np.float64)
    if found.shape:
        accuse("no number", expected="a coefficient", received=f"an array of {found.shape}")
    return float(found)


def wanted_coefficient(case: BalanceCase) -> float:
    """The reference's coefficient after that step."""
    return next_coefficient(COEFF, case.counts_SE, tokens_of_counts(case), case.rule("sparsity"))


def wanted_quantile(case: BalanceCase) -> np.ndarray:
    """The reference's bias after that step."""
    return quantile_update(case.logits_TE, case.router, case.rule("quantile"), case.expert_bias_E, **case.inputs)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a subject keeps under a capacity."""

    expert_ids_TK: np.ndarray
    weights_TK: np.ndarray
    d_weights_TK: np.ndarray | None
    slot_table_UEC: np.ndarray | None


def kept_by_subject(judge: Judge, case: BalanceCase, *, gradient: bool = False) -> Kept:
    """The subject's choice and weights under the capacity; kept ids are the given ones."""
    given = (case.expert_ids_TK.copy(), case.weights_TK.astype(np.float32), case.spec.capacity, case.spec.num_experts)
    more: dict[str, Any] = {"d_weights_TK": case.d_weights_TK} if gradient else {}
    returned = judge.call(case, "capacity", *given, **case.inputs, **more)
    shape = case.expert_ids_TK.shape
    try:
        named = {name: returned[name] for name in ("expert_ids_TK", "weights_TK", "d_weights_TK")[: 2 + gradient]}
    except (TypeError, KeyError):
        raise Violation("no ids and weights", expected="both", received=str(returned)[:200]) from None
    ids_TK, weights_TK, *more_TK = (array_from(value, f"{name}: no array") for name, value in named.items())
    d_weights_TK = more_TK[0].astype(np.float64) if gradient else None
    if ids_TK.shape != shape or weights_TK.shape != shape or ids_TK.dtype.kind not in "iu":
        received = f"{ids_TK.dtype}{list(ids_TK.shape)} and {weights_TK.shape}"
        accuse("ids or weights of another form", expected=f"two of {shape}", received=received)
    wrong_T = ((ids_TK != UNUSED) & (ids_TK != case.expert_ids_TK)).any(axis=-1)
    for t in np.flatnonzero(wrong_T):
        expected, received = case.expert_ids_TK[t].tolist(), ids_TK[t].tolist()
        accuse("a slot has another expert", token=int(t), expected=expected, received=received)
    return Kept(
        expert_ids_TK=ids_TK.astype(np.int64),
        weights_TK=weights_TK.astype(np.float64),
        d_weights_TK=d_weights_TK,
        slot_table_UEC=returned.get("slot_table_UEC"),
    )


# holding what is returned against the reference


def hold_unchanged(judge: Judge, before: dict[str, Any]) -> None:
    """Each array that the subject was last given, arguments first, holds what it held before."""
    arguments, inputs = judge.handed
    after = [value for value in (*arguments, *inputs.values()) if isinstance(value, np.ndarray)]
    for (name, was), found in zip(before.items(), after, strict=True):
        changed = np.argwhere(np.asarray(was).astype(found.dtype) != found)
        if len(changed):
            place = tuple(changed[0].tolist())
            accuse(f"{name} is changed at {list(place)}", expected=was[place], received=found[place])


def hold_arrays(judge: Judge, case: BalanceCase, of_subject: Callable, before: dict[str, Any]) -> None:
    """A method changes none of its arrays, nor a mask, where it takes one.

    Args:
        of_subject: of a judge and a case; it calls the method.
        before: the arguments of the method that are arrays, in their order.
    """
    of_subject(judge, case)
    hold_unchanged(judge, before)
    mask_T = case.rng().random(case.num_tokens) < 0.6
    try:
        of_subject(judge, case.with_inputs(token_mask_T=mask_T))
    except NotRun:  # it takes no mask
        return
    hold_unchanged(judge, before | {"token_mask": mask_T})


def hold_loss(title: str, found: Loss, wanted: Loss, radius: Loss, *, gradient: bool = True) -> None:
    """The loss is within its radius of the wanted one, and the gradient too, where it is asked for."""
    if not abs(found.loss - wanted.loss) <= radius.loss:
        expected, received = f"loss {float(wanted.loss):.9g}", f"loss {float(found.loss):.9g}"
        accuse(title, expected=expected, received=received)
    if gradient:
        hold_gradient(title, found, wanted, radius)


def hold_gradient(title: str, found: Loss, wanted: Loss, radius: Loss) -> None:
    """The gradient of each token is within its radius of the wanted one."""
    hold(title, found.d_logits_TE, wanted.d_logits_TE, radius.d_logits_TE, name="d_logits")


def hold_balance(judge: Judge, case: BalanceCase, title: str, *, gradient: bool = False) -> None:
    """The balance loss is the reference's, and the gradient too, where it is asked for."""
    hold_loss(title, loss_of_subject(judge, case), wanted_loss(case), loss_radius(judge, case), gradient=gradient)


def hold_counts(judge: Judge, case: BalanceCase, wanted_E: np.ndarray, title: str) -> None:
    """The counts are the wanted ones."""
    found_E = counts_of_subject(judge, case)
    if (found_E != wanted_E).any():
        accuse(title, expected=wanted_E.tolist(), received=found_E.tolist())


def hold_kept(judge: Judge, case: BalanceCase, title: str) -> None:
    """The kept slots are the reference's."""
    hold(title, kept_by_subject(judge, case).expert_ids_TK, case.capacity_trace.expert_ids_TK)


def hold_cut_z_losses(judge: Judge, case: BalanceCase) -> None:
    """The z-loss of the case is the same on two cuts of it."""
    for seed in range(2):
        rng = np.random.default_rng([case.seed, seed])
        lengths = cut(case.num_tokens, rng, evenly=judge.subject.compiles)
        found = z_loss_of_subject(judge, case.with_inputs(tokens_per_shard=lengths))
        title = f"another z-loss on shards of {lengths} tokens"
        hold_loss(title, found, wanted_z_loss(case), z_loss_radius(judge, case))
