"""moe_ref, balance: how tokens spread over experts, what an uneven spread costs, and how the bias answers it.

    expert ids -> tokens_per_expert -> balance_loss, bias_update, load_statistics;   logits -> z_loss

A padding token is in no count, no mean and no sum. A batch that is spread over ranks, micro-batches or chunks is given
here as one array of all its tokens; `tokens_per_shard` says how it was cut, and only a scope other than 'global' asks.
Gradients are in `backward/balance.py`.

Legend: T tokens, E choices (experts, then null experts), K top_k, U units (batches or sequences), S shards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from moe_ref.routing import top_k
from moe_ref.specs.balance import BalanceSpec, BiasUpdateSpec
from moe_ref.specs.checks import array, entries, integer, mask_array, number, one_of, require
from moe_ref.specs.ids import UNUSED, ids_array

# counts


def tokens_per_expert(
    expert_ids_TK: np.ndarray, num_experts: int, token_mask_T: np.ndarray | None = None
) -> np.ndarray:
    """The count of an expert is the number of slots of valid tokens that chose it. [LOD-2, LOD-3, MSK-1]

    Unused slots (-1) and null experts (num_experts and above) are not counted. The count of a whole batch is the sum of
    the counts of its shards, micro-batches and chunks. Counting is a pure function: a second forward pass under
    activation checkpointing counts nothing twice (pytorch/torchtitan#1593). [LOD-4]
    """
    integer("num_experts", num_experts, 1)
    ids_TK = array("expert_ids_TK", expert_ids_TK, (None, None), kind="int")
    valid_TK = np.broadcast_to(mask_array(token_mask_T, len(ids_TK))[:, None], ids_TK.shape)
    counted = ids_TK[valid_TK & (ids_TK >= 0) & (ids_TK < num_experts)]
    return np.bincount(counted, minlength=num_experts)


@dataclass(frozen=True, kw_only=True)
class LoadStatistics:
    """How even a load is."""

    total: int
    mean: float
    largest: int
    smallest: int
    num_empty: int
    """Experts without a token."""
    max_over_mean: float
    """The busiest expert's load in units of the mean: 1 in balance, E where one expert has all; 0 without tokens."""
    rows_of_rank_S: np.ndarray
    """Rows of each rank of the expert axis."""
    required_buffer_factor: float
    """The busiest rank's rows in units of the mean over ranks: the smallest buffer factor that drops no row."""


def load_statistics(
    counts_E: np.ndarray, *, num_ranks: int = 1, placement: Sequence[int] | None = None
) -> LoadStatistics:
    """Statistics of a count; ranks own equal shares of the places, in order.

    Args:
        counts_E: tokens per expert, summed over everything that is to be described.
        num_ranks: of the expert axis; it divides E.
        placement: (E,) the expert at each place; None: expert i is at place i.
    """
    counts_E = array("counts_E", counts_E, (None,), kind="int")
    E = len(counts_E)
    entries("counts_E", counts_E, counts_E >= 0, "counts are at least 0")
    integer("num_ranks", num_ranks, 1)
    require(E > 0 and E % num_ranks == 0, f"num_ranks is {num_ranks}, which does not divide {E} experts")
    places_E = np.arange(E) if placement is None else array("placement", placement, (E,), kind="int")
    require(
        bool((np.sort(places_E) == np.arange(E)).all()), f"placement is {list(places_E)}; it has each expert id once"
    )
    rows_of_rank_S = counts_E[places_E].reshape(num_ranks, -1).sum(axis=1)
    total = int(counts_E.sum())
    return LoadStatistics(
        total=total,
        mean=total / E,
        largest=int(counts_E.max()),
        smallest=int(counts_E.min()),
        num_empty=int((counts_E == 0).sum()),
        max_over_mean=float(counts_E.max() * E / max(total, 1)),
        rows_of_rank_S=rows_of_rank_S,
        required_buffer_factor=float(rows_of_rank_S.max() * num_ranks / max(total, 1)),
    )


# balance losses


@dataclass(frozen=True, kw_only=True)
class BalanceTrace:
    """Every intermediate of a balance loss."""

    loss: float
    scores_TE: np.ndarray
    """The scores that enter; 0 for padding tokens."""
    counted_ids_TK: np.ndarray
    """The ids that are counted; -1 where a slot is not."""
    unit_of_T: np.ndarray
    """The unit of each token."""
    tokens_U: np.ndarray
    """Valid tokens of each unit."""
    counts_UE: np.ndarray
    """Counts of each unit; with scope 'running' all so far, with 'running_mean' their mean, which need not be whole."""
    fractions_UE: np.ndarray
    """f: counts over slots, or over tokens."""
    mean_scores_UE: np.ndarray
    """P."""
    losses_U: np.ndarray
    """E ** expert_power * sum of f * P, without coeff; 0 for a unit without valid tokens."""
    weights_U: np.ndarray
    """The share of each unit in the loss; a unit without valid tokens has 0."""


def balance(
    logits_TE: np.ndarray,
    expert_ids_TK: np.ndarray,
    spec: BalanceSpec,
    *,
    token_mask_T: np.ndarray | None = None,
    sequence_lengths: Sequence[int] | None = None,
    tokens_per_shard: Sequence[int] | None = None,
    dtype: DTypeLike = np.float64,
) -> BalanceTrace:
    """The balance loss of one layer with every intermediate. [LOD-6, LOD-8, MSK-2]

    Args:
        logits_TE: (T, E) the logits that the router scores (after logit_scale and softcap), without any bias.
        expert_ids_TK: (T, K) the router's choice, before any capacity; with counts 'unbiased' only K is taken from it.
        spec: which loss.
        token_mask_T: (T,) bools; a padding token (False) is in no sum.
        sequence_lengths: lengths of the consecutive sequences, sum T; None: the tokens are one sequence.
        tokens_per_shard: lengths of the consecutive shards (ranks, micro-batches, chunks), sum T; None: one.
        dtype: of the scores and all that follows; the specification is float64.
    """
    logits_TE, valid_T = masked_logits(logits_TE, token_mask_T, dtype)
    T, E = logits_TE.shape
    ids_TK = array("expert_ids_TK", expert_ids_TK, (T, None), kind="int")
    ids_TK = ids_array("expert_ids_TK", np.where(valid_T[:, None], ids_TK, UNUSED), (T, None), E, low=UNUSED)
    K = ids_TK.shape[1]
    slots = min(K, spec.counted_slots or K)

    scores_TE = np.where(valid_T[:, None], balance_scores(logits_TE, spec), 0)
    counted_ids_TK = np.where(valid_T[:, None], counted_ids(logits_TE, scores_TE, ids_TK, slots, spec), UNUSED)
    unit_of_T, shard_of_U = units(T, spec, sequence_lengths, tokens_per_shard)

    own_UT = (unit_of_T == np.arange(len(shard_of_U))[:, None]) & valid_T
    tokens_U = own_UT.sum(axis=1)
    sums_UE = np.array([scores_TE[own_T].sum(axis=0) for own_T in own_UT], dtype).reshape(-1, E)
    counts_UE = np.array([tokens_per_expert(counted_ids_TK[own_T], E) for own_T in own_UT], np.float64).reshape(-1, E)
    counts_UE, counted_U = counts_so_far(counts_UE, tokens_U, spec)

    per_token = spec.target_top_k or (slots if spec.counts_over == "slots" else 1)
    slots_U1 = np.maximum(counted_U, 1)[:, None] * per_token
    fractions_UE = counts_UE.astype(dtype) / slots_U1
    mean_scores_UE = sums_UE / np.maximum(tokens_U, 1)[:, None]
    losses_U = float(E) ** spec.expert_power * (fractions_UE * mean_scores_UE).sum(axis=-1)
    weights_U = unit_weights(tokens_U, shard_of_U)
    return BalanceTrace(
        loss=float(spec.coeff * (weights_U * losses_U).sum()),
        scores_TE=scores_TE,
        counted_ids_TK=counted_ids_TK,
        unit_of_T=unit_of_T,
        tokens_U=tokens_U,
        counts_UE=counts_UE,
        fractions_UE=fractions_UE,
        mean_scores_UE=mean_scores_UE,
        losses_U=losses_U,
        weights_U=weights_U,
    )


def counts_so_far(counts_UE: np.ndarray, tokens_U: np.ndarray, spec: BalanceSpec) -> tuple[np.ndarray, np.ndarray]:
    """The counts of each unit, and the tokens that they are of: its own, or all up to it. [LOD-26]

    With 'running_mean' the counts are a mean over micro-batches, and the tokens the unit's own (LOD-14).
    """
    if spec.scope == "running":
        return counts_UE.cumsum(axis=0), tokens_U.cumsum()
    if spec.scope == "running_mean":
        return counts_UE.cumsum(axis=0) / np.arange(1, len(counts_UE) + 1)[:, None], tokens_U
    return counts_UE, tokens_U


def balance_loss(logits_TE: np.ndarray, expert_ids_TK: np.ndarray, spec: BalanceSpec, **inputs: Any) -> float:
    """The balance loss of one layer; arguments as in `balance`."""
    return balance(logits_TE, expert_ids_TK, spec, **inputs).loss


def balance_layers(
    logits_by_layer: Sequence[np.ndarray],
    expert_ids_by_layer: Sequence[np.ndarray],
    spec: BalanceSpec,
    *,
    token_mask_T: np.ndarray | None = None,
    sequence_lengths: Sequence[int] | None = None,
    tokens_per_shard: Sequence[int] | None = None,
    dtype: DTypeLike = np.float64,
) -> list[BalanceTrace]:
    """The balance loss of a model is the sum of these: one for each layer, or one of all layers' tokens together.

    Args:
        logits_by_layer, expert_ids_by_layer: (T, E) and (T, K) of each layer; of equal shapes where they are pooled.
        token_mask_T, sequence_lengths, tokens_per_shard: of the tokens, the same for every layer.
    """
    if spec.over_layers == "separate":
        return [
            balance(logits_TE, ids_TK, spec, token_mask_T=token_mask_T, sequence_lengths=sequence_lengths,
                    tokens_per_shard=tokens_per_shard, dtype=dtype)
            for logits_TE, ids_TK in zip(logits_by_layer, expert_ids_by_layer, strict=True)
        ]  # fmt: skip
    num_layers = len(logits_by_layer)
    require(num_layers > 0, "logits_by_layer is empty; a pooled loss is of at least one layer")
    inputs = pooled_inputs(num_layers, len(logits_by_layer[0]), token_mask_T, sequence_lengths, tokens_per_shard)
    return [balance(pool_layers(logits_by_layer), pool_layers(expert_ids_by_layer), spec, dtype=dtype, **inputs)]


def pool_layers(values_by_layer: Sequence[np.ndarray]) -> np.ndarray:
    """The rows of a token in all layers follow each other, so that sequences and shards stay whole."""
    values_TLE = np.stack([np.asarray(values) for values in values_by_layer], axis=1)
    return values_TLE.reshape(-1, values_TLE.shape[-1])


def pooled_inputs(
    num_layers: int,
    num_tokens: int,
    token_mask_T: np.ndarray | None,
    sequence_lengths: Sequence[int] | None,
    tokens_per_shard: Sequence[int] | None,
) -> dict:
    """The mask and the lengths of pooled layers: every token is there once for each of them."""
    lengths = {"sequence_lengths": sequence_lengths, "tokens_per_shard": tokens_per_shard}
    return {"token_mask_T": np.repeat(mask_array(token_mask_T, num_tokens), num_layers)} | {
        field: None if values is None else [num_layers * length for length in values]
        for field, values in lengths.items()
    }


def log_scores(logits_TE: np.ndarray, spec: BalanceSpec) -> np.ndarray:
    """Logarithms of the scores before their norm: those of very negative logits keep their ratios. [LOD-18]"""
    if spec.score_func == "softmax":
        return logits_TE
    if spec.score_func == "sigmoid":
        return -np.logaddexp(0, -logits_TE)
    # log(1 + exp(z)) is exp(z) to the last digit where exp(z) < 2 ** -53.
    small_TE = logits_TE < -40
    return 0.5 * np.where(small_TE, logits_TE, np.log(np.logaddexp(0, np.where(small_TE, 0, logits_TE))))


def balance_scores(logits_TE: np.ndarray, spec: BalanceSpec) -> np.ndarray:
    """Scores are a function of the logits, once: shares of their sum, or raw. [LOD-7, LOD-10]"""
    if spec.score_func == "relu":  # 0 has no logarithm
        return np.maximum(logits_TE, 0)
    logs_TE = log_scores(logits_TE, spec)
    if not spec.scores_sum_to_1:
        return np.exp(logs_TE)
    sum_T1 = log_sum_exp(logs_TE)
    if spec.score_eps > 0:
        sum_T1 = np.logaddexp(sum_T1, np.log(spec.score_eps).astype(logs_TE.dtype))
    return np.exp(logs_TE - sum_T1)


def log_sum_exp(values_TE: np.ndarray) -> np.ndarray:
    """log(sum(exp)) over the last axis, without overflow; each row has an entry above -inf."""
    largest_T1 = values_TE.max(axis=-1, keepdims=True)
    return largest_T1 + np.log(np.exp(values_TE - largest_T1).sum(axis=-1, keepdims=True))


def counted_ids(
    logits_TE: np.ndarray, scores_TE: np.ndarray, expert_ids_TK: np.ndarray, slots: int, spec: BalanceSpec
) -> np.ndarray:
    """The ids that are counted: the first slots of the choice, or of the top k of the scores. [LOD-9]"""
    if spec.counts == "routed":
        return expert_ids_TK[:, :slots]
    K, E = expert_ids_TK.shape[1], logits_TE.shape[1]
    require(K <= E, f"expert_ids_TK has {K} slots; the {E} logits give at most {E}")
    never_TE = np.isneginf(logits_TE)
    ids_TK = top_k(np.where(never_TE, -np.inf, scores_TE), slots)
    return np.where(np.take_along_axis(never_TE, ids_TK, axis=-1), UNUSED, ids_TK)


def units(
    num_tokens: int, spec: BalanceSpec, sequence_lengths: Sequence[int] | None, tokens_per_shard: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """The unit of each token, and the shard of each unit: sequences within shards, sequences, shards, or the batch.

    Only a scope other than 'global' looks at the shards, so nothing else can depend on them. [LOD-13, LOD-14]
    """
    sequence_of_T = part_of_tokens("sequence_lengths", sequence_lengths, num_tokens)
    shard_of_T = part_of_tokens("tokens_per_shard", tokens_per_shard, num_tokens)
    num_shards = 1 if tokens_per_shard is None or spec.scope == "global" else len(tokens_per_shard)
    if spec.scope == "global":
        shard_of_T = np.zeros_like(shard_of_T)
    if spec.per == "batch":
        return shard_of_T, np.arange(num_shards)
    pairs_T2 = np.stack([shard_of_T, sequence_of_T], axis=1)
    pairs_U2, unit_of_T = np.unique(pairs_T2, axis=0, return_inverse=True)
    return unit_of_T.reshape(-1), pairs_U2[:, 0]


def unit_weights(tokens_U: np.ndarray, shard_of_U: np.ndarray) -> np.ndarray:
    """The mean over units of a shard, then over shards; one without a valid token is in no mean. [LOD-11, MSK-4]"""
    has_tokens_U = tokens_U > 0
    shards = np.unique(shard_of_U[has_tokens_U])
    weights_U = np.zeros(len(tokens_U))
    for shard in shards:
        own_U = has_tokens_U & (shard_of_U == shard)
        weights_U[own_U] = 1 / (len(shards) * own_U.sum())
    return weights_U


# z-loss


def z_loss(
    logits_TE: np.ndarray,
    *,
    coeff: float = 1.0,
    scope: str = "global",
    token_mask_T: np.ndarray | None = None,
    tokens_per_shard: Sequence[int] | None = None,
    dtype: DTypeLike = np.float64,
) -> float:
    """The z-loss is coeff times the mean over valid tokens of log(sum(exp(logits))) ** 2. [LOD-16, MSK-5]

    It reads the raw logits, not scores (huggingface/transformers#48421). Scope 'local' is the mean over shards of each
    shard's mean, those without a valid token aside. Source: arXiv:2202.08906.
    """
    number("coeff", coeff, low=0.0)
    logits_TE, valid_T = masked_logits(logits_TE, token_mask_T, dtype)
    weights_T = token_weights(valid_T, scope, tokens_per_shard)
    return float(coeff * (weights_T * log_sum_exp(logits_TE)[:, 0] ** 2).sum())


def token_weights(valid_T: np.ndarray, scope: str, tokens_per_shard: Sequence[int] | None) -> np.ndarray:
    """The share of each token in a mean over valid tokens: of the batch, or of its shard and then over shards."""
    one_of("scope", scope, ("global", "local"))
    shard_of_T = part_of_tokens("tokens_per_shard", tokens_per_shard, len(valid_T))
    if scope == "global":
        shard_of_T = np.zeros_like(shard_of_T)
    tokens_S = np.bincount(shard_of_T[valid_T], minlength=1)
    share_T = 1 / (np.maximum(tokens_S, 1)[np.where(valid_T, shard_of_T, 0)] * max(1, (tokens_S > 0).sum()))
    return np.where(valid_T, share_T, 0)


# bias update


def bias_update(
    counts_E: np.ndarray, spec: BiasUpdateSpec, expert_bias_E: np.ndarray, last_step_E: np.ndarray | None = None
) -> np.ndarray:
    """An expert with less than its share of the load gets a larger bias, one with more a smaller. [LOD-19 .. LOD-24]

    Args:
        counts_E: (E,) or (layers, E) counts of a whole step: summed over ranks, chunks and accumulation first, so that
            the sign is taken once, of the sum.
        spec: the rule.
        expert_bias_E: the biases before, of the same shape; layers do not influence each other.
        last_step_E: what `bias_step` returned at the step before, for a rule with momentum; None: there was none.

    Returns:
        The biases after.
    """
    step_E = bias_step(counts_E, spec, last_step_E)
    return array("expert_bias_E", expert_bias_E, step_E.shape).astype(np.float64) + step_E


def bias_step(counts_E: np.ndarray, spec: BiasUpdateSpec, last_step_E: np.ndarray | None = None) -> np.ndarray:
    """What is added to the biases, and what momentum goes on from; arguments as in `bias_update`. [LOD-46]"""
    shape = (None, None) if np.ndim(counts_E) == 2 else (None,)
    counts = array("counts_E", counts_E, shape, kind="int").astype(np.int64)
    entries("counts_E", counts, counts >= 0, "counts are at least 0")
    E = counts.shape[-1]
    frozen_E = np.zeros(E, bool) if spec.frozen_E is None else array("frozen_E", spec.frozen_E, (E,), kind="bool")
    free_E = ~frozen_E
    # In whole numbers: a mean that is rounded can give a balanced expert a sign. [LOD-21, LOD-25]
    total = counts[..., free_E].sum(axis=-1, keepdims=True)
    excess = total - counts * free_E.sum()
    if spec.rule == "sign":
        step = np.sign(excess).astype(np.float64)
    elif spec.rule == "proportional":
        step = excess / free_E.sum()
    elif spec.rule == "share":
        every = counts.sum(axis=-1, keepdims=True)
        step = np.where(every == 0, 0, spec.wanted_share / free_E.sum() - counts / np.maximum(every, 1))
    else:
        step = excess / np.maximum(total, 1)
    if spec.rule == "tanh":
        step = np.tanh(spec.steepness * step)
    if spec.centred:
        step = step - step[..., free_E].mean(axis=-1, keepdims=True)
    step = np.where(frozen_E, 0, spec.rate * step)
    if last_step_E is None:
        last_step_E = np.zeros_like(step)
    return spec.momentum * array("last_step_E", last_step_E, step.shape) + (1 - spec.momentum) * step


# inputs


def masked_logits(
    logits_TE: np.ndarray, token_mask_T: np.ndarray | None, dtype: DTypeLike
) -> tuple[np.ndarray, np.ndarray]:
    """The logits, 0 where a token is padding (whatever it holds, NaN included, is not read), and the mask. [MSK-6]"""
    logits_TE = array("logits_TE", logits_TE, (None, None)).astype(dtype)
    valid_T = mask_array(token_mask_T, len(logits_TE))
    logits_TE = np.where(valid_T[:, None], logits_TE, 0)
    is_logit_TE = np.isfinite(logits_TE) | np.isneginf(logits_TE)
    entries("logits_TE", logits_TE, is_logit_TE, "entries are finite, or -inf for an expert that is never chosen")
    some_T = np.asarray((logits_TE > -np.inf).any(axis=-1))
    entries("logits_TE", logits_TE, some_T, "a token has an entry above -inf")
    return logits_TE, valid_T


def part_of_tokens(field: str, lengths: Sequence[int] | None, num_tokens: int) -> np.ndarray:
    """The part of each token, of consecutive parts with those lengths; without lengths there is one part."""
    if lengths is None:
        return np.zeros(num_tokens, dtype=np.int64)
    # An empty list has no kind of its own.
    sizes = array(field, np.asarray(lengths, dtype=np.int64) if len(lengths) == 0 else lengths, (None,), kind="int")
    entries(field, sizes, sizes >= 0, "lengths are at least 0")
    require(int(sizes.sum()) == num_tokens, f"{field} sums to {int(sizes.sum())}; there are {num_tokens} tokens")
    return np.repeat(np.arange(len(sizes)), sizes)
