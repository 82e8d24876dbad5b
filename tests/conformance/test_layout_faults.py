"""tests of the judge: every fault between devices is accused, at its own stage, and by its own requirement."""

import pytest
from conformance.faults.layout_fault import FaultyLayout, first_accusation
from conformance.faults.layout_faults import LAYOUT_FAULTS

from conformance.core.judge import Judge
from conformance.core.register import REQUIREMENTS
from conformance.core.trial import DEFAULT_EXAMPLES, LAYERS_COST, accuse

SEED = 0
STAGES = ("dispatch", "layout")
IDS = [id for id, requirement in REQUIREMENTS.items() if requirement.stage in STAGES]


@pytest.fixture(scope="module")
def accusers() -> dict[str, str]:
    """The requirement that first accuses each fault, its own one tried first, with as many cases as a run has."""
    examples = -(-DEFAULT_EXAMPLES // LAYERS_COST)
    found = {fault.name: first_accusation(fault, seed=SEED, examples=examples) for fault in LAYOUT_FAULTS}
    return {name: violation.requirement if violation else "nobody" for name, violation in found.items()}


def test_every_fault_is_accused_by_the_requirement_that_it_breaks(accusers):
    assert {f.name: accusers[f.name] for f in LAYOUT_FAULTS if accusers[f.name] != f.requirement} == {}


def test_every_requirement_accuses_a_fault_that_breaks_it(accusers):
    assert {accusers[fault.name] for fault in LAYOUT_FAULTS} == set(IDS)


@pytest.mark.parametrize(
    "name", ["the-placement-is-ignored", "partial-sums-are-averaged", "gradients-are-averaged-over-shards"]
)
def test_a_fault_of_one_method_is_accused_by_no_other(name):
    fault = next(fault for fault in LAYOUT_FAULTS if fault.name == name)
    judge = Judge(FaultyLayout(fault))
    others = ["DSP-2", "DSP-14", "LYT-2", "LYT-3", "LYT-20"]
    accused = accuse(judge, seed=SEED, examples=4, ids=[id for id in others if id != fault.requirement])
    assert {id for id in accused if REQUIREMENTS[id].stage != fault.stage} == set()
    assert "LYT-2" not in accused
