"""moe_ref, the rules of a router's spec: what each field can be, and which fields go together.

The spec here is a RouterSpec, which asks for them when it is made.
"""

from typing import Any

import numpy as np

from moe_ref.specs.checks import integer, number, one_of, only, require

SCORE_FUNCS = ("softmax", "sigmoid", "sqrtsoftplus", "relu")
ROUTER_DTYPES = ("float32", "float64", "bfloat16", "float16")
SELECTORS = ("top_k", "group_top_k", "table", "given", "round_robin", "random", "sparsemixer", "sinkhorn",
             "expert_choice", "threshold", "top_p")  # fmt: skip
VARYING = ("threshold", "top_p")
"""Selectors under which tokens have different numbers of experts: at most top_k, the slots after them unused."""
WITHOUT_GROUPS: dict[str, Any] = {
    "num_expert_groups": None, "num_limited_groups": None, "group_score_k": 2, "mask_fill": -np.inf,
    "weights_from": "scores",
}  # fmt: skip
"""What the fields of groups are where a router has none."""
WITHOUT_TAKING: dict[str, Any] = {"take_factor": 1.0, "take_rounding": "ceil", "take_least": 0}
"""What the fields of selector expert_choice are with another selector."""
TAKE_ROUNDINGS = ("ceil", "floor", "round")


def check(spec: Any) -> None:
    """Each field in its range, and none that contradicts another one; else a ValueError that names it."""
    integer("num_experts", spec.num_experts, 1)
    integer("num_null_experts", spec.num_null_experts, 0)
    integer("num_scored_shared_experts", spec.num_scored_shared_experts, 0)
    integer("num_constant_experts", spec.num_constant_experts, 0, spec.num_null_experts, why="num_null_experts")
    rest = spec.num_null_experts - spec.num_constant_experts
    integer("num_zero_experts", spec.num_zero_experts, 0, rest, why="num_null_experts - num_constant_experts")
    one_of("score_func", spec.score_func, SCORE_FUNCS)
    one_of("router_dtype", spec.router_dtype, ROUTER_DTYPES)
    one_of("score_over", spec.score_over, ("all", "selected"))
    one_of("select_by", spec.select_by, ("score", "logit"))
    one_of("selector", spec.selector, SELECTORS)
    one_of("weights_from", spec.weights_from, ("scores", "masked_scores"))
    one_of("norm_form", spec.norm_form, ("add_eps", "clamp"))
    one_of("learned_scale", spec.learned_scale, ("none", "per_expert", "global"))
    one_of("null_kind", spec.null_kind, ("identity", "skip"))
    one_of("weight_on", spec.weight_on, ("output", "input"))
    for field in ("route_norm", "norm_with_shared"):
        require(isinstance(getattr(spec, field), bool), f"{field} is {getattr(spec, field)!r}; it is a bool")
    for field in ("logit_scale", "norm_p", "mixer_eps"):
        number(field, getattr(spec, field), above=0.0)
    for field in ("norm_eps", "route_scale", "output_scale"):
        number(field, getattr(spec, field), low=0.0)
    if spec.logit_softcap is not None:
        number("logit_softcap", spec.logit_softcap, above=0.0)
    require(
        isinstance(spec.mask_fill, (int, float)) and spec.mask_fill in (0.0, -np.inf),
        f"mask_fill is {spec.mask_fill!r}; it is -inf, or 0.0 to describe a model that fills with 0",
    )
    integer("top_k", spec.top_k, 1, spec.num_choices, why="num_experts + num_null_experts")
    _check_groups(spec)
    _check_quotas(spec)
    _check_taking(spec)
    _check_varying(spec)
    _check_combinations(spec)


def _check_groups(spec: Any) -> None:
    if spec.num_expert_groups is None:
        for field, identity in WITHOUT_GROUPS.items():
            value = getattr(spec, field)
            require(value == identity, f"{field} is {value!r}, but num_expert_groups is None")
        return
    integer("num_expert_groups", spec.num_expert_groups, 1, spec.num_experts, why="num_experts")
    require(
        spec.num_experts % spec.num_expert_groups == 0,
        f"num_expert_groups is {spec.num_expert_groups}, which does not divide num_experts ({spec.num_experts})",
    )
    require(spec.num_limited_groups is not None, "num_limited_groups is None; with groups it is an integer")
    integer("num_limited_groups", spec.num_limited_groups, 1, spec.num_expert_groups, why="num_expert_groups")
    integer("group_score_k", spec.group_score_k, 1, spec.experts_per_group, why="experts per group")
    kept = (spec.num_limited_groups or 0) * spec.experts_per_group
    # Otherwise the selection falls through to masked experts (huggingface/transformers#48647).
    require(
        spec.top_k <= kept,
        f"top_k is {spec.top_k}, but the {spec.num_limited_groups} kept groups of {spec.experts_per_group} "
        f"experts hold {kept}",
    )
    only(spec, "with groups", num_null_experts=0)
    only(spec, "with num_expert_groups", selector="top_k")


def _check_quotas(spec: Any) -> None:
    if spec.selector != "group_top_k":
        require(
            spec.quota_groups is None,
            f"quota_groups is {spec.quota_groups!r}, but selector is {spec.selector!r}; it goes with 'group_top_k'",
        )
        return
    integer("quota_groups", spec.quota_groups, 1, spec.num_experts, why="num_experts")
    for field in ("num_experts", "top_k"):
        require(
            getattr(spec, field) % (spec.quota_groups or 1) == 0,
            f"quota_groups is {spec.quota_groups}, which does not divide {field} ({getattr(spec, field)})",
        )
    only(spec, "with selector 'group_top_k'", num_null_experts=0)


def _check_taking(spec: Any) -> None:
    number("take_factor", spec.take_factor, above=0.0)
    one_of("take_rounding", spec.take_rounding, TAKE_ROUNDINGS)
    integer("take_least", spec.take_least, 0)
    if spec.selector != "expert_choice":
        for field, identity in WITHOUT_TAKING.items():
            value = getattr(spec, field)
            why = f"{field} is {value!r}, but selector is {spec.selector!r}; it goes with 'expert_choice'"
            require(value == identity, why)
        return
    # Found here, and kept: a compiler of any shape (torch.compile with dynamic=True) does not know a float's digits.
    _, parts = spec.share_taken
    require(
        parts <= 10**6 * spec.num_experts,
        f"take_factor is {spec.take_factor!r}; it has at most 6 decimals",  # its product with tokens fits into int64
    )
    E = spec.num_experts
    only(spec, "with selector 'expert_choice'", num_null_experts=0)
    require(
        spec.top_k == E,
        f"top_k is {spec.top_k} with selector 'expert_choice'; it is num_experts ({E}), as any of them may take a "
        "token: how many do in the mean is take_factor",
    )


def _check_varying(spec: Any) -> None:
    number("threshold", spec.threshold)
    if spec.top_p is not None:
        number("top_p", spec.top_p, above=0.0)
    require(
        spec.threshold == 0 or spec.selector == "threshold",
        f"threshold is {spec.threshold!r}, but selector is {spec.selector!r}; it goes with 'threshold'",
    )
    require(
        spec.score_func != "relu" or spec.selector in ("threshold", "given"),
        f"score_func is 'relu' with selector {spec.selector!r}; scores of 0 are not ranked: it is 'threshold', or "
        "'given' to replay",
    )
    if spec.selector != "top_p":
        require(
            spec.top_p is None,
            f"top_p is {spec.top_p!r}, but selector is {spec.selector!r}; it goes with 'top_p'",
        )
        return
    require(spec.top_p is not None, "top_p is None; with selector 'top_p' it is a number")
    require((spec.top_p or 0) < 1, f"top_p is {spec.top_p!r}; it is less than 1, the sum of all scores")
    shares = {"score_func": "softmax", "score_over": "all", "select_by": "score"}
    only(spec, "with selector 'top_p', a share of probabilities,", **shares)


def _check_combinations(spec: Any) -> None:
    if spec.score_over == "selected":
        require(
            spec.score_func == "softmax",
            f"score_over is 'selected' with score_func {spec.score_func!r}; only a softmax has a support",
        )
        # Nothing is scored before the selection, so there is nothing else to rank.
        require(
            spec.select_by == "logit",
            f"score_over is 'selected'; then select_by is 'logit', not {spec.select_by!r}",
        )
    if spec.selector == "sparsemixer":
        require(
            spec.select_by == "logit",
            f"selector is 'sparsemixer'; then select_by is 'logit', not {spec.select_by!r}",
        )
        require(
            spec.score_func == "softmax",
            f"selector is 'sparsemixer' with score_func {spec.score_func!r}; its weights are banded softmaxes",
        )
        require(
            spec.score_over == "all",
            f"selector is 'sparsemixer'; then score_over is 'all', not {spec.score_over!r}",
        )
    if spec.selector == "sinkhorn":
        require(
            spec.select_by == "logit",
            f"selector is 'sinkhorn'; then select_by is 'logit', not {spec.select_by!r}",
        )
    if spec.selector == "round_robin":
        integer("top_k", spec.top_k, 1, spec.num_experts, why="num_experts; round_robin takes no null expert")
    if spec.num_scored_shared_experts:
        require(
            spec.score_func not in ("softmax", "relu"),
            f"num_scored_shared_experts is {spec.num_scored_shared_experts}; then score_func is of one logit "
            f"alone, above 0: not {spec.score_func!r}",
        )
    for field in ("num_constant_experts", "num_zero_experts"):
        require(
            getattr(spec, field) == 0 or spec.null_kind == "identity",
            f"{field} is {getattr(spec, field)}; then null_kind, of the other null experts, is 'identity'",
        )
    require(
        spec.num_scored_shared_experts > 0 or not spec.norm_with_shared,
        "norm_with_shared is True, but num_scored_shared_experts is 0",
    )
