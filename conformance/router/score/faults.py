"""conformance, router, faults of score: logits become wrong scores."""

import numpy as np

from conformance.core.fault import replaces, rounded, surrounds
from conformance.router.faulty import misreads
from moe_ref.rounding import round_to
from moe_ref.routing import gather, scale_logits, score, softmax

UNSEEN = ("groups", "select", "weights")
"""A factor on all scores of a token shows in no ratio; ids and weights alone show it beside a bias, or in a weight."""


def sigmoid(z):
    """1 / (1 + exp(-z))."""
    return np.exp(-np.logaddexp(0, -z))


@replaces("softmax", breaks="SCR-1")
def softmax_of_base_2(logits_TE):
    """Softmax raises 2, not e, to the logits."""
    return softmax(logits_TE * np.log(2.0).astype(logits_TE.dtype))


@replaces("score", breaks="SCR-1")
def sigmoid_for_softmax(scaled_logits_TE, spec):
    """Softmax scores are sigmoids."""
    return sigmoid(scaled_logits_TE) if spec.score_func == "softmax" else score(scaled_logits_TE, spec)


@replaces("score", breaks="SCR-1", also=UNSEEN)
def softmax_sums_half_of_the_experts(scaled_logits_TE, spec):
    """The divisor of the softmax sums the first half of the experts."""
    if spec.score_func != "softmax":
        return score(scaled_logits_TE, spec)
    half = (scaled_logits_TE.shape[1] + 1) // 2
    scores_TE = softmax(scaled_logits_TE)
    first_T1 = scores_TE[:, :half].sum(axis=-1, keepdims=True)
    return scores_TE / np.where(first_T1 == 0, 1, first_T1)


@replaces("score", breaks="SCR-1", also=UNSEEN)
def softmax_without_divisor(scaled_logits_TE, spec):
    """Softmax scores are not divided by their sum."""
    if spec.score_func != "softmax":
        return score(scaled_logits_TE, spec)
    return np.exp(scaled_logits_TE - scaled_logits_TE.max(axis=-1, keepdims=True, initial=-np.inf))


@replaces("score", breaks="SCR-1")
def softmax_twice(scaled_logits_TE, spec):
    """Softmax is applied to what is a softmax already."""
    scores_TE = score(scaled_logits_TE, spec)
    return softmax(scores_TE) if spec.score_func == "softmax" else scores_TE


@replaces("score", breaks="SCR-1")
def scores_in_float16(scaled_logits_TE, spec):
    """Scores are rounded to the mantissa of float16."""
    return rounded(score(scaled_logits_TE, spec), 11)


@replaces("score", breaks="SCR-1")
def temperature_is_sqrt_of_experts(scaled_logits_TE, spec):
    """Logits are divided by the root of the number of experts."""
    return score(scaled_logits_TE / np.sqrt(spec.num_experts), spec)


@replaces("score", breaks="SCR-2", links=("ggml-org/llama.cpp#18980",))
def softmax_for_sigmoid(scaled_logits_TE, spec):
    """Sigmoid scores are a softmax."""
    return softmax(scaled_logits_TE) if spec.score_func == "sigmoid" else score(scaled_logits_TE, spec)


@replaces("score", breaks="SCR-2", links=("MetaX-MACA/vLLM-metax#270",))
def softmax_for_sigmoid_at_one_size(scaled_logits_TE, spec):
    """One pair of num_experts and top_k has a kernel of its own, which takes a softmax for a sigmoid."""
    size = (spec.num_experts, spec.top_k)
    return (softmax_for_sigmoid if size == (16, 4) else score)(scaled_logits_TE, spec)


@replaces("score", breaks="SCR-2")
def hard_sigmoid(scaled_logits_TE, spec):
    """The sigmoid is a straight line between -3 and 3."""
    if spec.score_func != "sigmoid":
        return score(scaled_logits_TE, spec)
    return np.clip(scaled_logits_TE / 6 + 0.5, 0, 1)


@replaces("score", breaks="SCR-2")
def sigmoid_of_negated_logits(scaled_logits_TE, spec):
    """The sigmoid lacks its minus sign."""
    return score(-scaled_logits_TE if spec.score_func == "sigmoid" else scaled_logits_TE, spec)


@replaces("score", breaks="SCR-2", also=UNSEEN)
def sigmoids_divided_by_their_sum(scaled_logits_TE, spec):
    """Sigmoid scores are divided by the sum over all experts."""
    scores_TE = score(scaled_logits_TE, spec)
    if spec.score_func != "sigmoid":
        return scores_TE
    return scores_TE / np.maximum(scores_TE.sum(axis=-1, keepdims=True), 1e-30)


@replaces("score", breaks="SCR-3", links=("flashinfer-ai/flashinfer#5190",))
def sigmoid_for_sqrtsoftplus(scaled_logits_TE, spec):
    """Sqrtsoftplus has no kernel, and the nearest one, sigmoid, runs."""
    return sigmoid(scaled_logits_TE) if spec.score_func == "sqrtsoftplus" else score(scaled_logits_TE, spec)


@replaces("score", breaks="SCR-3")
def softplus_without_root(scaled_logits_TE, spec):
    """Sqrtsoftplus lacks its root."""
    scores_TE = score(scaled_logits_TE, spec)
    return scores_TE**2 if spec.score_func == "sqrtsoftplus" else scores_TE


@replaces("score", breaks="SCR-3")
def root_inside_softplus(scaled_logits_TE, spec):
    """Sqrtsoftplus takes the root of the exponential, not of the logarithm."""
    if spec.score_func != "sqrtsoftplus":
        return score(scaled_logits_TE, spec)
    return np.logaddexp(0, scaled_logits_TE / 2)


@replaces("weigh", breaks="SCR-4", links=("ml-explore/mlx-swift-lm#228",))
def softmax_over_all_for_selected(scaled_logits_TE, scores_TE, expert_ids_TK, spec):
    """A softmax over the selected logits runs over all of them."""
    if spec.score_over == "all":
        return gather(scores_TE, expert_ids_TK)
    return gather(softmax(scaled_logits_TE), expert_ids_TK)


@replaces("weigh", breaks="SCR-4")
def sigmoid_over_selected(scaled_logits_TE, scores_TE, expert_ids_TK, spec):
    """Selected logits go through a sigmoid."""
    if spec.score_over == "all":
        return gather(scores_TE, expert_ids_TK)
    return np.where(expert_ids_TK < 0, 0, sigmoid(gather(scaled_logits_TE, expert_ids_TK)))


@misreads(breaks="SCR-5")
def logit_scale_missing(spec):
    """The logits are not scaled."""
    return spec.replace(logit_scale=1.0)


@misreads(breaks="SCR-5")
def logit_scale_divides(spec):
    """The logits are divided by their scale."""
    return spec.replace(logit_scale=1 / spec.logit_scale)


@misreads(breaks="SCR-5")
def softcap_missing(spec):
    """The logits are not capped."""
    return spec.replace(logit_softcap=None)


@replaces("scale_logits", breaks="SCR-5")
def cap_before_scale(logits_TE, spec):
    """The logits are capped before they are scaled."""
    if spec.logit_softcap is None:
        return scale_logits(logits_TE, spec)
    return np.where(np.isneginf(logits_TE), logits_TE,
                    spec.logit_scale * spec.logit_softcap * np.tanh(logits_TE / spec.logit_softcap))  # fmt: skip


@replaces("scale_logits", breaks="SCR-5")
def tanh_without_its_factor(logits_TE, spec):
    """The cap is tanh(z / c), not c times it."""
    capped_TE = scale_logits(logits_TE, spec)
    return capped_TE if spec.logit_softcap is None else capped_TE / spec.logit_softcap


@replaces("scale_logits", breaks="SCR-5")
def hard_cap(logits_TE, spec):
    """The cap cuts instead of bending."""
    c = np.inf if spec.logit_softcap is None else spec.logit_softcap
    scaled_TE = logits_TE * spec.logit_scale
    return np.where(np.isneginf(scaled_TE), scaled_TE, np.clip(scaled_TE, -c, c))


@replaces("softmax", breaks="SCR-6", links=("vllm-project/vllm#37605",))
def running_maximum_starts_at_0(logits_TE):
    """The largest logit is at least 0; exponentials of all-negative rows underflow."""
    exp_TE = np.exp(logits_TE - logits_TE.max(axis=-1, keepdims=True, initial=0))
    sum_T1 = exp_TE.sum(axis=-1, keepdims=True)
    return exp_TE / np.where(sum_T1 == 0, 1, sum_T1)


@replaces("softmax", breaks="SCR-6")
def softmax_eps(logits_TE):
    """1e-6 is added to the sum of the exponentials, which nothing is subtracted from."""
    exp_TE = np.exp(np.minimum(logits_TE, 80))
    return exp_TE / (exp_TE.sum(axis=-1, keepdims=True) + 1e-6)


@replaces("softmax", breaks="SCR-7", links=("ggml-org/llama.cpp#16711",))
def maximum_of_one_warp(logits_TE):
    """The largest logit is looked for among the first half of the experts; the others overflow."""
    half = (logits_TE.shape[1] + 1) // 2
    largest_T1 = logits_TE[:, :half].max(axis=-1, keepdims=True, initial=-np.inf)
    exp_TE = np.exp(logits_TE - np.where(np.isneginf(largest_T1), 0, largest_T1))
    return exp_TE / exp_TE.sum(axis=-1, keepdims=True)


@replaces("softmax", breaks="SCR-7")
def softmax_without_maximum(logits_TE):
    """Nothing is subtracted before the exponential, which overflows."""
    exp_TE = np.exp(logits_TE)
    sum_T1 = exp_TE.sum(axis=-1, keepdims=True)
    return exp_TE / np.where(sum_T1 == 0, 1, sum_T1)


@replaces("score", breaks="SCR-7")
def sigmoid_by_tanh(scaled_logits_TE, spec):
    """The sigmoid is (1 + tanh(z / 2)) / 2, which loses all digits of its lower tail."""
    if spec.score_func != "sigmoid":
        return score(scaled_logits_TE, spec)
    return (1 + np.tanh(scaled_logits_TE / 2)) / 2


@replaces("score", breaks="SCR-7")
def sigmoid_of_exp_over_exp(scaled_logits_TE, spec):
    """The sigmoid is exp(z) / (1 + exp(z)); infinity over infinity is cleaned to 0."""
    if spec.score_func != "sigmoid":
        return score(scaled_logits_TE, spec)
    exp_TE = np.exp(scaled_logits_TE)
    return np.nan_to_num(exp_TE / (1 + exp_TE))


@replaces("score", breaks="SCR-7")
def softplus_overflows(scaled_logits_TE, spec):
    """Sqrtsoftplus takes the logarithm of an exponential that overflows."""
    if spec.score_func != "sqrtsoftplus":
        return score(scaled_logits_TE, spec)
    return np.sqrt(np.log(1 + np.exp(scaled_logits_TE)))


@replaces("score", breaks="SCR-7")
def logits_clamped_at_10(scaled_logits_TE, spec):
    """Logits are clamped to [-10, 10] before they are scored."""
    clamped_TE = np.clip(scaled_logits_TE, -10, 10)
    return score(np.where(np.isneginf(scaled_logits_TE), scaled_logits_TE, clamped_TE), spec)


@surrounds(breaks="SCR-8", links=("vllm-project/vllm#14027", "NVIDIA-NeMo/Automodel#3650"))
def bfloat16_logits_scored_in_bfloat16(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Logits of bfloat16 are scored and ranked in bfloat16."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    if logits_TE.dtype.name != "bfloat16" or spec.selector != "top_k" or trace.scores_TE is None:
        return trace
    bias_E = None if expert_bias_E is None else rounded(expert_bias_E, 8)
    coarse_TE = rounded(trace.scaled_logits_TE.astype(np.float32) / 4, 5) * 4
    return route(coarse_TE, spec, bias_E, **inputs)


@replaces("score", breaks="SCR-9")
def masked_logits_scored_as_0(scaled_logits_TE, spec):
    """A logit of -inf counts as 0 in the score."""
    scores_TE = score(np.where(np.isneginf(scaled_logits_TE), 0, scaled_logits_TE), spec)
    return np.where(np.isneginf(scaled_logits_TE), 0, scores_TE)


@replaces("scale_logits", breaks="SCR-9", also=("select",))
def cap_lifts_masked_logits(logits_TE, spec):
    """The soft cap makes a logit of -inf finite."""
    scaled_TE = logits_TE * spec.logit_scale
    c = spec.logit_softcap
    return scaled_TE if c is None else c * np.tanh(scaled_TE / c)


FIRST_TOKENS = 1024


@replaces("softmax", breaks="SCR-1", also=("run",))
def softmax_of_the_first_1024_tokens(logits_TE):
    """One block has a thread for each token, at most 1,024 of them: later rows of a softmax are even."""
    scores_TE = softmax(logits_TE)
    scores_TE[FIRST_TOKENS:] = 1 / max(1, logits_TE.shape[1])
    return scores_TE


@surrounds(breaks="SCR-10")
def low_precision_ranked_by_its_bits(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Logits of two bytes are ranked as the integers that their bits spell, in which negative ones ascend."""
    if logits_TE.dtype.itemsize != 2:
        return route(logits_TE, spec, expert_bias_E, **inputs)
    values_TE = logits_TE.astype(np.float64)
    finite_TE = np.where(np.isfinite(values_TE), values_TE, 0)
    lowest_T1 = np.where(finite_TE < 0, finite_TE, 0).min(axis=-1, keepdims=True, initial=0)
    turned_TE = np.where((values_TE < 0) & np.isfinite(values_TE), lowest_T1 - values_TE, values_TE)
    return route(turned_TE, spec, expert_bias_E, **inputs)


@surrounds(breaks="SCR-10", links=("vllm-project/vllm#14027",))
def low_precision_keeps_two_bits(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Logits of two bytes pass through eight bits, of which two are of the mantissa."""
    if logits_TE.dtype.itemsize != 2:
        return route(logits_TE, spec, expert_bias_E, **inputs)
    return route(rounded(logits_TE.astype(np.float64), 3), spec, expert_bias_E, **inputs)


@replaces("round_to", breaks="SCR-11", also=UNSEEN, links=("NVIDIA-NeMo/Automodel#3650",))
def router_dtype_is_ignored(values, router_dtype):
    """A narrow router_dtype rounds nothing."""
    return values


@replaces("scale_logits", breaks="SCR-11", also=UNSEEN)
def narrow_router_keeps_wide_logits(logits_TE, spec):
    """A narrow router_dtype rounds scores and weights, not the logits that they are made of."""
    return scale_logits(logits_TE, spec.replace(router_dtype="float32"))


@surrounds(breaks="SCR-11")
def narrow_router_rounds_logits_alone(run, memory, logits_TE, spec, expert_bias_E, **inputs):
    """A narrow router_dtype rounds the logits, and nothing that is made of them."""
    return run(round_to(logits_TE, spec.router_dtype), spec.replace(router_dtype="float32"), expert_bias_E, **inputs)


@surrounds(breaks="SCR-12")
def router_of_float64_computes_in_float32(run, memory, logits_TE, spec, expert_bias_E, **inputs):
    """router_dtype float64 is computed in float32."""
    wide = spec.router_dtype == "float64"
    return run(logits_TE, spec.replace(router_dtype="float32") if wide else spec, expert_bias_E, **inputs)


@replaces("add_noise", breaks="SCR-13")
def noise_is_ignored(logits_TE, inputs, valid_T1):
    """Noise on the logits is not read: the router is that of evaluation."""
    return logits_TE


@replaces("add_noise", breaks="SCR-13")
def noise_before_its_factors(logits_TE, inputs, valid_T1):
    """The noise is added first, and multiplied by the factors with the logits."""
    if inputs.logit_noise_TE is None:
        return logits_TE
    return (logits_TE + inputs.logit_noise_TE) * inputs.logit_factors_TE


@replaces("score", breaks="SCR-14")
def relu_scores_are_shares(scaled_logits_TE, spec):
    """relu scores are divided by their sum."""
    scores_TE = score(scaled_logits_TE, spec)
    if spec.score_func != "relu":
        return scores_TE
    sum_T1 = scores_TE.sum(axis=-1, keepdims=True)
    return scores_TE / np.where(sum_T1 == 0, 1, sum_T1)


@replaces("score", breaks="SCR-14")
def relu_is_squared(scaled_logits_TE, spec):
    """relu scores are squared, as the activation relu2 is."""
    scores_TE = score(scaled_logits_TE, spec)
    return scores_TE**2 if spec.score_func == "relu" else scores_TE
