"""conformance, router: the diagnosis. When two routings are the same: ids as sets, weights by id within the bounds."""

from typing import Any

import numpy as np

from conformance.core.diagnosis import Call, Rounding, same, same_result
from conformance.core.rounding import TINY, close, equal
from conformance.router.bounds import weight_error
from conformance.router.case import RouterCase


def same_routing(call: Call, found: Any, rounding: Rounding) -> bool:
    """Whether a routing is that of a call, slots in any order; what is no routing is compared as it is."""
    if call.method != "route" or not isinstance(call.case, RouterCase):
        return same_result(call, found, rounding)
    (ids_TK, weights_TK), (wanted_ids_TK, wanted_TK) = _by_id(found), _by_id(call.result)
    if not same(ids_TK, wanted_ids_TK, 0.0, 0.0) or weights_TK.shape != wanted_TK.shape:
        return False
    error_TK = _error(call.case, ids_TK, rounding)
    shared, wanted = found.shared_weights_TS, call.result.shared_weights_TS
    if (shared is None) != (wanted is None):
        return False
    floor, worst_T1 = rounding.floor + TINY[rounding.dtype], error_TK.max(axis=-1, keepdims=True, initial=0)
    if shared is not None and not _near(np.asarray(shared), np.asarray(wanted), worst_T1, floor):
        return False
    return _near(weights_TK, wanted_TK, error_TK, floor)


def same_slots(call: Call, found: Any, rounding: Rounding) -> bool:
    """Whether a routing is that of a call, slot by slot."""
    if call.method != "route" or not isinstance(call.case, RouterCase):
        return same_result(call, found, rounding)
    return same(found.expert_ids_TK, call.result.expert_ids_TK, 0.0, 0.0) and same_routing(call, found, rounding)


def _error(case: RouterCase, ids_TK: np.ndarray, rounding: Rounding) -> np.ndarray:
    """(T, K) how far rounding can take each of two weights apart, relatively; at least as far as any other number."""
    if not case.is_routable or ids_TK.shape != (case.num_tokens, case.spec.top_k):
        return np.full(ids_TK.shape, rounding.tolerance)
    bounded_TK = 2 * weight_error(case, np.clip(ids_TK, 0, case.spec.num_choices - 1).astype(np.int64), rounding.dtype)
    return np.fmax(bounded_TK, rounding.tolerance)


def _near(found: np.ndarray, wanted: np.ndarray, error: np.ndarray, floor: float) -> bool:
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    return bool((equal(found, wanted) | close(found, wanted, error, floor)).all())


def _by_id(routing: Any) -> tuple[np.ndarray, np.ndarray]:
    ids_TK, weights_TK = np.asarray(routing.expert_ids_TK), np.asarray(routing.weights_TK)
    order_TK = np.argsort(ids_TK, axis=-1, kind="stable")
    if weights_TK.shape != ids_TK.shape:
        return ids_TK, weights_TK
    return np.take_along_axis(ids_TK, order_TK, axis=-1), np.take_along_axis(weights_TK, order_TK, axis=-1)
