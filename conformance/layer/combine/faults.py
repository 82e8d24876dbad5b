"""conformance, layer, faults of combine: wrong sums of right rows.

Legend: T tokens, K top_k, D model dim, N used slots.
"""

import numpy as np

from conformance.core.fault import rounded, surrounds
from conformance.layer.faulty import with_router


@surrounds(breaks="CMB-1")
def slots_are_not_summed(run, memory, rows_ND, order_N, weights_TK, spec):
    """The slots are returned one by one."""
    return np.repeat(run(rows_ND, order_N, weights_TK, spec)[:, None], weights_TK.shape[1], axis=1)


@surrounds(breaks="CMB-2", links=("tjake/Jlama#201",))
def weights_ignored(run, memory, rows_ND, order_N, weights_TK, spec):
    """The outputs of the experts are added without their weights."""
    return run(rows_ND, order_N, np.ones_like(weights_TK), spec)


@surrounds(breaks="CMB-2")
def weights_in_the_order_of_the_experts(run, memory, rows_ND, order_N, weights_TK, spec):
    """The first weight of a token goes to its lowest expert."""
    slots_N = order_N.copy()
    K = weights_TK.shape[1]
    for token in np.unique(order_N // K):
        own = np.flatnonzero(order_N // K == token)
        slots_N[own] = np.sort(order_N[own])
    return run(rows_ND, slots_N, weights_TK, spec)


@surrounds(breaks="CMB-2")
def output_scale_ignored(run, memory, rows_ND, order_N, weights_TK, spec):
    """The sum is not scaled."""
    return run(rows_ND, order_N, weights_TK, with_router(spec, output_scale=1.0))


@surrounds(breaks="CMB-2")
def output_scale_twice(run, memory, rows_ND, order_N, weights_TK, spec):
    """Rows are scaled, and their sum once more."""
    return run(rows_ND * spec.router.output_scale, order_N, weights_TK, spec)


@surrounds(breaks="CMB-2")
def the_last_slot_left_out(run, memory, rows_ND, order_N, weights_TK, spec):
    """The loop over the slots ends one short, where there are several."""
    K = weights_TK.shape[1]
    kept_TK = np.where((np.arange(K) < K - 1) | (K == 1), weights_TK, 0)
    return run(rows_ND, order_N, kept_TK, spec)


@surrounds(breaks="CMB-2", links=("deepseek-ai/DeepEP#700",))
def the_last_token_gets_another_row(run, memory, rows_ND, order_N, weights_TK, spec):
    """At full capacity the last token gets the sum of the first one."""
    found_TD = run(rows_ND, order_N, weights_TK, spec)
    if len(order_N) == weights_TK.size and len(found_TD) > 1:
        found_TD[-1] = found_TD[0]
    return found_TD


@surrounds(breaks="CMB-2", links=("vllm-project/tpu-inference#2328",))
def half_of_the_rows_copied(run, memory, rows_ND, order_N, weights_TK, spec):
    """A size in elements is taken for one in bytes: the second half of each row is 0."""
    width = rows_ND.shape[1]
    return run(np.where(np.arange(width) < width // 2, rows_ND, 0), order_N, weights_TK, spec)


@surrounds(breaks="CMB-2")
def sums_in_bfloat16(run, memory, rows_ND, order_N, weights_TK, spec):
    """The sums are rounded to bfloat16, though the subject says float32."""
    return rounded(run(rows_ND, order_N, weights_TK, spec), 8)


@surrounds(breaks="CMB-3", links=("deepseek-ai/DeepEP#739",))
def an_unused_slot_reads_the_first_row(run, memory, rows_ND, order_N, weights_TK, spec):
    """The row number of an unused slot is left 0."""
    missing = np.setdiff1d(np.arange(weights_TK.size), order_N)
    if not len(rows_ND):
        return run(rows_ND, order_N, weights_TK, spec)
    rows = np.concatenate([rows_ND, np.repeat(rows_ND[:1], len(missing), axis=0)])
    return run(rows, np.concatenate([order_N, missing]), weights_TK, spec)


@surrounds(breaks="CMB-3")
def the_first_unused_slot_ends_the_sum(run, memory, rows_ND, order_N, weights_TK, spec):
    """A token's slots are read up to its first unused one."""
    used_TK = np.isin(np.arange(weights_TK.size), order_N).reshape(weights_TK.shape)
    return run(rows_ND, order_N, np.where(np.cumprod(used_TK, axis=1) > 0, weights_TK, 0), spec)


@surrounds(breaks="CMB-4")
def weights_normed_again(run, memory, rows_ND, order_N, weights_TK, spec):
    """Weights that do not sum to 1 are normed, where they are large enough for a division."""
    total_T1 = weights_TK.sum(axis=1, keepdims=True)
    normed_TK = weights_TK / np.where(np.abs(total_T1) > 1e-3, total_T1, 1)
    return run(rows_ND, order_N, normed_TK, spec)


@surrounds(breaks="CMB-4")
def negative_weights_are_dropped(run, memory, rows_ND, order_N, weights_TK, spec):
    """A weight below 0 counts as 0."""
    return run(rows_ND, order_N, np.maximum(weights_TK, 0), spec)


@surrounds(breaks="CMB-5", links=("vllm-project/vllm#43694", "NVIDIA/TensorRT-LLM#3492", "areal-project/AReaL#940"))
def weights_on_both_sides(run, memory, rows_ND, order_N, weights_TK, spec):
    """Weights are applied to the output, on the input or not."""
    return run(rows_ND, order_N, weights_TK, with_router(spec, weight_on="output"))


@surrounds(breaks="CMB-6")
def experts_told_by_descents(run, memory, rows_ND, order_N, weights_TK, spec):
    """A lower slot than the one before begins the next expert, and rows past the last expert are lost."""
    expert_N = np.concatenate([[0], np.cumsum(np.diff(order_N) < 0)])[: len(order_N)]
    kept = expert_N < spec.router.num_experts
    return run(rows_ND[kept], order_N[kept], weights_TK, spec)


@surrounds(breaks="CMB-7", links=("sgl-project/sglang#40187",))
def one_slot_is_not_scaled(run, memory, rows_ND, order_N, weights_TK, spec):
    """With one slot the row is returned before it is scaled."""
    scale = 1.0 if spec.router.top_k == 1 else spec.router.output_scale
    return run(rows_ND, order_N, weights_TK, with_router(spec, output_scale=scale))


@surrounds(breaks="CMB-7", links=("sgl-project/sglang#40187",))
def one_slot_reads_memory_that_nobody_wrote(run, memory, rows_ND, order_N, weights_TK, spec):
    """With one slot and a scale the sum is read from a buffer that was never written."""
    found_TD = run(rows_ND, order_N, weights_TK, spec)
    skipped = spec.router.top_k == 1 and spec.router.output_scale != 1
    return np.zeros_like(found_TD) if skipped else found_TD


@surrounds(breaks="CMB-7")
def one_slot_weighs_1(run, memory, rows_ND, order_N, weights_TK, spec):
    """With one slot the weight is taken for 1."""
    one = spec.router.top_k == 1
    return run(rows_ND, order_N, np.ones_like(weights_TK) if one else weights_TK, spec)


@surrounds(breaks="CMB-8", links=("vllm-project/vllm#57471",))
def no_rows_are_refused(run, memory, rows_ND, order_N, weights_TK, spec):
    """A sum of nothing is an error."""
    if not len(rows_ND):
        raise RuntimeError("index is out of bounds for dimension with size 0")
    return run(rows_ND, order_N, weights_TK, spec)


@surrounds(breaks="CMB-8")
def no_rows_leave_the_output_unwritten(run, memory, rows_ND, order_N, weights_TK, spec):
    """Without rows no kernel is launched, and the output keeps what its memory held."""
    found_TD = run(rows_ND, order_N, weights_TK, spec)
    return found_TD if len(rows_ND) else np.full_like(found_TD, 0.5)
