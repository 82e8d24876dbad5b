"""conformance, a fault between devices: one thing done wrong in a simulated sharded subject, and what it breaks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from conformance.faults.layer_fault import LayerFault, patched, stage_requirements
from conformance.judge import CHECKS, Judge, Violation
from conformance.subjects.reference import Reference
from conformance.trial import accuse, load_suite


@dataclass(frozen=True, kw_only=True, eq=False)
class LayoutFault(LayerFault):
    """A minimal change to the reference laid over devices."""

    @property
    def method(self) -> str:
        """The method of a subject that is faulty; the others are right."""
        load_suite()
        return CHECKS[self.requirement].method


LAYOUT_REGISTER: dict[str, LayoutFault] = {}
"""Every fault by name; filled as the modules of this package are imported."""


def add(made: Callable, **how) -> Callable:
    """Register a fault: a function's name is the fault's, its docstring the summary."""
    name, summary = made.__name__.replace("_", "-"), made.__doc__
    assert name not in LAYOUT_REGISTER
    assert summary is not None
    LAYOUT_REGISTER[name] = LayoutFault(name=name, summary=summary, **how)
    return made


def replaces(function: str, *, breaks: str, links=()) -> Callable:
    """The decorated function takes the place of one of moe_ref."""

    def decorate(made: Callable) -> Callable:
        return add(made, requirement=breaks, links=links, patches={function: made})

    return decorate


def surrounds(*, breaks: str, links=()) -> Callable:
    """The decorated function runs the clean method on changed inputs, or changes its result."""

    def decorate(made: Callable) -> Callable:
        return add(made, requirement=breaks, links=links, around=made)

    return decorate


class FaultyLayout(Reference):
    """The sharded reference in float32 with one fault in one of its methods."""

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

    def dispatch(self, expert_ids_by_shard, layout, spec):
        return self._run("dispatch", expert_ids_by_shard, layout, spec)

    def sharded_layer(self, x_by_shard, params, spec, layout, **inputs):
        return self._run("sharded_layer", x_by_shard, params, spec, layout, **inputs)

    def sharded_gradients(self, x_by_shard, params, spec, layout, d_output_by_shard, **inputs):
        return self._run("sharded_gradients", x_by_shard, params, spec, layout, d_output_by_shard, **inputs)


def layout_kill_table(faults: Iterable[LayerFault], seed: int, *, examples: int) -> dict[str, list[str]]:
    """The requirements of its own stage that accuse each fault."""
    return {
        fault.name: list(
            accuse(Judge(FaultyLayout(fault)), seed=seed, examples=examples, ids=stage_requirements(fault.stage))
        )
        for fault in faults
    }


def first_accusation(fault: LayerFault, *, seed: int, examples: int) -> Violation | None:
    """What accuses the fault, its own requirement tried first."""
    ids = sorted(stage_requirements(fault.stage), key=lambda id: id != fault.requirement)
    found = accuse(Judge(FaultyLayout(fault)), seed=seed, examples=examples, ids=ids, first=True)
    return next(iter(found.values()), None)
