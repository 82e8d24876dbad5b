"""conformance, identify: telling apart. Questions on which open guesses disagree, until one normal form is left.

Legend: T tokens, C columns, E choices, G guesses, X what a guess answers for a token.
"""

import numpy as np

from conformance.identify.asking import Asking
from conformance.identify.choice import Guess, answered
from conformance.identify.equal import normal
from moe_ref import RouterSpec

POOLS = 5
"""Pools of inputs without one that tells two guesses apart, after which no further ones are tried."""
ROUNDS = 24
ASKED = 12
"""Tokens of a question that tells apart."""
CLOSE = 1e-3
"""A part of itself by which weights have to differ where a question is to tell them apart."""
MOST_OPEN = 12
"""Guesses that are compared with each other in a pool."""


def normal_of(asking: Asking, guess: Guess) -> tuple[RouterSpec, tuple[str, ...]]:
    """The normal form of a guess, and why it is one."""
    return normal(guess.spec, asking.box.takes_bias and guess.bias_used)


def dividing(asking: Asking, guesses: list[Guess], *, biased: bool) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Tokens, with a bias, on which the guesses disagree, those first that divide them most evenly; or None.

    Args:
        biased: whether inputs with a bias are tried.
    """
    best, found = 0, None
    # Drawn whole: what is asked next does not hang on how many of them were looked at.
    for logits_TC, bias_E in list(asking.inputs(biased=biased)):
        answers_GTX = np.stack([answered(guess, logits_TC, bias_E, asking.box) for guess in guesses])
        # How many guesses answer otherwise than the first.
        other_GT = ~np.isclose(answers_GTX, answers_GTX[:1], rtol=CLOSE, atol=1e-12).all(axis=-1)
        value_T = np.minimum(other_GT.sum(axis=0), len(guesses) - other_GT.sum(axis=0))
        value_T = np.where(other_GT.any(axis=0), np.maximum(value_T, 1), 0)
        if value_T.sum() > best:
            best, rows = value_T.sum(), np.argsort(-value_T, kind="stable")[:ASKED]
            whole = any(guess.spec.reads_batch for guess in guesses)
            found = logits_TC if whole else logits_TC[rows[value_T[rows] > 0]], bias_E
        if best >= ASKED:
            break
    return found


def told_apart(asking: Asking, guesses: list[Guess]) -> list[Guess]:
    """The guesses that are left when no further question divides them, one of each normal form."""
    guesses = asking.holder.best(_one_of_each(asking, guesses), asking.questions, weights=True)
    barren = 0
    for _ in range(ROUNDS):
        if len(guesses) < 2 or barren >= POOLS:
            break
        divided = dividing(asking, guesses[:MOST_OPEN], biased=asking.box.takes_bias)
        question = None if divided is None else asking.ask(*divided)
        if question is None:
            barren += 1
            continue
        left = asking.holder.best(guesses, [question], weights=True)
        barren = barren + 1 if len(left) == len(guesses) else 0
        guesses = left
    return guesses


def _one_of_each(asking: Asking, guesses: list[Guess]) -> list[Guess]:
    found: dict[tuple, Guess] = {}
    for guess in guesses:
        found.setdefault((normal_of(asking, guess)[0], guess.bias_used or not asking.box.takes_bias), guess)
    return list(found.values())
