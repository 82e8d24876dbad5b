"""moe_ref, gradients of the sharded layer: each stage of `sharded.py` backwards, last stage first, every rank named.

Each rank adds its part to the gradient of what it computes with; the sum over all ranks is the gradient of the layer.

Legend: T tokens, D model dim, F expert hidden dim, E experts, K top_k, R rows on this rank, S shared experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_ref.backward.constants import constants_backward
from moe_ref.backward.latent import compress_backward, expand_backward
from moe_ref.backward.layer import (
    combine_backward,
    experts_backward,
    join_backward,
    shared_backward,
    weigh_inputs_backward,
)
from moe_ref.backward.routing import gate_backward, route_backward
from moe_ref.experts import identity_slots
from moe_ref.holdings import add, gather, held, take, used
from moe_ref.sharded import ChunkTrace, ShardedTrace, ShardTrace, by_shard
from moe_ref.specs.checks import array
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.params import LayerParams


@dataclass(frozen=True, kw_only=True)
class ShardedGradients:
    """Gradients of the tokens, by shard, and of the parameters: whole, and rank by rank."""

    x_by_shard: list[np.ndarray]
    weights_by_shard: list[np.ndarray]
    params: LayerParams
    """Summed over all shards; what every rank sees after the reductions, put together."""
    partial_by_rank: list[dict[str, np.ndarray]]
    """What each rank adds to the sum, in the shape of what it computes with (`holdings.used`). What tensor ranks, or
    replicated ranks, compute alike, the first of them adds."""
    held_by_rank: list[dict[str, np.ndarray]]
    """The sum, reduce-scattered over fsdp: in the shape of what each rank stores (`holdings.held`)."""


def sharded_backward(
    trace: ShardedTrace, params: LayerParams, spec: LayerSpec, d_output_by_shard: Sequence[np.ndarray]
) -> ShardedGradients:
    """The gradient of sum(d_output_TD * output_TD) over all shards; the choice is a constant. [LYT-19 .. LYT-23]

    Args:
        trace: what `sharded_layer` returned for these params and this spec.
        d_output_by_shard: for each token shard (T, D); the rows of padding tokens are not read.
    """
    layout, dtype = trace.layout, trace.shards[0].x_TD.dtype
    params = params.astype(dtype)
    d_outputs = by_shard("d_output_by_shard", d_output_by_shard, layout)
    d_slots, d_weights, d_shareds, d_slot_inputs, further_grads = [], [], [], [], []
    for index, shard in enumerate(trace.shards):
        d_output_TD = array(f"d_output_by_shard[{index}]", d_outputs[index], shard.x_TD.shape).astype(dtype)
        d_output_TD = np.where(shard.token_mask_T[:, None], d_output_TD, 0)
        d_routed_TD, d_shared_TD = join_backward(d_output_TD, spec)
        d_combined_TD, grads = expand_backward(d_routed_TD, shard.latent, params, spec)
        further_grads.append(grads)
        d_slot_TKD, d_weights_TK = combine_backward(
            d_combined_TD, shard.slot_outputs_TKD, shard.weights_TK, spec.router
        )
        identity_TK = identity_slots(shard.routing.expert_ids_TK, spec.router)
        d_slots.append(d_slot_TKD)
        d_weights.append(d_weights_TK)
        d_shareds.append(d_shared_TD)
        d_constants_TKD, grads = constants_backward(
            d_slot_TKD, shard.slot_inputs_TKD, shard.routing.expert_ids_TK, params, spec.router
        )
        further_grads[-1] |= grads
        # What a slot passes past the experts; a dropped slot passes nothing.
        d_slot_inputs.append(np.where(identity_TK[:, :, None], d_slot_TKD, 0) + d_constants_TKD)

    partials = [_zeros(params, used(rank, layout, spec)) for rank in range(layout.num_ranks)]
    for rank, chunks in enumerate(trace.ranks):
        own_params = gather(params, rank, layout, spec)
        for chunk in chunks:
            _work_backward(chunk, own_params, spec, d_slots, d_slot_inputs, partials[rank])

    d_xs, d_weights_by_shard = [], []
    for index, shard in enumerate(trace.shards):
        first = layout.rank(*divmod(index // layout.shards_per_group, layout.fsdp), index % layout.shards_per_group)
        d_x_TD, d_weights_TK, grads = _start_backward(
            shard, params, spec, d_slot_inputs[index], d_weights[index], d_shareds[index]
        )
        d_xs.append(d_x_TD)
        d_weights_by_shard.append(d_weights_TK)
        for name, grad in (grads | further_grads[index]).items():
            add(partials[first][name], used(first, layout, spec)[name], grad)

    whole = _zeros(params, None)
    for rank, partial in enumerate(partials):
        for name, grad in partial.items():
            add(whole[name], used(rank, layout, spec)[name], grad)
    return ShardedGradients(
        x_by_shard=d_xs,
        weights_by_shard=d_weights_by_shard,
        params=LayerParams(**whole),
        partial_by_rank=partials,
        held_by_rank=[
            {name: take(whole[name], part) for name, part in held(rank, layout, spec).items() if name in whole}
            for rank in range(layout.num_ranks)
        ],
    )


def _work_backward(
    chunk: ChunkTrace,
    own_params: LayerParams,
    spec: LayerSpec,
    d_slots: list[np.ndarray],
    d_slot_inputs: list[np.ndarray],
    partial: dict[str, np.ndarray],
) -> None:
    """A rank's experts backwards: the gradients of its rows go back to their slots, summed over the tensor ranks."""
    K = spec.router.top_k
    d_rows_RD = np.zeros_like(chunk.output_RD)
    for row, (shard, slot) in enumerate(chunk.shard_slots_R2.tolist()):
        d_rows_RD[row] = d_slots[shard][divmod(slot, K)]
    d_inputs_RD, grads = experts_backward(d_rows_RD, chunk.experts, chunk.plan.group_sizes_e, own_params, spec.experts)
    for d_input_D, (shard, slot) in zip(d_inputs_RD, chunk.shard_slots_R2.tolist(), strict=True):
        d_slot_inputs[shard][divmod(slot, K)] += d_input_D
    for name, grad in grads.items():
        if grad is not None:
            partial[name] += grad


def _start_backward(
    shard: ShardTrace,
    params: LayerParams,
    spec: LayerSpec,
    d_slot_inputs_TKD: np.ndarray,
    d_weights_TK: np.ndarray,
    d_shared_TD: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """What a shard computed on its own, backwards: its tokens, its weights, and gate, scales and shared experts."""
    d_expert_input_TD, d_weights_at_input_TK = weigh_inputs_backward(
        d_slot_inputs_TKD, shard.expert_input_TD, shard.weights_TK, spec.router
    )
    d_x_routed_TD, compress_grads = compress_backward(d_expert_input_TD, shard.x_TD, params)
    d_x_shared_TD, d_factors_TS, grads = shared_backward(
        d_shared_TD, shard.x_TD, shard.shared_factors_TS, shard.shared_experts, params, spec
    )
    grads |= compress_grads
    d_weights_TK = d_weights_TK + d_weights_at_input_TK
    d_logits_TE, d_learned_scale = route_backward(
        shard.routing,
        spec.router,
        params.learned_scale,
        d_weights_TK,
        d_factors_TS if spec.router.num_scored_shared_experts else None,
        token_mask_T=shard.token_mask_T,
    )
    d_x_gate_TD, grads["gate_ED"], d_gate_bias_E = gate_backward(d_logits_TE, shard.x_TD, params.gate_ED)
    if spec.gate_bias:
        grads["gate_bias_E"] = d_gate_bias_E
    if d_learned_scale is not None:
        grads["learned_scale"] = d_learned_scale
    d_x_TD = np.where(shard.token_mask_T[:, None], d_x_routed_TD + d_x_shared_TD + d_x_gate_TD, 0)
    return d_x_TD, d_weights_TK, {name: grad for name, grad in grads.items() if grad is not None}


def _zeros(params: LayerParams, parts: dict | None) -> dict[str, np.ndarray]:
    """Zeros for each parameter, or for a part of it; what has no gradient stays 0, as expert_bias_E does."""
    given = {name: np.zeros_like(value) for name, value in params.by_name().items()}
    return given if parts is None else {name: take(value, parts[name]) for name, value in given.items()}
