"""conformance, the judge: runs a subject on a case, holds the result against the reference, and keeps the ledger."""

import re
import sysconfig
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import numpy as np

from conformance.core.capabilities import capabilities, named_inputs
from conformance.core.case import Case
from conformance.core.check import CHECKS, Check
from conformance.core.chosen import Chosen
from conformance.core.register import REQUIREMENTS
from conformance.core.rounding import ARRAYS, EPSILON, Precision
from conformance.core.subject import Subject, Unsupported
from moe_ref.specs.checks import require

LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
"""Folders whose files are not the user's own."""


LOST = re.compile(
    r"illegal memory access|unspecified launch failure|device-side assert|misaligned address|illegal instruction"
    r"|hardware stack error|invalid program counter|uncorrectable ECC error"
)
"""What CUDA and HIP say where a kernel has broken the context of its process: no later call succeeds in it."""


class NotRun(Exception):
    """A case is not judged; the text is the sentence that says why."""


class Violation(AssertionError):
    """A requirement does not hold for a case."""

    def __init__(
        self,
        title: str,
        *,
        token: int | None = None,
        expected: object = "",
        received: object = "",
        requirement: str = "",
        case: Case | None = None,
    ):
        """Without a requirement it is that of the check that runs, on the case that it runs on."""
        super().__init__(title)
        self.title, self.token = title, None if token is None else int(token)
        self.expected, self.received = str(expected), str(received)
        self.requirement, self.case = requirement, case
        self.tried: Case | None = case
        """The case that it was found on, also where a failure shows none."""
        self.rows: list[tuple[str, str]] = []
        """(name, text): what its page shows besides the case."""

    def __str__(self) -> str:
        return f"{self.requirement} {self.title}".strip()


class Crash(Violation):
    """The subject raised an error on a case that it says it supports."""

    def __init__(
        self, error: Exception, *, expected: str = "a result", requirement: str = "", case: Case | None = None
    ):
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        super().__init__(
            "raised an error",
            expected=expected,
            received=f"{text} ({_where(error)})",
            requirement=requirement,
            case=case,
        )
        self.refused = isinstance(error, ValueError)
        """Whether it is the error by which an input is refused."""


def _where(error: Exception) -> str:
    """The last frame of the user's own files, where there is one, and the last one of all."""
    frames = traceback.extract_tb(error.__traceback__)[1:] or traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(("<", *LIBRARIES))]
    last = f"{frames[-1].filename}:{frames[-1].lineno}"
    if not own or own[-1] is frames[-1]:
        return last
    return f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}, which called {last}"


def accuse(title: str, *, token: int | None = None, expected: object = "", received: object = "") -> NoReturn:
    """The requirement of the check that runs does not hold for its case."""
    raise Violation(title, token=token, expected=expected, received=received)


@dataclass(kw_only=True)
class Entry:
    """What is known of one requirement and one subject."""

    judged: int = 0
    near_ties: int = 0
    places: set = field(default_factory=set)
    """The different places on which it was judged, for kinds that have them."""
    reasons: Counter = field(default_factory=Counter)
    """Why specs of the pool are not supported."""
    not_run: Counter = field(default_factory=Counter)
    """Why cases of supported specs were not run."""
    known: Counter = field(default_factory=Counter)
    violation: Violation | None = None

    def status(self, level: str) -> str:
        """ok, NEW (a MUST that fails), advice (a SHOULD that fails), known (declared), or unsupported."""
        if self.violation is not None:
            return "NEW" if level == "MUST" else "advice"
        if self.known:
            return "known"
        return "ok" if self.judged else "unsupported"


class Judge:
    """Judges one subject. The checks of the chapters get one of these."""

    lost: ClassVar[Callable[[str], NoReturn] | None] = None
    """Of all judges of a process: told of the error with which a subject lost its device; the process ends there."""

    def __init__(self, subject: Subject, deviations=(), chosen: Chosen | None = None):
        self.subject = subject
        self.chosen = chosen
        """What alone is judged; None: the pools of the kinds."""
        self.deviations = tuple(deviations)
        if not REQUIREMENTS:
            raise RuntimeError("no requirement is registered: import conformance.run.kinds, which loads the chapters")
        self.ledger = {name: Entry() for name in REQUIREMENTS}
        self.capabilities = capabilities(subject)
        self.memory: dict[Any, Any] = {}
        """What a kind keeps of this subject between calls."""
        self.watch: Callable[[Check, Case], None] | None = None
        """Told of each case before the subject is called on it."""
        self.handed: tuple[tuple, dict[str, Any]] = (), {}
        """Arguments and inputs of the last call, the very arrays that the subject got."""
        self._running: list[Check] = []
        computing = subject.compute_dtype, subject.expert_dtype
        for dtype in (*subject.logit_dtypes, *computing):
            known = tuple(EPSILON) if dtype in computing else ARRAYS
            require(dtype in known, f"subject {self.name}: dtype {dtype!r} is not one of {known}")

    @property
    def name(self) -> str:
        """Of the subject; that of its class where it has none."""
        return self.subject.name or type(self.subject).__name__.lower()

    @property
    def where(self) -> str:
        """The device that the subject was told, the dtypes of its bounds, and the class that it declares, if any."""
        subject, exact = self.subject, self.subject.compute_dtype
        declared = isinstance(exact, Precision) and exact.stages
        if not subject.device and not declared:
            return ""
        place = f"on {subject.device}, " if subject.device else ""
        experts = "" if subject.expert_dtype == exact else f", experts in {subject.expert_dtype}"
        return f"{place}in {exact.words if isinstance(exact, Precision) else exact}{experts}"

    # running the subject

    def call(self, case: Case, method: str, *arguments: Any, blame: str = "", **inputs: Any) -> Any:
        """What a method of the subject returns for a case.

        Args:
            blame: the requirement that an error violates; that of the check that runs, unless it is given.
            inputs: by name; float64 arrays are given in float32.

        Raises:
            NotRun: the subject does not run the case, or its method does not name one of the inputs.
            Crash: it raised an error.
        """
        self.needs(method)
        if sentence := case.why_not(self.subject, method):
            raise NotRun(sentence)
        inputs = {name: _as_given(value) for name, value in inputs.items()}
        parameters = named_inputs(self.subject, method)
        for name in inputs:
            # **inputs names none: what is swallowed unread is not what the case asks for.
            if name not in parameters:
                raise NotRun(f"{method}() has no parameter {name}")
        self.handed = arguments, inputs
        try:
            # Poisoned rows overflow; that is for the checks to see, not for Python to warn of.
            with np.errstate(all="ignore"):
                return getattr(self.subject, method)(*arguments, **inputs)
        except Unsupported as sentence:
            raise NotRun(str(sentence)) from None
        except Exception as error:
            crash = Crash(error, requirement=blame, case=case if blame else None)
            if Judge.lost is not None and LOST.search(str(error)):
                Judge.lost(crash.received)
            raise crash from error

    def needs(self, method: str) -> None:
        """NotRun where the subject does not define an optional method."""
        if method not in self.capabilities:
            raise NotRun(f"{method}() is not defined")

    # holding a case against a requirement

    def examine(self, check: Check, case: Case) -> None:
        """Run a check on a case; a violation that no deviation covers and nothing else explains is raised."""
        if self.watch is not None:
            self.watch(check, case)
        entry = self.ledger[check.requirement]
        try:
            self.run(check, case)
        except NotRun as sentence:
            entry.not_run[str(sentence)] += 1
        except Violation as found:
            try:
                violation = self.blame(check, found)
            except NotRun as sentence:
                entry.not_run[str(sentence)] += 1
            else:
                self._enter(check, violation)
        else:
            entry.judged += 1
            if case.place is not None:
                entry.places.add(case.place)

    def run(self, check: Check, case: Case) -> None:
        """Run a check on a case, whoever is to blame.

        Raises:
            NotRun: the case is not what the check is given, or the subject does not run it.
            Violation: with its requirement and case.
        """
        for condition in check.given:
            if not condition.holds(self, case):
                raise NotRun(condition.sentence)
        self._running.append(check)
        try:
            check.run(self, case)
        except Violation as violation:
            violation.tried = violation.case or case
            if violation.token is not None and violation.token >= violation.tried.num_tokens:
                violation.token = None  # of more tokens, which the check made itself: a page could not show it
            if not violation.requirement:
                violation.requirement = check.requirement
                violation.case = case if check.shows_case else None
            raise
        finally:
            self._running.pop()

    def near_ties(self, count: int) -> None:
        """So many tokens hung on rounding, and were forgiven by the check that runs."""
        if self._running:
            self.ledger[self._running[-1].requirement].near_ties += count

    def blame(self, check: Check, violation: Violation) -> Violation:
        """The violation to report in place of one that a check found: one fault is reported once, where it is.

        Raises:
            NotRun: the violation is explained by something that is not judged here.
        """
        case = violation.case
        if violation.requirement != check.requirement or case is None:
            return violation
        asked = [(case, check.after)]
        asked += [(neighbour, names) for simplify, names in check.simpler if (neighbour := simplify(case)) is not None]
        for neighbour, names in asked:
            for name in names:
                if (found := self.violated(name, neighbour)) is not None:
                    return self.blame(CHECKS[name], found)
        for condition in (*check.unless, *check.excuses):
            if condition.holds(self, case):
                raise NotRun(condition.sentence)
        return violation

    def violated(self, requirement: str, case: Case) -> Violation | None:
        """What the check of a requirement finds on a case of its kind, or of the kind that its kind is made of."""
        check = CHECKS[requirement]
        part = case.part(check.case)
        if part is None or check.method not in self.capabilities or not check.wants(part):
            return None
        try:
            self.run(check, part)
        except Violation as violation:
            return violation
        except NotRun:
            return None
        return None

    def holds(self, requirement: str, case: Case) -> bool:
        """Whether a requirement holds for a case; a case that cannot be run does not contradict it."""
        return self.violated(requirement, case) is None

    def covering(self, violation: Violation):
        """The declared deviation that covers a violation, or None."""
        return next((d for d in self.deviations if d.covers(violation)), None)

    def _enter(self, check: Check, violation: Violation) -> None:
        entry = self.ledger[violation.requirement]
        if deviation := self.covering(violation):
            entry.known[deviation] += 1
            entry.judged += 1
        elif violation.requirement == check.requirement:
            entry.judged += 1
            raise violation
        elif entry.violation is None:
            # Another requirement's own test finds it too, as a rule; if not, it is accused all the same.
            entry.violation = violation


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """A copy in a dtype by name; bfloat16 needs ml_dtypes, which comes with the extras that use it."""
    if dtype == "bfloat16":
        import ml_dtypes

        return array.astype(ml_dtypes.bfloat16)
    return array.astype(dtype)


def _as_given(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.astype(np.float32) if value.dtype == np.float64 else value.copy()
    return value
