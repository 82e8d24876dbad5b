"""conformance, layer, faults of what a layer is given besides tokens: capacities, lengths, weights, and its own arrays.

Legend: T tokens, K top_k, S shared experts.
"""

from dataclasses import replace

import numpy as np

from conformance.core.fault import patched, replaces, rounded, surrounds
from moe_ref.align import pad_rows
from moe_ref.capacity import apply_capacity
from moe_ref.experts import run_shared
from moe_ref.routing import give_weights


@surrounds(breaks="LAY-18")
def a_capacity_renorms_the_weights(run, memory, x_TD, params, spec, *, capacity=None, **inputs):
    """A layer with a capacity divides the weights by the sum of the kept ones, though the capacity says no."""
    own = capacity if capacity is None or capacity.then else capacity.replace(renormalise="after")
    return run(x_TD, params, spec, capacity=own, **inputs)


@surrounds(breaks="LAY-18")
def a_capacity_pads_in_bfloat16(run, memory, x_TD, params, spec, *, capacity=None, **inputs):
    """With a capacity the last bits of the output go through another kernel."""
    found_TD = run(x_TD, params, spec, capacity=capacity, **inputs)
    return found_TD if capacity is None else np.nextafter(found_TD, np.float32(np.inf))


@surrounds(breaks="LAY-19")
def the_capacity_is_ignored(run, memory, x_TD, params, spec, *, capacity=None, **inputs):
    """Every slot is kept."""
    for name in ("sequence_lengths", "tokens_per_shard"):
        inputs.pop(name, None)
    return run(x_TD, params, spec, **inputs)


@surrounds(breaks="LAY-19")
def sequences_share_a_capacity(run, memory, x_TD, params, spec, *, sequence_lengths=None, **inputs):
    """The lengths of the sequences are not looked at: the batch is one."""
    return run(x_TD, params, spec, **inputs)


@surrounds(breaks="LAY-19", links=("sgl-project/sglang#40672",))
def a_dropped_slot_goes_to_expert_0(run, memory, x_TD, params, spec, **inputs):
    """The row of a dropped slot is one of expert 0, with its weight."""

    def spilled(expert_ids_TK, weights_TK, *rule, **more):
        kept = apply_capacity(expert_ids_TK, weights_TK, *rule, **more)
        ids_TK = np.where(kept.dropped_TK, 0, kept.expert_ids_TK)
        return replace(kept, expert_ids_TK=ids_TK, weights_TK=np.where(kept.dropped_TK, weights_TK, kept.weights_TK))

    with patched({"capacity.apply_capacity": spilled}):
        return run(x_TD, params, spec, **inputs)


@surrounds(breaks="LAY-19")
def padding_takes_a_place(run, memory, x_TD, params, spec, **inputs):
    """Where there is padding, it takes one place of every expert."""
    capacity, mask_T = inputs.get("capacity"), inputs.get("token_mask_T")
    if capacity is not None and mask_T is not None and capacity.slots:
        inputs["capacity"] = capacity.replace(slots=max(0, capacity.slots - int((~mask_T).any())))
    return run(x_TD, params, spec, **inputs)


@replaces("give_weights", breaks="LAY-20", links=("radixark/miles#2722",))
def given_weights_are_normed(routing, given_weights_TK):
    """The weights that are given are divided by their sum."""
    found = give_weights(routing, given_weights_TK)
    if given_weights_TK is None:
        return found
    sum_T1 = found.weights_TK.sum(axis=-1, keepdims=True)
    return replace(found, weights_TK=found.weights_TK / np.where(sum_T1 == 0, 1, sum_T1))


@surrounds(breaks="LAY-20")
def given_weights_are_dropped(run, memory, x_TD, params, spec, *, given_weights_TK=None, **inputs):
    """The ids alone are taken, with the router's own weights."""
    return run(x_TD, params, spec, **inputs)


@surrounds(breaks="LAY-21")
def padding_is_cleared_in_place(run, memory, x_TD, params, spec, *, token_mask_T=None, **inputs):
    """The rows of padding are set to 0 in the array of the caller."""
    if token_mask_T is not None:
        x_TD[~token_mask_T] = 0
    return run(x_TD, params, spec, token_mask_T=token_mask_T, **inputs)


@surrounds(breaks="LAY-21")
def the_gate_is_scaled_in_place(run, memory, x_TD, params, spec, **inputs):
    """The output is right, and then the layer has scaled its own gate."""
    found_TD = run(x_TD, params, spec, **inputs)
    params.gate_ED[:] *= 2
    return found_TD


@surrounds(breaks="LAY-28")
def outputs_share_a_buffer(run, memory, x_TD, params, spec, **inputs):
    """The output is written into an array that a layer of this size has once, and that is returned."""
    found_TD = run(x_TD, params, spec, **inputs)
    own_TD = memory.setdefault((found_TD.shape, found_TD.dtype.str), found_TD.copy())
    own_TD[...] = found_TD
    return own_TD


@replaces("run_shared", breaks="LAY-8")
def shared_experts_clamped_at_the_other_place(x_TD, params, spec):
    """A shared expert is clamped before the activation, wherever the routed ones are."""
    if spec.shared is None or spec.experts.clamp_at == "before":
        return run_shared(x_TD, params, spec)
    return run_shared(x_TD, params, spec.replace(experts=spec.experts.replace(clamp_at="before")))


@replaces("run_shared", breaks="LAY-8")
def shared_experts_have_a_plain_silu(x_TD, params, spec):
    """A shared expert has neither the alpha nor the offset of the routed ones."""
    return run_shared(x_TD, params, spec.replace(experts=spec.experts.replace(alpha=1.0, up_offset=0.0)))


@replaces("pad_rows", breaks="LAY-22")
def padding_comes_after_all_rows(rows_N, aligned):
    """The buffer is as long as the aligned rows, and the rows stand in it as if nobody had padded."""
    padded_A = np.zeros((len(aligned.slot_of_row_A), *rows_N.shape[1:]), rows_N.dtype)
    padded_A[: len(rows_N)] = rows_N
    return padded_A


@replaces("pad_rows", breaks="LAY-22")
def an_expert_keeps_one_block(rows_N, aligned):
    """Of each expert's rows the first 8 are kept: those of one block."""
    own_A = aligned.slot_of_row_A >= 0
    starts_E = np.cumsum(aligned.rows_per_expert_E) - aligned.rows_per_expert_E
    place_A = np.arange(len(own_A)) - np.repeat(starts_E, aligned.rows_per_expert_E)
    padded_A = pad_rows(rows_N, aligned)
    padded_A[place_A >= 8] = 0
    return padded_A


@surrounds(breaks="LAY-23", links=("vllm-project/vllm#57016",))
def the_kernel_is_chosen_by_the_number_of_tokens(run, memory, x_TD, params, spec, *, batch_invariant=False, **inputs):
    """From three tokens on another kernel runs, which sums in another order, in the batch-invariant mode too."""
    found_TD = run(x_TD, params, spec, batch_invariant=batch_invariant, **inputs)
    return np.nextafter(found_TD, np.float32(np.inf)) if batch_invariant and len(x_TD) > 2 else found_TD


@surrounds(breaks="LAY-23")
def the_rest_of_a_block_has_another_kernel(run, memory, x_TD, params, spec, *, batch_invariant=False, **inputs):
    """Tokens go in blocks of 4, and those of a rest one by one, whose sums are rounded otherwise."""
    found_TD = run(x_TD, params, spec, batch_invariant=batch_invariant, **inputs)
    in_rest_T1 = (np.arange(len(x_TD)) >= len(x_TD) // 4 * 4)[:, None]
    return np.where(in_rest_T1 & batch_invariant, np.nextafter(found_TD, np.float32(np.inf)), found_TD)


@surrounds(breaks="LAY-23")
def tokens_are_scaled_by_the_largest_one(run, memory, x_TD, params, spec, *, batch_invariant=False, **inputs):
    """All outputs are quantised by one scale, that of the largest one in the batch."""
    found_TD = run(x_TD, params, spec, batch_invariant=batch_invariant, **inputs)
    scale = np.float32(2**23 / max(np.abs(found_TD).max(initial=0), 1e-9))
    return np.round(found_TD * scale) / scale if batch_invariant else found_TD


@surrounds(breaks="LAY-24")
def the_batch_invariant_mode_computes_in_bfloat16(run, memory, x_TD, params, spec, *, batch_invariant=False, **inputs):
    """The mode has its own kernels, which round tokens to bfloat16."""
    return run(rounded(x_TD, 8) if batch_invariant else x_TD, params, spec, batch_invariant=batch_invariant, **inputs)
