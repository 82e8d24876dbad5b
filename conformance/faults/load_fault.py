"""conformance, a fault of load: one method of load, capacity or replay that does one thing wrong."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from conformance.core.judge import Judge, Violation, stage_order
from conformance.core.register import REQUIREMENTS
from conformance.core.trial import accuse
from conformance.subjects.reference import Reference

STAGES = ("load", "capacity", "mask", "replay")


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadFault:
    """A minimal change to one method of the reference."""

    name: str
    summary: str
    """One sentence that states what it does."""
    requirement: str
    """The requirement that it is meant to break."""
    method: str
    """The method that is faulty; the others are right."""
    around: Callable
    """around(run, memory, *arguments, **inputs) in place of it; memory lasts between calls."""
    links: tuple[str, ...] = ()
    """Where it happened in public; none for what nobody has reported yet."""

    @property
    def stage(self) -> str:
        """The stage of the requirement that it breaks."""
        return REQUIREMENTS[self.requirement].stage


LOAD_REGISTER: dict[str, LoadFault] = {}
"""Every fault by name; filled as the modules of this package are imported."""


def wrong(method: str, *, breaks: str, links=()) -> Callable:
    """Register a fault: a function's name is the fault's, its docstring the summary."""

    def decorate(made: Callable) -> Callable:
        name = made.__name__.replace("_", "-")
        assert name not in LOAD_REGISTER
        assert made.__doc__ is not None
        LOAD_REGISTER[name] = LoadFault(
            name=name, summary=made.__doc__, requirement=breaks, method=method, around=made, links=links
        )
        return made

    return decorate


class FaultyLoad(Reference):
    """The reference in float32 with one fault in one of its methods."""

    def __init__(self, fault: LoadFault):
        self.fault, self.name, memory = fault, fault.name, {}
        run = getattr(super(), fault.method)

        def faulty(*arguments, **inputs):
            with np.errstate(all="ignore"):
                return fault.around(run, memory, *arguments, **inputs)

        setattr(self, fault.method, faulty)


def first_accusation(fault: LoadFault, *, seed: int, examples: int) -> Violation | None:
    """What accuses the fault among the requirements of its own stage, its own requirement tried first."""
    ids = sorted((id for id, r in REQUIREMENTS.items() if r.stage == fault.stage), key=stage_order)
    ids.sort(key=lambda id: id != fault.requirement)
    found = accuse(Judge(FaultyLoad(fault)), seed=seed, examples=examples, ids=ids, first=True)
    return next(iter(found.values()), None)
