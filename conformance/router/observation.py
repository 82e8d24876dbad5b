"""conformance, router: what a subject returned for a case, checked for its form."""

from dataclasses import dataclass

import numpy as np

from conformance.core.holding import array_from
from conformance.core.judge import Judge, NotRun, Violation, cast
from conformance.core.subject import Routing
from conformance.router.case import RouterCase
from moe_ref import UNUSED

RUNS, WELL_FORMED = "RUN-1", "SEL-1"
"""The requirements that a router runs at all, and that what it returns is a routing."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A routing in float64 and int64."""

    case: RouterCase
    expert_ids_TK: np.ndarray
    weights_TK: np.ndarray
    scores_TE: np.ndarray | None = None
    group_ids_TL: np.ndarray | None = None
    shared_weights_TS: np.ndarray | None = None


def observe(judge: Judge, case: RouterCase) -> Observation:
    """The subject's result for a case; the last one is kept.

    Raises:
        NotRun: the subject does not run it.
        Violation: it raises an error (RUN-1), or the form of the result is wrong (SEL-1).
    """
    seen_case, seen = judge.memory.get("observed", (None, None))
    if seen_case is not case:
        seen = well_formed(case, routed(judge, case, blame=RUNS))
        judge.memory["observed"] = case, seen
    return seen


def routed(judge: Judge, case: RouterCase, *, blame: str = "") -> Routing:
    """The subject's bare result for a case; an error violates the requirement `blame`, or that of the check."""
    logits_TE, bias_E = given_to(judge, case)
    return judge.call(case, "route", logits_TE, case.spec, bias_E, blame=blame, **case.inputs)


def given_to(judge: Judge, case: RouterCase) -> tuple[np.ndarray, np.ndarray | None]:
    """Logits and bias as the subject gets them, in arrays of its own.

    Raises:
        NotRun: it takes no logits of this dtype, nor of float64.
    """
    dtype = case.dtype if case.dtype in judge.subject.logit_dtypes else "float64"
    if dtype not in judge.subject.logit_dtypes:
        raise NotRun(f"logits of dtype {case.dtype} are not taken")
    bias_E = None if case.expert_bias_E is None else case.expert_bias_E.astype(np.float32)
    return cast(case.logits_TE, dtype), bias_E


def well_formed(case: RouterCase, routing: Routing) -> Observation:
    """The result as float64 and int64 arrays of the right shapes, or a Violation of SEL-1."""
    spec, T = case.spec, case.num_tokens

    def wrong(title, expected, received, token=None):
        return Violation(title, token=token, expected=expected, received=received, requirement=WELL_FORMED, case=case)

    def read(name, value):
        return array_from(value, f"{name} that NumPy does not read", requirement=WELL_FORMED, case=case)

    ids_TK, weights_TK = read("expert ids", routing.expert_ids_TK), read("weights", routing.weights_TK)
    shape = (T, spec.top_k)
    if ids_TK.shape != shape:
        raise wrong("expert ids of another shape", shape, ids_TK.shape)
    if weights_TK.shape != shape:
        raise wrong("weights of another shape", shape, weights_TK.shape)
    if ids_TK.dtype.kind not in "iu":
        raise wrong("expert ids are not integers", "integers", ids_TK.dtype)
    ids_TK = ids_TK.astype(np.int64)
    nowhere_T = ~case.valid_T | np.isneginf(case.logits_TE).all(axis=-1)  # of a row of -inf nobody can be chosen
    may_be_unused_TK = nowhere_T[:, None] | (np.asarray(case.inputs.get("given_ids_TK", 0)) == UNUSED)
    if spec.selector == "expert_choice" or spec.varies:  # how many are used is for SEL-31, SEL-21 and SEL-22
        may_be_unused_TK = np.ones(shape, dtype=bool)
    unused_TK = may_be_unused_TK & (ids_TK == UNUSED)
    for t in np.flatnonzero((((ids_TK < 0) | (ids_TK >= spec.num_choices)) & ~unused_TK).any(axis=-1)):
        raise wrong("an expert id is out of range", f"ids in 0 .. {spec.num_choices - 1}", ids_TK[t].tolist(), t)
    in_order_TK = np.sort(np.where(unused_TK, -1 - np.arange(spec.top_k), ids_TK), axis=-1)
    for t in np.flatnonzero((np.diff(in_order_TK) == 0).any(axis=-1)):
        raise wrong("an expert is selected twice", f"{spec.top_k} distinct experts", ids_TK[t].tolist(), t)
    optional = {}
    for name, wanted in (
        ("scores_TE", (T, spec.num_choices)),
        ("group_ids_TL", (T, spec.num_limited_groups)),
        ("shared_weights_TS", (T, spec.num_scored_shared_experts)),
    ):
        value = getattr(routing, name)
        if value is not None:
            value = read(name, value)
            if value.shape != wanted:
                raise wrong(f"{name} of another shape", wanted, value.shape)
            value = value.astype(np.int64 if name == "group_ids_TL" else np.float64)
        optional[name] = value
    return Observation(case=case, expert_ids_TK=ids_TK, weights_TK=weights_TK.astype(np.float64), **optional)
