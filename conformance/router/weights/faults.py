"""conformance, router, faults of weigh: the right experts with wrong weights."""

from dataclasses import replace

import numpy as np

from conformance.core.fault import replaces, rounded, surrounds
from conformance.router.faulty import misreads
from moe_ref import UNUSED
from moe_ref.routing import factor_of, gather, normalise, scale_weights, softmax, weigh

# WGT-1: the bias


@surrounds(breaks="WGT-1", links=("huggingface/transformers#39581", "AI-Hypercomputer/maxtext#1492"))
def weights_of_biased_scores(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Weights are gathered from the scores with the bias."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    if expert_bias_E is None or trace.scores_TE is None:
        return trace
    raw_TK = gather(trace.scores_TE + expert_bias_E, trace.expert_ids_TK)
    return reweighed(trace, raw_TK, logits_TE, spec, inputs)


@surrounds(breaks="WGT-1", links=("MetaX-MACA/vLLM-metax#270",))
def bias_in_the_weights_at_one_size(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """One pair of num_experts and top_k has a kernel of its own, which weighs with the bias."""
    if (spec.num_experts, spec.top_k) != (8, 2):
        return route(logits_TE, spec, expert_bias_E, **inputs)
    return weights_of_biased_scores(route, memory, logits_TE, spec, expert_bias_E, **inputs)


@surrounds(breaks="WGT-1")
def norm_of_biased_scores(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """The norm that divides the weights sums scores with the bias."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    if expert_bias_E is None or trace.scores_TE is None or not spec.route_norm:
        return trace
    raw_TK, bias_TK = (gather(v, trace.expert_ids_TK) for v in (trace.scores_TE, trace.scores_TE * 0 + expert_bias_E))
    sum_T1, biased_T1 = raw_TK.sum(axis=-1, keepdims=True), (raw_TK + bias_TK).sum(axis=-1, keepdims=True)
    return replace(trace, weights_TK=trace.weights_TK * sum_T1 / np.where(biased_T1 == 0, 1, biased_T1))


def reweighed(trace, raw_weights_TK, logits_TE, spec, inputs):
    """The trace with other raw weights, normed and scaled as the reference does it."""
    shared_TS = np.zeros((len(logits_TE), 0), raw_weights_TK.dtype)
    normed_TK, _ = normalise(raw_weights_TK, shared_TS, spec.replace(norm_with_shared=False))
    learned = inputs.get("learned_scale", np.ones(()))
    weights_TK = scale_weights(normed_TK, trace.expert_ids_TK, learned, spec)
    return replace(trace, weights_TK=np.where(trace.expert_ids_TK == UNUSED, 0, weights_TK))


# WGT-2, WGT-3: the norm


@misreads(
    breaks="WGT-2",
    links=(
        "pytorch/torchtitan#1418",
        "pytorch/torchtitan#1448",
        "huggingface/transformers#41151",
        "leonickson1/Swiftlet#6",
        "sawfwair/mere-run#136",
        "anthony-chaudhary/fak#9720",
    ),
)
def norm_missing(spec):
    """route_norm is read as False."""
    return spec.replace(route_norm=False)


@misreads(breaks="WGT-2")
def norm_missing_for_sigmoid(spec):
    """Sigmoid scores are not normed."""
    return spec.replace(route_norm=False) if spec.score_func == "sigmoid" else spec


@replaces("normalise", breaks="WGT-2")
def norm_without_the_last_slot(raw_weights_TK, shared_scores_TS, spec):
    """The norm leaves the last slot out, where there are two or more."""
    if not spec.route_norm or spec.top_k == 1:
        return normalise(raw_weights_TK, shared_scores_TS, spec)
    return raw_weights_TK / np.maximum(raw_weights_TK[:, :-1].sum(axis=-1, keepdims=True), 1e-30), shared_scores_TS


@replaces("normalise", breaks="WGT-2", links=("MetaX-MACA/vLLM-metax#270",))
def norm_missing_at_a_published_size(raw_weights_TK, shared_scores_TS, spec):
    """The kernel for 8 of 128 experts does not norm."""
    if (spec.num_experts, spec.top_k) == (128, 8):
        return raw_weights_TK, shared_scores_TS
    return normalise(raw_weights_TK, shared_scores_TS, spec)


@replaces("normalise", breaks="WGT-2")
def divided_by_the_largest(raw_weights_TK, shared_scores_TS, spec):
    """Weights are divided by the largest, not by the sum."""
    if not spec.route_norm:
        return raw_weights_TK, shared_scores_TS
    return raw_weights_TK / np.maximum(raw_weights_TK.max(axis=-1, keepdims=True), 1e-30), shared_scores_TS


@replaces("normalise", breaks="WGT-2")
def divided_by_the_mean(raw_weights_TK, shared_scores_TS, spec):
    """Weights are divided by their mean, so that they sum to K."""
    normed_TK, shared_TS = normalise(raw_weights_TK, shared_scores_TS, spec)
    return (normed_TK * spec.top_k if spec.route_norm else normed_TK), shared_TS


@surrounds(breaks="WGT-2")
def normed_by_all_experts(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Weights are divided by the sum of all experts' scores."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    if trace.scores_TE is None or not spec.route_norm:
        return trace
    chosen_T1 = gather(trace.scores_TE, trace.expert_ids_TK).sum(axis=-1, keepdims=True)
    all_T1 = np.maximum(trace.scores_TE.sum(axis=-1, keepdims=True), 1e-30)
    return replace(trace, weights_TK=trace.weights_TK * chosen_T1 / all_T1)


@replaces("normalise", breaks="WGT-2", also=("score",))
def softmax_for_the_norm(raw_weights_TK, shared_scores_TS, spec):
    """A softmax over the selected scores stands for the norm."""
    return (softmax(raw_weights_TK) if spec.route_norm else raw_weights_TK), shared_scores_TS


@misreads(breaks="WGT-3")
def normed_always(spec):
    """route_norm is read as True."""
    return spec.replace(route_norm=True)


@replaces("weigh", breaks="WGT-3", links=("lablup/mlxcel#391",))
def softmax_over_the_selected_always(scaled_logits_TE, scores_TE, expert_ids_TK, spec):
    """A softmax runs over the selected logits though the scores are of all experts, which norms them."""
    over_selected = spec.score_func == "softmax" and spec.weights_from == "scores"
    if not over_selected or (expert_ids_TK == UNUSED).any():
        return weigh(scaled_logits_TE, scores_TE, expert_ids_TK, spec)
    return softmax(gather(scaled_logits_TE, expert_ids_TK))


@replaces("weigh", breaks="WGT-3", also=("score",), links=("sgl-project/sglang#35160",))
def logits_for_weights(scaled_logits_TE, scores_TE, expert_ids_TK, spec):
    """Without route_norm the weights are the selected logits as they are."""
    if spec.route_norm or spec.score_func != "softmax":
        return weigh(scaled_logits_TE, scores_TE, expert_ids_TK, spec)
    return gather(scaled_logits_TE, expert_ids_TK)


@replaces("weigh", breaks="WGT-3", also=("score",))
def weights_in_bfloat16(scaled_logits_TE, scores_TE, expert_ids_TK, spec):
    """Weights are rounded to bfloat16."""
    return rounded(weigh(scaled_logits_TE, scores_TE, expert_ids_TK, spec), 8)


@surrounds(breaks="WGT-3", also=("score",))
def weights_all_equal(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Without route_norm every weight is 1 / K."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    return trace if spec.route_norm else replace(trace, weights_TK=np.where(trace.expert_ids_TK < 0, 0, 1 / spec.top_k))


# WGT-4: the scale


@misreads(breaks="WGT-4")
def scale_missing(spec):
    """route_scale is left out."""
    return spec.replace(route_scale=1.0)


@misreads(breaks="WGT-4", links=("vllm-project/vllm#45037",))
def scale_twice(spec):
    """route_scale multiplies in the router and once more after it."""
    return spec.replace(route_scale=spec.route_scale**2)


@misreads(breaks="WGT-4")
def scale_before_the_norm(spec):
    """route_scale multiplies before the norm, which divides it out again."""
    return spec.replace(route_scale=1.0) if spec.route_norm else spec


@misreads(breaks="WGT-4")
def scale_only_with_norm(spec):
    """route_scale belongs to the norm: without it, it is left out."""
    return spec if spec.route_norm else spec.replace(route_scale=1.0)


@misreads(breaks="WGT-4")
def scale_divides(spec):
    """Weights are divided by route_scale."""
    return spec.replace(route_scale=1 / spec.route_scale)


@replaces("scale_weights", breaks="WGT-4")
def scale_on_the_first_slot(weights_TK, expert_ids_TK, learned_scale, spec):
    """route_scale multiplies the first slot alone."""
    scaled_TK = scale_weights(weights_TK, expert_ids_TK, learned_scale, spec)
    scaled_TK[:, 1:] = scaled_TK[:, 1:] / spec.route_scale
    return scaled_TK


# WGT-5: the divisor


@misreads(breaks="WGT-5")
def eps_missing(spec):
    """norm_eps is left out."""
    return spec.replace(norm_eps=0.0)


@misreads(breaks="WGT-5", links=("NVIDIA/Megatron-LM#1545",))
def eps_of_1e_6(spec):
    """The divisor is the norm plus 1e-6, which tiny scores are small against."""
    return spec.replace(norm_eps=1e-6) if spec.norm_form == "add_eps" and 0 < spec.norm_eps < 1e-6 else spec


@misreads(breaks="WGT-2")
def eps_where_there_is_none(spec):
    """1e-9 is added to a norm that has no eps."""
    return spec.replace(norm_eps=1e-9) if spec.norm_eps == 0 else spec


@misreads(breaks="WGT-5")
def eps_clamps_for_added(spec):
    """The divisor is max(norm, eps) where it is the sum."""
    return spec.replace(norm_form="clamp")


@misreads(breaks="WGT-5")
def eps_added_for_clamps(spec):
    """The divisor is norm + eps where it is the larger of them."""
    return spec.replace(norm_form="add_eps")


@misreads(breaks="WGT-5")
def eps_for_each_slot(spec):
    """norm_eps is added to every slot before the sum."""
    return spec.replace(norm_eps=spec.norm_eps * spec.top_k)


@replaces("normalise", breaks="WGT-5")
def eps_on_the_weights(raw_weights_TK, shared_scores_TS, spec):
    """norm_eps is added to the weights as well as to the norm."""
    return normalise(raw_weights_TK + (spec.norm_eps if spec.route_norm else 0), shared_scores_TS, spec)


# WGT-6, WGT-7: the order of the norm, one slot


@misreads(breaks="WGT-6")
def norm_of_order_1(spec):
    """The norm is the sum, whatever norm_p says."""
    return spec.replace(norm_p=1.0)


@replaces("normalise", breaks="WGT-6")
def norm_without_root(raw_weights_TK, shared_scores_TS, spec):
    """The norm is the sum of the powers, without the root."""
    if not spec.route_norm or spec.norm_p == 1:
        return normalise(raw_weights_TK, shared_scores_TS, spec)
    return raw_weights_TK / (raw_weights_TK**spec.norm_p).sum(axis=-1, keepdims=True), shared_scores_TS


@misreads(breaks="WGT-6")
def norm_of_order_2(spec):
    """Any norm but the sum is the Euclidean one."""
    return spec.replace(norm_p=2.0) if spec.norm_p != 1 else spec


@misreads(breaks="WGT-7")
def one_slot_not_normed(spec):
    """One expert per token is not normed."""
    return spec.replace(route_norm=False) if spec.top_k == 1 else spec


# WGT-8: the slots


@surrounds(breaks="WGT-8", links=("radixark/miles#2722",))
def weights_in_the_order_of_ids(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Weights are computed in the order of the ids, and ids returned in that of the scores."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    by_id_TK = np.argsort(trace.expert_ids_TK, axis=-1, kind="stable")
    return replace(trace, weights_TK=np.take_along_axis(trace.weights_TK, by_id_TK, axis=-1))


@surrounds(breaks="WGT-8")
def weights_reversed(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Weights ascend while ids descend."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    return replace(trace, weights_TK=trace.weights_TK[:, ::-1])


@surrounds(breaks="WGT-8")
def ids_sorted_after_weighing(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Ids are sorted after the weights are gathered."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    if spec.selector != "top_k":
        return trace
    return replace(trace, expert_ids_TK=np.sort(trace.expert_ids_TK, axis=-1))


# WGT-9: the learned scale


@replaces("factor_of", breaks="WGT-9")
def learned_scale_missing(expert_ids_TK, learned_scale, spec):
    """The learned scale is left out."""
    return np.ones((), learned_scale.dtype)


@replaces("factor_of", breaks="WGT-9", links=("onnxruntime/mobius#546",))
def learned_scale_twice(expert_ids_TK, learned_scale, spec):
    """The learned scale is folded into the experts and multiplies the weights as well."""
    return factor_of(expert_ids_TK, learned_scale, spec) ** 2


@replaces("factor_of", breaks="WGT-9")
def learned_scale_by_slot(expert_ids_TK, learned_scale, spec):
    """The learned scale is indexed by the slot, not by the expert."""
    return learned_scale[: spec.top_k] if spec.learned_scale == "per_expert" else learned_scale


@replaces("factor_of", breaks="WGT-9")
def learned_scale_of_expert_0(expert_ids_TK, learned_scale, spec):
    """The learned scale of the first expert serves all."""
    return learned_scale[0] if spec.learned_scale == "per_expert" else learned_scale


@surrounds(breaks="WGT-9")
def learned_scale_before_the_norm(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """The learned scale multiplies before the norm."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    if spec.learned_scale == "none" or not spec.route_norm:
        return trace
    scaled_sum_T1 = trace.weights_TK.sum(axis=-1, keepdims=True) / spec.route_scale
    return replace(trace, weights_TK=trace.weights_TK / np.where(scaled_sum_T1 == 0, 1, scaled_sum_T1))


# WGT-10, WGT-16: finite


@surrounds(breaks="WGT-10", also=("score",))
def zero_times_its_logarithm(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """A weight passes through w * log(w) / log(w), which is NaN for a weight of 0."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    weights_TK = np.where((trace.weights_TK == 0) & (trace.expert_ids_TK != UNUSED), np.nan, trace.weights_TK)
    return trace if spec.null_kind == "skip" else replace(trace, weights_TK=weights_TK)


@replaces("weigh", breaks="WGT-10", also=("score",))
def selected_by_a_product(scaled_logits_TE, scores_TE, expert_ids_TK, spec):
    """A softmax over the selected gathers by a product with one-hots, which is NaN where any expert is masked."""
    if scores_TE is not None:
        return weigh(scaled_logits_TE, scores_TE, expert_ids_TK, spec)
    infinite_T1 = np.isinf(scaled_logits_TE).any(axis=-1, keepdims=True)
    return np.where(infinite_T1, np.nan, weigh(scaled_logits_TE, scores_TE, expert_ids_TK, spec))


@replaces("softmax", breaks="SCR-7", also=("run",))
def exponentials_overflow(logits_TE):
    """The softmax does not subtract the largest logit first."""
    with np.errstate(over="ignore", invalid="ignore"):
        exp_TE = np.exp(logits_TE)
        return exp_TE / exp_TE.sum(axis=-1, keepdims=True)


@replaces("normalise", breaks="WGT-16")
def zero_over_zero(raw_weights_TK, shared_scores_TS, spec):
    """Scores that are all 0 are divided by their sum."""
    if not spec.route_norm or spec.norm_eps > 0 or spec.norm_p != 1 or spec.norm_with_shared:
        return normalise(raw_weights_TK, shared_scores_TS, spec)
    return raw_weights_TK / raw_weights_TK.sum(axis=-1, keepdims=True), shared_scores_TS


@replaces("softmax", breaks="WGT-3")
def softmax_of_the_first_256_experts(logits_TE):
    """The sum of a softmax runs over 256 experts, however many there are."""
    scores_TE = softmax(logits_TE)
    sum_T1 = scores_TE[:, :256].sum(axis=-1, keepdims=True)
    return scores_TE / np.where(sum_T1 == 0, 1, sum_T1)


# WGT-17, WGT-18: what one thing alone does not show


@surrounds(breaks="WGT-17", also=("run", "score"))
def bias_in_the_weights_of_masked_rows(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """A token with a logit of -inf takes the slow path, which weighs with the bias."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    biased = weights_of_biased_scores(route, memory, logits_TE, spec, expert_bias_E, **inputs)
    slow_T1 = np.isneginf(trace.logits_TE).any(axis=-1, keepdims=True)
    return replace(trace, weights_TK=np.where(slow_T1, biased.weights_TK, trace.weights_TK))


@surrounds(breaks="WGT-17", also=("run", "score"))
def scale_missing_in_half_precision(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Logits of two bytes go to a kernel that knows no route_scale."""
    if logits_TE.dtype.itemsize == 2:
        spec = spec.replace(route_scale=1.0)
    return route(logits_TE, spec, expert_bias_E, **inputs)


@surrounds(breaks="WGT-18", also=("score",))
def table_weights_divided_by_their_sum(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Weights of a table's or given ids are divided by their sum, which underflows at ordinary logits."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    if spec.selector not in ("table", "given") or not spec.route_norm or trace.scores_TE is None:
        return trace
    raw_TK = gather(trace.scores_TE, trace.expert_ids_TK).astype(np.float32)
    used_T1 = (trace.expert_ids_TK != UNUSED).any(axis=-1, keepdims=True)
    lost_T1 = used_T1 & (raw_TK.sum(axis=-1, keepdims=True) == 0)
    return replace(trace, weights_TK=np.where(lost_T1, np.nan, trace.weights_TK))
