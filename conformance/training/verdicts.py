"""conformance, training: what a subject returns for a script, checked for its form, and held against the reference.

An event is judged on the subject's own state before it, so that one fault is seen at one event. An error, and a result
of another form, violate the requirement of the check that runs.

Legend: T tokens, E choices.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from conformance.core.holding import array_from
from conformance.core.judge import Judge, Violation, accuse
from conformance.core.rounding import EPSILON, TINY
from conformance.core.show import numbers
from conformance.training.case import TrainingCase, margin_of, params_of
from moe_ref import BiasUpdateSpec, Event, QuantileSpec, TrainingState
from moe_ref.training import after, built

ROUNDINGS = 32
"""Granted to a number that is made of few others."""


def script_of(events: tuple[Event, ...]) -> str:
    """A script in short form."""
    return ", ".join(map(name_of, events))


def name_of(event: Event) -> str:
    """An event in short form: train (4 tokens, 1 of padding, recomputed)."""
    if event.x_LTD is None:
        return event.kind
    padding = 0 if event.token_mask_T is None else int((~event.token_mask_T).sum())
    facts = [f"{event.x_LTD.shape[1]} tokens"]
    facts += [f"{padding} of padding"] if event.token_mask_T is not None else []
    facts += ["forced"] if event.records is not None else []
    facts += ["recomputed"] if event.recomputed else []
    return f"{event.kind} ({', '.join(facts)})"


def given_event(event: Event) -> Event:
    """The event with tokens in float32, in memory of its own."""
    if event.x_LTD is None:
        return event
    mask_T = event.token_mask_T
    return replace(event, x_LTD=event.x_LTD.astype(np.float32), token_mask_T=None if mask_T is None else mask_T.copy())


def states_of_subject(judge: Judge, case: TrainingCase) -> list[TrainingState]:
    """The subject's state after each event; counts as int64, biases as float64."""
    params = [
        params_of(spec, gate_ED.astype(np.float32), None if bias_E is None else bias_E.astype(np.float32))
        for spec, gate_ED, bias_E in zip(case.spec.layers, case.gates, case.biases, strict=True)
    ]
    returned = judge.call(case, "train", [given_event(event) for event in case.events], case.spec, params)
    if not isinstance(returned, (list, tuple)) or len(returned) != len(case.events):
        accuse(
            "not a state for each event",
            expected=f"{len(case.events)} states",
            received=f"{len(returned)} states" if isinstance(returned, (list, tuple)) else str(returned)[:200],
        )
    return [_state(case, number, each) for number, each in enumerate(returned)]


def _state(case: TrainingCase, number: int, returned: Any) -> TrainingState:
    where = f"after event {number}, {name_of(case.events[number])}"
    try:
        counts, biases = (
            [array_from(each, f"{name} {where}: no array") for each in returned[name]]
            for name in ("counts_by_layer", "bias_by_layer")
        )
        loss = returned.get("loss")
        loss = None if loss is None else float(loss)
        biases = [bias_E.astype(np.float64) for bias_E in biases]
    except (TypeError, KeyError, ValueError, AttributeError):
        received = str(returned)[:200]
        raise Violation(f"no state {where}", expected="counts_by_layer, bias_by_layer", received=received) from None
    shapes = [(spec.router.num_choices,) for spec in case.spec.layers]
    integers = all(counts_E.dtype.kind in "iu" for counts_E in counts)
    if [each.shape for each in counts] != shapes or [each.shape for each in biases] != shapes or not integers:
        received = f"counts {[f'{c.dtype}{list(c.shape)}' for c in counts]}, biases {[list(b.shape) for b in biases]}"
        accuse(f"a state of another form {where}", expected=f"integers and biases of {shapes}", received=received)
    is_pass = case.events[number].x_LTD is not None and case.spec.balance is not None
    if is_pass and loss is None:
        accuse(f"no loss {where}", expected="a number", received=None)
    return TrainingState(counts_by_layer=[c.astype(np.int64) for c in counts], bias_by_layer=biases, loss=loss)


@dataclass(frozen=True, kw_only=True)
class Transition:
    """One event, and the subject's own states around it."""

    case: TrainingCase
    number: int
    """Of the event, the first of a script being 0."""
    before: TrainingState
    found: TrainingState
    steps: int
    """How many there were since the layers were built."""
    passes: int
    """Training passes before this event since the last step."""

    @property
    def event(self) -> Event:
        return self.case.events[self.number]

    @cached_property
    def wanted(self) -> TrainingState:
        """The reference's state after this event, from the subject's own one before it."""
        return after(self.event, self.before, self.case.spec, self.case.params)

    @cached_property
    def margin(self) -> float:
        """How near the nearest choice of a router is to another one, with the subject's own biases."""
        if self.event.x_LTD is None or self.event.records is not None:
            return np.inf
        case, biases = self.case, self.before.bias_by_layer
        margins = (margin_of(self.event, layer, case.spec, case.params, bias_E) for layer, bias_E in enumerate(biases))
        return min(margins, default=np.inf)

    def is_pass(self, kind: str, *, recomputed: bool = False, padded: bool = False, forced: bool = False) -> bool:
        """Whether the event is a pass of that kind, with these things and no others."""
        event = self.event
        found = (event.kind, event.recomputed, event.token_mask_T is not None, event.records is not None)
        return found == (kind, recomputed, padded, forced)


def transitions(judge: Judge, case: TrainingCase) -> Iterator[Transition]:
    """Every event but the first. One whose state before is none at all (NaN, counts below 0) is left out."""
    states, steps, passes = states_of_subject(judge, case), 0, 0
    unseen = built(case.spec, case.params, np.float64)
    for number in range(1, len(states)):
        before = _with_unseen(states[number - 1], unseen)
        whole = all(np.isfinite(bias_E).all() for bias_E in before.bias_by_layer)
        if whole and all((counts_E >= 0).all() for counts_E in before.counts_by_layer):
            each = Transition(case=case, number=number, before=before, found=states[number], steps=steps, passes=passes)
            yield each
            unseen = each.wanted
        kind = case.events[number].kind
        steps = {"build": 0, "step": steps + 1}.get(kind, steps)
        passes = {"build": 0, "step": 0, "train": passes + 1}.get(kind, passes)


def _with_unseen(state: TrainingState, unseen: TrainingState) -> TrainingState:
    """A subject's state, with what no subject shows of it: as the reference has it from the states before."""
    return replace(state, needs_by_layer=unseen.needs_by_layer, last_step_by_layer=unseen.last_step_by_layer)


# holding a state against another


def hold_counts(found: TrainingState, wanted: TrainingState, title: str, case: TrainingCase, number: int) -> None:
    """The counts of every layer are the wanted ones."""
    for layer, (own_E, right_E) in enumerate(zip(found.counts_by_layer, wanted.counts_by_layer, strict=True)):
        if (own_E != right_E).any():
            _accuse(title, case, number, layer, "counts", right_E, own_E)


def hold_bias(
    judge: Judge, found: TrainingState, wanted: TrainingState, title: str, case: TrainingCase, number: int, **how: Any
) -> None:
    """The bias of every layer, or of those in `layers`, is the wanted one, within the rounding of `steps` updates."""
    steps, layers = how.get("steps", 1), how.get("layers", range(len(case.spec.layers)))
    for layer in layers:
        own_E, right_E, update = found.bias_by_layer[layer], wanted.bias_by_layer[layer], case.spec.updates[layer]
        radius_E = steps * (0 if update is None else bias_radius(judge, case, layer, right_E, update))
        if not (np.abs(own_E - right_E) <= radius_E).all():
            _accuse(title, case, number, layer, "bias", right_E, own_E)


def bias_radius(
    judge: Judge, case: TrainingCase, layer: int, wanted_E: np.ndarray, update: BiasUpdateSpec | QuantileSpec
) -> np.ndarray:
    """A step is rounded, and so is its sum with the bias; a rule moves no bias farther than this."""
    if isinstance(update, QuantileSpec):
        return quantile_radius(judge, case, layer, wanted_E, update)
    slots = len(case.events) * case.num_tokens * case.spec.layers[layer].router.top_k
    largest = {"sign": 2, "proportional": slots, "relative": len(wanted_E), "tanh": 2}[update.rule]
    largest += update.steepness * len(wanted_E) * (update.rule == "tanh")
    return 16 * EPSILON[judge.subject.compute_dtype] * (np.abs(wanted_E).max() + update.rate * largest)


def quantile_radius(
    judge: Judge, case: TrainingCase, layer: int, wanted_E: np.ndarray, update: QuantileSpec
) -> np.ndarray:
    """A score is off as far as its logit, a sum of D products; near an edge a need is in the next bin."""
    gate_ED = case.gates[layer]
    tokens = [np.abs(event.x_LTD[layer]) for event in case.events if event.x_LTD is not None]
    largest = max(((x_TD @ np.abs(gate_ED).T).max(initial=0) for x_TD in tokens), default=0)
    size = np.abs(wanted_E).max() + 1
    radius = EPSILON[judge.subject.compute_dtype] * (ROUNDINGS * size + 2 * (gate_ED.shape[1] + 2) * largest)
    # Each bias moves by a bin or two, and the mean with it; the biases before were no larger than twice these.
    return np.full_like(wanted_E, 2 * radius + (0 if update.bins is None else 4 * (2 + 4 * size) / update.bins))


def hold_loss(judge: Judge, found: TrainingState, wanted: TrainingState, title: str, case: TrainingCase, number: int):
    """The loss of a pass is the wanted one, within the rounding of logits, scores and sums."""
    if wanted.loss is None:
        return
    if found.loss is None or not abs(found.loss - wanted.loss) <= loss_radius(judge, case, number, wanted.loss):
        accuse(
            f"{title}: event {number}, {name_of(case.events[number])}",
            expected=f"loss {wanted.loss:.9g}",
            received=f"loss {found.loss}",
        )


def loss_radius(judge: Judge, case: TrainingCase, number: int, loss: float) -> float:
    """Logits are sums of D products, a score is a share of exp, and the loss is a sum of scores that are at least 0."""
    dtype, x_LTD = judge.subject.compute_dtype, case.events[number].x_LTD
    assert x_LTD is not None
    L, T, D = x_LTD.shape
    sizes = [np.abs(x_TD) @ np.abs(gate_ED).T for x_TD, gate_ED in zip(x_LTD, case.gates, strict=True)]
    largest = max((size_TE.max(initial=0) for size_TE in sizes), default=0)
    E = max((len(gate_ED) for gate_ED in case.gates), default=0)
    terms = ROUNDINGS + L * T + E + 2 * (D + 2) * largest
    return 2 * terms * EPSILON[dtype] * abs(loss) + TINY[dtype]


def _accuse(title: str, case: TrainingCase, number: int, layer: int, name: str, wanted_E, found_E) -> None:
    accuse(
        f"{title}: event {number}, {name_of(case.events[number])}, layer {layer}",
        expected=f"{name} {numbers(wanted_E)}",
        received=f"{name} {numbers(found_E)}",
    )
