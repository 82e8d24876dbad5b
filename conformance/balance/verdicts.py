"""conformance, the verdicts on load: calls the methods of a subject, and how far rounding can take what they return.

Each call checks the form of the result, and blames the requirement that it is given.

Legend: T tokens, E experts, K top_k, U units.
"""

from dataclasses import dataclass

import numpy as np

from conformance.balance.case import LoadCase
from conformance.core.judge import Judge, Violation
from conformance.core.rounding import EPSILON, TINY
from conformance.layer.verdicts import shown
from moe_ref import z_loss, z_loss_backward

ROUNDINGS = 32
"""Granted to a sum of products besides one for each term: exp, log and divisions."""


def counted(judge: Judge, case: LoadCase) -> np.ndarray:
    """The subject's (E,) counts, as int64."""
    E, inputs = case.spec.num_experts, mask_of(case)
    found = np.asarray(judge.call(case, "load", case.expert_ids_TK.copy(), E, **inputs))
    if found.dtype.kind not in "iu" or found.shape != (E,):
        received = f"{found.dtype}{list(found.shape)}"
        accuse("not a count for each expert", expected=f"{E} integers", received=received)
    return found.astype(np.int64)


def mask_of(case: LoadCase) -> dict:
    """The mask, where the case has one."""
    return {name: value for name, value in case.inputs.items() if name == "token_mask_T"}


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss with its gradient; or how far each may be off."""

    loss: np.ndarray
    d_logits_TE: np.ndarray


def lost(judge: Judge, case: LoadCase, **more) -> Loss:
    """The subject's balance loss."""
    given = (case.logits_TE.astype(np.float32), case.expert_ids_TK.copy(), case.spec.balance, case.router)
    return loss_of(case, judge.call(case, "balance_loss", *given, **case.inputs, **more))


def z_lost(judge: Judge, case: LoadCase) -> Loss:
    """The subject's z-loss."""
    given = (case.logits_TE.astype(np.float32), case.spec.coeff)
    return loss_of(case, judge.call(case, "z_loss", *given, **mask_of(case)))


def loss_of(case: LoadCase, returned) -> Loss:
    """A number and a gradient of the shape of the logits, in float64."""
    try:
        loss, d_logits_TE = (np.asarray(returned[name], dtype=np.float64) for name in ("loss", "d_logits_TE"))
    except (TypeError, KeyError, ValueError):
        raise Violation("no loss and d_logits_TE", expected="both", received=str(returned)[:200]) from None
    if loss.shape or d_logits_TE.shape != case.logits_TE.shape:
        expected, received = f"() and {case.logits_TE.shape}", f"{loss.shape} and {d_logits_TE.shape}"
        accuse("loss or gradient of another shape", expected=expected, received=received)
    return Loss(loss=loss, d_logits_TE=d_logits_TE)


def wanted_loss(case: LoadCase) -> Loss:
    """The reference's balance loss."""
    return Loss(loss=np.asarray(case.balance.loss), d_logits_TE=case.d_balance_TE)


def wanted_z(case: LoadCase) -> Loss:
    """The reference's z-loss."""
    how = {"coeff": case.spec.coeff, **mask_of(case)}
    return Loss(loss=np.asarray(z_loss(case.logits_TE, **how)), d_logits_TE=z_loss_backward(case.logits_TE, **how))


def loss_radius(judge: Judge, case: LoadCase) -> Loss:
    """A score has a few roundings and that of exp's argument; sums are of terms that are at least 0."""
    dtype = judge.subject.compute_dtype
    eps, trace, spec = EPSILON[dtype], case.balance, case.spec.balance
    assert spec is not None
    T, E = case.logits_TE.shape
    terms = ROUNDINGS + T + E
    z_TE = np.where(case.valid_T[:, None], np.nan_to_num(case.logits_TE, neginf=0.0, posinf=0.0), 0)
    away_TE = np.abs(z_TE - z_TE.max(axis=-1, keepdims=True, initial=-np.inf)) if T else z_TE
    error_TE = eps * (terms + np.maximum(np.abs(z_TE), away_TE))
    error_TE = error_TE + error_TE.max(axis=-1, keepdims=True, initial=0)  # of the sum that divides
    share_U = spec.coeff * float(E) ** spec.expert_power * trace.weights_U / np.maximum(trace.tokens_U, 1)
    pull_TE = (share_U[:, None] * trace.fractions_UE)[trace.unit_of_T]  # d loss / d score
    s_TE = trace.scores_TE
    loss = (pull_TE * s_TE * error_TE).sum() + terms * eps * abs(trace.loss) + TINY[dtype]
    # A gradient is a difference of a pull and a mean of pulls, either of which is rounded; slopes are at most 1.
    mean_T1 = (pull_TE * s_TE).sum(axis=-1, keepdims=True) if spec.scores_sum_to_1 else 0
    mean_error_T1 = (pull_TE * s_TE * error_TE).sum(axis=-1, keepdims=True) if spec.scores_sum_to_1 else 0
    gradient_TE = s_TE * ((pull_TE + mean_T1) * (error_TE + terms * eps) + mean_error_T1)
    return Loss(loss=np.asarray(loss), d_logits_TE=gradient_TE + TINY[dtype])


def z_radius(judge: Judge, case: LoadCase) -> Loss:
    """log(sum(exp)) is off by roundings of the logits; its square is off twice as far, relatively."""
    dtype = judge.subject.compute_dtype
    eps, wanted = EPSILON[dtype], wanted_z(case)
    T, E = case.logits_TE.shape
    z_TE = np.where(case.valid_T[:, None], np.nan_to_num(case.logits_TE, neginf=0.0, posinf=0.0), 0)
    largest_T = np.abs(z_TE).max(axis=-1, initial=0)
    log_sum_T = np.abs(np.logaddexp.reduce(z_TE, axis=-1))
    off_T = eps * (4 * largest_T + E + ROUNDINGS)
    tokens = max(1, int(case.valid_T.sum()))
    share_T = 2 * case.spec.coeff / tokens * case.valid_T
    loss = (share_T * (log_sum_T + off_T) * off_T).sum() + (T + ROUNDINGS) * eps * abs(float(wanted.loss))
    p_TE = np.exp(z_TE - np.logaddexp.reduce(z_TE, axis=-1)[:, None])
    away_T1 = 2 * largest_T[:, None] + E + ROUNDINGS
    gradient_TE = share_T[:, None] * p_TE * (off_T[:, None] + (log_sum_T + off_T)[:, None] * eps * 2 * away_T1)
    return Loss(loss=np.asarray(loss + TINY[dtype]), d_logits_TE=gradient_TE + TINY[dtype])


def hold_loss(case: LoadCase, title: str, found: Loss, wanted: Loss, radius: Loss, *, gradient=True):
    """Loss and gradient are within their radius of the wanted ones."""
    if not abs(found.loss - wanted.loss) <= radius.loss:
        expected, received = f"loss {float(wanted.loss):.9g}", f"loss {float(found.loss):.9g}"
        accuse(title, expected=expected, received=received)
    if gradient:
        hold_gradient(case, title, found.d_logits_TE, wanted.d_logits_TE, radius.d_logits_TE)


def hold_gradient(case: LoadCase, title: str, found_TE, wanted_TE, radius_TE) -> None:
    """The gradients of each token are within their radius of the wanted ones."""
    with np.errstate(invalid="ignore"):
        wrong_T = ~(np.abs(found_TE - wanted_TE) <= radius_TE).all(axis=-1)  # NaN is wrong
    for t in np.flatnonzero(wrong_T):
        expected, received = f"d_logits {shown(wanted_TE[t])}", f"d_logits {shown(found_TE[t])}"
        accuse(title, token=int(t), expected=expected, received=received)


def moved(judge: Judge, case: LoadCase) -> np.ndarray:
    """The subject's (E,) bias after a step."""
    given = (case.counts_SE.copy(), case.spec.update, case.expert_bias_E.astype(np.float32))
    found = np.asarray(judge.call(case, "bias_update", *given), dtype=np.float64)
    if found.shape != case.expert_bias_E.shape:
        accuse("bias of another shape", expected=str(case.expert_bias_E.shape), received=str(found.shape))  # fmt: skip
    return found


@dataclass(frozen=True, kw_only=True)
class Limited:
    """What a subject keeps under a capacity."""

    expert_ids_TK: np.ndarray
    weights_TK: np.ndarray
    d_weights_TK: np.ndarray | None
    slot_table_UEC: np.ndarray | None


def limited(judge: Judge, case: LoadCase, *, gradient: bool = False) -> Limited:
    """The subject's choice and weights under the capacity; kept ids are the given ones."""
    given = (case.expert_ids_TK.copy(), case.weights_TK.astype(np.float32), case.spec.capacity, case.spec.num_experts)
    more = {"d_weights_TK": case.d_weights_TK} if gradient else {}
    returned = judge.call(case, "capacity", *given, **case.inputs, **more)
    shape = case.expert_ids_TK.shape
    try:
        ids_TK, weights_TK = np.asarray(returned["expert_ids_TK"]), np.asarray(returned["weights_TK"])
        d_weights_TK = np.asarray(returned["d_weights_TK"], dtype=np.float64) if gradient else None
    except (TypeError, KeyError):
        raise Violation("no ids and weights", expected="both", received=str(returned)[:200]) from None
    if ids_TK.shape != shape or weights_TK.shape != shape or ids_TK.dtype.kind not in "iu":
        received = f"{ids_TK.dtype}{list(ids_TK.shape)} and {weights_TK.shape}"
        accuse("ids or weights of another form", expected=f"two of {shape}", received=received)
    wrong_TK = (ids_TK != -1) & (ids_TK != case.expert_ids_TK)
    for t in np.flatnonzero(wrong_TK.any(axis=-1)):
        accuse("a slot has another expert", token=int(t), expected=str(case.expert_ids_TK[t].tolist()), received=str(ids_TK[t].tolist()))  # fmt: skip
    return Limited(
        expert_ids_TK=ids_TK.astype(np.int64),
        weights_TK=weights_TK.astype(np.float64),
        d_weights_TK=d_weights_TK,
        slot_table_UEC=returned.get("slot_table_UEC"),
    )


def hold_kept(case: LoadCase, title: str, found_TK, wanted_TK) -> None:
    """The kept slots are the reference's."""
    for t in np.flatnonzero((found_TK != wanted_TK).any(axis=-1)):
        accuse(title, token=int(t), expected=str(wanted_TK[t].tolist()), received=str(found_TK[t].tolist()))  # fmt: skip


def weights_radius(judge: Judge, wanted) -> np.ndarray:
    """Weights are positive: a quotient of one by a sum has a few roundings."""
    return ROUNDINGS * EPSILON[judge.subject.compute_dtype] * np.abs(wanted)
