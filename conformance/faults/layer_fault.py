"""conformance, a fault of a layer: one thing done wrong in a stage past the router, and the requirement it breaks."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from unittest.mock import patch

import numpy as np

import moe_ref
from conformance.core.judge import Judge, Violation, stage_order
from conformance.core.register import REQUIREMENTS
from conformance.core.trial import accuse
from conformance.layer.verdicts import FORM
from conformance.subjects.reference import Reference
from moe_ref import dispatch, experts, layer, routing, sharded
from moe_ref.backward import layer as gradient
from moe_ref.backward import routing as gradient_routing
from moe_ref.backward import sharded as gradient_sharded

# `moe_ref.permute` is the function.
permute = import_module("moe_ref.permute")
ROOMS = (
    moe_ref, permute, experts, layer, gradient, gradient_routing, routing, dispatch, sharded, gradient_sharded,
)  # fmt: skip
"""Where a function of the reference may be known under its name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerFault:
    """A minimal change to the reference layer."""

    name: str
    summary: str
    """One sentence that states what it does."""
    requirement: str
    """The requirement that it is meant to break."""
    links: tuple[str, ...] = ()
    """Where it happened in public; none for what nobody has reported yet."""
    patches: Mapping[str, Callable] = field(default_factory=dict)
    """Functions of moe_ref, replaced while the faulty method runs."""
    around: Callable | None = None
    """around(run, memory, *arguments, **inputs) in place of the stage's method; memory lasts between calls."""

    @property
    def stage(self) -> str:
        """The stage of the requirement that it breaks."""
        return REQUIREMENTS[self.requirement].stage

    @property
    def method(self) -> str:
        """The method of a subject that is faulty; the others are right."""
        return next(method for method, form in FORM.items() if REQUIREMENTS[form].stage == self.stage)


LAYER_REGISTER: dict[str, LayerFault] = {}
"""Every fault by name; filled as the modules of this package are imported."""


def registrars(register: dict, kind: type) -> tuple[Callable, Callable]:
    """The two decorators that put a fault of this kind into a register: `replaces` and `surrounds`."""

    def add(made: Callable, **how) -> Callable:
        """A function's name is the fault's, its docstring the summary."""
        name, summary = made.__name__.replace("_", "-"), made.__doc__
        assert name not in register
        assert summary is not None
        register[name] = kind(name=name, summary=summary, **how)
        return made

    def replaces(function: str, *, breaks: str, links=()) -> Callable:
        """The decorated function takes the place of one of moe_ref."""
        return lambda made: add(made, requirement=breaks, links=links, patches={function: made})

    def surrounds(*, breaks: str, links=()) -> Callable:
        """The decorated function runs the clean method on changed inputs, or changes its result."""
        return lambda made: add(made, requirement=breaks, links=links, around=made)

    return replaces, surrounds


replaces, surrounds = registrars(LAYER_REGISTER, LayerFault)


@contextmanager
def patched(patches: Mapping[str, Callable]):
    """The reference with these functions, in whatever module they are known."""
    with ExitStack() as stack:
        for name, made in patches.items():
            clean = next(getattr(room, name) for room in ROOMS if hasattr(room, name))
            for room in ROOMS:
                if getattr(room, name, None) is clean:
                    stack.enter_context(patch.object(room, name, made))
        yield


class FaultyLayer(Reference):
    """The reference in float32 with one fault in one of its methods."""

    def __init__(self, fault: LayerFault):
        self.fault, self.name, self.memory = fault, fault.name, {}

    def _run(self, method: str, *arguments, **inputs):
        run = getattr(super(), method)
        if method != self.fault.method:
            return run(*arguments, **inputs)
        with patched(self.fault.patches), np.errstate(all="ignore"):
            if self.fault.around is not None:
                return self.fault.around(run, self.memory, *arguments, **inputs)
            return run(*arguments, **inputs)

    def permute(self, expert_ids_TK, num_experts):
        return self._run("permute", expert_ids_TK, num_experts)

    def experts(self, rows_RD, tokens_per_expert_E, params, spec):
        return self._run("experts", rows_RD, tokens_per_expert_E, params, spec)

    def combine(self, rows_ND, order_N, weights_TK, spec):
        return self._run("combine", rows_ND, order_N, weights_TK, spec)

    def layer(self, x_TD, params, spec, **inputs):
        return self._run("layer", x_TD, params, spec, **inputs)

    def layer_gradients(self, x_TD, params, spec, d_output_TD, **inputs):
        return self._run("layer_gradients", x_TD, params, spec, d_output_TD, **inputs)


def stage_requirements(stage: str) -> list[str]:
    """The requirements of a stage, in order."""
    return sorted((id for id, r in REQUIREMENTS.items() if r.stage == stage), key=stage_order)


def layer_kill_table(faults: Iterable[LayerFault], seed: int, *, examples: int) -> dict[str, list[str]]:
    """The requirements of its own stage that accuse each fault."""
    return {
        fault.name: list(
            accuse(Judge(FaultyLayer(fault)), seed=seed, examples=examples, ids=stage_requirements(fault.stage))
        )
        for fault in faults
    }


def first_accusation(fault: LayerFault, *, seed: int, examples: int) -> Violation | None:
    """What accuses the fault, its own requirement tried first."""
    ids = sorted(stage_requirements(fault.stage), key=lambda id: id != fault.requirement)
    found = accuse(Judge(FaultyLayer(fault)), seed=seed, examples=examples, ids=ids, first=True)
    return next(iter(found.values()), None)
