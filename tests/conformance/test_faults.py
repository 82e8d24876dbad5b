"""tests of the judge: the judge is judged. Every known fault is accused, at its stage, by a named requirement."""

import contextlib
import time
from functools import wraps

import numpy as np
import pytest

from conformance.balance.kind import BALANCE
from conformance.core.capabilities import capabilities
from conformance.core.check import CHECKS
from conformance.core.fault import FAULTS, first_killer, killers, patched, replaces
from conformance.core.judge import Judge, Violation
from conformance.core.register import REQUIREMENTS, STAGES, of_stage, stage_order
from conformance.core.subject import Subject
from conformance.core.trial import accuse
from conformance.router.draw import SPECS, make_case
from conformance.router.faulty import FaultyRouter, routing_under
from conformance.router.kind import ROUTER, requires
from conformance.run.kinds import load_faults
from conformance.sharded.kind import SHARDED
from conformance.subjects.reference import Reference
from conformance.training.kind import TRAINING
from moe_ref import RouterSpec, experts, layer

load_faults()
PARTS = 4
"""The faults of a stage are tested in so many parts, which run side by side."""
EXACT = (SHARDED, BALANCE, TRAINING)
"""Kinds of which no fault is accused by another requirement of its stage first."""

PUBLIC_BUGS = {
    "softmax-divides-in-one-warp": "ggml-org/llama.cpp#16711",
    "argpartition-at-k": "ml-explore/mlx-examples#671",
    "bfloat16-gate": "vllm-project/vllm#14027",
    "biased-weights-ernie": "huggingface/transformers#39581",
    "biased-scores-from-the-gate": "AI-Hypercomputer/maxtext#1492",
    "double-norm-before-the-gate": "NVIDIA-NeMo/Automodel#1852",
    "eps-above-the-scores": "NVIDIA/Megatron-LM#1545",
    "gate-bias-in-the-fused-path": "vllm-project/vllm#29237",
    "gate-bias-or-selection-bias": "NVIDIA/Megatron-LM#1971",
    "gate-quantised": "vllm-project/vllm#23031",
    "gguf-drops-norm": "huggingface/transformers#41151",
    "group-ranks-of-mistral-rs": "EricLBuehler/mistral.rs#1278",
    "groups-for-every-sigmoid": "vllm-project/vllm#34673",
    "impossible-groups": "huggingface/transformers#48647",
    "mask-of-0-official": "deepseek-ai/DeepSeek-V3#741",
    "mask-of-0-transformers": "huggingface/transformers#45441",
    "nan-beats-nothing": "vllm-project/vllm#39391",
    "nan-beyond-the-experts": "sgl-project/sglang#30079",
    "nan-minus-one": "intel/torch-xpu-ops#4839",
    "nan-negative": "openxla/xla#48119",
    "nan-repeats": "jax-ml/jax#21397",
    "nan-by-position": "tensorflow/tensorflow#117287",
    "noise-at-inference": "eduardzamfir/MoCE-IR#19",
    "norm-default-fak": "anthony-chaudhary/fak#9720",
    "norm-default-mere-run": "sawfwair/mere-run#136",
    "norm-default-swiftlet": "leonickson1/Swiftlet#6",
    "norm-missing": "pytorch/torchtitan#1418",
    "norm-missing-converted": "pytorch/torchtitan#1448",
    "norm-over-tokens": "databricks/megablocks#87",
    "norm-read-back": "flagos-ai/FlagGems#5123",
    "one-kernel-tile": "MetaX-MACA/vLLM-metax#270",
    "padding-in-some-paths": "vllm-project/vllm#50759",
    "padding-stale": "sgl-project/sglang#36404",
    "per-expert-scale-folded": "onnxruntime/mobius#546",
    "raw-logits": "sgl-project/sglang#35160",
    "replay-boundary": "PrimeIntellect-ai/prime-rl#1807",
    "replay-ids-without-weights": "radixark/miles#2722",
    "replay-positions": "AI-Hypercomputer/maxtext#5266",
    "replay-skips-padded-sequences": "radixark/miles#645",
    "replay-transposed": "radixark/miles#3146",
    "router-precision": "NVIDIA-NeMo/Automodel#3650",
    "scale-twice": "vllm-project/vllm#45037",
    "silent-kernel-tier": "flashinfer-ai/flashinfer#3840",
    "softmax-order-gemma": "ml-explore/mlx-swift-lm#228",
    "softmax-order-litgpt": "Lightning-AI/litgpt#2014",
    "softmax-over-selected-olmoe": "lablup/mlxcel#391",
    "softmax-where-sigmoid": "ggml-org/llama.cpp#18980",
    "sqrtsoftplus-unknown": "flashinfer-ai/flashinfer#5190",
    "ties-in-the-oracle": "vllm-project/vllm#54403",
    "top-2-for-every-group": "NVIDIA/Megatron-LM#1441",
    "top-k-all-negative": "vllm-project/vllm#37605",
    "top-k-unsorted": "vllm-project/vllm#55514",
    "top-k-wide": "pytorch/pytorch#196177",
    "capacity-of-uneven-ranks": "vllm-project/vllm-ascend#16384",
    "dispatcher-count": "vllm-project/vllm#23619",
}
"""Bugs of routing reported in public, each under a short name: the faults cover them."""

NOT_FAULTS = {
    "nan-by-position": "what the row of a NaN selects is free as long as its ids are distinct and in range (RUN-5)",
    "softmax-order-litgpt": "no bug: with a norm, softmax before and after the selection are the same number",
}
"""Why a bug is not among the faults."""


def of_kind(kind) -> list:
    return [fault for fault in FAULTS.values() if fault.kind is kind]


def explained(judge: Judge, case) -> list:
    """What the diagnosis says of a case of a router."""
    violation = Violation("another routing", requirement="RUN-1", case=case)
    return ROUTER.diagnose(judge, violation, of_kind(ROUTER))


def test_every_public_bug_is_a_fault_or_says_why_not():
    covered = {link for fault in FAULTS.values() for link in fault.links}
    uncovered = {name for name, link in PUBLIC_BUGS.items() if link not in covered}
    assert uncovered == NOT_FAULTS.keys()


def test_a_fault_has_a_kebab_case_name_and_one_sentence():
    for fault in FAULTS.values():
        assert fault.name == fault.name.lower().replace("_", "-")
        assert fault.summary.endswith(".")
        assert "\n" not in fault.summary


def test_every_requirement_has_a_check_and_a_fault_that_breaks_it():
    assert CHECKS.keys() == REQUIREMENTS.keys()
    assert {fault.requirement for fault in FAULTS.values()} == set(REQUIREMENTS)


def test_a_check_and_a_fault_of_an_id_that_no_requirement_has_are_errors():
    with pytest.raises(ValueError, match="no row with the id 'SEL-999'"):
        requires("SEL-999")(print)
    with pytest.raises(ValueError, match="no row with the id 'GRP-999'"):
        requires("SEL-2", after=("GRP-999",))(print)
    with pytest.raises(AssertionError, match="SEL-999"):
        replaces("select", breaks="SEL-999")(first_killer)
    assert not {"SEL-999", "GRP-999"} & CHECKS.keys()
    assert "first-killer" not in FAULTS


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("stage", STAGES)
def test_every_fault_is_accused_at_its_stage_by_the_cases_of_a_run(stage, part):
    survivors, elsewhere = [], {}
    for fault in [fault for fault in FAULTS.values() if fault.stage == stage][part::PARTS]:
        violation = first_killer(fault)
        right = [fault.requirement] if fault.kind in EXACT else of_stage(*fault.stages)
        if violation is None:
            survivors.append(fault.name)
        elif violation.requirement not in right:
            elsewhere[fault.name] = violation.requirement
    assert survivors == []
    assert elsewhere == {}


def test_every_fault_of_a_router_is_accused_by_other_cases_too_and_where_it_shows_its_stages():
    found = {fault.name: first_killer(fault, seed=1, shows_stages=True) for fault in of_kind(ROUTER)}
    assert [name for name, violation in found.items() if violation is None] == []


@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_a_requirement_accuses_a_fault_of_its_own(requirement):
    accused = {}
    for fault in [fault for fault in FAULTS.values() if fault.requirement == requirement]:
        accused[fault.name] = list(accuse(Judge(fault.kind.faulty(fault)), ids=[requirement]))
        if requirement in accused[fault.name]:
            return
    pytest.fail(f"{requirement} accuses none of its faults; what its check accuses in its place: {accused}")


LATE = ("bias-missing", "scale-missing", "weights-reversed", "dropped-groups-filled-with-0", "learned-scale-by-slot",
        "group-scores-without-bias", "last-pick-off-by-one", "shared-weigh-1")  # fmt: skip


@pytest.mark.parametrize("name", LATE)
def test_no_earlier_stage_is_accused(name):
    fault = FAULTS[name]
    earlier = [
        each for each, r in REQUIREMENTS.items()
        if r.stage in ROUTER.stages and STAGES.index(r.stage) < STAGES.index(fault.stage)
    ]  # fmt: skip
    accused = accuse(Judge(FaultyRouter(fault)), seed=5, examples=6, ids=earlier)
    assert [each for each in accused if REQUIREMENTS[each].stage not in fault.stages] == []


def test_a_fault_changes_nothing_once_its_call_is_over():
    case = a_case(RouterSpec(num_experts=8, top_k=2))
    clean = case.reference
    for fault in of_kind(ROUTER):
        before = Reference().route(case.logits_TE, case.spec, None)
        if fault.method == "route":
            with contextlib.suppress(ValueError, RuntimeError):
                routing_under(fault, case)
        after = Reference().route(case.logits_TE, case.spec, None)
        assert (before.weights_TK == after.weights_TK).all()
    assert (case.with_().reference.weights_TK == clean.weights_TK).all()


def test_a_patched_function_is_another_wherever_it_is_known_and_itself_afterwards():
    clean = experts.hide
    with patched({"hide": max, "combine": max}):
        assert experts.hide is max
        assert layer.combine is max
    assert experts.hide is clean
    assert layer.combine is experts.combine


def test_a_patch_of_a_name_that_nothing_has_is_an_error():
    with pytest.raises(AssertionError, match="no_such_function"), patched({"no_such_function": max}):
        pass


def test_a_faulty_router_shows_its_stages_only_where_it_is_asked_to():
    case = a_case(RouterSpec(num_experts=8, top_k=2, num_expert_groups=4, num_limited_groups=2))
    closed, shown = (
        FaultyRouter(FAULTS["groups-ignored"], shows_stages=shows).route(case.logits_TE, case.spec, None)
        for shows in (False, True)
    )
    assert closed.scores_TE is None
    assert closed.group_ids_TL is None
    assert shown.scores_TE is not None
    assert shown.group_ids_TL is not None
    assert capabilities(FaultyRouter(FAULTS["groups-ignored"])) == {"route", "gate", "configure"}


def test_killers_are_listed_by_stage():
    assert list(killers(FAULTS["gate-bias-missing"], examples=5)) == ["GAT-2"]
    found = list(killers(FAULTS["norm-missing"], examples=5))
    assert found[0] == "WGT-2"
    assert found == sorted(found, key=stage_order)


# a subject that is not deterministic


class FailsOnce(Subject):
    """The reference, but its first call returns other weights."""

    logit_dtypes = ("float32", "float64", "bfloat16")

    def __init__(self):
        self.reference, self.calls = Reference(), 0

    @wraps(Reference.route)
    def route(self, logits_TE, spec, expert_bias_E, **inputs):
        self.calls += 1
        found = self.reference.route(logits_TE, spec, expert_bias_E, **inputs)
        return type(found)(**vars(found) | {"weights_TK": found.weights_TK * (2 if self.calls == 1 else 1)})


def test_a_violation_that_does_not_repeat_is_a_violation_all_the_same():
    assert "RUN-4" in accuse(Judge(FailsOnce()), ids=["RUN-4"])


# the diagnosis


def a_case(spec: RouterSpec, *, logits="normal", bias="none", tokens=1, seed=0):
    return make_case(spec, CHECKS["RUN-1"], logits=logits, bias=bias, tokens=tokens, seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["norm-missing", "scale-twice", "group-score-of-the-best", "softmax-for-sigmoid",
                                  "dropped-groups-filled-with-0", "weights-of-biased-scores"])  # fmt: skip
def test_the_diagnosis_names_the_fault(name):
    spec = RouterSpec(num_experts=16, top_k=4, score_func="sigmoid", num_expert_groups=4, num_limited_groups=2,
                      route_norm=True, norm_eps=1e-20, route_scale=2.5)  # fmt: skip
    for seed in range(200):
        found = explained(Judge(FaultyRouter(FAULTS[name])), a_case(spec, bias="negative", seed=seed))
        if found:
            break
    assert FAULTS[name] in found
    assert len(found) <= 8


def test_the_diagnosis_of_what_is_right_is_empty():
    for seed, spec in enumerate(SPECS):
        case = a_case(spec, bias="mixed", tokens=3, seed=seed)
        assert explained(Judge(Reference()), case) == []


def test_the_diagnosis_of_a_token_takes_less_than_a_second():
    case = a_case(RouterSpec(num_experts=8, top_k=2, route_norm=True))
    judge = Judge(FaultyRouter(FAULTS["norm-missing"]))
    start = time.process_time()
    explained(judge, case)
    assert time.process_time() - start < 1


def test_an_unknown_fault_has_no_diagnosis():
    class Strange(Reference):
        """Weights that nobody else would return."""

        @wraps(Reference.route)
        def route(self, logits_TE, spec, expert_bias_E, **inputs):
            found = super().route(logits_TE, spec, expert_bias_E, **inputs)
            return type(found)(**vars(found) | {"weights_TK": np.full(found.weights_TK.shape, 0.123)})

    assert explained(Judge(Strange()), a_case(RouterSpec(num_experts=8, top_k=2))) == []
