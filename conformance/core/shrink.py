"""conformance, the smallest case: after hypothesis, a failing case loses what it does not need to fail."""

from collections.abc import Iterator

import numpy as np

from conformance.balance.case import LoadCase
from conformance.core.judge import CHECKS, Judge, Violation
from conformance.layer.case import LayerCase
from conformance.router.case import Case
from conformance.sharded.case import LayoutCase, simpler_layouts
from moe_ref.specs.params import param_shapes

TRIES = 400


def shrink(judge: Judge, violation: Violation) -> Violation:
    """The violation of a smaller case: fewer tokens, no bias where none is needed, rounder numbers."""
    tries = 0
    changed = violation.case is not None
    while changed:
        changed = False
        assert violation.case is not None
        for smaller in _smaller(violation.case, violation.token):
            tries += 1
            if tries > TRIES:
                return violation
            if found := violated(judge, violation.requirement, smaller):
                violation, changed = found, True
                break
    return violation


def violated(judge: Judge, id: str, case: Case | LayerCase | LoadCase) -> Violation | None:
    """The undeclared violation of this very requirement by a case, or None."""
    near_ties = judge.ledger[id].near_ties
    if isinstance(case, (LayoutCase, LoadCase)) and not CHECKS[id].wants(case):
        return None
    try:
        CHECKS[id].run(judge, case)
    except Violation as violation:
        same = violation.requirement == id and judge.covering(violation) is None
        if same and judge.earliest(CHECKS[id], violation) is violation:
            return violation
    except Exception:
        return None  # a smaller case may be no case at all: NotRun, or inputs that the reference refuses
    finally:
        judge.ledger[id].near_ties = near_ties
    return None


def _smaller(case: Case | LayerCase | LoadCase, token: int | None) -> Iterator[Case | LayerCase | LoadCase]:
    """Simpler neighbours of a case, the greatest simplification first."""
    if case.num_tokens > 1:
        if token is not None:
            yield case.tokens(np.array([token]))
        for t in range(min(case.num_tokens, 20)):
            yield case.tokens(np.delete(np.arange(case.num_tokens), t))
    if isinstance(case, LayoutCase):
        yield from simpler_layouts(case)
    if isinstance(case, LoadCase):
        yield from _simpler_load(case)
    else:
        yield from _simpler_layer(case) if isinstance(case, LayerCase) else _simpler_router(case)


def _simpler_router(case: Case) -> Iterator[Case]:
    bias_E = case.expert_bias_E
    if bias_E is not None:
        yield case.with_(expert_bias_E=None)
        for e in np.flatnonzero(bias_E):
            yield case.with_(expert_bias_E=np.where(np.arange(len(bias_E)) == e, 0, bias_E))
        yield from (case.with_(expert_bias_E=rounder) for rounder in _rounder(bias_E))
    yield from (case.with_(logits_TE=rounder) for rounder in _rounder(case.logits_TE))


def _simpler_layer(case: LayerCase) -> Iterator[LayerCase]:
    if case.params.expert_bias_E is not None:
        yield case.with_params(expert_bias_E=None)
    for name in param_shapes(case.spec):
        value = getattr(case.params, name)
        if value is not None:
            if name.startswith("b_") and value.any():
                yield case.with_params(**{name: np.zeros_like(value)})
            yield from (case.with_params(**{name: rounder}) for rounder in _rounder(value))
    yield from (case.with_(x_TD=rounder) for rounder in _rounder(case.x_TD))
    yield from (case.with_(d_output_TD=rounder) for rounder in _rounder(case.d_output_TD))


def _simpler_load(case: LoadCase) -> Iterator[LoadCase]:
    for name in case.inputs:
        yield case.with_inputs(**{name: None})
    if len(case.counts_SE) > 1:
        yield from (case.with_(counts_SE=np.delete(case.counts_SE, s, axis=0)) for s in range(len(case.counts_SE)))
    yield from (case.with_(expert_bias_E=rounder) for rounder in _rounder(case.expert_bias_E))
    yield from (case.with_(logits_TE=rounder) for rounder in _rounder(case.logits_TE))


def _rounder(values) -> Iterator[np.ndarray]:
    """The values with fewer digits; only where that changes something."""
    for step in (1.0, 0.5, 0.125):
        rounded = np.round(values / step) * step
        if not np.array_equal(rounded, values, equal_nan=True):
            yield rounded
