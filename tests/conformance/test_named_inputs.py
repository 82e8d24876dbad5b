"""tests of the judge: which further inputs a method names, and so which cases it is given."""

from typing import TypedDict, Unpack

import pytest

from conformance.core.capabilities import named_inputs
from conformance.core.judge import Judge
from conformance.core.subject import Subject
from conformance.core.trial import accuse
from conformance.run import kinds  # noqa: F401  (its chapters register)
from conformance.subjects.reference import Reference


class Own(TypedDict, total=False):
    token_mask_T: object


class Further(Own, total=False):
    seed: int


class ByName(Subject):
    def route(self, logits_TE, spec, expert_bias_E, *, seed=0, token_mask_T=None):
        raise NotImplementedError


class ByTypedDict(Subject):
    def route(self, logits_TE, spec, expert_bias_E, **inputs: Unpack[Further]):
        raise NotImplementedError


class Overriding(ByName):
    def route(self, *arguments, **inputs):
        raise NotImplementedError


@pytest.mark.parametrize("subject", [ByName, ByTypedDict, Overriding])
def test_an_input_is_named_by_a_parameter_a_typed_dict_or_the_method_that_is_overridden(subject):
    assert {"seed", "token_mask_T"} <= named_inputs(subject(), "route")
    assert "table_VK" not in named_inputs(subject(), "route")


def test_a_typed_dict_names_its_keys_and_no_more():
    class Narrower(ByName):
        def route(self, logits_TE, spec, expert_bias_E, **inputs: Unpack[Own]):
            raise NotImplementedError

    assert "seed" not in named_inputs(Narrower(), "route")


def test_plain_keywords_name_nothing():
    class Swallowing(Subject):
        def route(self, logits_TE, spec, expert_bias_E, **inputs):
            raise NotImplementedError

    assert not named_inputs(Swallowing(), "route") & {"seed", "token_mask_T", "table_VK"}


class Maskless(Reference):
    """Names only what has no mask."""

    def route(self, logits_TE, spec, expert_bias_E, *, learned_scale=None):
        named = {} if learned_scale is None else {"learned_scale": learned_scale}
        return super().route(logits_TE, spec, expert_bias_E, **named)


@pytest.mark.parametrize(("subject", "judged"), [(Reference, True), (Maskless, False)])
def test_what_a_method_does_not_name_is_not_judged(subject, judged):
    judge = Judge(subject())
    assert accuse(judge, examples=6, ids=["SEL-14"]) == {}
    assert (judge.ledger["SEL-14"].judged > 0) is judged
