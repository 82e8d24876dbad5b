"""conformance, router, faults of select where tokens have different numbers of experts: threshold and top_p."""

from dataclasses import replace

import numpy as np

from conformance.core.fault import replaces, surrounds
from moe_ref import UNUSED
from moe_ref.routing import select_above, select_share, top_k


@replaces("select_above", breaks="SEL-21")
def the_threshold_itself_is_above_it(scores_for_choice_TE, spec):
    """A choice score that is equal to the threshold is selected: under relu, experts of weight 0."""
    ids_TK = top_k(scores_for_choice_TE, spec.top_k)
    enough_TK = np.take_along_axis(scores_for_choice_TE, ids_TK, axis=-1) >= spec.threshold
    return np.where(enough_TK, ids_TK, UNUSED)


@replaces("select_above", breaks="SEL-21")
def somebody_is_always_selected(scores_for_choice_TE, spec):
    """A token of which no choice is above the threshold gets its best one."""
    ids_TK = select_above(scores_for_choice_TE, spec)
    ids_TK[:, 0] = scores_for_choice_TE.argmax(axis=-1)
    return ids_TK


@replaces("select_above", breaks="SEL-21")
def the_threshold_is_not_looked_at(scores_for_choice_TE, spec):
    """The top_k best are selected, above the threshold or not."""
    ids_TK = top_k(scores_for_choice_TE, spec.top_k)
    masked_TK = np.isneginf(np.take_along_axis(scores_for_choice_TE, ids_TK, axis=-1))
    return np.where(masked_TK, UNUSED, ids_TK)


@surrounds(breaks="SEL-21")
def the_threshold_is_of_scores_without_bias(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """expert_bias is left out of what is held against the threshold."""
    return route(logits_TE, spec, None if spec.selector == "threshold" else expert_bias_E, **inputs)


@replaces("select_share", breaks="SEL-22")
def the_last_one_is_left_out(scores_for_choice_TE, spec):
    """Choices are selected while their own sum is at most top_p, the first one in any case."""
    ids_TK = select_share(scores_for_choice_TE, spec)
    share_TK = np.where(ids_TK == UNUSED, 0, np.take_along_axis(scores_for_choice_TE, np.maximum(ids_TK, 0), axis=-1))
    beyond_TK = (share_TK.cumsum(axis=-1) > spec.top_p) & (np.arange(spec.top_k) > 0)
    return np.where(beyond_TK, UNUSED, ids_TK)


@replaces("select_share", breaks="SEL-22")
def each_score_is_held_against_top_p(scores_for_choice_TE, spec):
    """Choices are selected whose own score is at least 1 - top_p of the best one, not by their sum."""
    ids_TK = top_k(scores_for_choice_TE, spec.top_k)
    chosen_TK = np.take_along_axis(scores_for_choice_TE, ids_TK, axis=-1)
    return np.where(chosen_TK >= (1 - spec.top_p) * chosen_TK[:, :1], ids_TK, UNUSED)


@replaces("select_share", breaks="SEL-22")
def top_p_is_a_share_of_the_top_k(scores_for_choice_TE, spec):
    """The scores of the top_k best are made to sum to 1 before they are summed."""
    ids_TK = top_k(scores_for_choice_TE, spec.top_k)
    best_TK = np.take_along_axis(scores_for_choice_TE, ids_TK, axis=-1)
    total_T1 = np.where(np.isneginf(best_TK), 0, best_TK).sum(axis=-1, keepdims=True)
    return select_share(scores_for_choice_TE / np.where(total_T1 == 0, 1, total_T1), spec)


@surrounds(breaks="SEL-23")
def unused_slots_keep_a_weight(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """A slot that a threshold or a share leaves unused has the weight of the slot before it."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    if not spec.varies:
        return trace
    before_TK = np.roll(trace.weights_TK, 1, axis=-1)
    return replace(trace, weights_TK=np.where(trace.expert_ids_TK == UNUSED, before_TK, trace.weights_TK))


@surrounds(breaks="SEL-1")
def slots_left_unused_are_expert_0(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """A slot that a threshold or a share leaves unused names expert 0, with the weight 0."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    if not spec.varies or "token_mask_T" in inputs:
        return trace
    return replace(trace, expert_ids_TK=np.maximum(trace.expert_ids_TK, 0))


@surrounds(breaks="SEL-24")
def used_slots_are_in_order_of_id(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Experts are listed by id, each with its weight, the unused slots last."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    if not spec.varies:
        return trace
    ids_TK = trace.expert_ids_TK
    order_TK = np.argsort(np.where(ids_TK == UNUSED, spec.num_choices, ids_TK), axis=-1, kind="stable")
    sort = np.take_along_axis
    return replace(
        trace,
        expert_ids_TK=sort(ids_TK, order_TK, axis=-1),
        weights_TK=sort(trace.weights_TK, order_TK, axis=-1),
    )
