"""conformance, a fault: a named wrong implementation, made by a minimal change to the reference."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np

import moe_ref
from conformance.core.register import REQUIREMENTS
from conformance.core.subject import Routing, Subject
from conformance.router.case import Case
from moe_ref import RouterInputs, RouterSpec, RoutingTrace, routing


@dataclass(frozen=True, kw_only=True, eq=False)
class Fault:
    """One thing done wrong, and the requirement that it breaks."""

    name: str
    summary: str
    """One sentence that states what it does."""
    requirement: str
    """The requirement that it is meant to break."""
    links: tuple[str, ...] = ()
    """Where it happened in public; none for what nobody has reported yet."""
    also: tuple[str, ...] = ()
    """Other stages that may be accused first, since ids and weights alone cannot tell them apart."""
    patches: Mapping[str, Callable] = field(default_factory=dict)
    """Functions of moe_ref.routing, replaced while the faulty router runs."""
    around: Callable | None = None
    """around(route, logits_TE, spec, expert_bias_E, **inputs) -> RoutingTrace, where no stage function is at fault."""
    gate: Callable | None = None
    """Replaces moe_ref.gate."""
    configure: Callable | None = None
    """Replaces RouterSpec.from_dict."""

    @property
    def stage(self) -> str:
        """The stage of the requirement that it breaks."""
        return REQUIREMENTS[self.requirement].stage

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that may be accused first."""
        return (self.stage, *self.also)

    @property
    def link(self) -> str:
        """The first public reference, or nothing."""
        return self.links[0] if self.links else ""


REGISTER: dict[str, Fault] = {}
"""Every fault by name, in the order of the stages; filled as the modules of this package are imported."""


def add(made: Callable, **how) -> Callable:
    """Register a fault: a function's name is the fault's, its docstring the summary."""
    name, summary = made.__name__.replace("_", "-"), made.__doc__
    assert name not in REGISTER
    assert summary is not None
    REGISTER[name] = Fault(name=name, summary=summary, **how)
    return made


def replaces(function: str, *, breaks: str, links=(), also=()) -> Callable:
    """The decorated function takes the place of one of moe_ref.routing."""

    def decorate(made: Callable) -> Callable:
        return add(made, requirement=breaks, links=links, also=also, patches={function: made})

    return decorate


def surrounds(*, breaks: str, links=(), also=()) -> Callable:
    """The decorated function runs the clean router on changed inputs, or changes its result."""

    def decorate(made: Callable) -> Callable:
        return add(made, requirement=breaks, links=links, also=also, around=made)

    return decorate


def misreads(*, breaks: str, links=(), also=()) -> Callable:
    """The decorated function turns the spec into the one that is computed instead."""

    def decorate(made: Callable) -> Callable:
        def around(route, logits_TE, spec, expert_bias_E, **inputs):
            return route(logits_TE, made(spec), expert_bias_E, **inputs)

        return add(made, requirement=breaks, links=links, also=also, around=around)

    return decorate


def gates(*, breaks: str, links=()) -> Callable:
    """The decorated function takes the place of moe_ref.gate."""

    def decorate(made: Callable) -> Callable:
        return add(made, requirement=breaks, links=links, gate=made)

    return decorate


def configures(*, breaks: str, links=()) -> Callable:
    """The decorated function takes the place of RouterSpec.from_dict."""

    def decorate(made: Callable) -> Callable:
        return add(made, requirement=breaks, links=links, configure=made)

    return decorate


def route_under(fault: Fault, logits_TE, spec: RouterSpec, expert_bias_E, *, dtype, **inputs) -> RoutingTrace:
    """The reference with the fault in it."""

    def route(logits_TE, spec, expert_bias_E, **inputs) -> RoutingTrace:
        patches: dict[str, Any] = dict(fault.patches)
        with patch.multiple(routing, **patches) if patches else np.errstate():
            # A fault may take another selector: what that one does not read is left out.
            own, rest = RouterInputs.from_named(inputs)
            return routing.route(
                logits_TE, spec, expert_bias_E=expert_bias_E, dtype=dtype, inputs=own.read_by(spec), **rest
            )

    # A fault may overflow or divide by 0; that is for the judge to see, not for Python to warn of.
    with np.errstate(all="ignore"):
        return (fault.around or _as_is)(route, logits_TE, spec, expert_bias_E, **inputs)


def _as_is(route, logits_TE, spec, expert_bias_E, **inputs):
    return route(logits_TE, spec, expert_bias_E, **inputs)


def run_under(fault: Fault, case: Case, *, dtype="float64") -> RoutingTrace:
    """The trace of a case under a fault."""
    return route_under(fault, case.logits_TE, case.spec, case.expert_bias_E, dtype=dtype, **case.inputs)


class FaultySubject(Subject):
    """The reference with one fault in it. Closed, it returns ids and weights alone, as most third parties do."""

    logit_dtypes = ("float32", "float64", "bfloat16")

    def __init__(self, fault: Fault, *, open: bool = False):
        self.fault, self.open, self.name = fault, open, fault.name

    def route(self, logits_TE, spec, expert_bias_E, **inputs):
        trace = route_under(self.fault, logits_TE, spec, expert_bias_E, dtype=self.compute_dtype, **inputs)
        return Routing(
            expert_ids_TK=trace.expert_ids_TK,
            weights_TK=trace.weights_TK,
            scores_TE=trace.scores_TE if self.open else None,
            group_ids_TL=trace.group_ids_TL if self.open else None,
            shared_weights_TS=trace.shared_weights_TS,
        )

    def gate(self, x_TD, gate_ED, gate_bias_E):
        return (self.fault.gate or moe_ref.gate)(x_TD, gate_ED, gate_bias_E, dtype=self.compute_dtype)

    def configure(self, fields):
        (self.fault.configure or RouterSpec.from_dict)(fields)


def rounded(values, bits: int) -> np.ndarray:
    """The values with `bits` bits of mantissa: 8 for bfloat16, 11 for float16."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa * 2**bits) / 2**bits, exponent).astype(values.dtype)
