"""tests of the judge: the judge of layouts. What is right is never accused; layouts, cases and pages are sound."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conformance.faults.layout_fault import FaultyLayout
from conformance.faults.layout_faults import LAYOUT_FAULTS

from conformance.core.judge import CHECKS, Judge, LayoutCheck
from conformance.core.register import REQUIREMENTS
from conformance.core.shrink import shrink
from conformance.core.subject import Subject
from conformance.core.trial import DEFAULT_EXAMPLES, LAYERS_COST, accuse, load_suite
from conformance.layer.case import case_from_json
from conformance.run.deviations import read_case, write_case
from conformance.run.report import failure_page, record, side_by_side, table
from conformance.sharded.case import LAYOUT_TAGS, LayoutCase, simpler_layouts
from conformance.sharded.dispatch.checks import (
    test_every_assignment_of_few_tokens_on_two_and_three_ranks as every_assignment,
)
from conformance.sharded.draw import LAYOUT_SPECS, make_layout_case, meshes, settings_of
from conformance.sharded.verdicts import LAYOUT_FORM, radii_of_gradients, radius_of, truncated
from conformance.subjects.reference import Reference
from moe_ref import RouterInputs
from moe_ref.sharded import sharded_layer
from moe_ref.strategies import STRATEGIES

STAGES = ("dispatch", "layout")
IDS = [id for id, requirement in REQUIREMENTS.items() if requirement.stage in STAGES]
CHECK = LayoutCheck(requirement="LYT-2", run=lambda judge, case: None, method="sharded_layer")


def a_case(number: int, **choices) -> LayoutCase:
    settings = settings_of(LAYOUT_SPECS)
    setting = settings[number % len(settings)]
    kinds = {"x": "normal", "bias": "mixed", "load": "even", "counts": "uneven", "seed": number} | choices
    return make_layout_case(Judge(Reference()), CHECK, setting, **kinds)


class Backwards(Reference):
    """Rows of an expert in another order, hidden features from the last to the first, and ranks of one result each."""

    def dispatch(self, expert_ids_by_shard, layout, spec):
        plans = super().dispatch(expert_ids_by_shard, layout, spec)
        for plan in plans:
            expert_R = np.repeat(np.arange(len(plan["group_sizes_e"])), plan["group_sizes_e"])
            plan["order_R2"] = plan["order_R2"][np.lexsort((-np.arange(len(expert_R)), expert_R))]
        return plans

    def sharded_layer(self, x_by_shard, params, spec, layout, **inputs):
        return super().sharded_layer(x_by_shard, turned(params), spec, layout, **inputs)


def turned(params):
    """The hidden features of the routed experts from the last to the first: the same experts, summed otherwise."""
    names = ("w_up_EDF", "w_gate_EDF", "b_up_EF", "b_gate_EF")
    found = {name: getattr(params, name) for name in names}
    changes = {name: value[..., ::-1] for name, value in found.items() if value is not None}
    return replace(params, w_down_EFD=params.w_down_EFD[:, ::-1], **changes)


class Compiled(Reference):
    """Every layout is a compilation, and all shards have as many tokens."""

    compiles = equal_shards = True


SHOULD = {"DSP-7"}
"""Backwards does not keep the order of arrival."""


@pytest.mark.parametrize("subject", [Backwards, Compiled], ids=lambda subject: subject.__name__)
def test_what_is_right_is_not_accused(subject):
    judge = Judge(subject())
    accused = accuse(judge, seed=0, examples=4, ids=IDS)
    wrong = {id: (str(v), v.expected, v.received) for id, v in accused.items()}
    assert set(wrong) == (SHOULD if subject is Backwards else set()), wrong
    few = {"LYT-7", "LYT-27"} if subject is Compiled else set()  # shards of which some are empty
    assert {id for id in IDS if judge.ledger[id].judged == 0} == few


def test_the_reference_is_judged_on_two_hundred_layouts_and_more():
    judge = Judge(Reference())
    assert accuse(judge, seed=1, examples=-(-DEFAULT_EXAMPLES // LAYERS_COST), ids=IDS[:16]) == {}
    records = [record(judge, id, judge.ledger[id]) for id in IDS]
    layouts = {layout for each in records for layout in each["layouts"]}
    assert len(layouts) >= 200
    assert f"on {len(layouts)} different layouts" in table({"name": "reference", "version": ""}, records)


def test_every_assignment_of_the_small_worlds_is_judged():
    judge = Judge(Reference())
    every_assignment(judge)
    assert judge.ledger["DSP-2"].judged > 5000
    assert judge.ledger["DSP-2"].violation is None


@pytest.mark.parametrize("name", ["global-ids-are-not-made-local", "the-own-count-bounds-the-gathered-rows"])
def test_small_worlds_accuse_a_fault(name):
    judge = Judge(FaultyLayout(next(fault for fault in LAYOUT_FAULTS if fault.name == name)))
    with pytest.raises(AssertionError) if name.startswith("the-own") else _noted(judge, "DSP-5"):
        every_assignment(judge)


class _noted:
    """A violation of this requirement is in the ledger afterwards."""

    def __init__(self, judge: Judge, id: str):
        self.judge, self.id = judge, id

    def __enter__(self):
        return self

    def __exit__(self, *_):
        assert self.judge.ledger[self.id].violation is not None


def test_every_requirement_of_these_stages_has_a_check():
    load_suite()
    assert {id for id in IDS if not isinstance(CHECKS[id], LayoutCheck)} == set()
    assert set(LAYOUT_FORM.values()) <= set(IDS)


def test_a_subject_without_layouts_is_unsupported_and_not_ok():
    class Empty(Subject):
        """Defines nothing."""

    judge = Judge(Empty())
    assert accuse(judge, seed=0, examples=3, ids=IDS) == {}
    assert {judge.ledger[id].status("MUST") for id in IDS} == {"unsupported"}


def test_settings_have_every_mesh_strategy_and_tag():
    settings = settings_of(LAYOUT_SPECS)
    seen = {(s.layout.data, s.layout.fsdp, s.layout.expert, s.layout.tensor) for s in settings}
    assert seen == {tuple(mesh.values()) for mesh in meshes()}
    assert {s.layout.strategy for s in settings} == set(STRATEGIES)
    tags = set().union(*(a_case(n, counts=("uneven", "some_empty")[n % 2]).tags for n in range(0, len(settings), 29)))
    assert tags >= LAYOUT_TAGS.keys()


def test_bounds_hold_what_float32_gives_on_any_layout():
    for number in range(0, 1500, 61):
        case = a_case(number)
        given = (case.by_shard(case.x_TD), case.params, case.spec, case.layout)
        narrow = sharded_layer(*given, dtype=np.float32, **RouterInputs.keywords(case.inputs_by_shard))
        error_TD = np.abs(np.concatenate(narrow.outputs_by_shard) - np.concatenate(truncated(case).outputs_by_shard))
        radius_TD = radius_of(Judge(Reference()), case)
        assert (error_TD <= radius_TD).all()
        # Never so large that nothing is said.
        assert np.median(radius_TD) <= 1e-3 * max(1.0, np.abs(case.reference.output_TD).max())
        assert radii_of_gradients(Judge(Reference()), case).keys() >= {"x_TD", "gate_ED", "w_down_EFD"}


@pytest.mark.parametrize("number", [0, 200, 700, 1300])
def test_a_case_is_the_same_after_json(number, tmp_path):
    case = a_case(number)
    again = case_from_json(json.loads(json.dumps(case.to_json())))
    assert isinstance(again, LayoutCase)
    assert (again.digest, again.layout, again.tags) == (case.digest, case.layout, case.tags)
    assert again.tokens_per_shard == case.tokens_per_shard
    id, read = read_case(write_case(tmp_path, "LYT-2", case, "nobody"))
    assert (id, read.digest) == ("LYT-2", case.digest)


def test_a_case_with_other_counts_than_tokens_is_refused():
    data = a_case(300).to_json()
    data["x_TD"] = data["x_TD"][:-1]
    with pytest.raises(ValueError, match="tokens"):
        case_from_json(data)


def test_simpler_layouts_hold_fewer_ranks_or_options_and_the_tokens_of_their_shards():
    case = next(c for c in map(a_case, range(1000, 1400)) if c.layout.data > 1 and c.layout.expert > 1)
    for simpler in simpler_layouts(case):
        assert simpler.layout != case.layout
        assert sum(simpler.tokens_per_shard) == simpler.num_tokens
        assert simpler.layout.num_ranks <= case.layout.num_ranks
        assert len(simpler.reference.output_TD) == simpler.num_tokens


@pytest.mark.parametrize("name", ["the-placement-is-ignored", "tensor-ranks-keep-their-partial-sums"])
def test_a_failure_shrinks_and_reads_like_a_page(name):
    fault = next(fault for fault in LAYOUT_FAULTS if fault.name == name)
    judge = Judge(FaultyLayout(fault))
    violation = shrink(judge, accuse(judge, seed=0, examples=4, ids=[fault.requirement])[fault.requirement])
    case = violation.case
    assert isinstance(case, LayoutCase)
    assert case.num_tokens == 1
    assert case.layout.num_ranks == 2
    page = failure_page(judge, violation)
    for part in (fault.requirement, "expected", "received", "layout", "tags", f"replay {fault.requirement}-"):
        assert part in page
    shown = side_by_side(judge, case)
    assert "group_sizes_e" in shown
    assert "output_TD" in shown
