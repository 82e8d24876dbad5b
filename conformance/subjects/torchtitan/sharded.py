"""conformance, subject torchtitan-layouts: the MoE of pytorch/torchtitan with its AllToAllTokenDispatcher, on gloo.

No trainer and no mesh of its own: each rank builds the layer, keeps its slice of the experts' weights, and the
dispatcher is told the mesh (`wire_meshes`). Experts compute in float32 by the seam of `subjects.torchtitan`: what is
judged is the dispatcher, not their cast to bfloat16. Gradients of what every rank has are summed here, where the
trainer would.
"""

from functools import lru_cache
from types import MethodType

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from conformance.core.subject import Unsupported
from conformance.subjects.ranks import Ranks, shared
from conformance.subjects.torch.arrays import to_numpy, to_torch
from conformance.subjects.torchtitan.arrays import PARAMETERS, to_native, turned
from conformance.subjects.torchtitan.layer import GRANULE, forward_in_float32, layer_config, why_not_layer
from conformance.subjects.torchtitan.router import no_autocast_warning
from conformance.subjects.torchtitan.subject import Torchtitan
from moe_ref import LayerParams, LayerSpec
from moe_ref.specs.layout import ShardLayout

PRELOAD = (
    "conformance.subjects.torchtitan.sharded",
    "torchtitan.distributed.utils",
    "torchtitan.models.common.feed_forward",
    "torchtitan.models.common.moe",
)
"""torchtitan takes seconds to import: once, and not on every rank."""
EXPERTS = "routed_experts.inner_experts."


class TorchtitanLayouts(Torchtitan):
    """torchtitan's layer over as many processes as the layout has ranks, on the axes expert and data."""

    name = "torchtitan-layouts"
    expert_dtype = "float32"

    @property
    def ranks(self) -> Ranks:
        """The pool, which starts with the first call."""
        return shared(*PRELOAD)

    def supports_layer(self, spec, layout=None):
        # Given ids reach the dispatcher alone.
        given = spec.router.selector == "given"
        router = spec.router.replace(selector="top_k") if given else spec.router
        why = Torchtitan.supports(self, router) or why_not_layer(spec, GRANULE[self.expert_dtype])
        if why is not None or layout is None:
            return why
        if spec.router.selector == "round_robin":
            return "torchtitan numbers the tokens of each rank from 0"
        if layout.strategy != "all_to_all":
            return f"torchtitan's AllToAllTokenDispatcher is all_to_all, not {layout.strategy}"
        for field in ("fsdp", "tensor", "num_token_chunks", "num_emb_chunks"):
            if getattr(layout, field) != 1:
                return f"the dispatcher is judged without {field}, which is {getattr(layout, field)}"
        if layout.placement is not None:
            return "torchtitan's experts are placed in their order"
        return None

    def dispatch(self, expert_ids_by_shard, layout, spec):
        E = spec.router.num_experts
        if any(((ids < 0) | (ids >= E)).any() for ids in expert_ids_by_shard):
            raise Unsupported("torchtitan's dispatcher has no unused slots and no null experts")
        return self.ranks.run(layout.num_ranks, plan_on_rank, expert_ids_by_shard, layout, spec)

    # They name their inputs (none further), which is how a subject says what it takes.
    def sharded_layer(self, x_by_shard, params, spec, layout):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.ranks.run(layout.num_ranks, layer_on_rank, x_by_shard, params, spec, layout)

    def sharded_gradients(self, x_by_shard, params, spec, layout, d_output_by_shard):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.ranks.run(layout.num_ranks, gradients_on_rank, x_by_shard, params, spec, layout, d_output_by_shard)


# On a rank.


def layer_on_rank(x_by_shard, params, spec, layout) -> np.ndarray:
    """The output of this rank's tokens."""
    x_TD = to_torch(x_by_shard[dist.get_rank()])
    with torch.no_grad(), no_autocast_warning():
        return to_numpy(parallel_layer(params, spec, layout)(x_TD[None])[0])


def gradients_on_rank(x_by_shard, params, spec, layout, d_output_by_shard) -> dict[str, np.ndarray]:
    """The gradients of this rank's tokens, and of all parameters, summed as each needs it."""
    moe = parallel_layer(params, spec, layout)
    x_TD = to_torch(x_by_shard[dist.get_rank()]).requires_grad_()
    with no_autocast_warning():
        output_TD = moe(x_TD[None])[0]
    trained = dict(moe.named_parameters())
    d_x_TD, *gradients = torch.autograd.grad(
        output_TD, [x_TD, *trained.values()], to_torch(d_output_by_shard[dist.get_rank()])
    )
    found = {"x_TD": to_numpy(d_x_TD)}
    for path, gradient in zip(trained, gradients, strict=True):
        field = PARAMETERS[path]
        native_shape = to_native(field, params).shape
        whole = whole_gradient(gradient, path.startswith(EXPERTS), layout)
        found[field] = turned(field, to_numpy(whole).reshape(native_shape))
    return found


def whole_gradient(gradient: torch.Tensor, is_of_experts: bool, layout: ShardLayout) -> torch.Tensor:
    """The sum over all ranks that have the parameter; those of experts put side by side."""
    whole = gradient.contiguous()
    if is_of_experts:
        first = layout.coordinates(dist.get_rank())[2] * len(gradient)
        whole = gradient.new_zeros(len(gradient) * layout.expert, *gradient.shape[1:])
        whole[first : first + len(gradient)] = gradient
    dist.all_reduce(whole)
    return whole


def parallel_layer(params: LayerParams, spec: LayerSpec, layout: ShardLayout):
    """This rank's layer, in eager mode."""
    moe = build_layer(spec, layout.data, layout.expert)
    e, per_rank = layout.coordinates(dist.get_rank())[2], spec.router.num_experts // layout.expert
    with torch.no_grad():
        for path, parameter in moe.named_parameters():
            values = to_torch(to_native(PARAMETERS[path], params))
            if path.startswith(EXPERTS):
                values = values[e * per_rank : (e + 1) * per_rank]
            parameter.copy_(values.reshape(parameter.shape))
        bias_E = params.expert_bias_E
        moe.expert_bias_E.copy_(torch.zeros(len(moe.expert_bias_E)) if bias_E is None else to_torch(bias_E))
    return moe


@lru_cache(maxsize=64)
def build_layer(spec: LayerSpec, data: int, expert: int):
    """The layer with untrained weights, its experts a slice of all, its dispatcher wired to the expert axis."""
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    set_spmd_backend("default")  # the shipped default looks for the trainer's mesh
    config = layer_config(spec)
    config.routed_experts.token_dispatcher = AllToAllTokenDispatcher.Config(
        num_experts=spec.router.num_experts, top_k=spec.router.top_k
    )
    moe = config.build().eval()
    experts = moe.routed_experts.inner_experts
    for name, weight in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(torch.empty(len(weight) // expert, *weight.shape[1:])))
    experts.forward = MethodType(forward_in_float32, experts)
    # Without expert parallelism it dispatches locally.
    moe.routed_experts.token_dispatcher.wire_meshes(ep_mesh=mesh_of(data, expert)["expert"] if expert > 1 else None)
    return moe


@lru_cache(maxsize=16)
def mesh_of(data: int, expert: int) -> DeviceMesh:
    """The mesh; process groups are never freed, so that each is made once."""
    return init_device_mesh("cpu", (data, expert), mesh_dim_names=("data", "expert"))


def plan_on_rank(expert_ids_by_shard, layout: ShardLayout, spec: LayerSpec) -> dict[str, np.ndarray]:
    """What the dispatcher says that it exchanged, and the rows that it returned; a token is (source, its number)."""
    router = spec.router.replace(selector="top_k")
    dispatcher = build_layer(spec.replace(router=router), layout.data, layout.expert).routed_experts.token_dispatcher
    E, S, e = router.num_experts, layout.expert, layout.coordinates(dist.get_rank())[2]
    ids_TK = to_torch(np.asarray(expert_ids_by_shard[dist.get_rank()], np.int64))
    x_T2 = torch.stack([torch.full((len(ids_TK),), float(e)), torch.arange(len(ids_TK)).float()], dim=1)
    counts_E = torch.bincount(ids_TK.flatten(), minlength=E)
    rows_R2, sizes_e, metadata = dispatcher.dispatch(x_T2, torch.ones(ids_TK.shape), ids_TK, counts_E)
    alone = {"input_splits": [len(rows_R2)], "output_splits": [len(rows_R2)]}
    splits = vars(metadata) if S > 1 else alone
    # A token has an expert in one slot at most, so its expert tells the slot.
    first_shard = dist.get_rank() - e
    experts_R = np.repeat(e * (E // S) + np.arange(E // S), to_numpy(sizes_e))
    order = []
    for (source, token), expert in zip(to_numpy(rows_R2).astype(int).tolist(), experts_R.tolist(), strict=True):
        slots_K = np.asarray(expert_ids_by_shard[first_shard + source][token]).tolist()
        order.append((source, token * router.top_k + slots_K.index(expert)))
    return {
        "send_sizes_S": np.array(splits["input_splits"], np.int64),
        "recv_sizes_S": np.array(splits["output_splits"], np.int64),
        "group_sizes_e": to_numpy(sizes_e),
        "order_R2": np.array(order, np.int64).reshape(-1, 2),
    }
