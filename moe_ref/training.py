"""moe_ref, training: what a stack of layers counts and how its biases move, event by event.

    build -> train (-> train ...) -> step -> train ... ;   evaluate, at any place

Weights stay as they are: what the optimizer does with gradients is no matter of a router. How the layers are spread
over pipeline ranks is no matter either: layers do not influence each other.

Legend: T tokens, K top_k, E choices (experts, then null experts).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import DTypeLike

from moe_ref.balance import balance_layers, bias_step, tokens_per_expert
from moe_ref.quantile import needs_of, quantile_bias, ranked
from moe_ref.replay import replay
from moe_ref.rounding import dtype_of_router
from moe_ref.routing import RoutingTrace, gate, route
from moe_ref.specs.checks import mask_array, require
from moe_ref.specs.params import LayerParams
from moe_ref.specs.quantile import QuantileSpec
from moe_ref.specs.router import RouterSpec
from moe_ref.specs.training import Event, StackSpec


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What can be seen of a stack after an event."""

    counts_by_layer: list[np.ndarray]
    """(E,) of each layer: slots of valid tokens that training passes gave to each choice since the last step."""
    bias_by_layer: list[np.ndarray]
    """(E,) of each layer: its expert_bias."""
    loss: float | None
    """The balance loss of the forward pass that the event was, over all layers; None without a pass or a loss."""
    needs_by_layer: list[list[np.ndarray]] = field(default_factory=list)
    """Of each layer, what each micro-batch since the last step needed, (N, E), where the rule is a quantile. It is seen
    in the bias of the next step alone."""
    last_step_by_layer: list[np.ndarray] = field(default_factory=list)
    """(E,) of each layer: its last step, which a rule with momentum goes on from. Seen in the next bias alone."""


def train(
    events: Sequence[Event], stack: StackSpec, params: Sequence[LayerParams], *, dtype: DTypeLike = np.float64
) -> list[TrainingState]:
    """The state of a stack after each event of a script, the first of which builds the layers. [STP-1]

    Args:
        events: in the order of time.
        stack: the layers, and what balances them.
        params: of each layer, when it is built.
        dtype: of routers and biases; the specification is float64.
    """
    require(bool(events) and events[0].kind == "build", "events begins with a build")
    require(len(params) == len(stack.layers), f"params has {len(params)} entries; there are {len(stack.layers)} layers")
    states: list[TrainingState] = []
    for event in events:
        before = states[-1] if states else None
        states.append(after(event, before, stack, params, dtype=dtype))
    return states


def after(
    event: Event,
    before: TrainingState | None,
    stack: StackSpec,
    params: Sequence[LayerParams],
    *,
    dtype: DTypeLike = np.float64,
) -> TrainingState:
    """The state after an event, from the state before it alone. Nothing but a build goes without one."""
    if event.kind == "build" or before is None:
        return built(stack, params, dtype)
    if event.kind == "step":
        return stepped(before, stack, dtype)
    choices = [
        route_layer(event, layer, stack, params, before.bias_by_layer[layer], dtype)
        for layer in range(len(stack.layers))
    ]
    return TrainingState(
        counts_by_layer=counted(event, before.counts_by_layer, choices, stack),
        bias_by_layer=before.bias_by_layer,
        loss=pooled_loss(event, choices, stack, dtype),
        needs_by_layer=observed(event, before, choices, stack),
        last_step_by_layer=before.last_step_by_layer,
    )


def built(stack: StackSpec, params: Sequence[LayerParams], dtype: DTypeLike) -> TrainingState:
    """Counts begin at 0; a bias is that of the parameters, or 0. [STP-2]"""
    sizes = [spec.router.num_choices for spec in stack.layers]
    given = [own.expert_bias_E for own in params]
    return TrainingState(
        counts_by_layer=[np.zeros(E, dtype=np.int64) for E in sizes],
        bias_by_layer=[
            np.zeros(E, dtype) if bias_E is None else bias_E.astype(dtype)
            for E, bias_E in zip(sizes, given, strict=True)
        ],
        loss=None,
        needs_by_layer=[[] for _ in sizes],
        last_step_by_layer=[np.zeros(E) for E in sizes],
    )


def route_layer(
    event: Event,
    layer: int,
    stack: StackSpec,
    params: Sequence[LayerParams],
    expert_bias_E: np.ndarray,
    dtype: DTypeLike,
) -> RoutingTrace:
    """A router chooses with its bias of now; a forced choice does not ask it. [STP-11, STP-16]"""
    assert event.x_LTD is not None
    spec, own, mask_T = stack.layers[layer], params[layer], event.token_mask_T
    x_TD = np.where(mask_array(mask_T, event.x_LTD.shape[1])[:, None], event.x_LTD[layer], 0)
    logits_TE = gate(x_TD, own.gate_ED, own.gate_bias_E, dtype=dtype_of_router(spec.router, dtype))
    if event.records is not None:
        return replay(event.records[layer], logits_TE, spec.router, learned_scale=own.learned_scale, dtype=dtype)
    bias_E = expert_bias_E if spec.router.takes_bias else None
    return route(
        logits_TE,
        spec.router,
        expert_bias_E=bias_E,
        learned_scale=own.learned_scale,
        token_mask_T=mask_T,
        dtype=dtype,
    )


def counted(
    event: Event, counts_by_layer: list[np.ndarray], choices: list[RoutingTrace], stack: StackSpec
) -> list[np.ndarray]:
    """A training pass adds its slots, once; evaluation adds nothing. [STP-3 .. STP-7, STP-16]

    A pass that is recomputed in the backward pass is the same pass: counting is a function of the micro-batch.
    """
    if event.kind != "train":
        return counts_by_layer
    return [
        counts_E + tokens_per_expert(choice.expert_ids_TK, len(counts_E), event.token_mask_T)
        for counts_E, choice in zip(counts_by_layer, choices, strict=True)
    ]


def observed(
    event: Event, before: TrainingState, choices: list[RoutingTrace], stack: StackSpec
) -> list[list[np.ndarray]]:
    """A training pass adds what its valid tokens needed, once; evaluation and forced choices add nothing. [STP-19]"""
    if event.kind != "train" or event.records is not None:
        return before.needs_by_layer
    return [
        [*earlier, needs_of(ranked_of(choice, spec.router), spec.router, bias_E, event.token_mask_T)]
        if isinstance(update, QuantileSpec)
        else earlier
        for earlier, bias_E, choice, spec, update in zip(
            before.needs_by_layer, before.bias_by_layer, choices, stack.layers, stack.updates, strict=True
        )
    ]


def ranked_of(choice: RoutingTrace, router: RouterSpec) -> np.ndarray:
    """What a router ranked, without its bias."""
    return ranked(choice.scaled_logits_TE[:, : router.num_choices], router)


def stepped(before: TrainingState, stack: StackSpec, dtype: DTypeLike) -> TrainingState:
    """Every bias moves by what its own layer counted or needed, which begins anew. [STP-8 .. STP-12, STP-17, STP-19]"""
    biases, steps = [], []
    for layer, update in enumerate(stack.updates):
        bias_E, last_E = before.bias_by_layer[layer], before.last_step_by_layer[layer]
        if isinstance(update, QuantileSpec):
            wins = update.wins(stack.layers[layer].router)
            bias_E = quantile_bias(before.needs_by_layer[layer], update, bias_E, wins)
        elif update is not None:
            last_E = bias_step(before.counts_by_layer[layer], update, last_E)
            bias_E = bias_E + last_E
        biases.append(bias_E.astype(dtype))
        steps.append(last_E)
    return TrainingState(
        counts_by_layer=reset(before.counts_by_layer),
        bias_by_layer=biases,
        loss=None,
        needs_by_layer=[[] for _ in biases],
        last_step_by_layer=steps,
    )


def reset(counts_by_layer: list[np.ndarray]) -> list[np.ndarray]:
    """A step begins to count anew, in layers whose bias stays as well. [STP-10]"""
    return [np.zeros_like(counts_E) for counts_E in counts_by_layer]


def pooled_loss(event: Event, choices: list[RoutingTrace], stack: StackSpec, dtype: DTypeLike) -> float | None:
    """The loss of a pass is the sum over layers, or that of all their tokens together; 0 without a layer. [STP-15]"""
    if stack.balance is None:
        return None
    if not choices:
        return 0.0
    logits = [
        choice.scaled_logits_TE[:, : spec.router.num_choices]
        for choice, spec in zip(choices, stack.layers, strict=True)
    ]
    ids = [choice.expert_ids_TK for choice in choices]
    traces = balance_layers(logits, ids, stack.balance, token_mask_T=event.token_mask_T, dtype=dtype)
    return float(sum(trace.loss for trace in traces))
