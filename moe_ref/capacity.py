"""moe_ref, capacity: an expert takes a bounded number of slots, and the rest are dropped.

    route -> apply_capacity -> permute ...

A dropped slot becomes an unused one: id -1 and weight 0, so every later stage treats it as such, and its gradient is 0.
Capacities, counts and orders are of valid tokens alone: padding takes no place and makes none.

Legend: T tokens, K top_k, E experts, U units (batch, shards or sequences), C the largest capacity of a unit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_ref.balance import part_of_tokens, tokens_per_expert
from moe_ref.specs.balance import CapacitySpec
from moe_ref.specs.checks import array, entries, integer, mask_array
from moe_ref.specs.ids import UNUSED, ids_array


@dataclass(frozen=True, kw_only=True)
class CapacityTrace:
    """What was kept, and every intermediate."""

    expert_ids_TK: np.ndarray
    """The choice; -1 where a slot was dropped."""
    weights_TK: np.ndarray
    """0 where a slot was dropped."""
    dropped_TK: np.ndarray
    """Slots that were used and are dropped."""
    kept_TK: np.ndarray
    """Slots that an expert still has, those of null experts included."""
    used_TK: np.ndarray
    """Slots that had an expert before."""
    given_weights_TK: np.ndarray
    """The weights before; 0 for unused slots."""
    unit_of_T: np.ndarray
    capacity_U: np.ndarray
    wanted_UE: np.ndarray
    """Slots that chose each expert of each unit."""
    taken_UE: np.ndarray
    """Slots that it keeps."""
    place_TK: np.ndarray
    """The place of a kept slot among its expert's in its unit, in drop order; -1 for others."""
    slot_table_UEC: np.ndarray | None
    """With pad_to_capacity: the flat slot number (t * K + k) at each place, -1 where it is empty."""
    first: "CapacityTrace | None" = None
    """Of a spec with `then`: the trace of the first limit; the other fields are of the second, dropped_TK of both."""


def apply_capacity(
    expert_ids_TK: np.ndarray,
    weights_TK: np.ndarray,
    spec: CapacitySpec,
    num_experts: int,
    *,
    token_mask_T: np.ndarray | None = None,
    sequence_lengths: Sequence[int] | None = None,
    tokens_per_shard: Sequence[int] | None = None,
) -> CapacityTrace:
    """An expert keeps the first C slots of each unit, in drop order, and the others are dropped. [CAP-2, CAP-5, MSK-7]

    Args:
        expert_ids_TK: (T, K) the choice; -1 is an unused slot. Null experts (num_experts and above) drop nothing.
        weights_TK: (T, K) the routing weights.
        spec: the rule.
        num_experts: E, without null experts.
        token_mask_T: (T,) bools; a padding token (False) gets ids -1 and weights 0, whatever it held.
        sequence_lengths, tokens_per_shard: lengths of the consecutive sequences, and of the shards (ranks), sum T each;
            for the scopes of those names. None: one.
    """
    integer("num_experts", num_experts, 1)
    T, K = array("expert_ids_TK", expert_ids_TK, (None, None), kind="int").shape
    weights_TK = array("weights_TK", weights_TK, (T, K))
    valid_T = mask_array(token_mask_T, T)
    ids_TK = np.where(valid_T[:, None], expert_ids_TK, UNUSED)
    ids_TK = ids_array("expert_ids_TK", ids_TK, (T, K), max(num_experts, ids_TK.max(initial=0) + 1), low=UNUSED)
    used_TK = ids_TK != UNUSED
    given_TK = np.where(used_TK, weights_TK, 0)
    entries("weights_TK", given_TK, np.isfinite(given_TK), "weights of used slots are finite")

    lengths = {"global": None, "rank": tokens_per_shard, "sequence": sequence_lengths}[spec.scope]
    field = "sequence_lengths" if spec.scope == "sequence" else "tokens_per_shard"
    unit_of_T = part_of_tokens(field, lengths, T)
    U = 1 if lengths is None else len(lengths)
    tokens_U = np.bincount(unit_of_T[valid_T], minlength=U)
    capacity_U = np.array([spec.capacity(int(tokens), K, num_experts) for tokens in tokens_U], dtype=np.int64)

    order_N = drop_order(given_TK, spec)
    place_N, table_UEC = np.full(T * K, -1), np.full((U, num_experts, capacity_U.max(initial=0)), -1)
    for unit, capacity in enumerate(capacity_U):
        for expert in range(num_experts):
            wants_TK = used_TK & (unit_of_T == unit)[:, None] & (ids_TK == expert)
            kept = order_N[wants_TK.reshape(-1)[order_N]][:capacity]
            place_N[kept] = np.arange(len(kept))
            table_UEC[unit, expert, : len(kept)] = kept
    place_TK = place_N.reshape(T, K)
    dropped_TK = used_TK & (ids_TK < num_experts) & (place_TK < 0)

    kept_TK = used_TK & ~dropped_TK
    kept_ids_TK = np.where(kept_TK, ids_TK, UNUSED)
    trace = CapacityTrace(
        expert_ids_TK=kept_ids_TK,
        weights_TK=renormalise(given_TK, kept_TK, spec),
        dropped_TK=dropped_TK,
        kept_TK=kept_TK,
        used_TK=used_TK,
        given_weights_TK=given_TK,
        unit_of_T=unit_of_T,
        capacity_U=capacity_U,
        wanted_UE=counts_of_units(ids_TK, unit_of_T, U, num_experts),
        taken_UE=counts_of_units(kept_ids_TK, unit_of_T, U, num_experts),
        place_TK=place_TK,
        slot_table_UEC=table_UEC if spec.pad_to_capacity else None,
    )
    if spec.then is None:
        return trace
    second = apply_capacity(
        trace.expert_ids_TK, trace.weights_TK, spec.then, num_experts, token_mask_T=token_mask_T,
        sequence_lengths=sequence_lengths, tokens_per_shard=tokens_per_shard,
    )  # fmt: skip
    return replace(second, first=trace, dropped_TK=trace.dropped_TK | second.dropped_TK)


def drop_order(weights_TK: np.ndarray, spec: CapacitySpec) -> np.ndarray:
    """The flat slot numbers in the order in which slots are admitted. [CAP-6, CAP-7, CAP-18]"""
    T, K = weights_TK.shape
    numbers_TK = np.arange(T * K).reshape(T, K)
    if spec.drop_order == "slot_major":
        return numbers_TK.T.reshape(-1)
    if spec.drop_order == "by_best_weight":
        by_best_T = np.argsort(-weights_TK.max(axis=-1), kind="stable")
        return numbers_TK[by_best_T].T.reshape(-1)
    if spec.drop_order == "by_weight":
        return np.argsort(-weights_TK.reshape(-1), kind="stable")
    return numbers_TK.reshape(-1)


def renormalise(given_TK: np.ndarray, kept_TK: np.ndarray, spec: CapacitySpec) -> np.ndarray:
    """Kept weights stay, or are divided by the sum of a token's weights, before or after the drop. [CAP-8, CAP-9]"""
    kept_weights_TK = np.where(kept_TK, given_TK, 0)
    if spec.renormalise == "no":
        return kept_weights_TK
    in_sum_TK = given_TK if spec.renormalise == "before" else kept_weights_TK
    sum_T1 = in_sum_TK.sum(axis=-1, keepdims=True)
    return spec.weight_sum * kept_weights_TK / np.where(sum_T1 == 0, 1, sum_T1)


def counts_of_units(expert_ids_TK: np.ndarray, unit_of_T: np.ndarray, num_units: int, num_experts: int) -> np.ndarray:
    """Tokens per expert of each unit."""
    counts = [tokens_per_expert(expert_ids_TK[unit_of_T == unit], num_experts) for unit in range(num_units)]
    return np.array(counts, dtype=np.int64).reshape(num_units, num_experts)
