"""tests of the judge: a subject with nothing but `layer` is accused of every fault of a router that it betrays."""

from dataclasses import fields

import numpy as np
import pytest

import moe_ref
from conformance.core.check import CHECKS
from conformance.core.fault import Fault, patched
from conformance.core.judge import Judge, Violation
from conformance.core.register import REQUIREMENTS
from conformance.core.subject import Subject
from conformance.core.trial import accuse
from conformance.layer.kind import LAYER
from conformance.layer.verdicts import output_of_subject
from conformance.router.kind import ROUTER
from conformance.run.kinds import load_faults
from moe_ref import RouterInputs
from moe_ref.routing import gate, route
from moe_ref.specs.inputs import NO_INPUTS

FAULTS = {
    name: fault for name, fault in load_faults().items() if fault.kind is ROUTER and fault.method in ("route", "gate")
}
ORDER = "the order of the slots does not show in a sum"
TIES = "which of two equal scores wins is a SHOULD"
MASKED = "a gate gives no logit of -inf"
NAN = "what the row of a NaN selects is free"
SMALL = "the routers of layers have fewer experts, groups and tokens"
OWN_LOGITS = "a layer makes its logits itself, in float32"
WIDE = "the routers of layers are of float32"
NO_NOISE = "a layer is given no noise"
NOT_EVENED = "no router of a layer evens the batch"
FEW_TAKEN = "the experts of layers that take tokens have none at least, and no padding"
UNUSED_SLOT = "a slot of no expert adds nothing, whatever its id and weight"
SILENT = {
    "ties-fall-as-they-come": TIES,
    "ties-to-the-higher": TIES,
    "group-ties-to-the-higher": TIES,
    "weights-by-atomics": "outputs that differ by a rounding from call to call are a SHOULD",
    "results-share-a-buffer": "a layer reads what its router returns before it routes again",
    "nan-rows-repeat-expert-0": NAN,
    "nan-rows-out-of-range": NAN,
    "nan-rows-minus-one": NAN,
    "nan-dropped-and-an-expert-repeated": NAN,
    "padding-keeps-weights": UNUSED_SLOT,
    "skipped-choices-become-expert-0": UNUSED_SLOT,
    "skipped-choices-weigh": UNUSED_SLOT,
    "bfloat16-logits-scored-in-bfloat16": OWN_LOGITS,
    "low-precision-keeps-two-bits": OWN_LOGITS,
    "low-precision-ranked-by-its-bits": OWN_LOGITS,
    "scale-missing-in-half-precision": OWN_LOGITS,
    "softmax-in-place": OWN_LOGITS,
    "masked-logits-cleaned-in-place": MASKED,
    "bias-in-the-weights-of-masked-rows": MASKED,
    "infinite-rows-keep-a-weight": MASKED,
    "infinite-rows-repeat-expert-0": MASKED,
    "infinite-rows-spread": MASKED,
    "at-most-four-groups-kept": SMALL,
    "rows-past-65535-not-written": SMALL,
    "softmax-of-the-first-256-experts": SMALL,
    "ties-by-the-place-in-the-batch": TIES,
    "masked-logits-scored-as-0": MASKED,
    "cap-lifts-masked-logits": MASKED,
    "selected-by-a-product": MASKED,
    "masked-logits-read-as-0": MASKED,
    "bias-lifts-masked-logits": MASKED,
    "slots-by-id": ORDER,
    "slots-ascending": ORDER,
    "sparsemixer-slots-swapped": ORDER,
    "quotas-are-listed-group-by-group": ORDER,
    "used-slots-are-in-order-of-id": ORDER,
    "slots-left-unused-are-expert-0": UNUSED_SLOT,
    "unused-slots-keep-a-weight": UNUSED_SLOT,
    "the-threshold-itself-is-above-it": "an expert whose relu score is 0 adds nothing",
    "narrow-router-keeps-wide-logits": WIDE,
    "narrow-router-rounds-logits-alone": WIDE,
    "router-dtype-is-ignored": WIDE,
    "router-of-float64-computes-in-float32": WIDE,
    "noise-before-its-factors": NO_NOISE,
    "noise-is-ignored": NO_NOISE,
    "sinkhorn-evens-each-half": NOT_EVENED,
    "sinkhorn-evens-padding-too": NOT_EVENED,
    "sinkhorn-is-not-evened": NOT_EVENED,
    "sinkhorn-stops-after-one-round": NOT_EVENED,
    "the-least-number-is-forgotten": FEW_TAKEN,
    "each-token-has-one-expert-in-the-mean": SMALL,
    "padding-is-counted": FEW_TAKEN,
    "padding-has-a-place": FEW_TAKEN,
    "of-equal-tokens-the-last-is-taken": TIES,
    "a-logit-of-minus-infinity-is-taken": MASKED,
    "takers-are-listed-by-id": ORDER,
    "each-expert-has-its-own-slot": ORDER,
    "random-follows-the-logits": "what is drawn at random cannot be foreseen",
    "seed-ignored": "what is drawn at random cannot be foreseen",
}
"""Faults of a router that no output of a layer betrays, and why."""
EVERY = 4
"""So many silent faults share the cases of LAY-17."""
OTHERS = ("LAY-1", "LAY-2", "LAY-3", "LAY-5", "LAY-6", "LAY-7")


class LayerAlone(Subject):
    """The reference's layer with a fault in its router; it has no other method."""

    def __init__(self, fault: Fault):
        self.fault, self.name, self.memory = fault, fault.name, {}

    def layer(
        self, x_TD, params, spec, *, token_mask_T=None, token_ids_T=None, table_VK=None, given_ids_TK=None,
        given_weights_TK=None, seed=None,
    ):  # fmt: skip
        inputs = RouterInputs(
            token_ids_T=token_ids_T, table_VK=table_VK, given_ids_TK=given_ids_TK, given_weights_TK=given_weights_TK,
            seed=seed,
        )  # fmt: skip
        with patched({"route": self.route_of_layer, "routing.gate": self.gate_of_layer}):
            how = {"token_mask_T": token_mask_T, "inputs": inputs, "dtype": self.compute_dtype}
            return moe_ref.moe_layer(x_TD, params, spec, **how).output_TD

    def route_of_layer(self, logits_TE, spec, *, expert_bias_E=None, inputs=NO_INPUTS, dtype=np.float64, **more):
        def clean(logits_TE, spec, expert_bias_E, **named):
            how = RouterInputs.keywords(named)
            return route(logits_TE, spec, expert_bias_E=expert_bias_E, dtype=dtype, **how)

        if self.fault.method != "route":
            return clean(logits_TE, spec, expert_bias_E, inputs=inputs, **more)
        given = {f.name: getattr(inputs, f.name) for f in fields(inputs)} | more
        given = {name: value for name, value in given.items() if value is not None}
        return self.fault.run(clean, self.memory, logits_TE, spec, expert_bias_E, **given)

    def gate_of_layer(self, x_TD, gate_ED, gate_bias_E=None, *, dtype=np.float64):
        def clean(x_TD, gate_ED, gate_bias_E):
            return gate(x_TD, gate_ED, gate_bias_E, dtype=dtype)

        if self.fault.method != "gate":
            return clean(x_TD, gate_ED, gate_bias_E)
        return self.fault.run(clean, self.memory, x_TD, gate_ED, gate_bias_E)


@pytest.fixture(scope="module")
def routed_cases() -> list:
    """Made once: their reference is kept."""
    return list(LAYER.fixed(Judge(LayerAlone(next(iter(FAULTS.values())))), CHECKS["LAY-17"]))


def accused_by(judge: Judge, cases: list, *, ids: tuple[str, ...] = OTHERS) -> str | None:
    """The requirement that accuses a subject first: by the cases, or of these ids."""
    check = CHECKS["LAY-17"]
    for case in cases:
        try:
            judge.run(check, case)
        except Violation as violation:
            return judge.blame(check, violation).requirement
    return next(iter(accuse(judge, ids=ids, examples=6, first=True)), None)


def test_the_list_names_faults():
    assert SILENT.keys() <= FAULTS.keys()


@pytest.mark.parametrize("name", sorted(FAULTS.keys() - SILENT.keys()))
def test_a_layer_alone_betrays_a_wrong_router(name, routed_cases):
    found = accused_by(Judge(LayerAlone(FAULTS[name])), routed_cases)
    assert found is not None
    assert (REQUIREMENTS[found].level, REQUIREMENTS[found].stage) == ("MUST", "layer")


@pytest.mark.parametrize("name", sorted(SILENT))
def test_what_no_output_betrays_is_accused_by_no_must(name, routed_cases):
    # Other ones for each fault: together all of them.
    place = sorted(SILENT).index(name)
    some, one = routed_cases[place % EVERY :: EVERY], (OTHERS[place % len(OTHERS)],)
    assert accused_by(Judge(LayerAlone(FAULTS[name])), some, ids=one) is None


def test_no_must_accuses_a_weight_that_is_no_number_where_every_selected_score_underflows(routed_cases):
    judge = Judge(LayerAlone(FAULTS["zero-over-zero"]))
    by_score = [case for case in routed_cases if case.spec.router.selector == "top_k"]
    assert not all(np.isfinite(output_of_subject(judge, case)).all() for case in by_score)
    assert accused_by(judge, by_score, ids=()) is None
    # Of given experts, and those of a table, ordinary logits underflow.
    others = [case for case in routed_cases if case.spec.router.selector != "top_k"]
    assert accused_by(judge, others, ids=()) == "LAY-17"
