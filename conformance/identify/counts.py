"""conformance, identify: how many. Selectors by which tokens, or batches, have other numbers of used slots.

A law of the weights is known; its choice scores bound the number that decides from both sides, and questions between
the bounds bring these together. What expert_choice takes of a batch is counted for batches of many sizes.

Legend: T tokens, C columns, E choices, K top_k.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from conformance.core.rounding import EPSILON
from conformance.identify.box import Question
from conformance.identify.choice import Guess, choice_scores
from conformance.identify.law import rankings
from conformance.router.bounds import taken
from conformance.router.case import held
from moe_ref import UNUSED, RouterSpec
from moe_ref.specs.router_rules import TAKE_ROUNDINGS

ASKED, ROUNDS = 34, 5
"""Tokens of a question between the bounds, and how many such questions are asked."""
BATCHES = (*range(1, 25), 29, 37, 50, 61)
"""Sizes of the batches of which it is counted what an expert takes; and a large one."""
LARGE, MOST_FACTORS = 4096, 64
"""Tokens of the large one, and factors of one number of digits that are tried."""
DIGITS = range(1, 10)

Ask = Callable[[np.ndarray], Question | None]


@dataclass(frozen=True, kw_only=True)
class Between:
    """A number of which the answers say that it is at least `low` and less than `high`."""

    low: float
    high: float

    @property
    def slack(self) -> float:
        """What rounding does to a choice score there."""
        return 8 * EPSILON["float32"] * max(abs(self.low), abs(self.high))

    @property
    def is_possible(self) -> bool:
        """Whether there is such a number."""
        return bool(np.isfinite([self.low, self.high]).all() and self.low <= self.high + self.slack)

    @property
    def written(self) -> float:
        """The shortest decimal number of them; within rounding, what is between."""
        middle = (self.low + self.high) / 2
        tried = [0.0, *(float(f"{middle:.{n}g}") for n in DIGITS)]
        return next((x for x in tried if self.low - self.slack <= x <= self.high + self.slack), middle)


def has_unused(questions: Sequence[Question]) -> bool:
    """Whether some slot was left unused."""
    return any((question.expert_ids_TK == UNUSED).any() for question in questions)


# threshold and top_p


@dataclass(frozen=True, kw_only=True)
class Number:
    """A field of RouterSpec that the numbers of used slots bound."""

    field: str
    bounds: Callable[[RouterSpec, Sequence[Question]], Between]
    """By the answers to some questions."""
    probe: Callable[[RouterSpec, Between, Sequence[Question]], np.ndarray]
    """Logits whose answers bring the bounds together."""


def threshold_between(spec: RouterSpec, questions: Sequence[Question]) -> Between:
    """The best score that was not chosen though a slot was free, and the least that was chosen."""
    low, high = -np.inf, np.inf
    for question in questions:
        values_TE, taken_TE = choice_scores(spec, question.logits_TC), taken(question.expert_ids_TK, spec.num_choices)
        free_T1 = (question.expert_ids_TK == UNUSED).any(axis=-1, keepdims=True)
        low = max(low, values_TE[~taken_TE & free_T1].max(initial=-np.inf))
        high = min(high, values_TE[taken_TE].min(initial=np.inf))
    return Between(low=float(low), high=float(high))


def share_between(spec: RouterSpec, questions: Sequence[Question]) -> Between:
    """The largest sum after which a further expert was chosen, and the least after which none was."""
    low, high = 0.0, 1.0
    for question in questions:
        values_TE, taken_TE = choice_scores(spec, question.logits_TC), taken(question.expert_ids_TK, spec.num_choices)
        used_T = taken_TE.sum(axis=-1)
        sum_T = np.where(taken_TE, values_TE, 0).sum(axis=-1)
        before_T = sum_T - np.where(taken_TE, values_TE, np.inf).min(axis=-1)
        free_T = used_T < min(question.expert_ids_TK.shape[1], spec.num_choices)
        if not used_T.all():
            return Between(low=1.0, high=0.0)  # with top_p each token has an expert
        low, high = max(low, before_T.max()), min(high, sum_T[free_T].min(initial=np.inf))
    return Between(low=float(low), high=float(high))


def _solved(value: Callable[[np.ndarray], np.ndarray], targets: np.ndarray) -> np.ndarray:
    """Arguments at which a function that grows has these values, as near as float32 holds them."""
    low, high = np.full(targets.shape, -80.0), np.full(targets.shape, 80.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = value(middle) < targets
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return held(high, "float32")


def _targets(between: Between) -> np.ndarray:
    low, high = between.low, between.high
    spread = np.geomspace if low > 0 and high > 100 * low else np.linspace
    return spread(low, high, ASKED)[1:-1]


def _narrowed(spec: RouterSpec, number: Number, questions: Sequence[Question], ask: Ask) -> Between:
    """Bounds that questions between them brought together."""
    asked = list(questions)
    for _ in range(ROUNDS):
        between = number.bounds(spec, asked)
        if not between.is_possible or between.high - between.low <= between.slack:
            break
        logits_TC = number.probe(spec, between, asked)
        question = ask(logits_TC) if len(logits_TC) else None
        if question is None:
            break
        asked.append(question)
    return number.bounds(spec, asked)


def _probe_threshold(spec: RouterSpec, between: Between, asked: Sequence[Question]) -> np.ndarray:
    """(T, C) the token of the least choice that was made, the logit of which moves."""
    base_C, e = _least_chosen(spec, asked)
    x_T = _solved(lambda x_T: choice_scores(spec, _moved(base_C, e, x_T))[:, e], _targets(between))
    logits_TC = _moved(base_C, e, x_T)
    values_TE = choice_scores(spec, logits_TC)
    # A score that has no slot is not chosen whatever it is.
    return logits_TC[(values_TE > values_TE[:, [e]]).sum(axis=-1) < spec.top_k]


def _probe_share(spec: RouterSpec, between: Between, asked: Sequence[Question]) -> np.ndarray:
    """(T, C) tokens whose best score alone is the sum; none where there is one slot."""
    others_C = -0.01 * np.arange(spec.num_logits)
    if spec.top_k < 2:
        return others_C[None][:0]
    targets = _targets(between)
    x_T = _solved(lambda x_T: choice_scores(spec, _moved(others_C, 0, x_T))[:, 0], targets[targets > 0])
    return _moved(others_C, 0, x_T[x_T > others_C[1]])  # below, another one is the best


def _moved(base_C: np.ndarray, column: int, x_T: np.ndarray) -> np.ndarray:
    """(T, C) a token again and again, with another logit in one column."""
    logits_TC = np.tile(base_C, (len(x_T), 1))
    logits_TC[:, column] = x_T
    return logits_TC


def _least_chosen(spec: RouterSpec, questions: Sequence[Question]) -> tuple[np.ndarray, int]:
    """The logits of a token, and its expert whose choice score is the least of all that were chosen."""
    found = []
    for question in questions:
        taken_TE = taken(question.expert_ids_TK, spec.num_choices)
        if taken_TE.any():
            values_TE = np.where(taken_TE, choice_scores(spec, question.logits_TC), np.inf)
            t, e = np.unravel_index(int(values_TE.argmin()), values_TE.shape)
            found.append((values_TE[t, e], question.logits_TC[t], int(e)))
    _, logits_C, e = min(found, key=lambda each: each[0])
    return logits_C, e


THRESHOLD = Number(field="threshold", bounds=threshold_between, probe=_probe_threshold)
SHARE = Number(field="top_p", bounds=share_between, probe=_probe_share)


def varying(
    shapes: Sequence[dict[str, Any]], sizes: dict[str, Any], questions: list[Question], ask: Ask
) -> Iterator[tuple[RouterSpec, str]]:
    """(spec, a sentence about its number) of each selector and law that the numbers of used slots allow."""
    for spec, number in _numbered(shapes, sizes):
        if not number.bounds(spec, questions).is_possible:
            continue
        between = _narrowed(spec, number, questions, ask)
        if between.is_possible and (number is THRESHOLD or 0 < between.written < 1):
            yield spec.replace(**{number.field: between.written}), _sentence(number.field, between)


def _sentence(field: str, between: Between) -> str:
    return (
        f"{field} is known to lie between {between.low:.8g} and {between.high:.8g}: {between.written:.8g} is the "
        "shortest number there"
    )


def _numbered(shapes: Sequence[dict[str, Any]], sizes: dict[str, Any]) -> Iterator[tuple[RouterSpec, Number]]:
    """The specs of each law, and the number that is to be found of it."""
    for shape in shapes:
        for by in rankings(shape):
            yield RouterSpec(**sizes, **shape, selector="threshold", select_by=by), THRESHOLD
        if shape.get("score_func") == "softmax" and shape.get("score_over", "all") == "all":
            yield RouterSpec(**sizes, **shape, selector="top_p", top_p=0.5), SHARE


# expert_choice and sinkhorn


def of_batch(
    shapes: Sequence[dict[str, Any]], sizes: dict[str, Any], ask: Ask, logits: Callable[[int], np.ndarray]
) -> list[Guess]:
    """The guesses of selectors that read the batch, of every law."""
    own: list[dict[str, Any]] = [{"selector": "sinkhorn", "select_by": "logit"}]
    if sizes["top_k"] == sizes["num_experts"]:
        counted = taken_of(ask, sizes["num_experts"], logits)
        taken = takings(counted, sizes) if counted else []
        own = [fields | {"select_by": by} for fields in taken for by in ("score", "logit")]
    found = []
    for fields in own:
        for shape in shapes:
            with suppress(ValueError):
                found.append(Guess(spec=RouterSpec(**sizes, **shape, **fields)))
    return found


def taken_of(ask: Ask, num_experts: int, logits: Callable[[int], np.ndarray]) -> dict[int, int] | None:
    """T -> the tokens of T that each expert took; None where the experts of a batch do not take equally many."""
    found = {}
    for T in (*BATCHES, LARGE):
        question = ask(logits(T))
        if question is None or len(question.logits_TC) != T:
            return None
        counts_E = taken(question.expert_ids_TK, num_experts).sum(axis=0)
        if (counts_E != counts_E[0]).any():
            return None
        found[T] = int(counts_E[0])
    return found


def takings(counted: dict[int, int], sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """Fields of expert_choice that take as many of each batch, the shortest factor; [] where none do."""
    T, E = max(counted), sizes["num_experts"]
    low, high = ((counted[T] + step) * E / T for step in (-1, 1))
    leasts = sorted({0, *(taken for taken in counted.values() if taken <= counted[T])})
    for digits in range(7):
        first, last = int(np.ceil(low * 10**digits)), int(np.floor(high * 10**digits))
        last = min(last, first + MOST_FACTORS)
        found = [
            fields
            for step in range(max(first, 1), last + 1)
            for rounding in TAKE_ROUNDINGS
            for fields in _least(counted, sizes, step / 10**digits, rounding, leasts)
        ]
        if found:
            return found
    return []


def _least(counted, sizes, factor: float, rounding: str, leasts: list[int]) -> Iterator[dict[str, Any]]:
    """With the smallest take_least that explains the counts, if one does."""
    for least in leasts:
        fields = {"selector": "expert_choice", "take_factor": factor, "take_rounding": rounding, "take_least": least}
        spec = RouterSpec(num_experts=sizes["num_experts"], top_k=sizes["num_experts"], **fields)
        if all(spec.takes(T) == taken for T, taken in counted.items()):
            yield fields
            return
