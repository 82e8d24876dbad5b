"""moe_torch, parameters over ranks: what a rank keeps of the experts, and whole tensors from the parts of all ranks."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_torch.experts import GroupedExperts
from moe_torch.moe import MoE
from moe_torch.parallel.collectives import Parallel, gather
from moe_torch.parallel.dispatch import ParallelTokenDispatcher

AXIS_OF_F = {"w1_EFD": 1, "w2_EDF": 2, "w3_EFD": 1, "b1_EF": 1, "b2_ED": None, "b3_EF": 1}
"""Which axis of each parameter of the experts the tensor ranks divide."""


def parallel_of(moe: MoE) -> Parallel:
    """How a layer lies over ranks.

    Raises:
        ValueError: it does not.
    """
    if not isinstance(moe.dispatcher, ParallelTokenDispatcher) or moe.dispatcher.parallel is None:
        raise ValueError("the layer is whole; `parallelize` divides it over ranks")
    return moe.dispatcher.parallel


def keep_own_experts(experts: GroupedExperts, parallel: Parallel) -> None:
    """The experts at this rank's places stay, with its columns of F.

    The down bias belongs to the first tensor rank: it is added to a sum over all of them.
    """
    ids = own_experts(experts.num_experts, parallel)
    rank, size = parallel.rank("tensor"), parallel.size("tensor")
    for name, axis in AXIS_OF_F.items():
        parameter = getattr(experts, name)
        if parameter is None:
            continue
        if axis is None and rank > 0:
            experts.register_parameter(name, None)
            continue
        kept = parameter.detach()[torch.tensor(ids, device=parameter.device)]
        if axis is not None:
            kept = kept.chunk(size, dim=axis)[rank].contiguous()
        experts.register_parameter(name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
    experts.num_experts = len(ids)
    experts.spec = experts.spec.replace(hidden_dim=experts.spec.hidden_dim // size)


def own_experts(num_experts: int, parallel: Parallel) -> list[int]:
    """The ids of the experts at this rank's places."""
    return list(parallel.layout.experts_of(parallel.rank("expert"), num_experts))


@torch.no_grad()
def full_tensors(moe: MoE, *, gradients: bool = False) -> dict[str, Tensor]:
    """Every parameter of a parallel layer, or its gradient, as the whole layer had it; the same on every rank.

    All ranks make this call. Gradients are those after `sync_gradients`; one that there is not is 0.
    """
    parallel = parallel_of(moe)
    found = {}
    for name, parameter in moe.named_parameters():
        if not name.startswith("experts."):
            found[name] = _whole(parameter, gradients)
    w2 = moe.experts.w2_EDF
    # Only the first tensor rank has the down bias.
    nothing = torch.zeros(len(w2), moe.spec.experts.dim, dtype=w2.dtype, device=w2.device)
    own = {name: getattr(moe.experts, name) for name in AXIS_OF_F if _has(moe, name)}
    own = {name: nothing if value is None else _whole(value, gradients) for name, value in own.items()}
    return found | {f"experts.{name}": value for name, value in _gathered(own, parallel).items()}


def _has(moe: MoE, name: str) -> bool:
    spec = moe.spec.experts
    return (spec.bias or name.startswith("w")) and (spec.gated or "3" not in name)


def _whole(parameter: Tensor, gradients: bool) -> Tensor:
    """Over fsdp."""
    value = parameter
    if gradients:
        value = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return value.full_tensor() if isinstance(value, DTensor) else value.detach()


def _gathered(own: dict[str, Tensor], parallel: Parallel) -> dict[str, Tensor]:
    """Over tensor, then over expert."""
    found = own
    if "tensor" in parallel.groups:
        parts = gather(list(found.values()), parallel.groups["tensor"])
        found = {
            name: of_ranks[0] if AXIS_OF_F[name] is None else torch.cat(of_ranks, dim=AXIS_OF_F[name])
            for name, of_ranks in zip(found, parts, strict=True)
        }
    if "expert" in parallel.groups:
        parts = gather(list(found.values()), parallel.groups["expert"])
        found = {name: torch.cat(of_ranks) for name, of_ranks in zip(found, parts, strict=True)}
    placement = parallel.layout.placement
    if placement is None:
        return found
    place_of_expert = sorted(range(len(placement)), key=placement.__getitem__)
    return {name: value[torch.tensor(place_of_expert, device=value.device)] for name, value in found.items()}
