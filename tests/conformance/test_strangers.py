"""tests of the judge: routers as other people write them, right ones and wrong ones, without a line of moe_ref."""

import heapq

import numpy as np
import pytest

from conformance.core.check import CHECKS
from conformance.core.judge import Judge
from conformance.core.register import REQUIREMENTS, stage_order
from conformance.core.subject import Routing, Subject
from conformance.core.trial import accuse
from conformance.run import kinds  # noqa: F401  (its chapters register)

# A router that sorts its ids is accused of weights in the wrong slots before it is advised on the order of slots.
MUST_FIRST = sorted(
    (name for name in CHECKS if CHECKS[name].method == "route"),
    key=lambda name: (REQUIREMENTS[name].level, *stage_order(name)),
)


class Stranger(Subject):
    """A router with score functions, groups, bias, norm and scale, in plain NumPy; a mistake overrides one method."""

    def supports(self, spec, layout=None):
        plain = spec.selector == "top_k" and spec.score_over == "all" and spec.select_by == "score"
        plain = plain and spec.weights_from == "scores" and spec.mask_fill != 0 and spec.norm_p == 1
        plain = plain and spec.norm_form == "add_eps" and spec.learned_scale == "none"
        plain = plain and not spec.scales_logits and spec.router_dtype == "float32"
        alone = spec.num_null_experts == 0 and spec.num_scored_shared_experts == 0
        return None if plain and alone else "not one of the models that we serve"

    def route(self, logits_TE, spec, expert_bias_E):
        logits = logits_TE.astype(np.float32)
        bias = np.zeros(spec.num_experts, np.float32) if expert_bias_E is None else expert_bias_E
        with np.errstate(all="ignore"):
            scores = self.score(logits, spec)
            choice = self.biased(logits, scores, bias, spec)
            choice = np.where(np.isneginf(logits), -np.inf, choice)
            if spec.num_expert_groups:
                choice = self.mask(choice, self.kept(scores, choice, spec), spec)
            ids = self.pick(choice, scores, spec)
            weights = self.weigh(scores, choice, ids, spec)
            return Routing(expert_ids_TK=ids, weights_TK=self.scale(self.norm(weights, spec), spec))

    def score(self, logits, spec):
        if spec.score_func == "sigmoid":
            return 1 / (1 + np.exp(-logits))
        if spec.score_func == "sqrtsoftplus":
            return np.sqrt(np.maximum(logits, 0) + np.log1p(np.exp(-np.abs(logits))))
        exp = np.exp(logits - logits.max(-1, keepdims=True))
        return exp / exp.sum(-1, keepdims=True)

    def biased(self, logits, scores, bias, spec):
        return scores + bias

    def kept(self, scores, choice, spec):
        """(T, G) whether each group is kept."""
        grouped = self.grouped(choice, spec)
        best = np.sort(grouped, axis=-1)[..., ::-1][..., : spec.group_score_k].sum(-1)
        rank = np.argsort(np.argsort(-best, axis=-1, kind="stable"), axis=-1)
        return rank < spec.num_limited_groups

    def grouped(self, choice, spec):
        return choice.reshape(len(choice), spec.num_expert_groups, spec.num_experts // spec.num_expert_groups)

    def mask(self, choice, kept, spec):
        each = np.repeat(kept, spec.num_experts // spec.num_expert_groups, axis=1)
        return np.where(each, choice, -np.inf)

    def pick(self, choice, scores, spec):
        return np.argsort(-choice, axis=-1, kind="stable")[:, : spec.top_k]

    def weigh(self, scores, choice, ids, spec):
        return np.take_along_axis(scores, ids, axis=-1)

    def norm(self, weights, spec):
        if not spec.route_norm:
            return weights
        total = weights.sum(-1, keepdims=True) + spec.norm_eps
        return weights / np.where(total == 0, 1, total)

    def scale(self, weights, spec):
        return weights * spec.route_scale


# the right ones


class Partition(Stranger):
    """argpartition, then a sort of what it found."""

    def pick(self, choice, scores, spec):
        ids = np.argpartition(-choice, spec.top_k - 1, axis=-1)[:, : spec.top_k]
        order = np.argsort(-np.take_along_axis(choice, ids, -1), axis=-1)
        return np.take_along_axis(ids, order, -1)


class UnsortedPartition(Stranger):
    """argpartition as it comes."""

    def pick(self, choice, scores, spec):
        return np.argpartition(choice, spec.num_experts - spec.top_k, axis=-1)[:, spec.num_experts - spec.top_k :]


class LargeFiniteMask(Stranger):
    """-1e30 for -inf."""

    def mask(self, choice, kept, spec):
        each = np.repeat(kept, spec.num_experts // spec.num_expert_groups, axis=1)
        return np.where(each, choice, np.float32(-1e30))


class Heap(Stranger):
    """A heap for each token."""

    def pick(self, choice, scores, spec):
        found = [heapq.nlargest(spec.top_k, range(spec.num_experts), key=row.__getitem__) for row in choice]
        return np.array(found, dtype=np.int32).reshape(-1, spec.top_k)


class OneHot(Stranger):
    """Weights by a product with one-hot rows, the norm over all experts at once."""

    def weigh(self, scores, choice, ids, spec):
        hot = np.eye(spec.num_experts, dtype=np.float32)[ids]
        return np.einsum("tke,te->tk", hot, np.where(np.isfinite(scores), scores, 0))


class InDouble(Stranger):
    """Scores in float64."""

    def score(self, logits, spec):
        return super().score(logits.astype(np.float64), spec)


RIGHT = (Stranger, Partition, UnsortedPartition, LargeFiniteMask, Heap, OneHot, InDouble)


@pytest.mark.parametrize("subject", RIGHT, ids=lambda subject: subject.__name__)
def test_a_right_router_breaks_no_must(subject):
    must = [name for name in MUST_FIRST if REQUIREMENTS[name].level == "MUST"]
    accused = accuse(Judge(subject()), seed=4, examples=12, ids=must)
    assert {name: (str(v), v.expected, v.received) for name, v in accused.items()} == {}


# the wrong ones, each with the stage that is at fault


class ZeroMask(Stranger):
    stage = "select"

    def mask(self, choice, kept, spec):
        return np.where(np.repeat(kept, spec.num_experts // spec.num_expert_groups, axis=1), choice, 0)


class MultipliedMask(Stranger):
    stage = "select"

    def mask(self, choice, kept, spec):
        finite = np.where(np.isneginf(choice), -1e9, choice)
        return finite * np.repeat(kept, spec.num_experts // spec.num_expert_groups, axis=1)


class GroupMaximum(Stranger):
    stage = "groups"

    def kept(self, scores, choice, spec):
        return super().kept(scores, choice, spec.replace(group_score_k=1))


class GroupsByModulo(Stranger):
    stage = "groups"

    def grouped(self, choice, spec):
        size = spec.num_experts // spec.num_expert_groups
        return choice.reshape(len(choice), size, spec.num_expert_groups).swapaxes(1, 2)

    def mask(self, choice, kept, spec):
        return np.where(np.tile(kept, spec.num_experts // spec.num_expert_groups), choice, -np.inf)


class TiledMask(Stranger):
    stage = "groups"

    def mask(self, choice, kept, spec):
        return np.where(np.tile(kept, spec.num_experts // spec.num_expert_groups), choice, -np.inf)


class UnbiasedGroups(Stranger):
    stage = "groups"

    def kept(self, scores, choice, spec):
        return super().kept(scores, np.where(np.isneginf(choice), -np.inf, scores), spec)


class SoftmaxForSigmoid(Stranger):
    stage = "score"

    def score(self, logits, spec):
        return super().score(logits, spec.replace(score_func="softmax"))


class HalfPrecision(Stranger):
    stage = "score"

    def score(self, logits, spec):
        return super().score(logits, spec).astype(np.float16).astype(np.float32)


class NoMaximum(Stranger):
    stage = "score"

    def score(self, logits, spec):
        if spec.score_func != "softmax":
            return super().score(logits, spec)
        total = np.exp(logits).sum(-1, keepdims=True)
        return np.exp(np.minimum(logits, 80)) / np.where(np.isinf(total), 3e38, np.maximum(total, 1e-30))


class BiasOnLogits(Stranger):
    stage = ("groups", "select")  # which of the two a token shows first is luck

    def biased(self, logits, scores, bias, spec):
        return self.score(logits + bias, spec)


class UnbiasedPick(Stranger):
    stage = "select"

    def pick(self, choice, scores, spec):
        return super().pick(np.where(np.isneginf(choice), -np.inf, scores), scores, spec)


class IdsOfTheGroup(Stranger):
    stage = "select"

    def pick(self, choice, scores, spec):
        ids = super().pick(choice, scores, spec)
        return ids % (spec.num_experts // (spec.num_expert_groups or 1))


class BestAgain(Stranger):
    stage = "select"

    def pick(self, choice, scores, spec):
        return np.repeat(choice.argmax(-1, keepdims=True), spec.top_k, axis=1)


class BiasInWeights(Stranger):
    stage = "weights"

    def weigh(self, scores, choice, ids, spec):
        return np.take_along_axis(choice, ids, axis=-1)


class NoNorm(Stranger):
    stage = "weights"

    def norm(self, weights, spec):
        return weights


class AlwaysNorm(Stranger):
    stage = "weights"

    def norm(self, weights, spec):
        return super().norm(weights, spec.replace(route_norm=True))


class NoNormForOne(Stranger):
    stage = "weights"

    def norm(self, weights, spec):
        return weights if spec.top_k == 1 else super().norm(weights, spec)


class CommonEps(Stranger):
    stage = "weights"

    def norm(self, weights, spec):
        return super().norm(weights, spec.replace(norm_eps=1e-6))


class NormOverTokens(Stranger):
    stage = "run"

    def norm(self, weights, spec):
        return weights / weights.sum(0, keepdims=True) if spec.route_norm else weights


class ScaleTwice(Stranger):
    stage = "weights"

    def scale(self, weights, spec):
        return weights * spec.route_scale * spec.route_scale


class ScaleFirst(Stranger):
    stage = "weights"

    def norm(self, weights, spec):
        return super().norm(weights * spec.route_scale, spec)

    def scale(self, weights, spec):
        return weights


class GatheredBeforeTheSort(Stranger):
    stage = "weights"

    def route(self, logits_TE, spec, expert_bias_E):
        found = super().route(logits_TE, spec, expert_bias_E)
        return Routing(expert_ids_TK=np.sort(found.expert_ids_TK, axis=-1), weights_TK=found.weights_TK)


class WrongKth(Stranger):
    stage = "run"

    def pick(self, choice, scores, spec):
        return np.argpartition(-choice, spec.top_k, axis=-1)[:, : spec.top_k]


class LastTieWins(Stranger):
    stage = "select"

    def pick(self, choice, scores, spec):
        return spec.num_experts - 1 - np.argsort(-choice[:, ::-1], axis=-1, kind="stable")[:, : spec.top_k]


WRONG = (ZeroMask, MultipliedMask, GroupMaximum, GroupsByModulo, TiledMask, UnbiasedGroups, SoftmaxForSigmoid,
         HalfPrecision, NoMaximum, BiasOnLogits, UnbiasedPick, IdsOfTheGroup, BestAgain, BiasInWeights, NoNorm,
         AlwaysNorm, NoNormForOne, CommonEps, NormOverTokens, ScaleTwice, ScaleFirst, GatheredBeforeTheSort, WrongKth,
         LastTieWins)  # fmt: skip


@pytest.mark.parametrize("subject", WRONG, ids=lambda subject: subject.__name__)
def test_a_wrong_router_is_accused_at_its_stage_first(subject):
    accused = accuse(Judge(subject()), seed=6, examples=25, ids=MUST_FIRST, first=True)
    assert accused
    first = next(iter(accused))
    assert REQUIREMENTS[first].stage in subject.stage, f"{first}: {accused[first]}"
