"""conformance, identify: the search. Asks what tells the open guesses apart, until one normal form is left.

    the box -> what the choice reads -> the law of the weights -> the choice -> neighbours -> an Identity

Legend: T tokens, C columns, E choices, K top_k.
"""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np

from conformance.core.subject import Subject
from conformance.identify.asking import MOST_OPEN, Asking
from conformance.identify.box import Question
from conformance.identify.choice import Guess, groupings, prefiltered, quotas
from conformance.identify.counts import has_unused, taken_of, takings, varying
from conformance.identify.law import FITS, Data, Law, laws, near_numbers
from conformance.identify.near import nearest
from conformance.identify.neighbours import Identity, neighbours
from conformance.identify.rounding import NARROW, as_held, is_exact, narrow_of, rounds_logits
from conformance.router.bounds import expected_weights
from moe_ref import RouterSpec
from moe_ref.rounding import round_to


def identify(subject: Subject, handed: RouterSpec) -> Identity:
    """The RouterSpec of a subject that has `route`, from its answers alone.

    Args:
        handed: what it gets as its spec in every call; its num_experts, top_k and number of columns are told, no more.

    Raises:
        UsageError: it routes nothing that it is handed.
        Malformed: what it returned is no routing.
    """
    return _Search(subject, handed).run()


class _Search(Asking):
    """From what the choice reads to an Identity."""

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
        mixed = self._sparsemixer(sizes) if banded else None
        if mixed is not None:
            guesses = [mixed]
        else:
            found = self._with_small(laws(self._data(self.law_data, num_choices, num_experts)), sizes)
            if box.takes_bias and selector == "top_k" and not varies:
                found = self._with_buried(found, sizes)
            guesses = []
            if reads_batch:
                guesses = self._of_batch(found, sizes)
            elif varies:
                guesses = self._varying(found, sizes)
            guesses = guesses or self._choices(found, sizes, selector)
        guesses = self.told_apart(self._nearest_first(guesses))
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

    def _nearest_first(self, guesses: list[Guess]) -> list[Guess]:
        """In a narrow dtype, whose bounds are wide: those first that give the most weights to the bit."""
        if self.router_dtype not in NARROW:
            return guesses
        if self.router_dtype == self.box.dtype:
            # Weights that are rounded at the end, as a model does that hands them on in the dtype of its tokens.
            wide = [
                Guess(spec=guess.spec.replace(router_dtype="float32"), bias_used=guess.bias_used) for guess in guesses
            ]
            guesses = [*wide, *guesses]
        same = [sum(self._to_the_bit(guess, question) for question in self.law_data) for guess in guesses]
        return [guesses[i] for i in sorted(range(len(guesses)), key=lambda i: -same[i])]

    def _to_the_bit(self, guess: Guess, question: Question) -> int:
        """How many weights are those of a guess, rounded at the end."""
        wanted_TK = expected_weights(guess.case(question, self.box.dtype), question.expert_ids_TK)
        return int((round_to(wanted_TK, self.router_dtype) == question.weights_TK).sum())

    def _narrow(self, selector: str, num_choices: int) -> str:
        """The narrow dtype that logits, scores and weights are rounded to, or float32; a note where some are not."""
        dtype = narrow_of(self.law_data)
        # Logits that are given in the dtype show no rounding of their own.
        chooses = selector == "top_k" and self.box.top_k < num_choices and dtype != self.box.dtype
        if dtype in NARROW and chooses and not rounds_logits(self.aside, dtype, self.box.columns, self.box.top_k):
            self.notes.append(f"its weights are rounded to {dtype}, and its logits are not: no router_dtype does that")
            return "float32"
        return dtype

    def _data(self, questions: list[Question], num_choices: int, num_experts: int) -> Data:
        return as_held(Data.of(questions, num_choices, num_experts), self.router_dtype)

    def _exact(self, best: Guess) -> Guess:
        """The guess in float64, where the weights show that."""
        if self.router_dtype in NARROW or best.spec.selector == "random":
            return best
        wide = Guess(spec=best.spec.replace(router_dtype="float64"), bias_used=best.bias_used)
        seen = 0
        for question in self.questions:
            case = wide.case(question, self.box.dtype)
            wanted_TK = expected_weights(case, question.expert_ids_TK)
            own_T = (np.sort(case.reference.expert_ids_TK) == np.sort(question.expert_ids_TK)).all(axis=-1)
            if not is_exact(wanted_TK[own_T], question.weights_TK[own_T]):
                return best
            seen += int((wanted_TK[own_T].astype(np.float32) != wanted_TK[own_T]).sum())
        return wide if seen else best

    def _of_batch(self, found: list[Law], sizes: dict[str, Any]) -> list[Guess]:
        """Selectors sinkhorn and expert_choice; a note where it is neither."""
        own: list[dict[str, Any]] = [{"selector": "sinkhorn"}]
        counted = None
        if sizes["top_k"] == sizes["num_experts"]:
            counted = taken_of(self.aside, sizes["num_experts"], lambda T: self.logits(0.0, 2.0, T))
            own = takings(counted, sizes) if counted else []
        specs = [
            fields | {"select_by": by}
            for fields in own
            for by in (("score", "logit") if fields["selector"] == "expert_choice" else ("logit",))
        ]
        guesses = self._possible(
            sizes | law.fields | spec
            for spec in specs
            for law in found[:6]
            if spec["select_by"] == "logit" or law.fields.get("score_over") != "selected"
        )
        left = self.holder.fewest(guesses, self.questions)
        if not left or self.holder.other_choice(left[0], self.questions[0]):
            self.notes.append(
                "a token's experts depend on the others of its batch, and not as selectors sinkhorn and expert_choice "
                "have it"
            )
            return []
        return left

    def _varying(self, found: list[Law], sizes: dict[str, Any]) -> list[Guess]:
        """Selectors threshold and top_p, with the number that decides; a note says how far it is known."""
        free = [question for question in self.questions if question.bias_E is None]
        named = {}
        for spec, sentence in varying([law.fields for law in found[:6]], sizes, free, self.ask):
            named.setdefault(spec, sentence)
        if not named:
            self.notes.append("tokens have different numbers of experts, and not by a threshold or a share of scores")
            return []
        left = self.holder.fewest([Guess(spec=spec) for spec in named], self.questions)
        # A number that is short says more than its law.
        left = sorted(left, key=lambda guess: len(f"{guess.spec.threshold:g}{guess.spec.top_p or 0:g}"))
        if self.box.takes_bias:
            left = self._biased(left)
        self.between = {guess.spec: named[guess.spec] for guess in left}
        return left

    def _possible(self, values: Iterable[dict[str, Any]]) -> list[Guess]:
        """Guesses of what are valid specs."""
        found = []
        for each in values:
            with suppress(ValueError):
                found.append(Guess(spec=RouterSpec(**each)))
        return found

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

    def _sparsemixer(self, sizes: dict[str, Any]) -> Guess | None:
        """A band below the best expert, whose width is searched for; None where nothing is banded."""
        C = self.box.columns

        def pair(gaps: np.ndarray) -> np.ndarray:
            """(T,) whether the second best counts beside the best, which is 1."""
            logits_TC = np.tile(-50.0 - 40.0 * np.arange(C), (len(gaps), 1)).astype(np.float64)
            logits_TC[:, 0], logits_TC[:, 1] = 1.0, 1.0 - gaps
            question = self.ask(logits_TC, plain=True)
            if question is None or len(question.logits_TC) != len(gaps):
                return np.zeros(0, bool)
            best_TK = question.expert_ids_TK == 0
            weights_T = np.where(best_TK, question.weights_TK, 0).sum(axis=-1)
            return weights_T < 0.9 * weights_T.max(initial=0)

        gaps, inside = np.geomspace(1e-4, 0.95, 60), np.zeros(0, bool)
        for _ in range(3):
            inside = pair(gaps)
            if not (len(inside) and inside[0] and not inside[-1]):
                return None
            at = int(np.argmin(inside))
            gaps = np.linspace(gaps[at - 1], gaps[at], 60)
        measured = float(gaps.mean()) / 2
        scale = float(np.median(self.law_data[0].weights_TK.max(axis=-1)))
        nice = [round(measured, n) for n in (2, 3, 4, 5) if abs(round(measured, n) / measured - 1) < 2e-3]
        scales = near_numbers("route_scale", scale, 1e-3)
        banded = {"selector": "sparsemixer", "select_by": "logit", "mixer_eps": [*nice, measured][0]}
        spec = RouterSpec.from_dict(sizes | banded | {"route_scale": [*scales, scale][0]})
        return Guess(spec=spec, bias_used=False)

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

    # the end

    def _concluded(self, guesses: list[Guess]) -> Identity:
        """What is left, and what could not be told apart from it."""
        best = guesses[0]  # of the law that explains the weights best
        best = Guess(spec=self.normal(best)[0], bias_used=best.bias_used)
        if not self._wrong(best):
            self._confirm(best)
        wrong = self._wrong(best)
        near = [best] if not wrong else nearest(self.holder, guesses[:MOST_OPEN], self.questions)
        if wrong:
            best, wrong = near[0], self._wrong(near[0])
        else:
            best = self._exact(best)
        found = Identity(box=self.box, guess=best, near=near, wrong=wrong, questions=self.questions, notes=self.notes)
        if found.fits:
            bounded = best.spec.replace(router_dtype=self.router_dtype)
            self.notes += [self.between[bounded]] if bounded in self.between else []
            if self.box.takes_bias and not best.bias_used and best.spec.takes_bias:
                self.notes.append("it takes a bias, which changes nothing")
            if best.spec.router_dtype == "float64":
                guesses = [Guess(spec=g.spec.replace(router_dtype="float64"), bias_used=g.bias_used) for g in guesses]
            found.open = neighbours(self, best, guesses)
        return found

    def _confirm(self, best: Guess) -> None:
        """Fresh inputs of every kind, with learned factors and a bias where they are taken."""
        for logits_TC, bias_E in self.inputs():
            self.ask(logits_TC[::12], bias_E)
        for centre in (-60.0, 30.0):
            self.ask(self.logits(centre, 3.0, 4))

    def _wrong(self, guess: Guess) -> list[tuple[Question, int]]:
        return [(question, t) for question in self.questions for t in self.holder.wrong(guess, question)]
