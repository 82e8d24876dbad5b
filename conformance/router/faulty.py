"""conformance, router: the reference with one fault in it."""

from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from typing import Any, Unpack

import numpy as np

import moe_ref
from conformance.core.fault import Fault, surrounds
from conformance.core.inputs import RouteInputs
from conformance.core.subject import Routing, Subject
from conformance.router.case import RouterCase
from moe_ref import RouterInputs, RouterSpec, RoutingTrace


def routing_under(fault: Fault, case: RouterCase, *, dtype: str = "float64") -> RoutingTrace:
    """The trace of a case under a fault, which gets arrays of its own: it may write into them."""
    logits_TE, bias_E, inputs = deepcopy((case.logits_TE, case.expert_bias_E, case.inputs))
    return _route(fault, {}, logits_TE, case.spec, bias_E, dtype=dtype, **inputs)


def _route(fault: Fault, memory: dict, logits_TE, spec: RouterSpec, expert_bias_E, *, dtype: str, **inputs):
    """Faults work on the whole trace, whatever the subject shows of it."""

    def route(logits_TE, spec, expert_bias_E, **inputs) -> RoutingTrace:
        # A fault may take another selector: what that one does not read is left out.
        own, rest = RouterInputs.from_named(inputs)
        return moe_ref.route(
            logits_TE, spec, expert_bias_E=expert_bias_E, dtype=dtype, inputs=own.read_by(spec), **rest
        )

    return fault.run(route, memory, logits_TE, spec, expert_bias_E, **inputs)


class FaultyRouter(Subject):
    """The reference with one fault in it. Closed, it returns ids and weights alone, as most third parties do."""

    logit_dtypes = ("float32", "float64", "bfloat16", "float16")

    def __init__(self, fault: Fault, *, shows_stages: bool = False):
        self.fault, self.shows_stages, self.name, self.memory = fault, shows_stages, fault.name, {}

    def route(
        self, logits_TE: np.ndarray, spec: RouterSpec, expert_bias_E: np.ndarray | None, **inputs: Unpack[RouteInputs]
    ) -> Routing:
        trace = _route(self.fault, self.memory, logits_TE, spec, expert_bias_E, dtype=self.compute_dtype, **inputs)
        return Routing(
            expert_ids_TK=trace.expert_ids_TK,
            weights_TK=trace.weights_TK,
            scores_TE=trace.scores_TE if self.shows_stages else None,
            group_ids_TL=trace.group_ids_TL if self.shows_stages else None,
            shared_weights_TS=trace.shared_weights_TS,
        )

    def gate(self, x_TD, gate_ED, gate_bias_E):
        return self._run("gate", _gate, x_TD, gate_ED, gate_bias_E, dtype=self.compute_dtype)

    def configure(self, fields):
        self._run("configure", RouterSpec.from_dict, fields)

    def _run(self, method: str, run: Any, *arguments, **inputs):
        if self.fault.method != method:
            return run(*arguments, **inputs)
        return self.fault.run(run, self.memory, *arguments, **inputs)


def _gate(x_TD, gate_ED, gate_bias_E, **how):
    """`moe_ref.gate` as it is at the moment of the call: a fault may stand in its place."""
    return moe_ref.gate(x_TD, gate_ED, gate_bias_E, **how)


def misreads(**how) -> Callable:
    """The decorated function turns the spec into the one that is computed instead; `how` as in `surrounds`."""

    def decorate(made: Callable) -> Callable:
        @wraps(made)
        def around(route, memory, logits_TE, spec, expert_bias_E, **inputs):
            return route(logits_TE, made(spec), expert_bias_E, **inputs)

        surrounds(**how)(around)
        return made

    return decorate
