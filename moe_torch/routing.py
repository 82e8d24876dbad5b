"""moe_torch, routing: from logits to expert ids and weights, one function per stage, in order.

    scale_logits -> score -> bias_choice -> limit_groups -> select -> weigh -> normalise -> scale_weights

Legend: T tokens, D model dim, E choices (experts, then null experts), K top_k, G groups, P experts per group,
L groups kept, S router-scored shared experts. What is computed is `moe_ref.route`; how, is decided here:
stages compute in float32 (float64 for float64 logits), the choice is not differentiated, and ties go to the lower id.
Start at `route`; `router.NodeLimitedRouter` adds the gate and the balancing bias.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_ref.specs.checks import shape_and_kind
from moe_ref.specs.ids import UNUSED
from moe_ref.specs.inputs import NO_INPUTS, RouterInputs
from moe_ref.specs.router import RouterSpec
from moe_torch.kernels.choice import for_router, say_once
from moe_torch.kernels.router_ops import arguments_of, route_tokens
from moe_torch.modes import host_reads_are_free, transformed
from moe_torch.rounding import dtype_of_router, round_to
from moe_torch.selection import (
    NEG_INF,
    kept_experts,
    limit_groups,
    select,
    select_by_quota,
    select_varying,
    take_tokens,
    top_k,
)
from moe_torch.sinkhorn import sinkhorn


@dataclass(frozen=True, kw_only=True)
class Stages:
    """What lies between logits and choice; None where a spec has no such stage."""

    scores_TE: Tensor | None = None
    biased_scores_TE: Tensor | None = None
    group_scores_TG: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What `route` returns, under the names of moe_ref's trace; None where a spec has no such stage."""

    expert_ids_TK: Tensor
    weights_TK: Tensor
    group_ids_TL: Tensor | None
    shared_weights_TS: Tensor | None
    mask_fill: float
    stages: Stages | Callable[[], Stages]
    """Or how they are computed: a kernel writes none of them, and few callers ask."""
    logits_TE: Tensor | None = None
    """As they came, in the dtype of routing; 0 for padding tokens. For losses."""
    chosen_ids_TK: Tensor | None = None
    """Before a capacity dropped slots, which is what counts and losses are of; None: expert_ids_TK."""

    def _stages(self) -> Stages:
        return self.stages if isinstance(self.stages, Stages) else self.stages()

    @property
    def scores_TE(self) -> Tensor | None:
        """After the score function, without any bias."""
        return self._stages().scores_TE

    @property
    def biased_scores_TE(self) -> Tensor | None:
        """What was ranked, before groups were dropped."""
        return self._stages().biased_scores_TE

    @property
    def group_scores_TG(self) -> Tensor | None:
        """What groups were ranked by."""
        return self._stages().group_scores_TG

    @property
    def scores_for_choice_TE(self) -> Tensor | None:
        """What was ranked; experts of dropped groups are mask_fill."""
        # Computed when asked for: the selection itself does not need this pass over (T, E).
        stages = self._stages()
        if stages.biased_scores_TE is None or self.group_ids_TL is None or stages.group_scores_TG is None:
            return stages.biased_scores_TE
        kept_TE = kept_experts(self.group_ids_TL, stages.group_scores_TG, stages.biased_scores_TE)
        return stages.biased_scores_TE.masked_fill(~kept_TE, self.mask_fill)


def add_noise(logits_TE: Tensor, inputs: RouterInputs, token_mask_T: Tensor | None) -> Tensor:
    """Noise is an input: factors multiply the logits, then a noise is added, before all else. [SCR-13]"""
    factors_TE, noise_TE = inputs.logit_factors_TE, inputs.logit_noise_TE
    if token_mask_T is not None:  # whatever is given for padding
        factors_TE = None if factors_TE is None else factors_TE.masked_fill(~token_mask_T[:, None], 1)
        noise_TE = None if noise_TE is None else noise_TE.masked_fill(~token_mask_T[:, None], 0)
    if factors_TE is not None:
        logits_TE = logits_TE * factors_TE.to(logits_TE.dtype)
    return logits_TE if noise_TE is None else logits_TE + noise_TE.to(logits_TE.dtype)


def scale_logits(logits_TE: Tensor, spec: RouterSpec) -> Tensor:
    """Logits are scaled, then soft-capped, before they are scored or ranked; a narrow router_dtype rounds. [SCR-5]"""
    logits_TE = round_to(logits_TE, spec.router_dtype)
    scaled_TE = logits_TE if spec.logit_scale == 1 else logits_TE * spec.logit_scale
    if spec.logit_softcap is not None:
        capped_TE = spec.logit_softcap * torch.tanh(scaled_TE / spec.logit_softcap)
        # A cap is finite, but an expert that is masked stays masked.
        scaled_TE = torch.where(scaled_TE == NEG_INF, scaled_TE, capped_TE)
    return round_to(scaled_TE, spec.router_dtype) if spec.scales_logits else scaled_TE


def score(scaled_logits_TE: Tensor, spec: RouterSpec) -> Tensor:
    """Scores are a function of the scaled logits alone; no bias enters them. [SCR-1, SCR-2, SCR-3, SCR-14]"""
    if spec.score_func == "softmax":
        return softmax(scaled_logits_TE)
    if spec.score_func == "sigmoid":
        return torch.sigmoid(scaled_logits_TE)
    if spec.score_func == "relu":
        return torch.relu(scaled_logits_TE)  # whose slope at 0 is 0
    # Past 40 softplus(z) is z to the last bit of float64; torch's default of 20 is not.
    softplus_TE = F.softplus(scaled_logits_TE, threshold=40)
    # The slope of sqrt at 0 is infinite; the slope of the score there is 0.
    positive_TE = softplus_TE > 0
    return torch.where(positive_TE, torch.where(positive_TE, softplus_TE, 1).sqrt(), 0)


def softmax(logits_TE: Tensor) -> Tensor:
    """Softmax over the last axis; -inf gives exactly 0, and so does a row of nothing else."""
    # torch.softmax makes such a row NaN, in value and gradient.
    largest_T1 = logits_TE.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(logits_TE.dtype).min)
    exp_TE = torch.exp(logits_TE - largest_T1)
    # Any other row holds an exp(0), so that its sum is at least 1. No clamp: where the sum is 1, one exp that is not 0,
    # the gradient of a value at its bound is 1 in torch 2.13 and 0 in 2.14.
    sum_T1 = exp_TE.sum(-1, keepdim=True)
    return exp_TE / (sum_T1 + (sum_T1 == 0))


def bias_choice(
    scaled_logits_TE: Tensor, scores_TE: Tensor | None, expert_bias_E: Tensor | None, spec: RouterSpec
) -> Tensor:
    """What is ranked: scores (or logits) plus expert_bias; a logit of -inf is never chosen. [SEL-4, SEL-9]"""
    ranked_TE = scaled_logits_TE if spec.select_by == "logit" or scores_TE is None else scores_TE
    # The choice is a step function: nothing flows back through it. The sum is a copy even without a bias:
    # sum_of_best_two writes to it.
    biased_TE = ranked_TE.detach() + (0 if expert_bias_E is None else expert_bias_E.detach())
    if spec.select_by == "logit":
        return biased_TE
    masked_TE = scaled_logits_TE.detach()
    # Masking costs two passes over (T, E), looking for something to mask a fraction of one.
    if host_reads_are_free(masked_TE) and masked_TE.numel() and masked_TE.amin() > NEG_INF:
        return biased_TE
    return torch.where(masked_TE == NEG_INF, NEG_INF, biased_TE)


def sparsemixer(scaled_logits_TE: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """Slot j takes the best remaining expert, weighted by a softmax over the band below it. [SEL-13, WGT-15]

    Source: arXiv:2409.12136. The band is a constant of the gradient.
    """
    fixed_TE, remaining_TE = scaled_logits_TE.detach(), scaled_logits_TE
    ids, weights = [], []
    for _ in range(spec.top_k):
        # Of equal maxima torch.max documents the first.
        best_T1, ids_T1 = remaining_TE.detach().max(-1, keepdim=True)
        in_band_TE = best_T1 - fixed_TE <= 2 * spec.mixer_eps * torch.maximum(fixed_TE.abs(), best_T1)
        weights_TE = softmax(torch.where(in_band_TE, remaining_TE, NEG_INF))
        ids.append(torch.where(best_T1 == NEG_INF, UNUSED, ids_T1))
        weights.append(weights_TE.gather(-1, ids_T1))
        remaining_TE = remaining_TE.scatter(-1, ids_T1, NEG_INF)
    return torch.cat(ids, dim=-1), torch.cat(weights, dim=-1)


def choose(logits_TE: Tensor, spec: RouterSpec, inputs: RouterInputs, token_mask_T: Tensor | None) -> Tensor:
    """Expert ids by a selector that looks at no score. [SEL-14 .. SEL-17]"""
    (T, _), K = logits_TE.shape, spec.top_k
    if spec.selector == "table":
        # A padding token has no row of the table.
        ids_T = inputs.token_ids_T if token_mask_T is None else inputs.token_ids_T.masked_fill(~token_mask_T, 0)
        return inputs.table_VK.to(torch.int64)[ids_T]
    if spec.selector == "given":
        return inputs.given_ids_TK.to(torch.int64)
    if spec.selector == "round_robin":
        first_token = 0 if inputs.first_token is None else inputs.first_token
        slots_N = first_token * K + torch.arange(T * K, device=logits_TE.device)
        return (slots_N % spec.num_experts).view(T, K)
    return top_k(torch.rand(T, spec.num_choices, generator=inputs.seed, device=logits_TE.device), K)


def gather(values_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """The values of the selected experts; an unused slot reads 0. [WGT-8, WGT-11]"""
    if host_reads_are_free(expert_ids_TK) and expert_ids_TK.numel() and expert_ids_TK.amin() > UNUSED:
        return values_TE.gather(-1, expert_ids_TK)
    return torch.where(expert_ids_TK == UNUSED, 0, values_TE.gather(-1, expert_ids_TK.clamp(min=0)))


def weigh(scaled_logits_TE: Tensor, scores_TE: Tensor | None, expert_ids_TK: Tensor, spec: RouterSpec) -> Tensor:
    """Weights are the selected scores, without any bias. [WGT-1, WGT-3]"""
    if scores_TE is not None:
        return gather(scores_TE, expert_ids_TK)
    return softmax(torch.where(expert_ids_TK == UNUSED, NEG_INF, gather(scaled_logits_TE, expert_ids_TK)))


def normalise(
    raw_weights_TK: Tensor, shared_scores_TS: Tensor | None, spec: RouterSpec
) -> tuple[Tensor, Tensor | None]:
    """With route_norm a token's weights are divided by their norm; a norm of 0 leaves them 0. [WGT-2, WGT-6, WGT-7]"""
    if not spec.route_norm:
        return raw_weights_TK, shared_scores_TS
    in_norm_TK = raw_weights_TK
    if spec.norm_with_shared and shared_scores_TS is not None:
        in_norm_TK = torch.cat([raw_weights_TK, shared_scores_TS], dim=-1)
    norm_T1 = norm(in_norm_TK, spec.norm_p)
    divisor_T1 = norm_T1 + spec.norm_eps if spec.norm_form == "add_eps" else norm_T1.clamp(min=spec.norm_eps)
    # Close to the smallest normal number (with 2**10 to spare for what comes from above) a gradient over the divisor
    # is not finite: there the weight is exact, and a constant. In float32 that is a sigmoid at -80.
    vanishing_T1 = divisor_T1 < torch.finfo(divisor_T1.dtype).tiny * 2**10
    numerator_TK = torch.where(vanishing_T1, in_norm_TK.detach(), in_norm_TK)
    denominator_T1 = torch.where(vanishing_T1, divisor_T1.detach(), divisor_T1)
    normed_TK = numerator_TK / torch.where(denominator_T1 == 0, 1, denominator_T1)
    if in_norm_TK is raw_weights_TK:
        return normed_TK, shared_scores_TS
    K = raw_weights_TK.shape[-1]
    return normed_TK[:, :K], normed_TK[:, K:]


def norm(weights_TK: Tensor, p: float) -> Tensor:
    """The p-norm of each row of weights >= 0; an entry of 0 takes no gradient."""
    if p == 1:
        return weights_TK.sum(-1, keepdim=True)
    # The largest is factored out so that no power over- or underflows. The norm is homogeneous: it is a constant.
    largest_T1 = weights_TK.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(weights_TK.dtype).tiny)
    positive_TK = weights_TK > 0
    powers_TK = torch.where(positive_TK, torch.where(positive_TK, weights_TK / largest_T1, 1) ** p, 0)
    sum_T1 = powers_TK.sum(-1, keepdim=True)
    return torch.where(sum_T1 == 0, 0, largest_T1 * torch.where(sum_T1 == 0, 1, sum_T1) ** (1 / p))


def scale_weights(weights_TK: Tensor, expert_ids_TK: Tensor, learned_scale: Tensor | None, spec: RouterSpec) -> Tensor:
    """route_scale, then the learned scale, multiply the weights once; a skipped choice weighs 0. [WGT-4, WGT-9]"""
    scaled_TK = weights_TK if spec.route_scale == 1 else weights_TK * spec.route_scale
    if learned_scale is not None and spec.learned_scale == "per_expert":
        scaled_TK = scaled_TK * learned_scale.to(scaled_TK.dtype)[expert_ids_TK.clamp(min=0)]
    elif learned_scale is not None:
        scaled_TK = scaled_TK * learned_scale
    if spec.null_kind == "skip":
        return torch.where(expert_ids_TK >= spec.num_experts, 0, scaled_TK)
    return scaled_TK


def route(
    logits_TE: Tensor,
    spec: RouterSpec,
    *,
    expert_bias_E: Tensor | None = None,
    learned_scale: Tensor | None = None,
    inputs: RouterInputs = NO_INPUTS,
    token_mask_T: Tensor | None = None,
) -> Routing:
    """Every stage of routing in order.

    Args:
        logits_TE: (T, num_logits) floats, finite or -inf (never chosen).
        spec: what is computed.
        expert_bias_E: (E,) added to what is ranked, for the choice only; None is zeros.
        learned_scale: (E,) for learned_scale 'per_expert', a scalar for 'global'.
        inputs: what the selector reads besides the logits. The seed is a torch.Generator.
        token_mask_T: (T,) bools; a padding token (False) gets ids -1 and weights 0, whatever its row holds.

    Returns:
        ids in int64; the rest in float64 for float64 logits, or that router_dtype, else in float32. A slot for which no
        choice is left that is not -inf has id -1 and weight 0.

    Raises:
        ValueError: wrong shapes or dtypes. Values (NaN, ids out of range) are not looked at: that would stall a device.
    """
    check_logits(logits_TE, spec, expert_bias_E, learned_scale, token_mask_T)
    inputs.check(spec, logits_TE.shape[0])
    E = spec.num_choices
    is_plain = inputs.given_weights_TK is None and inputs.logit_factors_TE is None and inputs.logit_noise_TE is None
    if is_plain and not transformed():
        way = for_router(spec, logits_TE.device.type, logits_TE.dtype)
        if way.way == "triton":
            return _route_on_kernel(logits_TE, spec, expert_bias_E, token_mask_T)
        say_once(way, "routers")
    logits_TE = logits_TE.to(dtype_of_router(spec, logits_TE.dtype))
    if token_mask_T is not None:
        logits_TE = logits_TE.masked_fill(~token_mask_T[:, None], 0)  # also keeps a NaN out of the gradient
    scores_TE = biased_scores_TE = group_scores_TG = group_ids_TL = raw_shared_TS = None

    scaled_logits_TE = scale_logits(add_noise(logits_TE, inputs, token_mask_T), spec)
    choices_TE = scaled_logits_TE
    if spec.num_scored_shared_experts:
        choices_TE, raw_shared_TS = scaled_logits_TE[:, :E], score(scaled_logits_TE[:, E:], spec)
        raw_shared_TS = round_to(raw_shared_TS, spec.router_dtype)
    if spec.has_scores:
        scores_TE = round_to(score(choices_TE, spec), spec.router_dtype)

    raw_weights_TK = None
    if spec.selector == "top_k":
        bias_E = None if expert_bias_E is None else expert_bias_E.to(choices_TE.dtype)
        biased_scores_TE = bias_choice(choices_TE, scores_TE, bias_E, spec)
        if spec.num_expert_groups is not None:
            group_scores_TG, group_ids_TL = limit_groups(biased_scores_TE, spec)
        expert_ids_TK = select(biased_scores_TE, group_scores_TG, group_ids_TL, spec)
    elif spec.selector == "sinkhorn":
        evened_E = sinkhorn(choices_TE, token_mask_T)
        biased_scores_TE = choices_TE.detach() + evened_E
        expert_ids_TK = select(biased_scores_TE, None, None, spec)
    elif spec.selector == "expert_choice":
        biased_scores_TE = take_tokens(bias_choice(choices_TE, scores_TE, None, spec), token_mask_T, spec)
        expert_ids_TK = select(biased_scores_TE, None, None, spec)
    elif spec.varies:
        bias_E = None if expert_bias_E is None else expert_bias_E.to(choices_TE.dtype)
        biased_scores_TE = bias_choice(choices_TE, scores_TE, bias_E, spec)
        expert_ids_TK = select_varying(biased_scores_TE, spec)
    elif spec.selector == "group_top_k":
        expert_ids_TK = select_by_quota(bias_choice(choices_TE, scores_TE, None, spec), spec)
    elif spec.selector == "sparsemixer":
        expert_ids_TK, raw_weights_TK = sparsemixer(choices_TE, spec)
    else:
        expert_ids_TK = choose(logits_TE, spec, inputs, token_mask_T)
    if token_mask_T is not None:
        expert_ids_TK = expert_ids_TK.masked_fill(~token_mask_T[:, None], UNUSED)

    if raw_weights_TK is None:
        weighed_TE = scores_TE
        if spec.weights_from == "masked_scores" and scores_TE is not None and biased_scores_TE is not None:
            assert group_ids_TL is not None
            assert group_scores_TG is not None
            weighed_TE = scores_TE.masked_fill(~kept_experts(group_ids_TL, group_scores_TG, biased_scores_TE), 0)
        raw_weights_TK = weigh(choices_TE, weighed_TE, expert_ids_TK, spec)
    else:
        raw_weights_TK = torch.where(expert_ids_TK == UNUSED, 0, raw_weights_TK)
    if spec.num_zero_experts:
        # A zero expert weighs 0 before the norm. [WGT-12]
        raw_weights_TK = torch.where(expert_ids_TK >= spec.num_choices - spec.num_zero_experts, 0, raw_weights_TK)
    normed_weights_TK, normed_shared_TS = normalise(raw_weights_TK, raw_shared_TS, spec)
    shared_weights_TS = None
    if normed_shared_TS is not None:
        shared_weights_TS = round_to(scale_shared(normed_shared_TS, learned_scale, spec), spec.router_dtype)
        if token_mask_T is not None:
            shared_weights_TS = shared_weights_TS.masked_fill(~token_mask_T[:, None], 0)

    weights_TK = round_to(scale_weights(normed_weights_TK, expert_ids_TK, learned_scale, spec), spec.router_dtype)
    if inputs.given_weights_TK is not None:
        # Given weights are final: constants, and 0 where no slot is used. [RPL-3]
        weights_TK = torch.where(expert_ids_TK == UNUSED, 0, inputs.given_weights_TK.to(weights_TK.dtype))

    return Routing(
        expert_ids_TK=expert_ids_TK,
        weights_TK=weights_TK,
        group_ids_TL=group_ids_TL,
        shared_weights_TS=shared_weights_TS,
        mask_fill=spec.mask_fill,
        stages=Stages(scores_TE=scores_TE, biased_scores_TE=biased_scores_TE, group_scores_TG=group_scores_TG),
        logits_TE=logits_TE,
        chosen_ids_TK=expert_ids_TK,
    )


def _route_on_kernel(
    logits_TE: Tensor, spec: RouterSpec, expert_bias_E: Tensor | None, token_mask_T: Tensor | None
) -> Routing:
    """`route` in one kernel, for a spec that fits."""
    bias_E = None if expert_bias_E is None else expert_bias_E.detach().float().contiguous()
    mask_T = None if token_mask_T is None else token_mask_T.contiguous()
    weights_TK, ids_TK, group_ids_TL = route_tokens(logits_TE, bias_E, mask_T, *arguments_of(spec))
    wide_TE = logits_TE.float()
    if token_mask_T is not None:
        wide_TE = wide_TE.masked_fill(~token_mask_T[:, None], 0)

    def stages() -> Stages:
        scaled_TE = scale_logits(wide_TE, spec)
        scores_TE = score(scaled_TE, spec) if spec.has_scores else None
        biased_TE = bias_choice(scaled_TE, scores_TE, bias_E, spec)
        group_scores_TG = None if spec.num_expert_groups is None else limit_groups(biased_TE, spec)[0]
        return Stages(scores_TE=scores_TE, biased_scores_TE=biased_TE, group_scores_TG=group_scores_TG)

    return Routing(
        expert_ids_TK=ids_TK,
        weights_TK=weights_TK,
        group_ids_TL=None if spec.num_expert_groups is None else group_ids_TL,
        shared_weights_TS=None,
        mask_fill=spec.mask_fill,
        stages=stages,
        logits_TE=wide_TE,
        chosen_ids_TK=ids_TK,
    )


def scale_shared(normed_shared_TS: Tensor, learned_scale: Tensor | None, spec: RouterSpec) -> Tensor:
    """Router-scored shared experts take route_scale and the global scale, like the selected ones. [WGT-13]"""
    scaled_TS = normed_shared_TS * spec.route_scale
    return scaled_TS * learned_scale if learned_scale is not None and spec.learned_scale == "global" else scaled_TS


def check_logits(
    logits_TE: Tensor,
    spec: RouterSpec,
    expert_bias_E: Tensor | None,
    learned_scale: Tensor | None,
    token_mask_T: Tensor | None,
) -> None:
    """The logits, and what is given with them, have the shapes and kinds that the spec asks for."""
    shape_and_kind("logits_TE", logits_TE, (None, spec.num_logits), "float")
    T, E = logits_TE.shape[0], spec.num_choices
    scale_shape = {"none": None, "per_expert": (E,), "global": ()}[spec.learned_scale]
    if (learned_scale is None) != (scale_shape is None):
        given = "None" if learned_scale is None else "given"
        raise ValueError(f"learned_scale is {given}; the spec's is {spec.learned_scale!r}")
    if scale_shape is not None:
        shape_and_kind("learned_scale", learned_scale, scale_shape, "float")
    if expert_bias_E is not None:
        # Elsewhere nothing is ranked, so a bias would be silently ignored.
        if not spec.takes_bias:
            raise ValueError(f"expert_bias_E is given, but selector {spec.selector!r} takes none")
        shape_and_kind("expert_bias_E", expert_bias_E, (E,), "float")
    if token_mask_T is not None:
        shape_and_kind("token_mask_T", token_mask_T, (T,), "bool")
