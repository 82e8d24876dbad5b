"""conformance, router, faults of the run: no single stage is wrong. Other tokens, padding, NaN, repetition, crashes."""

from dataclasses import replace

import numpy as np

from conformance.core.fault import replaces, surrounds
from moe_ref import UNUSED
from moe_ref.routing import normalise, softmax, top_k

NOISE = np.random.default_rng(0)
"""Goes on from call to call, as the state of a device does."""


@replaces("top_k", breaks="RUN-1", links=("ml-explore/mlx-examples#671",))
def partition_at_k(scores_TE, k):
    """argpartition gets kth = k for k - 1, which does not exist where all experts are selected."""
    np.argpartition(-scores_TE, k, axis=-1)
    return top_k(scores_TE, k)


@surrounds(breaks="RUN-2")
def zero_tokens_crash(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """A maximum over all tokens is taken, which does not exist for none."""
    logits_TE.max()
    return route(logits_TE, spec, expert_bias_E, **inputs)


@surrounds(breaks="RUN-1")
def equal_logits_crash(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """A token whose logits are all equal is taken for one that was never written."""
    if logits_TE.shape[1] > 1 and (logits_TE == logits_TE[:, :1]).all(axis=-1).any():
        raise RuntimeError("router logits were never written")
    return route(logits_TE, spec, expert_bias_E, **inputs)


@surrounds(breaks="RUN-2")
def zero_tokens_make_a_row(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """No token is padded to one, and the padding is returned."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    if len(logits_TE):
        return trace
    ids_1K = np.arange(spec.top_k)[None]
    return replace(trace, expert_ids_TK=ids_1K, weights_TK=np.zeros((1, spec.top_k)))


@surrounds(breaks="RUN-2")
def zero_tokens_lose_their_slots(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """The result of no token has shape (0,)."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    return trace if len(logits_TE) else replace(trace, weights_TK=trace.weights_TK.reshape(-1))


@replaces("normalise", breaks="RUN-3", links=("databricks/megablocks#87",))
def one_slot_normed_over_tokens(raw_weights_TK, shared_scores_TS, spec):
    """With top_k 1 the slot axis is squeezed away, and the last axis that is normed holds the tokens."""
    if spec.top_k > 1 or not spec.route_norm:
        return normalise(raw_weights_TK, shared_scores_TS, spec)
    return raw_weights_TK / raw_weights_TK.sum(), shared_scores_TS


@replaces("normalise", breaks="RUN-3")
def normed_over_the_batch(raw_weights_TK, shared_scores_TS, spec):
    """Weights are divided by the mean sum of all tokens."""
    if not spec.route_norm:
        return raw_weights_TK, shared_scores_TS
    return raw_weights_TK * len(raw_weights_TK) / raw_weights_TK.sum(), shared_scores_TS


@replaces("normalise", breaks="RUN-3", links=("flagos-ai/FlagGems#5123",))
def norm_of_the_row_before(raw_weights_TK, shared_scores_TS, spec):
    """Weights are divided by the sum that the row before left behind."""
    normed_TK, shared_TS = normalise(raw_weights_TK, shared_scores_TS, spec)
    if not spec.route_norm:
        return normed_TK, shared_TS
    sum_T1 = raw_weights_TK.sum(axis=-1, keepdims=True)
    return raw_weights_TK / np.roll(sum_T1, 1, axis=0), shared_TS


@replaces("softmax", breaks="RUN-3")
def softmax_over_tokens(logits_TE):
    """Softmax runs over the tokens."""
    return softmax(logits_TE.T).T


@replaces("softmax", breaks="RUN-3")
def softmax_shifted_by_the_batch(logits_TE):
    """The largest logit of the whole batch is subtracted; tokens far below it underflow."""
    exp_TE = np.exp(logits_TE - logits_TE.max(initial=-np.inf))
    return exp_TE / exp_TE.sum(axis=-1, keepdims=True)


@replaces("scale_logits", breaks="RUN-3")
def logits_centred_over_the_batch(logits_TE, spec):
    """Each expert's mean logit over the batch is subtracted."""
    finite_TE = np.where(np.isfinite(logits_TE), logits_TE, 0)
    return logits_TE - finite_TE.sum(axis=0) / max(len(logits_TE), 1)


@surrounds(breaks="RUN-3")
def first_token_leads(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Every token of a batch is routed to the first one's experts."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    return replace(trace, expert_ids_TK=np.tile(trace.expert_ids_TK[:1], (len(logits_TE), 1)))


@surrounds(breaks="RUN-4", links=("eduardzamfir/MoCE-IR#19",))
def noise_at_inference(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Exploration noise is added to the logits at inference too."""
    noisy_TE = logits_TE.astype(np.float64) + 0.1 * NOISE.normal(size=logits_TE.shape)
    return route(noisy_TE, spec, expert_bias_E, **inputs)


@replaces("top_k", breaks="RUN-4", links=("vllm-project/vllm#55514", "pytorch/pytorch#196177"))
def ties_fall_as_they_come(scores_TE, k):
    """Which of two equal scores wins differs from call to call."""
    order_E = NOISE.permutation(scores_TE.shape[1])
    return order_E[np.argsort(-scores_TE[:, order_E], axis=-1, kind="stable")][:, :k]


@surrounds(breaks="RUN-4")
def weights_by_atomics(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Weights vary by a rounding from call to call."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    ulps_TK = NOISE.integers(-1, 2, trace.weights_TK.shape)
    return replace(trace, weights_TK=trace.weights_TK * (1 + ulps_TK * np.finfo(np.float32).eps))


def route_zeros_for_nan(route, logits_TE, spec, expert_bias_E, **inputs):
    """Which rows hold a NaN, and a trace in which these rows were 0."""
    nan_T = np.isnan(logits_TE.astype(np.float64)).any(axis=-1)
    if "token_mask_T" in inputs:
        nan_T &= inputs["token_mask_T"]
    return nan_T, route(np.where(nan_T[:, None], 0, logits_TE), spec, expert_bias_E, **inputs)


@surrounds(breaks="RUN-5", links=("vllm-project/vllm#39391", "openxla/xla#48119"))
def nan_rows_repeat_expert_0(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """No logit beats a NaN, so every slot of its row keeps the initial id 0."""
    nan_T, trace = route_zeros_for_nan(route, logits_TE, spec, expert_bias_E, **inputs)
    return replace(trace, expert_ids_TK=np.where(nan_T[:, None], 0, trace.expert_ids_TK))


@surrounds(breaks="RUN-5", links=("sgl-project/sglang#30079",))
def nan_rows_out_of_range(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """A row with a NaN gets the sentinel id E."""
    nan_T, trace = route_zeros_for_nan(route, logits_TE, spec, expert_bias_E, **inputs)
    return replace(trace, expert_ids_TK=np.where(nan_T[:, None], spec.num_choices, trace.expert_ids_TK))


@surrounds(breaks="RUN-5", links=("intel/torch-xpu-ops#4839",))
def nan_rows_minus_one(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """A row with a NaN gets ids -1."""
    nan_T, trace = route_zeros_for_nan(route, logits_TE, spec, expert_bias_E, **inputs)
    return replace(trace, expert_ids_TK=np.where(nan_T[:, None], -1, trace.expert_ids_TK))


@surrounds(breaks="RUN-5", links=("jax-ml/jax#21397",))
def nan_dropped_and_an_expert_repeated(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """The slot of a NaN is filled with the expert of the slot before."""
    nan_T, trace = route_zeros_for_nan(route, logits_TE, spec, expert_bias_E, **inputs)
    ids_TK = trace.expert_ids_TK.copy()
    ids_TK[nan_T, -1:] = ids_TK[nan_T, :1]
    return replace(trace, expert_ids_TK=ids_TK)


@surrounds(breaks="RUN-5")
def nan_spreads(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """A NaN in one token makes the weights of every token NaN."""
    nan_T, trace = route_zeros_for_nan(route, logits_TE, spec, expert_bias_E, **inputs)
    return replace(trace, weights_TK=trace.weights_TK * (np.nan if nan_T.any() else 1))


@surrounds(breaks="RUN-6", links=("vllm-project/vllm#50759",))
def padding_ignored_with_groups(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """The grouped path does not look at the token mask."""
    if spec.num_expert_groups is None:
        return route(logits_TE, spec, expert_bias_E, **inputs)
    valid_T = inputs.pop("token_mask_T", np.ones(len(logits_TE), dtype=bool))
    return route(np.where(valid_T[:, None], logits_TE, 0), spec, expert_bias_E, **inputs)


@surrounds(breaks="RUN-6")
def padding_goes_to_expert_0(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """A padding token has expert 0 in every slot, with weight 0."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    padding_T1 = ~inputs.get("token_mask_T", np.ones(len(logits_TE), dtype=bool))[:, None]
    return replace(trace, expert_ids_TK=np.where(padding_T1, 0, trace.expert_ids_TK))


@surrounds(breaks="RUN-6")
def padding_keeps_weights(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """A padding token has ids -1 and weights 1 / K."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    padding_T1 = ~inputs.get("token_mask_T", np.ones(len(logits_TE), dtype=bool))[:, None]
    return replace(trace, weights_TK=np.where(padding_T1, 1 / spec.top_k, trace.weights_TK))


STALE: dict[int, np.ndarray] = {}
"""The ids that the last call with as many slots left in the buffer."""


@surrounds(breaks="RUN-6", links=("sgl-project/sglang#36404",))
def padding_shows_the_call_before(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """The rows of padding tokens hold what the call before left there."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    ids_TK = trace.expert_ids_TK.copy()
    padding_T = ~inputs.get("token_mask_T", np.ones(len(logits_TE), dtype=bool))
    before_TK = STALE.get(spec.top_k, np.zeros((0, spec.top_k), dtype=np.int64))
    rows = np.flatnonzero(padding_T)
    rows = rows[rows < len(before_TK)]
    ids_TK[rows] = np.where(before_TK[rows] == UNUSED, 0, before_TK[rows])
    STALE[spec.top_k] = trace.expert_ids_TK
    return replace(trace, expert_ids_TK=ids_TK)


@surrounds(breaks="RUN-6")
def padding_closes_up(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Valid tokens are moved to the front and stay there."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    valid_T = inputs.get("token_mask_T", np.ones(len(logits_TE), dtype=bool))
    order_T = np.argsort(~valid_T, kind="stable")
    return replace(trace, expert_ids_TK=trace.expert_ids_TK[order_T], weights_TK=trace.weights_TK[order_T])


@surrounds(breaks="RUN-7")
def softmax_in_place(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """The logits that are given are the buffer in which the softmax is computed."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    if spec.score_func == "softmax" and trace.scores_TE is not None:
        logits_TE[:, : spec.num_choices] = trace.scores_TE.astype(logits_TE.dtype)
    return trace


@surrounds(breaks="RUN-7")
def masked_logits_cleaned_in_place(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """A logit of -inf is replaced, in the array that is given, by the lowest finite number."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    logits_TE[np.isneginf(logits_TE.astype(np.float64))] = -3e4
    return trace


@surrounds(breaks="RUN-10")
def results_share_a_buffer(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Ids and weights are written into arrays that a router of this size has once, and these are returned."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    own = memory.setdefault((spec, trace.weights_TK.shape), (trace.expert_ids_TK.copy(), trace.weights_TK.copy()))
    own[0][...], own[1][...] = trace.expert_ids_TK, trace.weights_TK
    return replace(trace, expert_ids_TK=own[0], weights_TK=own[1])


@replaces("top_k", breaks="RUN-8", links=("vllm-project/vllm#55514",))
def ties_by_the_place_in_the_batch(scores_TE, k):
    """Two threads share a token: of equal scores an even row of the batch takes the lower id, an odd one the higher."""
    last = scores_TE.shape[1] - 1
    higher_TK = last - top_k(scores_TE[:, ::-1], k)
    odd_T1 = (np.arange(len(scores_TE)) % 2 == 1)[:, None]
    return np.where(odd_T1, higher_TK, top_k(scores_TE, k))


def route_zeros_for_infinite(route, logits_TE, spec, expert_bias_E, **inputs):
    """Which rows hold -inf alone, and a trace in which these rows were 0."""
    infinite_T = np.isneginf(logits_TE.astype(np.float64)).all(axis=-1)
    return infinite_T, route(np.where(infinite_T[:, None], 0, logits_TE), spec, expert_bias_E, **inputs)


@surrounds(breaks="RUN-9", links=("vllm-project/vllm#39391",))
def infinite_rows_repeat_expert_0(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """No logit beats -inf, so every slot of a row of it keeps the initial id 0."""
    infinite_T, trace = route_zeros_for_infinite(route, logits_TE, spec, expert_bias_E, **inputs)
    return replace(trace, expert_ids_TK=np.where(infinite_T[:, None], 0, trace.expert_ids_TK))


@surrounds(breaks="RUN-9")
def infinite_rows_keep_a_weight(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """A row of -inf goes nowhere, with weights of 1 / K."""
    infinite_T, trace = route_zeros_for_infinite(route, logits_TE, spec, expert_bias_E, **inputs)
    return replace(
        trace,
        expert_ids_TK=np.where(infinite_T[:, None], UNUSED, trace.expert_ids_TK),
        weights_TK=np.where(infinite_T[:, None], 1 / spec.top_k, trace.weights_TK),
    )


@surrounds(breaks="RUN-9")
def infinite_rows_spread(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """A row of -inf makes every weight of its batch NaN."""
    infinite_T, trace = route_zeros_for_infinite(route, logits_TE, spec, expert_bias_E, **inputs)
    return replace(trace, weights_TK=trace.weights_TK * (np.nan if infinite_T.any() else 1))
