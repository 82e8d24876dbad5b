"""moe_jax, routing: from logits to expert ids and weights, one function per stage, in order.

    gate -> scale_logits -> score -> bias_choice -> limit_groups -> select -> weigh -> normalise -> scale_weights

Legend: T tokens, D model dim, E choices (experts, then null experts), K top_k, G groups, P experts per group,
L groups kept, S router-scored shared experts. Start at `route`; ties are settled in `top_k.py`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from moe_jax.arrays import wide_dtype
from moe_jax.explicit import by_token, in_any_mode
from moe_jax.pytrees import tree_of_arrays
from moe_jax.rounding import dtype_of_router, round_to
from moe_jax.sinkhorn import sinkhorn
from moe_jax.taking import take_tokens
from moe_jax.top_k import top_k
from moe_ref.specs.checks import shape_and_kind
from moe_ref.specs.ids import UNUSED
from moe_ref.specs.inputs import NO_INPUTS, RouterInputs
from moe_ref.specs.router import RouterSpec

SMALL_LOGIT = -40.0
"""Below it, log(1 + exp(z)) is exp(z) to the last bit of float64."""


@tree_of_arrays
@dataclass(frozen=True, kw_only=True)
class RoutingTrace:
    """What `route` computes; None where a spec has no such stage.

    Under jit a field that is not returned is not computed: return only those that are needed. Gradients flow through
    weights_TK, shared_weights_TS and scores_TE; the others say what was chosen, and are constants.
    """

    expert_ids_TK: jax.Array
    """(T, K) int32, best first; UNUSED for padding tokens and empty slots."""
    weights_TK: jax.Array
    scores_TE: jax.Array | None
    scores_for_choice_TE: jax.Array | None
    group_scores_TG: jax.Array | None
    group_ids_TL: jax.Array | None
    """(T, L) int32, best first."""
    shared_weights_TS: jax.Array | None
    logits_TE: jax.Array
    """As they came, in the dtype of routing; 0 for padding tokens."""


def gate(
    x_TD: ArrayLike, gate_ED: ArrayLike, gate_bias_E: ArrayLike | None = None, *, spec: RouterSpec | None = None
) -> jax.Array:
    """The logits are x @ gate.T, plus the learned gate bias. [GAT-1, GAT-2]

    Products are summed in float32 at least, whatever the inputs' dtype and the platform's default precision.

    Args:
        x_TD: (T, D) tokens.
        gate_ED: (E, D) gate weights, one row per column of the logits.
        gate_bias_E: (E,) learned bias; it is part of the logits, unlike expert_bias.
        spec: of the router, whose router_dtype may be float64; None: float32.

    Returns:
        logits_TE: (T, E), float32, or float64 where x_TD and gate_ED are, or the router is.
    """
    x_TD = _array("x_TD", x_TD, (None, None), "float")
    gate_ED = _array("gate_ED", gate_ED, (None, x_TD.shape[1]), "float")
    given = jnp.promote_types(x_TD.dtype, gate_ED.dtype)
    dtype = wide_dtype(given) if spec is None else dtype_of_router(spec, given)
    # HIGHEST: the default multiplies in bfloat16 on TPU and in TF32 on GPU, which changes choices.
    logits_TE = jnp.einsum("td,ed->te", x_TD, gate_ED, precision=lax.Precision.HIGHEST, preferred_element_type=dtype)
    if gate_bias_E is None:
        return logits_TE
    return logits_TE + _array("gate_bias_E", gate_bias_E, (gate_ED.shape[0],), "float").astype(dtype)[None]


@in_any_mode(by_token)
def route(
    logits_TE: jax.Array,
    spec: RouterSpec,
    *,
    expert_bias_E: jax.Array | None = None,
    learned_scale: jax.Array | None = None,
    inputs: RouterInputs = NO_INPUTS,
    token_mask_T: jax.Array | None = None,
) -> RoutingTrace:
    """Every stage of routing in order; pure, and static in `spec` alone.

    Computed in float32, or in float64 for float64 logits or that router_dtype. What depends on data cannot raise under
    jit. So a token with fewer than K choices that are not -inf gets unused slots (with expert_choice that is no error),
    a token id outside the table a row of them, a given id past the last choice the weight NaN, and a NaN logit is
    chosen and makes its weight NaN.

    Args:
        logits_TE: (T, num_logits) floats, finite or -inf (never chosen).
        spec: what is computed.
        expert_bias_E: (E,) added to what is ranked, for the choice only.
        learned_scale: (E,) for learned_scale 'per_expert', a scalar for 'global'.
        inputs: what the selector reads besides the logits; a pytree. The seed is a jax.random key.
        token_mask_T: (T,) bools; a padding token (False) gets ids -1 and weights 0, whatever its row holds.

    Raises:
        ValueError: wrong shapes or dtypes, an input that the spec lacks, or one that it does not read.
    """
    logits_TE = _array("logits_TE", logits_TE, (None, spec.num_logits), "float")
    T, E, dtype = logits_TE.shape[0], spec.num_choices, dtype_of_router(spec, logits_TE.dtype)
    bias_E = _bias(expert_bias_E, spec, dtype)
    scale = _learned_scale(learned_scale, spec, dtype)
    valid_T1 = _mask(token_mask_T, T)[:, None]
    inputs.check(spec, T)

    # Padding is cleared first, so that a NaN in it reaches neither a value nor a gradient.
    clean_TE = jnp.where(valid_T1, logits_TE, 0).astype(dtype)
    scaled_TE = scale_logits(add_noise(clean_TE, inputs, valid_T1), spec)
    choices_TE, shared_logits_TS = scaled_TE[:, :E], scaled_TE[:, E:]
    scores_TE = round_to(score(choices_TE, spec), spec.router_dtype) if spec.has_scores else None
    scores_for_choice_TE = group_scores_TG = group_ids_TL = None
    if spec.ranks and spec.selector != "sinkhorn":
        scores_for_choice_TE = bias_choice(choices_TE, scores_TE, bias_E, spec)
    if scores_for_choice_TE is not None and spec.selector == "expert_choice":
        scores_for_choice_TE = take_tokens(scores_for_choice_TE, None if token_mask_T is None else valid_T1, spec)
    if spec.selector == "sinkhorn":
        scores_for_choice_TE = lax.stop_gradient(choices_TE + sinkhorn(choices_TE, valid_T1))
    if scores_for_choice_TE is not None and spec.quota_groups is not None:
        scores_for_choice_TE = limit_quotas(scores_for_choice_TE, spec)
    if scores_for_choice_TE is not None and spec.num_expert_groups is not None:
        scores_for_choice_TE, group_scores_TG, group_ids_TL = limit_groups(scores_for_choice_TE, spec)

    if scores_for_choice_TE is not None:
        chosen_TK = select(scores_for_choice_TE, spec)
    elif spec.selector == "sparsemixer":
        chosen_TK = select(lax.stop_gradient(choices_TE), spec)
    else:
        chosen_TK = choose(T, spec, inputs)
    expert_ids_TK = jnp.where(valid_T1, chosen_TK, UNUSED)

    if spec.selector == "sparsemixer":
        raw_TK = banded_weights(choices_TE, expert_ids_TK, spec)
    else:
        raw_TK = weigh(choices_TE, scores_TE, expert_ids_TK, group_ids_TL, spec)
    if spec.num_zero_experts:
        # A zero expert weighs 0 before the norm. [WGT-12]
        raw_TK = jnp.where(expert_ids_TK >= spec.num_choices - spec.num_zero_experts, 0, raw_TK)
    shared_scores_TS = round_to(score(shared_logits_TS, spec), spec.router_dtype)
    normed_TK, normed_shared_TS = normalise(raw_TK, shared_scores_TS, spec)
    shared_TS = normed_shared_TS * spec.route_scale * (scale if spec.learned_scale == "global" else 1)
    shared_TS = round_to(shared_TS, spec.router_dtype)
    weights_TK = round_to(scale_weights(normed_TK, expert_ids_TK, scale, spec), spec.router_dtype)
    if inputs.given_weights_TK is not None:
        # Given weights are final, and constants; an unused slot weighs 0 whatever is given. [RPL-3]
        given_TK = jnp.asarray(inputs.given_weights_TK).astype(dtype)
        weights_TK = jnp.where(expert_ids_TK == UNUSED, 0, given_TK)
    return RoutingTrace(
        expert_ids_TK=expert_ids_TK,
        weights_TK=weights_TK,
        scores_TE=scores_TE,
        scores_for_choice_TE=scores_for_choice_TE,
        group_scores_TG=group_scores_TG,
        group_ids_TL=group_ids_TL,
        shared_weights_TS=jnp.where(valid_T1, shared_TS, 0) if spec.num_scored_shared_experts else None,
        logits_TE=clean_TE,
    )


def add_noise(logits_TE: jax.Array, inputs: RouterInputs, valid_T1: jax.Array) -> jax.Array:
    """Noise is an input: factors multiply the logits, then a noise is added, before all else. [SCR-13]"""
    factors_TE, noise_TE = inputs.logit_factors_TE, inputs.logit_noise_TE
    if factors_TE is not None:
        logits_TE = logits_TE * jnp.where(valid_T1, factors_TE, 1).astype(logits_TE.dtype)
    return logits_TE if noise_TE is None else logits_TE + jnp.where(valid_T1, noise_TE, 0).astype(logits_TE.dtype)


def scale_logits(logits_TE: jax.Array, spec: RouterSpec) -> jax.Array:
    """Logits are scaled, then soft-capped, before they are scored or ranked; a narrow router_dtype rounds. [SCR-5]"""
    scaled_TE = round_to(logits_TE, spec.router_dtype) * spec.logit_scale
    if spec.logit_softcap is not None:
        capped_TE = spec.logit_softcap * jnp.tanh(scaled_TE / spec.logit_softcap)
        # A cap is finite, but an expert that is masked stays masked.
        scaled_TE = jnp.where(jnp.isneginf(scaled_TE), scaled_TE, capped_TE)
    return round_to(scaled_TE, spec.router_dtype) if spec.scales_logits else scaled_TE


def score(scaled_logits_TE: jax.Array, spec: RouterSpec) -> jax.Array:
    """Scores are a function of the scaled logits alone; no bias enters them. [SCR-1, SCR-2, SCR-3, SCR-14]"""
    if spec.score_func == "softmax":
        return softmax(scaled_logits_TE)
    if spec.score_func == "sigmoid":
        return jax.nn.sigmoid(scaled_logits_TE)
    if spec.score_func == "relu":
        return jax.nn.relu(scaled_logits_TE)  # whose slope at 0 is 0
    # Two branches, each fed its own logits: sqrt has an infinite slope where softplus underflows, and exp overflows.
    small_TE = scaled_logits_TE < SMALL_LOGIT
    large_TE = jnp.sqrt(jax.nn.softplus(jnp.where(small_TE, 0, scaled_logits_TE)))
    return jnp.where(small_TE, jnp.exp(jnp.where(small_TE, scaled_logits_TE, 0) / 2), large_TE)


def softmax(logits_TE: jax.Array) -> jax.Array:
    """Softmax over the last axis; -inf gives exactly 0, and so does a row of nothing else."""
    largest_T1 = lax.stop_gradient(logits_TE.max(axis=-1, keepdims=True, initial=-jnp.inf))
    # jax.nn.softmax gives NaN for a row of -inf.
    exp_TE = jnp.exp(logits_TE - jnp.where(jnp.isneginf(largest_T1), 0, largest_T1))
    sum_T1 = exp_TE.sum(axis=-1, keepdims=True)
    return exp_TE / jnp.where(sum_T1 == 0, 1, sum_T1)


def bias_choice(
    scaled_logits_TE: jax.Array, scores_TE: jax.Array | None, expert_bias_E: jax.Array | None, spec: RouterSpec
) -> jax.Array:
    """What is ranked: scores (or logits) plus expert_bias; a logit of -inf is never chosen. [SEL-4, SEL-9]"""
    ranked_TE = scaled_logits_TE if spec.select_by == "logit" or scores_TE is None else scores_TE
    biased_TE = ranked_TE if expert_bias_E is None else ranked_TE + expert_bias_E[None]
    return lax.stop_gradient(jnp.where(jnp.isneginf(scaled_logits_TE), -jnp.inf, biased_TE))


def limit_groups(biased_scores_TE: jax.Array, spec: RouterSpec) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Only the L groups with the best scores are kept; a group's score sums its best k choice scores. [GRP-1]

    Returns:
        scores_for_choice_TE: experts of dropped groups replaced by mask_fill.
        group_scores_TG: (T, G).
        group_ids_TL: (T, L) kept groups, best first; ties go to the lower group id.
    """
    assert spec.num_expert_groups is not None
    assert spec.num_limited_groups is not None
    grouped_TGP = biased_scores_TE.reshape(-1, spec.num_expert_groups, spec.experts_per_group)
    group_scores_TG = top_k(grouped_TGP, spec.group_score_k)[0].sum(axis=-1)
    group_ids_TL = top_k(group_scores_TG, spec.num_limited_groups)[1]
    # -inf, not 0: choice scores can be negative (huggingface/transformers#45440).
    scores_for_choice_TE = jnp.where(kept_experts(group_ids_TL, spec), biased_scores_TE, spec.mask_fill)
    return scores_for_choice_TE, group_scores_TG, group_ids_TL


def kept_experts(group_ids_TL: jax.Array, spec: RouterSpec) -> jax.Array:
    """Whether each expert belongs to a kept group. Expert i belongs to group i // P. [GRP-2]"""
    kept_TG = (group_ids_TL[:, :, None] == jnp.arange(spec.num_expert_groups)[None, None]).any(axis=1)
    return jnp.repeat(kept_TG, spec.experts_per_group, axis=1)


def limit_quotas(ranked_TE: jax.Array, spec: RouterSpec) -> jax.Array:
    """Each quota group keeps its top_k / quota_groups best, ties to the lower id; the others are -inf. [SEL-18]"""
    assert spec.quota_groups is not None
    grouped_TGP = ranked_TE.reshape(-1, spec.quota_groups, spec.num_experts // spec.quota_groups)
    ids_TGQ = top_k(grouped_TGP, spec.top_k // spec.quota_groups)[1]
    kept_TGP = (ids_TGQ[..., None] == jnp.arange(grouped_TGP.shape[-1])[None, None, None]).any(axis=-2)
    return jnp.where(kept_TGP, grouped_TGP, -jnp.inf).reshape(ranked_TE.shape)


def select(scores_for_choice_TE: jax.Array, spec: RouterSpec) -> jax.Array:
    """Each token selects the top_k choices with the best choice scores. [SEL-1, SEL-2, SEL-3]

    Under threshold it is those of them that are above it, under top_p those before which no more than that share is
    taken; the slots after them are unused. [SEL-21, SEL-22]
    """
    chosen_scores_TK, expert_ids_TK = top_k(scores_for_choice_TE, spec.top_k)
    masked_TK = jnp.isneginf(chosen_scores_TK)
    unused_TK = masked_TK
    if spec.selector == "threshold":
        unused_TK = ~(chosen_scores_TK > spec.threshold)
    if spec.selector == "top_p":
        assert spec.top_p is not None
        share_TK = jnp.where(masked_TK, 0, chosen_scores_TK)
        before_TK = jnp.cumsum(share_TK, axis=-1)[:, :-1]
        unused_TK = masked_TK.at[:, 1:].max(before_TK > spec.top_p)
    return jnp.where(unused_TK, UNUSED, expert_ids_TK)


def choose(num_tokens: int, spec: RouterSpec, inputs: RouterInputs) -> jax.Array:
    """Expert ids by a selector that looks at no score. [SEL-14 .. SEL-17]"""
    T, K = num_tokens, spec.top_k
    if spec.selector == "table":
        table_VK = jnp.asarray(inputs.table_VK).astype(jnp.int32)
        ids_T = jnp.asarray(inputs.token_ids_T)
        return table_VK.at[ids_T].get(mode="fill", fill_value=UNUSED, wrap_negative_indices=False)
    if spec.selector == "given":
        return jnp.maximum(jnp.asarray(inputs.given_ids_TK).astype(jnp.int32), UNUSED)
    if spec.selector == "round_robin":
        first_token = 0 if inputs.first_token is None else inputs.first_token
        # The first slot is reduced first: its number in a whole batch may exceed int32.
        first_slot = first_token % spec.num_experts * K
        return ((first_slot + jnp.arange(T * K, dtype=jnp.int32)) % spec.num_experts).reshape(T, K)
    if inputs.seed is None:
        raise ValueError("seed is None; selector 'random' draws with a jax.random key")
    return top_k(jax.random.uniform(inputs.seed, (T, spec.num_choices)), K)[1]


def gather(values_TE: jax.Array, expert_ids_TK: jax.Array) -> jax.Array:
    """The values of the selected experts; an unused slot reads 0. [WGT-8, WGT-11]"""
    found_TK = jnp.take_along_axis(values_TE, jnp.maximum(expert_ids_TK, 0), axis=-1, mode="fill")
    return jnp.where(expert_ids_TK == UNUSED, 0, found_TK)


def weigh(
    scaled_logits_TE: jax.Array,
    scores_TE: jax.Array | None,
    expert_ids_TK: jax.Array,
    group_ids_TL: jax.Array | None,
    spec: RouterSpec,
) -> jax.Array:
    """Weights are the selected scores, without any bias. [WGT-1, WGT-3]"""
    if scores_TE is None:
        chosen_logits_TK = gather(scaled_logits_TE, expert_ids_TK)
        return softmax(jnp.where(expert_ids_TK == UNUSED, -jnp.inf, chosen_logits_TK))
    if group_ids_TL is not None and spec.weights_from == "masked_scores":
        return gather(jnp.where(kept_experts(group_ids_TL, spec), scores_TE, 0), expert_ids_TK)
    return gather(scores_TE, expert_ids_TK)


def banded_weights(scaled_logits_TE: jax.Array, expert_ids_TK: jax.Array, spec: RouterSpec) -> jax.Array:
    """sparsemixer: slot j is weighted by a softmax over the band below the best remaining expert. [SEL-13, WGT-15]

    The band holds the remaining experts whose distance to the best is at most 2 * mixer_eps of the larger of
    |logit| and the best. Weights of a token need not sum to 1. Source: arXiv:2409.12136.
    """
    ids_1E = jnp.arange(spec.num_choices)[None]
    remaining_TE = scaled_logits_TE
    slots = []
    for slot in range(spec.top_k):
        ids_T1 = expert_ids_TK[:, slot, None]
        best_T1 = gather(scaled_logits_TE, ids_T1)
        size_TE = jnp.maximum(jnp.abs(scaled_logits_TE), best_T1)
        in_band_TE = best_T1 - scaled_logits_TE <= 2 * spec.mixer_eps * size_TE
        slots.append(gather(softmax(jnp.where(in_band_TE, remaining_TE, -jnp.inf)), ids_T1))
        remaining_TE = jnp.where(ids_1E == ids_T1, -jnp.inf, remaining_TE)
    return jnp.concatenate(slots, axis=-1)


def normalise(raw_weights_TK: jax.Array, shared_scores_TS: jax.Array, spec: RouterSpec) -> tuple[jax.Array, jax.Array]:
    """With route_norm a token's weights are divided by their norm; a norm of 0 leaves them 0. [WGT-2, WGT-6, WGT-7]"""
    if not spec.route_norm:
        return raw_weights_TK, shared_scores_TS
    in_norm = jnp.concatenate([raw_weights_TK, shared_scores_TS], -1) if spec.norm_with_shared else raw_weights_TK
    # Everything is in units of the largest weight, so that no power and no gradient over- or underflows: d(w / n)
    # holds n ** -2, which is inf in float32 from n = 1e-20. The norm is linear in that unit, so it is a constant.
    largest_T1 = lax.stop_gradient(in_norm.max(axis=-1, keepdims=True))
    # Below the smallest normal number XLA may flush to 0, so that is where 0 begins.
    zero_T1 = largest_T1 < jnp.finfo(in_norm.dtype).tiny
    unit_T1 = jnp.where(zero_T1, 1, largest_T1)
    norm_T1 = jnp.where(zero_T1, 1, p_norm(in_norm / unit_T1, spec.norm_p))
    eps_T1 = spec.norm_eps / unit_T1
    divisor_T1 = norm_T1 + eps_T1 if spec.norm_form == "add_eps" else jnp.where(norm_T1 >= eps_T1, norm_T1, eps_T1)
    weights_TK = jnp.where(zero_T1, 0, raw_weights_TK / unit_T1 / divisor_T1)
    if not spec.norm_with_shared:
        return weights_TK, shared_scores_TS
    return weights_TK, jnp.where(zero_T1, 0, shared_scores_TS / unit_T1 / divisor_T1)


def p_norm(weights_TK: jax.Array, p: float) -> jax.Array:
    """(sum of w ** p) ** (1 / p) of each row; a weight of 0 has slope 0 in it unless p is 1."""
    if p == 1:
        return weights_TK.sum(axis=-1, keepdims=True)
    # The inner where keeps 0 ** (p - 1), inf for p < 1, out of the gradient.
    zero_TK = weights_TK == 0
    sum_T1 = jnp.where(zero_TK, 0, jnp.where(zero_TK, 1, weights_TK) ** p).sum(axis=-1, keepdims=True)
    return jnp.where(sum_T1 == 0, 1, sum_T1) ** (1 / p)


def scale_weights(
    weights_TK: jax.Array, expert_ids_TK: jax.Array, learned_scale: ArrayLike, spec: RouterSpec
) -> jax.Array:
    """route_scale, then the learned scale, multiply the weights once; a skipped choice weighs 0. [WGT-4, WGT-9]"""
    per_expert = spec.learned_scale == "per_expert"
    factor = jnp.asarray(learned_scale)[jnp.maximum(expert_ids_TK, 0)] if per_expert else learned_scale
    scaled_TK = weights_TK * spec.route_scale * factor
    if spec.null_kind == "skip":
        return jnp.where(expert_ids_TK >= spec.num_experts, 0, scaled_TK)
    return scaled_TK


def _array(field: str, value, shape: tuple[int | None, ...], kind: str) -> jax.Array:
    """`value` as an array of the wanted shape (None matches any length) and kind (float, int, bool)."""
    found = jnp.asarray(value)
    shape_and_kind(field, found, shape, kind)
    return found


def _bias(expert_bias_E, spec: RouterSpec, dtype):
    if expert_bias_E is None:
        return None
    if not spec.takes_bias:
        raise ValueError(f"expert_bias_E is given, but selector {spec.selector!r} takes none")
    return _array("expert_bias_E", expert_bias_E, (spec.num_choices,), "float").astype(dtype)


def _learned_scale(learned_scale, spec: RouterSpec, dtype):
    if spec.learned_scale == "none":
        if learned_scale is not None:
            raise ValueError("learned_scale is given, but the spec's learned_scale is 'none'")
        return 1
    if learned_scale is None:
        raise ValueError(f"learned_scale is None; the spec's is {spec.learned_scale!r}")
    shape = (spec.num_choices,) if spec.learned_scale == "per_expert" else ()
    return _array("learned_scale", learned_scale, shape, "float").astype(dtype)


def _mask(token_mask_T, num_tokens: int):
    if token_mask_T is None:
        return jnp.ones(num_tokens, dtype=bool)
    return _array("token_mask_T", token_mask_T, (num_tokens,), "bool")
