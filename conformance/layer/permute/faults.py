"""conformance, layer, faults of permute: wrong rows and counts.

Legend: T tokens, K top_k, E experts, N used slots.
"""

import numpy as np

from conformance.core.fault import surrounds


@surrounds(breaks="PRM-1", links=("huggingface/transformers#43583",))
def counts_are_floats(run, memory, expert_ids_TK, num_experts):
    """Rows are counted in floating point."""
    order_N, counts_E = run(expert_ids_TK, num_experts)
    return order_N, counts_E.astype(np.float32)


@surrounds(breaks="PRM-1")
def choices_counted_besides_experts(run, memory, expert_ids_TK, num_experts):
    """One count too many is returned, of the slots without an expert."""
    order_N, counts_E = run(expert_ids_TK, num_experts)
    return order_N, np.append(counts_E, expert_ids_TK.size - len(order_N))


@surrounds(breaks="PRM-2", links=("vllm-project/vllm-xpu-kernels#453",))
def rows_written_to_one_place(run, memory, expert_ids_TK, num_experts):
    """All tokens of an expert are written to its first row; the other rows keep it."""
    order_N, counts_E = run(expert_ids_TK, num_experts)
    starts_E = np.cumsum(counts_E) - counts_E
    return np.repeat(order_N[np.minimum(starts_E, len(order_N) - 1)], counts_E), counts_E


@surrounds(breaks="PRM-2", links=("ggml-org/llama.cpp#26295",))
def only_the_first_slot_is_dispatched(run, memory, expert_ids_TK, num_experts):
    """The search for a token's experts stops at its first one."""
    order_N, counts_E = run(expert_ids_TK, num_experts)
    return order_N[order_N % expert_ids_TK.shape[1] == 0], counts_E


@surrounds(breaks="PRM-2", links=("ggml-org/llama.cpp#26310",))
def row_list_of_an_expert_too_short(run, memory, expert_ids_TK, num_experts):
    """The row list of an expert ends one short of the number of tokens, and the last row is lost."""
    order_N, counts_E = run(expert_ids_TK, num_experts)
    full = np.flatnonzero(counts_E == len(expert_ids_TK))
    ends_E = np.cumsum(counts_E)
    return np.delete(order_N, ends_E[full] - 1), counts_E


@surrounds(breaks="PRM-2")
def null_experts_are_rows(run, memory, expert_ids_TK, num_experts):
    """The slots of null experts are rows of the last expert."""
    return run(np.minimum(expert_ids_TK, num_experts - 1), num_experts)


@surrounds(breaks="PRM-3", links=("cusp-ai-oss/kUPS#186",))
def the_inverse_is_returned(run, memory, expert_ids_TK, num_experts):
    """The row of each slot is returned for the slot of each row."""
    order_N, counts_E = run(expert_ids_TK, num_experts)
    return np.argsort(order_N), counts_E


@surrounds(breaks="PRM-3")
def rows_stay_in_token_order(run, memory, expert_ids_TK, num_experts):
    """The slots are not sorted."""
    order_N, counts_E = run(expert_ids_TK, num_experts)
    return np.sort(order_N), counts_E


@surrounds(breaks="PRM-3")
def experts_descend(run, memory, expert_ids_TK, num_experts):
    """The experts are in descending order."""
    order_N, counts_E = run(expert_ids_TK, num_experts)
    return order_N[::-1], counts_E


@surrounds(breaks="PRM-4", links=("sgl-project/sglang#3339",))
def counts_not_cleared(run, memory, expert_ids_TK, num_experts):
    """The counts start from what the last call of this size left."""
    order_N, counts_E = run(expert_ids_TK, num_experts)
    before = memory.get(num_experts, 0)
    memory[num_experts] = counts_E
    return order_N, counts_E + before


@surrounds(breaks="PRM-4", links=("ModelTC/LightLLM#1369",))
def the_last_block_wraps(run, memory, expert_ids_TK, num_experts):
    """Experts are counted in blocks of 4, and the last block counts the first experts again."""
    order_N, counts_E = run(expert_ids_TK, num_experts)
    wrapped = np.arange(-(-num_experts // 4) * 4) % num_experts
    return order_N, np.bincount(wrapped, weights=counts_E[wrapped], minlength=num_experts).astype(np.int64)


@surrounds(breaks="PRM-4")
def an_idle_expert_counts_one(run, memory, expert_ids_TK, num_experts):
    """Every expert has at least one row."""
    order_N, counts_E = run(expert_ids_TK, num_experts)
    return order_N, np.maximum(counts_E, 1)


@surrounds(breaks="PRM-5", links=("vllm-project/vllm#45683",))
def the_sort_is_not_stable(run, memory, expert_ids_TK, num_experts):
    """Rows of one expert are in the reverse order of the tokens."""
    order_N, counts_E = run(expert_ids_TK, num_experts)
    expert_of_row_N = np.repeat(np.arange(num_experts), counts_E)
    return order_N[np.lexsort((-np.arange(len(order_N)), expert_of_row_N))], counts_E


@surrounds(breaks="PRM-6", links=("vllm-project/vllm-xpu-kernels#571",))
def unused_slots_count_for_the_last_expert(run, memory, expert_ids_TK, num_experts):
    """An id of -1 is counted as the last one."""
    order_N, counts_E = run(expert_ids_TK, num_experts)
    return order_N, counts_E + (np.arange(num_experts) == num_experts - 1) * int((expert_ids_TK == -1).sum())


@surrounds(breaks="PRM-6", links=("deepseek-ai/DeepEP#739",))
def unused_slots_go_to_the_first_expert(run, memory, expert_ids_TK, num_experts):
    """An unused slot is left 0 and read as expert 0."""
    return run(np.maximum(expert_ids_TK, 0), num_experts)


@surrounds(breaks="PRM-6", links=("huggingface/transformers#48653",))
def an_unused_slot_is_out_of_range(run, memory, expert_ids_TK, num_experts):
    """One-hot coding refuses the id of an unused slot."""
    if (expert_ids_TK == -1).any():
        raise IndexError("Class values must be non-negative.")
    return run(expert_ids_TK, num_experts)


@surrounds(breaks="PRM-6", links=("vllm-project/vllm#57471",))
def a_batch_of_padding_is_refused(run, memory, expert_ids_TK, num_experts):
    """A batch in which no slot is used is an error."""
    if expert_ids_TK.size and (expert_ids_TK == -1).all():
        raise RuntimeError("no tokens were routed")
    return run(expert_ids_TK, num_experts)


@surrounds(breaks="PRM-7", links=("bytedance/flux#186",))
def experts_past_256_are_lost(run, memory, expert_ids_TK, num_experts):
    """The histogram has 256 bins."""
    order_N, counts_E = run(expert_ids_TK, num_experts)
    return order_N, np.where(np.arange(num_experts) < 256, counts_E, 0)


@surrounds(breaks="PRM-7", links=("huggingface/transformers#43583",))
def counts_end_at_256(run, memory, expert_ids_TK, num_experts):
    """Counting by ones in bfloat16 ends at 256."""
    order_N, counts_E = run(expert_ids_TK, num_experts)
    return order_N, np.minimum(counts_E, 256)


@surrounds(breaks="PRM-7", links=("NVIDIA/TensorRT-LLM#15887", "linkedin/Liger-Kernel#1248", "vllm-project/vllm#50220"))
def slot_numbers_overflow(run, memory, expert_ids_TK, num_experts):
    """The slot numbers are kept in too few bits: 8, as 32 are in the large."""
    order_N, counts_E = run(expert_ids_TK, num_experts)
    return order_N % 256, counts_E


@surrounds(breaks="PRM-8", links=("vllm-project/vllm#57471",))
def zero_tokens_are_refused(run, memory, expert_ids_TK, num_experts):
    """Sorting nothing is an error."""
    if not expert_ids_TK.size:
        raise RuntimeError("max(): Expected reduction dim to be specified for input.numel() == 0")
    return run(expert_ids_TK, num_experts)


@surrounds(breaks="PRM-8")
def zero_tokens_leave_the_counts_unwritten(run, memory, expert_ids_TK, num_experts):
    """Without tokens no kernel is launched, and nobody writes the counts."""
    order_N, counts_E = run(expert_ids_TK, num_experts)
    return order_N, counts_E if expert_ids_TK.size else np.full(num_experts, 7)


@surrounds(breaks="PRM-10")
def aligned_counts_are_the_exact_ones(run, memory, expert_ids_TK, num_experts, align):
    """Rows are padded, and the counts that are returned are those before."""
    slot_of_row_A, _ = run(expert_ids_TK, num_experts, align)
    ids_N = expert_ids_TK[(expert_ids_TK >= 0) & (expert_ids_TK < num_experts)]
    return slot_of_row_A, np.bincount(ids_N, minlength=num_experts)


@surrounds(breaks="PRM-10")
def an_idle_expert_has_a_block_of_its_own_accord(run, memory, expert_ids_TK, num_experts, align):
    """Every expert has one block at least, whatever the spec says."""
    return run(expert_ids_TK, num_experts, align.replace(idle_blocks=1))


@surrounds(breaks="PRM-11", links=("pytorch/torchtitan#1237",))
def padding_rows_are_slot_0(run, memory, expert_ids_TK, num_experts, align):
    """The sentinel is 0, which is a slot."""
    slot_of_row_A, aligned_E = run(expert_ids_TK, num_experts, align)
    return np.maximum(slot_of_row_A, 0), aligned_E


@surrounds(breaks="PRM-11")
def blocks_start_at_the_exact_offsets(run, memory, expert_ids_TK, num_experts, align):
    """Rows stand as if nobody had padded, and all sentinels come last."""
    slot_of_row_A, aligned_E = run(expert_ids_TK, num_experts, align)
    return slot_of_row_A[np.argsort(slot_of_row_A < 0, kind="stable")], aligned_E


@surrounds(breaks="PRM-12")
def sentinels_come_first(run, memory, expert_ids_TK, num_experts, align):
    """Each expert's rows are in reverse order, the padding before the slots."""
    slot_of_row_A, aligned_E = run(expert_ids_TK, num_experts, align)
    owner_A = np.repeat(np.arange(num_experts), aligned_E)
    return slot_of_row_A[np.lexsort((-np.arange(len(owner_A)), owner_A))], aligned_E
