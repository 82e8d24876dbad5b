"""conformance, the judge: runs a subject on a case, holds the result against the reference, and keeps the ledger."""

import inspect
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conformance.balance.case import LoadCase
from conformance.core.checks import (
    CHECKS,
    LAYOUT_METHODS,
    LOAD_RULES,
    REPLAY_METHODS,  # noqa: F401  (known here too)
    Check,
    LayerCheck,
    LayoutCheck,
    LoadCheck,
)
from conformance.core.register import REQUIREMENTS, STAGES
from conformance.core.subject import Routing, Subject, Unsupported, capabilities
from conformance.layer.case import LayerCase
from conformance.router.case import Case, valid_tokens
from conformance.sharded.case import LayoutCase
from moe_ref import UNUSED, LayerSpec, RouterSpec
from moe_ref.specs.checks import require


class NotRun(Exception):
    """The subject cannot run a case; the text is the sentence that says why."""


class Violation(AssertionError):
    """A requirement does not hold for a case."""

    def __init__(
        self,
        requirement: str,
        case: Case | LayerCase | LoadCase | None,
        title: str,
        *,
        token=None,
        expected="",
        received="",
    ):
        super().__init__(f"{requirement} {title}")
        self.requirement, self.case, self.title = requirement, case, title
        self.token, self.expected, self.received = token, expected, received


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a subject returned for a case, checked for its form, in float64 and int64."""

    case: Case
    expert_ids_TK: np.ndarray
    weights_TK: np.ndarray
    scores_TE: np.ndarray | None
    group_ids_TL: np.ndarray | None
    shared_weights_TS: np.ndarray | None


@dataclass(kw_only=True)
class Entry:
    """What is known of one requirement and one subject."""

    judged: int = 0
    near_ties: int = 0
    layouts: set = field(default_factory=set)
    """The digests of the different layouts on which it was judged."""
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
    """Judges one subject. The checks of the suite get one of these."""

    def __init__(self, subject: Subject, deviations=()):
        self.subject = subject
        self.deviations = tuple(deviations)
        self.ledger = {id: Entry() for id in REQUIREMENTS}
        self.capabilities = capabilities(subject)
        self.surveys: dict[str, Violation | None] = {}
        """What the fixed cases of a layer's requirement found; they are run once."""
        self._observed: tuple[Case | None, Observation | None] = (None, None)
        self._specs: dict[str, tuple[list, Counter]] = {}
        for dtype in (*subject.logit_dtypes, subject.compute_dtype, subject.expert_dtype):
            known = ("float64", "float32", "float16", "bfloat16")
            require(dtype in known, f"subject {self.name}: dtype {dtype!r} is not one of {known}")

    @property
    def name(self) -> str:
        return self.subject.name or type(self.subject).__name__.lower()

    # running the subject

    def observe(self, case: Case) -> Observation:
        """The subject's result for a case; NotRun where it cannot run it, Violation where its form is wrong."""
        if self._observed[0] is not case:
            self._observed = (case, well_formed(case, self.route(case)))
        observation = self._observed[1]
        assert observation is not None
        return observation

    def route(self, case: Case) -> Routing:
        """The subject's bare result for a case."""
        spec = case.spec
        self.needs("route")
        if sentence := self.subject.supports(spec):
            raise NotRun(sentence)
        dtype = case.dtype if case.dtype in self.subject.logit_dtypes else "float64"
        if dtype not in self.subject.logit_dtypes:
            raise NotRun(f"logits of dtype {case.dtype} are not taken")
        bias_E = None if case.expert_bias_E is None else case.expert_bias_E.astype(np.float32)
        inputs = {name: _as_given(value) for name, value in case.inputs.items()}
        self._names_inputs("route", inputs)
        try:
            return self.subject.route(cast(case.logits_TE, dtype), spec, bias_E, **inputs)
        except Unsupported as sentence:
            raise NotRun(str(sentence)) from None
        except Exception as error:
            raise crash(case, error) from error

    def call(self, case: LayerCase | LoadCase, method: str, *arguments, blame: str, **inputs):
        """What a method of layers returns; an error that it raises violates the requirement `blame`."""
        self.needs(method)
        if sentence := self._why_not(case, method):
            raise NotRun(sentence)
        inputs = {name: _as_given(value) for name, value in inputs.items()}
        self._names_inputs(method, inputs)
        try:
            # Poisoned rows overflow; that is for the checks to see, not for Python to warn of.
            with np.errstate(all="ignore"):
                return getattr(self.subject, method)(*arguments, **inputs)
        except Unsupported as sentence:
            raise NotRun(str(sentence)) from None
        except Exception as error:
            raise crash(case, error, blame, "a result") from error

    def _why_not(self, case: LayerCase | LoadCase, method: str) -> str | None:
        if isinstance(case, LoadCase):
            return None if LOAD_RULES[method] is None else self.subject.supports_load(case.spec.rule)
        if isinstance(case, LayoutCase) and method in LAYOUT_METHODS:
            return self.why_not_laid_out(case.spec, case.layout, case.tokens_per_shard)
        return self.subject.supports_layer(case.spec)

    def why_not_laid_out(self, spec: LayerSpec, layout, tokens_per_shard: tuple[int, ...]) -> str | None:
        """None, or a sentence that says why the subject cannot run a layer on this layout with these tokens."""
        if self.subject.equal_shards and len(set(tokens_per_shard)) > 1:
            return "its token shards have equal numbers of tokens"
        return self.subject.supports_layer(spec, layout)

    def sound(self, case: Case, *ids: str) -> bool:
        """Whether these requirements hold for a neighbouring case; if not, they are to blame, not this case."""
        return all(self.holds(id, case) for id in ids)

    def needs(self, method: str) -> None:
        """NotRun where the subject does not define an optional method."""
        if method not in self.capabilities:
            raise NotRun(f"{method}() is not defined")

    def _names_inputs(self, method: str, inputs: dict) -> None:
        parameters = inspect.signature(getattr(self.subject, method)).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return
        for name in inputs:
            if name not in parameters:
                raise NotRun(f"{method}() has no parameter {name}")

    def specs(self, check: Check) -> tuple[list, Counter]:
        """The specs of the pool that the check wants and the subject supports; why the others are not run.

        For a LayoutCheck they are settings: a spec with a layout.
        """
        if check.requirement not in self._specs and isinstance(check, LayoutCheck):
            from conformance.sharded.draw import supported

            self._specs[check.requirement] = supported(self, check)
        if check.requirement not in self._specs and isinstance(check, LoadCheck):
            from conformance.balance.draw import supported as supported_rules

            self._specs[check.requirement] = supported_rules(self, check)
        if check.requirement not in self._specs:
            wanted: list[Any] = [spec for spec in self._pool(check) if check.spec(spec)]
            supports = self.subject.supports_layer if isinstance(check, LayerCheck) else self.subject.supports
            reasons = [supports(spec) for spec in wanted]
            supported = [spec for spec, why in zip(wanted, reasons, strict=True) if why is None]
            self._specs[check.requirement] = supported, Counter(why for why in reasons if why)
        return self._specs[check.requirement]

    def _pool(self, check: Check) -> list[RouterSpec] | list[LayerSpec]:
        from conformance.layer.draw import LAYER_SPECS, THIN_LAYER_SPECS
        from conformance.router.draw import SPECS, THIN_SPECS

        if isinstance(check, LayerCheck):
            return THIN_LAYER_SPECS if self.subject.compiles else LAYER_SPECS
        return THIN_SPECS if self.subject.compiles else SPECS

    # holding a case against a requirement

    def begin(self, check: Check) -> None:
        """Called once for each example that a check draws, also where none can be run."""
        reasons = self.specs(check)[1]
        if check.method not in self.capabilities:
            reasons = Counter([f"{check.method}() is not defined"])
        self.ledger[check.requirement].reasons = reasons

    def examine(self, check: Check, case: Case | LayerCase | LoadCase) -> None:
        """Run a check on a case; a violation that no deviation covers and no earlier stage explains is raised."""
        entry = self.ledger[check.requirement]
        try:
            check.run(self, case)
            entry.judged += 1
            if isinstance(case, LayoutCase):
                entry.layouts.add(case.layout_digest)
        except NotRun as sentence:
            entry.not_run[str(sentence)] += 1
        except Violation as violation:
            self._attribute(check, violation)

    def _attribute(self, check: Check, violation: Violation) -> None:
        violation = self.earliest(check, violation)
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

    def earliest(self, check: Check, violation: Violation) -> Violation:
        """The violation of the earliest stage on the same case: one fault is reported once."""
        if violation.requirement != check.requirement or violation.case is None:
            return violation
        for id in check.after:
            earlier, case = CHECKS[id], violation.case
            if isinstance(case, LayerCase) and not isinstance(earlier, LayerCheck):
                case = case.router_case
            if earlier.method in self.capabilities and earlier.wants(case):
                try:
                    earlier.run(self, case)
                except Violation as found:
                    return self.earliest(earlier, found)
                except NotRun:
                    continue
        return violation

    def covering(self, violation: Violation):
        """The declared deviation that covers a violation, or None."""
        return next((d for d in self.deviations if d.covers(violation)), None)

    def holds(self, id: str, case: Case | LayerCase | LoadCase) -> bool:
        """Whether a requirement holds for a case; a case that cannot be run does not contradict it."""
        if not CHECKS[id].wants(case):
            return True
        try:
            CHECKS[id].run(self, case)
        except Violation:
            return False
        except NotRun:
            return True
        return True


def cast(array, dtype: str) -> np.ndarray:
    """A copy in a dtype by name; bfloat16 needs ml_dtypes, which comes with the extras that use it."""
    if dtype == "bfloat16":
        import ml_dtypes

        return array.astype(ml_dtypes.bfloat16)
    return array.astype(dtype)


def _as_given(value):
    if isinstance(value, np.ndarray):
        return value.astype(np.float32) if value.dtype == np.float64 else value.copy()
    return value


def crash(
    case: Case | LayerCase | LoadCase, error: Exception, blame: str = "RUN-1", wanted: str = "a routing"
) -> Violation:
    """An error of the subject on a case that it says it supports."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    received = f"{text} ({where.filename}:{where.lineno})"
    return Violation(blame, case, "raised an error", expected=wanted, received=received)


def well_formed(case: Case, routing: Routing) -> Observation:
    """The result as float64 and int64 arrays of the right shapes, or a Violation of SEL-1."""
    spec, T = case.spec, case.num_tokens

    def wrong(title, expected, received, token=None):
        return Violation("SEL-1", case, title, token=token, expected=str(expected), received=str(received))

    ids_TK, weights_TK = np.asarray(routing.expert_ids_TK), np.asarray(routing.weights_TK)
    shape = (T, spec.top_k)
    if ids_TK.shape != shape:
        raise wrong("expert ids of another shape", shape, ids_TK.shape)
    if weights_TK.shape != shape:
        raise wrong("weights of another shape", shape, weights_TK.shape)
    if ids_TK.dtype.kind not in "iu":
        raise wrong("expert ids are not integers", "integers", ids_TK.dtype)
    ids_TK = ids_TK.astype(np.int64)
    may_be_unused_TK = ~valid_tokens(case)[:, None] | (np.asarray(case.inputs.get("given_ids_TK", 0)) == UNUSED)
    unused_TK = may_be_unused_TK & (ids_TK == UNUSED)
    for t in np.flatnonzero((((ids_TK < 0) | (ids_TK >= spec.num_choices)) & ~unused_TK).any(axis=-1)):
        raise wrong("an expert id is out of range", f"ids in 0 .. {spec.num_choices - 1}", ids_TK[t].tolist(), int(t))
    in_order_TK = np.sort(np.where(unused_TK, -1 - np.arange(spec.top_k), ids_TK), axis=-1)
    for t in np.flatnonzero((np.diff(in_order_TK) == 0).any(axis=-1)):
        raise wrong("an expert is selected twice", f"{spec.top_k} distinct experts", ids_TK[t].tolist(), int(t))
    optional = {}
    for name, wanted in (
        ("scores_TE", (T, spec.num_choices)),
        ("group_ids_TL", (T, spec.num_limited_groups)),
        ("shared_weights_TS", (T, spec.num_scored_shared_experts)),
    ):
        value = getattr(routing, name)
        if value is not None:
            value = np.asarray(value)
            if value.shape != wanted:
                raise wrong(f"{name} of another shape", wanted, value.shape)
            value = value.astype(np.int64 if name == "group_ids_TL" else np.float64)
        optional[name] = value
    return Observation(case=case, expert_ids_TK=ids_TK, weights_TK=weights_TK.astype(np.float64), **optional)


def stage_order(id: str) -> tuple[int, int]:
    """Sort key: the stage of a requirement, then its place in the register."""
    return STAGES.index(REQUIREMENTS[id].stage), list(REQUIREMENTS).index(id)
