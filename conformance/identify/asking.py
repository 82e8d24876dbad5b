"""conformance, identify: what is asked, what was answered, and which question tells the guesses that are left apart.

Legend: T tokens, C columns, E choices, K top_k.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from conformance.core.judge import Judge
from conformance.core.subject import Subject, Unsupported
from conformance.identify.box import Box, Question
from conformance.identify.choice import Guess, Holder, chosen
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


class Asking:
    """A box, and the questions that it was asked."""

    def __init__(self, subject: Subject, handed: RouterSpec):
        self.box = Box.opened(subject, handed)
        self.holder = Holder(self.box, Judge(subject))
        self.rng = np.random.default_rng(0)
        self.questions: list[Question] = []
        self.notes: list[str] = []
        self.law_data: list[Question] = []
        self.hidden_null = False
        self.router_dtype = "float32"
        self.between: dict[RouterSpec, str] = {}
        """Of a spec with a number that was bounded: how far it is known."""

    # what is asked

    def ask(self, logits_TC: np.ndarray, bias_E: np.ndarray | None = None, **how: Any) -> Question | None:
        try:
            question = self.box.ask(logits_TC, bias_E, seed=len(self.questions), **how)
        except Unsupported as sentence:
            self.box.refused[str(sentence)] = self.box.refused.get(str(sentence), 0) + len(logits_TC)
            return None
        question = self._with_null_ids(question)
        self.questions.append(question)
        return question

    def _with_null_ids(self, question: Question) -> Question:
        """A skipped choice that is returned as expert 0 of weight 0 under its own id."""
        if not self.hidden_null:
            return question
        ids_TK = np.where(question.weights_TK == 0, self.box.handed.num_experts, question.expert_ids_TK)
        return Question(**{**vars(question), "expert_ids_TK": ids_TK})

    def logits(self, centre: float, width: float, T: int) -> np.ndarray:
        rng, C = self.rng, self.box.columns
        levels_TC = np.cumsum(rng.uniform(0.6, 1.4, (T, C)), axis=-1)
        levels_TC = (levels_TC - levels_TC.mean(axis=-1, keepdims=True)) * (2 * width / C)
        return rng.permuted(levels_TC, axis=-1) + centre + rng.normal(0, width / 4, (T, 1))

    def aside(self, logits_TC: np.ndarray) -> Question | None:
        """An answer that is counted, and not kept."""
        try:
            return self.box.ask(logits_TC, plain=True)
        except Unsupported:
            return None

    # telling apart

    def inputs(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """A pool: batches of logits, each with a bias where one is taken."""
        E = self.box.bias_length
        biases: list[np.ndarray | None] = [None]
        if self.box.takes_bias:
            biases += [self.rng.normal(c, w, E) for c, w in ((0, 0.1), (0, 0.6), (-1.5, 0.3), (2, 0.5), (0, 4))]
        for bias_E in biases:
            parts = [self.logits(c, w, 24) for c, w in ((0, 2), (0, 0.4), (-3, 2), (3, 2), (0, 8))]
            heavy_TC = self.logits(-2, 1, 24)
            heavy_TC[np.arange(24), self.rng.integers(0, self.box.columns, 24)] += 5
            yield np.concatenate([*parts, heavy_TC]), bias_E

    def dividing(self, guesses: list[Guess], forbidden: bool = False) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Tokens, with a bias, on which the guesses disagree, those first that divide them most evenly; or None.

        Args:
            forbidden: whether a bias is tried though the box takes none.
        """
        takes = self.box.takes_bias
        self.box.takes_bias = takes or forbidden
        try:
            pool = list(self.inputs())
        finally:
            self.box.takes_bias = takes
        best, found = 0, None
        for logits_TC, bias_E in pool:
            answers_GTX = np.stack([answer(guess, logits_TC, bias_E, self.box) for guess in guesses])
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

    def told_apart(self, guesses: list[Guess]) -> list[Guess]:
        """The guesses that are left when no further question divides them, one of each normal form."""
        guesses = self.holder.best(self.one_of_each(guesses), self.questions, weights=True)
        barren = 0
        for _ in range(ROUNDS):
            if len(guesses) < 2 or barren >= POOLS:
                break
            divided = self.dividing(guesses[:MOST_OPEN])
            question = None if divided is None else self.ask(*divided)
            if question is None:
                barren += 1
                continue
            left = self.holder.best(guesses, [question], weights=True)
            barren = barren + 1 if len(left) == len(guesses) else 0
            guesses = left
        return guesses

    def one_of_each(self, guesses: list[Guess]) -> list[Guess]:
        found: dict[tuple, Guess] = {}
        for guess in guesses:
            found.setdefault((self.normal(guess)[0], guess.bias_used or not self.box.takes_bias), guess)
        return list(found.values())

    def normal(self, guess: Guess) -> tuple[RouterSpec, tuple[str, ...]]:
        return normal(guess.spec, self.box.takes_bias and guess.bias_used)


def answer(guess: Guess, logits_TC: np.ndarray, bias_E: np.ndarray | None, box: Box) -> np.ndarray:
    """(T, K + E + S) what a guess answers: the chosen, and the weight of every choice and shared expert."""
    spec = guess.spec
    T, E = len(logits_TC), spec.num_choices
    inputs = box.inputs(T, 0)
    ids_TK = np.zeros((T, spec.top_k), dtype=np.int64)
    if spec.selector in ("top_k", "group_top_k"):
        ids_TK = chosen(spec, logits_TC, bias_E if guess.bias_used else None)
    question = Question(
        logits_TC=logits_TC, bias_E=bias_E, inputs=inputs, expert_ids_TK=ids_TK,
        weights_TK=np.zeros(ids_TK.shape), shared_weights_TS=None,
    )  # fmt: skip
    try:
        trace = guess.case(question, "float64").reference
    except ValueError:
        return np.full((T, spec.top_k + E + spec.num_scored_shared_experts), np.nan)
    weights_TE = np.zeros((T, E + 1))  # the last is of unused slots, -1
    np.put_along_axis(weights_TE, trace.expert_ids_TK, trace.weights_TK, axis=-1)
    shared_TS = trace.shared_weights_TS if trace.shared_weights_TS is not None else np.zeros((T, 0))
    return np.concatenate([np.sort(trace.expert_ids_TK), weights_TE[:, :E], shared_TS], axis=-1)
