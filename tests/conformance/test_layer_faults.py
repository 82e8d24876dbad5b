"""tests of the judge: every fault of a layer is accused, at its own stage, by as many cases as a run has."""

import pytest

from conformance.core.fault import first_killer, patched
from conformance.core.register import REQUIREMENTS, of_stage
from conformance.layer.kind import LAYER
from conformance.run.kinds import load_faults
from moe_ref import experts, layer

FAULTS = [fault for fault in load_faults().values() if fault.kind is LAYER]


@pytest.fixture(scope="module")
def killers() -> dict[str, str]:
    """The requirement that first accuses each fault, its own one tried first."""
    found = {fault.name: first_killer(fault) for fault in FAULTS}
    return {name: violation.requirement if violation else "nobody" for name, violation in found.items()}


def test_every_fault_is_accused_at_its_own_stage(killers):
    elsewhere = {
        fault.name: killers[fault.name]
        for fault in FAULTS
        if killers[fault.name] not in REQUIREMENTS or REQUIREMENTS[killers[fault.name]].stage != fault.stage
    }
    assert elsewhere == {}


def test_every_requirement_accuses_a_fault_that_breaks_it(killers):
    accusing = {killers[fault.name] for fault in FAULTS if killers[fault.name] == fault.requirement}
    assert accusing == set(of_stage(*LAYER.stages))


def test_a_fault_is_gone_after_the_call():
    clean = experts.hide
    with patched({"hide": max, "experts.combine": max}):
        assert experts.hide is max
        assert layer.combine is max
    assert experts.hide is clean
    assert layer.combine is experts.combine
