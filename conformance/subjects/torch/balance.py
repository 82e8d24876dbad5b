"""conformance, subject torch: load, losses, bias update and capacity of moe_torch, in this process.

What ranks would all-reduce is added up here; the all-reduce itself is under test with real ranks elsewhere.
"""

from dataclasses import fields
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch

from conformance.core.subject import Subject
from conformance.subjects.torch.arrays import slices, tensor, tensor_if_any, to_numpy, to_torch, with_gradient
from moe_ref import BalanceSpec, BiasUpdateSpec, CapacitySpec, QuantileSpec, RouterSpec, SparsitySpec
from moe_torch.balance import bias_update, tokens_per_expert
from moe_torch.capacity import KeptSlots, apply_capacity, capacities, slot_table
from moe_torch.losses import balance_sums, loss_of_sums, z_loss, z_loss_of_sums, z_sums
from moe_torch.quantile import bias_of_total, needs, quantile_bias, ranked, total_of
from moe_torch.routing import scale_logits
from moe_torch.sparsity import next_coefficient


class TorchBalance(Subject):
    """`moe_torch.balance`, `moe_torch.losses` and `moe_torch.capacity`."""

    def load(
        self, expert_ids_TK: np.ndarray, num_experts: int, *, token_mask_T: np.ndarray | None = None
    ) -> np.ndarray:
        """The count of one batch."""
        return to_numpy(tokens_per_expert(to_torch(expert_ids_TK), num_experts, tensor_if_any(token_mask_T)))

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
        """The loss of all shards together, and its gradient by autograd; no loss reads the balancing bias."""
        given_TE = to_torch(logits_TE).requires_grad_()
        scored_TE = scale_logits(given_TE, router)[:, : router.num_choices]
        ids_TK, mask_T = to_torch(expert_ids_TK), _mask(token_mask_T, len(given_TE))
        num_sequences, sequence_of_T = _sequences(sequence_lengths, len(given_TE))
        sums = [
            balance_sums(
                scored_TE[own],
                ids_TK[own],
                balance,
                token_mask_T=mask_T[own],
                sequence_of_T=sequence_of_T[own],
                num_sequences=num_sequences,
            )
            for own in slices(tokens_per_shard, len(given_TE))
        ]
        if balance.scope == "global":
            loss, _ = loss_of_sums(reduce(add, sums), balance)
        else:
            # With a running scope shards are micro-batches; nothing came before the first.
            before = [None, *(reduce(add, sums[:number]) for number in range(1, len(sums)))]
            parts = [
                loss_of_sums(own, balance, earlier=earlier, num_earlier=number)
                for number, (own, earlier) in enumerate(zip(sums, before, strict=True))
            ]
            losses, has_tokens = (torch.stack(each) for each in zip(*parts, strict=True))
            loss = losses.sum() / has_tokens.sum().clamp(min=1)
        return with_gradient(loss, given_TE)

    def z_loss(
        self,
        logits_TE: np.ndarray,
        coeff: float,
        *,
        token_mask_T: np.ndarray | None = None,
        tokens_per_shard: tuple[int, ...] | None = None,
    ) -> dict[str, Any]:
        """The loss of all shards together."""
        given_TE, mask_T = to_torch(logits_TE).requires_grad_(), _mask(token_mask_T, len(logits_TE))
        if tokens_per_shard is None:
            return with_gradient(z_loss(given_TE, coeff=coeff, token_mask_T=tensor_if_any(token_mask_T)), given_TE)
        sums = [z_sums(given_TE[own], token_mask_T=mask_T[own]) for own in slices(tokens_per_shard, len(given_TE))]
        return with_gradient(z_loss_of_sums(reduce(add, sums), coeff=coeff), given_TE)

    def bias_update(self, counts_SE: np.ndarray, update: BiasUpdateSpec, expert_bias_E: np.ndarray) -> np.ndarray:
        """The counts of ranks and micro-batches are summed first."""
        return to_numpy(bias_update(to_torch(counts_SE).sum(0), update, to_torch(expert_bias_E)))

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
        """The totals of shards are added; those of an exact quantile of the pool are all needs."""
        bias_E, mask_T, K = to_torch(expert_bias_E), _mask(token_mask_T, len(logits_TE)), update.wins(router)
        needs_TE = needs(ranked(to_torch(logits_TE), router), bias_E, router)
        shards = slices(tokens_per_shard, len(needs_TE))
        if update.bins is None and update.over == "pool":
            return to_numpy(quantile_bias([needs_TE[own][mask_T[own]] for own in shards], update, bias_E, K))
        totals = [total_of(needs_TE[own], update, bias_E, K, mask_T[own]) for own in shards]
        return to_numpy(bias_of_total(reduce(add, totals), update, bias_E, K))

    def next_coefficient(self, coeff: float, counts_LE: np.ndarray, num_tokens: int, sparsity: SparsitySpec) -> float:
        """In float32, as a coefficient is kept."""
        return float(next_coefficient(torch.tensor(coeff), to_torch(counts_LE), num_tokens, sparsity))

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
        """What the layer does with a choice; the gradient of the weights is autograd's."""
        given_TK, ids_TK = to_torch(weights_TK).requires_grad_(), to_torch(expert_ids_TK)
        mask_T, limit, last, whole, kept_TK = _mask(token_mask_T, len(ids_TK)), capacity, capacity, None, given_TK
        num_sequences, sequence_of_T = _sequences(sequence_lengths, len(ids_TK))
        while limit is not None:
            # Each limit on its own, because a shard is a rank for one scope and a part of the batch for another.
            shards = slices(tokens_per_shard if limit.scope == "rank" else None, len(ids_TK))
            parts = [
                apply_capacity(
                    ids_TK[own],
                    kept_TK[own],
                    limit.replace(then=None),
                    num_experts,
                    token_mask_T=mask_T[own],
                    sequence_of_T=sequence_of_T[own],
                    num_sequences=num_sequences,
                )
                for own in shards
            ]
            whole = KeptSlots(
                **{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(KeptSlots)}
            )
            ids_TK, kept_TK, last, limit = whole.expert_ids_TK, whole.weights_TK, limit, limit.then
        found = {"expert_ids_TK": to_numpy(ids_TK), "weights_TK": to_numpy(kept_TK.detach())}
        if whole is not None and last.pad_to_capacity:
            by_scope = {"global": None, "rank": tokens_per_shard, "sequence": sequence_lengths}
            num_units, unit_of_T = _sequences(by_scope[last.scope], len(ids_TK))
            tokens_U = torch.bincount(unit_of_T[mask_T], minlength=num_units)
            C = int(capacities(tokens_U, last, ids_TK.shape[1], num_experts).max())
            found["slot_table_UEC"] = to_numpy(
                slot_table(whole, num_experts, C, unit_of_T=unit_of_T, num_units=num_units)
            )
        if d_weights_TK is None:
            return found
        (d_given_TK,) = torch.autograd.grad(kept_TK, given_TK, to_torch(d_weights_TK))
        return found | {"d_weights_TK": to_numpy(d_given_TK)}


def _sequences(lengths, num_tokens: int) -> tuple[int, torch.Tensor]:
    """How many sequences there are, and that of each token."""
    lengths = [num_tokens] if lengths is None else list(lengths)
    return len(lengths), tensor(np.repeat(np.arange(len(lengths)), lengths))


def _mask(token_mask_T, num_tokens: int) -> torch.Tensor:
    return tensor(np.ones(num_tokens, bool)) if token_mask_T is None else to_torch(token_mask_T)
