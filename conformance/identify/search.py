"""conformance, identify: the search. From the answers of a box to the spec that explains them.

    what the choice reads -> the law of the weights -> the choice -> telling apart -> neighbours -> an Identity

Legend: T tokens, C columns, E choices, K top_k.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from conformance.core.subject import Subject
from conformance.identify import reading
from conformance.identify.apart import MOST_OPEN, normal_of, told_apart
from conformance.identify.asking import Asking
from conformance.identify.band import sparsemixer
from conformance.identify.box import Box, Question
from conformance.identify.choice import Guess, groupings, prefiltered, quotas
from conformance.identify.counts import has_unused, of_batch, varying
from conformance.identify.law import FITS, Data, Law, laws, rankings
from conformance.identify.near import nearest
from conformance.identify.neighbours import Open, open_neighbours
from conformance.identify.rounding import as_held, exact, nearest_first
from moe_ref import RouterSpec
from moe_ref.rounding import NARROW

MOST_LAWS = 6
"""Laws of which choices are tried, the best first."""


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
    return _Search(Asking(subject, handed)).run()


class _Search:
    def __init__(self, asking: Asking):
        self.asking, self.box, self.holder = asking, asking.box, asking.holder
        self.law_data: list[Question] = []
        """The answers whose weights tell the law."""
        self.sizes: dict[str, Any] = {}
        """Fields of the spec that are known before the law: sizes, learned_scale, router_dtype."""
        self.between: dict[RouterSpec, str] = {}
        """Of a spec with a number that was bounded: how far it is known."""

    @property
    def num_choices(self) -> int:
        return self.sizes["num_experts"] + self.sizes["num_null_experts"]

    def run(self) -> Identity:
        """The search."""
        asking, box, told = self.asking, self.box, self.box.handed
        if box.top_k != told.top_k:
            asking.notes.append(f"top_k is told to be {told.top_k}; it returns {box.top_k} experts for each token")
        num_experts, num_null, num_shared, kind = reading.columns(asking)
        self.sizes = {"num_experts": num_experts, "top_k": box.top_k, "num_null_experts": num_null, "null_kind": kind}
        self.sizes |= {"num_scored_shared_experts": num_shared, "learned_scale": box.learned_scale}
        self._ask_for_weights()
        selector = reading.selector(asking, self.law_data[0], self.num_choices)
        ranks = selector == "top_k"
        ranks_some = ranks and box.top_k < self.num_choices
        self.sizes["router_dtype"] = reading.router_dtype(asking, self.law_data, ranks_some=ranks_some)
        guesses = self._ranked() if ranks else self._unranked(selector)
        guesses = nearest_first(guesses, self.law_data, box.dtype, self.sizes["router_dtype"])
        return self._concluded(told_apart(asking, guesses))

    def _ask_for_weights(self) -> None:
        """Logits of every size, without a bias and with learned factors of 1."""
        for centre, width, T in (
            (0.0, 2.0, 10), (0.0, 0.5, 5), (0.0, 8.0, 6), (-38.0, 6.0, 10), (-16.0, 6.0, 8), (14.0, 4.0, 3),
        ):  # fmt: skip
            if (question := self.asking.ask(self.asking.logits(centre, width, T), plain=True)) is not None:
                self.law_data.append(question)

    # the law of the weights

    def _laws(self, questions: list[Question]) -> list[Law]:
        data = Data.of(questions, self.num_choices, self.sizes["num_experts"])
        return laws(as_held(data, self.sizes["router_dtype"]))

    def _with_small(self, found: list[Law]) -> list[Law]:
        """The laws again, with scores so small that an eps shows: how low the logits have to be, the laws say."""
        depths = {"sigmoid": (26.0, 40.0, 58.0), "sqrtsoftplus": (45.0, 65.0, 80.0)}
        asked = {(law.fields.get("score_func", ""), law.fields.get("logit_scale", 1.0)) for law in found[:4]}
        for score_func, scale in sorted(asked):
            for depth in depths.get(score_func, ()):
                question = self.asking.ask(self.asking.logits(-depth / scale, 3.0 / scale, 4), plain=True)
                if question is not None:
                    self.law_data.append(question)
        return _unless_worse(self._laws(self.law_data), found)

    def _with_buried(self, found: list[Law]) -> list[Law]:
        """The laws again, with experts of low scores that a bias makes chosen: only there a softmax shows an eps."""
        K, C, rng = self.box.top_k, self.box.columns, self.asking.rng
        buried = []
        for depth in (12.0, 26.0, 46.0):
            logits_TC = np.zeros((4, C)) + rng.normal(0, 0.1, (4, C))
            logits_TC[:, :K] -= depth + rng.uniform(0, 6, (4, K))
            question = self.asking.ask(logits_TC, np.where(np.arange(self.num_choices) < K, 200.0, 0.0), plain=True)
            if question is not None:
                buried.append(question)
        return _unless_worse(self._laws([*self.law_data, *buried]), found)

    # the choice

    def _unranked(self, selector: str) -> list[Guess]:
        """The guesses of a selector that looks at no logit."""
        found = self._with_small(self._laws(self.law_data))
        return [
            Guess(
                spec=RouterSpec(**self.sizes, **law.fields, selector=selector, select_by=rankings(law.fields)[0]),
                bias_used=False,
            )
            for law in found[:MOST_LAWS]
        ]

    def _ranked(self) -> list[Guess]:
        """The guesses that rank scores or logits."""
        box, asking = self.box, self.asking
        reads_batch = reading.reads_batch(asking, self.law_data[0])
        varies = has_unused(asking.questions)
        # Gaps of narrow logits are too coarse to search a band by.
        if box.dtype not in NARROW and reading.constant_weights(self.law_data[:3]):
            banded = sparsemixer(asking.ask, box.columns, self.law_data[0], self.sizes)
            if banded is not None:
                return [banded]
        found = self._with_small(self._laws(self.law_data))
        if box.takes_bias and not varies:
            found = self._with_buried(found)
        shapes = [law.fields for law in found[:MOST_LAWS]]
        own = self._of_batch(shapes) if reads_batch else self._varying(shapes) if varies else []
        return own or self._choosing(shapes)

    def _of_batch(self, shapes: list[dict[str, Any]]) -> list[Guess]:
        """Selectors that read the batch; none, and a note, where it is read otherwise."""
        asking = self.asking
        guesses = of_batch(shapes, self.sizes, asking.aside, lambda T: asking.logits(0.0, 2.0, T))
        left = self.holder.fewest(guesses, asking.questions)
        if left and not self.holder.other_choice(left[0], asking.questions[0]):
            return left
        asking.notes.append(
            "a token's experts depend on the others of its batch, and not as selectors sinkhorn and expert_choice have "
            "it"
        )
        return []

    def _varying(self, shapes: list[dict[str, Any]]) -> list[Guess]:
        """Selectors of as many experts as a token needs; none, and a note, where their number is another matter."""
        asking = self.asking
        self.between = dict(varying(shapes, self.sizes, asking.without_bias, asking.ask))
        left = self.holder.fewest([Guess(spec=spec) for spec in self.between], asking.questions)
        # A number that is short says more than its law.
        left = sorted(left, key=lambda guess: len(f"{guess.spec.threshold:g}{guess.spec.top_p or 0:g}"))
        if left:
            return self._biased(left) if self.box.takes_bias else left
        asking.notes.append("tokens have different numbers of experts, and not by a threshold or a share of scores")
        return []

    def _choosing(self, shapes: list[dict[str, Any]]) -> list[Guess]:
        """The guesses of top_k experts, with groups or without, that choose as the box does, or nearly."""
        free = self.asking.without_bias
        left = self.holder.best(self._ungrouped(shapes), free)
        if any(self.holder.other_choice(left[0], question) for question in free):
            left = self.holder.fewest([*left, *self._grouped(shapes, free)], free)
        return self._biased(left) if self.box.takes_bias else left

    def _ungrouped(self, shapes: list[dict[str, Any]]) -> list[Guess]:
        return [
            Guess(spec=RouterSpec(**self.sizes, **shape, select_by=by)) for shape in shapes for by in rankings(shape)
        ]

    def _grouped(self, shapes: list[dict[str, Any]], free: list[Question]) -> list[Guess]:
        """With groups, where groups are possible."""
        num_experts, K = self.sizes["num_experts"], self.sizes["top_k"]
        if self.sizes["num_null_experts"]:
            return []
        hard = max(free, key=lambda question: len(question.logits_TC))
        guesses = [
            Guess(spec=base.spec.replace(**groups, mask_fill=fill))
            for base in self._ungrouped(shapes)
            for groups in groupings(num_experts, K)
            for fill in ((-np.inf, 0.0) if base.spec.select_by == "logit" else (-np.inf,))
        ]
        shared_out = [
            Guess(spec=base.spec.replace(**shares), bias_used=False)
            for base in self._ungrouped(shapes)
            for shares in quotas(num_experts, K)
        ]
        # Of a router that fits nothing, what is published is nearer than quotas, which are rare.
        fitting = [guess for guess in shared_out if not any(self.holder.other_choice(guess, each) for each in free)]
        return [*self.holder.best(prefiltered(guesses, hard), free), *fitting]

    def _biased(self, left: list[Guess]) -> list[Guess]:
        """The guesses again, with what a bias alone shows: whether it counts, and what dropped experts are given."""
        asking, more = self.asking, list(left)
        for guess in left:
            if guess.spec.num_expert_groups is not None:
                more += [
                    Guess(spec=guess.spec.replace(mask_fill=0.0, weights_from=source))
                    for source in ("scores", "masked_scores")
                ]
        more += [replace(guess, bias_used=False) for guess in left]
        before = len(asking.questions)
        for centre, width in ((0.0, 0.5), (-1.5, 0.3), (2.0, 0.3), (0.0, 3.0)):
            asking.ask(asking.logits(0.0, 2.0, 8), asking.rng.normal(centre, width, self.num_choices))
        return self.holder.fewest(more, asking.questions[before:])

    # the end

    def _concluded(self, guesses: list[Guess]) -> Identity:
        """What is left, and what could not be told apart from it."""
        asking, box = self.asking, self.box
        best = guesses[0]  # of the law that explains the weights best
        best = replace(best, spec=normal_of(asking, best)[0])
        if not asking.wrong(best):
            self._confirm()
        wrong, near = asking.wrong(best), [best]
        if wrong:
            near = nearest(self.holder, guesses[:MOST_OPEN], asking.questions)
            best, wrong = near[0], asking.wrong(near[0])
        elif self.sizes["router_dtype"] not in NARROW and best.spec.selector != "random":
            best = exact(best, asking.questions, box.dtype)
        found = Identity(box=box, guess=best, near=near, wrong=wrong, questions=asking.questions, notes=asking.notes)
        if found.fits:
            bounded = best.spec.replace(router_dtype=self.sizes["router_dtype"])
            found.notes += [self.between[bounded]] if bounded in self.between else []
            if box.takes_bias and not best.bias_used and best.spec.takes_bias:
                found.notes.append("it takes a bias, which changes nothing")
            if best.spec.router_dtype == "float64":
                guesses = [replace(each, spec=each.spec.replace(router_dtype="float64")) for each in guesses]
            found.open = open_neighbours(asking, best, guesses)
        return found

    def _confirm(self) -> None:
        """Fresh inputs of every kind, with learned factors and a bias where they are taken."""
        asking = self.asking
        for logits_TC, bias_E in asking.inputs(biased=self.box.takes_bias):
            asking.ask(logits_TC[::12], bias_E)
        for centre in (-60.0, 30.0):
            asking.ask(asking.logits(centre, 3.0, 4))


def _unless_worse(again: list[Law], found: list[Law]) -> list[Law]:
    """The laws of more answers, but for those that explain none of them together."""
    return again if again[0].residual <= max(FITS, 2 * found[0].residual) else found
