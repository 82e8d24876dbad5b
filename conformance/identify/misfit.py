"""conformance, identify: a router that fits nothing. The smallest input that shows it, and what explains its answers.

Legend: T tokens, C columns, E choices, K top_k.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from conformance.core.fault import Fault
from conformance.core.judge import Judge
from conformance.core.subject import Routing, Subject, Unsupported
from conformance.identify.box import Malformed, Question
from conformance.identify.choice import Guess, Holder, groupings
from conformance.identify.search import Identity
from conformance.router.case import RouterCase, held
from conformance.router.faulty import FaultyRouter

TRIES = 250
MOST_NEAR, MOST_GROUPINGS = 5, 150
ENOUGH, EXPLAINED = 12, 0.97
"""Tokens after which a fault that explains few is given up, and the share that one has to explain."""
COARSER = ("float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The smallest input on which a box is not the nearest spec."""

    case: RouterCase
    question: Question
    title: str


def smallest_difference(found: Identity) -> Difference:
    """One token that the nearest spec does not explain, with no bias where none is needed, in round numbers."""
    holder = Holder(found.box)
    by_bias = sorted(
        found.wrong, key=lambda pair: (pair[0].bias_E is not None, float(np.abs(pair[0].logits_TC[pair[1]]).max()))
    )
    question, t = by_bias[0]
    question = question.tokens(np.array([t]))
    case, tries, changed = found.guess.case(question, found.box.dtype), 0, True
    while changed and tries < TRIES:
        changed = False
        for smaller in _smaller(case):
            tries += 1
            asked = _asked(found, holder, smaller)
            if asked is not None:
                case, question, changed = smaller, asked, True
                break
            if tries >= TRIES:
                break
    other = holder.other_choice(found.guess, question)
    title = "other experts are chosen" if other else "the weights differ"
    return Difference(case=case, question=question, title=title)


def _smaller(case: RouterCase) -> Iterator[RouterCase]:
    """Simpler neighbours; those of a case, and single numbers made 0."""
    for each in case.simpler():
        yield each.with_(logits_TE=each.logits_TE + 0.0)  # -0 is 0
    for name in ("logits_TE", "expert_bias_E"):
        values = getattr(case, name)
        if values is None:
            continue
        for place in np.ndindex(values.shape):
            if values[place]:
                zeroed = values.copy()
                zeroed[place] = 0
                yield case.with_(**{name: zeroed})


def _asked(found: Identity, holder: Holder, case: RouterCase) -> Question | None:
    """The answer of the box, where the nearest spec does not explain it."""
    if case.expert_bias_E is not None and not case.expert_bias_E.any():
        case = case.with_(expert_bias_E=None)
    try:
        question = found.box.ask(case.logits_TE, case.expert_bias_E, plain=True)
        return question if holder.wrong(found.guess, question) else None
    except (Unsupported, Malformed, ValueError):
        return None


def known_faults(found: Identity, faults: dict[str, Fault]) -> tuple[Guess, list[Fault]]:
    """A spec and the known faults of routers that together explain every answer; the nearest spec where none do."""
    own = [fault for fault in faults.values() if fault.kind.name == "router" and fault.method == "route"]
    wrong = sorted({id(question): question for question, _ in found.wrong}.values(), key=lambda q: -len(q.logits_TC))
    rest = [question for question in found.questions if not any(question is each for each in wrong)]
    of_groups = [fault for fault in own if fault.stage == "groups"]
    tried = [
        *((guess, own) for guess in _unlike(found.near)[:MOST_NEAR]),
        *((guess, of_groups) for guess in _regrouped(found)),
    ]
    for guess, some in tried:
        fitting = [fault for fault in some if _explains(fault, guess, found, [*wrong, *rest])]
        if fitting:
            return guess, fitting
    return found.guess, []


def _unlike(near: list[Guess]) -> list[Guess]:
    """The nearest of the guesses that differ in a scale or an eps alone."""
    found: dict[tuple, Guess] = {}
    for guess in near:
        found.setdefault((guess.spec.replace(route_scale=1.0, norm_eps=0.0), guess.bias_used), guess)
    return list(found.values())


def _regrouped(found: Identity) -> Iterator[Guess]:
    """The nearest spec with every grouping, where a choice without a bias is not explained."""
    holder, spec = Holder(found.box), found.guess.spec
    free = [question for question in found.questions if question.bias_E is None]
    if spec.selector == "top_k" and any(holder.other_choice(found.guess, question) for question in free):
        for groups in islice(groupings(spec.num_experts, spec.top_k), MOST_GROUPINGS):
            if groups["group_score_k"] <= 2:
                with suppress(ValueError):
                    yield Guess(spec=spec.replace(**groups))


def _explains(fault: Fault, guess: Guess, found: Identity, questions: list[Question]) -> bool:
    """Whether a spec with a fault answers as the box does, but for near ties, which are few."""
    same = total = 0
    for question in questions:
        case = guess.case(question, found.box.dtype)
        try:
            routing = FaultyRouter(fault).route(case.logits_TE, case.spec, case.expert_bias_E, **case.inputs)
        except Exception:
            return False
        same, total = same + _same(routing, question), total + case.num_tokens
        if same < (0.8 if total >= ENOUGH else 0.25) * total:
            return False
    return same >= EXPLAINED * total


def _same(routing: Routing, question: Question) -> int:
    """Tokens with the same experts and weights, in whatever order."""
    ids_TK, weights_TK = np.asarray(routing.expert_ids_TK), np.asarray(routing.weights_TK)
    if ids_TK.shape != question.expert_ids_TK.shape:
        return 0
    order, other = np.argsort(ids_TK, axis=-1), np.argsort(question.expert_ids_TK, axis=-1)
    take = np.take_along_axis
    same_T = (take(ids_TK, order, -1) == take(question.expert_ids_TK, other, -1)).all(axis=-1)
    close_TK = np.isclose(take(weights_TK, order, -1), take(question.weights_TK, other, -1), rtol=1e-4, atol=1e-30)
    return int((same_T & close_TK.all(axis=-1)).sum())


def rounded_somewhere(found: Identity) -> str | None:
    """A sentence where roundings to a coarser dtype explain every answer that those of float32 do not, else None."""
    for dtype in COARSER:
        with suppress(ImportError):  # bfloat16 arrays are of ml_dtypes
            rounded = [replace(each, logits_TC=held(each.logits_TC, dtype)) for each in found.questions]
            if _all_explained(Holder(found.box), found.guess, rounded):
                return f"the logits are rounded to {dtype} before all else: that explains every answer"
        if _all_explained(Holder(found.box, Judge(_Coarse(dtype))), found.guess, found.questions):
            return f"something is rounded to {dtype}: such roundings explain every answer"
    return None


class _Coarse(Subject):
    """Stands for a router that computes in a coarser dtype."""

    def __init__(self, dtype: str):
        self.compute_dtype = dtype


def _all_explained(holder: Holder, guess: Guess, questions: list[Question]) -> bool:
    return not any(holder.wrong(guess, question) for question in questions)
