"""conformance, identify: asking. What the search asks a box, and all that it was answered.

Legend: T tokens, C columns, E choices, K top_k.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from conformance.core.subject import Subject, Unsupported
from conformance.identify.box import Box, Question
from conformance.identify.choice import Guess, Holder
from moe_ref import RouterSpec


class Asking:
    """A box that is asked, the answers, and what is to be said of them.

    Raises:
        UsageError: the subject routes nothing that it is handed.
        Malformed: what it returned is no routing.
    """

    def __init__(self, subject: Subject, handed: RouterSpec):
        self.box = Box.opened(subject, handed)
        self.holder = Holder(self.box)
        self.rng = np.random.default_rng(0)
        self.questions: list[Question] = []
        self.notes: list[str] = []
        self.hidden_null = False
        """Whether a skipped choice is returned as expert 0 of weight 0."""

    def ask(self, logits_TC: np.ndarray, bias_E: np.ndarray | None = None, **how: Any) -> Question | None:
        """An answer, which is kept; None where the box refuses, with its sentence."""
        try:
            question = self.box.ask(logits_TC, bias_E, seed=len(self.questions), **how)
        except Unsupported as sentence:
            self.box.refused[str(sentence)] = self.box.refused.get(str(sentence), 0) + len(logits_TC)
            return None
        question = self.with_null_ids(question)
        self.questions.append(question)
        return question

    def aside(self, logits_TC: np.ndarray) -> Question | None:
        """An answer that is counted, and not kept."""
        try:
            return self.box.ask(logits_TC, plain=True)
        except Unsupported:
            return None

    def with_null_ids(self, question: Question) -> Question:
        """A skipped choice that is returned as expert 0 of weight 0 under its own id."""
        if not self.hidden_null:
            return question
        ids_TK = np.where(question.weights_TK == 0, self.box.handed.num_experts, question.expert_ids_TK)
        return Question(**{**vars(question), "expert_ids_TK": ids_TK})

    def logits(self, centre: float, width: float, T: int) -> np.ndarray:
        """(T, C) logits in random order, no two of a token equal."""
        rng, C = self.rng, self.box.columns
        levels_TC = np.cumsum(rng.uniform(0.6, 1.4, (T, C)), axis=-1)
        levels_TC = (levels_TC - levels_TC.mean(axis=-1, keepdims=True)) * (2 * width / C)
        return rng.permuted(levels_TC, axis=-1) + centre + rng.normal(0, width / 4, (T, 1))

    def inputs(self, *, biased: bool) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """A pool: batches of logits of every kind, one without a bias; `biased`: and some, each with another one."""
        E = self.box.bias_length
        biases: list[np.ndarray | None] = [None]
        if biased:
            biases += [self.rng.normal(c, w, E) for c, w in ((0, 0.1), (0, 0.6), (-1.5, 0.3), (2, 0.5), (0, 4))]
        for bias_E in biases:
            parts = [self.logits(c, w, 24) for c, w in ((0, 2), (0, 0.4), (-3, 2), (3, 2), (0, 8))]
            heavy_TC = self.logits(-2, 1, 24)
            heavy_TC[np.arange(24), self.rng.integers(0, self.box.columns, 24)] += 5
            yield np.concatenate([*parts, heavy_TC]), bias_E

    @property
    def without_bias(self) -> list[Question]:
        """The questions that were asked without a bias."""
        return [question for question in self.questions if question.bias_E is None]

    def wrong(self, guess: Guess) -> list[tuple[Question, int]]:
        """(question, token) that a guess does not explain."""
        return [(question, t) for question in self.questions for t in self.holder.wrong(guess, question)]
