"""conformance, identify: which specs are one router. Each rule rewrites a spec to another one of the same routing.

Two specs with the same normal form give the same ids and weights for all finite logits; ties, and numbers that
underflow, apart. `tests/conformance/test_identify.py` holds every rule against the reference.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from moe_ref import RouterSpec
from moe_ref.specs.router_rules import WITHOUT_GROUPS

ROUNDING = 2.0**-30
"""A part of a number that float32 does not hold."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Why two specs are one router, and the simpler one of them."""

    sentence: str
    change: Callable[[RouterSpec, bool], dict[str, Any]]
    """Of a spec, and whether the router takes a bias: the fields of the simpler spec; empty where it does not apply."""
    rounded: bool = True
    """Whether it holds where scores are rounded to a narrow router_dtype, which makes ties and moves small numbers."""


def _ranked_alike(spec: RouterSpec) -> bool:
    """Whether groups, if any, look at the order of experts alone."""
    return spec.num_expert_groups is None or (spec.group_score_k == 1 and spec.mask_fill == -np.inf)


def _layer(spec: RouterSpec, biased: bool) -> dict[str, Any]:
    return {"weight_on": "output", "output_scale": 1.0}


def _identity_nulls(spec: RouterSpec, biased: bool) -> dict[str, Any]:
    if spec.null_kind != "identity" or spec.num_zero_experts or spec.selector == "round_robin":
        return {}
    return {"num_experts": spec.num_choices, "num_null_experts": 0, "num_constant_experts": 0}


def _no_nulls(spec: RouterSpec, biased: bool) -> dict[str, Any]:
    return {"null_kind": "identity"} if spec.num_null_experts == 0 else {}


def _no_mixer(spec: RouterSpec, biased: bool) -> dict[str, Any]:
    return {"mixer_eps": 0.01} if spec.selector != "sparsemixer" else {}


def _no_norm(spec: RouterSpec, biased: bool) -> dict[str, Any]:
    return (
        {} if spec.route_norm else {"norm_form": "add_eps", "norm_eps": 0.0, "norm_p": 1.0, "norm_with_shared": False}
    )


def _no_eps(spec: RouterSpec, biased: bool) -> dict[str, Any]:
    return {"norm_form": "add_eps"} if spec.norm_eps == 0 else {}


def _all_groups(spec: RouterSpec, biased: bool) -> dict[str, Any]:
    return WITHOUT_GROUPS if spec.num_expert_groups == spec.num_limited_groups else {}


def _fill(spec: RouterSpec, biased: bool) -> dict[str, Any]:
    return {"mask_fill": -np.inf} if spec.num_expert_groups and not biased and spec.select_by == "score" else {}


def _masked_scores(spec: RouterSpec, biased: bool) -> dict[str, Any]:
    return {"weights_from": "scores"} if spec.mask_fill == -np.inf else {}


def _no_scores(spec: RouterSpec, biased: bool) -> dict[str, Any]:
    return {"weights_from": "scores"} if spec.score_over == "selected" else {}


def _all_quotas(spec: RouterSpec, biased: bool) -> dict[str, Any]:
    all_chosen = spec.top_k == spec.num_experts or spec.quota_groups == 1
    return {"selector": "top_k", "quota_groups": None} if spec.selector == "group_top_k" and all_chosen else {}


def _enough_groups(spec: RouterSpec, biased: bool) -> dict[str, Any]:
    enough = (spec.num_limited_groups or 0) >= spec.top_k and spec.group_score_k == 1 and spec.mask_fill == -np.inf
    return WITHOUT_GROUPS if enough else {}


def _selected(spec: RouterSpec, biased: bool) -> dict[str, Any]:
    normed = not spec.route_norm or (spec.norm_p == 1 and spec.norm_eps == 0)
    if spec.score_over != "selected" or not normed:
        return {}
    return {"score_over": "all", "route_norm": True, "norm_form": "add_eps", "norm_eps": 0.0, "norm_p": 1.0}


def _by_logit(spec: RouterSpec, biased: bool) -> dict[str, Any]:
    if spec.select_by == "score" or not spec.has_scores or spec.selector == "sinkhorn" or spec.varies:
        return {}
    if spec.selector == "expert_choice":  # it ranks the tokens for an expert, and a softmax is over the experts
        return {"select_by": "score"} if spec.score_func != "softmax" else {}
    ranks_alike = spec.selector != "top_k" or (not biased and _ranked_alike(spec))
    return {"select_by": "score"} if ranks_alike or spec.top_k == spec.num_choices else {}


def _eps_below_softmax(spec: RouterSpec, biased: bool) -> dict[str, Any]:
    best_first = spec.selector in ("top_k", "top_p")
    bounded = spec.score_func == "softmax" and spec.has_scores and best_first and not biased
    if not (spec.route_norm and bounded and spec.norm_eps) or spec.mask_fill == 0:
        return {}
    # The best expert of the kept groups is chosen, and scores at least this.
    least = 1 / (spec.num_choices * (spec.group_score_k if spec.num_expert_groups else 1))
    below = spec.norm_eps <= least * (1 if spec.norm_form == "clamp" else ROUNDING)
    return {"norm_eps": 0.0, "norm_form": "add_eps"} if below else {}


def _eps_below_cap(spec: RouterSpec, biased: bool) -> dict[str, Any]:
    if spec.logit_softcap is None or spec.score_func in ("softmax", "relu") or not (spec.route_norm and spec.norm_eps):
        return {}
    sigmoid = np.exp(-np.logaddexp(0, spec.logit_softcap))
    least = sigmoid if spec.score_func == "sigmoid" else sigmoid**0.5  # sqrt(softplus(z)) is above sqrt(sigmoid(z))
    below = spec.norm_eps <= least * (1 if spec.norm_form == "clamp" else ROUNDING)
    return {"norm_eps": 0.0, "norm_form": "add_eps"} if below else {}


def _one_weight(spec: RouterSpec, biased: bool) -> dict[str, Any]:
    return {"norm_p": 1.0} if spec.top_k == 1 and not spec.norm_with_shared else {}


def _norm_of_one(spec: RouterSpec, biased: bool) -> dict[str, Any]:
    constant = spec.top_k == 1 and spec.route_norm and spec.norm_eps == 0 and not spec.norm_with_shared
    if not (constant and spec.has_scores and not spec.num_scored_shared_experts) or spec.reads_batch:
        return {}
    if spec.varies or spec.score_func == "relu":  # it may weigh 0
        return {}
    if spec.selector != "top_k" or (not biased and _ranked_alike(spec)):
        return {"score_func": "softmax", "logit_scale": 1.0, "logit_softcap": None}
    return {"score_func": "softmax"} if spec.select_by == "logit" else {}


RULES = (
    Rule(sentence="weight_on and output_scale are read by the layer: ids and weights do not show them", change=_layer),
    Rule(
        sentence="a null expert of kind 'identity' is chosen and weighed like an expert: the layer tells them apart",
        change=_identity_nulls,
    ),
    Rule(sentence="without null experts their kind is read nowhere", change=_no_nulls),
    Rule(sentence="mixer_eps is read by selector 'sparsemixer' alone", change=_no_mixer),
    Rule(sentence="without route_norm nothing of the norm is read", change=_no_norm),
    Rule(sentence="with norm_eps 0 both forms of the norm divide by the norm", change=_no_eps),
    Rule(sentence="where all groups are kept none is dropped", change=_all_groups),
    Rule(sentence="a quota of one group, or of all experts, leaves nothing else to choose", change=_all_quotas),
    Rule(
        sentence="scores without a bias are above 0, so an expert of a dropped group, filled with 0, is never chosen",
        change=_fill,
    ),
    Rule(
        sentence="an expert of a dropped group, filled with -inf, is never chosen: its weight is read nowhere",
        change=_masked_scores,
    ),
    Rule(sentence="a softmax over the selected reads logits: no score is masked", change=_no_scores),
    Rule(
        sentence="the top_k best experts lie in at most top_k groups, whose best experts are the best: "
        "with group_score_k 1 all of them are kept",
        change=_enough_groups,
        rounded=False,
    ),
    Rule(
        sentence="a softmax over the selected is the softmax over all, divided by the sum of the selected",
        change=_selected,
        rounded=False,
    ),
    Rule(
        sentence="a score grows with its logit, so that without a bias, or a sum over a group, both rank alike",
        change=_by_logit,
        rounded=False,
    ),
    Rule(
        sentence="without a bias the best softmax score is chosen, which is at least 1 / num_experts: "
        "float32 does not hold so small a norm_eps beside it",
        change=_eps_below_softmax,
        rounded=False,
    ),
    Rule(
        sentence="a capped logit has no small score: float32 does not hold so small a norm_eps beside it",
        change=_eps_below_cap,
        rounded=False,
    ),
    Rule(sentence="every norm of one number is this number", change=_one_weight),
    Rule(sentence="one weight divided by itself is 1, whatever the score", change=_norm_of_one, rounded=False),
)


@lru_cache(maxsize=8192)
def normal(spec: RouterSpec, takes_bias: bool) -> tuple[RouterSpec, tuple[str, ...]]:
    """The simplest spec of the same routing, and the sentences of the rules that prove it."""
    reasons, changed = list[str](), True
    while changed:
        changed = False
        for rule in RULES:
            change = rule.change(spec, takes_bias) if rule.rounded or not spec.rounds else {}
            if any(getattr(spec, name) != value for name, value in change.items()):
                spec, changed = spec.replace(**change), True
                reasons.append(rule.sentence)
    return spec, tuple(dict.fromkeys(reasons))


def alternatives(spec: RouterSpec) -> Iterator[RouterSpec]:
    """Neighbours of a spec: other values of one field, with what they need."""
    normed = {"route_norm": True}
    changes: list[dict[str, Any]] = [
        *({"score_func": name} for name in ("softmax", "sigmoid", "sqrtsoftplus")),
        {"score_over": "selected", "select_by": "logit", "route_norm": False, "norm_eps": 0.0, "norm_p": 1.0},
        {"score_over": "all"},
        {"select_by": "logit"},
        {"select_by": "score"},
        {"score_over": "all", "select_by": "score", **normed},
        {"logit_scale": spec.logit_scale * 1.25},
        {"logit_softcap": 4.0 if spec.logit_softcap is None else None},
        {"route_norm": not spec.route_norm},
        *({**normed, "norm_form": form} for form in ("add_eps", "clamp")),
        *({**normed, "norm_eps": eps} for eps in (0.0, 1e-20, 1e-12, 1e-6)),
        {**normed, "norm_p": 2.0},
        {"norm_with_shared": not spec.norm_with_shared},
        WITHOUT_GROUPS,
        {**WITHOUT_GROUPS, "num_expert_groups": 1, "num_limited_groups": 1},
        *({"mask_fill": fill} for fill in (0.0, -np.inf)),
        *({"weights_from": each} for each in ("scores", "masked_scores")),
        *({"group_score_k": k} for k in (1, 2, 3)),
        {"null_kind": "identity"},
        {"null_kind": "skip"},
        {"num_experts": spec.num_choices, "num_null_experts": 0},
        {"num_experts": spec.num_choices - 1, "num_null_experts": 1},
        {"output_scale": 2.0},
        {"weight_on": "input"},
    ]
    groups = [g for g in (2, 4, 8) if spec.num_choices % g == 0]
    if spec.selector == "group_top_k":
        changes.append({"selector": "top_k", "quota_groups": None})
    elif spec.num_expert_groups is None:
        changes += [{"selector": "group_top_k", "quota_groups": g} for g in groups if spec.selector == "top_k"]
        changes += [
            {"num_expert_groups": g, "num_limited_groups": g // 2, "group_score_k": k} for g in groups for k in (1, 2)
        ]
    else:
        changes += [{"num_limited_groups": (spec.num_limited_groups or 0) + step} for step in (-1, 1)]
    for change in changes:
        try:
            other = spec.replace(**change)
        except ValueError:
            continue
        if other != spec:
            yield other
