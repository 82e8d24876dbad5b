"""conformance, identify: what was found, and which other specs the answers leave open.

Legend: T tokens.
"""

from dataclasses import dataclass, field

import numpy as np

from conformance.identify.asking import CLOSE, Asking, answer
from conformance.identify.box import Box, Question
from conformance.identify.choice import Guess
from conformance.identify.equal import alternatives, normal
from moe_ref import RouterSpec


@dataclass(frozen=True, kw_only=True)
class Open:
    """A spec that the answers do not tell apart from the one that was found, and why."""

    spec: RouterSpec
    why: str
    proven: bool


@dataclass(kw_only=True)
class Identity:
    """What a box is."""

    box: Box
    guess: Guess
    """The spec that explains all answers, or is the nearest."""
    near: list[Guess]
    """This one, and where it does not fit those that are near, the nearest first."""
    wrong: list[tuple[Question, int]]
    """(question, token) that it does not explain; empty: it is this spec."""
    questions: list[Question]
    open: list[Open] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not self.wrong

    @property
    def spec(self) -> RouterSpec:
        return self.guess.spec


def neighbours(asking: Asking, best: Guess, guesses: list[Guess]) -> list[Open]:
    """Each neighbour: proven to be the same router, told apart by an answer, or left open with the reason."""
    takes = asking.box.takes_bias and best.bias_used
    own, found = asking.normal(best)[0], []
    others = dict.fromkeys([*(g.spec for g in guesses), *alternatives(best.spec)])
    for other in others:
        if other == best.spec:
            continue
        form, reasons = normal(other, takes)
        if form == own:
            _, mine = normal(best.spec, takes)
            why = "; ".join(reason for reason in reasons if reason not in mine) or "; ".join(reasons)
            found.append(Open(spec=other, why=why, proven=True))
        elif not _rejected(asking, Guess(spec=other, bias_used=best.bias_used), best):
            found.append(Open(spec=other, why=_why_open(asking, best, other), proven=False))
    return found


def _rejected(asking: Asking, other: Guess, best: Guess) -> bool:
    """Whether an answer tells a neighbour apart; one is asked for where none does yet."""
    if _some_wrong(asking, other, asking.questions):
        return True
    for _ in range(2):
        divided = asking.dividing([best, other])
        if divided is not None and (question := asking.ask(*divided)) is not None:
            if _some_wrong(asking, best, [question]):
                return False
            if _some_wrong(asking, other, [question]):
                return True
    return False


def _some_wrong(asking: Asking, guess: Guess, questions: list[Question]) -> bool:
    try:
        return any(asking.holder.other_choice(guess, q) or asking.holder.other_weights(guess, q) for q in questions)
    except ValueError:  # a spec that cannot be asked this
        return True


def _why_open(asking: Asking, best: Guess, other: RouterSpec) -> str:
    guesses = [best, Guess(spec=other, bias_used=best.bias_used)]
    if not asking.box.takes_bias and asking.dividing(guesses, forbidden=True) is not None:
        return f"only a bias would tell, and it takes none ({asking.box.why_no_bias})"
    furthest = 0.0
    for logits_TC, bias_E in asking.inputs():
        mine, others = (answer(guess, logits_TC, bias_E, asking.box) for guess in guesses)
        with np.errstate(invalid="ignore", divide="ignore"):
            furthest = max(furthest, float(np.nanmax(np.abs(mine - others) / np.maximum(np.abs(mine), 1e-30))))
    if furthest < CLOSE:
        return f"on the inputs tried the weights differ by at most {furthest:.1g} of themselves: that may be rounding"
    return "no proof that they are the same, and no input was found on which they differ"
