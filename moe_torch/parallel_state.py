"""moe_torch, parameters over ranks: what a rank keeps of the experts, and whole tensors from the parts of all ranks."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_torch.experts import GroupedExperts
from moe_torch.moe import MoE
from moe_torch.parallel_collectives import Parallel, gather
from moe_torch.parallel_dispatch import ParallelTokenDispatcher

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


def keep_own_experts(experts: GroupedExperts, parallel: Parallel) -> GroupedExperts:
    """The experts at this rank's places, with its columns of F.

    The down bias belongs to the first tensor rank: it is added to a sum over all of them.
    """
    ids = own_experts(experts.num_experts, parallel)
    rank, size = parallel.rank("tensor"), parallel.size("tensor")
    spec = experts.spec.replace(hidden_dim=experts.spec.hidden_dim // size)
    own = GroupedExperts(len(ids), spec, device="meta").train(experts.training)
    for name, axis in AXIS_OF_F.items():
        parameter = getattr(experts, name)
        if parameter is None:
            continue
        if axis is None and rank > 0:
            own.register_parameter(name, None)
            continue
        kept = parameter.detach()[torch.tensor(ids, device=parameter.device)]
        if axis is not None:
            kept = kept.chunk(size, dim=axis)[rank].contiguous()
        own.register_parameter(name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
    return own


def own_experts(num_experts: int, parallel: Parallel) -> list[int]:
    """The ids of the experts at this rank's places."""
    per_rank = num_experts // parallel.size("expert")
    first = parallel.rank("expert") * per_rank
    placement = parallel.placement or range(num_experts)
    return list(placement[first : first + per_rank])


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
    for name, axis in AXIS_OF_F.items():
        if not _has(moe, name):
            continue
        parameter = getattr(moe.experts, name)
        # Only the first tensor rank has the down bias.
        w2 = moe.experts.w2_EDF
        nothing = torch.zeros(len(w2), moe.spec.experts.dim, dtype=w2.dtype, device=w2.device)
        own = nothing if parameter is None else _whole(parameter, gradients)
        found[f"experts.{name}"] = _gathered(own, axis, parallel)
    return found


def _has(moe: MoE, name: str) -> bool:
    spec = moe.spec.experts
    return (spec.bias or name.startswith("w")) and (spec.gated or "3" not in name)


def _whole(parameter: Tensor, gradients: bool) -> Tensor:
    """Over fsdp."""
    value = parameter
    if gradients:
        value = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return value.full_tensor() if isinstance(value, DTensor) else value.detach()


def _gathered(own: Tensor, axis: int | None, parallel: Parallel) -> Tensor:
    """Over tensor, then over expert."""
    if "tensor" in parallel.groups:
        parts = gather(own, parallel.groups["tensor"])
        own = parts[0] if axis is None else torch.cat(parts, dim=axis)
    by_place = own if "expert" not in parallel.groups else torch.cat(gather(own, parallel.groups["expert"]))
    if parallel.placement is None:
        return by_place
    full = torch.empty_like(by_place)
    full[torch.tensor(parallel.placement, device=full.device)] = by_place
    return full
