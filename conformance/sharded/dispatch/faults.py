"""conformance, sharded, faults of dispatch: slots that travel to the wrong rank, twice or not at all, and wrong sizes.

Legend: T tokens, E experts, K top_k, e experts on this rank, R rows on this rank, S ranks of a rank group.
"""

import numpy as np

from conformance.core.fault import replaces, surrounds
from moe_ref.dispatch import checked_ids
from moe_ref.specs.layout import even_pieces
from moe_ref.strategies.rows import exchange, rows_for, sort_by_expert


def own_rank(layout, number: int) -> int:
    """The place on the expert axis of the plan with this number."""
    return number % layout.expert


@surrounds(breaks="DSP-1")
def sizes_are_floats(run, memory, ids_by_shard, layout, spec):
    """Rows are counted in floating point."""
    return [
        plan | {"group_sizes_e": plan["group_sizes_e"].astype(np.float32)} for plan in run(ids_by_shard, layout, spec)
    ]


@surrounds(breaks="DSP-1", links=("vllm-project/vllm#23619",))
def the_expert_axis_has_the_size_of_the_data_axis(run, memory, ids_by_shard, layout, spec):
    """The number of ranks is that of the data axis."""
    plans = run(ids_by_shard, layout, spec)
    return plans if layout.expert == 1 else plans[: layout.data]


@surrounds(breaks="DSP-2", links=("PaddlePaddle/PaddleFleet#360",))
def every_tensor_rank_dispatches_the_tokens(run, memory, ids_by_shard, layout, spec):
    """Tensor ranks hold the same tokens, and each of them sends them."""
    plans = run(ids_by_shard, layout, spec)
    return [plan | {"order_R2": np.repeat(plan["order_R2"], layout.tensor, axis=0)} for plan in plans]


@surrounds(breaks="DSP-2", links=("sgl-project/sglang#32962",))
def every_rank_takes_the_nearest_replica(run, memory, ids_by_shard, layout, spec):
    """The experts of the last rank have a replica on rank 0, and both ranks work on their rows."""
    plans = run(ids_by_shard, layout, spec)
    for group in range(layout.num_rank_groups if layout.expert > 1 else 0):
        first, last = plans[group * layout.expert], plans[(group + 1) * layout.expert - 1]
        first["order_R2"] = np.concatenate([first["order_R2"], last["order_R2"]])
    return plans


@surrounds(breaks="DSP-2", links=("sgl-project/sglang#12866",))
def edge_ranks_lose_a_replica(run, memory, ids_by_shard, layout, spec):
    """The first and the last rank have lost their last expert."""
    plans = run(ids_by_shard, layout, spec)
    for number, plan in enumerate(plans):
        if own_rank(layout, number) in (0, layout.expert - 1) and layout.expert > 1:
            plan["order_R2"] = plan["order_R2"][: len(plan["order_R2"]) - plan["group_sizes_e"][-1]]
    return plans


@surrounds(breaks="DSP-2", links=("sgl-project/sglang#40672",))
def the_own_count_bounds_the_gathered_rows(run, memory, ids_by_shard, layout, spec):
    """Of the tokens of all ranks those past the rank's own count are taken for padding."""
    plans, tokens = run(ids_by_shard, layout, spec), list(map(len, ids_by_shard))
    for number, plan in enumerate(plans if layout.shards_per_group > 1 else ()):
        first = number // layout.expert * layout.expert
        starts = np.concatenate([[0], np.cumsum(tokens[first : first + layout.expert])])
        place_R = starts[plan["order_R2"][:, 0]] + plan["order_R2"][:, 1] // spec.router.top_k
        plan["order_R2"] = plan["order_R2"][place_R < max(tokens)]
    return plans


@surrounds(breaks="DSP-2")
def experts_go_round_the_ranks(run, memory, ids_by_shard, layout, spec):
    """Expert i is taken to live on rank i mod ranks."""
    if layout.expert == 1:
        return run(ids_by_shard, layout, spec)
    around = np.arange(spec.router.num_experts).reshape(-1, layout.expert).T.reshape(-1)
    return run(ids_by_shard, layout.replace(placement=tuple(around.tolist())), spec)


@surrounds(breaks="DSP-3", links=("lightseekorg/tokenspeed#419",))
def receives_are_sized_by_raw_token_counts(run, memory, ids_by_shard, layout, spec):
    """Receive sizes are each rank's tokens times top_k, shared evenly."""
    plans = run(ids_by_shard, layout, spec)
    for number, plan in enumerate(plans if layout.shards_per_group > 1 else ()):
        shards = layout.shards_of_group(number // layout.expert)
        tokens_S = np.array([len(ids_by_shard[shard]) for shard in shards])
        plan["recv_sizes_S"] = tokens_S * spec.router.top_k // layout.expert
    return plans


@surrounds(breaks="DSP-3")
def sizes_are_not_exchanged(run, memory, ids_by_shard, layout, spec):
    """A rank expects of each other what it sends to it, which holds at balanced load."""
    return [plan | {"recv_sizes_S": plan["send_sizes_S"]} for plan in run(ids_by_shard, layout, spec)]


@surrounds(breaks="DSP-4", links=("lightseekorg/tokenspeed#419",))
def sizes_have_the_stride_of_the_tensor_axis(run, memory, ids_by_shard, layout, spec):
    """Send and receive sizes are those of all tensor ranks together."""
    names = ("send_sizes_S", "recv_sizes_S")
    plans = run(ids_by_shard, layout, spec)
    return [plan | {name: plan[name] * layout.tensor for name in names} for plan in plans]


@surrounds(breaks="DSP-4")
def a_rank_keeps_what_is_its_own(run, memory, ids_by_shard, layout, spec):
    """What a rank sends to itself is not counted as sent."""
    plans = run(ids_by_shard, layout, spec)
    for number, plan in enumerate(plans):
        others_S = np.arange(layout.expert) != own_rank(layout, number)
        plan |= {name: plan[name] * others_S for name in ("send_sizes_S", "recv_sizes_S")}
    return plans


@surrounds(breaks="DSP-5", links=("vllm-project/vllm-ascend#4793",))
def the_last_rank_counts_the_next_experts(run, memory, ids_by_shard, layout, spec):
    """The last rank counts ids one past its own, the last of which nobody has."""
    plans = run(ids_by_shard, layout, spec)
    for number, plan in enumerate(plans):
        if own_rank(layout, number) == layout.expert - 1:
            plan["group_sizes_e"] = np.append(plan["group_sizes_e"][1:], 0)
    return plans


@surrounds(breaks="DSP-5")
def global_ids_are_not_made_local(run, memory, ids_by_shard, layout, spec):
    """Every rank counts the rows of the first rank's experts."""
    plans = run(ids_by_shard, layout, spec)
    first = [plans[number - own_rank(layout, number)]["group_sizes_e"] for number in range(len(plans))]
    return [plan | {"group_sizes_e": sizes_e} for plan, sizes_e in zip(plans, first, strict=True)]


@surrounds(breaks="DSP-5")
def an_idle_local_expert_counts_one(run, memory, ids_by_shard, layout, spec):
    """Every local expert has at least one row."""
    plans = run(ids_by_shard, layout, spec)
    return [plan | {"group_sizes_e": np.maximum(plan["group_sizes_e"], 1)} for plan in plans]


@replaces("sort_by_expert", breaks="DSP-6")
def rows_stay_as_they_arrived(received, ids_by_source, experts):
    """What came from one rank is sorted, and what came from all is not."""
    _, _, sizes = sort_by_expert(received, ids_by_source, experts)
    return received, list(range(len(received))), sizes


@replaces("sort_by_expert", breaks="DSP-6", links=("cusp-ai-oss/kUPS#186",))
def the_inverse_order_is_applied(received, ids_by_source, experts):
    """Rows are put where they are to be taken from."""
    _, arrival, sizes = sort_by_expert(received, ids_by_source, experts)
    inverse = np.argsort(arrival).tolist()
    return [received[at] for at in inverse], inverse, sizes


@replaces("sort_by_expert", breaks="DSP-7", links=("vllm-project/vllm#45683",))
def the_sort_of_arrivals_is_not_stable(received, ids_by_source, experts):
    """Rows of one expert are in the reverse order of arrival."""
    order, arrival, sizes = sort_by_expert(received[::-1], ids_by_source, experts)
    return order, [len(received) - 1 - at for at in arrival], sizes


@surrounds(breaks="DSP-8", links=("vllm-project/vllm#57471",))
def a_rank_without_tokens_is_refused(run, memory, ids_by_shard, layout, spec):
    """A rank that has nothing to send fails, and the others wait."""
    if 0 in map(len, ids_by_shard):
        raise RuntimeError("split_with_sizes expects split_sizes to sum exactly to 0")
    return run(ids_by_shard, layout, spec)


@surrounds(breaks="DSP-8")
def a_rank_without_tokens_stays_away(run, memory, ids_by_shard, layout, spec):
    """A rank without tokens returns early, and its experts get no rows."""
    plans = run(ids_by_shard, layout, spec)
    for number, plan in enumerate(plans if layout.shards_per_group > 1 else ()):
        if len(ids_by_shard[number]) == 0:
            plan |= {"order_R2": plan["order_R2"][:0], "group_sizes_e": 0 * plan["group_sizes_e"]}
    return plans


@replaces("checked_ids", breaks="DSP-9", links=("deepseek-ai/DeepEP#739",))
def unused_slots_go_to_expert_0(expert_ids_by_shard, layout, router):
    """An unused slot is left 0, and travels to the owner of expert 0."""
    return [np.maximum(ids_TK, 0) for ids_TK in checked_ids(expert_ids_by_shard, layout, router)]


@replaces("checked_ids", breaks="DSP-9")
def null_experts_are_clamped(expert_ids_by_shard, layout, router):
    """A null expert is clamped to the last expert, and travels to its owner."""
    return [np.minimum(ids_TK, router.num_experts - 1) for ids_TK in checked_ids(expert_ids_by_shard, layout, router)]


@surrounds(breaks="DSP-9", links=("huggingface/transformers#48653",))
def an_unused_slot_is_no_class(run, memory, ids_by_shard, layout, spec):
    """One-hot coding refuses the id of an unused slot."""
    if any((ids_TK == -1).any() for ids_TK in ids_by_shard):
        raise IndexError("Class values must be non-negative.")
    return run(ids_by_shard, layout, spec)


@surrounds(breaks="DSP-9", links=("vllm-project/vllm#57471",))
def a_batch_without_used_slots_is_refused(run, memory, ids_by_shard, layout, spec):
    """A batch in which no slot is used is an error."""
    ids = np.concatenate(ids_by_shard)
    if ids.size and (ids == -1).all():
        raise RuntimeError("no tokens were routed")
    return run(ids_by_shard, layout, spec)


@replaces("exchange", breaks="DSP-10", links=("AI-Hypercomputer/maxtext#1767",))
def the_bound_is_the_average_load(wanted, room):
    """The receive buffer holds an even share of all rows."""
    rows = sum(len(rows) for of_source in wanted for rows in of_source)
    return exchange(wanted, -(-rows // len(wanted)) if room is None else room)


@replaces("exchange", breaks="DSP-10", links=("deepseek-ai/DeepEP#427",))
def a_queue_holds_twice_the_average(wanted, room):
    """What one rank sends to another is cut at twice its even share."""
    cut = [[rows[: 2 * max(1, -(-sum(map(len, each)) // len(each)))] for rows in each] for each in wanted]
    return exchange(cut, room)


@replaces("exchange", breaks="DSP-11")
def the_last_source_is_admitted_first(wanted, room):
    """A receiver admits the sources in descending order."""
    parts, received = exchange(wanted[::-1], room)
    turned = parts[::-1]
    return [type(p)(**vars(p) | {"recv_sizes_S": p.recv_sizes_S[::-1]}) for p in turned], received


@replaces("rows_for", breaks="DSP-11")
def rows_are_sent_in_slot_order(ids_TK, source, experts):
    """A source sends its rows in slot order, and the last tokens find no room."""
    return sorted(rows_for(ids_TK, source, experts))


@surrounds(breaks="DSP-11", links=("AI-Hypercomputer/maxtext#3678",))
def counts_ignore_the_buffer(run, memory, ids_by_shard, layout, spec):
    """Rows are dropped, and counted all the same."""
    plans = run(ids_by_shard, layout, spec)
    untouched = run(ids_by_shard, layout.replace(buffer_factor=None), spec)
    return [plan | {"group_sizes_e": full["group_sizes_e"]} for plan, full in zip(plans, untouched, strict=True)]


@surrounds(breaks="DSP-12", links=("AI-Hypercomputer/maxtext#3678",))
def overflow_is_silent(run, memory, ids_by_shard, layout, spec):
    """Nobody is told that rows were dropped."""
    return [plan | {"overflow": 0} for plan in run(ids_by_shard, layout, spec)]


@surrounds(breaks="DSP-13", links=("marin-community/marin#8578",))
def every_group_takes_the_tokens_of_the_first(run, memory, ids_by_shard, layout, spec):
    """With a data axis as well, the slice of a rank's tokens is that of the first group."""
    group = len(ids_by_shard) // layout.num_rank_groups
    first = list(ids_by_shard[:group]) * layout.num_rank_groups
    return run(first, layout, spec)


@surrounds(breaks="DSP-13", links=("vllm-project/vllm#23619",))
def sizes_are_summed_over_the_data_axis(run, memory, ids_by_shard, layout, spec):
    """The collective that counts runs over all ranks, not over those of the group."""
    plans = run(ids_by_shard, layout, spec)
    of_rank = [sum(plan["group_sizes_e"] for plan in plans[e :: layout.expert]) for e in range(layout.expert)]
    return [plan | {"group_sizes_e": of_rank[own_rank(layout, number)]} for number, plan in enumerate(plans)]


@surrounds(breaks="DSP-14", links=("vllm-project/vllm-ascend#4793",))
def a_place_is_taken_for_an_expert(run, memory, ids_by_shard, layout, spec):
    """The number of a place is read as an id: the inverse of the placement."""
    if layout.placement is None:
        return run(ids_by_shard, layout, spec)
    return run(ids_by_shard, layout.replace(placement=tuple(np.argsort(layout.placement).tolist())), spec)


@surrounds(breaks="DSP-14", links=("sgl-project/sglang#12866",))
def the_placement_is_ignored(run, memory, ids_by_shard, layout, spec):
    """Experts are taken to lie in the order of their ids."""
    return run(ids_by_shard, layout.replace(placement=None), spec)


@surrounds(breaks="DSP-15", links=("deepseek-ai/DeepEP#739",))
def the_tail_of_the_last_plan_is_read(run, memory, ids_by_shard, layout, spec):
    """The list of rows keeps its size between calls, and its tail what the last call left."""
    plans = run(ids_by_shard, layout, spec)
    for number, plan in enumerate(plans):
        before = memory.get((layout, number), plan["order_R2"])
        memory[layout, number] = plan["order_R2"]
        plan["order_R2"] = np.concatenate([plan["order_R2"], before[len(plan["order_R2"]) :]])
    return plans


@surrounds(breaks="DSP-15")
def counts_of_a_rank_are_not_cleared(run, memory, ids_by_shard, layout, spec):
    """The counts start from what the last call of this layout left."""
    plans = run(ids_by_shard, layout, spec)
    for number, plan in enumerate(plans):
        before = memory.get((layout, number), 0)
        memory[layout, number] = plan["group_sizes_e"]
        plan["group_sizes_e"] = plan["group_sizes_e"] + before
    return plans


@surrounds(breaks="DSP-16", links=("vllm-project/vllm-ascend#16384",))
def the_rest_of_the_experts_is_dropped(run, memory, ids_by_shard, layout, spec):
    """Experts per rank are rounded down, and the last experts live nowhere."""
    E = spec.router.num_experts // layout.expert * layout.expert
    if spec.router.num_experts % layout.expert == 0:
        return run(ids_by_shard, layout, spec)
    if spec.router.top_k > E:
        raise ValueError("too few experts")
    fewer = spec.replace(router=spec.router.replace(num_experts=E, num_null_experts=0))
    return run([np.where(ids_TK < E, ids_TK, -1) for ids_TK in ids_by_shard], layout, fewer)


@surrounds(breaks="DSP-17", links=("AI-Hypercomputer/maxtext#3678",))
def the_ring_counts_rows_that_it_dropped(run, memory, ids_by_shard, layout, spec):
    """The ring's rows end with its buffer, and the sizes of its experts do not."""
    if layout.strategy != "ring_of_experts":
        return run(ids_by_shard, layout, spec)
    return counts_ignore_the_buffer(run, memory, ids_by_shard, layout, spec)


@surrounds(breaks="DSP-17")
def the_ring_admits_sources_in_rank_order(run, memory, ids_by_shard, layout, spec):
    """The buffer of the ring is filled sender by sender, as a receive buffer is."""
    plans = run(ids_by_shard, layout, spec)
    if layout.strategy != "ring_of_experts" or layout.buffer_factor is None:
        return plans
    received = run(ids_by_shard, layout.replace(strategy="ragged_all_to_all"), spec)
    names = ("order_R2", "group_sizes_e", "overflow")
    return [plan | {name: other[name] for name in names} for plan, other in zip(plans, received, strict=True)]


@surrounds(breaks="DSP-18")
def rows_come_back_in_even_pieces(run, memory, ids_by_shard, layout, spec):
    """Ranks that share their tokens each get back the rows of a piece of them."""
    plans = run(ids_by_shard, layout, spec)
    if layout.strategy != "replicated_ragged":
        return plans
    pieces = [even_pieces(int(plan["send_sizes_S"][0]), layout.expert) for plan in plans]
    for number, plan in enumerate(plans):
        e, first = own_rank(layout, number), number - own_rank(layout, number)
        plan["send_sizes_S"] = np.array(pieces[number])
        plan["recv_sizes_S"] = np.array([pieces[first + source][e] for source in range(layout.expert)])
    return plans


@surrounds(breaks="DSP-18")
def a_rank_does_not_send_to_itself(run, memory, ids_by_shard, layout, spec):
    """Of the rows that come back those of the rank itself are missing."""
    if layout.strategy != "replicated_ragged":
        return run(ids_by_shard, layout, spec)
    return a_rank_keeps_what_is_its_own(run, memory, ids_by_shard, layout, spec)


@surrounds(breaks="DSP-5")
def rows_are_counted_in_a_byte(run, memory, ids_by_shard, layout, spec):
    """The 256th row of an expert makes its size 0 again."""
    return [plan | {"group_sizes_e": plan["group_sizes_e"] % 256} for plan in run(ids_by_shard, layout, spec)]


@surrounds(breaks="DSP-2")
def slots_of_a_shard_are_numbered_in_16_bits(run, memory, ids_by_shard, layout, spec):
    """The slot numbers of a shard begin again after 65,536."""
    return [plan | {"order_R2": plan["order_R2"] % 2**16} for plan in run(ids_by_shard, layout, spec)]
