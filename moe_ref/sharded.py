"""moe_ref, the sharded layer: the same layer over ranks, every rank named; its result is that of each shard alone.

    on the rank of a token     gate -> route -> weigh_inputs, of the latent where there is one
    plan, exchange             each row to the rank of its expert            (`dispatch.py`)
    on the rank of an expert   experts, on its slice of F; partial outputs are summed over the tensor ranks
    and back                   rows, or partial sums of them, to the rank of their token; combine (+ shared experts)
                               a latent is normed and projected up once, from the whole sum

Where a layout sums in another order than `moe_layer`, the result differs by rounding; otherwise it is the same number.
A dropped slot adds exactly 0, and no weight is renormalised.

Legend: T tokens, D model dim, F expert hidden dim, E experts, e experts on this rank, K top_k, R rows on this rank,
P partial sums, S shared experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from numpy.typing import DTypeLike

from moe_ref.constants import fill_constants
from moe_ref.dispatch import plan_chunks
from moe_ref.experts import (
    FeedForwardTrace,
    combine,
    hide,
    identity_slots,
    join,
    project,
    run_shared,
    share_weights,
    sum_shared,
    weigh_inputs,
)
from moe_ref.holdings import gather
from moe_ref.latent import LatentTrace, compress, expand
from moe_ref.permute import permute
from moe_ref.rounding import dtype_of_router
from moe_ref.routing import RoutingTrace, gate, route
from moe_ref.specs.checks import array, mask_array, require
from moe_ref.specs.inputs import NO_INPUTS, RouterInputs
from moe_ref.specs.layer import ExpertSpec, LayerSpec
from moe_ref.specs.layout import ShardLayout
from moe_ref.specs.params import LayerParams
from moe_ref.strategies import STRATEGIES
from moe_ref.strategies.base import RankPlan


@dataclass(frozen=True, kw_only=True)
class ShardStart:
    """What a token shard knows before anything is sent."""

    x_TD: np.ndarray
    """The tokens; padding rows are 0, whatever they held."""
    token_mask_T: np.ndarray
    routing: RoutingTrace
    expert_input_TD: np.ndarray
    """The tokens, or their latent."""
    slot_inputs_TKD: np.ndarray

    @property
    def weights_TK(self) -> np.ndarray:
        """The routing weights in the dtype of the tokens; a router may be of float64 in a layer of float32."""
        return self.routing.weights_TK.astype(self.x_TD.dtype)


@dataclass(frozen=True, kw_only=True)
class ShardTrace(ShardStart):
    """Every intermediate of one token shard."""

    slot_outputs_TKD: np.ndarray
    """Before the weights, unless they are on the input; 0 in dropped and unused slots."""
    partial_PTD: np.ndarray
    """The partial sums of the routed output, or of its latent, in the order in which they are added. See
    `Strategy.num_partials`."""
    latent: LatentTrace
    routed_TD: np.ndarray
    shared_factors_TS: np.ndarray
    shared_experts: tuple[FeedForwardTrace, ...]
    shared_TD: np.ndarray
    output_TD: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ChunkTrace:
    """What one rank works on in one token chunk."""

    plan: RankPlan
    """Its slots are numbered from the first token of the chunk."""
    shard_slots_R2: np.ndarray
    """(token shard, slot) of each row, numbered from the first token of the shard."""
    experts: FeedForwardTrace
    """Its rows, sorted by expert, on its slice of F: `output_RD` is a partial sum."""
    output_RD: np.ndarray
    """The sum over the tensor ranks: what the experts return."""


@dataclass(frozen=True, kw_only=True)
class ShardedTrace:
    """What every token shard and every rank of the mesh holds."""

    layout: ShardLayout
    shards: tuple[ShardTrace, ...]
    ranks: tuple[tuple[ChunkTrace, ...], ...]
    """For each rank of the mesh, its chunks."""
    tokens_per_expert_E: np.ndarray
    """Slots that chose each expert, over all shards, dropped ones included: what a step of the bias counts, once."""

    @property
    def outputs_by_shard(self) -> list[np.ndarray]:
        """The (T, D) output of each token shard."""
        return [shard.output_TD for shard in self.shards]

    @property
    def outputs_by_rank(self) -> list[np.ndarray]:
        """What each rank of the mesh returns: the output of its shard."""
        return [self.shards[self.layout.shard_of(rank)].output_TD for rank in range(self.layout.num_ranks)]

    @property
    def overflow(self) -> int:
        """Slots that were dropped, in all shards."""
        t_0 = range(0, self.layout.num_ranks, self.layout.tensor)
        return sum(chunk.plan.overflow for rank in t_0 for chunk in self.ranks[rank])


def home_of(shard: int, layout: ShardLayout) -> int:
    """The partial sum that a token's identity slots are part of: that of its own rank. The first, if replicated."""
    return STRATEGIES[layout.strategy].partial_of(shard % layout.shards_per_group, layout)


def sharded_layer(
    x_by_shard: Sequence[np.ndarray],
    params: LayerParams,
    spec: LayerSpec,
    layout: ShardLayout,
    *,
    token_mask_by_shard=None,
    inputs: RouterInputs = NO_INPUTS,
    dtype: DTypeLike = np.float64,
) -> ShardedTrace:
    """One layer over the ranks of a layout; each stage for all ranks, then the next. [LYT-2]

    Args:
        x_by_shard: for each token shard its (T, D) tokens.
        params: the whole parameters; each rank takes its part.
        spec, layout: what is computed, and where.
        token_mask_by_shard: for each token shard its (T,) mask, as in `moe_layer`.
        inputs: of the tokens of all shards, one shard after the other. The seed is that of the first shard's draw for
            selector "random"; that of shard i is (seed, i). With "round_robin" the shards choose what the whole batch
            would.
        dtype: as in `moe_layer`.

    Raises:
        ValueError: the layout does not fit the layer, or an input fits neither; it names field, value and bound.
    """
    params.check(spec)
    layout.check(spec)
    params = params.astype(dtype)
    xs = by_shard("x_by_shard", x_by_shard, layout)
    masks = by_shard("token_mask_by_shard", token_mask_by_shard, layout)
    xs = [array(f"x_by_shard[{shard}]", x_TD, (None, spec.experts.dim)) for shard, x_TD in enumerate(xs)]
    tokens_per_shard = tuple(map(len, xs))
    inputs.check(spec.router, sum(tokens_per_shard))
    inputs_by_shard = inputs.shards(spec.router, tokens_per_shard)

    starts = []
    for shard in range(layout.num_token_shards):
        own = inputs_by_shard[shard]
        if spec.router.selector == "random" and shard > 0:
            own = replace(own, seed=(own.seed or 0, shard))
        starts.append(start(xs[shard].astype(dtype), masks[shard], params, spec, own))

    plans = plan_chunks([shard.routing.expert_ids_TK for shard in starts], layout, spec)
    own_params = [gather(params, rank, layout, spec) for rank in range(layout.num_ranks)]
    worked = [
        [work(rank, index, plans[index], starts, own_params[rank], spec, layout) for index in range(len(plans))]
        for rank in range(layout.num_ranks)
    ]
    ranks = sum_over_tensor_ranks(worked, layout)
    shards = [finish(shard, starts[shard], ranks, params, spec, layout) for shard in range(layout.num_token_shards)]
    counts = [permute(begun.routing.expert_ids_TK, spec.router.num_experts).tokens_per_expert_E for begun in starts]
    return ShardedTrace(
        layout=layout, shards=tuple(shards), ranks=ranks, tokens_per_expert_E=np.stack(counts).sum(axis=0)
    )


def start(
    given_x_TD: np.ndarray, token_mask_T: np.ndarray | None, params: LayerParams, spec: LayerSpec, inputs: RouterInputs
) -> ShardStart:
    """A token chooses its experts on its own rank; tensor ranks, and replicated ones, choose the same. [LYT-2]"""
    mask_T, dtype = mask_array(token_mask_T, len(given_x_TD)), given_x_TD.dtype
    x_TD = np.where(mask_T[:, None], given_x_TD, 0)
    routing = route(
        gate(x_TD, params.gate_ED, params.gate_bias_E, dtype=dtype_of_router(spec.router, dtype)),
        spec.router,
        expert_bias_E=params.expert_bias_E,
        learned_scale=params.learned_scale,
        inputs=inputs,
        token_mask_T=mask_T,
        dtype=dtype,
    )
    weights_TK = routing.weights_TK.astype(dtype)  # a router may be of float64 in a layer of float32
    expert_input_TD = compress(x_TD, params)
    return ShardStart(
        x_TD=x_TD,
        token_mask_T=mask_T,
        routing=routing,
        expert_input_TD=expert_input_TD,
        slot_inputs_TKD=weigh_inputs(expert_input_TD, weights_TK, spec.router),
    )


def work(
    rank: int,
    index: int,
    plans: Sequence[RankPlan],
    starts: Sequence[ShardStart],
    own_params: LayerParams,
    spec: LayerSpec,
    layout: ShardLayout,
) -> ChunkTrace:
    """A rank runs its experts on the rows of one token chunk, on its slice of F."""
    plan, K = plans[rank // layout.tensor], spec.router.top_k
    d, f, _, _ = layout.coordinates(rank)
    shard_of = [layout.shard_of(layout.rank(d, f, source)) for source in range(layout.expert)]
    slots_before = [K * layout.chunks(len(starts[shard].x_TD))[index].start for shard in shard_of]
    rows = [(shard_of[source], slots_before[source] + slot) for source, slot in plan.order_R2.tolist()]
    input_RD = np.zeros((len(rows), spec.routed_experts.dim), starts[0].x_TD.dtype)
    for row, (shard, slot) in enumerate(rows):
        input_RD[row] = starts[shard].slot_inputs_TKD[divmod(slot, K)]
    experts = run_own_experts(input_RD, plan.group_sizes_e, own_params, spec.experts, layout.num_emb_chunks)
    return ChunkTrace(
        plan=plan,
        shard_slots_R2=np.array(rows, np.int64).reshape(-1, 2),
        experts=experts,
        output_RD=experts.output_RD,
    )


def run_own_experts(
    input_RD: np.ndarray, group_sizes_e: np.ndarray, own_params: LayerParams, spec: ExpertSpec, num_emb_chunks: int
) -> FeedForwardTrace:
    """Each expert of a rank works on its own rows; gate and up are summed over pieces of D."""
    gate_RF, up_RF, hidden_RF, output_RD = [], [], [], []
    ends_e = np.cumsum(group_sizes_e)
    for own, (end, size) in enumerate(zip(ends_e, group_sizes_e, strict=True)):
        weights, rows = own_params.expert(own), input_RD[end - size : end]
        gate = None
        if weights.w_gate_DF is not None:
            gate = project_in_pieces(rows, weights.w_gate_DF, weights.b_gate_F, num_emb_chunks)
            gate_RF.append(gate)
        up_RF.append(project_in_pieces(rows, weights.w_up_DF, weights.b_up_F, num_emb_chunks))
        hidden_RF.append(hide(gate, up_RF[-1], spec))
        output_RD.append(project(hidden_RF[-1], weights.w_down_FD, weights.b_down_D))
    return FeedForwardTrace(
        input_RD=input_RD,
        gate_RF=np.concatenate(gate_RF) if gate_RF else None,
        up_RF=np.concatenate(up_RF),
        hidden_RF=np.concatenate(hidden_RF),
        output_RD=np.concatenate(output_RD),
    )


def project_in_pieces(rows_RD: np.ndarray, w_DF: np.ndarray, b_F: np.ndarray | None, num_pieces: int) -> np.ndarray:
    """A projection is the sum of those of the pieces of D, plus its bias once."""
    pieces = zip(np.split(rows_RD, num_pieces, axis=1), np.split(w_DF, num_pieces), strict=True)
    total_RF = reduce(np.add, (project(piece_RD, piece_DF) for piece_RD, piece_DF in pieces))
    return total_RF if b_F is None else total_RF + b_F


def sum_over_tensor_ranks(
    worked: Sequence[Sequence[ChunkTrace]], layout: ShardLayout
) -> tuple[tuple[ChunkTrace, ...], ...]:
    """The outputs of the experts are the sums of the partial outputs of the tensor ranks; each of them gets the sum."""
    ranks = []
    for rank in range(layout.num_ranks):
        first = rank - rank % layout.tensor
        chunks = []
        for index, chunk in enumerate(worked[rank]):
            parts = [worked[peer][index].experts.output_RD for peer in range(first, first + layout.tensor)]
            output_RD = sum(parts[1:], start=parts[0])
            chunks.append(ChunkTrace(**{**vars(chunk), "output_RD": output_RD}))
        ranks.append(tuple(chunks))
    return tuple(ranks)


def finish(
    shard: int,
    begun: ShardStart,
    ranks: Sequence[Sequence[ChunkTrace]],
    params: LayerParams,
    spec: LayerSpec,
    layout: ShardLayout,
) -> ShardTrace:
    """Rows come back to their slots, and a token's slots are summed: in each partial sum, then over them. [LYT-13]"""
    strategy = STRATEGIES[layout.strategy]
    T, K, _ = begun.slot_inputs_TKD.shape
    ids_TK, weights_TK = begun.routing.expert_ids_TK, begun.weights_TK
    identity_TK = identity_slots(ids_TK, spec.router)
    slot_outputs_TKD = np.where(identity_TK[:, :, None], begun.slot_inputs_TKD, 0)
    slot_outputs_TKD = fill_constants(slot_outputs_TKD, begun.slot_inputs_TKD, ids_TK, params, spec.router)
    partial_TK = np.full((T, K), home_of(shard, layout))
    for rank in range(0, layout.num_ranks, layout.tensor):
        for chunk in ranks[rank]:
            for row_D, (of_shard, slot) in zip(chunk.output_RD, chunk.shard_slots_R2.tolist(), strict=True):
                if of_shard == shard:
                    slot_outputs_TKD[divmod(slot, K)] = row_D
                    partial_TK[divmod(slot, K)] = strategy.partial_of(chunk.plan.e, layout)
    partials = []
    for partial in range(strategy.num_partials(layout)):
        own_TKD = np.where((partial_TK == partial)[:, :, None], slot_outputs_TKD, 0)
        partials.append(combine(own_TKD, weights_TK, spec.router))
    latent = expand(begun.expert_input_TD, sum(partials[1:], start=partials[0]), params, spec)

    factors_TS = share_weights(begun.x_TD, begun.routing.shared_weights_TS, params, spec)
    factors_TS = np.where(begun.token_mask_T[:, None], factors_TS, 0)
    shared_experts = run_shared(begun.x_TD, params, spec)
    shared_TD = sum_shared(shared_experts, factors_TS, begun.x_TD)
    return ShardTrace(
        **vars(begun),
        slot_outputs_TKD=slot_outputs_TKD,
        partial_PTD=np.stack(partials),
        latent=latent,
        routed_TD=latent.routed_TD,
        shared_factors_TS=factors_TS,
        shared_experts=shared_experts,
        shared_TD=shared_TD,
        output_TD=join(latent.routed_TD, shared_TD, spec),
    )


def by_shard(field: str, values: Sequence | None, layout: ShardLayout) -> list:
    """One value for each token shard; None is one None for each."""
    found = [None] * layout.num_token_shards if values is None else list(values)
    require(
        len(found) == layout.num_token_shards,
        f"{field} has {len(found)} entries; the layout has {layout.num_token_shards} token shards",
    )
    return found
