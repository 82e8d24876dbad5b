"""conformance, training: its case. A stack of layers, and a script of what happens to it.

Legend: L layers, T tokens, D model dim, E choices, K top_k.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Self

import numpy as np

from conformance.core.case import Case, plain, rounder
from conformance.core.subject import Subject
from moe_ref import UNUSED, Event, LayerParams, LayerSpec, QuantileSpec, RoutingRecord, StackSpec, TrainingState, train
from moe_ref.specs.params import param_shapes
from moe_ref.specs.training import FORWARD
from moe_ref.training import route_layer

MARGIN = 1e-3
"""So far apart the last chosen and the first other score are: no rounding takes them past each other."""


@dataclass(frozen=True, kw_only=True)
class TrainingCase(Case):
    """A stack and its script, in float64; the subject is given float32, which holds the numbers."""

    KEYS = frozenset({"stack", "gates", "biases", "events"})

    spec: StackSpec
    gates: tuple[np.ndarray, ...]
    """(num_logits, D) of each layer."""
    biases: tuple[np.ndarray | None, ...]
    """(E,) of each layer when it is built; None: 0."""
    events: tuple[Event, ...]

    @cached_property
    def params(self) -> list[LayerParams]:
        """Of each layer; what its experts compute is seen in no state, so that their weights are always the same."""
        return [params_of(*each) for each in zip(self.spec.layers, self.gates, self.biases, strict=True)]

    @cached_property
    def states(self) -> list[TrainingState]:
        """The oracle's state after each event."""
        return train(self.events, self.spec, self.params)

    @cached_property
    def margin(self) -> float:
        """How near the nearest choice of a router is to another one."""
        return min(
            (
                margin_of(event, layer, self.spec, self.params, before.bias_by_layer[layer])
                for before, event in zip(self.states, self.events[1:], strict=False)
                if event.kind in FORWARD and event.records is None
                for layer in range(len(self.spec.layers))
            ),
            default=np.inf,
        )

    @property
    def num_tokens(self) -> int:
        return next((event.x_LTD.shape[1] for event in self.events if event.x_LTD is not None), 0)

    def tokens(self, rows) -> Self:
        """The case of some of the tokens of every pass."""
        return self.with_(events=tuple(rows_of(event, np.asarray(rows)) for event in self.events))

    def simpler(self) -> Iterator[Self]:
        """Fewer events, layers and ranks; without padding, recomputation, forced choices or bias; rounder numbers."""
        for number in range(len(self.events) - 1, 0, -1):
            yield self.with_(events=self.events[:number] + self.events[number + 1 :])
        if len(self.spec.layers) > 1:
            yield from (self.without_layer(layer) for layer in range(len(self.spec.layers)))
        if self.spec.num_ranks > 1:
            yield self.in_one_process()
        for name in ("recomputed", "token_mask_T", "records"):
            for number, event in enumerate(self.events):
                changed = without(event, name)
                if changed is not event:
                    yield self.with_(events=(*self.events[:number], changed, *self.events[number + 1 :]))
        if any(bias_E is not None for bias_E in self.biases):
            yield self.with_(biases=(None,) * len(self.biases))
        for layer, gate_ED in enumerate(self.gates):
            for simple_ED in rounder(gate_ED):
                yield self.with_(gates=(*self.gates[:layer], simple_ED, *self.gates[layer + 1 :]))

    def without_layer(self, layer: int) -> Self:
        """The case of the other layers, on the ranks on which they are."""
        stack, ranks = self.spec, self.spec.rank_of_layer
        events = (
            event
            if event.x_LTD is None
            else replace(
                event,
                x_LTD=np.delete(event.x_LTD, layer, axis=0),
                records=None if event.records is None else _others(event.records, layer),
            )
            for event in self.events
        )
        return self.with_(
            spec=stack.replace(
                layers=_others(stack.layers, layer),
                updates=_others(stack.updates, layer),
                rank_of_layer=None if ranks is None else _others(ranks, layer),
            ),
            gates=_others(self.gates, layer),
            biases=_others(self.biases, layer),
            events=tuple(events),
        )

    def in_one_process(self) -> Self:
        """The same layers, all on one rank."""
        return self.with_(spec=self.spec.replace(num_ranks=1, rank_of_layer=None))

    def without(self, name: str) -> Self:
        """The same script, without that field in any event."""
        return self.with_(events=tuple(without(event, name) for event in self.events))

    def why_not(self, subject: Subject, method: str) -> str | None:
        return subject.supports_training(self.spec)

    def to_json(self) -> dict:
        """Plain data."""
        return {
            "stack": self.spec.to_dict(),
            "gates": [plain(gate_ED) for gate_ED in self.gates],
            "biases": [None if bias_E is None else plain(bias_E) for bias_E in self.biases],
            "events": [event_to_json(event) for event in self.events],
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, data: dict) -> Self:
        """Reads what `to_json` wrote."""
        known = cls.KEYS | {"seed"}
        if data.keys() - known or not data.keys() >= cls.KEYS:
            raise ValueError(f"a case of training has the keys {sorted(known)}, not {sorted(data)}")
        stack = StackSpec.from_dict(data["stack"])
        return cls(
            spec=stack,
            gates=tuple(np.array(gate_ED, np.float64) for gate_ED in data["gates"]),
            biases=tuple(None if bias_E is None else np.array(bias_E, np.float64) for bias_E in data["biases"]),
            events=tuple(event_of_json(event, stack) for event in data["events"]),
            seed=data.get("seed", 0),
        )


def _others(values: tuple, index: int) -> tuple:
    return values[:index] + values[index + 1 :]


def params_of(spec: LayerSpec, gate_ED: np.ndarray, expert_bias_E: np.ndarray | None) -> LayerParams:
    """Parameters with that gate and bias; the others depend on their shapes alone."""
    rng, given = np.random.default_rng(0), {"gate_ED": gate_ED, "expert_bias_E": expert_bias_E}
    others: dict[str, Any] = {
        name: None if shape is None else rng.integers(-4, 5, shape) / 8.0
        for name, shape in param_shapes(spec).items()
        if name not in given
    }
    return LayerParams(**others, **given)


def margin_of(event: Event, layer: int, stack: StackSpec, params: list[LayerParams], bias_E: np.ndarray) -> float:
    """The smallest distance between the last chosen and the first other score of a token, padding included."""
    trace = route_layer(without(event, "token_mask_T"), layer, stack, params, bias_E, np.float64)
    assert trace.scores_for_choice_TE is not None
    K = stack.layers[layer].router.top_k
    ranked_TE = -np.sort(-trace.scores_for_choice_TE, axis=-1)
    if ranked_TE.shape[1] == K:
        return np.inf
    return float((ranked_TE[:, K - 1] - ranked_TE[:, K]).min(initial=np.inf))


# events

ABSENT = {"token_mask_T": None, "records": None, "recomputed": False}
"""Fields of an event, and what they are where it has not got them."""


def without(event: Event, name: str) -> Event:
    """The event without a field; itself, where it has not got it."""
    return event if getattr(event, name) is ABSENT[name] else replace(event, **{name: ABSENT[name]})


def rows_of(event: Event, rows: np.ndarray) -> Event:
    """The event of some of its tokens."""
    if event.x_LTD is None:
        return event
    return replace(
        event,
        x_LTD=event.x_LTD[:, rows],
        token_mask_T=None if event.token_mask_T is None else event.token_mask_T[rows],
        records=None
        if event.records is None
        else tuple(RoutingRecord.of_choice(r.expert_ids_TK[rows], None, r.spec) for r in event.records),
    )


def event_to_json(event: Event) -> dict:
    """Plain data; a record is its ids."""
    found: dict[str, Any] = {"kind": event.kind}
    if event.x_LTD is not None:
        found |= {"x_LTD": plain(event.x_LTD), "shape": list(event.x_LTD.shape)}
    if event.token_mask_T is not None:
        found["token_mask_T"] = plain(event.token_mask_T)
    if event.records is not None:
        found["expert_ids"] = [plain(record.expert_ids_TK) for record in event.records]
    return found | ({"recomputed": True} if event.recomputed else {})


def event_of_json(data: dict, stack: StackSpec) -> Event:
    """Reads what `event_to_json` wrote."""
    known = {"kind", "x_LTD", "shape", "token_mask_T", "expert_ids", "recomputed"}
    if unknown := sorted(data.keys() - known):
        raise ValueError(f"an event of a case of training has the keys {sorted(known)}, not {unknown}")
    ids = data.get("expert_ids")
    return Event(
        kind=data["kind"],
        x_LTD=np.array(data["x_LTD"], np.float64).reshape(data["shape"]) if "x_LTD" in data else None,
        token_mask_T=np.array(data["token_mask_T"], bool) if "token_mask_T" in data else None,
        records=None
        if ids is None
        else tuple(
            RoutingRecord.of_choice(np.array(own, np.int64).reshape(-1, spec.router.top_k), None, spec.router)
            for own, spec in zip(ids, stack.layers, strict=True)
        ),
        recomputed=data.get("recomputed", False),
    )


def _some(holds) -> Any:
    """Whether it holds for an event of the case."""
    return lambda case: any(holds(event) for event in case.events)


def _rule(**wanted) -> Any:
    """Whether a layer of the case has an update with these values."""
    return lambda case: any(
        update is not None and all(getattr(update, name, None) == value for name, value in wanted.items())
        for update in case.spec.updates
    )


TrainingCase.TAGS = {
    "no_layers": lambda c: not c.spec.layers,
    "several_layers": lambda c: len(c.spec.layers) > 1,
    "mixed_sizes": lambda c: len({layer.router.num_experts for layer in c.spec.layers}) > 1,
    "layer_without_update": lambda c: None in c.spec.updates,
    "pipeline": lambda c: c.spec.num_ranks > 1,
    "rank_without_layer": lambda c: any(not c.spec.layers_of(rank) for rank in range(c.spec.num_ranks)),
    "loss_over_layers": lambda c: c.spec.balance is not None,
    "pooled_layers": lambda c: c.spec.balance is not None and c.spec.balance.over_layers == "pooled",
    "sign_rule": _rule(rule="sign"),
    "centred": _rule(centred=True),
    "soft_rule": _rule(rule="tanh"),
    "quantile": lambda c: any(isinstance(update, QuantileSpec) for update in c.spec.updates),
    "initial_bias": lambda c: any(bias_E is not None for bias_E in c.biases),
    "evaluation": _some(lambda event: event.kind == "evaluate"),
    "recomputed": _some(lambda event: event.recomputed),
    "masked_tokens": _some(lambda event: event.token_mask_T is not None),
    "replayed": _some(lambda event: event.records is not None),
    "unused_slots": _some(lambda event: any((r.expert_ids_TK == UNUSED).any() for r in event.records or ())),
    "several_steps": lambda c: sum(event.kind == "step" for event in c.events) > 1,
    "micro_batches": lambda c: ("train", "train") in pairwise(e.kind for e in c.events if e.kind != "evaluate"),
    "built_again": lambda c: sum(event.kind == "build" for event in c.events) > 1,
}
