"""conformance, identify: the search. Asks what tells the open guesses apart, until one normal form is left.

    the box -> what the choice reads -> the law of the weights -> the choice -> neighbours -> an Identity

Legend: T tokens, C columns, E choices, K top_k.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conformance.core.judge import Judge
from conformance.core.subject import Subject, Unsupported
from conformance.identify.band import sparsemixer
from conformance.identify.box import Box, Question
from conformance.identify.choice import Guess, Holder, answered, groupings, prefiltered, quotas
from conformance.identify.counts import has_unused, of_batch, varying
from conformance.identify.equal import alternatives, normal
from conformance.identify.law import FITS, Data, Law, laws
from conformance.identify.near import nearest
from conformance.identify.rounding import NARROW, as_held, exact, narrow_of, nearest_first, rounds_logits
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


def identify(subject: Subject, handed: RouterSpec) -> Identity:
    """The RouterSpec of a subject that has `route`, from its answers alone.

    Args:
        handed: what it gets as its spec in every call; its num_experts, top_k and number of columns are told, no more.

    Raises:
        UsageError: it routes nothing that it is handed.
        Malformed: what it returned is no routing.
    """
    return _Search(subject, handed).run()


class _Search:
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

    # the steps

    def run(self) -> Identity:
        """The search."""
        told, box = self.box.handed, self.box
        if box.top_k != told.top_k:
            self.notes.append(f"top_k is told to be {told.top_k}; it returns {box.top_k} experts for each token")
        num_experts, num_null, num_shared, kind = self._columns()
        num_choices = num_experts + num_null
        sizes = {"num_experts": num_experts, "top_k": box.top_k, "num_null_experts": num_null, "null_kind": kind}
        sizes |= {"num_scored_shared_experts": num_shared, "learned_scale": box.learned_scale}
        self._ask_for_weights()
        selector = self._selector(num_choices)
        self.router_dtype = self._narrow(selector, num_choices)
        sizes["router_dtype"] = self.router_dtype
        reads_batch = selector == "top_k" and self._reads_batch()
        varies = selector == "top_k" and has_unused(self.questions)
        # Gaps of narrow logits are too coarse to search a band by.
        banded = selector == "top_k" and self.box.dtype not in NARROW and self._constant_weights()
        mixed = sparsemixer(self.ask, self.box.columns, self.law_data[0], sizes) if banded else None
        if mixed is not None:
            guesses = [mixed]
        else:
            found = self._with_small(laws(self._data(self.law_data, num_choices, num_experts)), sizes)
            if box.takes_bias and selector == "top_k" and not varies:
                found = self._with_buried(found, sizes)
            guesses = self._counted(found, sizes, reads_batch, varies) or self._choices(found, sizes, selector)
        guesses = self._told_apart(nearest_first(guesses, self.law_data, self.box.dtype, self.router_dtype))
        return self._concluded(guesses)

    def _columns(self) -> tuple[int, int, int, str]:
        """Experts, null experts, shared experts and the kind of null experts."""
        told, C = self.box.handed, self.box.columns
        high_CC = self.logits(-1.0, 1.0, C) + 4 * np.eye(C)
        first = self.ask(high_CC, plain=True)
        assert first is not None, "the box was opened with such logits"
        num_shared = 0 if first.shared_weights_TS is None else first.shared_weights_TS.shape[1]
        extra = C - told.num_experts - num_shared
        by_logit = len(first.expert_ids_TK) == C
        zero_C = np.zeros(C, bool)
        if by_logit:
            for e in range(C - num_shared):
                own = first.expert_ids_TK[e] == e
                zero_C[e] = bool((first.weights_TK[e][own] == 0).any())
        if extra == 1 and by_logit and not zero_C[-1 - num_shared]:
            t = told.num_experts
            missing = t not in first.expert_ids_TK[t] and (first.weights_TK[t] == 0).any()
            if missing:
                self.hidden_null = zero_C[t] = True
                self.notes.append(f"a skipped choice is returned as expert 0 of weight 0, not as choice {t} (SEL-11)")
                self.questions = [self._with_null_ids(first)]
        skipped = 0
        while skipped < C - num_shared - 1 and zero_C[C - num_shared - 1 - skipped]:
            skipped += 1
        if skipped:
            return C - num_shared - skipped, skipped, num_shared, "skip"
        return C - num_shared - extra, extra, num_shared, "identity"

    def _ask_for_weights(self) -> None:
        """Logits of every size, without a bias and with learned factors of 1."""
        for centre, width, T in (
            (0.0, 2.0, 10), (0.0, 0.5, 5), (0.0, 8.0, 6), (-38.0, 6.0, 10), (-16.0, 6.0, 8), (14.0, 4.0, 3),
        ):  # fmt: skip
            if (question := self.ask(self.logits(centre, width, T), plain=True)) is not None:
                self.law_data.append(question)

    def _selector(self, num_choices: int) -> str:
        """What the choice reads."""
        if self.box.top_k == num_choices:
            return self.box.form if self.box.form else "top_k"
        first = self.law_data[0]
        again = self.box.ask(self.logits(0.0, 2.0, len(first.logits_TC)), seed=1)
        same = self.box.ask(self.logits(0.0, 2.0, len(first.logits_TC)), seed=1)
        if (np.sort(again.expert_ids_TK) != np.sort(same.expert_ids_TK)).any():
            return "top_k"
        if self.box.form:
            return self.box.form
        T, K = same.expert_ids_TK.shape
        in_turn = (np.arange(T * K) % self.box.handed.num_experts).reshape(T, K)
        return "round_robin" if (np.sort(in_turn) == np.sort(same.expert_ids_TK)).all() else "random"

    def _reads_batch(self) -> bool:
        """Whether the first tokens of a batch have other experts without the rest."""
        first = self.law_data[0]
        some = self.ask(first.logits_TC[:3], plain=True)
        if some is None or len(some.expert_ids_TK) != 3:
            return False
        return bool((np.sort(some.expert_ids_TK) != np.sort(first.expert_ids_TK[:3])).any())

    def _narrow(self, selector: str, num_choices: int) -> str:
        """The narrow dtype that logits, scores and weights are rounded to, or float32; a note where some are not."""
        dtype = narrow_of(self.law_data)
        # Logits that are given in the dtype show no rounding of their own.
        chooses = selector == "top_k" and self.box.top_k < num_choices and dtype != self.box.dtype
        if dtype in NARROW and chooses and not rounds_logits(self._aside, dtype, self.box.columns, self.box.top_k):
            self.notes.append(f"its weights are rounded to {dtype}, and its logits are not: no router_dtype does that")
            return "float32"
        return dtype

    def _data(self, questions: list[Question], num_choices: int, num_experts: int) -> Data:
        return as_held(Data.of(questions, num_choices, num_experts), self.router_dtype)

    def _counted(self, found: list[Law], sizes: dict[str, Any], reads_batch: bool, varies: bool) -> list[Guess]:
        """Selectors that count or read the batch; a note where it does, and is none of them."""
        shapes = [law.fields for law in found[:6]]
        if reads_batch:
            guesses = of_batch(shapes, sizes, self._aside, lambda T: self.logits(0.0, 2.0, T))
            left = self.holder.fewest(guesses, self.questions)
            if left and not self.holder.other_choice(left[0], self.questions[0]):
                return left
            self.notes.append(
                "a token's experts depend on the others of its batch, and not as selectors sinkhorn and expert_choice "
                "have it"
            )
        elif varies:
            free = [question for question in self.questions if question.bias_E is None]
            self.between = dict(varying(shapes, sizes, free, self.ask))
            left = self.holder.fewest([Guess(spec=spec) for spec in self.between], self.questions)
            # A number that is short says more than its law.
            left = sorted(left, key=lambda guess: len(f"{guess.spec.threshold:g}{guess.spec.top_p or 0:g}"))
            if left:
                return self._biased(left) if self.box.takes_bias else left
            self.notes.append("tokens have different numbers of experts, and not by a threshold or a share of scores")
        return []

    def _aside(self, logits_TC: np.ndarray) -> Question | None:
        """An answer that is counted, and not kept."""
        try:
            return self.box.ask(logits_TC, plain=True)
        except Unsupported:
            return None

    def _constant_weights(self) -> bool:
        """Whether the weights of a token are alike though its logits are not."""
        weights_TK = np.concatenate([question.weights_TK for question in self.law_data[:3]])
        return bool(np.median(np.ptp(weights_TK, axis=-1) / np.maximum(weights_TK.max(axis=-1), 1e-30)) < 1e-3)

    def _with_small(self, found: list[Law], sizes: dict[str, Any]) -> list[Law]:
        """The laws again, with scores so small that an eps shows: how low the logits have to be, the laws say."""
        depths = {"sigmoid": (26.0, 40.0, 58.0), "sqrtsoftplus": (45.0, 65.0, 80.0)}
        asked = {(law.fields.get("score_func", ""), law.fields.get("logit_scale", 1.0)) for law in found[:4]}
        for score_func, scale in sorted(asked):
            for depth in depths.get(score_func, ()):
                question = self.ask(self.logits(-depth / scale, 3.0 / scale, 4), plain=True)
                if question is not None:
                    self.law_data.append(question)
        again = laws(self._data(self.law_data, sizes["num_experts"] + sizes["num_null_experts"], sizes["num_experts"]))
        return again if again[0].residual <= max(FITS, 2 * found[0].residual) else found

    def _with_buried(self, found: list[Law], sizes: dict[str, Any]) -> list[Law]:
        """The laws again, with experts of low scores that a bias makes chosen: only there a softmax shows an eps."""
        K, C = self.box.top_k, self.box.columns
        num_choices = sizes["num_experts"] + sizes["num_null_experts"]
        buried = []
        for depth in (12.0, 26.0, 46.0):
            logits_TC = np.zeros((4, C)) + self.rng.normal(0, 0.1, (4, C))
            logits_TC[:, :K] -= depth + self.rng.uniform(0, 6, (4, K))
            question = self.ask(logits_TC, np.where(np.arange(num_choices) < K, 200.0, 0.0), plain=True)
            if question is not None:
                buried.append(question)
        again = laws(self._data([*self.law_data, *buried], num_choices, sizes["num_experts"]))
        return again if again[0].residual <= max(FITS, 2 * found[0].residual) else found

    def _choices(self, found: list[Law], sizes: dict[str, Any], selector: str) -> list[Guess]:
        """The guesses that choose as the box does, or nearly."""
        shapes = [law.fields for law in found[:6]]
        if selector != "top_k":
            by_logit = {"select_by": "logit"}
            specs = [
                sizes | shape | {"selector": selector} | (by_logit if shape.get("score_over") == "selected" else {})
                for shape in shapes
            ]
            return [Guess(spec=RouterSpec.from_dict(spec), bias_used=False) for spec in specs]
        free = [question for question in self.questions if question.bias_E is None]
        open_ = self._ungrouped(shapes, sizes)
        left = self.holder.best(open_, free)
        if any(self.holder.other_choice(left[0], question) for question in free):
            grouped = self._grouped(shapes, sizes, free)
            left = self.holder.fewest([*left, *grouped], free)
        if not self.box.takes_bias:
            return left
        return self._biased(left)

    def _ungrouped(self, shapes: list[dict[str, Any]], sizes: dict[str, Any]) -> list[Guess]:
        found = []
        for shape in shapes:
            for by in ("score", "logit") if shape.get("score_over") != "selected" else ("logit",):
                found.append(Guess(spec=RouterSpec(**sizes, **shape, select_by=by)))
        return found

    def _grouped(self, shapes: list[dict[str, Any]], sizes: dict[str, Any], free: list[Question]) -> list[Guess]:
        """With groups, where groups are possible."""
        if sizes["num_null_experts"]:
            return []
        hard = max(free, key=lambda question: len(question.logits_TC))
        guesses = [
            Guess(spec=base.spec.replace(**groups, mask_fill=fill))
            for base in self._ungrouped(shapes, sizes)
            for groups in groupings(sizes["num_experts"], sizes["top_k"])
            for fill in ((-np.inf, 0.0) if base.spec.select_by == "logit" else (-np.inf,))
        ]
        shared_out = [
            Guess(spec=base.spec.replace(**shares), bias_used=False)
            for base in self._ungrouped(shapes, sizes)
            for shares in quotas(sizes["num_experts"], sizes["top_k"])
        ]
        # Of a router that fits nothing, what is published is nearer than quotas, which are rare.
        exact = [guess for guess in shared_out if not any(self.holder.other_choice(guess, each) for each in free)]
        return [*self.holder.best(prefiltered(guesses, hard), free), *exact]

    def _biased(self, left: list[Guess]) -> list[Guess]:
        """The guesses again, with what a bias alone shows: whether it counts, and what dropped experts are given."""
        more = list(left)
        for guess in left:
            if guess.spec.num_expert_groups is not None:
                more += [
                    Guess(spec=guess.spec.replace(mask_fill=0.0, weights_from=source))
                    for source in ("scores", "masked_scores")
                ]
        more += [Guess(spec=guess.spec, bias_used=False) for guess in left]
        E = len(self.questions[0].logits_TC[0]) - left[0].spec.num_scored_shared_experts
        before = len(self.questions)
        for centre, width in ((0.0, 0.5), (-1.5, 0.3), (2.0, 0.3), (0.0, 3.0)):
            self.ask(self.logits(0.0, 2.0, 8), self.rng.normal(centre, width, E))
        return self.holder.fewest(more, self.questions[before:])

    # telling apart

    def _inputs(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
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

    def _dividing(self, guesses: list[Guess], forbidden: bool = False) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Tokens, with a bias, on which the guesses disagree, those first that divide them most evenly; or None.

        Args:
            forbidden: whether a bias is tried though the box takes none.
        """
        takes = self.box.takes_bias
        self.box.takes_bias = takes or forbidden
        try:
            pool = list(self._inputs())
        finally:
            self.box.takes_bias = takes
        best, found = 0, None
        for logits_TC, bias_E in pool:
            answers_GTX = np.stack([answered(guess, logits_TC, bias_E, self.box) for guess in guesses])
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

    def _told_apart(self, guesses: list[Guess]) -> list[Guess]:
        """The guesses that are left when no further question divides them, one of each normal form."""
        guesses = self.holder.best(self._one_of_each(guesses), self.questions, weights=True)
        barren = 0
        for _ in range(ROUNDS):
            if len(guesses) < 2 or barren >= POOLS:
                break
            divided = self._dividing(guesses[:MOST_OPEN])
            question = None if divided is None else self.ask(*divided)
            if question is None:
                barren += 1
                continue
            left = self.holder.best(guesses, [question], weights=True)
            barren = barren + 1 if len(left) == len(guesses) else 0
            guesses = left
        return guesses

    def _one_of_each(self, guesses: list[Guess]) -> list[Guess]:
        found: dict[tuple, Guess] = {}
        for guess in guesses:
            found.setdefault((self._normal(guess)[0], guess.bias_used or not self.box.takes_bias), guess)
        return list(found.values())

    def _normal(self, guess: Guess) -> tuple[RouterSpec, tuple[str, ...]]:
        return normal(guess.spec, self.box.takes_bias and guess.bias_used)

    # the end

    def _concluded(self, guesses: list[Guess]) -> Identity:
        """What is left, and what could not be told apart from it."""
        best = guesses[0]  # of the law that explains the weights best
        best = Guess(spec=self._normal(best)[0], bias_used=best.bias_used)
        if not self._wrong(best):
            self._confirm(best)
        wrong = self._wrong(best)
        near = [best] if not wrong else nearest(self.holder, guesses[:MOST_OPEN], self.questions)
        if wrong:
            best, wrong = near[0], self._wrong(near[0])
        else:
            wide = self.router_dtype not in NARROW and best.spec.selector != "random"
            best = exact(best, self.questions, self.box.dtype) if wide else best
        found = Identity(box=self.box, guess=best, near=near, wrong=wrong, questions=self.questions, notes=self.notes)
        if found.fits:
            bounded = best.spec.replace(router_dtype=self.router_dtype)
            self.notes += [self.between[bounded]] if bounded in self.between else []
            if self.box.takes_bias and not best.bias_used and best.spec.takes_bias:
                self.notes.append("it takes a bias, which changes nothing")
            if best.spec.router_dtype == "float64":
                guesses = [Guess(spec=g.spec.replace(router_dtype="float64"), bias_used=g.bias_used) for g in guesses]
            found.open = self._open(best, guesses)
        return found

    def _confirm(self, best: Guess) -> None:
        """Fresh inputs of every kind, with learned factors and a bias where they are taken."""
        for logits_TC, bias_E in self._inputs():
            self.ask(logits_TC[::12], bias_E)
        for centre in (-60.0, 30.0):
            self.ask(self.logits(centre, 3.0, 4))

    def _wrong(self, guess: Guess) -> list[tuple[Question, int]]:
        return [(question, t) for question in self.questions for t in self.holder.wrong(guess, question)]

    def _open(self, best: Guess, guesses: list[Guess]) -> list[Open]:
        """Each neighbour: proven to be the same router, told apart by an answer, or left open with the reason."""
        takes = self.box.takes_bias and best.bias_used
        own, found = self._normal(best)[0], []
        others = dict.fromkeys([*(g.spec for g in guesses), *alternatives(best.spec)])
        for other in others:
            if other == best.spec:
                continue
            form, reasons = normal(other, takes)
            if form == own:
                _, mine = normal(best.spec, takes)
                why = "; ".join(reason for reason in reasons if reason not in mine) or "; ".join(reasons)
                found.append(Open(spec=other, why=why, proven=True))
            elif not self._rejected(Guess(spec=other, bias_used=best.bias_used), best):
                found.append(Open(spec=other, why=self._why_open(best, other), proven=False))
        return found

    def _rejected(self, other: Guess, best: Guess) -> bool:
        """Whether an answer tells a neighbour apart; one is asked for where none does yet."""
        if self._some_wrong(other, self.questions):
            return True
        for _ in range(2):
            divided = self._dividing([best, other])
            if divided is not None and (question := self.ask(*divided)) is not None:
                if self._some_wrong(best, [question]):
                    return False
                if self._some_wrong(other, [question]):
                    return True
        return False

    def _some_wrong(self, guess: Guess, questions: list[Question]) -> bool:
        try:
            return any(self.holder.other_choice(guess, q) or self.holder.other_weights(guess, q) for q in questions)
        except ValueError:  # a spec that cannot be asked this
            return True

    def _why_open(self, best: Guess, other: RouterSpec) -> str:
        guesses = [best, Guess(spec=other, bias_used=best.bias_used)]
        if not self.box.takes_bias and self._dividing(guesses, forbidden=True) is not None:
            return f"only a bias would tell, and it takes none ({self.box.why_no_bias})"
        furthest = 0.0
        for logits_TC, bias_E in self._inputs():
            mine, others = (answered(guess, logits_TC, bias_E, self.box) for guess in guesses)
            with np.errstate(invalid="ignore", divide="ignore"):
                furthest = max(furthest, float(np.nanmax(np.abs(mine - others) / np.maximum(np.abs(mine), 1e-30))))
        if furthest < CLOSE:
            return (
                f"on the inputs tried the weights differ by at most {furthest:.1g} of themselves: that may be rounding"
            )
        return "no proof that they are the same, and no input was found on which they differ"
