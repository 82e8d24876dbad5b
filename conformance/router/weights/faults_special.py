"""conformance, router, faults of weights of what is no expert: unused slots, null and shared experts, sparsemixer."""

from dataclasses import replace

import numpy as np

from conformance.core.fault import replaces, surrounds
from conformance.router.faulty import misreads
from moe_ref import UNUSED
from moe_ref.routing import normalise, scale_shared, sparsemixer


@replaces("routing.gather", breaks="WGT-11")
def unused_slots_weigh_expert_0(values_TE, expert_ids_TK):
    """An unused slot reads the score of expert 0."""
    return np.take_along_axis(values_TE, np.maximum(expert_ids_TK, 0), axis=-1)


@surrounds(breaks="WGT-11")
def unused_slots_in_the_norm(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """An unused slot weighs 0, but its share of the norm is gone."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    if spec.selector != "given" or not (spec.route_norm or spec.score_over == "selected"):
        return trace
    used_T1 = (trace.expert_ids_TK != UNUSED).mean(axis=-1, keepdims=True)
    return replace(trace, weights_TK=trace.weights_TK * used_T1)


@misreads(breaks="WGT-12")
def skipped_choices_weigh(spec):
    """A skipped choice keeps its weight."""
    return spec.replace(null_kind="identity")


@misreads(breaks="WGT-12")
def identity_choices_weigh_0(spec):
    """An identity choice weighs 0."""
    return spec.replace(null_kind="skip", num_constant_experts=0, num_zero_experts=0)


@replaces("leave_out", breaks="WGT-12")
def zero_experts_weigh(raw_weights_TK, expert_ids_TK, spec):
    """A zero expert keeps its weight."""
    return raw_weights_TK


@surrounds(breaks="WGT-12")
def zero_experts_join_the_norm(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """A zero expert weighs 0 after the norm, of which it has its share."""
    trace = route(logits_TE, spec.replace(num_zero_experts=0), expert_bias_E, **inputs)
    zero_TK = trace.expert_ids_TK >= spec.num_choices - spec.num_zero_experts
    return replace(trace, weights_TK=np.where(zero_TK, 0, trace.weights_TK).astype(trace.weights_TK.dtype))


@replaces("normalise", breaks="WGT-13", also=("score",))
def shared_left_out_of_the_norm(raw_weights_TK, shared_scores_TS, spec):
    """Shared scores do not join the norm."""
    return normalise(raw_weights_TK, shared_scores_TS, spec.replace(norm_with_shared=False))


@misreads(breaks="WGT-13")
def shared_in_every_norm(spec):
    """Shared scores join the norm where the spec does not say so."""
    if not spec.num_scored_shared_experts:
        return spec
    return spec.replace(norm_with_shared=True, route_norm=True)


@replaces("scale_shared", breaks="WGT-13")
def shared_weigh_1(normed_shared_TS, learned_scale, spec):
    """Shared experts weigh 1."""
    return np.ones_like(normed_shared_TS)


@replaces("scale_shared", breaks="WGT-13")
def shared_not_scaled(normed_shared_TS, learned_scale, spec):
    """Shared experts do not take the scale of the routed ones."""
    return normed_shared_TS


@replaces("scale_shared", breaks="WGT-13")
def shared_columns_swapped(normed_shared_TS, learned_scale, spec):
    """Shared experts have each other's weights."""
    return scale_shared(normed_shared_TS, learned_scale, spec)[:, ::-1]


@surrounds(breaks="WGT-13")
def shared_weights_not_returned(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """The weights of shared experts are not returned."""
    return replace(route(logits_TE, spec, expert_bias_E, **inputs), shared_weights_TS=None)


@misreads(breaks="WGT-14")
def masked_scores_ignored(spec):
    """Weights are read before the fill."""
    return spec.replace(weights_from="scores")


@replaces("sparsemixer", breaks="WGT-15")
def sparsemixer_without_band(scaled_logits_TE, spec):
    """sparsemixer takes the softmax over all remaining logits."""
    return sparsemixer(scaled_logits_TE, spec.replace(mixer_eps=1e6))


@replaces("sparsemixer", breaks="WGT-15")
def sparsemixer_band_of_eps(scaled_logits_TE, spec):
    """sparsemixer's band is mixer_eps wide, not twice that."""
    return sparsemixer(scaled_logits_TE, spec.replace(mixer_eps=spec.mixer_eps / 2))


@replaces("sparsemixer", breaks="WGT-15")
def sparsemixer_weights_normed(scaled_logits_TE, spec):
    """The weights of sparsemixer are made to sum to 1."""
    ids_TK, weights_TK = sparsemixer(scaled_logits_TE, spec)
    return ids_TK, weights_TK / weights_TK.sum(axis=-1, keepdims=True)
