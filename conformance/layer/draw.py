"""conformance, layer: what is generated. Specs from a bounded pool, parameters, tokens, further inputs.

Tokens whose choice of experts hangs on rounding are drawn again, since another choice changes the whole output.

Legend: T tokens, D model dim, E choices, K top_k.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from functools import cache, lru_cache
from typing import Any

import numpy as np

from conformance.core.case import float32
from conformance.core.chosen import pool_of, tokens_of
from conformance.core.drawing import covering, one_of
from conformance.core.judge import Judge
from conformance.core.kind import settings_of
from conformance.layer import routed
from conformance.layer.bounds import stable_T
from conformance.layer.case import LayerCase
from conformance.layer.check import LayerCheck
from conformance.layer.large import LARGE, PUBLISHED, THIN_LARGE
from conformance.router.draw import inputs_of as inputs_of_router
from moe_ref import (
    AlignSpec,
    CapacitySpec,
    ExpertSpec,
    LatentSpec,
    LayerParams,
    LayerSpec,
    RouterSpec,
    SharedSpec,
)
from moe_ref.specs.families import tiny

GRID = 2.0**-7
"""Parameters are multiples of it: short in a report, and the same in bfloat16 up to a size of 2."""
DRAWS = 6
"""How often a token near a tie is drawn again."""
CLEARLY = "float16"
"""A choice stands clear of rounding if it would even in this dtype."""

SOFTMAX: dict[str, Any] = {"score_func": "softmax"}
SIGMOID: dict[str, Any] = {"score_func": "sigmoid"}
NORM: dict[str, Any] = {"route_norm": True}
DEEPSEEK: dict[str, Any] = SIGMOID | NORM | {"norm_eps": 1e-20}
SELECTED: dict[str, Any] = {"score_over": "selected", "select_by": "logit"}
GROUPS: dict[str, Any] = {"num_expert_groups": 4, "num_limited_groups": 2}
KINDS: dict[str, Any] = {"num_null_experts": 5, "num_constant_experts": 2, "num_zero_experts": 1}
SITU: dict[str, Any] = {"activation": "situ", "beta": 0.5}
GPT_OSS: dict[str, Any] = {"alpha": 1.702, "up_offset": 1.0, "clamp": 0.75, "bias": True}

ROUTERS = (
    RouterSpec(num_experts=5, top_k=2, **SOFTMAX),
    RouterSpec(num_experts=7, top_k=3, **SOFTMAX, **NORM),
    RouterSpec(num_experts=8, top_k=3, **DEEPSEEK, **GROUPS, route_scale=2.5),
    RouterSpec(num_experts=6, top_k=3, **SELECTED),
    RouterSpec(num_experts=5, top_k=2, **SIGMOID, select_by="logit", weight_on="input"),
    RouterSpec(num_experts=5, top_k=1, **SIGMOID),
    RouterSpec(num_experts=5, top_k=1, **SOFTMAX, **NORM),
    RouterSpec(num_experts=5, top_k=1, **SIGMOID, output_scale=2.5),
    RouterSpec(num_experts=5, top_k=1, **SIGMOID, select_by="logit", weight_on="input"),
    RouterSpec(num_experts=5, top_k=5, **SOFTMAX),
    RouterSpec(num_experts=5, top_k=2, **SIGMOID, **NORM, output_scale=3.0),
    RouterSpec(num_experts=3, top_k=3, **SOFTMAX, num_null_experts=3),
    RouterSpec(num_experts=3, top_k=2, **SOFTMAX, num_null_experts=2, weight_on="input"),
    RouterSpec(num_experts=3, top_k=3, **SOFTMAX, num_null_experts=3, null_kind="skip", route_scale=2.0),
    RouterSpec(num_experts=6, top_k=2, **SOFTMAX, **NORM, learned_scale="per_expert"),
    RouterSpec(num_experts=5, top_k=2, **SIGMOID, **NORM, norm_form="clamp", norm_eps=0.25),
    RouterSpec(num_experts=5, top_k=2, **SIGMOID, learned_scale="global", route_scale=1.5),
    RouterSpec(num_experts=5, top_k=2, score_func="sqrtsoftplus", **NORM, route_scale=1.5),
    RouterSpec(num_experts=5, top_k=2, **DEEPSEEK, selector="table"),
    RouterSpec(num_experts=6, top_k=3, **SIGMOID, **NORM, selector="given"),
    RouterSpec(num_experts=5, top_k=2, **SIGMOID, **NORM, norm_eps=1e-20, selector="round_robin"),
    RouterSpec(num_experts=3, top_k=3, **SIGMOID, **NORM, norm_eps=0.1, **KINDS),
    RouterSpec(num_experts=3, top_k=2, **SOFTMAX, **KINDS, weight_on="input"),
    RouterSpec(num_experts=4, top_k=4, **SOFTMAX, selector="expert_choice", take_factor=0.75),
    RouterSpec(num_experts=3, top_k=3, **SIGMOID, **NORM, selector="expert_choice", take_rounding="floor"),
)
VARYING_ROUTERS = (
    RouterSpec(num_experts=5, top_k=5, score_func="relu", selector="threshold"),
    RouterSpec(num_experts=6, top_k=3, **SIGMOID, **NORM, selector="threshold", threshold=0.5),
    RouterSpec(num_experts=6, top_k=4, **SOFTMAX, selector="top_p", top_p=0.6),
)
"""Under which tokens have different numbers of experts."""
EXPERTS = (
    ExpertSpec(dim=5, hidden_dim=7),
    ExpertSpec(dim=5, hidden_dim=7, **GPT_OSS),
    ExpertSpec(dim=5, hidden_dim=7, bias=True),
    ExpertSpec(dim=5, hidden_dim=7, alpha=1.702),
    ExpertSpec(dim=5, hidden_dim=7, up_offset=1.0),
    ExpertSpec(dim=5, hidden_dim=7, clamp=0.75),
    ExpertSpec(dim=5, hidden_dim=7, clamp=0.25, clamp_at="after"),
    ExpertSpec(dim=5, hidden_dim=7, activation="gelu"),
    ExpertSpec(dim=5, hidden_dim=7, activation="gelu_tanh"),
    ExpertSpec(dim=5, hidden_dim=7, activation="relu"),
    ExpertSpec(dim=5, hidden_dim=7, gated=False, activation="relu2"),
    ExpertSpec(dim=5, hidden_dim=7, gated=False, activation="relu2", clamp=1.0, bias=True),
    ExpertSpec(dim=7, hidden_dim=7),
    ExpertSpec(dim=6, hidden_dim=3),
    ExpertSpec(dim=6, hidden_dim=3, bias=True),
    # Multiples of 8, which grouped matmuls of some libraries ask for.
    ExpertSpec(dim=8, hidden_dim=16),
    ExpertSpec(dim=8, hidden_dim=8),
    ExpertSpec(dim=16, hidden_dim=8),
    ExpertSpec(dim=5, hidden_dim=7, **SITU, linear_beta=0.75),
    ExpertSpec(dim=5, hidden_dim=7, **SITU),
    ExpertSpec(dim=5, hidden_dim=7, activation="situ", gated=False, bias=True),
)
CAPACITIES = (
    CapacitySpec(slots=1),
    CapacitySpec(slots=2, scope="sequence"),
    CapacitySpec(slots=0),
    CapacitySpec(factor=0.5),
    CapacitySpec(slots=1, drop_order="slot_major"),
    CapacitySpec(slots=1, scope="rank"),
    CapacitySpec(factor=1.0, rounding="floor", drop_order="slot_major", scope="sequence"),
)
"""Of a layer. Those that look at the weights to drop or renorm are judged in the stage capacity, with given weights."""
ALIGNS = (
    AlignSpec(multiple=8, idle_blocks=1),
    AlignSpec(multiple=16),
    AlignSpec(multiple=32, idle_blocks=1),
    AlignSpec(multiple=128),
    AlignSpec(multiple=1),
    AlignSpec(multiple=3),
)
SHARED = (
    SharedSpec(hidden_dim=3),
    SharedSpec(hidden_dim=7),
    SharedSpec(hidden_dim=3, gate="sigmoid"),
    SharedSpec(hidden_dim=3, combine="average"),
    SharedSpec(hidden_dim=3, clamp=0.5),
)


FORMULAS = (
    ExpertSpec(dim=5, hidden_dim=7, clamp=0.75),
    ExpertSpec(dim=5, hidden_dim=7, clamp=0.25, clamp_at="after"),
    ExpertSpec(dim=5, hidden_dim=7, alpha=1.702, up_offset=1.0),
    ExpertSpec(dim=5, hidden_dim=7, **GPT_OSS),
)
"""Of a layer whose shared expert has a clamp."""


LATENTS = (
    LayerSpec(router=ROUTERS[1], experts=EXPERTS[0], latent=LatentSpec(dim=3)),
    LayerSpec(router=ROUTERS[2], experts=EXPERTS[10], shared=SHARED[1], latent=LatentSpec(dim=4)),
    LayerSpec(router=ROUTERS[4], experts=EXPERTS[2], latent=LatentSpec(dim=7)),
    LayerSpec(router=ROUTERS[10], experts=EXPERTS[2], latent=LatentSpec(dim=4, norm_eps=0.1)),
    LayerSpec(router=ROUTERS[0], experts=EXPERTS[16], shared=SHARED[0], latent=LatentSpec(dim=4, norm_eps=1e-5)),
    LayerSpec(router=ROUTERS[15], experts=EXPERTS[18], shared=SHARED[0], latent=LatentSpec(dim=4, norm_eps=1e-2)),
    LayerSpec(router=ROUTERS[11], experts=EXPERTS[0], latent=LatentSpec(dim=3, norm_eps=0.1)),
)
"""Of Nemotron-3 and of Kimi-K3, and with what neither has."""


def _models() -> list[LayerSpec]:
    """Whole layers of public models, small."""
    dims: dict[str, Any] = {"dim": 8, "hidden_dim": 16}
    plain, gelu = ExpertSpec(**dims), ExpertSpec(**dims, activation="gelu_tanh")
    shared, inkling = SharedSpec(hidden_dim=8), tiny("inkling")
    return [
        LayerSpec(router=tiny("gpt_oss"), experts=ExpertSpec(**dims, **GPT_OSS), gate_bias=True),
        LayerSpec(router=tiny("deepseek_v3"), experts=plain, shared=shared),
        LayerSpec(router=tiny("llama4"), experts=plain, shared=SharedSpec(hidden_dim=16)),
        LayerSpec(router=tiny("qwen2_moe"), experts=plain, shared=SharedSpec(hidden_dim=24, gate="sigmoid")),
        LayerSpec(router=tiny("qwen3_moe"), experts=plain),
        LayerSpec(router=tiny("mixtral"), experts=plain),
        LayerSpec(router=tiny("cohere2_moe"), experts=plain, shared=SharedSpec(hidden_dim=16, combine="average")),
        LayerSpec(router=tiny("gemma4"), experts=gelu),
        LayerSpec(router=tiny("longcat_flash"), experts=plain),
        LayerSpec(router=tiny("step3p7"), experts=ExpertSpec(**dims, clamp=0.25, clamp_at="after"), shared=shared),
        LayerSpec(router=tiny("deepseek_v4_hash"), experts=ExpertSpec(**dims, clamp=0.75), shared=shared),
        LayerSpec(
            router=tiny("nemotron_h"), experts=ExpertSpec(**dims, gated=False, activation="relu2"), shared=shared
        ),
        LayerSpec(router=inkling, experts=plain, shared=shared),
    ]


def _mixed() -> list[LayerSpec]:
    """Every router with some experts, and often with a gate bias or shared experts: much is tried at once."""
    found = []
    for i, router in enumerate(ROUTERS):
        shared = SHARED[i % len(SHARED)] if i % 3 == 0 or router.num_scored_shared_experts else None
        experts = EXPERTS[(3 * i + 1) % len(EXPERTS)]
        found.append(LayerSpec(router=router, experts=experts, shared=shared, gate_bias=i % 2 == 1))
    return found


def _pool() -> list[LayerSpec]:
    """Each part alone, whole public models, and mixtures."""
    found = [LayerSpec(router=router, experts=EXPERTS[0]) for router in ROUTERS]
    found += [LayerSpec(router=ROUTERS[i % 4], experts=each) for i, each in enumerate(EXPERTS[1:])]
    found += [LayerSpec(router=ROUTERS[i % 4], experts=EXPERTS[0], shared=each) for i, each in enumerate(SHARED)]
    found += [LayerSpec(router=ROUTERS[i], experts=EXPERTS[2], shared=SHARED[0], gate_bias=True) for i in (2, 10)]
    # Wide enough for several slots of a fused form, whose weight has a factor to cancel.
    found += [
        LayerSpec(router=ROUTERS[i].replace(output_scale=2.5), experts=EXPERTS[0], shared=SharedSpec(hidden_dim=14))
        for i in (0, 1)
    ]
    # A shared expert has its own clamp, at the place of the routed ones', and their alpha and offset.
    found += [LayerSpec(router=ROUTERS[i % 2], experts=e, shared=SHARED[4]) for i, e in enumerate(FORMULAS)]
    varying = [LayerSpec(router=router, experts=EXPERTS[0]) for router in VARYING_ROUTERS]
    varying += [
        LayerSpec(router=router, experts=EXPERTS[2], shared=SHARED[0], gate_bias=True) for router in VARYING_ROUTERS
    ]
    return list(dict.fromkeys(found + _models() + list(LATENTS) + _mixed() + varying))


LAYER_SPECS: list[LayerSpec] = _pool()


def _thin() -> list[LayerSpec]:
    """A few specs, each with much in it, so that every requirement finds one."""
    gpt_oss, deepseek, _, qwen2, *_ = _models()
    return [
        gpt_oss,
        deepseek.replace(shared=SharedSpec(hidden_dim=2 * deepseek.experts.hidden_dim)),  # in two slots of a fused form
        qwen2.replace(router=ROUTERS[23], experts=qwen2.experts.replace(**SITU, linear_beta=0.75)),
        LayerSpec(router=ROUTERS[6], experts=ExpertSpec(dim=5, hidden_dim=7), latent=LatentSpec(dim=7)),
        LayerSpec(router=ROUTERS[4], experts=ExpertSpec(dim=5, hidden_dim=7, activation="gelu", bias=True)),
        LayerSpec(router=ROUTERS[10].replace(**KINDS),
                  experts=ExpertSpec(dim=5, hidden_dim=7, clamp=0.25, clamp_at="after"),
                  shared=SharedSpec(hidden_dim=3, combine="average")),
        LayerSpec(router=ROUTERS[11], experts=ExpertSpec(dim=6, hidden_dim=3), gate_bias=True),
        LayerSpec(router=ROUTERS[14].replace(selector="given"),
                  experts=ExpertSpec(dim=5, hidden_dim=7, gated=False, activation="relu2"),
                  shared=SHARED[0], latent=LatentSpec(dim=4, norm_eps=0.1)),
    ]  # fmt: skip


THIN_LAYER_SPECS: list[LayerSpec] = _thin()
"""For subjects that compile: a layer and its gradients take seconds for each spec and number of tokens."""


@cache
def facts(spec: LayerSpec) -> frozenset:
    """What is not the default in a layer, sizes apart; and what some requirement asks for."""
    router, experts, shared = spec.router, spec.experts, spec.shared
    sizes = {"num_experts", "top_k", "num_limited_groups", "dim", "hidden_dim", "num_zero_experts"}
    numbers = {"route_scale", "output_scale", "norm_eps", "clamp", "alpha", "beta", "up_offset", "logit_scale"}
    numbers |= {"linear_beta", "threshold", "top_p"}
    found: set = {"gate_bias"} if spec.gate_bias else {"plain"}
    if spec.latent is not None:
        found |= {("latent", spec.latent.norm_eps is not None, what) for what in (shared is None, router.weight_on)}
    for part in (router, experts, shared):
        for f in fields(part) if part is not None else ():
            value = getattr(part, f.name)
            if f.name not in sizes and value != f.default:
                found.add((type(part).__name__, f.name, True if f.name in numbers else value))
    slots = "one slot" if router.top_k == 1 else "all slots" if router.top_k == router.num_choices else "some slots"
    square = experts.hidden_dim in (spec.routed_experts.dim, spec.routed_experts.dim / 2)
    scaled = router.route_scale != 1 or router.output_scale != 1
    return frozenset(found) | {
        (slots, router.weight_on, "normed" if router.route_norm else ""),
        ("square", square, experts.bias),
        (shared and (shared.gate, shared.combine), scaled),
        (shared and shared.clamp is not None, experts.clamp_at, experts.alpha != 1, experts.up_offset != 0),
        ("routed alone", shared is None, router.weight_on, bool(router.num_null_experts), router.top_k == 1),
    }


def evenly(specs: list[LayerSpec]) -> list[LayerSpec]:
    """The specs, repeated so that each fact comes about as often as any other, however few specs it holds for."""
    known = [(spec, facts(spec)) for spec in specs]
    found = sorted({fact for _, own in known for fact in own}, key=str)
    groups = [[spec for spec, own in known if fact in own] for fact in found]
    return [group[i % len(group)] for i in range(max(map(len, groups), default=0)) for group in groups]


def on_grid(values) -> np.ndarray:
    """The nearest multiples of GRID."""
    return np.round(np.asarray(values) / GRID) * GRID


def params_of_kind(spec: LayerSpec, bias: str, rng: np.random.Generator) -> LayerParams:
    """Parameters of order 1; `bias` is the kind of expert_bias.

    Biases of the projections are as large as their products, so that one of the wrong expert shows.
    """
    made = LayerParams.init(spec, int(rng.integers(2**31))).by_name().items()
    values: dict[str, Any] = {name: on_grid(5 * v if name.startswith("b_") else v) for name, v in made}
    values["gate_ED"] = on_grid(1.5 * values["gate_ED"])
    if "learned_scale" in values:
        values["learned_scale"] = np.maximum(values["learned_scale"], 0.5)
    if spec.router.takes_bias:
        E = spec.router.num_choices
        crowd = np.where(np.arange(E) % max(1, E // spec.router.top_k) == 0, 8.0, 0.0)  # and the rest idle
        noise = rng.normal(0, 0.5, E)
        values["expert_bias_E"] = {"none": None, "mixed": on_grid(noise), "crowded": on_grid(crowd + noise)}[bias]
    return LayerParams(**values)


def inputs_of(spec: RouterSpec, num_tokens: int, wanted: tuple[str, ...], rng: np.random.Generator) -> dict:
    """The further inputs that the spec needs, and those that the check wants; a learned scale is a parameter here."""
    inputs = inputs_of_router(spec.replace(learned_scale="none"), num_tokens, (), rng)
    if "token_mask_T" in wanted:
        inputs["token_mask_T"] = rng.random(num_tokens) < rng.choice([0.6, 0.6, 0.0])  # sometimes all is padding
    if "given_weights_TK" in wanted:
        # Weights that no router would give: they sum to anything, and an unused slot may have one.
        inputs["given_weights_TK"] = rng.integers(-32, 64, (num_tokens, spec.top_k)) / 32
    return inputs


def limits_of(number: int, num_tokens: int, rng: np.random.Generator) -> dict:
    """A capacity, the lengths that its scope needs, and sometimes padding."""
    capacity = CAPACITIES[number % len(CAPACITIES)]
    inputs: dict[str, Any] = {"capacity": capacity}
    cuts = np.sort(rng.integers(0, num_tokens + 1, 2))  # a part may have no token
    lengths = tuple(np.diff(cuts, prepend=0, append=num_tokens).tolist())
    if capacity.scope == "sequence":
        inputs["sequence_lengths"] = lengths
    if capacity.scope == "rank":
        inputs["tokens_per_shard"] = lengths
    if number % 5 == 4:
        inputs["token_mask_T"] = rng.random(num_tokens) < 0.6
    return inputs


def make_case(
    spec: LayerSpec, check: LayerCheck, *, x: str, bias: str, tokens: int, seed: int, limits: int = 2**32
) -> LayerCase:
    """The case of these choices; `limits`: so many capacities may occur."""
    return _kept(spec, check.inputs, x=x, bias=bias, tokens=tokens, seed=seed, limits=limits)


def _case(
    spec: LayerSpec, wanted: tuple[str, ...], *, x: str, bias: str, tokens: int, seed: int, limits: int = 2**32
) -> LayerCase:
    rng = np.random.default_rng(seed)
    size = {"normal": 1.0, "large": 8.0, "small": 0.02}[x]

    def draw(n: int) -> np.ndarray:
        return float32(size * rng.normal(size=(n, spec.experts.dim)))

    case = LayerCase(
        spec=spec,
        params=params_of_kind(spec, bias, rng),
        x_TD=draw(tokens),
        d_output_TD=float32(rng.normal(size=(tokens, spec.experts.dim))),
        inputs=inputs_of(spec.router, tokens, wanted, rng),
        seed=seed,
    )
    if "capacity" in wanted:
        case = case.with_inputs(**limits_of(seed % limits, tokens, rng))
    if "align" in wanted:
        # One for a subject that compiles: every further one is a program, forward and backward.
        case = case.with_inputs(align=ALIGNS[seed % min(max(1, limits // 2), len(ALIGNS))])
    # Among hundreds of experts hardly a choice is clear in float16.
    for dtype in [CLEARLY] * DRAWS + ["float32"] * DRAWS:
        clear_T = stable_T(case, dtype)
        if clear_T.all():
            break
        case = case.with_(x_TD=np.where(clear_T[:, None], case.x_TD, draw(tokens)))
    return case


# Most requirements are tried on the same fixed cases: what the reference and the bounds say of one is found once.
_kept = lru_cache(maxsize=2048)(_case)


def pool(judge: Judge, check: LayerCheck) -> list[LayerSpec]:
    """The specs that a subject is tried on."""
    if check.routed:
        return routed.THIN_ROUTED_SPECS if judge.subject.compiles else routed.ROUTED_SPECS
    return [*THIN_LAYER_SPECS, *further(judge)] if judge.subject.compiles else LAYER_SPECS


def further(judge: Judge) -> list[LayerSpec]:
    """For each thin spec that the subject does not compute another one that it does, with what the others have not."""
    if "further layers" not in judge.memory:
        able = {
            name: [spec for spec in specs if judge.subject.supports_layer(spec) is None]
            for name, specs in (("thin", THIN_LAYER_SPECS), ("all", LAYER_SPECS))
        }
        known = frozenset().union(*map(facts, able["thin"]))
        found = covering(able["all"], lambda spec: facts(spec) - known)
        judge.memory["further layers"] = found[: len(THIN_LAYER_SPECS) - len(able["thin"])]
    return judge.memory["further layers"]


def settings(judge: Judge, check: LayerCheck) -> tuple[list[LayerSpec], Counter]:
    """The specs that the check wants and the subject supports, each fact about as often as any other."""
    wanted = [spec for spec in pool_of(judge, LayerSpec, pool(judge, check)) if check.spec(spec)]
    reasons = [judge.subject.supports_layer(spec) for spec in wanted]
    supported = [spec for spec, why in zip(wanted, reasons, strict=True) if why is None]
    if check.few and judge.subject.compiles:
        supported = supported[:1]
    return evenly(supported), Counter(why for why in reasons if why)


def draw(judge: Judge, check: LayerCheck, seed: int) -> LayerCase:
    """The case of a seed."""
    rng, (specs, _) = np.random.default_rng(seed), settings_of(judge, check)
    sizes = tokens_of(judge, check.tokens[:1] if judge.subject.compiles else check.tokens)
    spec, x, bias = one_of(rng, specs), one_of(rng, check.x), one_of(rng, check.bias)
    if check.routed and routed.prescribes(spec):
        return routed.make_case(spec, int(rng.integers(2**32)))
    size, own_seed = one_of(rng, sizes), int(rng.integers(2**32))
    return make_case(spec, check, x=x, bias=bias, tokens=size, seed=own_seed, limits=_limits(judge))


def fixed(judge: Judge, check: LayerCheck) -> Iterator[LayerCase]:
    """A case for each fact that holds for some spec, so that a rare one is not left to luck."""
    supported = set(settings_of(judge, check)[0])
    specs = [spec for spec in pool_of(judge, LayerSpec, pool(judge, check)) if spec in supported]
    if check.routed:
        yield from (routed.make_case(spec, number) for number, spec in enumerate(specs) if routed.prescribes(spec))
        return
    for number, spec in enumerate(sorted(covering(specs, facts), key=specs.index)):
        x, biases = check.x[number % len(check.x)], check.bias[number % len(check.bias) :][:1]
        if judge.subject.compiles and spec in further(judge):
            biases = check.bias  # it may have this one without any alone
        for bias in biases:
            yield make_case(
                spec, check, x=x, bias=bias, tokens=tokens_of(judge, check.tokens)[0], seed=number,
                limits=_limits(judge),
            )  # fmt: skip
    if check.large and judge.chosen is None and not (judge.subject.compiles and check.large > 1):
        yield from _large(judge, check)
    if check.published and judge.chosen is None and not judge.subject.compiles:
        yield from _published(judge, check)


def _limits(judge: Judge) -> int:
    """A capacity is static: each one more is a program of its own for a subject that compiles."""
    return 2 if judge.subject.compiles else 2**32


def _large(judge: Judge, check: LayerCheck) -> Iterator[LayerCase]:
    """Layers that are large in some way; of a kind of tokens and of bias that leaves few of them near a tie."""
    layers = THIN_LARGE if judge.subject.compiles else LARGE[int(check.requirement[-1]) % check.large :: check.large]
    for number, (spec, tokens) in enumerate(layers):
        if check.spec(spec) and judge.subject.supports_layer(spec) is None:
            bias = check.bias[number % len(check.bias)]
            yield _case(spec, check.inputs, x=check.x[0], bias=bias, tokens=tokens, seed=number)


def _published(judge: Judge, check: LayerCheck) -> Iterator[LayerCase]:
    """Those that a subject has, with a bias that leaves some experts without tokens."""
    for number, (spec, tokens) in enumerate(PUBLISHED):
        if judge.subject.supports_layer(spec) is None:
            yield _case(spec, check.inputs, x=check.x[0], bias="crowded", tokens=tokens, seed=number)
