"""conformance, subjects megatron-alltoall and megatron-allgather: MoELayer over real ranks, joined by gloo.

Each rank builds its layer with the process groups of a layout, and has its slice of the experts. Gradients of what
every rank has are summed here, where a trainer would. The first half runs here and needs the pool of ranks; the second
half runs on a rank.
"""

from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist

from conformance.core.subject import Subject, Unsupported
from conformance.subjects.megatron.layer import called
from conformance.subjects.megatron.module import (
    ProcessGroupCollection,
    config_of,
    entries_of,
    hold_share,
    load_params,
    made_layer,
    map_of,
    start_model_parallel,
    to_canonical,
)
from conformance.subjects.megatron.settings import BALANCING, layer_entries, router_entries
from conformance.subjects.megatron.subject import Megatron
from conformance.subjects.ranks import Ranks, shared
from conformance.subjects.torch.arrays import to_numpy, to_torch
from conformance.subjects.torch.named_tokens import named_tokens, plan_of_rows
from moe_ref import LayerParams, LayerSpec, RouterSpec
from moe_ref.specs.layout import ShardLayout

PRELOAD = ("conformance.subjects.megatron.sharded",)
"""megatron-core takes seconds to import: once, and not on every rank."""


class MegatronAlltoall(Subject):
    """The alltoall dispatcher over as many processes as the layout has ranks, on the axes data and expert."""

    name = "megatron-alltoall"
    version = Megatron.version
    dispatcher: ClassVar[str] = "alltoall"
    strategy: ClassVar[str] = "all_to_all"

    @property
    def ranks(self) -> Ranks:
        """The pool, which starts with the first call."""
        return shared(*PRELOAD)

    def supports_layer(self, spec: LayerSpec, layout: ShardLayout | None = None) -> str | None:
        layer_entries(spec)  # a ValueError is the sentence
        if layout is None:
            return None
        if spec.router.selector == "sinkhorn":
            return "sinkhorn of Megatron evens the tokens of each rank"
        if layout.strategy != self.strategy:
            return f"Megatron's {self.dispatcher} dispatcher is {self.strategy}, not {layout.strategy}"
        for field in ("fsdp", "tensor", "num_token_chunks", "num_emb_chunks"):
            if getattr(layout, field) != 1:
                return f"the dispatcher is judged without {field}, which is {getattr(layout, field)}"
        if layout.placement is not None:
            return "Megatron's experts are placed in their order"
        return None if layout.buffer_factor is None else "Megatron's buffers are as large as what they receive"

    def dispatch(
        self, expert_ids_by_shard: list[np.ndarray], layout: ShardLayout, spec: LayerSpec
    ) -> list[dict[str, Any]]:
        """What the dispatcher says that it exchanged, and the rows that it made of tokens that name themselves."""
        if self.dispatcher != "alltoall":
            raise Unsupported("Megatron's allgather dispatcher has no plan that could be seen")
        E = spec.router.num_experts
        if any(((ids < 0) | (ids >= E)).any() for ids in expert_ids_by_shard):
            raise Unsupported("Megatron's dispatcher counts on an expert in each slot")
        return self.ranks.run(layout.num_ranks, plan_on_rank, expert_ids_by_shard, layout, spec)

    # They name their inputs, which is how a subject says what it takes.
    def sharded_layer(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x_by_shard, params, spec, layout, *, given_ids_by_shard=None
    ) -> list[np.ndarray]:
        self._hold(x_by_shard, params, spec, given_ids_by_shard)
        call = layer_on_rank, x_by_shard, params, spec, layout, self.dispatcher, given_ids_by_shard
        return self.ranks.run(layout.num_ranks, *call)

    def sharded_gradients(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x_by_shard, params, spec, layout, d_output_by_shard, *, given_ids_by_shard=None
    ) -> list[dict[str, np.ndarray]]:
        self._hold(x_by_shard, params, spec, given_ids_by_shard)
        if BALANCING in router_entries(spec.router, expert_bias=params.expert_bias_E is not None):
            for x_TD in x_by_shard:
                hold_share(len(x_TD), spec.router.top_k, spec.router.num_experts)
        call = gradients_on_rank, x_by_shard, params, spec, layout, self.dispatcher, given_ids_by_shard
        return self.ranks.run(layout.num_ranks, *call, d_output_by_shard)

    def _hold(self, x_by_shard: list[np.ndarray], params: LayerParams, spec: LayerSpec, given: Any) -> None:
        """What the ranks would refuse is refused here, where that is no error of a rank."""
        entries_of(spec, expert_bias=params.expert_bias_E is not None)
        if given is not None and any((np.asarray(ids_TK) < 0).any() for ids_TK in given):
            raise Unsupported("Megatron's replay has an expert in each slot")
        if self.equal_shards and len({len(x_TD) for x_TD in x_by_shard}) > 1:
            raise Unsupported("Megatron's allgather dispatcher gathers as many tokens of each rank")


class MegatronAllgather(MegatronAlltoall):
    """The allgather dispatcher: tokens are gathered over the rank group, and outputs reduce-scattered."""

    name = "megatron-allgather"
    equal_shards = True
    dispatcher = "allgather"
    strategy = "ring_of_experts"


# On a rank.


def layer_on_rank(x_by_shard, params, spec, layout, dispatcher: str, given_ids_by_shard) -> np.ndarray:
    """The output of this rank's tokens."""
    layer = parallel_layer(params, spec, layout, dispatcher)
    with torch.no_grad():
        return to_numpy(called(layer, to_torch(own(x_by_shard)), own(given_ids_by_shard)))


def gradients_on_rank(
    x_by_shard, params, spec, layout, dispatcher: str, given_ids_by_shard, d_output_by_shard
) -> dict[str, np.ndarray]:
    """The gradients of this rank's tokens, and of all parameters, summed as each needs it."""
    layer = parallel_layer(params, spec, layout, dispatcher)
    x_TD = to_torch(own(x_by_shard)).requires_grad_()
    trained = dict(layer.named_parameters())
    d_x_TD, *gradients = torch.autograd.grad(
        called(layer, x_TD, own(given_ids_by_shard)),
        [x_TD, *trained.values()],
        to_torch(own(d_output_by_shard)),
        allow_unused=True,
        materialize_grads=True,
    )
    by_path = {path: to_numpy(gradient) for path, gradient in zip(trained, gradients, strict=True)}
    found = {}
    for name, value in to_canonical(by_path, params, first_expert(spec, layout)).items():
        whole = torch.from_numpy(np.ascontiguousarray(value))
        dist.all_reduce(whole)
        found[name] = whole.numpy()
    return {"x_TD": to_numpy(d_x_TD)} | found


def own(by_shard: list[np.ndarray] | None) -> Any:
    """That of this rank."""
    return None if by_shard is None else by_shard[dist.get_rank()]


def first_expert(spec: LayerSpec, layout: ShardLayout) -> int:
    """The first expert of this rank."""
    return layout.coordinates(dist.get_rank())[2] * (spec.router.num_experts // layout.expert)


def parallel_layer(params: LayerParams, spec: LayerSpec, layout: ShardLayout, dispatcher: str) -> Any:
    """This rank's layer, with its parameters."""
    more = {"moe_token_dispatcher_type": dispatcher, "expert_model_parallel_size": layout.expert}
    entries = entries_of(spec, expert_bias=params.expert_bias_E is not None, more=tuple(more.items()))
    layer = _built(entries, layout.data, layout.expert)
    load_params(layer, params, first_expert(spec, layout))
    return layer


@lru_cache(maxsize=256)
def _built(entries: tuple, data: int, expert: int) -> Any:
    return made_layer(config_of(dict(entries)), groups_of(data, expert))


@lru_cache(maxsize=16)
def groups_of(data: int, expert: int) -> Any:
    """The process groups of a layout: rank d * expert + e; they are never freed, so that each is made once."""
    start_model_parallel()
    ranks = np.arange(data * expert).reshape(data, expert)
    alone = _group_of_mine([[int(rank)] for rank in ranks.flat])
    across = _group_of_mine(ranks.tolist())
    beside = _group_of_mine(ranks.T.tolist())
    found = ProcessGroupCollection()
    found.tp = found.cp = found.tp_cp = found.expt_tp = alone
    found.ep = found.tp_ep = across
    found.expt_dp, found.tp_dp_cp = beside, dist.group.WORLD
    return found


def _group_of_mine(rank_lists: list[list[int]]) -> Any:
    """Of groups that all ranks make together, the one with this rank."""
    mine = None
    for ranks in rank_lists:
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            mine = group
    return mine


def plan_on_rank(expert_ids_by_shard, layout: ShardLayout, spec: LayerSpec) -> dict[str, np.ndarray]:
    """What the dispatcher exchanged, and the rows that it returned; a token is (source, its number)."""
    E, K, S = spec.router.num_experts, spec.router.top_k, layout.expert
    e, ids_TK = layout.coordinates(dist.get_rank())[2], np.asarray(own(expert_ids_by_shard), np.int64)
    dispatcher = dispatcher_of(E, K, layout.data, S)
    map_TE = map_of(ids_TK, E)
    with torch.no_grad():
        rows, probs = dispatcher.dispatch_preprocess(named_tokens(len(ids_TK), e)[:, None], map_TE, map_TE.float())
        rows, probs = dispatcher.token_dispatch(rows, probs)
        rows_R2, sizes_e, _ = dispatcher.dispatch_postprocess(rows, probs)
    alone = [len(rows_R2)]
    sends_S, recvs_S = (dispatcher.input_splits, dispatcher.output_splits) if S > 1 else (alone, alone)
    sources = expert_ids_by_shard[dist.get_rank() - e :]
    return plan_of_rows(rows_R2, sizes_e, sends_S, recvs_S, e=e, ids_by_source=sources)


@lru_cache(maxsize=64)
def dispatcher_of(num_experts: int, top_k: int, data: int, expert: int) -> Any:
    """The alltoall dispatcher of a layer of a layout."""
    plain: dict[str, Any] = {"score_func": "sigmoid"} | ({"route_norm": True, "norm_eps": 1e-20} if top_k > 1 else {})
    router = router_entries(RouterSpec(num_experts=num_experts, top_k=top_k, **plain))
    more = {"moe_token_dispatcher_type": "alltoall", "expert_model_parallel_size": expert}
    return _built(tuple((router | more).items()), data, expert).token_dispatcher
