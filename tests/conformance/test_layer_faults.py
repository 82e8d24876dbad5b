"""tests of the judge: every fault of a layer is accused, at its own stage, whatever the seed."""

import pytest
from conformance.faults.layer_fault import FaultyLayer, first_accusation, patched
from conformance.faults.layer_faults import LAYER_FAULTS

from conformance.core.judge import Judge
from conformance.core.register import REQUIREMENTS
from conformance.core.trial import DEFAULT_EXAMPLES, accuse
from moe_ref import experts, layer

SEED = 0
STAGES = ("permute", "experts", "combine", "layer", "backward")
IDS = [id for id, requirement in REQUIREMENTS.items() if requirement.stage in STAGES]


@pytest.fixture(scope="module")
def accusers() -> dict[str, str]:
    """The requirement that first accuses each fault, its own one tried first."""
    found = {fault.name: first_accusation(fault, seed=SEED, examples=DEFAULT_EXAMPLES) for fault in LAYER_FAULTS}
    return {name: violation.requirement if violation else "nobody" for name, violation in found.items()}


def test_every_fault_is_accused_at_its_own_stage(accusers):
    elsewhere = {
        fault.name: accusers[fault.name]
        for fault in LAYER_FAULTS
        if accusers[fault.name] not in REQUIREMENTS or REQUIREMENTS[accusers[fault.name]].stage != fault.stage
    }
    assert elsewhere == {}


def test_every_requirement_accuses_a_fault_that_breaks_it(accusers):
    accusing = {accusers[fault.name] for fault in LAYER_FAULTS if accusers[fault.name] == fault.requirement}
    assert accusing == set(IDS)


@pytest.mark.parametrize("name", ["memory-of-the-last-call-is-read", "the-other-gelu", "an-idle-expert-gets-nan"])
def test_a_fault_of_one_method_is_accused_by_no_other_stage(name):
    fault = next(fault for fault in LAYER_FAULTS if fault.name == name)
    others = [id for id in IDS if REQUIREMENTS[id].stage != fault.stage]
    assert accuse(Judge(FaultyLayer(fault)), seed=SEED, examples=10, ids=others) == {}


def test_a_fault_is_gone_after_the_call():
    clean = experts.hide
    with patched({"hide": max, "combine": max}):
        assert experts.hide is max
        assert layer.combine is max
    assert experts.hide is clean
    assert layer.combine is experts.combine
