"""conformance, training: steps. What is counted, when a bias moves, and what neither touches."""

import numpy as np

from conformance.core.check import given
from conformance.core.judge import Judge, Violation, accuse
from conformance.training.case import MARGIN, TrainingCase
from conformance.training.kind import requires
from conformance.training.verdicts import (
    Transition,
    hold_bias,
    hold_counts,
    hold_loss,
    states_of_subject,
    transitions,
)
from moe_ref import QuantileSpec, StackSpec
from moe_ref.specs.training import FORWARD
from moe_ref.training import after, built, route_layer

CLEAR = given("judged where every choice is beyond doubt", lambda case: case.margin > MARGIN / 2)
NO_TIE = 1e-5
"""Choice scores that are farther apart are no tie in float32."""
FORM = ("STP-1",)


def simple(stack: StackSpec) -> bool:
    """Layers in one process, without a loss."""
    return bool(stack.layers) and stack.num_ranks == 1 and stack.balance is None


def by_quantile(stack: StackSpec) -> bool:
    return simple(stack) and any(isinstance(update, QuantileSpec) for update in stack.updates)


def with_momentum(stack: StackSpec) -> bool:
    return simple(stack) and any(getattr(update, "momentum", 0) for update in stack.updates)


def plain(stack: StackSpec) -> bool:
    """Such layers, whose biases move by the counts of the step alone."""
    return simple(stack) and not by_quantile(stack) and not with_momentum(stack)


def every_layer_moves(stack: StackSpec) -> bool:
    return plain(stack) and None not in stack.updates


def some_layer_stays(stack: StackSpec) -> bool:
    return plain(stack) and None in stack.updates


def unpadded(case: TrainingCase) -> TrainingCase:
    """The same script without padding."""
    return case.without("token_mask_T")


def run_once(case: TrainingCase) -> TrainingCase:
    """The same script, without recomputation."""
    return case.without("recomputed")


def unforced(case: TrainingCase) -> TrainingCase:
    """The same script, with the routers' own choices."""
    return case.without("records")


def hold_pass(judge: Judge, each: Transition, title: str) -> None:
    """The event has added what it is to add; where the subject's own bias makes a tie, that is forgiven."""
    try:
        hold_counts(each.found, each.wanted, title, each.case, each.number)
    except Violation:
        if each.margin > NO_TIE:
            raise
        judge.near_ties(1)


@requires("STP-1", scripts=("btsts", "betrsbf"), spec=lambda s: plain(s) or (bool(s.layers) and s.num_ranks == 1))
def every_event_has_a_state(judge, case):
    states_of_subject(judge, case)


@requires("STP-2", scripts=("b", "btb", "btstb", "btsebt"), spec=plain, after=FORM)
def layers_are_built_with_counts_of_0(judge, case):
    found, wanted = states_of_subject(judge, case), built(case.spec, case.params, np.float64)
    for number, event in enumerate(case.events):
        if event.kind == "build":
            hold_counts(found[number], wanted, "counts of new layers", case, number)
            hold_bias(judge, found[number], wanted, "the bias of a new layer", case, number)


@requires("STP-3", scripts=("bt",), spec=plain, given=(CLEAR,), after=(*FORM, "STP-2"))
def a_training_pass_counts_its_slots(judge, case):
    for each in transitions(judge, case):
        if each.is_pass("train") and not each.passes and not each.steps:
            hold_pass(judge, each, "not the slots of this pass")


@requires(
    "STP-4",
    scripts=("bp", "bpp", "bpsp"),
    spec=plain,
    given=(CLEAR,),
    after=FORM,
    simpler=((unpadded, ("STP-3", "STP-7", "STP-11")),),
)
def padding_is_counted_nowhere(judge, case):
    for each in transitions(judge, case):
        if each.is_pass("train", padded=True):
            hold_pass(judge, each, "with padding")


@requires("STP-5", scripts=("be", "bte", "btse", "bvt", "btvs"), spec=plain, after=FORM)
def evaluation_changes_nothing(judge, case):
    for each in transitions(judge, case):
        if each.event.kind == "evaluate":
            hold_counts(each.found, each.before, "changed by evaluation", case, each.number)
            for layer, bias_E in enumerate(each.before.bias_by_layer):
                if not np.array_equal(each.found.bias_by_layer[layer], bias_E):
                    received = each.found.bias_by_layer[layer]
                    accuse(f"a bias changed by evaluation: layer {layer}", expected=bias_E, received=received)


@requires(
    "STP-6",
    scripts=("br", "brr", "btrs"),
    spec=plain,
    given=(CLEAR,),
    after=FORM,
    simpler=((run_once, ("STP-3", "STP-7")),),
)
def a_recomputed_micro_batch_is_counted_once(judge, case):
    for each in transitions(judge, case):
        if each.is_pass("train", recomputed=True):
            hold_pass(judge, each, "with recomputation")


@requires("STP-7", scripts=("btt", "bttt", "btet"), spec=plain, given=(CLEAR,), after=(*FORM, "STP-3", "STP-11"))
def micro_batches_of_a_step_add_up(judge, case):
    for each in transitions(judge, case):
        if each.is_pass("train"):
            if each.passes:
                hold_pass(judge, each, "not added to what was counted before")
            hold_bias(judge, each.found, each.before, "a bias moved before the step", case, each.number)


def hold_step(judge: Judge, each: Transition, title: str, layers: list[int]) -> None:
    """Biases after a step, by the counts before it."""
    hold_bias(judge, each.found, each.wanted, title, each.case, each.number, layers=layers)


def steps_of(judge: Judge, case: TrainingCase, *, forced: bool) -> list[Transition]:
    """Steps with forced passes among those since the one before, or without any."""
    found, seen = [], False
    for each in transitions(judge, case):
        if each.event.kind == "step":
            found += [each] if seen == forced else []
            seen = False
        elif each.event.kind in ("build", "train"):
            seen = each.event.records is not None or (seen and each.event.kind == "train")
    return found


def moving(each: Transition) -> list[int]:
    """The layers that have an update and have counted something."""
    counts = each.before.counts_by_layer
    return [layer for layer, rule in enumerate(each.case.spec.updates) if rule is not None and counts[layer].any()]


@requires("STP-8", scripts=("bts", "btts", "btsts"), spec=every_layer_moves, after=FORM)
def every_bias_moves_by_the_counts_of_its_layer(judge, case):
    for each in steps_of(judge, case, forced=False):
        hold_step(judge, each, "not moved by its own counts", moving(each))


@requires("STP-9", scripts=("bts", "btsts"), spec=some_layer_stays, after=FORM)
def a_layer_without_an_update_stays_alone(judge, case):
    for each in steps_of(judge, case, forced=False):
        stays = [layer for layer, rule in enumerate(case.spec.updates) if rule is None]
        if stays:
            hold_step(judge, each, "with a layer that has no update", [*stays, *moving(each)])


@requires("STP-10", scripts=("bts", "btsts", "btses"), spec=plain, after=FORM)
def a_step_begins_to_count_anew(judge, case):
    for each in transitions(judge, case):
        if each.event.kind == "step":
            hold_counts(each.found, each.wanted, "not 0 after a step", case, each.number)


def a_choice_depends_on_a_step(case: TrainingCase) -> bool:
    """A pass after a step has other choices than it would have with the biases of the beginning."""
    first = case.states[0].bias_by_layer
    for before, event in zip(case.states, case.events[1:], strict=False):
        if event.kind == "train" and event.records is None:
            for layer, bias_E in enumerate(before.bias_by_layer):
                moved, unmoved = (
                    route_layer(event, layer, case.spec, case.params, each_E, np.float64).expert_ids_TK
                    for each_E in (bias_E, first[layer])
                )
                if (np.sort(moved) != np.sort(unmoved)).any():
                    return True
    return False


@requires(
    "STP-11",
    scripts=("btst", "btstst", "btsbtst"),
    spec=plain,
    given=(CLEAR, given("judged where a moved bias changes a choice", a_choice_depends_on_a_step)),
    after=(*FORM, "STP-3"),
)
def a_choice_is_made_with_the_moved_bias(judge, case):
    for each in transitions(judge, case):
        if each.is_pass("train") and each.steps and not each.passes:
            hold_pass(judge, each, "not the choice of the bias of now")


@requires("STP-12", scripts=("bs", "bus", "btsus", "btss"), spec=plain, after=FORM)
def a_layer_without_tokens_keeps_its_bias(judge, case):
    for each in transitions(judge, case):
        if each.event.kind == "step":
            empty = [layer for layer, counts_E in enumerate(each.before.counts_by_layer) if not counts_E.any()]
            hold_step(judge, each, "without a token in the step", empty)


@requires("STP-13", scripts=("b", "bts", "betrspb"), spec=lambda s: not s.layers)
def without_layers_there_is_an_empty_state(judge, case):
    states_of_subject(judge, case)


def hold_all(judge: Judge, case: TrainingCase, title: str) -> None:
    """Every state is the reference's, which ran the script by itself."""
    for number, (found, wanted) in enumerate(zip(states_of_subject(judge, case), case.states, strict=True)):
        hold_counts(found, wanted, title, case, number)
        hold_bias(judge, found, wanted, title, case, number, steps=1 + number)


SINGLE = tuple(f"STP-{number}" for number in (*range(1, 13), 16, 17))
"""What is judged event by event."""


@requires(
    "STP-14",
    scripts=("bts", "bttsets", "btsts"),
    spec=lambda s: bool(s.layers) and s.num_ranks > 1,
    given=(CLEAR,),
    simpler=((TrainingCase.in_one_process, SINGLE),),
)
def pipeline_ranks_agree_with_one_process(judge, case):
    hold_all(judge, case, "on pipeline ranks")


@requires(
    "STP-15",
    scripts=("bt", "be", "bet", "btse", "bp"),
    spec=lambda s: bool(s.layers) and s.num_ranks == 1 and s.balance is not None,
    given=(CLEAR,),
    after=FORM,
)
def the_loss_is_over_all_layers(judge, case):
    for each in transitions(judge, case):
        if each.event.kind in FORWARD:
            wanted = after(each.event, each.before, case.spec, case.params)
            hold_loss(judge, each.found, wanted, "not the loss over layers", case, each.number)


@requires(
    "STP-16",
    scripts=("bf", "btf", "bfsf", "btsf", "bg"),
    spec=plain,
    given=(CLEAR,),
    after=FORM,
    simpler=((unforced, ("STP-3", "STP-6", "STP-7", "STP-11")),),
)
def a_forced_choice_is_counted_as_it_is(judge, case):
    for each in transitions(judge, case):
        if each.event.kind == "train" and each.event.records is not None and each.event.token_mask_T is None:
            hold_pass(judge, each, "not the forced choice")


@requires(
    "STP-17",
    scripts=("bfs", "btfs", "bfsfs"),
    spec=every_layer_moves,
    after=(*FORM, "STP-16"),
    simpler=((unforced, ("STP-8",)),),
)
def a_bias_moves_by_the_forced_counts(judge, case):
    for each in steps_of(judge, case, forced=True):
        hold_step(judge, each, "not moved by the forced choice", moving(each))


@requires(
    "STP-18",
    scripts=("bqegsfqst", "brtvsgpsqs", "bttsuepsrs", "bqsqsqsbgs"),
    spec=plain,
    given=(CLEAR,),
    after=SINGLE,
)
def all_of_it_together(judge, case):
    hold_all(judge, case, "in a whole script")


def hold_moves(judge: Judge, case: TrainingCase, title: str) -> None:
    """Each event leaves the biases that the reference has after it, from the subject's own ones before."""
    for each in transitions(judge, case):
        hold_bias(judge, each.found, each.wanted, title, case, each.number)


@requires(
    "STP-19",
    scripts=("bts", "bttsts", "bettsets", "brtsrs", "bptsps", "bftsfs"),
    spec=by_quantile,
    after=FORM,
)
def a_quantile_is_of_the_training_passes_of_the_step(judge, case):
    hold_moves(judge, case, "not the quantile of the step")


@requires("STP-20", scripts=("btsts", "btstsbts"), spec=with_momentum, after=FORM)
def momentum_goes_on_from_the_last_step(judge, case):
    hold_moves(judge, case, "not the last step and this one")
