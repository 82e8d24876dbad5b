"""tests of the judge: the kind training accuses each of its faults by its own requirement, and nothing right."""

import json
from pathlib import Path

import numpy as np
import pytest

import conformance
from conformance.core.check import CHECKS
from conformance.core.judge import Judge, Violation
from conformance.core.register import of_stage
from conformance.core.subject import Subject, Unsupported
from conformance.core.trial import accuse
from conformance.run.causes import shrunk_with_causes
from conformance.run.kinds import case_of_json, load_faults
from conformance.run.report import failure_page
from conformance.subjects.reference import Reference
from conformance.training.case import MARGIN, TrainingCase
from conformance.training.check import TrainingCheck
from conformance.training.draw import LETTERS, STACKS, make_case
from conformance.training.kind import TRAINING
from conformance.training.verdicts import script_of, states_of_subject
from moe_ref import bias_update, tokens_per_expert

REQUIREMENTS = of_stage(*TRAINING.stages)
FAULTS = [fault for fault in load_faults().values() if fault.kind is TRAINING]


def shrunk(name: str) -> tuple[Judge, Violation, list]:
    """The judge of a fault, the smallest case that breaks the fault's requirement, and the faults that explain it."""
    fault = next(fault for fault in FAULTS if fault.name == name)
    judge = Judge(TRAINING.faulty(fault))
    return judge, *shrunk_with_causes(judge, accuse(judge, ids=[fault.requirement])[fault.requirement])


class Float64(Reference):
    """The oracle itself."""

    compute_dtype = expert_dtype = "float64"


@pytest.mark.parametrize("subject", [Reference, Float64], ids=lambda subject: subject.__name__)
def test_what_is_right_is_not_accused(subject):
    judge = Judge(subject())
    accused = accuse(judge, seed=1, examples=20, ids=REQUIREMENTS)
    assert {name: (str(v), v.expected, v.received) for name, v in accused.items()} == {}
    assert {name for name in REQUIREMENTS if judge.ledger[name].judged == 0} == set()


def test_a_subject_without_training_is_unsupported_and_not_ok():
    class Empty(Subject):
        """Defines nothing."""

    judge = Judge(Empty())
    assert accuse(judge, examples=4, ids=REQUIREMENTS) == {}
    assert {judge.ledger[name].status("MUST") for name in REQUIREMENTS} == {"unsupported"}


class Plain(Subject):
    """Written from the docstring of `train` alone: a loop over events, without forced choices and losses."""

    def supports_training(self, stack):
        if any(update is not None and not hasattr(update, "momentum") for update in stack.updates):
            return "a bias moves by counts"
        if any(update is not None and update.momentum for update in stack.updates):
            return "a bias moves by the counts of the step"
        return "there is no loss" if stack.balance is not None else None

    def train(self, events, stack, params):
        states, counts, biases = [], [], []
        for event in events:
            if event.kind == "build":
                sizes = [spec.router.num_experts for spec in stack.layers]
                counts = [np.zeros(E, int) for E in sizes]
                biases = [
                    np.zeros(E) if p.expert_bias_E is None else p.expert_bias_E
                    for E, p in zip(sizes, params, strict=True)
                ]
            elif event.kind == "step":
                pairs = list(zip(counts, stack.updates, biases, strict=True))
                biases = [b if rule is None else bias_update(c, rule, b) for c, rule, b in pairs]
                counts = [0 * c for c in counts]
            elif event.records is not None:
                raise Unsupported("no choice is forced")
            elif event.kind == "train":
                for layer, spec in enumerate(stack.layers):
                    assert event.x_LTD is not None
                    logits_TE = event.x_LTD[layer].astype(float) @ params[layer].gate_ED.T.astype(float)
                    shares_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(-1, keepdims=True)
                    is_softmax = spec.router.score_func == "softmax"
                    scores_TE = shares_TE if is_softmax else 1 / (1 + np.exp(-logits_TE))
                    ids_TK = np.argsort(-(scores_TE + biases[layer]))[:, : spec.router.top_k]
                    counts[layer] = counts[layer] + tokens_per_expert(ids_TK, len(counts[layer]), event.token_mask_T)
            states.append({"counts_by_layer": list(counts), "bias_by_layer": list(biases)})
        return states


def test_a_subject_of_25_lines_is_judged():
    judge = Judge(Plain())
    assert accuse(judge, examples=4, ids=REQUIREMENTS) == {}
    unsupported = {name for name in REQUIREMENTS if judge.ledger[name].status("MUST") == "unsupported"}
    assert unsupported == {"STP-15", "STP-16", "STP-17", "STP-18", "STP-19", "STP-20"}


class Forgetful(Plain):
    """Leaves out the last state."""

    def train(self, events, stack, params):
        return super().train(events, stack, params)[:-1]


class Shapeless(Plain):
    """Returns counts of all layers together."""

    def train(self, events, stack, params):
        return [state | {"counts_by_layer": [np.zeros(3)]} for state in super().train(events, stack, params)]


@pytest.mark.parametrize(
    ("subject", "title"), [(Forgetful, "not a state for each event"), (Shapeless, "a state of another form")]
)
def test_a_result_of_another_form_is_accused_once(subject, title):
    judge = Judge(subject())
    accused = accuse(judge, examples=4, ids=[name for name in REQUIREMENTS if name not in ("STP-13", "STP-14")])
    assert accused.keys() == {"STP-1"}
    assert accused["STP-1"].title.startswith(title)


SHOWN = {
    "evaluation-is-counted": "build, evaluate (1 tokens)",
    "a-recomputed-pass-is-counted-again": "build, train (1 tokens, recomputed)",
    "the-hook-ends-at-a-layer-without-an-update": "build, train (1 tokens), step",
    "the-first-rank-alone-has-a-hook": "build, train (1 tokens), step",
    "losses-of-layers-are-averaged": "build, train (1 tokens)",
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_failure_shrinks_replays_and_reads_like_a_page(name):
    judge, violation, causes = shrunk(name)
    case = violation.case
    assert isinstance(case, TrainingCase)
    assert case.num_tokens == 1
    again = case_of_json(json.loads(json.dumps(case.to_json())))
    assert (again.digest, again.tags, again.spec) == (case.digest, case.tags, case.spec)
    assert script_of(case.events).replace("evaluate", "train") == SHOWN[name].replace("evaluate", "train")
    page = failure_page(judge, violation, causes)
    for part in (violation.requirement, "expected", "received", "layer 0", "script", "wanted 1", "tags"):
        assert part in page
    assert f"looks like     {name}" in page


def test_a_replay_shows_both_states_after_every_event():
    judge, violation, _ = shrunk("evaluation-is-counted")
    assert isinstance(violation.case, TrainingCase)
    text = TRAINING.side_by_side(judge, violation.case)
    assert text.count("reference") == text.count("evaluation-is-counted ") == 2
    assert "1 evaluate (1 tokens)" in text


def test_a_replay_of_a_result_of_another_form_says_so():
    judge = Judge(Forgetful())
    (violation,) = accuse(judge, ids=["STP-1"]).values()
    assert isinstance(violation.case, TrainingCase)
    assert "returned nothing that can be shown: not a state for each event" in TRAINING.side_by_side(
        judge, violation.case
    )


def test_every_stack_and_every_letter_is_drawn_by_a_requirement_and_its_choices_are_clear():
    checks = [check for name in REQUIREMENTS if isinstance(check := CHECKS[name], TrainingCheck)]
    assert len(checks) == len(REQUIREMENTS)
    assert set().union(*(set(script) for check in checks for script in check.scripts)) == LETTERS.keys()
    assert [stack for stack in STACKS if not any(check.spec(stack) for check in checks)] == []
    assert all(script.startswith("b") for check in checks for script in check.scripts)
    for seed, stack in enumerate(STACKS):
        assert make_case(stack, scripts="btpsrse", bias="mixed", tokens=6, seed=seed).margin > MARGIN


def test_a_case_without_some_of_its_layers_and_events_is_a_case():
    case = make_case(STACKS[1], scripts="btfsqe", bias="mixed", tokens=3, seed=0)
    smaller = list(case.simpler())
    assert {len(each.spec.layers) for each in smaller} == {2, 3}
    assert {len(each.events) for each in smaller} == {5, 6}
    for each in (*smaller, case.tokens([1])):
        assert len(each.states) == len(each.events)
    assert case.tokens([1]).num_tokens == 1
    valid_T, last = case.events[4].token_mask_T, states_of_subject(Judge(Reference()), case)[-1]
    assert valid_T is not None
    assert last.counts_by_layer[0].sum() == 2 * valid_T.sum()


STORED = sorted((Path(conformance.__file__).parent / "deviations_of" / "witnesses").glob("STP-*.json"))


def test_a_stored_witness_keeps_its_name():
    witnesses = [json.loads(file.read_text()) for file in STORED]
    cases = [case_of_json(witness["case"]) for witness in witnesses]
    assert [f"{w['requirement']}-{c.digest}" for w, c in zip(witnesses, cases, strict=True)] == [f.stem for f in STORED]
    assert {type(case) for case in cases} == {TrainingCase}


def test_a_case_of_training_with_a_key_that_none_has_is_refused():
    data = json.loads(STORED[0].read_text())["case"]
    with pytest.raises(ValueError, match="a case of training has the keys"):
        case_of_json(data | {"token_ids_T": [0]})
    with pytest.raises(ValueError, match="an event of a case of training has the keys"):
        case_of_json(data | {"events": [{"kind": "build", "when": 0}]})
