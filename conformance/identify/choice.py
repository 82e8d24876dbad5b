"""conformance, identify: the choice. Which fields give the experts that were chosen, and which tokens they leave open.

Legend: T tokens, E choices, K top_k, G groups, P experts per group, L groups kept.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from conformance.core.judge import Judge
from conformance.core.rounding import close
from conformance.identify.box import Box, Question
from conformance.router.bounds import best_T, choice_error, taken, weight_error
from conformance.router.case import RouterCase
from conformance.router.observation import Observation
from conformance.router.verdicts import not_the_best_E, selection_differs, weights_differ
from moe_ref import RouterSpec
from moe_ref.rounding import round_to
from moe_ref.routing import bias_choice, limit_groups, limit_quotas, scale_logits, score, top_k

MOST_GROUP_SCORE_K = 4
AT_FIRST = 6
"""Tokens on which the many choices of groups are tried first."""


@dataclass(frozen=True, kw_only=True)
class Guess:
    """A router that it may be."""

    spec: RouterSpec
    bias_used: bool = True
    """Whether a bias that is given changes the choice."""

    def case(self, question: Question, dtype: str) -> RouterCase:
        """A question as a case of this spec."""
        reads = {"learned_scale"} if self.spec.learned_scale != "none" else set()
        reads |= {"table": {"table_VK", "token_ids_T"}, "given": {"given_ids_TK"}}.get(self.spec.selector, set())
        biased = self.bias_used and self.spec.takes_bias
        return RouterCase(
            spec=self.spec,
            logits_TE=question.logits_TC,
            expert_bias_E=question.bias_E if biased else None,
            inputs={name: value for name, value in question.inputs.items() if name in reads},
            dtype=dtype,
        )


def groupings(num_experts: int, num_chosen: int) -> Iterator[dict[str, Any]]:
    """Every way to keep some of some groups: sizes, and how many of its best score a group."""
    for G in range(2, num_experts + 1):
        P, rest = divmod(num_experts, G)
        for L in range(1, G) if not rest else ():
            if num_chosen > L * P:
                continue
            for k in sorted({*range(1, min(MOST_GROUP_SCORE_K, P) + 1), P} if P <= 16 else range(1, 5)):
                yield {"num_expert_groups": G, "num_limited_groups": L, "group_score_k": k}


def quotas(num_experts: int, num_chosen: int) -> Iterator[dict[str, Any]]:
    """Every way to take the same number of experts from each of some groups."""
    for G in range(2, num_chosen + 1):
        if num_chosen % G == 0 and num_experts % G == 0:
            yield {"selector": "group_top_k", "quota_groups": G}


def other_ids_T(ids_TK: np.ndarray, wanted_TK: np.ndarray) -> np.ndarray:
    """(T,) whether a token has other ids, in whatever order."""
    return (np.sort(ids_TK) != np.sort(wanted_TK)).any(axis=-1)


def missing_TK(ids_TK: np.ndarray, wanted_TK: np.ndarray) -> np.ndarray:
    """(T, K) whether an id of a token is not among the wanted ones."""
    return ~(ids_TK[:, :, None] == wanted_TK[:, None, :]).any(axis=-1)


def choice_scores(spec: RouterSpec, logits_TC: np.ndarray, bias_E: np.ndarray | None = None) -> np.ndarray:
    """(T, E) what is ranked, before any group is dropped."""
    scaled_TE = scale_logits(logits_TC[:, : spec.num_choices], spec)
    scores_TE = round_to(score(scaled_TE, spec), spec.router_dtype) if spec.select_by == "score" else None
    return bias_choice(scaled_TE, scores_TE, np.zeros(1) if bias_E is None else bias_E, spec)


def chosen(spec: RouterSpec, logits_TC: np.ndarray, bias_E: np.ndarray | None) -> np.ndarray:
    """(T, K) the choice of a spec that ranks each token alone, ascending; ties go to the lower id."""
    choice_TE = choice_scores(spec, logits_TC, bias_E)
    if spec.num_expert_groups is not None:
        choice_TE = limit_groups(choice_TE, spec)[0]
    if spec.quota_groups is not None:
        choice_TE = limit_quotas(choice_TE, spec)
    return np.sort(top_k(choice_TE, spec.top_k), axis=-1)


def answered(guess: Guess, logits_TC: np.ndarray, bias_E: np.ndarray | None, box: Box) -> np.ndarray:
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


class Holder:
    """Holds guesses against answers, within what rounding explains: of the subject, or of another one's judge."""

    def __init__(self, box: Box, judge: Judge | None = None):
        self.box, self.judge = box, judge or Judge(box.subject)

    def _seen(self, guess: Guess, question: Question, shared: bool = True) -> Observation:
        return Observation(
            case=guess.case(question, self.box.dtype),
            expert_ids_TK=question.expert_ids_TK,
            weights_TK=question.weights_TK,
            shared_weights_TS=question.shared_weights_TS if shared else None,
        )

    def other_choice(self, guess: Guess, question: Question, *, bounds: bool = True) -> list[int]:
        """Tokens whose experts the guess does not choose.

        Args:
            bounds: whether a near tie is forgiven.
        """
        spec = guess.spec
        if spec.selector == "random":
            return []
        tokens = np.flatnonzero(other_ids_T(question.expert_ids_TK, self._wanted(guess, question)))
        if not (bounds and len(tokens)) or (not spec.ranks and spec.selector != "sparsemixer"):
            return tokens.tolist()
        if spec.selector == "group_top_k":
            return tokens[self._other_quotas_T(guess, question.tokens(tokens))].tolist()
        if spec.selector == "expert_choice":
            return [] if self._takes_best(guess, question) else tokens.tolist()
        if spec.reads_batch or spec.varies:
            return selection_differs(self.judge, self._seen(guess, question, shared=False))
        # The ids of sparsemixer are those of the best logits.
        plain = RouterSpec(num_experts=spec.num_choices, top_k=spec.top_k, select_by="logit")
        alike = guess if spec.selector == "top_k" else Guess(spec=plain)
        some = self._seen(alike, question.tokens(tokens), shared=False)
        return [int(tokens[t]) for t in selection_differs(self.judge, some)]

    def _wanted(self, guess: Guess, question: Question) -> np.ndarray:
        """(T, K) what the guess chooses, in whatever order."""
        spec, T = guess.spec, len(question.logits_TC)
        if spec.selector == "round_robin":
            return (np.arange(T * spec.top_k) % spec.num_experts).reshape(T, -1)
        if spec.selector in ("top_k", "group_top_k", "sparsemixer"):
            return chosen(spec, question.logits_TC, question.bias_E if guess.bias_used else None)
        return guess.case(question, self.box.dtype).reference.expert_ids_TK

    def _takes_best(self, guess: Guess, question: Question) -> bool:
        """Whether each expert takes as many tokens as the guess has it, the best ones, near ties forgiven."""
        seen = self._seen(guess, question, shared=False)
        both = (seen.expert_ids_TK, seen.case.reference.expert_ids_TK)
        took_E, takes_E = (taken(ids_TK, guess.spec.num_choices).sum(axis=0) for ids_TK in both)
        return bool((took_E == takes_E).all()) and not not_the_best_E(self.judge, seen)

    def _other_quotas_T(self, guess: Guess, question: Question) -> np.ndarray:
        """(T,) whether some group does not give its best, near ties forgiven."""
        case, spec = guess.case(question, self.box.dtype), guess.spec
        G, P = spec.quota_groups or 1, spec.num_experts // (spec.quota_groups or 1)
        ids_TK, T = np.sort(question.expert_ids_TK, axis=-1), len(question.expert_ids_TK)
        as_many_T = ((ids_TK // P).reshape(T, G, -1) == np.arange(G)[:, None]).all(axis=(1, 2))
        scaled_TE = case.reference.scaled_logits_TE[:, : spec.num_choices]
        choice_TE = bias_choice(scaled_TE, case.reference.scores_TE, np.zeros(1), spec)
        error_TE = choice_error(case, self.judge.subject.compute_dtype)
        blocks = (each.reshape(T * G, -1) for each in (ids_TK % P, choice_TE, error_TE))
        return ~(as_many_T & best_T(*blocks).reshape(T, G).all(axis=-1))

    def other_weights(self, guess: Guess, question: Question) -> list[int]:
        """Tokens whose weights are not those that the guess gives to their experts."""
        seen = self._seen(guess, question)
        wrong = set(weights_differ(self.judge, seen))
        S, shared_TS = guess.spec.num_scored_shared_experts, seen.shared_weights_TS
        if S and shared_TS is not None:
            wanted_TS = seen.case.reference.shared_weights_TS
            assert wanted_TS is not None
            if shared_TS.shape != wanted_TS.shape:
                return list(range(len(question.logits_TC)))
            same_T = ~other_ids_T(seen.expert_ids_TK, seen.case.reference.expert_ids_TK)
            worst_T1 = 4 * weight_error(seen.case, seen.expert_ids_TK, self.judge.subject.compute_dtype).max(
                axis=-1, keepdims=True, initial=0
            )
            z_TS = np.abs(question.logits_TC[:, -S:])
            good_TS = close(shared_TS, wanted_TS, worst_T1 * (1 + z_TS), 1e-35)
            wrong |= set(np.flatnonzero(same_T & ~good_TS.all(axis=-1)).tolist())
        return sorted(wrong)

    def wrong(self, guess: Guess, question: Question) -> list[int]:
        """Tokens that the guess does not explain."""
        return sorted({*self.other_choice(guess, question), *self.other_weights(guess, question)})

    def best(self, guesses: Iterable[Guess], questions: list[Question], *, weights: bool = False) -> list[Guess]:
        """Those that leave the least unexplained of each question in turn."""
        open_ = list(guesses)
        for question in questions:
            left = [self.unexplained(guess, question, weights=weights) for guess in open_]
            open_ = [guess for guess, count in zip(open_, left, strict=True) if count == min(left)]
        return open_

    def fewest(self, guesses: list[Guess], questions: list[Question]) -> list[Guess]:
        """Those whose choice leaves the least unexplained of all questions together."""
        counts = [sum(self.unexplained(guess, question) for question in questions) for guess in guesses]
        return [guess for guess, count in zip(guesses, counts, strict=True) if count == min(counts)]

    def unexplained(self, guess: Guess, question: Question, *, weights: bool = False) -> int:
        """How much is not explained: experts that are not chosen; with `weights`, tokens."""
        if weights:
            return len(self.wrong(guess, question))
        rough = self.other_choice(guess, question, bounds=False)
        if not rough:
            return 0
        many = len(rough) > max(4, len(question.logits_TC) // 2)
        return self.missing(guess, question, rough if many else self.other_choice(guess, question))

    def missing(self, guess: Guess, question: Question, tokens: list[int]) -> int:
        """How many experts of these tokens the guess does not choose."""
        if not tokens or guess.spec.selector not in ("top_k", "group_top_k"):
            return len(tokens)
        some = question.tokens(np.array(tokens))
        return int(missing_TK(some.expert_ids_TK, self._wanted(guess, some)).sum())

    def distance(self, guess: Guess, questions: list[Question]) -> float:
        """How far the answers are: of each token the share of other experts, of other weights and of weights moved."""
        total = 0.0
        for question in questions:
            trace = guess.case(question, self.box.dtype).reference
            ids_TK, found_TK = question.expert_ids_TK, question.weights_TK
            dense_2TE = np.zeros((2, len(ids_TK), guess.spec.num_choices + 1))  # the last is of unused slots, -1
            np.put_along_axis(dense_2TE[0], ids_TK, found_TK, axis=-1)
            np.put_along_axis(dense_2TE[1], trace.expert_ids_TK, trace.weights_TK, axis=-1)
            size_T = np.maximum(np.abs(dense_2TE).sum(axis=-1).max(axis=0), 1e-30)
            moved_T = np.abs(dense_2TE[0] - dense_2TE[1]).sum(axis=-1) / size_T
            changed_T = np.abs(np.sort(found_TK) - np.sort(trace.weights_TK)).sum(axis=-1) / size_T
            other_T = missing_TK(ids_TK, trace.expert_ids_TK).mean(axis=-1)
            total += float((other_T + np.minimum(changed_T, 2) + np.minimum(moved_T, 2) / 4).sum())
        return total


def prefiltered(guesses: list[Guess], question: Question) -> list[Guess]:
    """The guesses that choose most like the answers on the first few tokens, without a look at near ties."""
    some = question.tokens(np.arange(min(AT_FIRST, len(question.logits_TC))))
    counts = []
    for guess in guesses:
        wanted_TK = chosen(guess.spec, some.logits_TC, some.bias_E if guess.bias_used else None)
        counts.append(int(missing_TK(some.expert_ids_TK, wanted_TK).sum()))
    least = min(counts, default=0)
    return [guess for guess, count in zip(guesses, counts, strict=True) if count <= least + 1]
