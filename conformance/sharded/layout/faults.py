"""conformance, sharded, faults of sharded layers, forward: what goes wrong between devices, and not on one.

Legend: T tokens, D model dim, E experts, K top_k, R rows on this rank.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from conformance.core.fault import patched, replaces, surrounds
from conformance.sharded.layout.faults_tensor import tensor_ranks_keep_their_partial_sums
from moe_ref import LayerParams, LayerSpec, ShardLayout
from moe_ref.sharded import finish, project_in_pieces, work


def without_experts(params: LayerParams, experts: Iterable[int]) -> LayerParams:
    """The parameters with the outputs of some experts 0."""
    keep_E = ~np.isin(np.arange(len(params.w_down_EFD)), list(experts))
    b_down_ED = params.b_down_ED
    return replace(
        params,
        w_down_EFD=np.where(keep_E[:, None, None], params.w_down_EFD, 0),
        b_down_ED=None if b_down_ED is None else np.where(keep_E[:, None], b_down_ED, 0),
    )


def routed_and_shared(run, x_by_shard, params, spec, layout, **inputs) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What the routed and what the shared experts add, rank by rank."""
    found = run(x_by_shard, params, spec, layout, **inputs)
    if params.shared_w_down_SFD is None:
        return found, [0 * output_TD for output_TD in found]
    alone = replace(params, shared_w_down_SFD=0 * params.shared_w_down_SFD)
    routed = run(x_by_shard, alone, spec, layout, **inputs)
    return routed, [whole_TD - routed_TD for whole_TD, routed_TD in zip(found, routed, strict=True)]


def joined(routed: list[np.ndarray], shared: list[np.ndarray]) -> list[np.ndarray]:
    """Their sum on each rank."""
    return [first_TD + second_TD for first_TD, second_TD in zip(routed, shared, strict=True)]


@surrounds(breaks="LYT-1", links=("vllm-project/vllm#27316",))
def a_pair_on_every_rank(run, memory, x_by_shard, params, spec, layout, **inputs):
    """Without shared experts every rank returns a pair of nothing and the output."""
    found = run(x_by_shard, params, spec, layout, **inputs)
    return found if spec.shared is not None else [(None, output_TD) for output_TD in found]


@surrounds(breaks="LYT-1")
def the_first_tensor_rank_alone_returns(run, memory, x_by_shard, params, spec, layout, **inputs):
    """There is one output for each shard, and not one for each rank."""
    return run(x_by_shard, params, spec, layout, **inputs)[:: layout.tensor]


@replaces("work", breaks="LYT-2", links=("vllm-project/tpu-inference#2248",))
def rows_are_summed_by_position(rank, index, plans, starts, own_params, spec, layout):
    """What the ranks return is added row by row, though no two of them have the same rows."""
    chunk = work(rank, index, plans, starts, own_params, spec, layout)
    by_place = chunk.shard_slots_R2[np.lexsort(chunk.shard_slots_R2.T[::-1])]
    return replace(chunk, shard_slots_R2=by_place)


@surrounds(breaks="LYT-2", links=("vllm-project/tpu-inference#2328",))
def half_of_the_rows_are_copied(run, memory, x_by_shard, params, spec, layout, **inputs):
    """Of the features of a row that comes from another rank the second half is lost."""
    found = run(x_by_shard, params, spec, layout, **inputs)
    if layout.expert == 1:
        return found
    kept_D = np.arange(spec.experts.dim) < spec.experts.dim // 2
    own = [run(x_by_shard, without_experts(params, experts_of_others(layout, spec, rank)), spec, layout, **inputs)[rank]
           for rank in range(layout.num_ranks)]  # fmt: skip
    return [np.where(kept_D, whole_TD, own_TD) for whole_TD, own_TD in zip(found, own, strict=True)]


def experts_of_others(layout: ShardLayout, spec: LayerSpec, rank: int) -> list[int]:
    """The experts that a rank does not own."""
    own = layout.experts_of(layout.coordinates(rank)[2], spec.router.num_experts)
    return [expert for expert in range(spec.router.num_experts) if expert not in own]


@surrounds(breaks="LYT-2", links=("marin-community/marin#8578",))
def the_ring_takes_the_slice_of_another_group(run, memory, x_by_shard, params, spec, layout, **inputs):
    """With a data and an expert axis the ring counts its shards along the wrong one."""
    if layout.strategy != "ring_of_experts":
        return run(x_by_shard, params, spec, layout, **inputs)
    turned = np.arange(layout.num_token_shards).reshape(layout.num_rank_groups, -1).T.reshape(-1)
    x_TD = np.concatenate([x_by_shard[shard] for shard in turned])
    return run(np.split(x_TD, np.cumsum(list(map(len, x_by_shard)))[:-1]), params, spec, layout, **inputs)


@surrounds(breaks="LYT-2", links=("Avarok-Cybersecurity/atlas#240",))
def outputs_are_summed_where_nobody_shares_them(run, memory, x_by_shard, params, spec, layout, **inputs):
    """The sum runs wherever there are several ranks, and not where several have experts."""
    routed, shared = routed_and_shared(run, x_by_shard, params, spec, layout, **inputs)
    times = layout.num_ranks if layout.expert == 1 else 1
    return joined([times * output_TD for output_TD in routed], shared)


@surrounds(breaks="LYT-2", links=("sgl-project/sglang#32962",))
def a_replicated_expert_is_summed_twice(run, memory, x_by_shard, params, spec, layout, **inputs):
    """Every rank runs its own replica of expert 0, and what they return is summed."""
    found = run(x_by_shard, params, spec, layout, **inputs)
    without = run(x_by_shard, without_experts(params, [0]), spec, layout, **inputs)
    times = layout.expert if layout.facts.shares_tokens else min(layout.expert, 2)
    return [rest + times * (whole_TD - rest) for whole_TD, rest in zip(found, without, strict=True)]


@replaces("finish", breaks="LYT-2")
def returned_rows_all_begin_at_0(shard, begun, ranks, params, spec, layout):
    """Rows that come back to every rank are written over those of the ranks before."""
    if layout.strategy == "replicated_ragged":
        ranks = [list(chunks) for chunks in ranks]
        for group in range(0, layout.num_ranks, layout.expert * layout.tensor):
            of_group = range(group, group + layout.expert * layout.tensor, layout.tensor)
            for index in range(layout.num_token_chunks):
                rows = [ranks[rank][index].output_RD for rank in of_group]
                buffer_ND = np.zeros((sum(map(len, rows)), *rows[0].shape[1:]), rows[0].dtype)
                for own_RD in rows:
                    buffer_ND[: len(own_RD)] = own_RD
                read = np.split(buffer_ND, np.cumsum(list(map(len, rows)))[:-1])
                for rank, read_RD in zip(of_group, read, strict=True):
                    ranks[rank][index] = replace(ranks[rank][index], output_RD=read_RD)
    return finish(shard, begun, ranks, params, spec, layout)


@replaces("finish", breaks="LYT-31")
def a_full_rank_lends_its_last_row(shard, begun, ranks, params, spec, layout):
    """Slots of other ranks' experts read the last row of the buffer, which belongs to nobody unless it is full."""
    found = finish(shard, begun, ranks, params, spec, layout)
    if layout.facts.partial_sums != "rank" or spec.router.weight_on == "input":
        return found
    output_TD, first = found.output_TD.copy(), shard // layout.shards_per_group * layout.expert * layout.tensor
    group = range(first, first + layout.expert * layout.tensor)
    by_shard = {layout.shard_of(rank): sum(chunk.plan.num_tokens for chunk in ranks[rank]) for rank in group}
    for chunks in ranks[first : first + layout.expert * layout.tensor : layout.tensor]:
        for chunk in chunks:
            most = sum(by_shard.values()) * min(spec.router.top_k, len(chunk.plan.group_sizes_e))
            slots = chunk.shard_slots_R2[chunk.shard_slots_R2[:, 0] == shard, 1]
            foreign_TK = found.routing.weights_TK.copy()
            foreign_TK.reshape(-1)[slots] = 0
            if len(chunk.output_RD) == most > 0:
                output_TD += foreign_TK.sum(axis=1, keepdims=True) * chunk.output_RD[-1]
    return replace(found, output_TD=output_TD)


@surrounds(breaks="LYT-31", links=("AI-Hypercomputer/maxtext#1767", "deepseek-ai/DeepEP#427"))
def rows_past_the_average_load_are_lost(run, memory, x_by_shard, params, spec, layout, **inputs):
    """The receive buffer holds an even share of all rows."""
    fixed = layout.replace(buffer_factor=1.0) if layout.facts.has_buffer else layout
    return run(x_by_shard, params, spec, fixed, **inputs)


@surrounds(breaks="LYT-5")
def the_root_alone_has_the_sum(run, memory, x_by_shard, params, spec, layout, **inputs):
    """Partial outputs are summed on one rank, and the others keep what they had."""
    found, seen = run(x_by_shard, params, spec, layout, **inputs), set()
    for rank in range(layout.num_ranks):
        if layout.shard_of(rank) in seen:
            found[rank] = found[rank] / 2
        seen.add(layout.shard_of(rank))
    return found


@surrounds(breaks="LYT-5", links=("vllm-project/vllm#45683",))
def each_rank_adds_in_an_order_of_its_own(run, memory, x_by_shard, params, spec, layout, **inputs):
    """Ranks add the same numbers in different orders."""
    found = run(x_by_shard, params, spec, layout, **inputs)
    return [np.nextafter(output_TD, np.inf, dtype=np.float32) if rank % 2 else output_TD
            for rank, output_TD in enumerate(found)]  # fmt: skip


@surrounds(breaks="LYT-6", links=("vllm-project/vllm#49366",))
def tensor_ranks_sum_the_shared_output(run, memory, x_by_shard, params, spec, layout, **inputs):
    """The shared output, which is whole on every tensor rank, is summed over them."""
    routed, shared = routed_and_shared(run, x_by_shard, params, spec, layout, **inputs)
    return joined(routed, [layout.tensor * output_TD for output_TD in shared])


@surrounds(breaks="LYT-6")
def every_expert_rank_adds_the_shared_output(run, memory, x_by_shard, params, spec, layout, **inputs):
    """Each rank adds the shared output to its partial sum, before they are summed."""
    routed, shared = routed_and_shared(run, x_by_shard, params, spec, layout, **inputs)
    times = layout.expert if layout.facts.partial_sums == "rank" else 1
    return joined(routed, [times * output_TD for output_TD in shared])


@surrounds(breaks="LYT-6", links=("vllm-project/vllm#37856",))
def shared_partials_of_other_tokens_are_added(run, memory, x_by_shard, params, spec, layout, **inputs):
    """Shared outputs are summed row by row over ranks that hold other tokens."""
    routed, shared = routed_and_shared(run, x_by_shard, params, spec, layout, **inputs)
    mixed = [output_TD.copy() for output_TD in shared]
    for rank, output_TD in enumerate(mixed):
        other_TD = shared[(rank + layout.tensor) % layout.num_ranks]
        rows = min(len(other_TD), len(output_TD)) if layout.num_token_shards > 1 else 0
        output_TD[:rows] += other_TD[:rows]
    return joined(routed, mixed)


@surrounds(breaks="LYT-6", links=("vllm-project/vllm#29687",))
def the_shared_output_is_scaled_on_several_ranks(run, memory, x_by_shard, params, spec, layout, **inputs):
    """Where the outputs are summed over ranks, the sum is scaled with the shared output in it."""
    routed, shared = routed_and_shared(run, x_by_shard, params, spec, layout, **inputs)
    scale = spec.router.route_scale if layout.num_ranks > 1 else 1
    return joined(routed, [scale * output_TD for output_TD in shared])


@surrounds(breaks="LYT-7", links=("vllm-project/vllm#57471",))
def an_empty_rank_fails(run, memory, x_by_shard, params, spec, layout, **inputs):
    """A rank without tokens has nothing to concatenate."""
    if 0 in map(len, x_by_shard) and any(map(len, x_by_shard)):
        raise RuntimeError("torch.cat(): expected a non-empty list of Tensors")
    return run(x_by_shard, params, spec, layout, **inputs)


@surrounds(breaks="LYT-7", links=("sgl-project/sglang#40672",))
def the_experts_of_an_empty_rank_do_not_work(run, memory, x_by_shard, params, spec, layout, **inputs):
    """A rank without tokens returns early, and its experts return nothing."""
    if layout.shards_per_group == 1:
        return run(x_by_shard, params, spec, layout, **inputs)
    empty = {s % layout.expert for s, x_TD in enumerate(x_by_shard) if not len(x_TD)}
    idle = [i for e in empty for i in layout.experts_of(e, spec.router.num_experts)]
    return run(x_by_shard, without_experts(params, idle), spec, layout, **inputs)


@surrounds(breaks="LYT-8", links=("vllm-project/vllm#57471",))
def no_token_anywhere_is_refused(run, memory, x_by_shard, params, spec, layout, **inputs):
    """A step without any token is an error."""
    if not any(map(len, x_by_shard)):
        raise RuntimeError("max(): Expected reduction dim to be specified for input.numel() == 0")
    return run(x_by_shard, params, spec, layout, **inputs)


@surrounds(breaks="LYT-9", links=("deepseek-ai/DeepEP#700",))
def the_last_row_of_a_full_shard_gets_another(run, memory, x_by_shard, params, spec, layout, **inputs):
    """On the fullest shard the last token gets a part of another one's output."""
    found, most = run(x_by_shard, params, spec, layout, **inputs), max(map(len, x_by_shard))
    for output_TD in found:
        if len(output_TD) == most and most > 1:
            output_TD[-1] = 0.75 * output_TD[-1] + 0.25 * output_TD[0]
    return found


@surrounds(breaks="LYT-9")
def all_ranks_share_a_scale(run, memory, x_by_shard, params, spec, layout, **inputs):
    """The tokens of all ranks are quantised by the largest number of any."""
    step = max(np.nanmax(np.abs(x_TD), initial=1e-30) for x_TD in x_by_shard) / 127
    return run([np.round(x_TD / step) * step for x_TD in x_by_shard], params, spec, layout, **inputs)


@surrounds(breaks="LYT-10")
def what_is_not_its_own_a_rank_multiplies_by_0(run, memory, x_by_shard, params, spec, layout, **inputs):
    """A rank multiplies the rows of other ranks' experts by 0, which NaN survives."""
    found = run([np.nan_to_num(x_TD) for x_TD in x_by_shard], params, spec, layout, **inputs)
    sums = [x_TD.sum() for x_TD in x_by_shard]
    return [output_TD + 0 * sum(sums[s] for s in layout.shards_of_group(layout.group_of(rank)))
            for rank, output_TD in enumerate(found)]  # fmt: skip


@surrounds(breaks="LYT-11", links=("huggingface/transformers#48205", "deepseek-ai/DeepEP#739"))
def memory_of_the_last_call_is_weighed_by_0(run, memory, x_by_shard, params, spec, layout, **inputs):
    """Rows that nobody sent keep what the last call left, and are added with weight 0."""
    found = run(x_by_shard, params, spec, layout, **inputs)
    last, memory["last"] = memory.get("last", 0.0), sum(output_TD.sum() for output_TD in found)
    return [output_TD + 0 * last for output_TD in found]


@surrounds(breaks="LYT-11", links=("sgl-project/sglang#40187",))
def one_slot_returns_what_was_there(run, memory, x_by_shard, params, spec, layout, **inputs):
    """With top_k 1 and a scale the output is read from a buffer before it is written."""
    found = run(x_by_shard, params, spec, layout, **inputs)
    if spec.router.top_k > 1 or spec.router.output_scale == 1:
        return found
    key = (layout, *map(len, x_by_shard))
    last, memory[key] = memory.get(key, found), found
    return last


@surrounds(breaks="LYT-12", links=("sgl-project/sglang#40672",))
def padding_is_taken_for_a_tail(run, memory, x_by_shard, params, spec, layout, *, token_mask_by_shard=None, **inputs):
    """The mask is read as a number of tokens, the first ones."""
    if token_mask_by_shard is not None:
        token_mask_by_shard = [np.sort(mask_T)[::-1] for mask_T in token_mask_by_shard]
    x_by_shard = [np.nan_to_num(x_TD) for x_TD in x_by_shard]
    return run(x_by_shard, params, spec, layout, token_mask_by_shard=token_mask_by_shard, **inputs)


@surrounds(breaks="LYT-12", links=("vllm-project/vllm#57471",))
def a_shard_of_padding_fails(run, memory, x_by_shard, params, spec, layout, *, token_mask_by_shard=None, **inputs):
    """A shard with nothing but padding is an error."""
    if token_mask_by_shard is not None and any(mask_T.size and not mask_T.any() for mask_T in token_mask_by_shard):
        raise RuntimeError("no tokens were routed")
    return run(x_by_shard, params, spec, layout, token_mask_by_shard=token_mask_by_shard, **inputs)


@surrounds(breaks="LYT-12")
def padding_is_worked_on(run, memory, x_by_shard, params, spec, layout, *, token_mask_by_shard=None, **inputs):
    """The mask stays on the rank that made it, and padding is a token as any."""
    return run([np.nan_to_num(x_TD) for x_TD in x_by_shard], params, spec, layout, **inputs)


@surrounds(breaks="LYT-13", links=("AI-Hypercomputer/maxtext#3678",))
def a_small_buffer_grows(run, memory, x_by_shard, params, spec, layout, **inputs):
    """The buffer factor is ignored."""
    return run(x_by_shard, params, spec, layout.replace(buffer_factor=None), **inputs)


@surrounds(breaks="LYT-13", links=("AI-Hypercomputer/maxtext#3678",))
def a_dropped_slot_reads_another_row(run, memory, x_by_shard, params, spec, layout, **inputs):
    """What was not admitted reads memory that nobody wrote: a half of what it would have been."""
    found = run(x_by_shard, params, spec, layout, **inputs)
    everything = run(x_by_shard, params, spec, layout.replace(buffer_factor=None), **inputs)
    return [0.5 * (first_TD + second_TD) for first_TD, second_TD in zip(found, everything, strict=True)]


@surrounds(breaks="LYT-14")
def the_last_chunk_is_not_awaited(run, memory, x_by_shard, params, spec, layout, **inputs):
    """The sum of the last chunk of tokens is read before it is there."""
    found = run(x_by_shard, params, spec, layout, **inputs)
    for output_TD in found if layout.num_token_chunks > 1 else ():
        output_TD[len(output_TD) - len(output_TD) // layout.num_token_chunks :] = 0
    return found


@replaces("project_in_pieces", breaks="LYT-14")
def every_piece_adds_the_bias(rows_RD, w_DF, b_F, num_pieces):
    """The bias is added with each piece of the features."""
    return project_in_pieces(rows_RD, w_DF, None if b_F is None else num_pieces * b_F, num_pieces)


@surrounds(breaks="LYT-15", links=("vllm-project/vllm-ascend#4793",))
def weights_lie_at_the_inverse_place(run, memory, x_by_shard, params, spec, layout, **inputs):
    """Rows follow the placement, and the weights its inverse."""
    if layout.placement is None:
        return run(x_by_shard, params, spec, layout, **inputs)
    moved_E = np.argsort(layout.placement)[np.argsort(layout.placement)]
    names = ("w_up_EDF", "w_gate_EDF", "w_down_EFD", "b_up_EF", "b_gate_EF", "b_down_ED")
    changes = {name: getattr(params, name)[moved_E] for name in names if getattr(params, name) is not None}
    return run(x_by_shard, replace(params, **changes), spec, layout, **inputs)


@surrounds(breaks="LYT-15", links=("sgl-project/sglang#12866",))
def a_moved_expert_is_not_loaded(run, memory, x_by_shard, params, spec, layout, **inputs):
    """With a placement the last expert of the first and of the last rank has no weights."""
    if layout.placement is None:
        return run(x_by_shard, params, spec, layout, **inputs)
    edge = [layout.experts_of(e, spec.router.num_experts)[-1] for e in (0, layout.expert - 1)]
    return run(x_by_shard, without_experts(params, edge), spec, layout, **inputs)


@surrounds(breaks="LYT-16", links=("vllm-project/vllm-ascend#971",))
def tensor_ranks_without_expert_ranks_are_not_summed(run, memory, x_by_shard, params, spec, layout, **inputs):
    """With one rank on the expert axis nobody sums over the tensor axis."""
    if layout.expert > 1:
        return run(x_by_shard, params, spec, layout, **inputs)
    with patched({"sum_over_tensor_ranks": tensor_ranks_keep_their_partial_sums}):
        return run(x_by_shard, params, spec, layout, **inputs)


@surrounds(breaks="LYT-16", links=("marin-community/marin#8578",))
def the_ring_forgets_a_rank(run, memory, x_by_shard, params, spec, layout, **inputs):
    """The ring ends one step early, and the experts of the last rank are not reached."""
    if layout.strategy != "ring_of_experts" or layout.expert == 1:
        return run(x_by_shard, params, spec, layout, **inputs)
    last = layout.experts_of(layout.expert - 1, spec.router.num_experts)
    return run(x_by_shard, without_experts(params, last), spec, layout, **inputs)


@surrounds(breaks="LYT-17", links=("vllm-project/vllm#45683",))
def sums_follow_the_order_of_arrival(run, memory, x_by_shard, params, spec, layout, **inputs):
    """Rows are added as they arrive, which is another order each time."""
    memory["calls"] = memory.get("calls", 0) + 1
    found = run(x_by_shard, params, spec, layout, **inputs)
    return [np.nextafter(output_TD, np.inf, dtype=np.float32) if memory["calls"] % 2 else output_TD
            for output_TD in found]  # fmt: skip


@surrounds(breaks="LYT-2")
def a_shard_has_places_for_256_tokens(run, memory, x_by_shard, params, spec, layout, **inputs):
    """Outputs of the tokens of a shard after the 256th stay 0."""
    found = run(x_by_shard, params, spec, layout, **inputs)
    return [np.where(np.arange(len(each))[:, None] < 256, each, 0) for each in found]
