"""conformance, router, faults of select: other experts are selected."""

from dataclasses import replace

import numpy as np

from conformance.core.fault import replaces, surrounds
from moe_ref import UNUSED
from moe_ref.routing import (
    bias_choice,
    kept_experts,
    limit_groups,
    score,
    select,
    top_k,
)

# SEL-1: the form of a selection


@replaces("select", breaks="SEL-1")
def best_expert_repeated(scores_for_choice_TE, spec):
    """The best expert is not taken out before the next is looked for."""
    return np.repeat(top_k(scores_for_choice_TE, 1), spec.top_k, axis=-1)


@surrounds(breaks="SEL-1")
def ids_from_1(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Ids count from 1."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    return replace(trace, expert_ids_TK=trace.expert_ids_TK + (trace.expert_ids_TK != UNUSED))


@surrounds(breaks="SEL-1")
def ids_within_the_group(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Ids count within the group, not over all experts."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    if spec.num_expert_groups is None:
        return trace
    local_TK = trace.expert_ids_TK % spec.experts_per_group
    return replace(trace, expert_ids_TK=np.where(trace.expert_ids_TK < 0, UNUSED, local_TK))


@surrounds(breaks="SEL-1")
def float_ids(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Ids are floats."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    return replace(trace, expert_ids_TK=trace.expert_ids_TK.astype(np.float32))


@surrounds(breaks="SEL-1")
def weak_slots_left_empty(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """A slot with a weight below 0.01 is left empty."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    weak_TK = trace.weights_TK < 0.01
    return replace(trace, expert_ids_TK=np.where(weak_TK, UNUSED, trace.expert_ids_TK))


# SEL-2: the best


def without(choice_TE, hidden_TE, spec):
    """Choice scores with these experts at -inf, in the rows where enough others remain."""
    left_TE = np.where(hidden_TE, -np.inf, choice_TE)
    enough_T1 = (~np.isneginf(left_TE)).sum(axis=-1, keepdims=True) >= spec.top_k
    return np.where(enough_T1, left_TE, choice_TE)


def at_place(scores_for_choice_TE, place: int):
    """(T, E) the expert at one place of the ranking."""
    ids_T1 = top_k(scores_for_choice_TE, place + 1)[:, -1:]
    return np.arange(scores_for_choice_TE.shape[1]) == ids_T1


@replaces("select", breaks="SEL-2", links=("pytorch/pytorch#196177",))
def last_pick_off_by_one(scores_for_choice_TE, spec):
    """The K-th expert is the one after it, where there is one."""
    hidden_TE = at_place(scores_for_choice_TE, spec.top_k - 1)
    return select(without(scores_for_choice_TE, hidden_TE, spec), spec)


@replaces("select", breaks="SEL-2")
def best_pick_skipped(scores_for_choice_TE, spec):
    """The selection starts at the second best, where enough remain."""
    return select(without(scores_for_choice_TE, at_place(scores_for_choice_TE, 0), spec), spec)


@replaces("select", breaks="SEL-2")
def smallest_selected(scores_for_choice_TE, spec):
    """The smallest choice scores are selected."""
    return top_k(np.where(np.isneginf(scores_for_choice_TE), -np.inf, -scores_for_choice_TE), spec.top_k)


@replaces("select", breaks="SEL-2")
def experts_beyond_8_unseen(scores_for_choice_TE, spec):
    """Only the first 8 columns are looked at, where they suffice."""
    return select(without(scores_for_choice_TE, np.arange(spec.num_choices) >= 8, spec), spec)


@replaces("select", breaks="SEL-2")
def last_expert_unseen(scores_for_choice_TE, spec):
    """The last expert is never looked at, where the others suffice."""
    return select(without(scores_for_choice_TE, np.arange(spec.num_choices) == spec.num_choices - 1, spec), spec)


@surrounds(breaks="SEL-2", links=("vllm-project/vllm#34673",))
def groups_invented_for_sigmoid(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """A sigmoid router without groups is taken for one with two."""
    plain = spec.num_expert_groups is None and spec.selector == "top_k" and spec.num_choices == spec.num_logits
    fits = spec.num_experts % 2 == 0 and 2 <= spec.num_experts // 2 >= spec.top_k and spec.num_null_experts == 0
    if spec.score_func == "sigmoid" and plain and fits and spec.top_k > 1:
        spec = spec.replace(num_expert_groups=2, num_limited_groups=1)
    return route(logits_TE, spec, expert_bias_E, **inputs)


@replaces("select", breaks="SEL-2")
def ranked_in_bfloat16(scores_for_choice_TE, spec):
    """Choice scores are rounded to bfloat16 before they are ranked."""
    mantissa_TE, exponent_TE = np.frexp(scores_for_choice_TE)
    coarse_TE = np.ldexp(np.round(mantissa_TE * 256) / 256, exponent_TE)
    return select(np.where(np.isneginf(scores_for_choice_TE), -np.inf, coarse_TE), spec)


@replaces("select", breaks="SEL-2")
def ranked_by_size(scores_for_choice_TE, spec):
    """Choice scores are ranked by their absolute value."""
    return select(np.where(np.isneginf(scores_for_choice_TE), -np.inf, np.abs(scores_for_choice_TE)), spec)


# SEL-3: dropped groups stay dropped


@replaces("limit_groups", breaks="SEL-3", links=("huggingface/transformers#45441", "huggingface/transformers#45440"))
def dropped_groups_filled_with_0(biased_scores_TE, spec):
    """Experts of dropped groups rank as 0, above every negative choice score."""
    _, scores_TG, group_ids_TL = limit_groups(biased_scores_TE, spec)
    return np.where(kept_experts(group_ids_TL, spec), biased_scores_TE, 0), scores_TG, group_ids_TL


@replaces("limit_groups", breaks="SEL-3", links=("deepseek-ai/DeepSeek-V3#741",))
def dropped_groups_multiplied_by_0(biased_scores_TE, spec):
    """Choice scores are multiplied by the mask of groups."""
    _, scores_TG, group_ids_TL = limit_groups(biased_scores_TE, spec)
    finite_TE = np.where(np.isneginf(biased_scores_TE), np.finfo(np.float32).min, biased_scores_TE)
    return finite_TE * kept_experts(group_ids_TL, spec), scores_TG, group_ids_TL


@replaces("limit_groups", breaks="SEL-3")
def dropped_groups_filled_with_minus_1(biased_scores_TE, spec):
    """Experts of dropped groups rank as -1, which a choice score can be below."""
    _, scores_TG, group_ids_TL = limit_groups(biased_scores_TE, spec)
    fill = -1.0 if spec.mask_fill != 0 else 0.0
    return np.where(kept_experts(group_ids_TL, spec), biased_scores_TE, fill), scores_TG, group_ids_TL


# SEL-4, SEL-7: the bias


@surrounds(breaks="SEL-4")
def bias_missing(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """The bias is ignored."""
    return route(logits_TE, spec, None, **inputs)


@surrounds(breaks="SEL-4")
def bias_subtracted(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """The bias is subtracted."""
    return route(logits_TE, spec, None if expert_bias_E is None else -expert_bias_E, **inputs)


@surrounds(breaks="SEL-4")
def bias_twice(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """The bias is added twice."""
    return route(logits_TE, spec, None if expert_bias_E is None else 2 * expert_bias_E, **inputs)


@surrounds(breaks="SEL-4")
def bias_of_the_next_expert(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """The bias is one expert off."""
    return route(logits_TE, spec, None if expert_bias_E is None else np.roll(expert_bias_E, 1), **inputs)


@replaces("bias_choice", breaks="SEL-4")
def bias_on_the_logits(scaled_logits_TE, scores_TE, expert_bias_E, spec):
    """The bias is added to the logits before they are scored."""
    biased_TE = scaled_logits_TE + expert_bias_E
    ranked_TE = biased_TE if spec.select_by == "logit" else score(biased_TE, spec)
    return np.where(np.isneginf(scaled_logits_TE), -np.inf, ranked_TE)


@replaces("bias_choice", breaks="SEL-4")
def bias_multiplies(scaled_logits_TE, scores_TE, expert_bias_E, spec):
    """What is ranked is multiplied by 1 + bias."""
    ranked_TE = scaled_logits_TE if spec.select_by == "logit" else scores_TE
    return np.where(np.isneginf(scaled_logits_TE), -np.inf, ranked_TE * (1 + expert_bias_E))


@replaces("bias_choice", breaks="SEL-4")
def bias_in_bfloat16(scaled_logits_TE, scores_TE, expert_bias_E, spec):
    """The bias is rounded to bfloat16."""
    mantissa_E, exponent_E = np.frexp(expert_bias_E)
    coarse_E = np.ldexp(np.round(mantissa_E * 256) / 256, exponent_E)
    return bias_choice(scaled_logits_TE, scores_TE, coarse_E.astype(expert_bias_E.dtype), spec)


@surrounds(breaks="SEL-4")
def bias_on_the_first_slot_alone(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """The bias decides the first slot; the others go by score."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    if trace.scores_for_choice_TE is None or expert_bias_E is None:
        return trace
    # The bias taken away again, but for the best, which stays the best.
    bare_TE = trace.scores_for_choice_TE - expert_bias_E
    np.put_along_axis(bare_TE, trace.expert_ids_TK[:, :1], np.inf, axis=-1)
    return rerouted(route, trace, top_k(bare_TE, spec.top_k), logits_TE, spec, inputs)


def rerouted(route, trace, expert_ids_TK, logits_TE, spec, inputs):
    """The trace with other ids, weighed as the reference weighs them."""
    used_TK = np.where(trace.expert_ids_TK == UNUSED, UNUSED, expert_ids_TK)
    weighed = route(logits_TE, spec.given(), None, **inputs, given_ids_TK=used_TK)
    return replace(trace, expert_ids_TK=used_TK, weights_TK=weighed.weights_TK)


# Under a mixed bias only the group scores show it.
@replaces("bias_choice", breaks="SEL-7", also=("groups",), links=("deepseek-ai/DeepSeek-V3#741",))
def choice_clamped_at_0(scaled_logits_TE, scores_TE, expert_bias_E, spec):
    """Choice scores below 0 are 0."""
    choice_TE = bias_choice(scaled_logits_TE, scores_TE, expert_bias_E, spec)
    if spec.select_by == "logit":
        return choice_TE
    return np.where(np.isneginf(choice_TE), choice_TE, np.maximum(choice_TE, 0))


@replaces("bias_choice", breaks="SEL-7", also=("groups",))
def bias_clamped_at_1(scaled_logits_TE, scores_TE, expert_bias_E, spec):
    """The bias is clamped to [-1, 1]."""
    return bias_choice(scaled_logits_TE, scores_TE, np.clip(expert_bias_E, -1, 1), spec)


# SEL-5, SEL-6: ties and slots


@replaces("select", breaks="SEL-5", links=("vllm-project/vllm#54403",))
def ties_to_the_higher(scores_for_choice_TE, spec):
    """Of equal choice scores the higher id is selected."""
    return spec.num_choices - 1 - select(scores_for_choice_TE[:, ::-1], spec)


@replaces("select", breaks="SEL-6", links=("vllm-project/vllm#55514",))
def slots_by_id(scores_for_choice_TE, spec):
    """Slots are in the order of the ids."""
    return np.sort(select(scores_for_choice_TE, spec), axis=-1)


@replaces("select", breaks="SEL-6")
def slots_ascending(scores_for_choice_TE, spec):
    """Slots are in ascending choice score."""
    return select(scores_for_choice_TE, spec)[:, ::-1]


# SEL-8, SEL-9: names and masks


@replaces("select", breaks="SEL-8")
def late_experts_handicapped(scores_for_choice_TE, spec):
    """An expert of the second half has to be better by 0.05."""
    late_E = np.arange(scores_for_choice_TE.shape[1]) >= (scores_for_choice_TE.shape[1] + 1) // 2
    return select(scores_for_choice_TE - 0.05 * late_E, spec)


@surrounds(breaks="SEL-9", also=("score",))
def masked_logits_read_as_0(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """A logit of -inf is cleaned to 0."""
    plain_TE = np.where(np.isneginf(logits_TE.astype(np.float64)), 0, logits_TE.astype(np.float64))
    return route(plain_TE, spec, expert_bias_E, **inputs)


@replaces("bias_choice", breaks="SEL-10")
def bias_lifts_masked_logits(scaled_logits_TE, scores_TE, expert_bias_E, spec):
    """A score of 0 plus a positive bias is selected though its logit is -inf."""
    return (scaled_logits_TE if spec.select_by == "logit" else scores_TE) + expert_bias_E


@surrounds(breaks="SEL-11")
def skipped_choices_become_expert_0(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """A skipped choice is returned as expert 0 with weight 0, so that expert 0 is counted too often."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    if spec.null_kind != "skip" or spec.num_null_experts != 1:
        return trace
    free_T1 = ~(trace.expert_ids_TK == 0).any(axis=-1, keepdims=True)
    skipped_TK = (trace.expert_ids_TK == spec.num_experts) & free_T1
    return replace(trace, expert_ids_TK=np.where(skipped_TK, 0, trace.expert_ids_TK))
