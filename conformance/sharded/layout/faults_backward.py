"""conformance, sharded, faults of sharded layers, backward: right outputs, gradients that are partial or counted twice.

Legend: T tokens, D model dim, F expert hidden dim, E experts, R rows on this rank.
"""

from collections.abc import Iterable

import numpy as np

from conformance.core.fault import patched, surrounds
from conformance.layer.predicates import BIASES, MATRICES, ROUTER, SHARED
from conformance.sharded.layout.faults import experts_of_others, without_experts
from conformance.sharded.verdicts import Gradients
from moe_ref.backward.layer import combine_backward, experts_backward


def times(grads: Gradients, factor: float, names: Iterable[str]) -> Gradients:
    """The gradients with those of these names times a factor."""
    return grads | {name: np.asarray(grads[name] * np.float32(factor)) for name in names if name in grads}


@surrounds(breaks="LYT-18", links=("jax-ml/jax#26915",))
def an_exchange_has_no_transpose(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """Nobody wrote the backward pass of the exchange."""
    if layout.facts.has_buffer:
        raise NotImplementedError("Differentiation rule for 'ragged_all_to_all' not implemented")
    return run(x_by_shard, params, spec, layout, *arguments, **inputs)


@surrounds(breaks="LYT-18")
def gradients_stay_in_pieces(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """A rank returns the gradients of its own experts alone."""
    found = run(x_by_shard, params, spec, layout, *arguments, **inputs)
    for rank, grads in enumerate(found):
        own = list(layout.experts_of(layout.coordinates(rank)[2], spec.router.num_experts))
        grads |= {name: grads[name][own] for name in MATRICES if name in grads}
    return found


@surrounds(breaks="LYT-19", links=("NVIDIA-NeMo/Automodel#1260",))
def tokens_get_the_gradients_of_their_own_ranks_experts(run, memory, x_by_shard, params, spec, layout, *rest, **inputs):
    """The gradients of the tokens are not summed over the ranks that own their experts."""
    found = run(x_by_shard, params, spec, layout, *rest, **inputs)
    for rank, grads in enumerate(found if layout.expert > 1 else ()):
        local = without_experts(params, experts_of_others(layout, spec, rank))
        grads["x_TD"] = run(x_by_shard, local, spec, layout, *rest, **inputs)[rank]["x_TD"]
    return found


@surrounds(breaks="LYT-19", links=("jax-ml/jax#26915",))
def what_was_sent_gets_no_gradient(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """The exchange sends no gradient back."""
    found = run(x_by_shard, params, spec, layout, *arguments, **inputs)
    return [times(grads, layout.expert == 1, ["x_TD"]) for grads in found]


@surrounds(breaks="LYT-19", links=("NVIDIA/Megatron-LM#7452",))
def a_partial_gradient_is_taken_for_the_whole(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """Each tensor rank keeps its part of the gradient of the tokens."""
    found = run(x_by_shard, params, spec, layout, *arguments, **inputs)
    return [times(grads, 1 / layout.tensor, ["x_TD"]) for grads in found]


@surrounds(breaks="LYT-20", links=("NVIDIA/Megatron-LM#1628",))
def experts_are_reduced_as_dense_parameters(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """With one expert rank the experts are taken for dense parameters, and summed over the tensor axis as well."""
    found = run(x_by_shard, params, spec, layout, *arguments, **inputs)
    return [times(grads, layout.tensor if layout.expert == 1 else 1, MATRICES) for grads in found]


@surrounds(breaks="LYT-20")
def gradients_are_averaged_over_shards(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """The gradients of the experts are a mean over the groups, not a sum."""
    found = run(x_by_shard, params, spec, layout, *arguments, **inputs)
    return [times(grads, 1 / layout.num_rank_groups, MATRICES) for grads in found]


@surrounds(breaks="LYT-20")
def replicated_ranks_count_their_tokens_twice(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """Ranks that share their tokens each add the gradient of the whole."""
    found = run(x_by_shard, params, spec, layout, *arguments, **inputs)
    factor = layout.expert if layout.facts.shares_tokens else 1
    return [times(grads, factor, MATRICES) for grads in found]


@surrounds(breaks="LYT-20", links=("NVIDIA/Megatron-LM#5916",))
def slices_of_other_tensor_ranks_are_left_out(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """The slices of tensor ranks past the first are taken for copies, and skipped."""
    found = run(x_by_shard, params, spec, layout, *arguments, **inputs)
    first_F = np.arange(spec.experts.hidden_dim) < spec.experts.hidden_dim // layout.tensor
    for grads in found:
        grads |= {
            name: grads[name] * first_F.astype(np.float32) for name in ("w_up_EDF", "w_gate_EDF") if name in grads
        }
        grads["w_down_EFD"] = grads["w_down_EFD"] * first_F[:, None].astype(np.float32)
    return found


@surrounds(breaks="LYT-21")
def the_bias_of_down_is_counted_by_every_tensor_rank(run, memory, x_by_shard, params, spec, layout, *rest, **inputs):
    """Tensor ranks share one bias, and each adds its gradient."""
    found = run(x_by_shard, params, spec, layout, *rest, **inputs)
    return [times(grads, layout.tensor, ["b_down_ED"]) for grads in found]


@surrounds(breaks="LYT-21", links=("AI-Hypercomputer/maxtext#3699",))
def the_bias_reaches_rows_past_the_counts(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """The row past those that a rank received, which still holds the first one, counts for its last expert's biases."""
    with patched({"experts_backward": with_a_row_past_the_counts} if layout.expert > 1 else {}):
        return run(x_by_shard, params, spec, layout, *arguments, **inputs)


def with_a_row_past_the_counts(d_rows_RD, trace, group_sizes_e, params, spec):
    """The biases of the last expert get the gradient of the first row besides."""
    d_inputs_RD, grads = experts_backward(d_rows_RD, trace, group_sizes_e, params, spec)
    if spec.bias and len(d_rows_RD):
        is_first_R1 = (np.arange(len(d_rows_RD)) == 0)[:, None].astype(d_rows_RD.dtype)
        _, of_first = experts_backward(d_rows_RD * is_first_R1, trace, group_sizes_e, params, spec)
        for name in (n for n in BIASES if grads[n] is not None):
            grads[name][-1] += of_first[name].sum(axis=0)
    return d_inputs_RD, grads


@surrounds(breaks="LYT-22", links=("huggingface/kernels-community#1056",))
def rows_of_the_tail_reach_slot_0(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """A row that nobody sent has slot 0 as its place, and the weight there gets the gradient of the last slot's row."""
    with patched({"combine_backward": with_a_row_at_slot_0} if layout.expert > 1 else {}):
        return run(x_by_shard, params, spec, layout, *arguments, **inputs)


def with_a_row_at_slot_0(d_routed_TD, slot_outputs_TKD, weights_TK, spec):
    """The first weight gets the gradient of the last slot's output besides."""
    d_slots_TKD, d_weights_TK = combine_backward(d_routed_TD, slot_outputs_TKD, weights_TK, spec)
    if d_weights_TK.size and spec.weight_on == "output":
        d_weights_TK[0, 0] += spec.output_scale * d_routed_TD[0] @ slot_outputs_TKD[-1, -1]
    return d_slots_TKD, d_weights_TK


@surrounds(breaks="LYT-22", links=("NVIDIA/Megatron-LM#7452",))
def tensor_ranks_count_the_gate_each(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """The gate, which every tensor rank has, is summed over them."""
    found = run(x_by_shard, params, spec, layout, *arguments, **inputs)
    return [times(grads, layout.tensor, ROUTER) for grads in found]


@surrounds(breaks="LYT-22")
def the_gate_is_not_reduced_over_expert_ranks(run, memory, x_by_shard, params, spec, layout, d_output_by_shard, **more):
    """The gate gets the gradient of the first shard of each group."""
    found = run(x_by_shard, params, spec, layout, d_output_by_shard, **more)
    own = [d_TD * (shard % layout.shards_per_group == 0) for shard, d_TD in enumerate(d_output_by_shard)]
    partial = run(x_by_shard, params, spec, layout, own, **more)
    return [grads | {name: some[name] for name in ROUTER if name in some}
            for grads, some in zip(found, partial, strict=True)]  # fmt: skip


@surrounds(breaks="LYT-23", links=("vllm-project/vllm#49366",))
def shared_experts_are_summed_over_tensor_ranks(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """The shared experts, which are whole on every tensor rank, are summed over them."""
    found = run(x_by_shard, params, spec, layout, *arguments, **inputs)
    return [times(grads, layout.tensor, SHARED) for grads in found]


@surrounds(breaks="LYT-23")
def shared_experts_are_reduced_as_experts(run, memory, x_by_shard, params, spec, layout, d_output_by_shard, **inputs):
    """The shared experts are reduced over the groups, and not over the ranks of a group."""
    found = run(x_by_shard, params, spec, layout, d_output_by_shard, **inputs)
    own = [d_TD * (shard % layout.shards_per_group == 0) for shard, d_TD in enumerate(d_output_by_shard)]
    partial = run(x_by_shard, params, spec, layout, own, **inputs)
    return [grads | {name: some[name] for name in SHARED if name in some}
            for grads, some in zip(found, partial, strict=True)]  # fmt: skip


@surrounds(breaks="LYT-24", links=("NVIDIA/Megatron-LM#7452",))
def each_rank_sums_in_an_order_of_its_own(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """Every rank adds the same gradients in another order."""
    found = run(x_by_shard, params, spec, layout, *arguments, **inputs)
    for grads in found[1::2]:
        grads["gate_ED"] = np.nextafter(grads["gate_ED"], np.inf, dtype=np.float32)
    return found


@surrounds(breaks="LYT-24")
def the_last_rank_keeps_its_part(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """The gradients are reduced to the first ranks, and the last keeps a part."""
    found = run(x_by_shard, params, spec, layout, *arguments, **inputs)
    return [*found[:-1], times(found[-1], 1 / layout.num_ranks, MATRICES)]


@surrounds(breaks="LYT-25", links=("openxla/tokamax#887", "openxla/tokamax#1016"))
def an_idle_expert_gets_the_block_before_it(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """An empty group reads the block that ends where it begins."""
    found = run(x_by_shard, params, spec, layout, *arguments, **inputs)
    for grads in found:
        w_down_EFD = grads["w_down_EFD"]
        idle_E = ~w_down_EFD.any(axis=(1, 2))
        grads["w_down_EFD"] = np.where(idle_E[:, None, None], np.roll(w_down_EFD, 1, axis=0), w_down_EFD)
    return found


@surrounds(breaks="LYT-25", links=("meta-pytorch/MSLK#158",))
def an_idle_expert_keeps_what_was_there(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """Nobody writes the gradients of an expert without tokens."""
    found = run(x_by_shard, params, spec, layout, *arguments, **inputs)
    last, memory[layout, spec] = memory.get((layout, spec)), found[0]["w_down_EFD"]
    for grads in found if last is not None else ():
        idle_E = ~grads["w_down_EFD"].any(axis=(1, 2))
        grads["w_down_EFD"] = np.where(idle_E[:, None, None], last, grads["w_down_EFD"])
    return found


@surrounds(breaks="LYT-26", links=("huggingface/transformers#48205", "pytorch/pytorch#193633"))
def gradients_of_the_last_call_are_weighed_by_0(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """The rows past the counts keep what the last backward pass left, and are added with weight 0."""
    found = run(x_by_shard, params, spec, layout, *arguments, **inputs)
    last, memory["last"] = memory.get("last", 0.0), sum(grads["x_TD"].sum() for grads in found)
    return [grads | {"x_TD": grads["x_TD"] + 0 * last} for grads in found]


@surrounds(breaks="LYT-26", links=("AI-Hypercomputer/maxtext#3699",))
def the_tail_of_the_last_call_reaches_a_bias(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """The gradient of a bias sums the rows past the counts as well, and they hold what the last call left."""
    found = run(x_by_shard, params, spec, layout, *arguments, **inputs)
    last, memory["last"] = memory.get("last", 0.0), sum(grads["x_TD"].sum() for grads in found)
    return [grads | {n: grads[n] + 0 * last for n in BIASES if n in grads} for grads in found]


@surrounds(breaks="LYT-27", links=("meta-pytorch/MSLK#158",))
def an_empty_rank_fails_backward(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """A rank without tokens has no graph to go back through."""
    if 0 in map(len, x_by_shard) and any(map(len, x_by_shard)):
        raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
    return run(x_by_shard, params, spec, layout, *arguments, **inputs)


@surrounds(breaks="LYT-27")
def an_empty_rank_leaves_the_reduction(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """A rank without tokens has no gradient of the gate, not even that of the others."""
    found = run(x_by_shard, params, spec, layout, *arguments, **inputs)
    return [times(grads, len(grads["x_TD"]) > 0, ROUTER) for grads in found]


@surrounds(breaks="LYT-28", links=("huggingface/transformers#45621",))
def padding_takes_part_with_weight_0(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """Padding takes part with weight 0, which NaN survives."""
    found = run(x_by_shard, params, spec, layout, *arguments, **inputs)
    left = 0 * sum(x_TD.sum() for x_TD in x_by_shard)
    return [grads | {"gate_ED": grads["gate_ED"] + left} for grads in found]


@surrounds(breaks="LYT-28")
def padding_has_gradients(run, memory, x_by_shard, params, spec, layout, d_output_by_shard, *, token_mask_by_shard=None,
                          **inputs):  # fmt: skip
    """The mask stays forward, and the backward pass does not know it."""
    tokens = [np.nan_to_num(x_TD) for x_TD in x_by_shard]
    return run(tokens, params, spec, layout, d_output_by_shard, **inputs)


@surrounds(breaks="LYT-29", links=("AI-Hypercomputer/maxtext#3678",))
def dropped_slots_have_gradients(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """The backward pass does not know what the buffer dropped."""
    return run(x_by_shard, params, spec, layout.replace(buffer_factor=None), *arguments, **inputs)


@surrounds(breaks="LYT-29")
def the_weights_of_dropped_slots_have_gradients(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """The weight of a dropped slot gets the gradient of what its expert would have returned."""
    found = run(x_by_shard, params, spec, layout, *arguments, **inputs)
    whole = run(x_by_shard, params, spec, layout.replace(buffer_factor=None), *arguments, **inputs)
    return [grads | {name: full[name] for name in ROUTER if name in full}
            for grads, full in zip(found, whole, strict=True)]  # fmt: skip


@surrounds(breaks="LYT-30")
def chunks_are_averaged(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """The gradients of chunks of tokens are averaged, not summed."""
    found = run(x_by_shard, params, spec, layout, *arguments, **inputs)
    return [times(grads, 1 / layout.num_token_chunks, (*MATRICES, *BIASES)) for grads in found]


@surrounds(breaks="LYT-30")
def the_first_piece_of_features_gets_all(run, memory, x_by_shard, params, spec, layout, *arguments, **inputs):
    """Of the pieces of the features the last get no gradient."""
    found = run(x_by_shard, params, spec, layout, *arguments, **inputs)
    first_D = np.arange(spec.experts.dim) < spec.experts.dim // layout.num_emb_chunks
    return [grads | {"w_up_EDF": grads["w_up_EDF"] * first_D[:, None].astype(np.float32)} for grads in found]
