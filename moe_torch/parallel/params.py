"""moe_torch, parameters over ranks: each is a DTensor of the whole layer's shape, of which a rank stores its part.

    mesh           (fsdp, expert, tensor)
    w1_EFD         (Shard(0), Shard(0), Shard(1))        the gate and shared experts: (Shard(0), Replicate, Replicate)

What is done to parameters from outside is then right by itself: checkpoints, clipping, optimizers. A gradient that is
still to be summed over an axis says so: it is `Partial` there, and whoever reads it as a whole sums it.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from moe_torch.experts import GroupedExperts
from moe_torch.modes import transformed
from moe_torch.moe import MoE
from moe_torch.parallel.collectives import Parallel
from moe_torch.parallel.dispatch import ParallelTokenDispatcher
from moe_torch.parts import OverRanks

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


@dataclass(frozen=True, kw_only=True)
class PartOfRank:
    """How a module of a parallel layer reads its parameters; see `moe_torch.parts`."""

    partial_axes: tuple[str, ...]
    """Ranks along these have other tokens, and each a part of the gradient."""
    mesh: DeviceMesh | None
    """That the parameters lie on; with FSDP2, which lays them over further axes, those that it gathers."""
    is_first_tensor_rank: bool = True

    def own(self, name: str, parameter: Tensor) -> Tensor:
        """The numbers of this rank; the down bias is added to a sum over tensor ranks: 0 on all but the first."""
        if not isinstance(parameter, DTensor):
            return parameter  # FSDP2 gathers what lies over no other axis as plain tensors
        if transformed():
            raise RuntimeError(
                "torch.func and forward-mode AD do not reach over ranks; torch.autograd does, to any order"
            )
        value = parameter.to_local(grad_placements=self.placements_of_gradient(name, parameter))
        if name == "b2_ED" and not self.is_first_tensor_rank:
            return value.masked_fill(torch.ones((), dtype=torch.bool, device=value.device), 0)
        return value

    def placements_of_gradient(self, name: str, parameter: DTensor) -> list[Placement]:
        """Those of the parameter, but partial over what is still to be summed."""
        axes = (*self.partial_axes, "tensor") if name == "b2_ED" else self.partial_axes
        names = parameter.device_mesh.mesh_dim_names or ()
        return [
            Partial() if axis in axes and placement.is_replicate() else placement
            for axis, placement in zip(names, parameter.placements, strict=True)
        ]

    def to_fill(self, parameter: Tensor) -> tuple[Tensor, torch.Generator | None]:
        """One seed for all ranks, and for each part a number that is added to it."""
        if not isinstance(parameter, DTensor) or parameter.is_meta:
            return parameter, None
        mesh, own, place = parameter.device_mesh, parameter.to_local(), 0
        seed = torch.randint(2**62, (1,)).to(own.device)
        for axis, (placement, size) in enumerate(zip(parameter.placements, mesh.shape, strict=True)):
            dist.broadcast(seed, group=mesh.get_group(axis), group_src=0)
            if not placement.is_replicate():
                place = place * size + mesh.get_local_rank(axis)
        return own, torch.Generator(own.device).manual_seed(int(seed) + place)


def is_partial_over(gradient: DTensor, axis: str) -> bool:
    """Whether it still is to be summed over an axis of the mesh."""
    names = gradient.device_mesh.mesh_dim_names or ()
    return any(
        name == axis and placement.is_partial() for name, placement in zip(names, gradient.placements, strict=True)
    )


def divide(moe: MoE, parallel: Parallel) -> None:
    """Each rank stores the experts at its places, with its columns of F; the other parameters are on all ranks.

    FSDP2 lays them over data and fsdp afterwards, where there is an fsdp axis.
    """
    by_fsdp = ("data", "fsdp") if "fsdp" in parallel.groups else ()
    names = tuple(name for name in parallel.mesh.mesh_dim_names or () if name not in by_fsdp)
    whole_mesh = len(names) == parallel.mesh.ndim
    mesh = None if not names else parallel.mesh if whole_mesh else parallel.mesh[names]
    kept = _own_experts(moe.experts, parallel)
    others = ("data",) if parallel.layout.facts.shares_tokens else ("data", "expert")
    for module in moe.modules():
        if not isinstance(module, OverRanks):
            continue
        is_experts = module is moe.experts
        is_first = parallel.rank("tensor") == 0
        module.part = PartOfRank(
            partial_axes=("data",) if is_experts else others, mesh=mesh, is_first_tensor_rank=is_first
        )
        for name, parameter in list(module.named_parameters(recurse=False)):
            own, axes = (kept[name], {"expert": 0, "tensor": AXIS_OF_F[name]}) if is_experts else (parameter, {})
            own = own.detach() if mesh is None else _part_of_whole(own.detach(), mesh, axes)
            module.register_parameter(name, nn.Parameter(own, requires_grad=parameter.requires_grad))


def _part_of_whole(own: Tensor, mesh: DeviceMesh, axes: dict[str, int | None]) -> DTensor:
    """What a rank keeps of a parameter, as a part of the whole; `axes` are those that the axes of the mesh divide."""
    shape, placements = list(own.shape), []
    for dim, axis in enumerate(axes.get(mesh_axis) for mesh_axis in mesh.mesh_dim_names or ()):
        placements.append(Replicate() if axis is None else Shard(axis))
        if axis is not None:
            shape[axis] *= mesh.size(dim)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, mesh, placements, shape=torch.Size(shape), stride=stride)


def _own_experts(experts: GroupedExperts, parallel: Parallel) -> dict[str, Tensor]:
    """The experts at this rank's places, and its columns of F, by the name of the parameter."""
    found = {}
    ids = own_experts(experts.num_experts, parallel)
    rank, size = parallel.rank("tensor"), parallel.size("tensor")
    for name, parameter in experts.named_parameters():
        kept, axis = parameter.detach()[torch.tensor(ids, device=parameter.device)], AXIS_OF_F[name]
        found[name] = kept if axis is None else kept.chunk(size, dim=axis)[rank].contiguous()
    experts.num_experts = len(ids)
    experts.spec = experts.spec.replace(hidden_dim=experts.spec.hidden_dim // size)
    return found


def own_experts(num_experts: int, parallel: Parallel) -> list[int]:
    """The ids of the experts at this rank's places."""
    return list(parallel.layout.experts_of(parallel.rank("expert"), num_experts))


@torch.no_grad()
def full_tensors(moe: MoE, *, gradients: bool = False) -> dict[str, Tensor]:
    """Every parameter of a parallel layer, or its gradient, as the whole layer had it; the same on every rank.

    All ranks make this call. A gradient that does not exist is 0.
    """
    placement = parallel_of(moe).layout.placement
    found = {name: _whole(parameter, gradients) for name, parameter in moe.named_parameters()}
    if placement is None:
        return found
    place_of_expert = sorted(range(len(placement)), key=placement.__getitem__)
    return {
        name: value[torch.tensor(place_of_expert, device=value.device)] if name.startswith("experts.") else value
        for name, value in found.items()
    }


def _whole(parameter: Tensor, gradients: bool) -> Tensor:
    value = parameter
    if gradients:
        value = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return value.full_tensor() if isinstance(value, DTensor) else value.detach()
