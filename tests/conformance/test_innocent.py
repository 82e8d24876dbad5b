"""tests of the judge: what is right is never accused, in whatever style it is right."""

from dataclasses import replace
from functools import wraps

import numpy as np
import pytest

from conformance.core.check import CHECKS
from conformance.core.fault import rounded
from conformance.core.judge import Judge
from conformance.core.register import REQUIREMENTS, stage_order
from conformance.core.rounding import TINY
from conformance.core.subject import Subject
from conformance.core.trial import accuse
from conformance.router.case import RouterCase
from conformance.run import kinds  # noqa: F401  (its chapters register)
from conformance.subjects.reference import Reference
from moe_ref import UNUSED, RouterSpec, routing
from moe_ref.routing import normalise, scale_weights, weigh

SEEDS = (0, 1)
ROUTING = [name for name in sorted(CHECKS, key=stage_order) if CHECKS[name].method in ("configure", "gate", "route")]
MUST = frozenset(name for name, requirement in REQUIREMENTS.items() if requirement.level == "MUST")
SHOULD = frozenset(REQUIREMENTS) - MUST


class Float64(Reference):
    """The oracle itself."""

    compute_dtype = "float64"


class Closed(Reference):
    """Ids and weights alone."""

    @wraps(Reference.route)
    def route(self, logits_TE, spec, expert_bias_E, **inputs):
        found = super().route(logits_TE, spec, expert_bias_E, **inputs)
        return replace(found, scores_TE=None, group_ids_TL=None)


class Shuffled(Closed):
    """Slots in an order that depends on the token alone, where the selector leaves it free; ids of int32, weights of
    float64."""

    @wraps(Reference.route)
    def route(self, logits_TE, spec, expert_bias_E, **inputs):
        found = super().route(logits_TE, spec, expert_bias_E, **inputs)
        ids_TK, weights_TK = found.expert_ids_TK, found.weights_TK
        if spec.selector == "top_k":
            keys_TK = (ids_TK * 7919 + ids_TK.sum(axis=1, keepdims=True) * 31) % 101
            order_TK = np.argsort(keys_TK, axis=1, kind="stable")
            ids_TK, weights_TK = (np.take_along_axis(v, order_TK, 1) for v in (ids_TK, weights_TK))
        return replace(found, expert_ids_TK=ids_TK.astype(np.int32), weights_TK=weights_TK.astype(np.float64))


class HighestIdWins(Closed):
    """Of equal experts, and of equal groups, the higher id."""

    @wraps(Reference.route)
    def route(self, logits_TE, spec, expert_bias_E, **inputs):
        def top_k(scores_TE, k):
            return scores_TE.shape[1] - 1 - np.argsort(-scores_TE[:, ::-1], axis=-1, kind="stable")[:, :k]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(routing, "top_k", top_k)
            return super().route(logits_TE, spec, expert_bias_E, **inputs)


class NoisyRanking(Closed):
    """Choice scores off by up to two roundings, the same ones for the same score: near ties fall otherwise."""

    @wraps(Reference.route)
    def route(self, logits_TE, spec, expert_bias_E, **inputs):
        clean = routing.bias_choice

        def bias_choice(scaled_logits_TE, scores_TE, expert_bias_E, spec):
            choice_TE = clean(scaled_logits_TE, scores_TE, expert_bias_E, spec)
            if spec.select_by == "logit":
                return choice_TE
            bits_TE = scores_TE.astype(np.float32).view(np.uint32)
            noise_TE = ((bits_TE * np.uint32(2654435761)) >> np.uint32(30)).astype(np.float32) - 1.5
            return choice_TE + noise_TE * np.float32(2**-23) * scores_TE

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(routing, "bias_choice", bias_choice)
            return super().route(logits_TE, spec, expert_bias_E, **inputs)


class ScaledFirst(Closed):
    """Weights by another route: logarithms, the slots summed backwards, the scale over the norm multiplied once."""

    @wraps(Reference.route)
    def route(self, logits_TE, spec, expert_bias_E, **inputs):
        def other_normalise(raw_TK, shared_TS, spec):
            if not spec.route_norm or spec.norm_p != 1 or spec.norm_form != "add_eps" or spec.norm_with_shared:
                return normalise(raw_TK, shared_TS, spec)
            total_T1 = np.zeros_like(raw_TK[:, :1])
            for k in reversed(range(spec.top_k)):
                total_T1 = total_T1 + raw_TK[:, k : k + 1]
            divisor_T1 = total_T1 + raw_TK.dtype.type(spec.norm_eps)
            # Below this there are no float32 numbers of full accuracy, and 1 / divisor overflows soon.
            return raw_TK * (1 / np.where(divisor_T1 < TINY["float32"], np.inf, divisor_T1)), shared_TS

        def other_weigh(z_TE, scores_TE, ids_TK, spec):
            raw_TK = weigh(z_TE, scores_TE, ids_TK, spec)
            return np.where(ids_TK == UNUSED, 0, np.exp(np.log(np.maximum(raw_TK, 1e-45)))) * (raw_TK > 0)

        def other_scale(weights_TK, ids_TK, learned, spec):
            return spec.route_scale * scale_weights(weights_TK, ids_TK, learned, spec.replace(route_scale=1.0))

        with pytest.MonkeyPatch.context() as patch, np.errstate(under="ignore"):
            for name, made in (("weigh", other_weigh), ("normalise", other_normalise), ("scale_weights", other_scale)):
                patch.setattr(routing, name, made)
            return super().route(logits_TE, spec, expert_bias_E, **inputs)


class Uint8Ids(Closed):
    """Ids of uint8, where no slot is unused."""

    def supports(self, spec, layout=None):
        if spec.num_choices > 256:
            return "an id of 8 bits is at most 255"
        return None if spec.fills_slots else "unused slots have no unsigned id"

    def route(self, logits_TE, spec, expert_bias_E, *, learned_scale=None, token_ids_T=None, table_VK=None, seed=None):
        named = {"learned_scale": learned_scale, "token_ids_T": token_ids_T, "table_VK": table_VK, "seed": seed}
        inputs = {name: value for name, value in named.items() if value is not None}
        found = super().route(logits_TE, spec, expert_bias_E, **inputs)
        return replace(found, expert_ids_TK=found.expert_ids_TK.astype(np.uint8))


INNOCENT: dict[type[Subject], frozenset[str]] = {
    Reference: frozenset(),
    Float64: frozenset(),
    Shuffled: frozenset({"SEL-6"}),
    HighestIdWins: frozenset({"GRP-4", "SEL-5", "SEL-6", "SEL-24", "SEL-35"}),
    NoisyRanking: frozenset({"SEL-6", "SEL-24", "SEL-35"}),
    ScaledFirst: frozenset(),
    Uint8Ids: frozenset(),
}
"""Each with the SHOULDs that it does not keep."""


@pytest.mark.parametrize("subject", INNOCENT, ids=lambda subject: subject.__name__)
def test_what_is_right_is_not_accused(subject):
    judge = Judge(subject())
    assert INNOCENT[subject] <= SHOULD
    for seed in SEEDS:  # of the cases that are drawn; the fixed ones are tried once
        accused = accuse(judge, seed=seed, examples=8, ids=ROUTING)
        wrong = {name: (str(v), v.expected, v.received) for name, v in accused.items()}
        assert accused.keys() <= INNOCENT[subject], wrong
    if subject is Reference:
        assert [name for name in ROUTING if judge.ledger[name].judged == 0] == []


@pytest.mark.parametrize("subject", [Shuffled, HighestIdWins], ids=lambda subject: subject.__name__)
def test_the_shoulds_that_are_not_kept_are_noticed(subject):
    ids = sorted(INNOCENT[subject])
    assert accuse(Judge(subject()), seed=0, ids=ids).keys() == set(ids)


class UndefinedWithoutALogit(Closed):
    """Weights of given ids are NaN where all their experts are masked: a softmax of no finite logit."""

    @wraps(Reference.route)
    def route(self, logits_TE, spec, expert_bias_E, **inputs):
        found = super().route(logits_TE, spec, expert_bias_E, **inputs)
        chosen_TK = np.take_along_axis(np.asarray(logits_TE), np.maximum(found.expert_ids_TK, 0), axis=-1)
        masked_T1 = np.isneginf(np.where(found.expert_ids_TK == UNUSED, -np.inf, chosen_TK)).all(axis=-1, keepdims=True)
        undefined_TK = masked_T1 & (found.expert_ids_TK != UNUSED) & (spec.score_over == "selected")
        return replace(found, weights_TK=np.where(undefined_TK, np.nan, found.weights_TK))


def test_weights_of_masked_experts_alone_are_of_no_finite_logit():
    spec = RouterSpec(num_experts=4, top_k=2, selector="given", score_over="selected", select_by="logit")
    logits_TE, given_ids_TK = np.array([[-np.inf, -np.inf, 1.0, 0.0]]), np.array([[0, 1]])
    case = RouterCase(spec=spec, logits_TE=logits_TE, inputs={"given_ids_TK": given_ids_TK})
    judge = Judge(UndefinedWithoutALogit())
    assert np.isnan(judge.subject.route(logits_TE, spec, None, given_ids_TK=given_ids_TK).weights_TK).all()
    for check in (CHECKS["WGT-10"], CHECKS["WGT-17"]):
        assert check.wants(case)
        judge.run(check, case)


class InBfloat16(Closed):
    """A router that takes bfloat16 alone, says that it computes in it, and scores in it."""

    logit_dtypes = ("bfloat16",)
    compute_dtype = "bfloat16"

    @wraps(Reference.route)
    def route(self, logits_TE, spec, expert_bias_E, **inputs):
        clean = routing.score
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(routing, "score", lambda scaled_TE, spec: rounded(clean(scaled_TE, spec), 8))
            return super().route(logits_TE, spec, expert_bias_E, **inputs)


def test_a_router_that_says_it_is_coarse_is_advised_all_the_same():
    found = accuse(Judge(InBfloat16()), ids=["SCR-8", "SCR-10"])
    assert found.keys() == {"SCR-8"}
