"""tests of the judge: the judge of layers. What is right is never accused; bounds, cases and pages are sound."""

import json
from dataclasses import replace
from functools import wraps

import numpy as np
import pytest

from conformance.core.check import CHECKS
from conformance.core.fault import first_killer
from conformance.core.judge import Judge
from conformance.core.register import of_stage
from conformance.core.shrink import shrink
from conformance.core.subject import Subject
from conformance.core.trial import accuse
from conformance.layer import bounds
from conformance.layer.bounds import stable_T
from conformance.layer.case import LayerCase
from conformance.layer.check import LayerCheck
from conformance.layer.draw import LAYER_SPECS, THIN_LAYER_SPECS, facts, further, make_case
from conformance.layer.kind import LAYER
from conformance.layer.verdicts import wanted_gradients
from conformance.run.causes import diagnoses
from conformance.run.deviations import read_case, write_case
from conformance.run.kinds import case_of_json, load_faults
from conformance.run.report import failure_page
from conformance.subjects.reference import Reference
from moe_ref import RouterInputs, moe_layer

IDS = of_stage(*LAYER.stages)
FAULTS = {name: fault for name, fault in load_faults().items() if fault.kind is LAYER}
CHECK = LayerCheck(requirement="LAY-2", run=lambda judge, case: None, method="layer", inputs=("token_mask_T",))


def a_case(spec, seed: int = 0, **choices) -> LayerCase:
    return make_case(spec, CHECK, **({"x": "normal", "bias": "mixed", "tokens": 7, "seed": seed} | choices))


class Backwards(Reference):
    """The slots of a token summed from the last to the first, and features in another order inside an expert."""

    def experts(self, rows_RD, tokens_per_expert_E, params, spec):
        return super().experts(rows_RD, tokens_per_expert_E, turned(params), spec)

    def combine(self, rows_ND, order_N, weights_TK, spec):
        K = weights_TK.shape[1]
        turned_N = order_N // K * K + (K - 1 - order_N % K)
        return super().combine(rows_ND, turned_N, weights_TK[:, ::-1], spec)

    @wraps(Reference.layer)
    def layer(self, x_TD, params, spec, **inputs):
        return super().layer(x_TD, turned(params), spec, **inputs)


def turned(params):
    """The hidden features of the routed experts from the last to the first: the same experts, summed otherwise."""
    names = ("w_up_EDF", "w_gate_EDF", "b_up_EF", "b_gate_EF")
    found = {name: getattr(params, name) for name in names}
    changes = {name: value[..., ::-1] for name, value in found.items() if value is not None}
    return replace(params, w_down_EFD=params.w_down_EFD[:, ::-1], **changes)


class Bfloat16(Reference):
    """Experts that read and return bfloat16 numbers, and say so."""

    expert_dtype = "bfloat16"

    def experts(self, rows_RD, tokens_per_expert_E, params, spec):
        import ml_dtypes

        def rounded(values):
            return values.astype(ml_dtypes.bfloat16).astype(np.float32)

        return rounded(super().experts(rounded(rows_RD), tokens_per_expert_E, params, spec))


HOW = {"seed": 0, "examples": 24}


def not_accused(judge: Judge) -> None:
    accused = accuse(judge, ids=IDS, **HOW)
    assert {name: (str(v), v.expected, v.received) for name, v in accused.items()} == {}
    assert {name for name in IDS if judge.ledger[name].judged == 0} == set()


@pytest.mark.parametrize("subject", [Backwards, Bfloat16], ids=lambda subject: subject.__name__)
def test_what_is_right_is_not_accused(subject):
    not_accused(Judge(subject()))


def asked_of(judge: Judge) -> dict[str, set[str]]:
    """requirement -> the methods of the subject that run for it, from now on."""
    found: dict[str, set[str]] = {name: set() for name in IDS}
    tried: list[str] = []
    judge.watch = lambda check, case: tried.append(check.requirement)
    for name in judge.capabilities:
        clean = getattr(judge.subject, name)

        @wraps(clean)
        def told(*arguments, name=name, clean=clean, **inputs):
            found[tried[-1]].add(name)
            return clean(*arguments, **inputs)

        setattr(judge.subject, name, told)
    return found


OF_ONE_METHOD = ("memory-of-the-last-call-is-read", "the-other-gelu", "an-idle-expert-gets-nan")


def test_the_reference_is_not_accused_nor_is_a_fault_of_one_method_by_any_other_stage():
    judge = Judge(Reference())
    asked = asked_of(judge)
    not_accused(judge)
    for fault in (FAULTS[name] for name in OF_ONE_METHOD):
        # Where the faulty method is not run, not one number is another than the reference's.
        others = [each for each in IDS if CHECKS[each].method != fault.method and fault.method in asked[each]]
        assert accuse(Judge(LAYER.faulty(fault)), ids=others, **HOW) == {}, fault.name
        assert {CHECKS[each].method for each in IDS if fault.method in asked[each]} >= {fault.method}


def test_every_requirement_of_these_stages_has_a_check_and_a_fault():
    assert {name for name in IDS if not isinstance(CHECKS[name], LayerCheck)} == set()
    assert {fault.requirement for fault in FAULTS.values()} == set(IDS)


def test_a_subject_without_layers_is_unsupported_and_not_ok():
    class Empty(Subject):
        """Defines nothing."""

    judge = Judge(Empty())
    assert accuse(judge, examples=3, ids=IDS) == {}
    assert {judge.ledger[name].status("MUST") for name in IDS} == {"unsupported"}


@pytest.mark.parametrize("x", ["normal", "large", "small"])
def test_balls_are_centred_on_the_reference_and_hold_what_float32_gives(x):
    for number, spec in enumerate(LAYER_SPECS):
        case = a_case(spec, seed=number, x=x)
        ball = bounds.layer(case, "float32", "float32")
        grads = bounds.gradients(case, "float32", "float32")
        np.testing.assert_allclose(ball.output_TD.centre, case.reference.output_TD, rtol=1e-9, atol=1e-9)
        wanted = wanted_gradients(case)
        assert grads.keys() == wanted.keys()
        for name, grad in grads.items():
            np.testing.assert_allclose(grad.centre, wanted[name], rtol=1e-9, atol=1e-9, err_msg=name)
            # Large where clamps and kinks are near; never so large that nothing is said.
            if name.startswith(("w_", "shared_w_")):
                assert np.median(grad.radius) <= 1e-3 * np.abs(wanted[name]).max(), name
        if stable_T(case, "float32").all():
            narrow = moe_layer(case.x_TD, case.params, spec, dtype=np.float32, **RouterInputs.keywords(case.inputs))
            assert (np.abs(narrow.output_TD - case.reference.output_TD) <= ball.output_TD.radius).all()


def test_generated_choices_are_clear_of_rounding():
    unclear = [~stable_T(a_case(spec, seed=seed), "float32") for spec in LAYER_SPECS for seed in range(4)]
    assert np.concatenate(unclear).mean() < 0.01


def test_a_choice_that_rounding_can_change_is_not_stable():
    case = a_case(LAYER_SPECS[0], bias="none").with_(inputs={})
    gate_ED = case.params.gate_ED.copy()
    gate_ED[:] = gate_ED[0]
    gate_ED[0] += 1
    assert not stable_T(case.with_params(gate_ED=gate_ED), "float32").any()


def test_every_check_finds_specs_in_both_pools():
    for name in IDS:
        for pool in (LAYER_SPECS, THIN_LAYER_SPECS):
            assert any(CHECKS[name].spec(spec) for spec in pool), name
    assert len(THIN_LAYER_SPECS) < len(LAYER_SPECS) / 2


class PlainLayers(Reference):
    """A subject that compiles, and has few of the layers that such ones are tried on."""

    compiles = True

    def supports_layer(self, spec, layout=None):
        plain = not spec.gate_bias and spec.shared is None and spec.latent is None and spec.experts.gated
        return None if plain else "it has plain layers"


def test_a_subject_that_compiles_gets_a_layer_of_its_own_for_each_that_it_lacks():
    judge = Judge(PlainLayers())
    able = [spec for spec in THIN_LAYER_SPECS if judge.subject.supports_layer(spec) is None]
    found = further(judge)
    assert 0 < len(found) <= len(THIN_LAYER_SPECS) - len(able)
    known = set().union(*map(facts, able))
    for spec in found:
        assert judge.subject.supports_layer(spec) is None
        assert facts(spec) - known, "it has what the others have not"
        known |= facts(spec)
    assert set(LAYER.settings(judge, CHECK)[0]) >= set(found)
    assert not further(Judge(Reference()))


def test_the_fixed_cases_have_every_fact_of_the_specs():
    wanted = set().union(*(facts(spec) for spec in LAYER_SPECS))
    assert set().union(*(facts(case.spec) for case in LAYER.fixed(Judge(Reference()), CHECK))) == wanted


def test_a_seed_draws_the_same_case_again():
    judge = Judge(Reference())
    drawn = [LAYER.draw(judge, CHECK, seed) for seed in (3, 3, 4)]
    assert drawn[0].digest == drawn[1].digest != drawn[2].digest


@pytest.mark.parametrize("number", [0, 2, 11, 17, 18, 60])
def test_a_case_is_the_same_after_json(number, tmp_path):
    case = a_case(LAYER_SPECS[number], seed=number)
    again = case_of_json(json.loads(json.dumps(case.to_json())))
    assert isinstance(again, LayerCase)
    assert again.digest == case.digest
    assert again.spec == case.spec
    np.testing.assert_array_equal(again.reference.output_TD, case.reference.output_TD)
    name, read = read_case(write_case(tmp_path, "LAY-2", case, "nobody"))
    assert (name, read.digest) == ("LAY-2", case.digest)
    assert read.tags == case.tags


def test_a_case_with_an_unknown_parameter_is_refused():
    data = a_case(LAYER_SPECS[0]).to_json()
    data["params"]["w_sideways"] = [1.0]
    with pytest.raises(ValueError, match="w_sideways"):
        case_of_json(data)


class NoClamp(Reference):
    """Forgets the clamp (sgl-project/sglang#39939)."""

    name = "no-clamp"

    def experts(self, rows_RD, tokens_per_expert_E, params, spec):
        plain = spec.replace(experts=spec.experts.replace(clamp=None, clamp_at="before"))
        return super().experts(rows_RD, tokens_per_expert_E, params, plain)


class NoShared(Reference):
    """Forgets the shared experts."""

    name = "no-shared"

    @wraps(Reference.layer)
    def layer(self, x_TD, params, spec, **inputs):
        zero = None if params.shared_w_down_SFD is None else 0 * params.shared_w_down_SFD
        return super().layer(x_TD, replace(params, shared_w_down_SFD=zero), spec, **inputs)


@pytest.mark.parametrize(
    ("subject", "name", "fault"),
    [(NoClamp, "EXP-3", "clamp-ignored"), (NoShared, "LAY-8", "shared-experts-left-out")],
)
def test_a_failure_shrinks_to_one_token_and_reads_like_a_page(subject, name, fault):
    judge = Judge(subject())
    violation = shrink(judge, accuse(judge, ids=[name])[name])
    case = violation.case
    assert isinstance(case, LayerCase)
    assert case.num_tokens == 1
    page = failure_page(judge, violation, diagnoses(judge, violation))
    for part in (name, "expected", "received", "router", "experts", "weights[0]", "tags", f"{name}-{case.digest}"):
        assert part in page
    assert f"looks like  {fault}: {FAULTS[fault].summary}" in page.replace("looks like     ", "looks like  ")
    shown = LAYER.side_by_side(judge, case)
    assert "output_TD" in shown
    assert judge.name in shown


class WrongRouter(Reference):
    """The selection bias enters the weights, of the router and of the layer alike."""

    @wraps(Reference.route)
    def route(self, logits_TE, spec, expert_bias_E, **inputs):
        found = super().route(logits_TE, spec, expert_bias_E, **inputs)
        if expert_bias_E is None:
            return found
        return replace(found, weights_TK=found.weights_TK + expert_bias_E[found.expert_ids_TK])

    @wraps(Reference.layer)
    def layer(self, x_TD, params, spec, **inputs):
        if params.expert_bias_E is None:
            return super().layer(x_TD, params, spec, **inputs)
        return super().layer(x_TD, params, spec, **inputs) + 1


def test_a_wrong_router_is_accused_and_not_the_layer():
    judge = Judge(WrongRouter())
    assert accuse(judge, ids=["LAY-2"]) == {}
    assert judge.ledger["LAY-2"].not_run["judged where the subject's router is right"] > 0
    assert "WGT-1" in accuse(judge, ids=["WGT-1"])


def test_wrong_experts_are_accused_in_place_of_the_layer():
    class WrongExperts(NoClamp):
        """Forgets the clamp in its layers too."""

        @wraps(Reference.layer)
        def layer(self, x_TD, params, spec, **inputs):
            plain = spec.replace(experts=spec.experts.replace(clamp=None, clamp_at="before"))
            return super().layer(x_TD, params, plain, **inputs)

    assert set(accuse(Judge(WrongExperts()), ids=["LAY-2"])) == {"EXP-3"}


def test_wrong_routed_experts_are_accused_in_place_of_shared_ones():
    class Doubled(Reference):
        """Twice the routed output."""

        @wraps(Reference.layer)
        def layer(self, x_TD, params, spec, **inputs):
            return super().layer(x_TD, replace(params, w_down_EFD=2 * params.w_down_EFD), spec, **inputs)

    accused = accuse(Judge(Doubled()), ids=["LAY-8"])
    assert "LAY-2" in accused
    assert accused.keys() <= {"LAY-2", "LAY-12", "LAY-13", "NUL-1"}


def test_an_error_on_a_variation_is_blamed_on_what_varies():
    class Fragile(Reference):
        """Refuses a batch without rows."""

        def experts(self, rows_RD, tokens_per_expert_E, params, spec):
            if not len(rows_RD):
                raise RuntimeError("empty")
            return super().experts(rows_RD, tokens_per_expert_E, params, spec)

    judge = Judge(Fragile())
    (violation,) = accuse(judge, examples=5, ids=["EXP-9"]).values()
    assert violation.requirement == "EXP-9"
    assert "RuntimeError: empty" in violation.received


# the diagnosis


@pytest.mark.parametrize("name", ["rows-stay-in-token-order", "up-is-activated-too", "output-scale-twice",
                                  "the-weight-is-on-both-sides", "the-norm-is-detached", "counts-not-cleared",
                                  "recorded-weights-are-dropped"])  # fmt: skip
def test_the_diagnosis_names_the_fault(name):
    fault = FAULTS[name]
    violation = first_killer(fault)
    assert violation is not None
    found = diagnoses(Judge(LAYER.faulty(fault)), violation)
    assert fault in found
    assert len(found) <= 3


def test_what_no_fault_does_has_no_diagnosis():
    class Strange(Reference):
        """Adds a number that nobody else adds."""

        @wraps(Reference.layer)
        def layer(self, x_TD, params, spec, **inputs):
            return super().layer(x_TD, params, spec, **inputs) + 0.0123

    judge = Judge(Strange())
    (violation,) = accuse(judge, ids=["LAY-2"]).values()
    assert diagnoses(judge, violation) == []


@pytest.mark.parametrize(("error", "named"), [(RuntimeError, True), (KeyError, False)])
def test_an_error_is_explained_by_a_fault_that_raises_it_too(error, named):
    class Raises(Reference):
        """Refuses zero tokens."""

        @wraps(Reference.layer)
        def layer(self, x_TD, params, spec, **inputs):
            if not len(x_TD):
                raise error("no tokens")
            return super().layer(x_TD, params, spec, **inputs)

    judge = Judge(Raises())
    (violation,) = accuse(judge, ids=["LAY-3"]).values()
    assert (FAULTS["a-layer-of-zero-tokens-is-refused"] in diagnoses(judge, violation)) is named
