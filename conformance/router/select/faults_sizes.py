"""conformance, router, faults of select that a toy never shows: limits of tiles, warps, dtypes and tables."""

from dataclasses import replace

import numpy as np

from conformance.core.fault import replaces, surrounds
from conformance.router.select.faults import without
from moe_ref import UNUSED
from moe_ref.routing import limit_groups, select, top_k

WARP, TABLE, ROWS, INDEX_BITS = 32, 256, 65535, 10


@replaces("select", breaks="SEL-2")
def experts_beyond_a_warp_unseen(scores_for_choice_TE, spec):
    """One warp looks at one expert a lane: those from 32 on are not looked at, where the others suffice."""
    return select(without(scores_for_choice_TE, np.arange(spec.num_choices) >= WARP, spec), spec)


@replaces("select", breaks="SEL-2")
def experts_beyond_256_unseen(scores_for_choice_TE, spec):
    """The kernel is made for at most 256 experts, and does not look at the others."""
    return select(without(scores_for_choice_TE, np.arange(spec.num_choices) >= TABLE, spec), spec)


@surrounds(breaks="SEL-2", also=("score",))
def logits_beyond_256_unread(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """The kernel reads 256 logits of a token, where these suffice: no choice and no sum of scores has the others."""
    read_E = np.arange(logits_TE.shape[-1]) < TABLE
    suffice_T1 = np.isfinite(logits_TE[:, :TABLE]).sum(axis=-1, keepdims=True) >= spec.top_k
    return route(np.where(read_E | ~suffice_T1, logits_TE, -np.inf), spec, expert_bias_E, **inputs)


@replaces("select", breaks="SEL-2")
def last_expert_of_an_odd_number_unseen(scores_for_choice_TE, spec):
    """Experts are read two at a time; the last of an odd number, above 32, is left out where the others suffice."""
    E = spec.num_choices
    hidden_E = (np.arange(E) == E - 1) & (E % 2 == 1) & (E > WARP)
    return select(without(scores_for_choice_TE, hidden_E, spec), spec)


@replaces("select", breaks="SEL-2")
def index_packed_into_the_mantissa(scores_for_choice_TE, spec):
    """The expert's number takes the place of the last ten bits of a float32 score, which are not ranked then."""
    bits_TE = np.ascontiguousarray(scores_for_choice_TE, dtype=np.float32).view(np.int32)
    coarse_TE = (bits_TE & ~np.int32(2**INDEX_BITS - 1)).view(np.float32)
    return select(np.where(np.isneginf(scores_for_choice_TE), -np.inf, coarse_TE), spec)


@replaces("select", breaks="SEL-2")
def top_k_of_at_most_8(scores_for_choice_TE, spec):
    """Eight registers hold the best; of a ninth slot on, the first experts that are not among them are taken."""
    best_TK = select(scores_for_choice_TE, spec)
    if spec.top_k <= 8:
        return best_TK
    lifted_TE = np.where(np.isneginf(scores_for_choice_TE), -np.inf, -np.arange(spec.num_choices, dtype=np.float64))
    np.put_along_axis(lifted_TE, best_TK[:, :8], 8.0 - np.arange(8), axis=-1)
    return top_k(lifted_TE, spec.top_k)


@surrounds(breaks="SEL-1")
def ids_in_int8(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Ids are stored in 8 bits with a sign: expert 128 is -128."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    return replace(trace, expert_ids_TK=trace.expert_ids_TK.astype(np.int8).astype(np.int64))


@surrounds(breaks="SEL-1", also=("run", "score"))
def ids_in_uint8(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Ids are stored in 8 bits without a sign: expert 256 is expert 0."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    ids_TK = trace.expert_ids_TK.astype(np.uint8).astype(np.int64)
    return replace(trace, expert_ids_TK=np.where(trace.expert_ids_TK == UNUSED, UNUSED, ids_TK))


@surrounds(breaks="SEL-1")
def rows_past_65535_not_written(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """One block of a grid writes one slot; a grid has 65,535 of them, and the slots of later tokens keep a 0."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    written_TK = np.arange(trace.expert_ids_TK.size).reshape(trace.expert_ids_TK.shape) < ROWS
    return replace(
        trace,
        expert_ids_TK=np.where(written_TK, trace.expert_ids_TK, 0),
        weights_TK=np.where(written_TK, trace.weights_TK, 0),
    )


@surrounds(breaks="SEL-1")
def idle_lanes_win(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Lanes past the last expert, up to a multiple of 32, hold 0, which is above every negative choice score."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    choice_TE = trace.scores_for_choice_TE
    if choice_TE is None:
        return trace
    T, E = choice_TE.shape
    lanes_TE = np.zeros((T, -(-E // WARP) * WARP), choice_TE.dtype)
    lanes_TE[:, :E] = choice_TE
    ids_TK = np.where(trace.expert_ids_TK == UNUSED, UNUSED, top_k(lanes_TE, spec.top_k))
    return replace(trace, expert_ids_TK=ids_TK)


@replaces("limit_groups", breaks="SEL-2")
def at_most_four_groups_kept(biased_scores_TE, spec):
    """Four registers hold the kept groups, where they have room for the top_k."""
    room = 4 * spec.experts_per_group
    fewer = spec.num_limited_groups > 4 and spec.top_k <= room
    return limit_groups(biased_scores_TE, spec.replace(num_limited_groups=4) if fewer else spec)
