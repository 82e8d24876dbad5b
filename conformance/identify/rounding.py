"""conformance, identify: the dtype that a router holds its numbers in, from the roundings that its answers show.

Legend: T tokens, C columns, K top_k.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from conformance.core.rounding import EPSILON, TINY
from conformance.identify.box import Question
from conformance.identify.choice import Guess, other_ids_T
from conformance.identify.law import FITS, SMALLEST, Data
from conformance.router.bounds import expected_weights
from moe_ref import UNUSED
from moe_ref.rounding import NARROW, round_to

LEAST_VARIED = 0.2
"""The least part of the weights that are different numbers: a weight that is always the same shows nothing."""
ROUNDED = 6
"""Roundings of a weight: of logits, which change a score by as much of itself as they are large, score and weight."""
EXACT = 2.0**-44
"""Relative error of a weight that float64 explains, and float32 does not."""


def narrow_of(questions: Sequence[Question]) -> str:
    """The narrowest dtype that holds every weight; float32 where none does, or too few weights differ."""
    weights_N = np.concatenate([each.weights_TK[each.expert_ids_TK != UNUSED] for each in questions])
    weights_N = weights_N[weights_N > 0]
    for dtype in NARROW:
        some_N = weights_N[weights_N > TINY[dtype]]
        if len(np.unique(some_N)) > LEAST_VARIED * len(weights_N) and (round_to(some_N, dtype) == some_N).all():
            return dtype
    return "float32"


def rounds_logits(ask: Callable[[np.ndarray], Question | None], dtype: str, columns: int, top_k: int) -> bool:
    """Whether of two logits that are one number of the dtype the lower id is chosen, not the larger one."""
    logits_TC = np.tile(np.linspace(-4, -5, columns), (2, 1))
    logits_TC[:, : top_k + 1] = np.linspace(2.0, 1.0, top_k + 1)
    # The last of the best and the next: in one order and in the other.
    for t, (first, second) in enumerate(((0.0, 0.25), (0.25, 0.0))):
        logits_TC[t, top_k - 1], logits_TC[t, top_k] = 1 + np.array([first, second]) * EPSILON[dtype]
    question = ask(logits_TC)
    return question is not None and bool((question.expert_ids_TK == top_k - 1).any(axis=-1).all())


def as_held(data: Data, dtype: str) -> Data:
    """The data as a router of this dtype reads them, and what its rounding leaves unexplained."""
    if dtype not in NARROW:
        return data
    return Data(
        logits_TE=round_to(data.logits_TE, dtype),
        shared_TS=round_to(data.shared_TS, dtype),
        ids_TK=data.ids_TK,
        weights_TK=data.weights_TK,
        num_experts=data.num_experts,
        fits=max(FITS, ROUNDED * EPSILON[dtype] / 2),
        smallest=max(SMALLEST, TINY[dtype] / EPSILON[dtype]),
    )


def exact(best: Guess, questions: Sequence[Question], dtype: str) -> Guess:
    """The guess in float64, where the weights are nearer to its own than float32 has numbers."""
    wide = replace(best, spec=best.spec.replace(router_dtype="float64"))
    seen = 0
    for question in questions:
        case = wide.case(question, dtype)
        own_T = ~other_ids_T(question.expert_ids_TK, case.reference.expert_ids_TK)
        wanted_TK = expected_weights(case, question.expert_ids_TK)[own_T]
        held_TK = wanted_TK > SMALLEST
        if (np.abs(question.weights_TK[own_T] - wanted_TK)[held_TK] > EXACT * wanted_TK[held_TK]).any():
            return best
        seen += int((wanted_TK.astype(np.float32) != wanted_TK).sum())
    return wide if seen else best


def nearest_first(guesses: list[Guess], questions: Sequence[Question], dtype: str, router_dtype: str) -> list[Guess]:
    """In a narrow dtype, whose bounds are wide: those first that give the most weights to the bit.

    Args:
        dtype: of the logits. Where it is the narrow one, a router may round its weights at the end alone, as a model
            does that hands them on in the dtype of its tokens.
    """
    if router_dtype not in NARROW:
        return guesses
    if router_dtype == dtype:
        at_end = [replace(guess, spec=guess.spec.replace(router_dtype="float32")) for guess in guesses]
        guesses = [*at_end, *guesses]

    def to_the_bit(guess: Guess) -> int:
        found = 0
        for question in questions:
            wanted_TK = expected_weights(guess.case(question, dtype), question.expert_ids_TK)
            found += int((round_to(wanted_TK, router_dtype) == question.weights_TK).sum())
        return found

    return sorted(guesses, key=to_the_bit, reverse=True)
