"""moe_jax, losses: what an uneven load costs, and the z-loss. Start reading at `balance_loss`.

Inside `jax.shard_map`, `axis_name` names the mesh axes over which the tokens of a batch are spread; with it a loss is
that of the whole batch, the same on every shard. What is computed is `moe_ref.balance_loss` and `moe_ref.z_loss`.

Legend: T tokens, E choices (experts, then null experts), K top_k, U units (the batch, or its sequences).
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.arrays import AxisName, wide_dtype
from moe_jax.balance import count, sum_over
from moe_jax.explicit import everywhere, in_any_mode
from moe_jax.routing import SMALL_LOGIT, score, softmax, top_k
from moe_ref.specs.balance import RUNNING_SCOPES, BalanceSpec
from moe_ref.specs.router import RouterSpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class BalanceSums:
    """What a balance loss knows of its tokens. Sums of shards, micro-batches, chunks or pooled layers can be added."""

    counts_UE: jax.Array
    """int32; constants of the gradient."""
    scores_UE: jax.Array
    tokens_U: jax.Array
    """int32, valid tokens of each unit."""
    slots_per_token: int = field(metadata={"static": True})

    def __add__(self, other: "BalanceSums") -> "BalanceSums":
        return jax.tree.map(jnp.add, self, other)


def balance_loss(
    logits_TE: jax.Array,
    expert_ids_TK: jax.Array,
    spec: BalanceSpec,
    *,
    token_mask_T: jax.Array | None = None,
    sequence_of_T: jax.Array | None = None,
    num_sequences: int = 1,
    earlier: BalanceSums | None = None,
    num_earlier: int | jax.Array = 0,
    axis_name: AxisName = None,
) -> jax.Array:
    """The balance loss of one layer. [LOD-6 .. LOD-14]

    Differentiable in the logits. Inside `jax.shard_map` with axis_name the loss is that of the whole batch, on every
    shard, and each shard's gradient is that of its own logits.

    Args:
        logits_TE: (T, E) the logits that the router scores, without any bias.
        expert_ids_TK: (T, K) the choice, before any capacity; with counts 'unbiased' only K is taken from it.
        spec: static.
        token_mask_T: (T,) bools; a padding token (False) is in no sum.
        sequence_of_T: (T,) ints in [0, num_sequences), for per 'sequence'; None: one sequence. A sequence that is
            spread over shards has the same number on each of them.
        num_sequences: static.
        earlier: for scopes 'running' and 'running_mean': the sums over all earlier micro-batches.
        num_earlier: for 'running_mean': their number.
        axis_name: mesh axes over which tokens are spread.
    """
    sums = balance_sums(
        logits_TE, expert_ids_TK, spec, token_mask_T=token_mask_T, sequence_of_T=sequence_of_T,
        num_sequences=num_sequences,
    )  # fmt: skip
    return loss_of_sums(sums, spec, earlier=earlier, num_earlier=num_earlier, axis_name=axis_name)


@in_any_mode(everywhere)
def balance_sums(
    logits_TE: jax.Array,
    expert_ids_TK: jax.Array,
    spec: BalanceSpec,
    *,
    token_mask_T: jax.Array | None = None,
    sequence_of_T: jax.Array | None = None,
    num_sequences: int = 1,
) -> BalanceSums:
    """Counts, summed scores and valid tokens of each unit of these tokens; arguments as in `balance_loss`."""
    logits_TE = _masked(logits_TE, token_mask_T)
    T, E = logits_TE.shape
    K = jnp.shape(expert_ids_TK)[1]
    slots = min(K, spec.counted_slots or K)
    U = num_sequences if spec.per == "sequence" else 1
    unit_of_T = jnp.zeros(T, jnp.int32)
    if spec.per == "sequence" and sequence_of_T is not None:
        unit_of_T = jnp.asarray(sequence_of_T).astype(jnp.int32)
    valid_T = jnp.ones(T, bool) if token_mask_T is None else jnp.asarray(token_mask_T)

    counted_TK = _counted_ids(logits_TE, expert_ids_TK, K, spec)[:, :slots]
    counted_TK = jnp.where(valid_T[:, None] & (counted_TK >= 0) & (counted_TK < E), counted_TK, -U * E)
    scores_TE = jnp.where(valid_T[:, None], balance_scores(logits_TE, spec), 0)
    own_TU = (unit_of_T[:, None] == jnp.arange(U)[None]) & valid_T[:, None]
    # HIGHEST: the default would round scores to bfloat16 on TPU.
    scores_UE = jnp.einsum("tu,te->ue", own_TU.astype(scores_TE.dtype), scores_TE, precision=lax.Precision.HIGHEST)
    return BalanceSums(
        counts_UE=count((counted_TK + unit_of_T[:, None] * E).reshape(-1), U * E).reshape(U, E),
        scores_UE=scores_UE,
        tokens_U=own_TU.sum(axis=0, dtype=jnp.int32),
        slots_per_token=spec.target_top_k or slots,
    )


def loss_of_sums(
    sums: BalanceSums,
    spec: BalanceSpec,
    *,
    earlier: BalanceSums | None = None,
    num_earlier: int | jax.Array = 0,
    axis_name: AxisName = None,
) -> jax.Array:
    """coeff * E ** expert_power * sum over experts of f * P, in the mean over the units with a valid token. [LOD-6]

    Sums of several micro-batches or layers (`BalanceSums` can be added) give the loss of all of them as one batch.
    """
    if spec.scope != "local":
        sums = sum_over(axis_name, sums)
    counts_UE, dtype = sums.counts_UE.astype(sums.scores_UE.dtype), sums.scores_UE.dtype
    counted_U = sums.tokens_U
    if spec.scope in RUNNING_SCOPES and earlier is not None:
        before_UE, before_U = sum_over(axis_name, (earlier.counts_UE, earlier.tokens_U))
        counts_UE = counts_UE + before_UE.astype(dtype)
        if spec.scope == "running":
            counted_U = counted_U + before_U
        else:
            counts_UE = counts_UE / (1 + num_earlier)
    tokens_U1, counted_U1 = (jnp.maximum(each, 1)[:, None].astype(dtype) for each in (sums.tokens_U, counted_U))
    fractions_UE = counts_UE / (counted_U1 * (sums.slots_per_token if spec.counts_over == "slots" else 1))
    losses_U = (fractions_UE * (sums.scores_UE / tokens_U1)).sum(axis=-1)
    has_tokens_U = sums.tokens_U > 0
    loss = jnp.where(has_tokens_U, losses_U, 0).sum() / jnp.maximum(has_tokens_U.sum(), 1)
    if spec.scope == "local":
        loss = _mean_of_shards(loss, has_tokens_U.any(), axis_name)
    return spec.coeff * float(counts_UE.shape[1]) ** spec.expert_power * loss


def _mean_of_shards(loss, has_tokens, axis_name):
    """The mean over the shards with a valid token; `loss` is 0 on others."""
    if axis_name is None:
        return loss
    total, num_shards = lax.psum((loss, has_tokens.astype(jnp.int32)), axis_name)
    return total / jnp.maximum(num_shards, 1)


def balance_scores(logits_TE: jax.Array, spec: BalanceSpec) -> jax.Array:
    """Scores are a function of the logits, once: shares of their sum, or raw. [LOD-7]"""
    if not spec.scores_sum_to_1:
        return score(logits_TE, RouterSpec(num_experts=1, top_k=1, score_func=spec.score_func, selector="given"))
    # From logarithms, as a softmax of them: scores of very negative logits keep their ratios where their sum vanishes.
    logs_TE = _log_scores(logits_TE, spec.score_func)
    if spec.score_eps == 0:
        return softmax(logs_TE)
    log_eps_T1 = jnp.full_like(logs_TE[:, :1], np.log(spec.score_eps))
    return softmax(jnp.concatenate([logs_TE, log_eps_T1], axis=-1))[:, :-1]


def _log_scores(logits_TE, score_func: str):
    if score_func == "softmax":
        return logits_TE
    if score_func == "sigmoid":
        return jax.nn.log_sigmoid(logits_TE)
    # Two branches, each fed its own logits: the log of a softplus that underflows has no slope.
    small_TE = logits_TE < SMALL_LOGIT
    large_TE = jnp.log(jax.nn.softplus(jnp.where(small_TE, 0, logits_TE)))
    return 0.5 * jnp.where(small_TE, logits_TE, large_TE)


def _counted_ids(logits_TE, expert_ids_TK, top_k_of_spec: int, spec: BalanceSpec):
    """The given choice, or the top k of the scores without bias and groups. [LOD-9]"""
    if spec.counts == "routed":
        return jnp.asarray(expert_ids_TK).astype(jnp.int32)
    # Scores rise with logits, which do not saturate.
    best_TK, ids_TK = top_k(lax.stop_gradient(logits_TE), top_k_of_spec)
    return jnp.where(jnp.isneginf(best_TK), -1, ids_TK)


def z_loss(
    logits_TE: jax.Array,
    *,
    coeff: float = 1.0,
    scope: str = "global",
    token_mask_T: jax.Array | None = None,
    axis_name: AxisName = None,
) -> jax.Array:
    """The z-loss is coeff times the mean over valid tokens of log(sum(exp(logits))) ** 2. [LOD-16]

    Of raw logits, not of scores (huggingface/transformers#48421). Scope 'local': each shard's mean, then over shards.
    """
    if scope not in ("global", "local"):
        raise ValueError(f"scope is {scope!r}; it is 'global' or 'local'")
    logits_TE = _masked(logits_TE, token_mask_T)
    valid_T = jnp.ones(len(logits_TE), bool) if token_mask_T is None else jnp.asarray(token_mask_T)
    squares_T = jnp.where(valid_T, jax.nn.logsumexp(logits_TE, axis=-1) ** 2, 0)
    total, num_tokens = squares_T.sum(), valid_T.sum(dtype=jnp.int32)
    if scope == "local":
        return coeff * _mean_of_shards(total / jnp.maximum(num_tokens, 1), num_tokens > 0, axis_name)
    total, num_tokens = sum_over(axis_name, (total, num_tokens))
    return coeff * total / jnp.maximum(num_tokens, 1)


def _masked(logits_TE, token_mask_T) -> jax.Array:
    """Logits in the dtype of routing; those of padding tokens are 0, so that no NaN of theirs reaches a gradient."""
    logits_TE = jnp.asarray(logits_TE)
    if logits_TE.ndim != 2 or not jnp.issubdtype(logits_TE.dtype, jnp.floating):
        raise ValueError(f"logits_TE is {logits_TE.dtype}{list(logits_TE.shape)}; it is floats of 2 axes")
    wide_TE = logits_TE.astype(wide_dtype(logits_TE.dtype))
    return wide_TE if token_mask_T is None else jnp.where(jnp.asarray(token_mask_T)[:, None], wide_TE, 0)
