"""tests of the judge: routers are tried at real sizes, in every dtype that they declare."""

import time

import numpy as np
import pytest

from conformance.core.check import CHECKS
from conformance.core.judge import Judge
from conformance.router import sizes
from conformance.router.bounds import admissible, choice_error, unlimited_choice
from conformance.router.draw import draw, logits_of_kind, make_case
from conformance.router.sizes import EXPERTS, MODELS, TOKENS, TOKENS_OF_MODEL, TOP_K
from conformance.run import kinds  # noqa: F401  (its chapters register)
from conformance.subjects.reference import Reference
from moe_ref import RouterSpec
from moe_ref.specs.families import preset


class Compiles(Reference):
    """A subject for which each spec and number of tokens is a program."""

    logit_dtypes = ("float32", "bfloat16")
    compiles = True


def cases_of(judge: Judge, requirement: str) -> list:
    return list(sizes.cases(judge, CHECKS[requirement]))  # type: ignore[arg-type]


@pytest.mark.parametrize("requirement", ["SEL-1", "SEL-2", "WGT-17"])
def test_a_requirement_that_sweeps_has_every_size(requirement):
    cases = cases_of(Judge(Reference()), requirement)
    assert {case.spec.num_experts for case in cases} >= set(EXPERTS)
    assert {case.num_tokens for case in cases} >= set(TOKENS)
    assert {case.spec.top_k for case in cases} >= set(TOP_K)
    assert max(case.num_tokens * case.spec.top_k for case in cases) > 65_535
    groups = [case.spec for case in cases if case.spec.num_expert_groups]
    assert {spec.experts_per_group for spec in groups} >= {1, 2, 3}
    assert any(spec.num_expert_groups == 1 for spec in groups)
    assert any(spec.num_expert_groups == spec.num_limited_groups != 1 for spec in groups)


def test_each_requirement_of_a_router_has_the_public_models_that_concern_it():
    judge = Judge(Reference())
    for requirement, check in CHECKS.items():
        if check.method == "route":
            found = {case.spec for case in cases_of(judge, requirement)}
            assert {spec for spec in MODELS if check.spec(spec)} <= found, requirement


def test_the_public_models_have_their_published_sizes():
    shapes = [(spec.num_experts, spec.top_k, spec.num_expert_groups, spec.num_limited_groups) for spec in MODELS]
    assert shapes == [(256, 8, 8, 4), (384, 8, 1, 1), (512, 10, None, None), (128, 4, None, None)]


def test_a_subject_that_compiles_gets_at_most_ten_further_programs():
    judge = Judge(Compiles())
    found = {
        (case.spec, case.num_tokens, case.dtype)
        for requirement, check in CHECKS.items()
        if check.method == "route"
        for case in cases_of(judge, requirement)
    }
    assert {tokens for _, tokens, _ in found} == {0, 17, 129, 1025, 4099}
    assert len({each for each in found if each[1]}) <= 10
    assert TOKENS_OF_MODEL in {tokens for _, tokens, _ in found}


def test_separated_and_close_logits_of_512_experts_are_apart_in_float32():
    spec = preset("qwen3_next")
    for kind in ("separated", "close"):
        case = make_case(spec, CHECKS["SEL-2"], logits=kind, bias="none", tokens=40, seed=3)  # type: ignore[arg-type]
        order_TE = np.argsort(-unlimited_choice(case), axis=-1)
        choice_TE, error_TE = (
            np.take_along_axis(values, order_TE, axis=-1)
            for values in (unlimited_choice(case), choice_error(case, "float32"))
        )
        apart_T = (-np.diff(choice_TE) > error_TE[:, 1:] + error_TE[:, :-1]).all(axis=-1)
        assert apart_T.mean() > (0.99 if kind == "separated" else 0.7), kind


def test_close_logits_are_apart_by_less_than_a_rounding_of_bfloat16():
    logits_TE = logits_of_kind("close", (50, 16), np.random.default_rng(0))
    gaps_TE = np.diff(np.sort(logits_TE))
    assert gaps_TE.max() < 2.0**-9
    assert gaps_TE.min() > 2.0**-17


def test_cases_are_drawn_in_every_dtype_that_the_subject_declares():
    judge = Judge(Reference())
    dtypes = [draw(judge, CHECKS["SEL-2"], seed).dtype for seed in range(200)]  # type: ignore[arg-type]
    assert set(dtypes) == {"float32", "float64", "bfloat16", "float16"}
    assert 60 < dtypes.count("float32") < 140


def test_a_choice_among_hundreds_of_groups_is_judged_at_once():
    spec = RouterSpec(num_experts=512, top_k=1, num_expert_groups=128, num_limited_groups=64, score_func="sigmoid")
    choice_E, error_E = np.linspace(0.9, 0.1, 512), np.full(512, 1e-6)
    start = time.process_time()
    assert admissible(np.array([0]), choice_E, error_E, spec, "float32")
    assert not admissible(np.array([4]), choice_E, error_E, spec, "float32")
    assert time.process_time() - start < 0.2
