"""moe_ref, gradients of load: of the balance losses, the z-loss and a dropped slot, by hand.

Counts, units and the choice of what is kept are constants. A padding token gets gradient 0, whatever it holds.

Legend: T tokens, E choices, K top_k, U units.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from moe_ref.backward.routing import softmax_backward
from moe_ref.balance import balance, log_sum_exp, masked_logits, pool_layers, pooled_inputs, token_weights
from moe_ref.capacity import CapacityTrace
from moe_ref.experts import sigmoid
from moe_ref.specs.balance import BalanceSpec, CapacitySpec
from moe_ref.specs.checks import array


def balance_loss_backward(
    logits_TE: np.ndarray, expert_ids_TK: np.ndarray, spec: BalanceSpec, *, dtype: DTypeLike = np.float64, **inputs: Any
) -> np.ndarray:
    """The gradient of `balance_loss` with respect to the logits: it goes through the mean scores alone. [LOD-12]"""
    trace = balance(logits_TE, expert_ids_TK, spec, dtype=dtype, **inputs)
    logits_TE, _ = masked_logits(logits_TE, inputs.get("token_mask_T"), dtype)
    factor = spec.coeff * float(logits_TE.shape[1]) ** spec.expert_power
    share_U = factor * trace.weights_U / np.maximum(trace.tokens_U, 1)
    d_scores_TE = (share_U[:, None] * trace.fractions_UE)[trace.unit_of_T]
    return balance_scores_backward(d_scores_TE, logits_TE, trace.scores_TE, spec)


def balance_layers_backward(
    logits_by_layer: Sequence[np.ndarray],
    expert_ids_by_layer: Sequence[np.ndarray],
    spec: BalanceSpec,
    *,
    token_mask_T: np.ndarray | None = None,
    sequence_lengths: Sequence[int] | None = None,
    tokens_per_shard: Sequence[int] | None = None,
    dtype: DTypeLike = np.float64,
) -> list[np.ndarray]:
    """The gradient of the summed `balance_layers` with respect to the logits of each layer. [LOD-12]"""
    lengths = {"sequence_lengths": sequence_lengths, "tokens_per_shard": tokens_per_shard}
    if spec.over_layers == "separate":
        return [
            balance_loss_backward(logits_TE, ids_TK, spec, dtype=dtype, token_mask_T=token_mask_T, **lengths)
            for logits_TE, ids_TK in zip(logits_by_layer, expert_ids_by_layer, strict=True)
        ]
    num_layers, num_tokens = len(logits_by_layer), len(logits_by_layer[0])
    inputs = pooled_inputs(num_layers, num_tokens, token_mask_T, **lengths)
    logits_TE, ids_TK = pool_layers(logits_by_layer), pool_layers(expert_ids_by_layer)
    d_logits_TE = balance_loss_backward(logits_TE, ids_TK, spec, dtype=dtype, **inputs)
    return [d_logits_TE[layer::num_layers] for layer in range(num_layers)]


def balance_scores_backward(
    d_scores_TE: np.ndarray, logits_TE: np.ndarray, scores_TE: np.ndarray, spec: BalanceSpec
) -> np.ndarray:
    """A score is exp of its log score, over a sum of those where it is a share; a score_eps changes only the sum.

    A score that is 0, of a padding token or of a logit of -inf, passes nothing.
    """
    if spec.score_func == "relu":
        return np.where(logits_TE > 0, d_scores_TE, 0)
    shares = spec.scores_sum_to_1
    d_logs_TE = softmax_backward(d_scores_TE, scores_TE) if shares else d_scores_TE * scores_TE
    return d_logs_TE * log_scores_slope(logits_TE, spec)


def log_scores_slope(logits_TE: np.ndarray, spec: BalanceSpec) -> np.ndarray:
    """The derivative of a log score; those of sqrt(softplus) tend to 1 / 2 where the logits are very negative."""
    if spec.score_func == "softmax":
        return np.ones_like(logits_TE)
    if spec.score_func == "sigmoid":
        return sigmoid(-logits_TE)
    small_TE = logits_TE < -40
    z_TE = np.where(small_TE, 0, logits_TE)
    return 0.5 * np.where(small_TE, 1, sigmoid(z_TE) / np.logaddexp(0, z_TE))


def z_loss_backward(
    logits_TE: np.ndarray,
    *,
    coeff: float = 1.0,
    scope: str = "global",
    token_mask_T: np.ndarray | None = None,
    tokens_per_shard: Sequence[int] | None = None,
    dtype: DTypeLike = np.float64,
) -> np.ndarray:
    """The gradient of `z_loss`: 2 * log(sum(exp(logits))) * softmax(logits), times the token's share. [LOD-17]"""
    logits_TE, valid_T = masked_logits(logits_TE, token_mask_T, dtype)
    weights_T1 = token_weights(valid_T, scope, tokens_per_shard)[:, None]
    log_sum_T1 = log_sum_exp(logits_TE)
    return 2 * coeff * weights_T1 * log_sum_T1 * np.exp(logits_TE - log_sum_T1)


def capacity_backward(trace: CapacityTrace, spec: CapacitySpec, d_weights_TK: np.ndarray) -> np.ndarray:
    """The gradient of the weights before a capacity, from that of the weights after; that of a dropped slot is 0,
    but where 'before' has it in the sum that divides the others. [CAP-10]"""
    d_weights_TK = array("d_weights_TK", d_weights_TK, trace.kept_TK.shape).astype(trace.weights_TK.dtype)
    if spec.then is not None:
        assert trace.first is not None
        d_between_TK = capacity_backward(trace, spec.then, d_weights_TK)
        return capacity_backward(trace.first, spec.replace(then=None), d_between_TK)
    d_kept_TK = np.where(trace.kept_TK, d_weights_TK, 0)
    if spec.renormalise == "no":
        return d_kept_TK
    in_sum_TK = trace.kept_TK if spec.renormalise == "after" else np.ones_like(trace.kept_TK)
    sum_T1 = np.where(in_sum_TK, trace.given_weights_TK, 0).sum(axis=-1, keepdims=True)
    safe_T1 = np.where(sum_T1 == 0, 1, sum_T1)
    # weight = weight_sum * given / sum: written so that a single kept slot gets exactly 0.
    shares_TK = np.where(trace.kept_TK, trace.given_weights_TK, 0) / safe_T1
    pull_T1 = (d_kept_TK * shares_TK).sum(axis=-1, keepdims=True)
    d_given_TK = spec.weight_sum * np.where(in_sum_TK, d_kept_TK - pull_T1, 0) / safe_T1
    return np.where(sum_T1 == 0, 0, np.where(trace.used_TK, d_given_TK, 0))
