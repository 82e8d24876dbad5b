"""conformance, layer, faults of whole layers that show at real sizes alone.

Legend: T tokens, E experts, K top_k.
"""

from dataclasses import replace

import numpy as np

from conformance.core.fault import replaces, surrounds
from moe_ref import RoutingTrace
from moe_ref.experts import combine
from moe_ref.routing import route


@replaces("route", breaks="LAY-2")
def the_layer_keeps_ids_in_a_byte(logits_TE, spec, **inputs) -> RoutingTrace:
    """Expert ids are kept in 8 bits, so that those above 255 are low ones."""
    found = route(logits_TE, spec, **inputs)
    ids_TK = found.expert_ids_TK
    return replace(found, expert_ids_TK=np.where(ids_TK < 0, ids_TK, ids_TK % 256))


@replaces("route", breaks="LAY-2")
def the_layer_looks_at_128_experts(logits_TE, spec, **inputs) -> RoutingTrace:
    """One block of threads looks at the first 128 experts, and there is no second one."""
    inside_E = np.arange(logits_TE.shape[1]) < max(128, spec.top_k)
    return route(np.where(inside_E, logits_TE, -np.inf), spec, **inputs)


@surrounds(breaks="LAY-2")
def tokens_past_a_block_are_left_out(run, memory, x_TD, params, spec, **inputs):
    """The grid has 1,024 tokens at most; those that come later are 0."""
    found_TD = run(x_TD, params, spec, **inputs)
    return np.where(np.arange(len(found_TD))[:, None] < 1024, found_TD, 0)


@replaces("combine", breaks="LAY-2")
def slots_past_a_table_are_left_out(slot_outputs_TKD, weights_TK, spec):
    """The last sum has a table of 8 slots."""
    used_K = np.arange(weights_TK.shape[1]) < 8
    return combine(slot_outputs_TKD, weights_TK * used_K, spec)


@surrounds(breaks="LAY-2")
def the_last_row_of_a_tile_is_there_twice(run, memory, x_TD, params, spec, **inputs):
    """Where the slots fill tiles of 16 but for one row, that row is the last slot once more."""
    found_TD, T = run(x_TD, params, spec, **inputs), len(x_TD)
    twice_T = (np.arange(T) == T - 1) & (T * spec.router.top_k % 16 == 15)
    return found_TD * np.where(twice_T, 2, 1)[:, None]
