"""conformance, router: the diagnosis. Which known fault reproduces what a subject returned."""

from collections.abc import Iterable

import numpy as np

from conformance.core.fault import Fault
from conformance.core.rounding import TINY, close
from conformance.router.bounds import weight_error
from conformance.router.case import RouterCase
from conformance.router.faulty import routing_under
from conformance.router.observation import Observation


def explaining(
    case: RouterCase, observation: Observation, faults: Iterable[Fault], *, dtype: str = "float32"
) -> list[Fault]:
    """Faults whose output, in float64, is the observation; none where the clean reference explains it.

    Ids are compared as sets, weights by id within the judge's bounds.

    Args:
        case: what the subject was given.
        observation: what it returned.
        faults: that may explain it.
        dtype: in which the subject computes; the bounds follow from it.
    """
    if case.num_tokens == 0 or _same(case.reference, observation, case, dtype):
        return []
    return [fault for fault in faults if _reproduces(fault, observation, case, dtype)]


def _reproduces(fault: Fault, observation: Observation, case: RouterCase, dtype: str) -> bool:
    if fault.method != "route":
        return False
    try:
        return _same(routing_under(fault, case), observation, case, dtype)
    except Exception:  # whatever a fault runs into on this case, it does not return the observation
        return False


def _same(trace, observation: Observation, case: RouterCase, dtype: str) -> bool:
    ids_TK, weights_TK = _by_id(trace.expert_ids_TK, trace.weights_TK)
    found_ids_TK, found_TK = _by_id(observation.expert_ids_TK, observation.weights_TK)
    if ids_TK.shape != found_ids_TK.shape or (ids_TK != found_ids_TK).any():
        return False
    error_TK = weight_error(case, np.clip(ids_TK, 0, case.spec.num_choices - 1), dtype)
    near_TK = close(found_TK, weights_TK, error_TK, TINY[dtype])
    return bool((near_TK | (np.isnan(found_TK) & np.isnan(weights_TK))).all()) and _shared_same(
        trace, observation, case, dtype
    )


def _shared_same(trace, observation: Observation, case: RouterCase, dtype: str) -> bool:
    wanted_TS, found_TS = trace.shared_weights_TS, observation.shared_weights_TS
    if wanted_TS is None or found_TS is None:
        return wanted_TS is None and found_TS is None
    error = weight_error(case, case.reference.expert_ids_TK, dtype).max(axis=-1, keepdims=True, initial=0)
    return bool(close(found_TS, wanted_TS, error, TINY[dtype]).all())


def _by_id(expert_ids_TK, weights_TK):
    order_TK = np.argsort(expert_ids_TK, axis=-1, kind="stable")
    return np.take_along_axis(expert_ids_TK, order_TK, axis=-1), np.take_along_axis(weights_TK, order_TK, axis=-1)
