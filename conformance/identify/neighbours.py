"""conformance, identify: the neighbours of what was found, each proven to be the same, told apart, or left open.

Legend: T tokens, X what a guess answers for a token.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from conformance.identify.apart import CLOSE, dividing, normal_of
from conformance.identify.asking import Asking
from conformance.identify.box import Question
from conformance.identify.choice import Guess, answered
from conformance.identify.equal import alternatives
from moe_ref import RouterSpec


@dataclass(frozen=True, kw_only=True)
class Open:
    """A spec that the answers do not tell apart from the one that was found, and why."""

    spec: RouterSpec
    why: str
    proven: bool


def open_neighbours(asking: Asking, best: Guess, guesses: Iterable[Guess]) -> list[Open]:
    """The guesses that were left, and each neighbour, that are the same router or that no answer tells apart."""
    (own, mine), found = normal_of(asking, best), []
    for spec in dict.fromkeys([*(guess.spec for guess in guesses), *alternatives(best.spec)]):
        if spec == best.spec:
            continue
        other = replace(best, spec=spec)
        form, reasons = normal_of(asking, other)
        if form == own:
            why = "; ".join(reason for reason in reasons if reason not in mine) or "; ".join(reasons)
            found.append(Open(spec=spec, why=why, proven=True))
        elif not _rejected(asking, other, best):
            found.append(Open(spec=spec, why=_why_open(asking, best, other), proven=False))
    return found


def _rejected(asking: Asking, other: Guess, best: Guess) -> bool:
    """Whether an answer tells a neighbour apart; one is asked for where none does yet."""
    if _some_wrong(asking, other, asking.questions):
        return True
    for _ in range(2):
        divided = dividing(asking, [best, other], biased=asking.box.takes_bias)
        if divided is not None and (question := asking.ask(*divided)) is not None:
            if _some_wrong(asking, best, [question]):
                return False
            if _some_wrong(asking, other, [question]):
                return True
    return False


def _some_wrong(asking: Asking, guess: Guess, questions: list[Question]) -> bool:
    holder = asking.holder
    try:
        return any(holder.other_choice(guess, q) or holder.other_weights(guess, q) for q in questions)
    except ValueError:  # a spec that cannot be asked this
        return True


def _why_open(asking: Asking, best: Guess, other: Guess) -> str:
    box = asking.box
    # A bias is tried though the box takes none.
    if not box.takes_bias and dividing(asking, [best, other], biased=True) is not None:
        return f"only a bias would tell, and it takes none ({box.why_no_bias})"
    furthest = 0.0
    for logits_TC, bias_E in asking.inputs(biased=box.takes_bias):
        mine_TX, others_TX = (answered(guess, logits_TC, bias_E, box) for guess in (best, other))
        with np.errstate(invalid="ignore", divide="ignore"):
            off_TX = np.abs(mine_TX - others_TX) / np.maximum(np.abs(mine_TX), 1e-30)
            furthest = max(furthest, float(np.nanmax(off_TX)))
    if furthest < CLOSE:
        return f"on the inputs tried the weights differ by at most {furthest:.1g} of themselves: that may be rounding"
    return "no proof that they are the same, and no input was found on which they differ"
