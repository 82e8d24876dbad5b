"""conformance, subject jax: load, losses, bias update and capacity of moe_jax, compiled.

Several shards run as they would under `jax.shard_map`, side by side under one axis name; each is filled up with padding
tokens to the length of the whole batch, so that one program serves every way of cutting it.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conformance.core.subject import Subject
from conformance.subjects.jax.arrays import narrow
from moe_jax.balance import bias_update, tokens_per_expert
from moe_jax.capacity import KeptSlots, apply_capacity, slot_table
from moe_jax.losses import balance_loss, balance_sums, loss_of_sums, z_loss
from moe_jax.quantile import bias_of_total, quantile_bias, total_of
from moe_jax.routing import scale_logits
from moe_jax.sparsity import next_coefficient
from moe_ref import BalanceSpec, BiasUpdateSpec, CapacitySpec, QuantileSpec, RouterSpec, SparsitySpec
from moe_ref.specs.balance import RUNNING_SCOPES

AXIS = "shards"


class JaxBalance(Subject):
    """`moe_jax.balance`, `moe_jax.losses` and `moe_jax.capacity`."""

    def load(
        self, expert_ids_TK: np.ndarray, num_experts: int, *, token_mask_T: np.ndarray | None = None
    ) -> np.ndarray:
        """The count of one batch."""
        return np.asarray(_load(narrow(expert_ids_TK), token_mask_T=token_mask_T, num_experts=num_experts))

    def balance_loss(
        self,
        logits_TE: np.ndarray,
        expert_ids_TK: np.ndarray,
        balance: BalanceSpec,
        router: RouterSpec,
        *,
        expert_bias_E: np.ndarray | None = None,
        token_mask_T: np.ndarray | None = None,
        sequence_lengths: tuple[int, ...] | None = None,
        tokens_per_shard: tuple[int, ...] | None = None,
    ) -> dict[str, Any]:
        """The loss of all shards together, and its gradient by `jax.grad`; no loss reads the balancing bias."""
        T = len(logits_TE)
        rows_ST = shards_of(T, tokens_per_shard)
        loss, d_logits_TE = _balance(
            narrow(logits_TE), narrow(expert_ids_TK), narrow(rows_ST), mask(token_mask_T, T),
            narrow(part_of(T, sequence_lengths)), spec=balance, router=router, num_sequences=num_of(sequence_lengths),
        )  # fmt: skip
        return {"loss": float(loss), "d_logits_TE": np.asarray(d_logits_TE)}

    def z_loss(
        self,
        logits_TE: np.ndarray,
        coeff: float,
        *,
        token_mask_T: np.ndarray | None = None,
        tokens_per_shard: tuple[int, ...] | None = None,
    ) -> dict[str, Any]:
        """The loss of all shards together."""
        rows_ST, mask_T = shards_of(len(logits_TE), tokens_per_shard), mask(token_mask_T, len(logits_TE))
        loss, d_logits_TE = _z_loss(narrow(logits_TE), narrow(rows_ST), mask_T, coeff)
        return {"loss": float(loss), "d_logits_TE": np.asarray(d_logits_TE)}

    def bias_update(self, counts_SE: np.ndarray, update: BiasUpdateSpec, expert_bias_E: np.ndarray) -> np.ndarray:
        """The counts are those of shards, summed over their axis."""
        return np.asarray(_bias_update(narrow(counts_SE), narrow(expert_bias_E), spec=update))

    def quantile_update(
        self,
        logits_TE: np.ndarray,
        router: RouterSpec,
        update: QuantileSpec,
        expert_bias_E: np.ndarray,
        *,
        token_mask_T: np.ndarray | None = None,
        tokens_per_shard: tuple[int, ...] | None = None,
    ) -> np.ndarray:
        """The totals of shards are summed over their axis; an exact quantile of the pool is of all tokens."""
        given = (narrow(logits_TE), narrow(expert_bias_E), mask(token_mask_T, len(logits_TE)))
        if update.bins is None and update.over == "pool":
            return np.asarray(_quantile(*given, router=router, update=update))
        rows_ST = narrow(shards_of(len(logits_TE), tokens_per_shard))
        return np.asarray(_quantile_of_shards(*given, rows_ST, router=router, update=update))

    def next_coefficient(self, coeff: float, counts_LE: np.ndarray, num_tokens: int, sparsity: SparsitySpec) -> float:
        """In float32, as a coefficient is kept."""
        return float(_next_coefficient(np.float32(coeff), narrow(counts_LE), num_tokens, spec=sparsity))

    def capacity(
        self,
        expert_ids_TK: np.ndarray,
        weights_TK: np.ndarray,
        capacity: CapacitySpec,
        num_experts: int,
        *,
        token_mask_T: np.ndarray | None = None,
        sequence_lengths: tuple[int, ...] | None = None,
        tokens_per_shard: tuple[int, ...] | None = None,
        d_weights_TK: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """What the layers do with a choice, and the gradient of the weights by `jax.vjp`."""
        T = len(expert_ids_TK)
        d_kept_TK = np.zeros_like(weights_TK) if d_weights_TK is None else d_weights_TK
        kept, d_given_TK = _capacity(
            narrow(expert_ids_TK), narrow(weights_TK), narrow(shards_of(T, tokens_per_shard)), mask(token_mask_T, T),
            narrow(part_of(T, sequence_lengths)), narrow(d_kept_TK), spec=capacity, num_experts=num_experts,
            num_sequences=num_of(sequence_lengths),
        )  # fmt: skip
        found = {"expert_ids_TK": np.asarray(kept.expert_ids_TK), "weights_TK": np.asarray(kept.weights_TK)}
        last = capacity.then or capacity
        if last.pad_to_capacity:
            lengths = {"global": None, "rank": tokens_per_shard, "sequence": sequence_lengths}[last.scope]
            unit_of_T, num_units, K = part_of(T, lengths), num_of(lengths), np.shape(expert_ids_TK)[1]
            tokens_U = np.bincount(unit_of_T[np.asarray(mask(token_mask_T, T))], minlength=num_units)
            C = max(last.capacity(int(tokens), K, num_experts) for tokens in tokens_U)
            found["slot_table_UEC"] = np.asarray(
                slot_table(kept, num_experts, C, unit_of_T=unit_of_T, num_units=num_units)
            )
        return found if d_weights_TK is None else found | {"d_weights_TK": np.asarray(d_given_TK)}


_load = jax.jit(tokens_per_expert, static_argnames="num_experts")


@jax.jit
def _z_loss(logits_TE, rows_ST, token_mask_T, coeff):
    def of_shard(logits_TE, own_T, token_mask_T):
        return z_loss(logits_TE, coeff=coeff, token_mask_T=own_T & token_mask_T, axis_name=AXIS)

    def loss(logits_TE):
        logits, valid = (take(values, rows_ST) for values in (logits_TE, token_mask_T))
        return jax.vmap(of_shard, axis_name=AXIS)(logits, rows_ST >= 0, valid)[0]

    return jax.value_and_grad(loss)(logits_TE)


@partial(jax.jit, static_argnames="spec")
def _bias_update(counts_SE, expert_bias_E, *, spec: BiasUpdateSpec):
    update = partial(bias_update, spec=spec, expert_bias_E=expert_bias_E, axis_name=AXIS)
    return jax.vmap(update, axis_name=AXIS)(counts_SE)[0]


@partial(jax.jit, static_argnames=("router", "update"))
def _quantile(logits_TE, expert_bias_E, token_mask_T, *, router: RouterSpec, update: QuantileSpec):
    return quantile_bias(logits_TE, router, update, expert_bias_E, token_mask_T)


@partial(jax.jit, static_argnames=("router", "update"))
def _quantile_of_shards(logits_TE, expert_bias_E, token_mask_T, rows_ST, *, router: RouterSpec, update: QuantileSpec):
    def of_shard(logits_TE, own_T, token_mask_T):
        return total_of(logits_TE, router, update, expert_bias_E, own_T & token_mask_T, axis_name=AXIS)

    logits, valid = (take(values, rows_ST) for values in (logits_TE, token_mask_T))
    total = jax.vmap(of_shard, axis_name=AXIS)(logits, rows_ST >= 0, valid)[0]
    return bias_of_total(total, update, expert_bias_E, update.wins(router))


_next_coefficient = jax.jit(next_coefficient, static_argnames="spec")


@partial(jax.jit, static_argnames=("spec", "router", "num_sequences"))
def _balance(
    logits_TE,
    ids_TK,
    rows_ST,
    token_mask_T,
    sequence_of_T,
    *,
    spec: BalanceSpec,
    router: RouterSpec,
    num_sequences: int,
):
    def loss(logits_TE):
        scored_TE = scale_logits(logits_TE, router)[:, : router.num_choices]
        per_shard = [take(values, rows_ST) for values in (scored_TE, ids_TK, token_mask_T, sequence_of_T)]
        inputs: Any = {"num_sequences": num_sequences}
        if spec.scope in RUNNING_SCOPES:
            return _running(per_shard, spec, inputs)

        def of_shard(scored_TE, ids_TK, own_T, token_mask_T, sequence_of_T):
            return balance_loss(
                scored_TE, ids_TK, spec, token_mask_T=own_T & token_mask_T, sequence_of_T=sequence_of_T,
                axis_name=AXIS, **inputs,
            )  # fmt: skip

        scored, ids, valid, sequences = per_shard
        return jax.vmap(of_shard, axis_name=AXIS)(scored, ids, rows_ST >= 0, valid, sequences)[0]

    def _running(per_shard, spec, inputs):
        """Shards are micro-batches here, one after the other."""
        losses, has_tokens, earlier = [], [], None
        for number, (scored, ids, valid, sequences, rows) in enumerate(zip(*per_shard, rows_ST, strict=True)):
            sums = balance_sums(
                scored, ids, spec, token_mask_T=valid & (rows >= 0), sequence_of_T=sequences, **inputs
            )  # fmt: skip
            losses.append(loss_of_sums(sums, spec, earlier=earlier, num_earlier=number))
            has_tokens.append(sums.tokens_U.any())
            earlier = sums if earlier is None else earlier + sums
        return jnp.stack(losses).sum() / jnp.maximum(jnp.stack(has_tokens).sum(), 1)

    return jax.value_and_grad(loss)(logits_TE)


@partial(jax.jit, static_argnames=("spec", "num_experts", "num_sequences"))
def _capacity(
    ids_TK, weights_TK, rows_ST, token_mask_T, sequence_of_T, d_weights_TK, *, spec: CapacitySpec, num_experts: int,
    num_sequences: int,
):  # fmt: skip
    def of_shard(ids_TK, weights_TK, own_T, token_mask_T, sequence_of_T):
        limited = apply_capacity(
            ids_TK, weights_TK, spec, num_experts, token_mask_T=own_T & token_mask_T, sequence_of_T=sequence_of_T,
            num_sequences=num_sequences, axis_name=AXIS,
        )  # fmt: skip
        return limited.weights_TK, limited

    def forward(weights_TK):
        ids, weights, valid, sequences = (
            take(values, rows_ST) for values in (ids_TK, weights_TK, token_mask_T, sequence_of_T)
        )
        kept_weights, limited = jax.vmap(of_shard, axis_name=AXIS)(ids, weights, rows_ST >= 0, valid, sequences)
        whole: KeptSlots = jax.tree.map(lambda values: put_back(values, rows_ST), limited)
        return put_back(kept_weights, rows_ST), whole

    _, pull, limited = jax.vjp(forward, weights_TK, has_aux=True)
    return limited, pull(d_weights_TK)[0]


def shards_of(num_tokens: int, tokens_per_shard) -> np.ndarray:
    """(S, T) the tokens of each shard, in order; -1 fills up."""
    lengths = [num_tokens] if tokens_per_shard is None else list(tokens_per_shard)
    rows_ST = np.full((len(lengths), num_tokens), -1)
    for own_T, length, end in zip(rows_ST, lengths, np.cumsum(lengths), strict=True):
        own_T[:length] = np.arange(end - length, end)
    return rows_ST


def part_of(num_tokens: int, lengths) -> np.ndarray:
    """(T,) the number of the sequence of each token."""
    return np.zeros(num_tokens, np.int64) if lengths is None else np.repeat(np.arange(len(lengths)), lengths)


def num_of(lengths) -> int:
    """How many sequences there are; one without lengths."""
    return 1 if lengths is None else len(lengths)


def mask(token_mask_T, num_tokens: int):
    """A mask where none is given: one program less to compile."""
    return np.ones(num_tokens, bool) if token_mask_T is None else token_mask_T


def take(values_T, rows_ST):
    """The values of each shard's tokens; those that fill up have the last token's."""
    return values_T[rows_ST]


def put_back(values_ST, rows_ST):
    """(T, ...) from the values of the shards."""
    T = rows_ST.shape[1]
    flat = values_ST.reshape(-1, *values_ST.shape[2:])
    return (
        jnp.zeros((T, *flat.shape[1:]), flat.dtype)
        .at[jnp.where(rows_ST < 0, T, rows_ST).reshape(-1)]
        .set(flat, mode="drop")
    )
