"""conformance, the fault: a named wrong implementation, a minimal change to the reference, and what it breaks.

Faults judge the judge: each is accused, at its own stage. They are the diagnosis as well. Nothing but the command
`faults`, the tests of the judge and the diagnosis of a failure imports them.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from inspect import isfunction
from typing import Any

import numpy as np

from conformance.core.check import CHECKS
from conformance.core.judge import Judge, Violation
from conformance.core.kind import Kind, kind_of
from conformance.core.register import REQUIREMENTS, of_stage, stage_order
from conformance.core.subject import Subject
from conformance.core.trial import DEFAULT_EXAMPLES, accuse


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
    """Other stages that may be accused first, since what a subject shows cannot tell them apart."""
    patches: Mapping[str, Callable] = field(default_factory=dict)
    """Functions of moe_ref by name, replaced while the faulty method runs."""
    around: Callable | None = None
    """around(run, memory, *arguments, **inputs) in place of the method; memory lasts between calls."""

    @property
    def kind(self) -> Kind:
        """The kind of the requirement that it breaks."""
        return kind_of(self.requirement)

    @property
    def method(self) -> str:
        """The method of a subject that is faulty; the others are right."""
        return CHECKS[self.requirement].method

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

    def run(self, method: Callable, memory: dict, *arguments, **inputs):
        """What the method returns with the fault in it."""
        # A fault may overflow or divide by 0; that is for the judge to see, not for Python to warn of.
        with patched(self.patches), np.errstate(all="ignore"):
            if self.around is not None:
                return self.around(method, memory, *arguments, **inputs)
            return method(*arguments, **inputs)


FAULTS: dict[str, Fault] = {}
"""Every fault by name; the chapters of the kinds fill it (`conformance.run.kinds.load_faults`)."""


def _add(made: Callable, **how) -> Callable:
    """Register a fault: a function's name is the fault's, its docstring the summary."""
    name, summary = made.__name__.replace("_", "-"), made.__doc__
    assert name not in FAULTS, name
    assert summary is not None, name
    assert how["requirement"] in REQUIREMENTS, f"{name} breaks {how['requirement']}, which no requirements.py has"
    FAULTS[name] = Fault(name=name, summary=summary, **how)
    return made


def replaces(function: str, *, breaks: str, links=(), also=()) -> Callable:
    """The decorated function takes the place of one of moe_ref."""
    return lambda made: _add(made, requirement=breaks, links=links, also=also, patches={function: made})


def surrounds(*, breaks: str, links=(), also=()) -> Callable:
    """The decorated function runs the clean method on changed inputs, or changes its result."""
    return lambda made: _add(made, requirement=breaks, links=links, also=also, around=made)


@contextmanager
def patched(patches: Mapping[str, Callable]):
    """The reference with these functions, in whatever module of moe_ref they are known.

    A name that several functions have is given with the end of its module: `routing.gather`.
    """
    before = []
    try:
        for path, made in patches.items():
            name = path.rpartition(".")[2]
            for module in _places(path, len(sys.modules)):
                before.append((module, name, getattr(module, name)))
                setattr(module, name, made)
        yield
    finally:
        for module, name, clean in reversed(before):
            setattr(module, name, clean)


@lru_cache(maxsize=1024)
def _places(path: str, number_of_modules: int) -> list[Any]:
    """The modules that know the function. Each call of a faulty method asks, and few load further modules.

    Args:
        number_of_modules: of those that are loaded; another one asks anew.
    """
    clean, name = function_named(path), path.rpartition(".")[2]
    return [module for module in _rooms(number_of_modules).values() if getattr(module, name, None) is clean]


def function_named(path: str) -> Callable:
    """The one function of moe_ref that a patch names; it is an error of a fault if there is none, or another one."""
    place, _, name = path.rpartition(".")
    rooms = _rooms(len(sys.modules))
    known = [getattr(module, name, None) for where, module in rooms.items() if where.endswith(place)]
    functions = {id(function): function for function in known if isfunction(function)}
    assert len(functions) == 1, f"{len(functions)} functions of moe_ref have the name {path!r}"
    (found,) = functions.values()
    return found


@lru_cache(maxsize=1)
def _rooms(number_of_modules: int) -> dict[str, Any]:
    """The modules of moe_ref."""
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "moe_ref"}


def killers(fault: Fault, *, seed: int | None = None, examples: int = DEFAULT_EXAMPLES, **how) -> dict[str, Violation]:
    """What accuses a fault, among the requirements of its own kind, earliest stage first.

    Args:
        seed, examples: of the cases; as many as a run has.
        how: of `Kind.faulty`.
    """
    judge = Judge(fault.kind.faulty(fault, **how))
    return accuse(judge, seed=seed, examples=examples, ids=of_stage(*fault.kind.stages))


def first_killer(fault: Fault, *, seed: int | None = None, examples: int = DEFAULT_EXAMPLES, **how) -> Violation | None:
    """What accuses a fault first: its own requirement is tried first, then those of the stages that may be accused."""
    names = sorted(of_stage(*fault.stages), key=stage_order)
    names.sort(key=lambda name: name != fault.requirement)
    judge = Judge(fault.kind.faulty(fault, **how))
    found = accuse(judge, seed=seed, examples=examples, ids=names, first=True)
    return next(iter(found.values()), None)


def faulty(subject: Subject, fault: Fault) -> Subject:
    """The subject with one fault in the method that the fault is about."""
    clean, memory = getattr(subject, fault.method), {}

    @wraps(clean)  # its signature says which inputs it takes
    def method(*arguments, **inputs):
        return fault.run(clean, memory, *arguments, **inputs)

    setattr(subject, fault.method, method)
    subject.name, subject.memory = fault.name, memory  # type: ignore[attr-defined]
    return subject


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """The values with `bits` bits of mantissa: 8 for bfloat16, 11 for float16."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa * 2**bits) / 2**bits, exponent).astype(values.dtype)
