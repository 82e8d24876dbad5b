"""conformance, precision: one stage of a router in a coarse dtype, everything else in float64.

Tokens and a gate are drawn, moe_ref routes them, and routes them again with one stage rounded. What is new in a spec is
in it: a stage is a function of `moe_ref.routing`, whatever that computes.

Legend: T tokens, D model dim, E choices, K top_k.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from conformance.core.case import float32
from conformance.core.fault import function_named, patched
from conformance.core.rounding import PACKED, rounded_to
from conformance.router.draw import inputs_of
from moe_ref import RouterInputs, RouterSpec, RoutingTrace, gate, route

DIM = 256
"""Of the tokens."""
SPREAD, BIAS_SPREAD = 1.5, 0.05
"""Standard deviations of logits, and of expert_bias."""
COMBINED = 64
"""Width of what a token's experts return, unit vectors of float32."""

FUNCTIONS = {
    "scores": ("routing.score",),
    "selection": ("routing.bias_choice",),
    "weights": ("routing.weigh", "routing.normalise", "routing.scale_weights"),
}
"""Stage -> the functions of moe_ref whose results it rounds."""
STAGES = ("gate_weight", "gate", "logits", "bias", "scores", "selection", "weights", "combine")
"""In the order of the data. gate: operands and result of the product; logits: its result alone; combine: each product
and each partial sum of a token's experts."""
PACKABLE = ("logits", "scores", "selection")
"""Stages with a number for each expert."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Tokens, a gate, and what else a router reads; float32 holds all of it."""

    spec: RouterSpec
    x_TD: np.ndarray
    gate_ED: np.ndarray
    expert_bias_E: np.ndarray | None
    inputs: dict[str, Any]
    expert_outputs_TKD: np.ndarray

    def trace(self, logits_TE: np.ndarray | None = None) -> RoutingTrace:
        """What moe_ref makes of the batch, or of other logits of it."""
        logits_TE = gate(self.x_TD, self.gate_ED) if logits_TE is None else logits_TE
        how = RouterInputs.keywords(self.inputs)
        return route(logits_TE, self.spec, expert_bias_E=self.expert_bias_E, **how)


def batch(spec: RouterSpec, *, tokens: int, seed: int, expert_bias: bool) -> Batch:
    """Drawn tokens, and logits of spread SPREAD."""
    rng = np.random.default_rng(seed)
    outputs = rng.normal(size=(tokens, spec.top_k, COMBINED))
    biased = expert_bias and spec.selector == "top_k"
    return Batch(
        spec=spec,
        x_TD=float32(rng.normal(size=(tokens, DIM))),
        gate_ED=float32(rng.normal(size=(spec.num_logits, DIM)) * SPREAD / np.sqrt(DIM)),
        expert_bias_E=float32(rng.normal(0, BIAS_SPREAD, spec.num_choices)) if biased else None,
        inputs=inputs_of(spec, tokens, (), rng),
        expert_outputs_TKD=float32(outputs / np.linalg.norm(outputs, axis=-1, keepdims=True)),
    )


@contextmanager
def coarser(stage: str, dtype: str) -> Iterator[None]:
    """moe_ref with what the functions of a stage return rounded to a dtype."""
    with patched({path: _rounding(path, dtype) for path in FUNCTIONS.get(stage, ())}):
        yield


def _rounding(path: str, dtype: str) -> Callable:
    clean = function_named(path)

    def rounded(*arguments: Any, **how: Any) -> Any:
        found = clean(*arguments, **how)
        return tuple(map(held, found)) if isinstance(found, tuple) else held(found)

    def held(values: Any) -> Any:
        return rounded_to(values, dtype, to=values.dtype) if isinstance(values, np.ndarray) and values.size else values

    return rounded


def given(
    stage: str, dtype: str, logits_TE: np.ndarray, expert_bias_E: np.ndarray | None, *, to: DTypeLike = np.float64
) -> tuple[np.ndarray, np.ndarray | None]:
    """Logits and bias as a router reads them of which that stage is coarse."""
    if stage == "logits":
        logits_TE = rounded_to(logits_TE, dtype, to=to)
    if stage == "bias" and expert_bias_E is not None:
        expert_bias_E = rounded_to(expert_bias_E, dtype, to=to)
    return logits_TE, expert_bias_E


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What a coarse stage does to a batch."""

    changed: float
    """Share of the tokens with other experts."""
    largest: float
    """Largest error of a weight, relative to the largest weight of its token, where the experts are the same; of
    `combine` the error of an output, relative to its norm."""
    rms: float
    """The root of the mean square of these."""


def effect(own: Batch, stage: str, dtype: str) -> Effect:
    """What happens where that stage alone is coarse."""
    exact = own.trace()
    if stage == "combine":
        return _of_combine(own, exact, dtype)
    gate_ED = own.gate_ED
    if stage in ("gate_weight", "gate"):
        gate_ED = rounded_to(gate_ED, dtype)
    logits_TE = gate(rounded_to(own.x_TD, dtype) if stage == "gate" else own.x_TD, gate_ED)
    if stage == "gate":
        logits_TE = rounded_to(logits_TE, dtype)
    logits_TE, bias_E = given(stage, dtype, logits_TE, own.expert_bias_E)
    with coarser(stage, dtype):
        found = replace(own, expert_bias_E=bias_E).trace(logits_TE)
    return difference(exact, found.expert_ids_TK, found.weights_TK)


def difference(exact: RoutingTrace, expert_ids_TK: np.ndarray, weights_TK: np.ndarray) -> Effect:
    """How a routing differs from the exact one, whatever the order of its slots."""
    order, other = (np.argsort(ids, axis=-1, kind="stable") for ids in (exact.expert_ids_TK, expert_ids_TK))
    ids_TK, found_ids_TK = (
        np.take_along_axis(exact.expert_ids_TK, order, -1),
        np.take_along_axis(expert_ids_TK, other, -1),
    )
    same_T = (ids_TK == found_ids_TK).all(axis=-1)
    wanted, found = np.take_along_axis(exact.weights_TK, order, -1), np.take_along_axis(weights_TK, other, -1)
    largest_T1 = np.abs(wanted).max(axis=-1, keepdims=True, initial=0)
    error_TK = (np.abs(found - wanted) / np.where(largest_T1 == 0, 1, largest_T1))[same_T]
    return _effect(float(1 - same_T.mean()) if len(same_T) else 0.0, error_TK)


def _effect(changed: float, errors: np.ndarray) -> Effect:
    rms = float(np.sqrt(np.square(errors).mean())) if errors.size else 0.0
    return Effect(changed=changed, largest=float(errors.max(initial=0)), rms=rms)


def _of_combine(own: Batch, exact: RoutingTrace, dtype: str) -> Effect:
    weights_TK1 = exact.weights_TK[:, :, None]
    wanted_TD = (weights_TK1 * own.expert_outputs_TKD).sum(axis=1)
    sum_TD = np.zeros_like(wanted_TD)
    for k in range(own.spec.top_k):
        product_TD = rounded_to(weights_TK1[:, k] * rounded_to(own.expert_outputs_TKD[:, k], dtype), dtype)
        sum_TD = rounded_to(sum_TD + product_TD, dtype)
    norm_T = np.linalg.norm(wanted_TD, axis=-1)
    return _effect(0.0, np.linalg.norm(sum_TD - wanted_TD, axis=-1) / np.where(norm_T == 0, 1, norm_T))


def effects(own: Batch, dtype: str) -> dict[str, Effect]:
    """Stage -> what it does, for the stages that can have the dtype."""
    return {stage: effect(own, stage, dtype) for stage in (PACKABLE if dtype == PACKED else STAGES)}
