"""moe_torch, capacity: an expert takes a bounded number of slots, and the rest are dropped.

    route -> apply_capacity -> permute ...

A dropped slot becomes an unused one, id -1 and weight 0, so that no later stage knows of capacity. Which slots are kept
is a constant of the gradient. What is computed is `moe_ref.apply_capacity`.

Legend: T tokens, K top_k, E experts, N = T * K slots, U units (the batch, or its sequences).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ref.specs.balance import CapacitySpec


@dataclass(frozen=True, kw_only=True)
class KeptSlots:
    """What is left of a choice."""

    expert_ids_TK: Tensor
    """-1 where a slot was dropped."""
    weights_TK: Tensor
    """0 where a slot was dropped."""
    dropped_TK: Tensor
    """Slots that had an expert and are dropped."""
    place_TK: Tensor
    """The place of a kept slot among its expert's in its unit, in drop order; -1 for others."""


def apply_capacity(
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    spec: CapacitySpec,
    num_experts: int,
    *,
    token_mask_T: Tensor | None = None,
    sequence_of_T: Tensor | None = None,
    num_sequences: int = 1,
    group: dist.ProcessGroup | None = None,
) -> KeptSlots:
    """An expert keeps the first C slots of each unit, in drop order, and the others are dropped. [CAP-3 .. CAP-7]

    `pad_to_capacity` changes no value: `slot_table` has the padded form.

    Args:
        expert_ids_TK: (T, K) ints; -1 is an unused slot. Null experts (num_experts and above) drop nothing.
        weights_TK: (T, K).
        spec: the rule.
        num_experts: E, without null experts.
        token_mask_T: (T,) bools; a padding token (False) gets ids -1 and weights 0, and takes no place.
        sequence_of_T: (T,) ints in [0, num_sequences), for scope 'sequence'; None: one sequence.
        num_sequences: how many.
        group: the ranks over which the batch is spread, and its sequences may be: for scopes 'global' and 'sequence'
            the choices are gathered, T * K small numbers of each rank. Ranks may have unequal numbers of tokens.
    """
    ids_TK = expert_ids_TK.long()
    T = ids_TK.shape[0]
    valid_T = torch.ones(T, dtype=torch.bool, device=ids_TK.device) if token_mask_T is None else token_mask_T
    given_ids_TK = ids_TK.masked_fill(~valid_T[:, None], -1)
    used_TK = given_ids_TK >= 0
    given_TK = torch.where(used_TK, weights_TK, 0)
    unit_of_T, num_units = torch.zeros(T, dtype=torch.int64, device=ids_TK.device), 1
    if spec.scope == "sequence" and sequence_of_T is not None:
        unit_of_T, num_units = sequence_of_T.long(), num_sequences

    choice = (given_ids_TK, given_TK.detach(), valid_T, unit_of_T)
    if spec.scope != "rank" and group is not None:
        kept_TK, place_TK = _kept_of_group(*choice, spec, num_experts, num_units, group)
    else:
        kept_TK, place_TK = _kept(*choice, spec, num_experts, num_units)
    kept_ids_TK, kept_weights_TK = given_ids_TK.masked_fill(~kept_TK, -1), _renormalise(given_TK, kept_TK, spec)
    if spec.then is not None:
        second = apply_capacity(
            kept_ids_TK, kept_weights_TK, spec.then, num_experts, token_mask_T=token_mask_T,
            sequence_of_T=sequence_of_T, num_sequences=num_sequences, group=group,
        )  # fmt: skip
        kept_ids_TK, kept_weights_TK, place_TK = second.expert_ids_TK, second.weights_TK, second.place_TK
    return KeptSlots(
        expert_ids_TK=kept_ids_TK,
        weights_TK=kept_weights_TK,
        dropped_TK=used_TK & (kept_ids_TK < 0),
        place_TK=place_TK,
    )


def _kept(ids_TK, weights_TK, valid_T, unit_of_T, spec: CapacitySpec, num_experts: int, num_units: int):
    """Whether each slot keeps its expert, as slots of null experts do, and its place."""
    (T, K), E, U = ids_TK.shape, num_experts, num_units
    has_expert_TK = (ids_TK >= 0) & (ids_TK < E)
    keys_TK = torch.where(has_expert_TK, ids_TK + unit_of_T[:, None] * E, U * E)
    if spec.drop_order == "slot_major":
        place_TK = _places(keys_TK.T.flatten()).view(K, T).T
    elif spec.drop_order == "by_best_weight":
        by_best_T = torch.sort(weights_TK.amax(-1), descending=True, stable=True).indices
        sorted_TK = _places(keys_TK[by_best_T].T.flatten()).view(K, T).T
        place_TK = torch.empty_like(sorted_TK).index_copy_(0, by_best_T, sorted_TK)
    elif spec.drop_order == "by_weight":
        order_N = torch.sort(weights_TK.flatten(), descending=True, stable=True).indices
        places_N = _places(keys_TK.flatten()[order_N])
        place_TK = torch.empty_like(places_N).scatter_(0, order_N, places_N).view(T, K)
    else:
        place_TK = _places(keys_TK.flatten()).view(T, K)
    own_UT = (unit_of_T == torch.arange(U, device=ids_TK.device)[:, None]) & valid_T
    capacity_T = capacities(own_UT.sum(1), spec, K, E)[unit_of_T]
    inside_TK = has_expert_TK & (place_TK < capacity_T[:, None])
    return inside_TK | ((ids_TK >= 0) & ~has_expert_TK), place_TK.masked_fill(~inside_TK, -1)


def _kept_of_group(ids_TK, weights_TK, valid_T, unit_of_T, spec: CapacitySpec, num_experts: int, num_units: int, group):
    """The same for the batch of a whole group; every rank decides alike, and takes its own part."""
    (T, K), ranks = ids_TK.shape, dist.get_world_size(group)
    longest = torch.tensor(T, device=ids_TK.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=group)
    L = int(longest)
    # float64 holds ids exactly, so that one gather is enough; the rows that fill up are padding tokens.
    own_L = ids_TK.new_zeros(L, 2 * K + 2, dtype=torch.float64)
    own_L[:T] = torch.cat([values.double() for values in (ids_TK, weights_TK, valid_T[:, None], unit_of_T[:, None])], 1)
    own_L[T:, :K] = -1
    whole = own_L.new_empty(ranks * L, 2 * K + 2)
    dist.all_gather_into_tensor(whole, own_L, group=group)
    all_ids_TK, all_weights_TK, rest_T2 = whole.split([K, K, 2], dim=1)
    valid_T, unit_of_T = rest_T2[:, 0] > 0, rest_T2[:, 1].long()
    of_all = _kept(all_ids_TK.long(), all_weights_TK, valid_T, unit_of_T, spec, num_experts, num_units)
    kept_TK, place_TK = (each[dist.get_rank(group) * L :][:T] for each in of_all)
    return kept_TK, place_TK


def slot_table(
    kept: KeptSlots, num_experts: int, num_places: int, *, unit_of_T: Tensor | None = None, num_units: int = 1
) -> Tensor:
    """(U, E, C) the flat slot number t * K + k at each place of each expert, -1 where it is empty. [CAP-13]

    Args:
        num_places: C; places beyond it are left off.
        unit_of_T: (T,) the unit (sequence or rank) of each token, in [0, num_units); None: all are one.
    """
    ids_TK, place_TK, size = kept.expert_ids_TK, kept.place_TK, num_units * num_experts * num_places
    unit_T = torch.zeros_like(ids_TK[:, 0]) if unit_of_T is None else unit_of_T
    cells_TK = (unit_T[:, None] * num_experts + ids_TK) * num_places + place_TK
    # Into a cell of their own: to select slots would ask the device for their number.
    cells_TK = cells_TK.where((place_TK >= 0) & (place_TK < num_places), size)
    table = torch.full((size + 1,), -1, dtype=torch.int64, device=ids_TK.device)
    numbers_N = torch.arange(ids_TK.numel(), device=ids_TK.device)
    return table.scatter_(0, cells_TK.flatten(), numbers_N)[:size].view(num_units, num_experts, num_places)


def capacities(tokens_U: Tensor, spec: CapacitySpec, top_k: int, num_experts: int) -> Tensor:
    """`spec.capacity` of each number of valid tokens, in whole numbers. [CAP-3]"""
    over, under = spec.factor_ratio
    if spec.slots is not None:
        wanted_U = torch.full_like(tokens_U, spec.slots)
    elif spec.rounding == "ceil_then_floor":
        wanted_U = -(-tokens_U * top_k // num_experts) * over // under
    elif spec.rounding == "ceil":
        wanted_U = -(-tokens_U * (top_k * over) // (num_experts * under))
    else:
        wanted_U = tokens_U * (top_k * over) // (num_experts * under)
    return torch.minimum(wanted_U.clamp(min=spec.min_slots), tokens_U)


def _places(keys_N: Tensor) -> Tensor:
    """How many earlier entries have the same key."""
    sorted_N, order_N = keys_N.sort(stable=True)
    starts_N = torch.searchsorted(sorted_N, sorted_N, side="left")
    numbers_N = torch.arange(keys_N.shape[0], device=keys_N.device)
    return torch.empty_like(order_N).scatter_(0, order_N, numbers_N - starts_N)


def _renormalise(given_TK: Tensor, kept_TK: Tensor, spec: CapacitySpec) -> Tensor:
    """Kept weights stay, or are divided by the sum of a token's weights, before or after the drop. [CAP-9]"""
    kept_weights_TK = torch.where(kept_TK, given_TK, 0)
    if spec.renormalise == "no":
        return kept_weights_TK
    sum_T1 = (given_TK if spec.renormalise == "before" else kept_weights_TK).sum(-1, keepdim=True)
    # A sum of 0 leaves weights of 0, and no slope.
    return torch.where(sum_T1 == 0, 0, spec.weight_sum * kept_weights_TK / torch.where(sum_T1 == 0, 1, sum_T1))
