"""tests of the judge: the kind sharded accuses each of its faults by its own requirement, and nothing that is right."""

import json
from dataclasses import replace
from functools import wraps
from typing import Any

import numpy as np
import pytest

from conformance.core.check import CHECKS
from conformance.core.judge import Judge, Violation
from conformance.core.register import of_stage
from conformance.core.shrink import shrink
from conformance.core.subject import Subject
from conformance.core.trial import accuse
from conformance.layer.case import LayerCase
from conformance.router.case import RouterCase
from conformance.run.causes import diagnoses
from conformance.run.deviations import read_case, write_case
from conformance.run.kinds import case_of_json, load_faults
from conformance.run.report import failure_page, record, table
from conformance.sharded.case import ShardedCase
from conformance.sharded.check import ShardedCheck
from conformance.sharded.draw import DISPATCH_SPECS, EVERY_MESH, LAYOUT_SPECS, every_setting, make_case, meshes
from conformance.sharded.kind import SHARDED
from conformance.sharded.verdicts import radii_of_gradients, radius_of_outputs, trace_on_layout
from conformance.subjects.reference import Reference
from moe_ref import RouterInputs
from moe_ref.sharded import sharded_layer
from moe_ref.strategies import STRATEGIES

REQUIREMENTS = of_stage(*SHARDED.stages)
FAULTS = {name: fault for name, fault in load_faults().items() if fault.kind is SHARDED}


def check_of(requirement: str) -> ShardedCheck:
    check = CHECKS[requirement]
    assert isinstance(check, ShardedCheck)
    return check


def a_case(number: int, requirement: str = "LYT-2", **choices) -> ShardedCase:
    check = check_of(requirement)
    settings = every_setting(DISPATCH_SPECS if check.method == "dispatch" else LAYOUT_SPECS)
    kinds: dict[str, Any] = {
        "x": "normal",
        "bias": "mixed",
        "load": "even",
        "counts": "uneven",
        "seed": number,
    } | choices
    return make_case(Judge(Reference()), check, settings[number % len(settings)], **kinds)


# what is right


class Float64(Reference):
    """The oracle itself."""

    compute_dtype = expert_dtype = "float64"


class Backwards(Reference):
    """Rows of an expert in another order, and hidden features from the last to the first."""

    def dispatch(self, expert_ids_by_shard, layout, spec):
        plans = super().dispatch(expert_ids_by_shard, layout, spec)
        for plan in plans:
            expert_R = np.repeat(np.arange(len(plan["group_sizes_e"])), plan["group_sizes_e"])
            plan["order_R2"] = plan["order_R2"][np.lexsort((-np.arange(len(expert_R)), expert_R))]
        return plans

    @wraps(Reference.sharded_layer)
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


SHOULD = {Backwards: {"DSP-7"}}
"""Backwards does not keep the order of arrival."""
NOT_JUDGED = {Compiled: {"LYT-7", "LYT-27"}}
"""Shards of which some are empty."""


@pytest.mark.parametrize("subject", [Float64, Backwards, Compiled], ids=lambda subject: subject.__name__)
def test_what_is_right_is_not_accused(subject):
    judge = Judge(subject())
    accused = accuse(judge, seed=0, examples=4, ids=REQUIREMENTS)
    wrong = {name: (str(v), v.expected, v.received) for name, v in accused.items()}
    assert set(wrong) == SHOULD.get(subject, set()), wrong
    assert {name for name in REQUIREMENTS if judge.ledger[name].judged == 0} == NOT_JUDGED.get(subject, set())


def test_the_reference_is_judged_on_two_hundred_layouts_and_more():
    judge = Judge(Reference())
    assert accuse(judge, seed=1, ids=of_stage("dispatch")) == {}
    records = [record(judge, name, judge.ledger[name]) for name in REQUIREMENTS]
    layouts = {layout for each in records for layout in each["layouts"]}
    assert len(layouts) >= 200
    assert f"on {len(layouts)} different layouts" in table({"name": "reference", "version": ""}, records)


def test_a_subject_without_layouts_is_unsupported_and_not_ok():
    class Empty(Subject):
        """Defines nothing."""

    judge = Judge(Empty())
    assert accuse(judge, examples=3, ids=REQUIREMENTS) == {}
    assert {judge.ledger[name].status("MUST") for name in REQUIREMENTS} == {"unsupported"}
    assert list(SHARDED.worlds(judge)) == []


# small worlds


def accused_in_small_worlds(subject: Subject) -> set[str]:
    """The requirements that every assignment of a few tokens accuses."""
    judge = Judge(subject)
    for check, case in SHARDED.worlds(judge):
        try:
            judge.examine(check, case)
        except Violation as violation:
            return {violation.requirement}
    assert judge.ledger["DSP-2"].judged > 5000 or any(entry.violation for entry in judge.ledger.values())
    return {name for name, entry in judge.ledger.items() if entry.violation}


def test_every_assignment_of_the_small_worlds_is_judged():
    assert accused_in_small_worlds(Reference()) == set()


@pytest.mark.parametrize(
    ("name", "requirement"),
    [("global-ids-are-not-made-local", "DSP-5"), ("the-own-count-bounds-the-gathered-rows", "DSP-2")],
)
def test_small_worlds_accuse_a_fault_by_the_requirement_of_its_part(name, requirement):
    assert requirement in accused_in_small_worlds(SHARDED.faulty(FAULTS[name]))


def test_an_error_in_a_small_world_is_blamed_on_running_at_all():
    assert accused_in_small_worlds(SHARDED.faulty(FAULTS["an-unused-slot-is-no-class"])) == {"DSP-1"}


# what is generated


def test_settings_have_every_mesh_strategy_and_tag():
    settings = every_setting(LAYOUT_SPECS)
    seen = {(s.layout.data, s.layout.fsdp, s.layout.expert, s.layout.tensor) for s in settings}
    assert seen == {tuple(mesh.values()) for mesh in meshes()}
    assert {s.layout.strategy for s in settings} == set(STRATEGIES)
    # A few of them, and of those that have few.
    few = [n for n, setting in enumerate(settings) if setting.layout.strategy not in EVERY_MESH]
    tried = [*range(0, len(settings), 23), *few[::5]]
    tags = set().union(*(a_case(n, counts=("uneven", "some_empty")[n % 2]).tags for n in tried))
    assert tags >= ShardedCase.TAGS.keys() - LayerCase.TAGS.keys()


def test_a_seed_draws_one_case():
    check = check_of("LYT-13")
    first, again, other = (SHARDED.draw(Judge(Reference()), check, seed).digest for seed in (5, 5, 6))
    assert first == again != other


def test_bounds_hold_what_float32_gives_on_any_layout():
    for number in range(0, 1500, 61):
        case = a_case(number)
        given = (case.by_shard(case.x_TD), case.params, case.spec, case.layout)
        narrow = sharded_layer(*given, dtype=np.float32, **RouterInputs.keywords(case.inputs_by_shard))
        exact_TD = np.concatenate(trace_on_layout(case).outputs_by_shard)
        radius_TD = radius_of_outputs(Judge(Reference()), case)
        assert (np.abs(np.concatenate(narrow.outputs_by_shard) - exact_TD) <= radius_TD).all()
        # Never so large that nothing is said.
        assert np.median(radius_TD) <= 1e-3 * max(1.0, np.abs(case.reference.output_TD).max())
        assert radii_of_gradients(Judge(Reference()), case).keys() >= {"x_TD", "gate_ED", "w_down_EFD"}


# cases


CASES = [("LYT-2", number) for number in (0, 200, 700, 1300)] + [("LYT-28", 300), ("DSP-9", 100)]


@pytest.mark.parametrize(("requirement", "number"), CASES)
def test_a_case_is_the_same_after_json(requirement, number, tmp_path):
    case = a_case(number, requirement)
    again = case_of_json(json.loads(json.dumps(case.to_json())))
    assert isinstance(again, ShardedCase)
    assert (again.digest, again.layout, again.tags, again.place) == (case.digest, case.layout, case.tags, case.place)
    assert again.tokens_per_shard == case.tokens_per_shard
    name, read = read_case(write_case(tmp_path, requirement, case, "nobody"))
    assert (name, read.digest) == (requirement, case.digest)


def test_a_case_without_tokens_is_the_same_after_json():
    case = a_case(100, "DSP-8", counts="empty")
    again = case_of_json(json.loads(json.dumps(case.to_json())))
    assert (again.num_tokens, again.tags) == (0, case.tags)


STORED = {
    "spec": {"router": {"num_experts": 2, "top_k": 1, "selector": "given"}, "experts": {"dim": 1, "hidden_dim": 1}},
    "x_TD": [[1.0], [2.0]],
    "params": {"gate_ED": [[0.5], [1.0]], "w_up_EDF": [[[1.0]], [[1.0]]], "w_gate_EDF": [[[1.0]], [[1.0]]],
               "w_down_EFD": [[[1.0]], [[2.0]]]},
    "d_output_TD": [[0.0], [0.0]],
    "inputs": {"given_ids_TK": [[1], [0]]},
    "seed": 3,
    "layout": {"tokens_per_shard": [2, 0], "expert": 2, "strategy": "ring_of_experts"},
}  # fmt: skip
"""As an earlier version wrote it, under the digest 1791db."""


def test_a_stored_case_keeps_its_name():
    case = case_of_json(STORED)
    assert isinstance(case, ShardedCase)
    assert case.tokens_per_shard == (2, 0)
    assert case.digest == "1791db"


def test_a_case_with_other_counts_than_tokens_is_refused():
    data = a_case(300).to_json()
    with pytest.raises(ValueError, match=r"layout\.tokens_per_shard sums to \d+, but x_TD has \d+ tokens"):
        case_of_json(data | {"x_TD": data["x_TD"][:-1], "d_output_TD": data["d_output_TD"][:-1]})
    with pytest.raises(ValueError, match="the layout of a case needs tokens_per_shard"):
        case_of_json(data | {"layout": {}})


def test_simpler_layouts_hold_fewer_ranks_or_options_and_the_tokens_of_their_shards():
    case = next(c for c in map(a_case, range(1000, 1400)) if c.layout.data > 1 and c.layout.expert > 1)
    found = [simpler for simpler in case.simpler() if simpler.layout != case.layout]
    assert {simpler.layout.num_ranks < case.layout.num_ranks for simpler in found} >= {True}
    for simpler in found:
        assert sum(simpler.tokens_per_shard) == simpler.num_tokens
        assert simpler.layout.num_ranks <= case.layout.num_ranks
        assert len(simpler.reference.output_TD) == simpler.num_tokens


def test_a_case_has_its_one_rank_layer_and_its_router():
    case = a_case(700)
    layer, router = case.part(LayerCase), case.part(RouterCase)
    assert type(layer) is LayerCase
    np.testing.assert_array_equal(layer.reference.output_TD, case.reference.output_TD)
    assert isinstance(router, RouterCase)
    assert router.num_tokens == case.num_tokens
    assert case.part(ShardedCase) is case


# who is to blame


def accused(subject: Subject, *names: str) -> tuple[Judge, dict[str, Violation]]:
    judge = Judge(subject)
    return judge, accuse(judge, ids=names)


class WrongRouter(Reference):
    """The selection bias enters the weights, of the router and of the sharded layer alike."""

    @wraps(Reference.route)
    def route(self, logits_TE, spec, expert_bias_E, **inputs):
        found = super().route(logits_TE, spec, expert_bias_E, **inputs)
        if expert_bias_E is None:
            return found
        return replace(found, weights_TK=found.weights_TK + expert_bias_E[found.expert_ids_TK])

    @wraps(Reference.sharded_layer)
    def sharded_layer(self, x_by_shard, params, spec, layout, **inputs):
        found = super().sharded_layer(x_by_shard, params, spec, layout, **inputs)
        return found if params.expert_bias_E is None else [output_TD + 1 for output_TD in found]


class WrongLayer(Reference):
    """The outputs are doubled, on one rank and on several."""

    @wraps(Reference.layer)
    def layer(self, x_TD, params, spec, **inputs):
        return 2 * super().layer(x_TD, params, spec, **inputs)

    @wraps(Reference.sharded_layer)
    def sharded_layer(self, x_by_shard, params, spec, layout, **inputs):
        return [2 * output_TD for output_TD in super().sharded_layer(x_by_shard, params, spec, layout, **inputs)]


class WrongExchange(Reference):
    """The outputs are doubled where there are several ranks on the expert axis, and so are all gradients."""

    @wraps(Reference.sharded_layer)
    def sharded_layer(self, x_by_shard, params, spec, layout, **inputs):
        factor = 2 if layout.expert > 1 else 1
        return [factor * output_TD for output_TD in super().sharded_layer(x_by_shard, params, spec, layout, **inputs)]

    @wraps(Reference.sharded_gradients)
    def sharded_gradients(self, x_by_shard, params, spec, layout, d_output_by_shard, **inputs):
        doubled = [(2 if layout.expert > 1 else 1) * d_output_TD for d_output_TD in d_output_by_shard]
        return super().sharded_gradients(x_by_shard, params, spec, layout, doubled, **inputs)


def test_a_wrong_router_is_not_a_wrong_layout():
    judge, found = accused(WrongRouter(), "LYT-2")
    assert found == {}
    assert judge.ledger["LYT-2"].not_run["judged where the subject's router is right"] > 0
    assert "WGT-1" in accused(WrongRouter(), "WGT-1")[1]


def test_a_wrong_layer_is_accused_on_one_rank():
    _, found = accused(WrongLayer(), "LYT-2", "LYT-6")
    assert found.keys() <= {"LAY-2", "LAY-8", "LAY-9", "LAY-10", "LAY-11", "LAY-12", "LAY-13"}
    assert "LAY-2" in found
    assert {type(violation.case) for violation in found.values()} == {LayerCase}


@pytest.mark.parametrize("name", ["LYT-3", "LYT-19", "LYT-20", "LYT-22", "LYT-29"])
def test_a_wrong_exchange_is_accused_where_nothing_else_is_in_the_way(name):
    judge, found = accused(WrongExchange(), name)
    case = found["LYT-2"].case
    assert isinstance(case, ShardedCase)
    assert case.layout.tensor == 1
    assert name not in found
    assert judge.ledger["LYT-2"].judged == 0


# pages


def shrunk(name: str) -> tuple[Judge, Violation]:
    """The judge of a fault, and the smallest case that breaks the fault's requirement."""
    judge = Judge(SHARDED.faulty(FAULTS[name]))
    requirement = FAULTS[name].requirement
    return judge, shrink(judge, accuse(judge, ids=[requirement])[requirement])


SHOWN = ["the-placement-is-ignored", "tensor-ranks-keep-their-partial-sums", "tensor-ranks-count-the-gate-each"]


@pytest.mark.parametrize("name", SHOWN)
def test_a_failure_shrinks_and_reads_like_a_page(name):
    judge, violation = shrunk(name)
    case, requirement = violation.case, violation.requirement
    assert isinstance(case, ShardedCase)
    assert case.num_tokens == 1
    assert case.layout.num_ranks == 2
    page = failure_page(judge, violation, diagnoses(judge, violation))
    for part in (requirement, "expected", "received", "router", "layout", "tags", f"replay {requirement}-"):
        assert part in page.replace("replay         moe-conformance ", "")
    assert f"looks like     {name}: {FAULTS[name].summary}" in page
    text = SHARDED.side_by_side(judge, case)
    for part in ("group_sizes_e", "output_TD", "reference", f" {name} "):
        assert part in text


def test_a_token_of_a_page_has_its_place():
    case = next(c for c in map(a_case, range(1000, 1400)) if c.layout.tensor > 1 and min(c.tokens_per_shard) > 0)
    last = case.num_tokens - 1
    rows = dict(SHARDED.rows_of_page(case, last))
    shard, tokens = case.layout.num_token_shards - 1, case.tokens_per_shard[-1]
    assert rows[f"place[{last}]"].startswith(f"token {tokens - 1} of shard {shard}, on rank ")
    assert "tokens_per_shard=(" in rows["layout"]


def test_a_replay_says_what_cannot_be_shown():
    judge, violation = shrunk("the-first-tensor-rank-alone-returns")
    assert isinstance(violation.case, ShardedCase)
    text = SHARDED.side_by_side(judge, violation.case)
    assert "returned nothing that can be shown: not one result for each rank" in text
