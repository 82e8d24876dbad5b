"""conformance, balance: how far rounding can take losses, gradients, biases and weights.

Legend: T tokens, K top_k, E experts, U units with a mean of their own.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from conformance.balance.case import BalanceCase
from conformance.core.judge import Judge
from conformance.core.rounding import EPSILON, TINY
from moe_ref import BalanceSpec, BiasUpdateSpec, QuantileSpec, z_loss, z_loss_backward
from moe_ref.backward.routing import scale_logits_backward
from moe_ref.quantile import bins_of, needs, ranked

SCALINGS = 8
"""Granted to a logit that is scaled and capped, and to the slope of that."""
ROUNDINGS = 32
"""Granted to a sum of products besides one for each term: exp, log and divisions."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss with its gradient; or how far each may be off."""

    loss: np.ndarray
    d_logits_TE: np.ndarray

    @classmethod
    def zero(cls, case: BalanceCase) -> "Loss":
        """The loss 0 with the gradient 0; as a radius: equal to the last bit."""
        return cls(loss=np.zeros(()), d_logits_TE=np.zeros(case.logits_TE.shape))


def wanted_loss(case: BalanceCase) -> Loss:
    """The reference's balance loss."""
    return Loss(loss=np.asarray(case.balance_trace.loss), d_logits_TE=case.balance_gradient_TE)


def wanted_z_loss(case: BalanceCase) -> Loss:
    """The reference's z-loss; of scope 'global', to which no cut makes a difference."""
    how = {"coeff": case.spec.coeff, **mask_of(case)}
    return Loss(loss=np.asarray(z_loss(case.logits_TE, **how)), d_logits_TE=z_loss_backward(case.logits_TE, **how))


def mask_of(case: BalanceCase) -> dict[str, Any]:
    """The mask, where the case has one."""
    return {name: value for name, value in case.inputs.items() if name == "token_mask_T"}


def _valid_logits(case: BalanceCase) -> np.ndarray:
    """(T, E) the logits as they are scored; 0 where they are infinite, and for padding."""
    return np.where(case.valid_T[:, None], np.nan_to_num(case.scaled_logits_TE, neginf=0.0, posinf=0.0), 0)


def loss_radius(judge: Judge, case: BalanceCase) -> Loss:
    """A score has a few roundings and that of exp's argument; sums are of terms that are at least 0."""
    dtype = judge.subject.compute_dtype
    eps, trace, spec = EPSILON[dtype], case.balance_trace, case.rule("balance")
    assert isinstance(spec, BalanceSpec)
    T, E = case.logits_TE.shape
    terms = ROUNDINGS + T + E
    z_TE = _valid_logits(case)
    away_TE = np.abs(z_TE - z_TE.max(axis=-1, keepdims=True, initial=-np.inf)) if T else z_TE
    error_TE = eps * (terms + SCALINGS * np.abs(z_TE) * case.router.scales_logits + np.maximum(np.abs(z_TE), away_TE))
    error_TE = error_TE + error_TE.max(axis=-1, keepdims=True, initial=0)  # of the sum that divides
    share_U = spec.coeff * float(E) ** spec.expert_power * trace.weights_U / np.maximum(trace.tokens_U, 1)
    pull_TE = (share_U[:, None] * trace.fractions_UE)[trace.unit_of_T]  # d loss / d score
    s_TE = trace.scores_TE
    # A score is no steeper than itself, but for relu, whose slope is 1.
    slope_TE = np.where(z_TE > 0, 1.0, 0.0) if spec.score_func == "relu" else s_TE
    loss = (pull_TE * s_TE * error_TE).sum() + terms * eps * abs(trace.loss) + TINY[dtype]
    # A gradient is a difference of a pull and a mean of pulls, either of which is rounded; slopes are at most 1.
    mean_T1 = (pull_TE * s_TE).sum(axis=-1, keepdims=True) if spec.scores_sum_to_1 else 0
    mean_error_T1 = (pull_TE * s_TE * error_TE).sum(axis=-1, keepdims=True) if spec.scores_sum_to_1 else 0
    gradient_TE = slope_TE * ((pull_TE + mean_T1) * (error_TE + terms * eps) + mean_error_T1)
    if case.router.scales_logits:
        scaling_TE = scale_logits_backward(np.ones_like(z_TE), z_TE, case.router)
        largest = SCALINGS * eps * case.router.logit_scale
        gradient_TE = gradient_TE * np.abs(scaling_TE) + slope_TE * (pull_TE + mean_T1) * largest
    # A score that vanishes does so before it is pulled; its square root is of what has vanished.
    floor = np.sqrt(TINY[dtype]) if spec.score_func == "sqrtsoftplus" else TINY[dtype]
    floor_TE = TINY[dtype] + floor * (pull_TE + mean_T1)
    return Loss(loss=np.asarray(loss + floor_TE.sum()), d_logits_TE=gradient_TE + floor_TE)


def z_loss_radius(judge: Judge, case: BalanceCase) -> Loss:
    """log(sum(exp)) is off by roundings of the logits; its square is off twice as far, relatively."""
    dtype = judge.subject.compute_dtype
    eps, wanted = EPSILON[dtype], wanted_z_loss(case)
    T, E = case.logits_TE.shape
    z_TE = _valid_logits(case)
    largest_T = np.abs(z_TE).max(axis=-1, initial=0)
    log_sum_T = largest_T + np.log(max(E, 1))
    off_T = eps * (4 * largest_T + E + ROUNDINGS)
    tokens = max(1, int(case.valid_T.sum()))
    share_T = 2 * case.spec.coeff / tokens * case.valid_T
    loss = (share_T * (log_sum_T + off_T) * off_T).sum() + (T + ROUNDINGS) * eps * abs(float(wanted.loss))
    finite_TE = np.isfinite(case.logits_TE) | ~case.valid_T[:, None]
    shown_TE = np.where(finite_TE, z_TE, -np.inf)
    p_TE = np.exp(shown_TE - np.logaddexp.reduce(shown_TE, axis=-1)[:, None])
    away_T1 = 2 * largest_T[:, None] + E + ROUNDINGS
    gradient_TE = share_T[:, None] * p_TE * (off_T[:, None] + (log_sum_T + off_T)[:, None] * eps * 2 * away_T1)
    # A share that vanishes does so before it is multiplied.
    floor_T1 = TINY[dtype] * (1 + share_T * (log_sum_T + off_T))[:, None]
    return Loss(loss=np.asarray(loss + TINY[dtype]), d_logits_TE=gradient_TE + floor_T1)


def bias_radius(judge: Judge, case: BalanceCase, wanted_E: np.ndarray) -> np.ndarray:
    """A step is rounded, and so is its sum with the bias."""
    update, counts_E = case.rule("update"), case.counts_SE.sum(axis=0)
    assert isinstance(update, BiasUpdateSpec)
    largest = {"sign": 1, "proportional": counts_E.max(initial=0)}.get(update.rule, len(counts_E))
    if update.rule == "tanh":
        largest = 1 + update.steepness * largest
    sizes_E = np.abs(case.expert_bias_E) + np.abs(wanted_E) + update.rate * largest
    return 16 * EPSILON[judge.subject.compute_dtype] * sizes_E


def quantile_radius(judge: Judge, case: BalanceCase, wanted_E: np.ndarray) -> np.ndarray:
    """A quantile moves no farther than the farthest need; one of bins does by bins, where a need is near an edge."""
    update = case.rule("quantile")
    assert isinstance(update, QuantileSpec)
    bias_E, router = case.expert_bias_E, case.router
    z_TE = np.where(case.valid_T[:, None], case.scaled_logits_TE, 0)
    unbounded = router.select_by == "logit" or router.score_func == "relu"
    sizes = 1 + np.abs(bias_E).max() + (np.abs(z_TE).max(initial=0) if unbounded else 1)
    # A score is off by roundings of itself, and by those of its logit times its slope.
    radius = ROUNDINGS * EPSILON[judge.subject.compute_dtype] * sizes
    if router.scales_logits or router.score_func == "softmax":
        radius += EPSILON[judge.subject.compute_dtype] * (len(bias_E) + np.abs(z_TE).max(initial=0))
    if update.bins is None:
        return np.full_like(wanted_E, 2 * radius)
    low, width = bins_of(bias_E, update.bins)
    places_NE = (needs(ranked(z_TE, router), bias_E, router.top_k, case.valid_T) - low) / width
    near_edge = (np.abs(places_NE - np.round(places_NE)) * width < radius).any()
    # One need in another bin moves the place by a bin or two, and the mean of the others with it.
    return np.full_like(wanted_E, 2 * radius + 4 * width * near_edge)


def weights_radius(judge: Judge, sizes_TK: np.ndarray) -> np.ndarray:
    """Weights are positive: a quotient of one by a sum has a few roundings."""
    return ROUNDINGS * EPSILON[judge.subject.compute_dtype] * np.abs(sizes_TK)


def weight_gradient_radius(judge: Judge, case: BalanceCase) -> np.ndarray:
    """A quotient's gradient is a difference of terms as large as the pull over the sum; of a dropped slot it is 0."""
    trace = case.capacity_trace
    sum_T1 = np.where(trace.kept_TK, trace.given_weights_TK, 0).sum(axis=-1, keepdims=True)
    sizes_T1 = np.abs(case.d_weights_TK).sum(axis=-1, keepdims=True) * (1 + 4 / np.maximum(sum_T1, 1 / 64))
    dropped_TK = (case.capacity_gradient_TK == 0) & ~trace.kept_TK
    return np.where(dropped_TK, 0, weights_radius(judge, sizes_T1))
