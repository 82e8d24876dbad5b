"""conformance, identify: the box. A router that is asked: logits and bias in, ids and weights out, nothing else.

The subject is handed one spec in every call, because the protocol has a place for it. Of that spec the box tells its
sizes alone: num_experts, top_k and the number of columns.

Legend: T tokens, C columns of the logits, E experts, K top_k, S router-scored shared experts, V rows of a table.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from conformance.core.capabilities import named_inputs
from conformance.core.judge import cast
from conformance.core.subject import Subject, Unsupported
from conformance.core.usage import UsageError
from conformance.router.case import held
from moe_ref import UNUSED, RouterSpec

MOST_RETRIED = 64
"""Tokens of a refused call that are asked one by one."""
TABLE_ROWS = 7
BY_TOKEN = ("token_ids_T", "given_ids_TK")
"""Inputs with an entry for each token."""


class Malformed(Exception):
    """What the box returned is no routing; the text says why."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """What was asked in one call, and what was answered. All arrays are float64 or int64."""

    logits_TC: np.ndarray
    bias_E: np.ndarray | None
    inputs: dict[str, Any]
    expert_ids_TK: np.ndarray
    weights_TK: np.ndarray
    shared_weights_TS: np.ndarray | None

    def tokens(self, rows: Any) -> Self:
        """The question about some of its tokens."""
        shared_TS = self.shared_weights_TS
        return replace(
            self,
            logits_TC=self.logits_TC[rows],
            inputs={name: value[rows] if name in BY_TOKEN else value for name, value in self.inputs.items()},
            expert_ids_TK=self.expert_ids_TK[rows],
            weights_TK=self.weights_TK[rows],
            shared_weights_TS=None if shared_TS is None else shared_TS[rows],
        )


@dataclass(kw_only=True)
class Box:
    """A subject that is asked, and what it takes: found by trying."""

    subject: Subject
    handed: RouterSpec
    """The spec that the subject is handed; only its sizes are read here."""
    top_k: int = 0
    """Experts that it returns for each token."""
    takes_bias: bool = False
    why_no_bias: str = ""
    learned_scale: str = "none"
    """none, per_expert or global: a factor that it takes and that changes its weights."""
    form: str = ""
    """What its choice reads besides logits: '', 'table' or 'given'."""
    calls: int = 0
    tokens: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    """Sentence -> tokens that were refused with it."""

    @property
    def columns(self) -> int:
        return self.handed.num_logits

    @property
    def dtype(self) -> str:
        """That of the logits."""
        return "float32" if "float32" in self.subject.logit_dtypes else self.subject.logit_dtypes[0]

    @property
    def bias_length(self) -> int:
        return self.handed.num_choices

    # asking

    def ask(
        self, logits_TC: np.ndarray, bias_E: np.ndarray | None = None, *, seed: int = 0, plain: bool = False
    ) -> Question:
        """The answer for some tokens; those that the box refuses are left out.

        Args:
            seed: of the further inputs, where the box takes any.
            plain: whether the learned factors are 1.

        Raises:
            Malformed: what it returned is no routing.
        """
        logits_TC = held(logits_TC, self.dtype)
        inputs = self.inputs(len(logits_TC), seed, plain=plain)
        bias_E = None if bias_E is None else np.asarray(bias_E).astype(np.float32).astype(np.float64)
        try:
            return self._call(logits_TC, bias_E, inputs)
        except Malformed:
            raise
        except Exception as error:
            found = [self._one(logits_TC, bias_E, inputs, t) for t in range(min(len(logits_TC), MOST_RETRIED))]
            answered = [each for each in found if each is not None]
            if not answered:
                raise Unsupported(_sentence(error)) from None
            return _joined(answered)

    def _one(self, logits_TC, bias_E, inputs, t: int) -> Question | None:
        own = {name: value[t : t + 1] if name in BY_TOKEN else value for name, value in inputs.items()}
        try:
            return self._call(logits_TC[t : t + 1], bias_E, own)
        except Malformed:
            raise
        except Exception as error:
            self.refused[_sentence(error)] = self.refused.get(_sentence(error), 0) + 1
            return None

    def inputs(self, T: int, seed: int, *, plain: bool = False) -> dict[str, Any]:
        """What it takes besides logits and bias, for T tokens; with `plain` the learned factors are 1."""
        E, K = self.handed.num_choices, self.top_k or self.handed.top_k
        rng, factors = np.random.default_rng(seed), np.random.default_rng([seed, 1])
        inputs: dict[str, Any] = {}
        if self.learned_scale != "none":
            shape = (E,) if self.learned_scale == "per_expert" else ()
            inputs["learned_scale"] = np.ones(shape) if plain else held(factors.uniform(0.25, 3, shape), "float32")
        if self.form == "table":
            inputs["table_VK"] = np.argsort(rng.random((TABLE_ROWS, E)))[:, :K]
            inputs["token_ids_T"] = rng.integers(0, TABLE_ROWS, T)
        if self.form == "given":
            inputs["given_ids_TK"] = np.argsort(rng.random((T, E)))[:, :K]
        return inputs

    def _call(self, logits_TC, bias_E, inputs) -> Question:
        given = {
            name: value.astype(np.float32) if value.dtype == np.float64 else value.copy()
            for name, value in inputs.items()
        }
        bias = None if bias_E is None else bias_E.astype(np.float32)
        self.calls, self.tokens = self.calls + 1, self.tokens + len(logits_TC)
        with np.errstate(all="ignore"):
            found = self.subject.route(cast(logits_TC, self.dtype), self.handed, bias, **given)
        ids_TK, weights_TK = np.asarray(found.expert_ids_TK), np.asarray(found.weights_TK).astype(np.float64)
        self._check(ids_TK, weights_TK, len(logits_TC))
        shared_TS = found.shared_weights_TS
        return Question(
            logits_TC=logits_TC,
            bias_E=bias_E,
            inputs=inputs,
            expert_ids_TK=ids_TK.astype(np.int64),
            weights_TK=np.where(ids_TK == UNUSED, 0, weights_TK),
            shared_weights_TS=None if shared_TS is None else np.asarray(shared_TS).astype(np.float64),
        )

    def _check(self, ids_TK: np.ndarray, weights_TK: np.ndarray, T: int) -> None:
        if ids_TK.ndim != 2 or len(ids_TK) != T or ids_TK.shape != weights_TK.shape or not ids_TK.shape[1]:
            raise Malformed(f"ids of shape {ids_TK.shape} and weights of shape {weights_TK.shape} for {T} tokens")
        if ids_TK.dtype.kind not in "iu":
            raise Malformed(f"expert ids are {ids_TK.dtype}, not integers")
        if ((ids_TK < UNUSED) | (ids_TK >= self.columns)).any():
            raise Malformed(f"an expert id is outside 0 .. {self.columns - 1}: {ids_TK.min()} .. {ids_TK.max()}")
        sorted_TK = np.sort(ids_TK)
        twice_T = ((np.diff(sorted_TK) == 0) & (sorted_TK[:, 1:] != UNUSED)).any(axis=-1)
        if twice_T.any():
            raise Malformed(f"an expert is selected twice: {ids_TK[np.argmax(twice_T)].tolist()}")

    # what it takes

    @classmethod
    def opened(cls, subject: Subject, handed: RouterSpec) -> Self:
        """The box, and what it takes beside logits.

        Raises:
            UsageError: it runs with nothing that can be handed to it.
            Malformed: what it returns is no routing.
        """
        box, first = cls(subject=subject, handed=handed), None
        named = named_inputs(subject, "route")
        learned = ("none", "per_expert", "global") if "learned_scale" in named else ("none",)
        forms = ("", *(["table"] if "table_VK" in named else []), *(["given"] if "given_ids_TK" in named else []))
        for box.form in forms:
            for box.learned_scale in learned:
                try:
                    answer = box.ask(_separated(box, 2))
                except Unsupported as sentence:
                    first = first or sentence
                    continue
                box.top_k = answer.expert_ids_TK.shape[1]
                box._find_learned_scale(learned)
                box._find_bias()
                box.refused.clear()
                return box
        raise UsageError(f"{subject.name or type(subject).__name__} routes nothing that it is handed: {first}")

    def _find_learned_scale(self, learned: tuple[str, ...]) -> None:
        """Which factor changes the weights; one that is taken and changes nothing is none."""
        found = self.learned_scale
        for self.learned_scale in learned[1:] if found == "none" else (found,):
            try:
                logits_TC = _separated(self, 4)
                once, again = (self.ask(logits_TC, plain=plain).weights_TK for plain in (True, False))
            except Unsupported:
                continue
            if once.shape == again.shape and not np.allclose(once, again, rtol=1e-3, atol=0):
                return
        self.learned_scale = "none"

    def _find_bias(self) -> None:
        try:
            self.ask(_separated(self, 2), np.linspace(-0.25, 0.25, self.bias_length))
            self.takes_bias = True
        except Unsupported as sentence:
            self.why_no_bias = str(sentence)


def _separated(box: Box, T: int) -> np.ndarray:
    rng = np.random.default_rng(T)
    return rng.permuted(np.tile(np.linspace(-2, 2, box.columns), (T, 1)), axis=-1)


def _sentence(error: Exception) -> str:
    text = str(error).strip().splitlines()[:1]
    return (text[0] if isinstance(error, Unsupported) and text else f"{type(error).__name__}: {''.join(text)}")[:200]


def _joined(questions: list[Question]) -> Question:
    """One question of the tokens of several, asked with one bias."""
    first, concat = questions[0], np.concatenate
    shared = [each.shared_weights_TS for each in questions if each.shared_weights_TS is not None]
    return Question(
        logits_TC=concat([each.logits_TC for each in questions]),
        bias_E=first.bias_E,
        inputs={
            name: concat([each.inputs[name] for each in questions]) if name in BY_TOKEN else value
            for name, value in first.inputs.items()
        },
        expert_ids_TK=concat([each.expert_ids_TK for each in questions]),
        weights_TK=concat([each.weights_TK for each in questions]),
        shared_weights_TS=concat(shared) if shared else None,
    )
