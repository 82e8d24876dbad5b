"""conformance, router, what is drawn: specs from a bounded pool, and for each the logits, biases and further inputs.

The pool is bounded so that compiled code is reused; the data vary freely, all of them from one seed.
"""

from collections import Counter
from dataclasses import fields, replace
from functools import cache

import numpy as np

from conformance.core.case import float32
from conformance.core.chosen import pool_of, tokens_of
from conformance.core.drawing import covering, one_of
from conformance.core.judge import Judge
from conformance.core.kind import settings_of
from conformance.router.case import RouterCase, held
from conformance.router.check import RouterCheck
from moe_ref import UNUSED, RouterSpec
from moe_ref.noise import jitter, normal
from moe_ref.specs.families import FAMILIES, tiny

SIZES = ((8, 2), (6, 1), (8, 8), (12, 5), (16, 4))
"""(num_experts, top_k)"""
GROUPED_SIZES = (
    (8, 2, 4, 2), (8, 4, 2, 1), (12, 5, 3, 2), (16, 4, 4, 2), (16, 8, 4, 2), (8, 1, 4, 1), (12, 3, 2, 2),
    (8, 2, 8, 3), (6, 3, 3, 2), (12, 4, 4, 2), (8, 3, 1, 1), (8, 3, 4, 4),
)  # fmt: skip
"""(num_experts, top_k, num_expert_groups, num_limited_groups); in most a token needs experts of several groups."""
LOGITS = ("separated", "close", "normal", "large", "huge", "far", "negative", "below_zero", "saturated", "tied",
          "equal", "one_hot", "masked")  # fmt: skip
"""Kinds of logits that every router routes."""
SPOILED = ("nan", "nan_row", "infinite_row")
"""Kinds with one token that is routed anyhow, or refused."""
BIASES = ("none", "mixed", "negative", "positive", "strong")
"""Kinds of expert_bias."""


def _variants() -> list[dict]:
    """Each further field away from its identity, alone or with what it needs."""
    softmax, sigmoid = {"score_func": "softmax"}, {"score_func": "sigmoid"}
    norm = {"route_norm": True}
    return [
        softmax,
        sigmoid,
        {"score_func": "sqrtsoftplus"},
        softmax | norm,
        sigmoid | norm,
        sigmoid | norm | {"norm_eps": 1e-20, "route_scale": 2.5},
        {"score_over": "selected", "select_by": "logit"},
        {"score_over": "selected", "select_by": "logit", "route_scale": 0.5},
        sigmoid | {"select_by": "logit"},
        sigmoid | norm | {"select_by": "logit"},
        sigmoid | {"logit_scale": 0.25},
        softmax | {"logit_scale": 3.0},
        sigmoid | norm | {"logit_softcap": 1.5},
        softmax | {"logit_scale": 2.0, "logit_softcap": 1.5},
        softmax | {"route_scale": 2.5},
        sigmoid | {"route_scale": 0.3},
        softmax | norm | {"route_scale": 2.5},
        sigmoid | norm | {"norm_eps": 1e-6},
        softmax | norm | {"norm_eps": 0.25},
        softmax | norm | {"norm_form": "clamp", "norm_eps": 0.5},
        sigmoid | norm | {"norm_form": "clamp", "norm_eps": 1e-12},
        softmax | norm | {"norm_p": 2.0},
        sigmoid | norm | {"norm_p": 3.0, "route_scale": 2.0},
        softmax | norm | {"learned_scale": "per_expert"},
        sigmoid | {"learned_scale": "global", "route_scale": 1.5},
        softmax | {"num_null_experts": 3, "route_scale": 2.0},
        softmax | {"num_null_experts": 1, "null_kind": "skip"},
        sigmoid | norm | {"num_null_experts": 4, "num_constant_experts": 1, "num_zero_experts": 2},
        sigmoid | norm | {"num_null_experts": 2, "null_kind": "skip"},
        sigmoid | {"num_scored_shared_experts": 2},
        sigmoid | norm | {"num_scored_shared_experts": 2, "norm_with_shared": True},
        softmax | {"weight_on": "input"},
        softmax | norm | {"output_scale": 2.0},
        sigmoid | norm | {"selector": "table"},
        softmax | {"selector": "table"},
        sigmoid | norm | {"selector": "given"},
        {"score_over": "selected", "select_by": "logit", "selector": "given"},
        sigmoid | norm | {"norm_eps": 1e-20, "selector": "round_robin"},
        softmax | {"selector": "random"},
        sigmoid | {"select_by": "logit", "router_dtype": "bfloat16"},
        softmax | norm | {"router_dtype": "float16"},
        sigmoid | norm | {"norm_eps": 1e-20, "router_dtype": "float64"},
        sigmoid | {"select_by": "logit", "selector": "sinkhorn"},
        softmax | {"select_by": "logit", "selector": "sinkhorn"},
        {"score_func": "relu", "selector": "threshold"},
        sigmoid | norm | {"selector": "threshold", "threshold": 0.5},
        softmax | {"selector": "top_p", "top_p": 0.5},
        softmax | norm | {"selector": "top_p", "top_p": 0.8},
    ]


def _grouped_variants() -> list[dict]:
    sigmoid, deepseek = {"score_func": "sigmoid"}, {"score_func": "sigmoid", "route_norm": True, "norm_eps": 1e-20}
    return [
        sigmoid,
        deepseek,
        deepseek | {"route_scale": 2.5},
        {"score_func": "softmax"},
        {"score_func": "sqrtsoftplus"},
        deepseek | {"group_score_k": 1},
        deepseek | {"group_score_k": 3},
        deepseek | {"mask_fill": 0.0},
        {"mask_fill": 0.0, "group_score_k": 1, "weights_from": "masked_scores"},
        {"select_by": "logit", "score_over": "selected"},
        {"select_by": "logit", "score_func": "sigmoid"},
    ]


def _pool() -> list[RouterSpec]:
    """Simple specs first: shrinking goes towards the front."""
    found = [
        RouterSpec(num_experts=E, top_k=K, **variant)
        for variant in _variants()
        for E, K in (SIZES if len(variant) <= 2 else (SIZES[0], SIZES[3]))
    ]
    for variant in _grouped_variants():
        for E, K, G, L in GROUPED_SIZES if len(variant) <= 4 else GROUPED_SIZES[:4]:
            if variant.get("group_score_k", 2) <= E // G:
                found.append(RouterSpec(num_experts=E, top_k=K, num_expert_groups=G, num_limited_groups=L, **variant))
    found += [
        RouterSpec(num_experts=6, top_k=2, select_by="logit", selector="sparsemixer", mixer_eps=eps)
        for eps in (0.01, 0.25)
    ]
    found += [
        RouterSpec(num_experts=E, top_k=K, selector="group_top_k", quota_groups=2, route_norm=norm)
        for E, K, norm in ((8, 2, False), (12, 6, False), (8, 4, True), (6, 6, True))
    ]
    found += [
        RouterSpec(num_experts=E, top_k=E, selector="expert_choice", **fields)
        for E, fields in (
            (4, {}),
            (6, {"take_factor": 2.0, "take_rounding": "floor"}),
            (8, {"score_func": "sigmoid", "take_factor": 1.5, "take_rounding": "round", "route_norm": True}),
            (3, {"select_by": "logit", "take_factor": 0.5, "take_least": 3}),
        )
    ]
    for family in FAMILIES:
        spec = tiny(family)
        found.append(spec)
        if spec.selector == "top_k" and spec.num_expert_groups is None and spec.top_k > 1:
            found.append(replace(spec, top_k=1))
    return list(dict.fromkeys(found))


def thinned(specs: list[RouterSpec]) -> list[RouterSpec]:
    """One size for each combination of the other fields, and one with top_k 1: for subjects that compile."""
    alike: dict[tuple, list[RouterSpec]] = {}
    for spec in specs:
        others = {name: value for name, value in spec.to_dict().items() if name not in SIZE_FIELDS}
        alike.setdefault((*others.items(), spec.top_k == 1), []).append(spec)
    return [group[i % len(group)] for i, group in enumerate(alike.values())]


SIZE_FIELDS = ("num_experts", "top_k", "num_expert_groups", "num_limited_groups", "num_null_experts")
SPECS: list[RouterSpec] = _pool()
THIN_SPECS: list[RouterSpec] = thinned(SPECS)


def evenly(specs: list[RouterSpec]) -> list[RouterSpec]:
    """The specs, repeated so that each field that some spec changes is changed about as often as any other.

    Most families norm sigmoid scores; without this a rare field, norm_form or logit_softcap, is missed by luck.
    """
    plain = [spec for spec in specs if not _changed(spec)]
    changing = [
        [spec for spec in specs if name in _changed(spec)] for name in sorted({n for s in specs for n in _changed(s)})
    ]
    groups = [group for group in (plain, *changing) if group]
    longest = max(map(len, groups), default=0)
    return [group[i % len(group)] for i in range(longest) for group in groups]


@cache
def _changed(spec: RouterSpec) -> frozenset[str]:
    """Fields, sizes apart, that differ from their default."""
    names = {f.name for f in fields(spec) if getattr(spec, f.name) != f.default}
    return frozenset(names - {"num_experts", "top_k", "num_limited_groups"})


def logits_of_kind(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(T, columns) logits; every kind is a way in which real logits, or real padding, look."""
    T, E = shape
    if kind == "separated":  # a random order of values with a gap between any two: no near ties
        levels_TE = np.cumsum(rng.uniform(0.5, 1.5, shape), axis=-1) * (6 / max(E, 1))
        return rng.permuted(levels_TE, axis=-1) - rng.uniform(3, 5, (T, 1))
    if kind == "close":  # apart by less than a rounding of bfloat16, and by many roundings of float32
        levels_TE = np.cumsum(rng.uniform(0.75, 1.25, shape), axis=-1) * 2.0 ** rng.uniform(-16, -10, (T, 1))
        return rng.permuted(levels_TE, axis=-1) + rng.uniform(-2.5, 1.5, (T, 1))
    if kind == "below_zero":
        return -rng.uniform(0.25, 9, shape)
    if kind == "saturated":  # float32 holds no sigmoid of these but 1
        return rng.uniform(20, 40, shape)
    if kind == "confident":  # bfloat16 holds few sigmoids of these
        return rng.uniform(2, 7, shape)
    if kind == "normal":
        return rng.normal(0, 2, shape)
    if kind == "large":
        return np.clip(rng.normal(0, 30, shape), -75, 75)
    if kind == "huge":
        return rng.normal(0, 1, shape) * 10 ** rng.uniform(2, 4, (T, 1))
    if kind == "negative":  # scores of 1e-7 to 1e-26, where eps terms show
        return rng.uniform(-60, -16, (T, 1)) + rng.normal(0, 2, shape)
    if kind == "far":  # float32 holds no sigmoid score of these
        return rng.uniform(-140, -110, shape)
    if kind == "tied":
        return rng.integers(0, 3, shape) * 0.5
    if kind == "equal":
        return np.tile(rng.normal(0, 1, (T, 1)), (1, E))
    if kind == "one_hot":
        return np.eye(E)[rng.integers(0, E, T)] * rng.uniform(1, 9)
    raise ValueError(f"kind is {kind!r}, which no logits have")


def masked(logits_TE, spec: RouterSpec, rng: np.random.Generator) -> np.ndarray:
    """-inf at random experts; each group, or the whole row, keeps enough to be selected and summed."""
    groups = spec.num_expert_groups or spec.quota_groups or 1
    members = spec.num_choices // groups
    least = spec.group_score_k if (spec.num_expert_groups or 1) > 1 else 1
    kept = max(-(-spec.top_k // (spec.num_limited_groups or spec.quota_groups or 1)), least)
    hidden_TE = np.zeros(logits_TE.shape, dtype=bool)
    for row in hidden_TE:
        for g in range(groups):
            count = rng.integers(0, members - kept + 1)
            row[g * members + rng.permutation(members)[:count]] = True
    return np.where(hidden_TE, -np.inf, logits_TE)


def spoiled(logits_TE: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """One row with some NaN, of NaN alone, or of -inf alone."""
    T, E = logits_TE.shape
    found_TE = logits_TE.copy()
    columns = np.ones(E, dtype=bool) if kind != "nan" else rng.random(E) < 0.2
    columns[int(rng.integers(E))] = True
    found_TE[int(rng.integers(T)), columns] = -np.inf if kind == "infinite_row" else np.nan
    return found_TE


def bias_of_kind(kind: str, spec: RouterSpec, rng: np.random.Generator) -> np.ndarray | None:
    """(E,) selection bias."""
    if kind == "none" or not spec.takes_bias:
        return None
    E = spec.num_choices
    spread = {"mixed": (0, 0.5), "negative": (-2, 0.3), "positive": (2, 0.3), "strong": (0, 5)}
    centre, width = spread[kind]
    return rng.normal(centre, width, E)


def inputs_of(spec: RouterSpec, num_tokens: int, wanted: tuple[str, ...], rng: np.random.Generator) -> dict:
    """The further inputs that the spec needs, and those that the check wants."""
    T, E, K = num_tokens, spec.num_choices, spec.top_k
    inputs = {}
    if spec.learned_scale != "none":
        inputs["learned_scale"] = rng.uniform(0.25, 3, E if spec.learned_scale == "per_expert" else ())
    if spec.selector == "table":
        inputs["table_VK"] = np.argsort(rng.random((11, E)))[:, :K]
        inputs["token_ids_T"] = rng.integers(0, 11, T)
    if spec.selector == "given":
        ids_TK = np.argsort(rng.random((T, E)))[:, :K]
        inputs["given_ids_TK"] = np.where(rng.random((T, K)) < 0.2, UNUSED, ids_TK)
    if spec.selector == "random":
        inputs["seed"] = int(rng.integers(2**31))
    if "logit_factors_TE" in wanted:
        inputs["logit_factors_TE"] = few_bits(jitter(int(rng.integers(2**32)), T, spec.num_logits, eps=0.5))
    if "logit_noise_TE" in wanted:
        inputs["logit_noise_TE"] = few_bits(normal(int(rng.integers(2**32)), T, spec.num_logits))
    if "token_mask_T" in wanted:
        inputs["token_mask_T"] = rng.random(T) < 0.6
    return {name: _held(value) for name, value in inputs.items()}


def few_bits(noise_TE: np.ndarray) -> np.ndarray:
    """Noise on a grid so coarse that float32 holds noisy logits exactly: a subject of any dtype sees the same."""
    return np.round(noise_TE * 16) / 16


def _held(value):
    """Arrays of numbers as float32 holds them; anything else as it is."""
    return float32(value) if isinstance(value, np.ndarray) and value.dtype == np.float64 else value


def make_case(
    spec: RouterSpec, check: RouterCheck, *, logits: str, bias: str, tokens: int, seed: int, dtype: str = "float32"
) -> RouterCase:
    """The case of these choices."""
    rng = np.random.default_rng(seed)
    kind = {"masked": "normal"}.get(logits, "separated" if logits in SPOILED else logits)
    logits_TE = logits_of_kind(kind, (tokens, spec.num_logits), rng)
    if logits == "masked":
        logits_TE = masked(logits_TE, spec, rng)
    if logits in SPOILED:
        logits_TE = spoiled(logits_TE, logits, rng)
    bias_E = bias_of_kind(bias, spec, rng)
    inputs = inputs_of(spec, tokens, check.inputs, rng)
    if "given_ids_TK" in inputs and tokens > 1 and rng.random() < 0.5:
        inputs["given_ids_TK"][int(rng.integers(tokens))] = UNUSED  # a token that goes to nobody
    return RouterCase(
        spec=spec,
        logits_TE=held(logits_TE, dtype),
        expert_bias_E=None if bias_E is None else float32(bias_E),
        inputs=inputs,
        dtype=dtype,
        seed=seed,
    )


def settings(judge: Judge, check: RouterCheck) -> tuple[list[RouterSpec], Counter]:
    """The specs that the check wants and the subject supports, each field changed about as often as any other."""
    pool = THIN_SPECS if judge.subject.compiles else SPECS
    wanted = [spec for spec in pool_of(judge, RouterSpec, pool) if check.spec(spec)]
    reasons = [judge.subject.supports(spec) for spec in wanted]
    supported = [spec for spec, why in zip(wanted, reasons, strict=True) if why is None]
    if judge.subject.compiles and costs_programs(judge, check):
        supported = few(tuple(supported))
    return evenly(supported), Counter(why for why in reasons if why)


def costs_programs(judge: Judge, check: RouterCheck) -> bool:
    """Whether a check's cases are no programs that others have compiled: those of seven tokens and their logits."""
    return check.few or bool(check.inputs) or check.tokens[0] != 7 or "float32" not in dtypes_of(judge, check)


@cache
def few(specs: tuple[RouterSpec, ...]) -> list[RouterSpec]:
    """Few of the specs: each field that some spec changes is changed, and each name that it can have is there."""
    names = ("score_func", "score_over", "selector", "select_by", "weights_from", "norm_form", "null_kind")
    return covering(specs, lambda spec: {*_changed(spec), *((name, getattr(spec, name)) for name in names)})


def dtypes_of(judge: Judge, check: RouterCheck) -> list[str]:
    """The dtypes of logits that the check wants and the subject declares, float32 as often as all others together."""
    declared = [dtype for dtype in check.dtypes if dtype in judge.subject.logit_dtypes]
    if "float32" not in declared:
        return declared or ["float32"]
    others = [] if judge.subject.compiles else [dtype for dtype in declared if dtype != "float32"]
    return ["float32"] * max(1, len(others)) + others


def draw(judge: Judge, check: RouterCheck, seed: int) -> RouterCase:
    """The case of a seed."""
    rng, (specs, _) = np.random.default_rng(seed), settings_of(judge, check)
    dtypes = dtypes_of(judge, check)
    spec, sizes = one_of(rng, specs), tokens_of(judge, check.tokens)
    if judge.subject.compiles and (costs_programs(judge, check) or spec not in few(tuple(dict.fromkeys(specs)))):
        sizes = sizes[:1]  # each number of tokens is another program
    return make_case(
        spec,
        check,
        logits=one_of(rng, check.logits),
        bias=one_of(rng, check.bias),
        tokens=one_of(rng, sizes),
        dtype=one_of(rng, dtypes),
        seed=int(rng.integers(2**32)),
    )
