"""moe_torch, parallel: one layer over the ranks of a DeviceMesh. `parallelize` takes a whole layer and leaves a part.

    mesh = init_device_mesh("cuda", (2, 8), mesh_dim_names=("fsdp", "expert"))
    parallelize(moe, mesh, ShardLayout(fsdp=2, expert=8))   # each rank keeps its own experts, and its piece of them
    moe(x).backward(d_output)                               # each rank with its own tokens
    sync_gradients(moe)

Parameters are DTensors then, of the whole layer's names and shapes (`params.py`): checkpoints, clipping and optimizers
are PyTorch's own.

Axes of the mesh, each of which may be absent: data and fsdp (other tokens, the same layer), expert (other experts),
tensor (other columns of the same experts, the same tokens). The same code runs on NCCL and on gloo.

The rule for gradients: the loss is the sum over all tokens of all ranks, and each token counts once. After backward and
`sync_gradients`, every rank has the complete gradient of every parameter that it holds, as a one-rank layer that sees
all tokens would. Who wants a mean over ranks divides the loss.

* Experts: a rank sees the rows of all tokens of its expert axis, so what is missing is the sum over data and fsdp.
* Router and shared experts: each rank knows its own tokens alone, so the sum over the expert axis is missing as well.
  Where ranks have the same tokens (the tensor axis; with some strategies the expert axis) the partial gradients
  of what enters the experts are summed in the backward pass itself, and nothing is missing.
* With FSDP2 the sums over data and fsdp are its own reduce-scatter and all-reduce, set to sum instead of to average. It
  also sums over the expert axis what is partial there, and leaves nothing to `sync_gradients`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe_ref.specs.checks import require
from moe_ref.specs.layout import AXES, ShardLayout
from moe_torch.dispatcher import LocalTokenDispatcher
from moe_torch.moe import MoE
from moe_torch.parallel.collectives import Parallel, sum_in_place
from moe_torch.parallel.dispatch import (
    AllToAllTokenDispatcher,
    ParallelTokenDispatcher,
    ReplicatedTokenDispatcher,
)
from moe_torch.parallel.nodes import NodeDedupTokenDispatcher
from moe_torch.parallel.params import PartOfRank, divide, is_partial_over, parallel_of
from moe_torch.parallel.states import guard_states

DISPATCHERS: dict[str, type[ParallelTokenDispatcher]] = {
    "all_to_all": AllToAllTokenDispatcher,
    "replicated": ReplicatedTokenDispatcher,
    "node_dedup": NodeDedupTokenDispatcher,
}
"""The strategies that moe_torch has."""


def unsupported(layout: ShardLayout) -> str | None:
    """Why moe_torch cannot run a layout; None where it can."""
    if layout.strategy not in DISPATCHERS:
        return f"strategy is {layout.strategy!r}; moe_torch has {', '.join(DISPATCHERS)}"
    if layout.num_emb_chunks > 1:
        return f"num_emb_chunks is {layout.num_emb_chunks}; moe_torch does not divide a projection into pieces of D"
    return None


def parallelize(moe: MoE, mesh: DeviceMesh, layout: ShardLayout, **fully_shard_options: Any) -> MoE:
    """Leaves each rank its own part of a whole layer, which is the same on all ranks; changes it, and returns it.

    The rest of a model may lie over the ranks in any way. Where it is DTensors on the same mesh (`fully_shard(model,
    mesh=mesh, ignored_params=set(moe.parameters()))`), torch's clipping takes all parameters at once; else
    `moe_torch.parallel.clip_grad_norm_` does.

    Args:
        moe: on any device, meta included.
        mesh: its axes are of data, fsdp, expert and tensor, in any order, and have the sizes that the layout says; an
            axis that it has not is 1 there. Every rank of it makes this call. It may be a part of a larger mesh, but
            for node_dedup.
        layout: how the layer lies over the mesh. With several token chunks one is on its way while the experts work on
            another.
        fully_shard_options: for `torch.distributed.fsdp.fully_shard`, where the mesh has an fsdp axis.

    Raises:
        ValueError: the layout does not fit the layer or the mesh, or is one that moe_torch has not; it names field,
            value and bound.
    """
    require(isinstance(moe.dispatcher, LocalTokenDispatcher), "the layer is parallel already")
    require(not moe.batch_invariant, "batch_invariant is True; over ranks it is False")
    why_not = unsupported(layout)
    require(why_not is None, str(why_not))
    layout.check(moe.spec)
    groups = _groups(mesh, layout)
    require(
        not fully_shard_options or "fsdp" in groups,
        f"{', '.join(fully_shard_options)} is given for fully_shard, but the mesh has no fsdp axis",
    )
    parallel = Parallel(mesh=mesh, layout=layout, groups=groups)
    # One rank on the expert axis has nothing to exchange.
    dispatcher = DISPATCHERS[layout.strategy] if "expert" in groups else ReplicatedTokenDispatcher
    moe.dispatcher = dispatcher.of(moe.spec.router, parallel, moe.dispatcher.align)
    divide(moe, parallel)
    if "fsdp" in groups:
        _shard_fully(moe, parallel, fully_shard_options)
    guard_states(moe)
    return moe


def _groups(mesh: DeviceMesh, layout: ShardLayout) -> dict[str, dist.ProcessGroup]:
    """The process group of each axis that has several ranks, of a mesh that is the layout's."""
    names = mesh.mesh_dim_names or ()
    for name in names or (None,):
        require(name in AXES, f"the mesh has an axis {name!r}; its axes are of {', '.join(AXES)}")
    sizes = {name: mesh.size(dim) for dim, name in enumerate(names)}
    needed = {axis: getattr(layout, axis) for axis in AXES}
    require(
        all(sizes.get(axis, 1) == size for axis, size in needed.items()),
        f"the mesh is {sizes}; the layout needs {needed}",
    )
    return {name: mesh.get_group(name) for name, size in sizes.items() if size > 1}


def _shard_fully(moe: MoE, parallel: Parallel, options: dict) -> None:
    """FSDP2 over fsdp, and the sum over data where there is a data axis."""
    axes = ("data", "fsdp") if "data" in parallel.groups else ("fsdp",)
    size = parallel.size("fsdp")

    def place(parameter: nn.Parameter) -> Shard | None:
        # Few experts on each rank are divided by their columns: an uneven number of experts would be padded.
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        is_uneven = own.ndim == 3 and own.shape[0] % size
        return Shard(1) if is_uneven and own.shape[1] % size == 0 else None

    fully_shard(moe, mesh=parallel.mesh[axes], **{"shard_placement_fn": place, **options})
    # Losses need the routing as well as the output, and parameters are gathered before that method too.
    register_fsdp_forward_method(moe, "forward_and_routing")
    assert isinstance(moe, FSDPModule)
    # A sum, not an average; and as a plain sum, since gloo has no other.
    moe.set_gradient_divide_factor(1.0)
    moe.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def sync_gradients(moe: MoE) -> None:
    """Completes the gradients after the backward pass, by the rule at the top of this file.

    Until then a gradient that misses a sum is a DTensor that is partial over the axis. Here they are summed together,
    in one collective for each axis and dtype. A parameter without a gradient takes part with 0: another rank may have
    one.
    """
    parallel = parallel_of(moe)
    partial = []
    for module in moe.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                gradient = parameter.grad = _gradient(module, name, parameter)
                if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
                    partial.append((parameter, gradient))
    for axis, group in parallel.groups.items():
        own = [gradient.to_local() for _, gradient in partial if is_partial_over(gradient, axis)]
        if own:
            sum_in_place(own, group)
    for parameter, gradient in partial:
        complete = [Replicate() if placement.is_partial() else placement for placement in gradient.placements]
        parameter.grad = DTensor.from_local(
            gradient.to_local(), gradient.device_mesh, complete, shape=gradient.shape, stride=gradient.stride()
        )


def _gradient(module: nn.Module, name: str, parameter: nn.Parameter) -> Tensor:
    """The gradient as this rank stores it; zeros where there is none yet, to be summed like those of other ranks."""
    if parameter.grad is not None:
        return parameter.grad
    part = getattr(module, "part", None)
    if isinstance(part, PartOfRank) and isinstance(parameter, DTensor) and parameter.device_mesh == part.mesh:
        own = torch.zeros_like(parameter.to_local())
        placements = part.placements_of_gradient(name, parameter)
        return DTensor.from_local(
            own, parameter.device_mesh, placements, shape=parameter.shape, stride=parameter.stride()
        )
    return torch.zeros_like(parameter)
