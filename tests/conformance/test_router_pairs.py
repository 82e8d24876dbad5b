"""tests of the judge: routers are tried on every pair of what a case is made of, at the default number of examples."""

from dataclasses import fields
from itertools import combinations

import numpy as np
import pytest

from conformance.core.check import CHECKS
from conformance.core.drawing import one_of
from conformance.core.judge import Judge
from conformance.router import pairs
from conformance.router.draw import SPECS
from conformance.router.pairs import FIELDS, LOGITS, PARTS, SHAPES, TOKENS, Setting, facts
from conformance.run import kinds  # noqa: F401  (its chapters register)
from conformance.subjects.reference import Reference
from moe_ref import RouterSpec
from moe_ref.specs.families import tiny

TRIES = 30_000


class Tiny(Reference):
    """A subject with few specs, as most have: those of two models."""

    logit_dtypes = ("float32", "bfloat16")

    def supports(self, spec, layout=None):
        return None if spec in (tiny("deepseek_v3"), tiny("qwen3_moe")) else "another model"


def pairs_of(settings) -> set:
    return {pair for setting in settings for pair in combinations(sorted(facts(setting), key=repr), 2)}


def drawn(judge: Judge) -> list[Setting]:
    """The settings of the cases that the checks draw for a subject."""
    return [setting for check in CHECKS.values() if getattr(check, "pairs", False) for setting in
            pairs.settings(judge, check)]  # type: ignore[arg-type]  # fmt: skip


def any_setting(rng: np.random.Generator) -> Setting | None:
    """A setting by chance, where that is a valid one: no rule of the survey takes part."""
    E, G, L = SHAPES[one_of(rng, list(SHAPES))][one_of(rng, ("few", "some", "many"))]
    # Few fields at a time: of all by chance together hardly any are allowed.
    names = rng.permutation(list(FIELDS))[:5]
    fields = {name: FIELDS[name][0] for name in FIELDS} | {name: one_of(rng, FIELDS[name]) for name in names}
    groups = {"num_expert_groups": G, "num_limited_groups": L} if G else {}
    top_k = one_of(rng, (1, 2, 9, L * (E // G) if G else E))
    try:
        spec = RouterSpec(num_experts=E, top_k=top_k, **groups, **fields)
    except ValueError:
        return None
    bias = one_of(rng, PARTS["bias"]) if spec.takes_bias else "none"
    return Setting(spec, one_of(rng, LOGITS), bias, one_of(rng, PARTS["dtype"]), one_of(rng, list(TOKENS.values())))


def test_every_pair_is_tried_on_a_router_that_does_everything():
    rng = np.random.default_rng(0)
    possible = pairs_of(found for _ in range(TRIES) if (found := any_setting(rng)) is not None)
    possible |= pairs_of(pairs.every_pair())
    tried = pairs_of(drawn(Judge(Reference())))
    assert len(possible) > 2_000
    assert possible - tried == set()


def test_every_pair_of_what_it_supports_is_tried_on_a_router_of_two_models():
    judge = Judge(Tiny())
    settings = drawn(judge)
    assert {setting.spec for setting in settings} == {tiny("deepseek_v3"), tiny("qwen3_moe")}
    assert {setting.dtype for setting in settings} == {"float32", "bfloat16"}
    of_logits = {(setting.spec, setting.logits) for setting in settings}
    assert of_logits == {(spec, logits) for spec in (tiny("deepseek_v3"), tiny("qwen3_moe")) for logits in LOGITS}


def test_every_value_of_every_part_is_in_the_survey():
    found = {fact for setting in pairs.survey() for fact in facts(setting)}
    assert found == {(part, value) for part, values in PARTS.items() for value in values}


IN_NO_PAIR = {"num_experts", "top_k", "num_expert_groups", "num_limited_groups", "mixer_eps"}
"""Fields of a spec that are sizes, which the survey has in classes; and one that sparsemixer alone reads."""


def test_the_pool_and_the_survey_have_every_field_of_a_spec():
    every = fields(RouterSpec)
    unchanged = {each.name for each in every if all(getattr(spec, each.name) == each.default for spec in SPECS)}
    assert unchanged == set(), "no row of _variants in conformance/router/draw.py changes it"
    assert {each.name for each in every} - FIELDS.keys() == IN_NO_PAIR, "FIELDS in conformance/router/pairs.py"


def test_every_spec_of_the_pool_has_facts_that_the_survey_knows():
    known = {(part, value) for part, values in PARTS.items() for value in values}
    for spec in SPECS:
        assert facts(Setting(spec, "normal", "none", "float32", 7)) <= known


@pytest.mark.parametrize("requirement", ["WGT-17"])
def test_the_cases_of_the_survey_are_routed_by_the_reference(requirement):
    judge, check = Judge(Reference()), CHECKS[requirement]
    cases = list(pairs.cases(judge, check))  # type: ignore[arg-type]
    assert len(cases) == len(drawn(judge))
    assert any((case.reference.expert_ids_TK == -1).all(axis=-1).any() for case in cases), "a token goes to nobody"
