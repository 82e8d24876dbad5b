"""conformance, subject torchtitan-layouts: the MoE of pytorch/torchtitan by its own `parallelize` and FSDP2, on gloo.

Layouts of data, fsdp, expert and tensor ranks, as `parallel` makes them. Experts compute in float32: what is judged is
who gets which rows and gradients, not their cast to bfloat16. Each tensor rank has a part of the sequence: it is padded
with zeros to a multiple, cut before the layer and put together after it, as a trainer's other layers would.
"""

from functools import lru_cache
from importlib.metadata import version

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from conformance.core.subject import Unsupported
from conformance.subjects.ranks import Ranks, shared
from conformance.subjects.torch.arrays import to_numpy, to_torch
from conformance.subjects.torch.named_tokens import named_tokens, plan_of_rows
from conformance.subjects.torchtitan.arrays import canonical
from conformance.subjects.torchtitan.balance import TorchtitanBalance, optimizer_with_hook
from conformance.subjects.torchtitan.layer import GRANULE, check_bias, own_router, why_not_layer
from conformance.subjects.torchtitan.parallel import DTENSOR, SPMD, Backend, ParallelLayer, local, parallel_layer, whole
from conformance.subjects.torchtitan.router import TorchtitanRouter, no_autocast_warning
from moe_ref import BiasUpdateSpec, ExpertSpec, LayerParams, LayerSpec, RouterSpec
from moe_ref.specs.layout import ShardLayout

PRELOAD = (
    "conformance.subjects.torchtitan.sharded",
    "torchtitan.components.optimizer.optimizer",
    "torchtitan.distributed.fsdp",
    "torchtitan.models.common.feed_forward",
    "torchtitan.models.gpt_oss.sharding",
)
"""torchtitan takes seconds to import: once, and not on every rank."""
MOST_RANKS = 8


class TorchtitanLayouts(TorchtitanBalance):
    """torchtitan's layer over as many processes as the layout has ranks, and the hook of its optimizer over them."""

    name = "torchtitan-layouts"
    backend: Backend = DTENSOR

    def __init__(self):
        self.version = version("torchtitan")

    @property
    def ranks(self) -> Ranks:
        """The pool, which starts with the first call."""
        return shared(*PRELOAD)

    def supports_layer(self, spec: LayerSpec, layout: ShardLayout | None = None) -> str | None:
        # Given ids reach the dispatcher alone.
        router, granule = own_router(spec), GRANULE["float32"]
        router = router.replace(selector="top_k") if router.selector == "given" else router
        why = TorchtitanRouter().supports(router) or why_not_layer(spec, granule)
        if why is not None or layout is None:
            return why
        if spec.router.selector == "round_robin":
            return "torchtitan numbers the tokens of each rank from 0"
        if layout.strategy != "all_to_all" and (layout.expert > 1 or layout.facts.shares_tokens):
            return f"torchtitan's AllToAllTokenDispatcher is all_to_all, not {layout.strategy}"
        if layout.buffer_factor is not None:
            return "torchtitan's AllToAllTokenDispatcher has no buffer of fixed size"
        for field in ("num_token_chunks", "num_emb_chunks"):
            if getattr(layout, field) != 1:
                return f"torchtitan's layer has no {field}, which is {getattr(layout, field)}"
        if layout.placement is not None:
            return "torchtitan's experts are placed in their order"
        if layout.tensor > 1 and spec.shared is not None and spec.shared.gate != "none":
            return "torchtitan shards a shared gate in its Qwen3.5 alone, which imports fla"
        if layout.expert == 1 and spec.experts.hidden_dim % (layout.tensor * granule):
            return f"a tensor rank's part of hidden_dim is no multiple of {granule}, which its grouped matmul takes"
        if layout.expert > 1 and router.num_experts % (layout.expert * layout.tensor):
            return "torchtitan has the experts on all tensor ranks too, which do not divide them"
        beside, cut = (layout.expert * layout.tensor, 1) if layout.expert > 1 else (layout.data, layout.tensor)
        widths = spec.experts.dim, spec.experts.hidden_dim // cut
        if layout.fsdp * beside > router.num_experts and any(width % layout.fsdp for width in widths):
            return "torchtitan cuts experts of which there are fewer than ranks along a width, and FSDP2 evenly alone"
        return None

    def dispatch(self, expert_ids_by_shard, layout, spec):
        E = spec.router.num_experts
        if any(((ids < 0) | (ids >= E)).any() for ids in expert_ids_by_shard):
            raise Unsupported("torchtitan's dispatcher has no unused slots and no null experts")
        if layout.strategy != "all_to_all":  # alone a rank computes the same, and has another plan
            raise Unsupported(f"torchtitan's plan is that of all_to_all, not of {layout.strategy}")
        if layout.expert > 1 and layout.tensor > 1:
            raise Unsupported("torchtitan's tensor ranks dispatch tokens of their own, to experts on all of them")
        return self.ranks.run(layout.num_ranks, plan_on_rank, expert_ids_by_shard, layout, spec)[:: layout.tensor]

    def bias_update(self, counts_SE: np.ndarray, update: BiasUpdateSpec, expert_bias_E: np.ndarray) -> np.ndarray:
        """One step of the optimizer on as many ranks as there are counts, or MOST_RANKS with some of them each.

        They are expert ranks, and tensor ranks too, where these divide the experts.
        """
        S, E = min(len(counts_SE), MOST_RANKS), counts_SE.shape[1]
        layout = ShardLayout(fsdp=S) if E % S else ShardLayout(expert=S)
        if S > 2 and S % 2 == E % S == 0:
            layout = ShardLayout(expert=S // 2, tensor=2)
        return self.ranks.run(S, bias_on_rank, counts_SE, update, expert_bias_E, layout)[0]

    # They name their inputs (none further), which is how a subject says what it takes.
    def sharded_layer(self, x_by_shard, params, spec, layout):  # pyright: ignore[reportIncompatibleMethodOverride]
        check_bias(spec, params)
        return self.ranks.run(layout.num_ranks, layer_on_rank, x_by_shard, params, spec, layout, self.backend)

    def sharded_gradients(self, x_by_shard, params, spec, layout, d_output_by_shard):  # pyright: ignore[reportIncompatibleMethodOverride]
        check_bias(spec, params)
        return self.ranks.run(layout.num_ranks, gradients_on_rank, x_by_shard, params, spec, layout, d_output_by_shard)


class TorchtitanSpmdLayouts(TorchtitanLayouts):
    """The same in its default backend, spmd_types: forward passes over data and tensor ranks."""

    name = "torchtitan-spmd-layouts"
    backend: Backend = SPMD

    def supports_layer(self, spec: LayerSpec, layout: ShardLayout | None = None) -> str | None:
        why = super().supports_layer(spec, layout)
        if why is not None or layout is None or layout.expert == layout.fsdp == 1:
            return why
        return "torchtitan's spmd_types needs an all_to_all that gloo has not got, and a later torch for FSDP2"

    def dispatch(self, expert_ids_by_shard, layout, spec):
        raise Unsupported("torchtitan's spmd_types dispatches by an all_to_all that gloo has not got")

    def sharded_gradients(self, x_by_shard, params, spec, layout, d_output_by_shard):  # pyright: ignore[reportIncompatibleMethodOverride]
        raise Unsupported("torchtitan's spmd_types leaves sums of gradients to an FSDP2 of a later torch than 2.13")

    def bias_update(self, counts_SE: np.ndarray, update: BiasUpdateSpec, expert_bias_E: np.ndarray) -> np.ndarray:
        raise Unsupported("torchtitan's hook is run with partial_dtensor")


# On a rank.


def layer_on_rank(
    x_by_shard, params: LayerParams, spec: LayerSpec, layout: ShardLayout, backend: Backend
) -> np.ndarray:
    """The output of this rank's tokens."""
    layer = loaded(params, spec, layout, backend)
    with torch.no_grad(), no_autocast_warning(), layer.meshes():
        output_TD = local(layer.model(own_tokens(x_by_shard, layout)[None]))[0]
        return to_numpy(whole_sequence(output_TD, layer)[: num_tokens(x_by_shard, layout)])


def gradients_on_rank(
    x_by_shard, params: LayerParams, spec: LayerSpec, layout: ShardLayout, d_output_by_shard
) -> dict[str, np.ndarray]:
    """The gradients of this rank's tokens, and of all parameters, as its FSDP sums them."""
    layer = loaded(params, spec, layout, DTENSOR)
    x_TD = own_tokens(x_by_shard, layout).requires_grad_()
    with no_autocast_warning(), layer.meshes():
        output_TD = local(layer.model(x_TD[None]))[0]
        output_TD.backward(own_tokens(d_output_by_shard, layout))
    assert x_TD.grad is not None
    found = {"x_TD": to_numpy(whole_sequence(x_TD.grad, layer)[: num_tokens(x_by_shard, layout)])}
    for path, parameter in layer.moe.named_parameters():
        found |= canonical(path, to_numpy(whole(parameter.grad)), params)
        parameter.grad = None
    return found


def bias_on_rank(
    counts_SE: np.ndarray, update: BiasUpdateSpec, expert_bias_E: np.ndarray, layout: ShardLayout
) -> np.ndarray:
    """The bias after a step for which this rank counted its rows, one after the other."""
    router = RouterSpec(num_experts=len(expert_bias_E), top_k=1)
    spec = LayerSpec(router=router, experts=ExpertSpec(dim=8, hidden_dim=8))
    layer = parallel_layer(spec, layout.data, layout.fsdp, layout.expert, layout.tensor, DTENSOR)
    layer.moe.load_balance_coeff = update.rate
    local(layer.moe.expert_bias_E).copy_(to_torch(expert_bias_E))
    for counts_E in to_torch(counts_SE[dist.get_rank() :: dist.get_world_size()]):
        local(layer.moe.tokens_per_expert_E).add_(counts_E)
    optimizer_with_hook(layer.model, layer.dims).step()
    return to_numpy(local(layer.moe.expert_bias_E).clone())


def loaded(params: LayerParams, spec: LayerSpec, layout: ShardLayout, backend: Backend) -> ParallelLayer:
    """This rank's layer with its part of the parameters."""
    layer = parallel_layer(spec, layout.data, layout.fsdp, layout.expert, layout.tensor, backend)
    layer.load_params(params)
    forget_other_routers(spec.router)
    return layer


@lru_cache(maxsize=1)
def forget_other_routers(router: RouterSpec) -> None:
    """A DTensor's topk has the shape of the first k that it was called with; no run of torchtitan has two.

    See docs/findings/torch-dtensor-topk-shape.md.
    """
    _clear_sharding_prop_cache()


def num_tokens(values_by_shard, layout: ShardLayout) -> int:
    """Tokens of this rank's shard, without padding."""
    return len(values_by_shard[layout.shard_of(dist.get_rank())])


def own_tokens(values_by_shard, layout: ShardLayout) -> torch.Tensor:
    """This rank's part of the sequence of its shard, of equal parts; several tensor ranks have one token at least."""
    rank = dist.get_rank()
    values_TD = to_torch(values_by_shard[layout.shard_of(rank)])
    if layout.tensor == 1:
        return values_TD.clone()
    own_T = max(1, -(-len(values_TD) // layout.tensor))
    padded_TD = values_TD.new_zeros(own_T * layout.tensor, values_TD.shape[1])
    padded_TD[: len(values_TD)] = values_TD
    return padded_TD.chunk(layout.tensor)[layout.coordinates(rank)[3]].clone()


def whole_sequence(values_TD: torch.Tensor, layer: ParallelLayer) -> torch.Tensor:
    """The parts of all tensor ranks, one after the other."""
    if not layer.dims.tp_enabled:
        return values_TD
    return DTensor.from_local(values_TD, layer.dims.get_mesh("tp"), [Shard(0)], run_check=False).full_tensor()


def plan_on_rank(expert_ids_by_shard, layout: ShardLayout, spec: LayerSpec) -> dict[str, np.ndarray]:
    """What the dispatcher says that it exchanged, and the rows that it returned; a token is (source, its number)."""
    router = spec.router.replace(selector="top_k")
    axes = layout.data, layout.fsdp, layout.expert, layout.tensor
    dispatcher = parallel_layer(spec.replace(router=router), *axes, DTENSOR).moe.routed_experts.token_dispatcher
    S, e = layout.expert, layout.coordinates(dist.get_rank())[2]
    shard = layout.shard_of(dist.get_rank())
    ids_TK = to_torch(np.asarray(expert_ids_by_shard[shard], np.int64))
    counts_E = torch.bincount(ids_TK.flatten(), minlength=router.num_experts)
    x_T2 = named_tokens(len(ids_TK), e)
    rows_R2, sizes_e, metadata = dispatcher.dispatch(x_T2, torch.ones(ids_TK.shape), ids_TK, counts_E)
    alone = [len(rows_R2)]
    sends_S, recvs_S = (metadata.input_splits, metadata.output_splits) if S > 1 else (alone, alone)
    return plan_of_rows(rows_R2, sizes_e, sends_S, recvs_S, e=e, ids_by_source=expert_ids_by_shard[shard - e :])
