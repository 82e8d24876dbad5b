"""moe_torch, parallel: one layer over the ranks of a DeviceMesh. `parallelize` takes a whole layer and leaves a part.

    mesh = init_device_mesh("cuda", (2, 8), mesh_dim_names=("fsdp", "expert"))
    parallelize(moe, mesh)                  # each rank keeps its own experts, and its piece of them
    moe(x).backward(d_output)               # each rank with its own tokens
    sync_gradients(moe)

Axes of the mesh, each of which may be absent: data and fsdp (other tokens, the same layer), expert (other experts),
tensor (other columns of the same experts, the same tokens). The same code runs on NCCL and on gloo.

The rule for gradients: the loss is the sum over all tokens of all ranks, and each token counts once. After backward and
`sync_gradients`, every rank has the complete gradient of every parameter that it holds, as a one-rank layer that sees
all tokens would. Who wants a mean over ranks divides the loss.

* Experts: a rank sees the rows of all tokens of its expert axis, so what is missing is the sum over data and fsdp.
* Router and shared experts: each rank knows its own tokens alone, so the sum over the expert axis is missing as well.
  Where ranks have the same tokens (the tensor axis; the expert axis with strategy "replicated") the partial gradients
  of what enters the experts are summed in the backward pass itself, and nothing is missing.
* With FSDP2 the sums over data and fsdp are its own reduce-scatter and all-reduce, set to sum instead of to average.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from moe_ref.specs.checks import integer, one_of, require
from moe_torch.dispatcher import LocalTokenDispatcher
from moe_torch.moe import MoE
from moe_torch.parallel.collectives import Parallel, Shared, sum_in_place
from moe_torch.parallel.dispatch import (
    AllToAllTokenDispatcher,
    ParallelTokenDispatcher,
    ReplicatedTokenDispatcher,
    checked_placement,
)
from moe_torch.parallel.nodes import NodeDedupTokenDispatcher
from moe_torch.parallel.params import keep_own_experts, parallel_of

AXES = ("data", "fsdp", "expert", "tensor")
STRATEGIES = ("all_to_all", "replicated", "node_dedup")


def parallelize(
    moe: MoE,
    mesh: DeviceMesh,
    *,
    strategy: str = "all_to_all",
    placement: Sequence[int] | None = None,
    ranks_per_node: int | None = None,
    num_token_chunks: int = 1,
    **fully_shard_options,
) -> MoE:
    """Leaves each rank its own part of a whole layer, which is the same on all ranks; changes it, and returns it.

    Args:
        moe: on any device, meta included.
        mesh: with axes of `AXES`, in any order; every rank of it makes this call. It may be a part of a larger mesh,
            but for node_dedup.
        strategy: all_to_all: a rank has its own tokens, and rows travel. node_dedup: the same, but a token crosses to a
            node once. replicated: the ranks of the expert axis have the same tokens, and nothing travels.
        placement: placement[i] is the expert at place i; rank e of the expert axis owns places e * E/S and on. None:
            expert i at place i.
        ranks_per_node: consecutive ranks of the expert axis on one node; None: all. For node_dedup.
        num_token_chunks: exchanges that a rank's tokens are divided over, so that one is on its way while the experts
            work on another. The result is the same.
        fully_shard_options: for `torch.distributed.fsdp.fully_shard`, where the mesh has an fsdp axis.

    Raises:
        ValueError: the layout does not fit the layer or the mesh; it names field, value and bound.
    """
    one_of("strategy", strategy, STRATEGIES)
    integer("num_token_chunks", num_token_chunks, 1)
    require(isinstance(moe.dispatcher, LocalTokenDispatcher), "the layer is parallel already")
    names = mesh.mesh_dim_names or ()
    for name in names or (None,):
        require(name in AXES, f"the mesh has an axis {name!r}; its axes are of {', '.join(AXES)}")
    groups = {name: mesh.get_group(name) for dim, name in enumerate(names) if mesh.size(dim) > 1}
    parallel = Parallel(
        mesh=mesh, strategy=strategy, placement=None if placement is None else tuple(placement), groups=groups
    )
    require(
        not fully_shard_options or "fsdp" in groups,
        f"{', '.join(fully_shard_options)} is given for fully_shard, but the mesh has no fsdp axis",
    )
    E, F = moe.spec.router.num_experts, moe.spec.experts.hidden_dim
    checked_placement(E, parallel.size("expert"), placement)
    require(F % parallel.size("tensor") == 0, f"tensor is {parallel.size('tensor')}, which does not divide "
            f"hidden_dim ({F})")  # fmt: skip

    moe.dispatcher = _dispatcher(moe, parallel, ranks_per_node, num_token_chunks)
    moe.dispatcher.parallel = parallel
    keep_own_experts(moe.experts, parallel)
    if "fsdp" in groups:
        _shard_fully(moe, parallel, fully_shard_options)
    return moe


def _dispatcher(
    moe: MoE, parallel: Parallel, ranks_per_node: int | None, num_token_chunks: int
) -> ParallelTokenDispatcher:
    """The dispatcher of a strategy. One rank on the expert axis has nothing to exchange."""
    S, strategy = parallel.size("expert"), parallel.strategy
    if ranks_per_node is not None:
        integer("ranks_per_node", ranks_per_node, 1, S, why="the expert axis")
        require(S % ranks_per_node == 0, f"ranks_per_node is {ranks_per_node}, which does not divide the expert "
                f"axis ({S})")  # fmt: skip
    group = parallel.groups.get("expert")
    axes = ("expert", "tensor") if strategy == "replicated" else ("tensor",)
    shared = Shared(tuple(parallel.groups[axis] for axis in axes if axis in parallel.groups))
    choices = moe.spec.router.num_experts, moe.spec.router.num_choices
    options: dict = {"shared": shared, "placement": parallel.placement, "num_token_chunks": num_token_chunks}
    if group is None or strategy == "replicated":
        return ReplicatedTokenDispatcher(*choices, group, **options)
    if strategy == "all_to_all":
        return AllToAllTokenDispatcher(*choices, group, **options)
    nodes = mesh_of_nodes(parallel.mesh, ranks_per_node or S)
    across, inside = nodes.get_group("node"), nodes.get_group("position")
    return NodeDedupTokenDispatcher(*choices, group, across=across, inside=inside, **options)


def mesh_of_nodes(mesh: DeviceMesh, ranks_per_node: int) -> DeviceMesh:
    """The mesh with its expert axis divided into node and position; the same object for the same arguments."""
    size = dist.get_world_size()
    # New groups are made by all processes together.
    require(mesh.size() == size, f"the mesh has {mesh.size()} of {size} ranks; for strategy 'node_dedup' it has all")
    # An equal mesh of another life of torch.distributed has other groups.
    return _mesh_of_nodes(mesh, ranks_per_node, dist.group.WORLD)


@lru_cache(maxsize=32)
def _mesh_of_nodes(mesh: DeviceMesh, ranks_per_node: int, _world) -> DeviceMesh:
    names = mesh.mesh_dim_names or ()
    axis = names.index("expert")
    ranks = mesh.mesh.unflatten(axis, (-1, ranks_per_node))
    divided = (*names[:axis], "node", "position", *names[axis + 1 :])
    return DeviceMesh(mesh.device_type, ranks, mesh_dim_names=divided)


def _shard_fully(moe: MoE, parallel: Parallel, options: dict) -> None:
    """FSDP2 over fsdp, and the sum over data where there is a data axis."""
    axes = ("data", "fsdp") if "data" in parallel.groups else ("fsdp",)
    size = parallel.size("fsdp")

    def place(parameter: nn.Parameter) -> Shard | None:
        # Few experts on each rank are divided by their columns: an uneven number of experts would be padded.
        is_uneven = parameter.ndim == 3 and parameter.shape[0] % size
        return Shard(1) if is_uneven and parameter.shape[1] % size == 0 else None

    fully_shard(moe, mesh=parallel.mesh[axes], **{"shard_placement_fn": place, **options})
    # Losses need the routing as well as the output, and parameters are gathered before that method too.
    register_fsdp_forward_method(moe, "forward_and_routing")
    assert isinstance(moe, FSDPModule)
    # A sum, not an average; and as a plain sum, since gloo has no other.
    moe.set_gradient_divide_factor(1.0)
    moe.set_force_sum_reduction_for_comms(True)


def sync_gradients(moe: MoE) -> None:
    """Completes the gradients after the backward pass, by the rule at the top of this file.

    A parameter without a gradient takes part with 0: another rank may have one.
    """
    parallel = parallel_of(moe)
    axes_of_experts = [] if "fsdp" in parallel.groups else ["data"]
    axes_of_others = [*axes_of_experts, *(["expert"] if parallel.strategy != "replicated" else [])]
    own = {id(parameter) for parameter in moe.experts.parameters()}
    for is_expert, axes in ((True, axes_of_experts), (False, axes_of_others)):
        gradients = [
            _gradient(parameter)
            for parameter in moe.parameters()
            if parameter.requires_grad and (id(parameter) in own) == is_expert
        ]
        for axis in axes:
            if axis in parallel.groups and gradients:
                sum_in_place(gradients, parallel.groups[axis])


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient as this rank stores it; zeros where there is none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
