"""conformance, training: what is generated. Stacks from a pool, and scripts whose choices are beyond doubt.

Legend: L layers, T tokens, D model dim, E choices, K top_k.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from conformance.core.chosen import pool_of
from conformance.core.drawing import one_of
from conformance.core.judge import Judge
from conformance.core.kind import settings_of
from conformance.training.case import MARGIN, TrainingCase, margin_of, params_of
from conformance.training.check import TrainingCheck
from moe_ref import (
    UNUSED,
    BalanceSpec,
    BiasUpdateSpec,
    Event,
    ExpertSpec,
    LayerParams,
    LayerSpec,
    QuantileSpec,
    RouterSpec,
    RoutingRecord,
    StackSpec,
)
from moe_ref.training import after

LETTERS: dict[str, dict] = {
    "b": {"kind": "build"},
    "s": {"kind": "step"},
    "t": {"kind": "train"},
    "r": {"kind": "train", "recomputed": True},
    "p": {"kind": "train", "mask": True},
    "q": {"kind": "train", "mask": True, "recomputed": True},
    "f": {"kind": "train", "forced": "some"},
    "g": {"kind": "train", "forced": "some", "recomputed": True},
    "u": {"kind": "train", "forced": "unused"},
    "e": {"kind": "evaluate"},
    "v": {"kind": "evaluate", "forced": "some"},
}
"""A letter of a script: p has padding, r is recomputed, q both; f is forced, g recomputed besides, u leaves one layer
without a token; v is an evaluation of a forced choice."""

EXPERTS = ExpertSpec(dim=8, hidden_dim=8)


def _layer(num_experts: int, top_k: int, score_func: str = "sigmoid", **fields) -> LayerSpec:
    return LayerSpec(
        router=RouterSpec(num_experts=num_experts, top_k=top_k, score_func=score_func, **fields), experts=EXPERTS
    )


FIVE = _layer(5, 2)
SEVEN = _layer(7, 3, route_norm=True, norm_eps=1e-20)
ONE = _layer(5, 1, "softmax")
SIGN = BiasUpdateSpec(rate=0.25)
CENTRED = BiasUpdateSpec(rate=0.25, centred=True)
RELATIVE = BiasUpdateSpec(rule="relative", rate=0.5)
PROPORTIONAL = BiasUpdateSpec(rule="proportional", rate=0.0625)
SOFT = BiasUpdateSpec(rule="tanh", rate=0.25, steepness=2.0, momentum=0.5, centred=True)
QUANTILE, OF_BATCHES = QuantileSpec.of("kimi_k3"), QuantileSpec(over="batches", centred=False, keep=0.25)
POOLED = BalanceSpec.of("transformers", coeff=0.5)
SUMMED = BalanceSpec(coeff=0.5, score_func="sigmoid", norm_scores=True, score_eps=1e-20)

STACKS: tuple[StackSpec, ...] = (
    StackSpec(layers=(FIVE, FIVE), updates=(CENTRED, CENTRED)),
    StackSpec(layers=(FIVE, FIVE, FIVE), updates=(SIGN, SIGN, SIGN)),
    StackSpec(layers=(FIVE, SEVEN), updates=(SIGN, RELATIVE)),
    StackSpec(layers=(ONE, SEVEN, ONE), updates=(SIGN, CENTRED, PROPORTIONAL)),
    StackSpec(layers=(SEVEN,), updates=(RELATIVE,)),
    StackSpec(layers=(SEVEN, FIVE), updates=(CENTRED, CENTRED)),
    # a layer whose bias stays
    StackSpec(layers=(FIVE, FIVE), updates=(None, SIGN)),
    StackSpec(layers=(FIVE, ONE, SEVEN), updates=(RELATIVE, None, CENTRED)),
    StackSpec(layers=(SEVEN, FIVE), updates=(PROPORTIONAL, None)),
    # no layers
    StackSpec(layers=(), updates=()),
    StackSpec(layers=(), updates=(), num_ranks=2),
    # pipeline ranks; some have no layer, and layers of one rank need not follow each other
    StackSpec(layers=(FIVE, FIVE), updates=(CENTRED, CENTRED), num_ranks=2, rank_of_layer=(0, 1)),
    StackSpec(layers=(FIVE, FIVE), updates=(SIGN, SIGN), num_ranks=3, rank_of_layer=(0, 2)),
    StackSpec(layers=(FIVE, SEVEN, FIVE), updates=(SIGN, RELATIVE, None), num_ranks=2, rank_of_layer=(0, 1, 0)),
    StackSpec(layers=(FIVE, FIVE, FIVE), updates=(CENTRED,) * 3, num_ranks=3, rank_of_layer=(2, 2, 1)),
    # losses over layers
    StackSpec(layers=(FIVE, FIVE), updates=(SIGN, SIGN), balance=POOLED),
    StackSpec(layers=(ONE, ONE, ONE), updates=(SIGN, SIGN, SIGN), balance=POOLED),
    StackSpec(layers=(FIVE, SEVEN), updates=(CENTRED, None), balance=SUMMED),
    StackSpec(layers=(FIVE, FIVE, FIVE), updates=(CENTRED,) * 3, balance=SUMMED),
    # what a step knows besides counts
    StackSpec(layers=(FIVE, FIVE), updates=(QUANTILE, SIGN)),
    StackSpec(layers=(SEVEN, FIVE), updates=(OF_BATCHES, QUANTILE)),
    StackSpec(layers=(FIVE, SEVEN), updates=(SOFT, SOFT)),
)

THIN_STACKS = tuple(stack for stack in STACKS if ONE not in stack.layers)
"""For subjects that compile: each sort of layer takes seconds."""

DRAWN = ("scripts", "bias", "tokens")
"""Fields of a check with the choices for a case."""


def mask_of(num_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """(T,) some are padding, and some are not where there are several."""
    valid_T = rng.random(num_tokens) < 0.5
    valid_T[:1], valid_T[1:2] = False, True
    return valid_T[rng.permutation(num_tokens)]


def tokens_of(
    event: dict,
    stack: StackSpec,
    params: list[LayerParams],
    biases: list[np.ndarray],
    num_tokens: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """(L, T, D) tokens of each layer, drawn again where a choice is in doubt."""
    x_LTD = np.zeros((len(stack.layers), num_tokens, stack.dim))
    for layer, bias_E in enumerate(biases):
        for _ in range(100):
            x_LTD[layer] = rng.integers(-12, 13, x_LTD.shape[1:]) / 8.0
            if margin_of(Event(kind=event["kind"], x_LTD=x_LTD), layer, stack, params, bias_E) > MARGIN:
                break
    return x_LTD


def records_of(kind: str, stack: StackSpec, num_tokens: int, rng: np.random.Generator) -> tuple[RoutingRecord, ...]:
    """Any choice of each layer; a few slots are unused, or all those of one layer."""
    empty, found = int(rng.integers(max(1, len(stack.layers)))), []
    for layer, spec in enumerate(stack.layers):
        K, E = spec.router.top_k, spec.router.num_experts
        # Some experts are chosen by all tokens, so that the choice is not even.
        ranked_TE = rng.random((num_tokens, E)) + rng.random(E)
        ids_TK = np.argsort(-ranked_TE, axis=-1)[:, :K]
        unused_TK = rng.random(ids_TK.shape) < 0.1 if kind == "some" else np.full(ids_TK.shape, layer == empty)
        found.append(RoutingRecord.of_choice(np.where(unused_TK, UNUSED, ids_TK), None, spec.router))
    return tuple(found)


def make_case(stack: StackSpec, *, scripts: str, bias: str, tokens: int, seed: int) -> TrainingCase:
    """The case of these choices; a choice is named like the field of the check that it is of."""
    rng = np.random.default_rng(seed)
    gates = tuple(rng.integers(-8, 9, (spec.router.num_logits, stack.dim)) / 16.0 for spec in stack.layers)
    biases = tuple(
        rng.integers(-16, 17, spec.router.num_choices) / 64.0 if bias == "mixed" else None for spec in stack.layers
    )
    params = [params_of(*each) for each in zip(stack.layers, gates, biases, strict=True)]
    events, state = [], None
    for letter in scripts:
        how = LETTERS[letter]
        if how["kind"] in ("build", "step"):
            event = Event(kind=how["kind"])
        else:
            assert state is not None, f"a script begins with a build, not with {scripts!r}"
            event = Event(
                kind=how["kind"],
                x_LTD=tokens_of(how, stack, params, state.bias_by_layer, tokens, rng),
                token_mask_T=mask_of(tokens, rng) if "mask" in how else None,
                records=records_of(how["forced"], stack, tokens, rng) if "forced" in how else None,
                recomputed="recomputed" in how,
            )
        events.append(event)
        state = after(event, state, stack, params)
    return TrainingCase(spec=stack, gates=gates, biases=biases, events=tuple(events), seed=seed)


def settings(judge: Judge, check: TrainingCheck) -> tuple[list[StackSpec], Counter]:
    """The stacks that the check wants and the subject supports, and why the others are not run."""
    pool = pool_of(judge, StackSpec, list(THIN_STACKS if judge.subject.compiles else STACKS))
    wanted = [stack for stack in pool if check.spec(stack)]
    reasons = [judge.subject.supports_training(stack) for stack in wanted]
    supported = [stack for stack, why in zip(wanted, reasons, strict=True) if why is None]
    return supported, Counter(why for why in reasons if why)


def draw(judge: Judge, check: TrainingCheck, seed: int) -> TrainingCase:
    """The case of a seed."""
    rng, (stacks, _) = np.random.default_rng(seed), settings_of(judge, check)
    choices = {name: one_of(rng, getattr(check, name)) for name in DRAWN}
    return make_case(one_of(rng, stacks), **choices, seed=int(rng.integers(2**32)))


def fixed(judge: Judge, check: TrainingCheck) -> Iterator[TrainingCase]:
    """A case of each stack and each script, so that none is left to luck; the other choices take turns."""
    stacks = settings_of(judge, check)[0]
    for number in range(max(len(stacks), len(check.scripts))):
        choices = {name: getattr(check, name)[number % len(getattr(check, name))] for name in DRAWN}
        yield make_case(stacks[number % len(stacks)], **choices, seed=number)
