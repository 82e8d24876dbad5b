"""conformance, layer, faults of permute that show at real sizes alone.

Legend: T tokens, K top_k, N used slots, E experts.
"""

import numpy as np

from conformance.core.fault import surrounds


@surrounds(breaks="PRM-9")
def slots_are_numbered_in_16_bits(run, memory, expert_ids_TK, num_experts):
    """The number of a slot is kept in 16 bits."""
    order_N, counts_E = run(expert_ids_TK, num_experts)
    return order_N.astype(np.uint16).astype(np.int32), counts_E


@surrounds(breaks="PRM-9")
def slots_past_a_grid_are_left_out(run, memory, expert_ids_TK, num_experts):
    """A grid has 65,535 blocks, one for each slot; there is no row for what comes later."""
    number_TK = np.arange(expert_ids_TK.size).reshape(expert_ids_TK.shape)
    return run(np.where(number_TK < 65_535, expert_ids_TK, -1), num_experts)
