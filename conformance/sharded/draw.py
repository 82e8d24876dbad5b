"""conformance, sharded: what is generated. Settings of a layer and a layout, then tokens, counts and loads for one.

A subject that compiles gets a few settings, in which every fact comes about, and any data; others get any mesh of at
most 8 devices with any number of tokens on each shard.

Legend: T tokens, D model dim, E choices, K top_k, S token shards.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice, product
from typing import Any

import numpy as np

from conformance.core.case import float32
from conformance.core.check import CHECKS
from conformance.core.drawing import covering, one_of
from conformance.core.judge import Judge
from conformance.core.kind import settings_of
from conformance.layer.bounds import stable_T
from conformance.layer.draw import (
    CLEARLY,
    DEEPSEEK,
    DRAWS,
    GPT_OSS,
    NORM,
    SELECTED,
    SIGMOID,
    SOFTMAX,
    facts,
    inputs_of,
    params_of_kind,
)
from conformance.sharded.case import ShardedCase, why_not
from conformance.sharded.check import ShardedCheck
from moe_ref import UNUSED, ExpertSpec, LatentSpec, LayerParams, LayerSpec, RouterSpec, SharedSpec
from moe_ref.specs.families import tiny
from moe_ref.specs.layout import ShardLayout
from moe_ref.strategies import STRATEGIES

MOST_RANKS = 8
TOKENS = 4
"""Of each shard where all have as many; two and four chunks divide it."""
MESHES_EACH = 12
"""Meshes tried for each layer and strategy: every mesh is tried with several layers."""
LAYOUTS_TRIED = 8
"""So many other layouts of the same layer are tried for one that a subject supports."""
PRIMES = (2, 3, 5, 7)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A layer on a layout, and how many tokens there are, before they are drawn."""

    spec: LayerSpec
    layout: ShardLayout
    tokens_per_shard: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""
        return sum(self.tokens_per_shard)


DIMS: dict[str, Any] = {"dim": 8, "hidden_dim": 16}
PLAIN = ExpertSpec(**DIMS)

LAYOUT_SPECS = (
    LayerSpec(router=RouterSpec(num_experts=8, top_k=2, **SOFTMAX), experts=PLAIN),
    LayerSpec(router=RouterSpec(num_experts=8, top_k=1, **SIGMOID, output_scale=2.5), experts=PLAIN),
    LayerSpec(router=tiny("gpt_oss"), experts=ExpertSpec(**DIMS, **GPT_OSS), gate_bias=True),
    LayerSpec(router=tiny("deepseek_v3"), experts=PLAIN, shared=SharedSpec(hidden_dim=8)),
    LayerSpec(router=tiny("qwen2_moe"), experts=PLAIN, shared=SharedSpec(hidden_dim=24, gate="sigmoid")),
    LayerSpec(
        router=RouterSpec(num_experts=8, top_k=2, **SIGMOID, select_by="logit", weight_on="input"),
        experts=ExpertSpec(**DIMS, activation="gelu", bias=True),
    ),
    LayerSpec(router=tiny("cohere2_moe"), experts=PLAIN, shared=SharedSpec(hidden_dim=16, combine="average")),
    LayerSpec(router=tiny("longcat_flash").replace(num_constant_experts=1, num_zero_experts=1), experts=PLAIN),
    LayerSpec(
        router=RouterSpec(num_experts=8, top_k=3, **SOFTMAX, num_null_experts=3, null_kind="skip"), experts=PLAIN
    ),
    LayerSpec(
        router=RouterSpec(num_experts=8, top_k=3, **SIGMOID, **NORM, selector="given"),
        experts=ExpertSpec(dim=8, hidden_dim=8, bias=True),
    ),
    LayerSpec(router=tiny("gemma4"), experts=ExpertSpec(**DIMS, gated=False, activation="relu2", bias=True)),
    LayerSpec(router=tiny("inkling"), experts=PLAIN, shared=SharedSpec(hidden_dim=8)),
    LayerSpec(router=tiny("deepseek_v4_hash"), experts=ExpertSpec(**DIMS, clamp=0.75), shared=SharedSpec(hidden_dim=8)),
    # Sizes that fit one another nowhere.
    LayerSpec(router=RouterSpec(num_experts=6, top_k=2, **SELECTED), experts=ExpertSpec(dim=5, hidden_dim=7)),
    LayerSpec(
        router=RouterSpec(num_experts=16, top_k=3, **DEEPSEEK),
        experts=ExpertSpec(dim=6, hidden_dim=30, bias=True),
        shared=SharedSpec(hidden_dim=4),
        latent=LatentSpec(dim=10, norm_eps=0.01),
    ),
)
DISPATCH_SPECS = tuple(
    LayerSpec(
        router=RouterSpec(num_experts=E, top_k=K, **SIGMOID, selector="given", num_null_experts=null),
        experts=ExpertSpec(dim=8, hidden_dim=8),
    )
    for E, K, null in ((8, 2, 0), (8, 1, 0), (16, 4, 0), (8, 3, 2), (6, 2, 0), (4, 4, 0), (24, 3, 0))
)
"""Dispatch looks at the ids alone: they are given."""


BOUNDED_RINGS: tuple[dict[str, Any], ...] = (
    {"expert": 2, "buffer_factor": 0.5},
    {"expert": 4, "buffer_factor": 1.0},
    {"fsdp": 2, "expert": 2, "buffer_factor": 0.5},
    {"expert": 2, "tensor": 2, "buffer_factor": 0.75},
)
RETURNED_ROWS: tuple[dict[str, Any], ...] = (
    {"expert": 4},
    {"expert": 2, "tensor": 2},
    {"expert": 8},
    {"data": 2, "expert": 2, "num_token_chunks": 2},
    {"fsdp": 2, "expert": 4},
    {},
    {"expert": 2},
)
FEW_MESHES = {"ring_of_experts": BOUNDED_RINGS, "replicated_ragged": RETURNED_ROWS}
"""Layouts of which each layer gets one, in turn: rings of experts with room for less than all rows, and rows that come
back to every rank."""
EVERY_MESH = tuple(strategy for strategy in STRATEGIES if strategy != "replicated_ragged")


def meshes() -> list[dict]:
    """Every mesh of at most 8 devices whose expert degree is 1, 2, 4 or 8."""
    sizes = range(1, MOST_RANKS + 1)
    found = [dict(zip(("data", "fsdp", "expert", "tensor"), mesh, strict=True)) for mesh in product(sizes, repeat=4)]
    return [m for m in found if np.prod(list(m.values())) <= MOST_RANKS and m["expert"] in (1, 2, 4, 8)]


@cache
def every_setting(specs: tuple[LayerSpec, ...]) -> tuple[Setting, ...]:
    """Layers on meshes with strategies, each with some of the options that a layout has; plain ones first."""
    rng, found, every_mesh, seen = np.random.default_rng(0), [], meshes(), set()
    for spec, strategy in product(specs, EVERY_MESH):
        for place, number in enumerate(rng.permutation(len(every_mesh))):
            mesh = every_mesh[number]
            plain = _valid(spec, ShardLayout(**mesh, strategy=strategy))
            if plain is not None and (place < MESHES_EACH or number not in seen):
                found += [plain, _with_options(plain, rng)]
                seen.add(number)
    for (strategy, few), (number, spec) in product(FEW_MESHES.items(), enumerate(specs)):
        mesh = few[number % len(few)]
        if spec in DISPATCH_SPECS:  # its plan is that of one exchange
            mesh = mesh | {"num_token_chunks": 1}
        found += [setting for setting in [_valid(spec, ShardLayout(**mesh, strategy=strategy))] if setting is not None]
    return tuple(sorted(dict.fromkeys(found), key=lambda setting: setting.layout.num_ranks))


def _valid(spec: LayerSpec, layout: ShardLayout) -> Setting | None:
    """The setting with as many tokens on every shard, or None where the layer cannot be laid out so."""
    try:
        layout.check(spec)
    except ValueError:
        return None
    return Setting(spec=spec, layout=layout, tokens_per_shard=(TOKENS,) * layout.num_token_shards)


def _with_options(plain: Setting, rng: np.random.Generator) -> Setting:
    """The same with a few of the options that it can have."""
    spec, layout = plain.spec, plain.layout
    E, ep = spec.router.num_experts, layout.expert
    options: list[dict] = [{"placement": tuple(rng.permutation(E).tolist())}]
    options += [{"ranks_per_node": n} for n in (1, 2, 4) if n < ep and ep % n == 0]
    if spec not in DISPATCH_SPECS:  # its plan is that of one exchange
        options += [{"num_token_chunks": int(rng.choice([2, 4]))}, {"num_emb_chunks": 2}]
    if layout.strategy == "ragged_all_to_all":  # the ring has BOUNDED_RINGS
        options += [{"buffer_factor": float(rng.choice([0.5, 1.0, 1.5]))}] * 2
    for number in rng.permutation(len(options))[: int(rng.integers(1, 4))]:
        try:
            changed = _valid(spec, layout.replace(**options[number]))
        except ValueError:
            continue
        layout = layout if changed is None else changed.layout
    return replace(plain, layout=layout)


@cache
def facts_of(setting: Setting) -> frozenset:
    """What is not the plainest in a layer and its layout, and the pairs that go wrong together."""
    spec, layout = setting.spec, setting.layout
    ep, tp, sharded = layout.expert, layout.tensor, layout.num_ranks > 1
    axes = (layout.data > 1, layout.fsdp > 1, ep > 1, tp > 1)
    found: set = {("strategy", layout.strategy, ep > 1), ("expert", ep), ("axes", axes)}
    found |= {("tensor", spec.experts.bias, spec.shared is not None)} if tp > 1 else set()
    found |= {("groups", layout.strategy)} if layout.num_rank_groups > 1 and ep > 1 else set()
    found |= {("placed", layout.strategy)} if layout.placement is not None and ep > 1 else set()
    found |= {("nodes", layout.strategy)} if layout.num_nodes > 1 else set()
    found |= {("token chunks", ep > 1)} if layout.num_token_chunks > 1 else set()
    found |= {("emb chunks", ep > 1, tp > 1)} if layout.num_emb_chunks > 1 else set()
    found |= {("buffer", layout.buffer_factor)} if layout.buffer_factor is not None and ep > 1 else set()
    found |= {("tokens", setting.tokens_per_shard[0] > 0)}
    found |= {("null experts", layout.strategy)} if spec in DISPATCH_SPECS and spec.router.num_null_experts else set()
    return frozenset(found | {("layer", fact) for fact in facts(spec) if sharded})


def facts_of_layout(setting: Setting) -> frozenset:
    """Those of them that are about the layout."""
    return frozenset(fact for fact in facts_of(setting) if fact[0] != "layer")


# what a subject is tried on


def settings(judge: Judge, check: ShardedCheck) -> tuple[list[Setting], Counter]:
    """The settings that the check wants and the subject supports, and why the others are not run."""

    def wants(setting: Setting) -> bool:
        return check.spec(setting.spec) and check.layout(setting.layout)

    runnable, refused = _runnable(judge, DISPATCH_SPECS if check.method == "dispatch" else LAYOUT_SPECS)
    wanted = [setting for setting in runnable if wants(setting)]
    if judge.subject.compiles:  # its counts are those of the setting
        wanted = [s for s in wanted if (s.num_tokens == 0) == (check.counts == ("empty",))]
    return wanted, Counter(sentence for setting, sentence in refused if wants(setting))


def _runnable(judge: Judge, specs: tuple[LayerSpec, ...]) -> tuple[list[Setting], list[tuple[Setting, str]]]:
    """The settings that the subject runs, and the others with the sentence that says why not."""
    key = "runnable", specs is DISPATCH_SPECS
    if key not in judge.memory:
        found, refused = [], []
        for setting in every_setting(specs):
            sentence = why_not(judge.subject, setting.spec, setting.layout, setting.tokens_per_shard)
            if sentence is None:
                found.append(setting)
            else:
                refused.append((setting, sentence))
        if judge.subject.compiles and specs is not DISPATCH_SPECS:
            found = thin(found)
        judge.memory[key] = found, refused
    return judge.memory[key]


def thin(runnable: list[Setting]) -> list[Setting]:
    """A few settings: one for each requirement, strategy and expert degree, and one without any token."""
    kept = covering(runnable, _wanted_by)
    if kept:
        kept.append(replace(kept[0], tokens_per_shard=(0,) * len(kept[0].tokens_per_shard)))
    return kept


def _wanted_by(setting: Setting) -> frozenset:
    """The requirements that want a setting; those about any load of plain layouts for each strategy."""
    spec, layout = setting.spec, setting.layout
    sharded, checks = layout.expert > 1, [c for c in CHECKS.values() if isinstance(c, ShardedCheck)]
    found: set = {("strategy", layout.strategy, sharded), ("expert", layout.expert)}
    for check in checks:
        if check.method != "dispatch" and check.spec(spec) and check.layout(layout) and layout.num_ranks > 1:
            every_strategy = sharded and check.requirement in ("LYT-2", "LYT-13", "LYT-31")
            found.add((check.requirement, layout.strategy if every_strategy else ""))
    return frozenset(found | ({("groups",)} if layout.num_rank_groups > 1 and sharded else set()))


def another_layout(judge: Judge, case: ShardedCase) -> ShardedCase | None:
    """The same tokens on another layout that the subject supports: any, or one rank where each costs a compilation."""
    rng, one = case.rng(), ShardLayout()
    others = [layout for layout in _layouts_of(judge, case.spec) if layout != case.layout]
    tried = [] if judge.subject.compiles else [others[n] for n in rng.permutation(len(others))[:LAYOUTS_TRIED]]
    for layout in (*filter(lambda layout: layout.buffer_factor is None, tried), one):
        shards = layout.num_token_shards
        for counts in (rng.multinomial(case.num_tokens, np.full(shards, 1 / shards)), case.num_tokens // shards):
            spread = tuple(np.broadcast_to(counts, shards).tolist())
            fits = sum(spread) == case.num_tokens and (layout, spread) != (case.layout, case.tokens_per_shard)
            if fits and why_not(judge.subject, case.spec, layout, spread) is None:
                return case.with_(layout=layout, tokens_per_shard=spread)
    return None


def _layouts_of(judge: Judge, spec: LayerSpec) -> list[ShardLayout]:
    """The layouts of a layer that the subject runs."""
    key = "layouts of", spec
    if key not in judge.memory:
        judge.memory[key] = [s.layout for s in _runnable(judge, LAYOUT_SPECS)[0] if s.spec == spec]
    return judge.memory[key]


# the data of a case


def counts_of_kind(kind: str, shards: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Tokens of each shard."""
    if kind == "equal":
        return (int(rng.choice([1, 2, 3, 4, 5])),) * shards
    if kind == "prime":
        return tuple(rng.choice(PRIMES, shards).tolist())
    found_S = rng.integers(1, 7, shards)
    if kind == "some_empty":
        found_S[rng.random(shards) < 0.5] = 0
        found_S[rng.integers(shards)] = 0
    return tuple((found_S * (kind != "empty")).tolist())


def varied(judge: Judge, setting: Setting, counts: str, rng: np.random.Generator) -> Setting:
    """The setting with other tokens and another placement, where the subject supports that too."""
    spec, layout = setting.spec, setting.layout
    # A plan is compiled in a fraction of what a layer takes.
    if judge.subject.compiles and (spec not in DISPATCH_SPECS or rng.random() < 0.6):
        return setting
    for kind in (counts, "equal"):
        other, tokens_per_shard = layout, counts_of_kind(kind, layout.num_token_shards, rng)
        if layout.placement is not None:
            other = other.replace(placement=tuple(rng.permutation(spec.router.num_experts).tolist()))
        if _valid(spec, other) is not None and why_not(judge.subject, spec, other, tokens_per_shard) is None:
            return Setting(spec=spec, layout=other, tokens_per_shard=tokens_per_shard)
    return setting


def ids_of_kind(
    load: str, num_tokens: int, spec: RouterSpec, layout: ShardLayout, rng: np.random.Generator
) -> np.ndarray:
    """(T, K) ids of a kind of load; the slots of a token are distinct, or unused."""
    T, E, K = num_tokens, spec.num_choices, spec.top_k
    order_TE = rng.random((T, E))
    if load == "one_rank":  # everything that fits to one rank
        order_TE[:, list(layout.experts_of(int(rng.integers(layout.expert)), spec.num_experts))] -= 1
    if load == "one_expert":  # the same experts for all
        order_TE[:] = order_TE[:1]
    if load == "skewed":
        order_TE = order_TE ** np.linspace(4, 0.25, E)
    ids_TK = np.argsort(order_TE, axis=-1)[:, :K]
    share = {"unused": 0.4, "nobody": 1.0}.get(load, 0.0)
    return np.where(rng.random((T, K)) < share, UNUSED, ids_TK)


@cache
def no_params(spec: LayerSpec) -> LayerParams:
    """Parameters that nobody looks at."""
    return LayerParams.init(spec, 0)


def params_of_bias(spec: LayerSpec, layout: ShardLayout, bias: str, rng: np.random.Generator) -> LayerParams:
    """Parameters with a kind of expert_bias; with one_rank every token prefers the experts of one rank."""
    made = params_of_kind(spec, "mixed" if bias == "one_rank" else bias, rng)
    if bias == "one_rank" and made.expert_bias_E is not None:
        preferred = layout.experts_of(int(rng.integers(layout.expert)), spec.router.num_experts)
        made.expert_bias_E[list(preferred)] += 8
    return made


def make_case(
    judge: Judge, check: ShardedCheck, setting: Setting, *, x: str, bias: str, load: str, counts: str, seed: int
) -> ShardedCase:
    """The case of these choices; without counts the tokens are those of the setting."""
    rng, spec = np.random.default_rng(seed), setting.spec
    setting = varied(judge, setting, counts, rng) if counts else setting
    layout, T, D = setting.layout, setting.num_tokens, spec.experts.dim
    inputs = inputs_of(spec.router, T, check.inputs, rng)
    if spec.router.selector == "given":
        inputs["given_ids_TK"] = ids_of_kind(load, T, spec.router, layout, rng)
    laid_out: dict[str, Any] = {"layout": layout, "tokens_per_shard": setting.tokens_per_shard}
    if check.method == "dispatch":  # the ids are all that it sees
        return case_of_ids(spec, inputs["given_ids_TK"], **laid_out, seed=seed)

    def draw_tokens() -> np.ndarray:
        size = {"normal": 1.0, "large": 8.0}[x]
        return float32(size * rng.normal(size=(T, D)))

    case = ShardedCase(
        spec=spec,
        params=params_of_bias(spec, layout, bias, rng),
        x_TD=draw_tokens(),
        d_output_TD=float32(rng.normal(size=(T, D))),
        inputs=inputs,
        seed=seed,
        **laid_out,
    )
    for _ in range(DRAWS):
        clear_T = stable_T(case, CLEARLY)
        if clear_T.all():
            break
        case = case.with_(x_TD=np.where(clear_T[:, None], case.x_TD, draw_tokens()))
    return case


def case_of_ids(
    spec: LayerSpec, given_ids_TK: np.ndarray, *, layout: ShardLayout, tokens_per_shard: tuple[int, ...], seed: int = 0
) -> ShardedCase:
    """A case of dispatch alone: given ids, and nothing in the tokens."""
    nothing_TD = np.zeros((len(given_ids_TK), spec.experts.dim))
    return ShardedCase(
        spec=spec,
        params=no_params(spec),
        x_TD=nothing_TD,
        d_output_TD=nothing_TD,
        inputs={"given_ids_TK": given_ids_TK},
        layout=layout,
        tokens_per_shard=tokens_per_shard,
        seed=seed,
    )


CHOICES = {"x": "x", "bias": "bias", "load": "loads", "counts": "counts"}
"""A choice of `make_case`, and the field of a check that has its kinds."""


def draw(judge: Judge, check: ShardedCheck, seed: int) -> ShardedCase:
    """The case of a seed; each fact comes about as often as any other."""
    rng, key = np.random.default_rng(seed), ("settings by fact", check.requirement)
    if key not in judge.memory:
        by_fact: dict[Any, list[Setting]] = {}
        for setting in settings_of(judge, check)[0]:
            for fact in facts_of(setting):
                by_fact.setdefault(fact, []).append(setting)
        judge.memory[key] = [by_fact[fact] for fact in sorted(by_fact, key=str)]
    setting = one_of(rng, one_of(rng, judge.memory[key]))
    choices = {name: one_of(rng, getattr(check, field)) for name, field in CHOICES.items()}
    return make_case(judge, check, setting, **choices, seed=int(rng.integers(2**32)))


def fixed(judge: Judge, check: ShardedCheck) -> Iterator[ShardedCase]:
    """A case for each fact of layouts, so that a rare one is not left to luck; the choices take turns."""
    for number, setting in enumerate(covering(settings_of(judge, check)[0], facts_of_layout)):
        kinds = {name: getattr(check, field) for name, field in CHOICES.items()}
        choices = {name: each[number % len(each)] for name, each in kinds.items()}
        yield make_case(judge, check, setting, **choices, seed=number)
    if not judge.subject.compiles and judge.chosen is None:
        yield from _crowded(judge, check)


def _crowded(judge: Judge, check: ShardedCheck) -> Iterator[ShardedCase]:
    """Most tokens of one expert: a layout of each strategy with the check's crowd, and one with its greatest."""
    pool = [setting for setting in settings_of(judge, check)[0] if setting.layout.expert == 2]
    of_4_slots = [setting for setting in pool if setting.spec.router.top_k == 4]
    greatest = islice(_of_each_strategy(judge, of_4_slots, check.greatest_crowd), 1)
    for settings in (_of_each_strategy(judge, pool, check.crowd), greatest):
        for number, setting in enumerate(settings, 1):
            bias = "crowded" if "crowded" in check.bias else check.bias[0]
            how = {"x": check.x[0], "bias": bias, "load": "one_expert", "counts": ""}
            yield make_case(judge, check, setting, **how, seed=number)


def _of_each_strategy(judge: Judge, settings: list[Setting], crowd: tuple[int, int] | None) -> Iterator[Setting]:
    """The first setting of each strategy that the subject has with such a crowd."""
    found: set[str] = set()
    if crowd is None:
        return
    for setting in settings:
        tokens = (crowd[0], *[crowd[1]] * (len(setting.tokens_per_shard) - 1))
        spec, layout = setting.spec, setting.layout
        if layout.strategy not in found and why_not(judge.subject, spec, layout, tokens) is None:
            found.add(layout.strategy)
            yield replace(setting, tokens_per_shard=tokens)
