"""moe_torch, redundant experts: a choice of experts becomes one of places, and what places have comes home to experts.

Legend: T tokens, K top_k, E experts, P places, R replicas.
"""

import torch
from torch import Tensor

from moe_ref.specs.replicas import ReplicaSpec


def place_slots(expert_ids_TK: Tensor, spec: ReplicaSpec) -> Tensor:
    """A slot goes to one place of its expert; -1 stays -1, and null experts are numbered on past the places."""
    E, device = spec.num_experts, expert_ids_TK.device
    table_ER, counts_E = (torch.from_numpy(each).to(device) for each in spec.table())
    ids_S = expert_ids_TK.flatten()
    number_S = torch.arange(len(ids_S), device=device, dtype=torch.int64)
    if spec.choice == "in_turn":
        # A stable sort has the slots of an expert side by side, in their order.
        sorted_S, order_S = ids_S.sort(stable=True)
        turn_S = number_S - torch.searchsorted(sorted_S, sorted_S)
        number_S = torch.empty_like(turn_S).scatter_(0, order_S, turn_S)
    expert_S = ids_S.clamp(0, E - 1).long()
    place_S = table_ER[expert_S, number_S % counts_E[expert_S]].to(ids_S.dtype)
    place_S = torch.where(ids_S >= E, ids_S - E + spec.num_places, torch.where(ids_S < 0, ids_S, place_S))
    return place_S.view_as(expert_ids_TK)


def home(values_P: Tensor, spec: ReplicaSpec) -> Tensor:
    """(E, ...) the sums over the places of each expert, of counts or of gradients."""
    placement_P = torch.tensor(spec.placement, device=values_P.device)
    return values_P.new_zeros(spec.num_experts, *values_P.shape[1:]).index_add_(0, placement_P, values_P)


def replicate(weights_E: Tensor, spec: ReplicaSpec) -> Tensor:
    """(P, ...) a copy at each place; the gradient of a place is added to that of its expert."""
    return weights_E.index_select(0, torch.tensor(spec.placement, device=weights_E.device))
