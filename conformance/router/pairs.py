"""conformance, router, pairs: few cases that have, together, every pair of what a case is made of.

A fault often needs two things at once: a bias with a masked logit, a p-norm with a learned scale. Each value of a
field, kind of logits, kind of bias, dtype and class of size meets each other one, where the two can meet at all.
"""

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import chain, product
from typing import Any, NamedTuple

import numpy as np

from conformance.core.drawing import one_of
from conformance.core.judge import Judge
from conformance.router.case import RouterCase
from conformance.router.check import RouterCheck
from conformance.router.draw import BIASES, LOGITS, SPECS, THIN_SPECS, make_case
from moe_ref import RouterSpec
from moe_ref.specs.router_rules import ROUTER_DTYPES, SCORE_FUNCS, SELECTORS, TAKE_ROUNDINGS


class Setting(NamedTuple):
    """What a case is made of, but for the numbers."""

    spec: RouterSpec
    logits: str
    bias: str
    dtype: str
    tokens: int


Fact = tuple[str, Any]
"""(what, which): a part of a setting."""

SHAPES: dict[str, dict[str, tuple[int, int, int]]] = {
    "none": {"few": (12, 0, 0), "some": (33, 0, 0), "many": (130, 0, 0)},
    "one": {"few": (12, 1, 1), "some": (33, 1, 1), "many": (130, 1, 1)},
    "each expert": {"few": (8, 8, 2), "some": (33, 33, 2), "many": (130, 130, 2)},
    "all kept": {"few": (12, 4, 4), "some": (36, 4, 4), "many": (132, 4, 4)},
    "pairs": {"few": (8, 4, 2), "some": (34, 17, 2), "many": (130, 65, 2)},
    "triples": {"few": (12, 4, 2), "some": (33, 11, 2), "many": (129, 43, 2)},
    "larger": {"few": (16, 4, 2), "some": (64, 8, 4), "many": (256, 8, 4)},
}
"""Groups -> experts -> (num_experts, num_expert_groups, num_limited_groups)."""

FIELDS: dict[str, tuple] = {
    "router_dtype": ROUTER_DTYPES,
    "score_func": SCORE_FUNCS,
    "score_over": ("all", "selected"),
    "logit_scale": (1.0, 0.25),
    "logit_softcap": (None, 1.5),
    "group_score_k": (2, 1, 3),
    "mask_fill": (-np.inf, 0.0),
    "selector": SELECTORS,
    "take_factor": (1.0, 2.0),
    "take_rounding": TAKE_ROUNDINGS,
    "take_least": (0, 3),
    "threshold": (0.0, 0.5),
    "top_p": (None, 0.5),
    "quota_groups": (None, 2),
    "select_by": ("score", "logit"),
    "weights_from": ("scores", "masked_scores"),
    "route_norm": (False, True),
    "norm_form": ("add_eps", "clamp"),
    "norm_eps": (0.0, 1e-20, 0.25),
    "norm_p": (1.0, 2.0),
    "norm_with_shared": (False, True),
    "route_scale": (1.0, 2.5),
    "learned_scale": ("none", "per_expert", "global"),
    "num_null_experts": (0, 1, 3),
    "null_kind": ("identity", "skip"),
    "num_constant_experts": (0, 1),
    "num_zero_experts": (0, 1),
    "num_scored_shared_experts": (0, 2),
    "weight_on": ("output", "input"),
    "output_scale": (1.0, 2.0),
}
"""Values of each field of a spec, the identity first."""
PARTS: dict[str, tuple] = FIELDS | {
    "groups": tuple(SHAPES),
    "experts": ("few", "some", "many"),
    "top_k": ("one", "two", "nine", "all"),
    "logits": LOGITS,
    "bias": BIASES,
    "dtype": ("float32", "float64", "bfloat16", "float16"),
    "tokens": ("one", "few", "some", "many"),
}
"""Everything that a setting is chosen from."""
TOKENS = {"one": 1, "few": 7, "some": 33, "many": 130}
TOP_K = {"one": 1, "two": 2, "nine": 9}

GROUPED = tuple(name for name in SHAPES if name != "none")
CHOSEN = tuple(name for name in FIELDS["selector"] if name != "expert_choice")
IMPLIES: tuple[tuple[str, tuple, str, tuple], ...] = (
    ("score_over", ("selected",), "score_func", ("softmax",)),
    ("score_over", ("selected",), "select_by", ("logit",)),
    (
        "score_over",
        ("selected",),
        "selector",
        ("top_k", "group_top_k", "table", "given", "round_robin", "random", "sinkhorn", "expert_choice", "threshold"),
    ),
    ("selector", ("sparsemixer", "sinkhorn"), "select_by", ("logit",)),
    ("selector", ("sparsemixer", "top_p"), "score_func", ("softmax",)),
    ("selector", ("top_p",), "select_by", ("score",)),
    ("selector", ("top_p",), "top_p", (0.5,)),
    ("top_p", (0.5,), "selector", ("top_p",)),
    ("threshold", (0.5,), "selector", ("threshold",)),
    ("score_func", ("relu",), "selector", ("threshold", "given")),
    ("num_scored_shared_experts", (2,), "score_func", ("sigmoid", "sqrtsoftplus")),
    ("norm_with_shared", (True,), "num_scored_shared_experts", (2,)),
    ("quota_groups", (2,), "selector", ("group_top_k",)),
    ("selector", ("group_top_k",), "quota_groups", (2,)),
    ("selector", ("group_top_k",), "groups", ("none",)),
    ("selector", ("group_top_k",), "experts", ("few", "many")),
    ("selector", ("group_top_k",), "top_k", ("two", "all")),
    ("selector", ("group_top_k",), "num_null_experts", (0,)),
    ("selector", ("expert_choice",), "top_k", ("all",)),
    ("selector", ("expert_choice",), "num_null_experts", (0,)),
    ("selector", CHOSEN, "take_factor", (1.0,)),
    ("selector", CHOSEN, "take_rounding", ("ceil",)),
    ("selector", CHOSEN, "take_least", (0,)),
    ("groups", GROUPED, "selector", ("top_k",)),
    ("groups", GROUPED, "num_null_experts", (0,)),
    ("num_constant_experts", (1,), "num_null_experts", (1, 3)),
    ("num_zero_experts", (1,), "num_null_experts", (1, 3)),
    ("num_constant_experts", (1,), "null_kind", ("identity",)),
    ("num_zero_experts", (1,), "null_kind", ("identity",)),
    ("groups", ("none",), "group_score_k", (2,)),
    ("groups", ("none",), "mask_fill", (-np.inf,)),
    ("groups", ("none",), "weights_from", ("scores",)),
    ("groups", ("each expert",), "group_score_k", (1,)),
    ("groups", ("each expert",), "top_k", ("one", "two", "all")),
    ("groups", ("pairs",), "group_score_k", (1, 2)),
    ("groups", ("pairs", "triples"), "top_k", ("one", "two", "all")),
    ("bias", BIASES[1:], "selector", ("top_k", "threshold")),
)
"""(part, values, another part, values): where the first has one of these values, the second has one of those.

What a spec forbids is for RouterSpec to say; these find settings that it allows.
"""


ATTEMPTS, REPAIRS = 8, 30

Domains = dict[str, int]
"""part -> the values that it can have, a bit for each of them."""


def _bits(part: str, values: Sequence) -> int:
    return sum(1 << i for i, value in enumerate(PARTS[part]) if value in values)


EVERY: Domains = {part: _bits(part, values) for part, values in PARTS.items()}
RULES = [(part, _bits(part, values), other, _bits(other, allowed)) for part, values, other, allowed in IMPLIES]
"""IMPLIES, in bits."""


def domains_with(first: Fact, second: Fact) -> Domains | None:
    """What each part can be beside two facts, by IMPLIES alone; None where they exclude each other."""
    domains = EVERY | {part: _bits(part, (value,)) for part, value in (first, second)}
    before = None
    while before != domains:
        before = dict(domains)
        for part, values, other, allowed in RULES:
            if not domains[part] & ~values:
                domains[other] &= allowed
            if not domains[other] & allowed:
                domains[part] &= ~values
    return domains if all(domains.values()) else None


def setting_with(first: Fact, second: Fact, rng: np.random.Generator) -> Setting | None:
    """A setting that has both facts, the rest by chance; None where none is found."""
    domains = domains_with(first, second)
    if domains is None:
        return None
    choices = {part: [i for i in range(domain.bit_length()) if domain >> i & 1] for part, domain in domains.items()}
    numbers = [len(places) for places in choices.values()]
    for _ in range(ATTEMPTS):
        chosen = {part: places[n] for (part, places), n in zip(choices.items(), rng.integers(numbers), strict=True)}
        if not _repaired(chosen, domains, rng):
            continue
        found = _setting({part: PARTS[part][place] for part, place in chosen.items()})
        if found is not None and {first, second} <= facts(found):
            return found
    return None


def _repaired(chosen: dict[str, int], domains: Domains, rng: np.random.Generator) -> bool:
    """Whether the setting keeps to IMPLIES, after what can be otherwise has given way."""
    for number in range(REPAIRS):
        for part, values, other, allowed in RULES:
            if values >> chosen[part] & 1 and not allowed >> chosen[other] & 1:
                break
        else:
            return True
        # What is implied gives way, or what implies it, in turn: else two rules about one part go on for ever.
        ways = [(other, domains[other] & allowed), (part, domains[part] & ~values)]
        changed, to = ways[number % 2] if ways[number % 2][1] else ways[1 - number % 2]
        chosen[changed] = one_of(rng, [i for i in range(to.bit_length()) if to >> i & 1])
    return False


def _setting(chosen: dict[str, Any]) -> Setting | None:
    E, G, L = SHAPES[chosen["groups"]][chosen["experts"]]
    groups = {"num_expert_groups": G, "num_limited_groups": L} if G else {}
    choices = L * (E // G) if G else E + chosen["num_null_experts"] * (chosen["selector"] != "round_robin")
    try:
        spec = RouterSpec(
            num_experts=E,
            top_k=TOP_K.get(chosen["top_k"], choices),
            **groups,
            **{name: chosen[name] for name in FIELDS},
        )
    except ValueError:  # two fields contradict each other
        return None
    return Setting(spec, chosen["logits"], chosen["bias"], chosen["dtype"], TOKENS[chosen["tokens"]])


def facts(setting: Setting) -> frozenset[Fact]:
    """What a setting is made of. Of a number that is not listed, what is nearest to it counts."""
    spec = setting.spec
    found: set[Fact] = {(name, _nearest(getattr(spec, name), values)) for name, values in FIELDS.items()}
    P, G, L = spec.experts_per_group, spec.num_expert_groups, spec.num_limited_groups
    of_size = {1: "each expert", 2: "pairs", 3: "triples"}.get(P, "larger")
    groups = "none" if G is None else "one" if G == 1 else "all kept" if L == G else of_size
    choices = spec.num_experts if spec.selector == "round_robin" else spec.num_choices
    most = choices if G is None or L is None else L * P
    top_k = "all" if spec.top_k == most else "one" if spec.top_k == 1 else "two" if spec.top_k <= 8 else "nine"
    experts = "few" if spec.num_experts <= 16 else "some" if spec.num_experts <= 64 else "many"
    tokens = min(TOKENS, key=lambda name: (TOKENS[name] < setting.tokens, TOKENS[name]))
    bias = setting.bias if spec.takes_bias else "none"
    return frozenset(
        found
        | {("groups", groups), ("experts", experts), ("top_k", top_k), ("tokens", tokens)}
        | {("logits", setting.logits), ("bias", bias), ("dtype", setting.dtype)}
    )


def _nearest(value: Any, values: tuple) -> Any:
    if value in values or isinstance(value, (str, bool)) or value is None:
        return value
    others = [each for each in values[1:] if each is not None]
    return min(others, key=lambda each: abs(float(each) - float(value)))


def covering_pairs(settings: Sequence[Setting], known: Sequence[Setting] = ()) -> list[Setting]:
    """Few of the settings that have, with those that are known, every pair of facts that some setting has."""
    of_setting = [facts(setting) for setting in settings]
    place = {fact: i for i, fact in enumerate(sorted({fact for each in of_setting for fact in each}, key=repr))}
    if not place:
        return []
    has = np.zeros((len(settings), len(place)), dtype=np.float32)
    for row, each in enumerate(of_setting):
        has[row, [place[fact] for fact in each]] = 1
    missing = np.triu(has.T @ has > 0, 1)
    for setting in known:
        columns = [place[fact] for fact in facts(setting) if fact in place]
        missing[np.ix_(columns, columns)] = False
    kept = []
    while missing.any():
        first, second = np.unravel_index(missing.argmax(), missing.shape)
        rows = np.flatnonzero((has[:, first] > 0) & (has[:, second] > 0))
        gains = ((has[rows] @ missing.astype(np.float32)) * has[rows]).sum(axis=-1)
        best = int(rows[gains.argmax()])
        columns = np.flatnonzero(has[best])
        missing[np.ix_(columns, columns)] = False
        kept.append(settings[best])
    return kept


@cache
def every_pair() -> tuple[Setting, ...]:
    """Settings that have, together, every pair of facts that some valid spec allows."""
    rng = np.random.default_rng(0)
    of_part = [[(part, value) for value in values] for part, values in PARTS.items()]
    place = {fact: number for number, fact in enumerate(fact for some in of_part for fact in some)}
    seen, settings = np.zeros((len(place), len(place)), dtype=bool), []
    for number, some in enumerate(of_part):
        for first, second in product(some, chain(*of_part[number + 1 :])):
            if not seen[place[first], place[second]] and (found := setting_with(first, second, rng)) is not None:
                places = [place[fact] for fact in facts(found)]
                seen[np.ix_(places, places)] = True
                settings.append(found)
    return tuple(settings)


@cache
def survey() -> tuple[Setting, ...]:
    """Few settings that have every pair together."""
    return tuple(covering_pairs(every_pair()))


@lru_cache(maxsize=64)
def survey_of(specs: tuple[RouterSpec, ...], dtypes: tuple[str, ...], tokens: tuple[int, ...]) -> tuple[Setting, ...]:
    """Few settings with every pair that these specs, dtypes and numbers of tokens make."""
    rng = np.random.default_rng(1)
    settings = [
        Setting(spec, logits, one_of(rng, BIASES), one_of(rng, dtypes), one_of(rng, tokens))
        for spec in specs
        for logits in LOGITS
    ]
    return tuple(covering_pairs(settings))


def settings(judge: Judge, check: RouterCheck) -> list[Setting]:
    """The settings of a check: those of the survey that the subject supports, and what they leave of its own pairs."""
    subject = judge.subject
    dtypes = tuple(dtype for dtype in check.dtypes if dtype in subject.logit_dtypes)
    dtypes = dtypes or ("float32",)  # given as float64
    tokens = tuple(TOKENS.values())
    if subject.compiles:  # programs that other requirements have compiled already
        dtypes, tokens = dtypes[:1], (7,)
    found = [
        setting
        for setting in (() if subject.compiles else survey())
        if check.spec(setting.spec) and setting.dtype in dtypes and subject.supports(setting.spec) is None
    ]
    if len(found) == len(survey()):
        return found
    pool = THIN_SPECS if subject.compiles else SPECS
    specs = tuple(spec for spec in pool if check.spec(spec) and subject.supports(spec) is None)
    return found + list(survey_of(specs, dtypes, tokens))


def cases(judge: Judge, check: RouterCheck) -> Iterator[RouterCase]:
    """A case of each setting."""
    if check.pairs:
        for number, (spec, logits, bias, dtype, tokens) in enumerate(settings(judge, check)):
            yield make_case(spec, check, logits=logits, bias=bias, dtype=dtype, tokens=tokens, seed=number)
