"""conformance, layer: the picture of a failure. The experts of a token, and its output beside that of the subject.

Legend: T tokens, D model dim, E experts.
"""

import numpy as np

from conformance.core.check import CHECKS
from conformance.core.judge import Judge, Violation
from conformance.core.picture import MOST_COLUMNS, NOTE_OF_DISTANCES, Panel, asked, bars, differing, distance
from conformance.layer.case import LayerCase
from conformance.layer.verdicts import (
    gradients_of_subject,
    output_of_subject,
    permutation_of_subject,
    wanted_gradients,
)
from conformance.router import picture as of_router


def picture(judge: Judge | None, violation: Violation, case: LayerCase) -> list[Panel]:
    """The rows of each expert; the output of the token, or each gradient; and how the token's experts are ranked.

    Args:
        judge: None where the subject is not called again.
    """
    method, trace, token = CHECKS[violation.requirement].method, case.reference, violation.token
    panels: list[Panel] = _counts(judge if method == "permute" else None, case)
    if method == "layer_gradients":
        panels += _gradients(judge, case)
    if not case.num_tokens:
        return panels
    found_TD = asked(judge, output_of_subject, case) if method in ("layer", "replay", "record") else None
    t = _first_that_differs(trace.output_TD, found_TD) if token is None else token
    if method not in ("permute", "layer_gradients"):
        D = min(case.x_TD.shape[1], MOST_COLUMNS)
        found_D = None if found_TD is None else found_TD[t, :D]
        title = f"Token {t}: output of the layer"
        panels.append(bars(title, list(map(str, range(D))), trace.output_TD[t, :D], found_D))
    return [*panels, *of_router.picture(None, case.router_case, t)]


def _counts(judge: Judge | None, case: LayerCase) -> list[Panel]:
    """How many rows each expert has, if they are not too many to be drawn."""
    permutation = case.reference.permutation
    E = len(permutation.tokens_per_expert_E)
    if not 0 < E <= MOST_COLUMNS:
        return []
    found = asked(judge, lambda judge, case: permutation_of_subject(judge, case, case.reference.expert_ids_TK, E), case)
    counts_E = None if found is None else found[1].astype(np.float64)
    names = list(map(str, range(E)))
    return [bars("Rows of each expert", names, permutation.tokens_per_expert_E.astype(np.float64), counts_E)]


def _gradients(judge: Judge | None, case: LayerCase) -> list[Panel]:
    """How far each gradient is from the reference's."""
    found = asked(judge, gradients_of_subject, case)
    if found is None:
        return []
    wanted = wanted_gradients(case)
    names = [name for name in wanted if name in found]
    apart = np.array([distance(wanted[name], found[name]) for name in names])
    return [
        bars("Distance of each gradient from the reference", names, np.zeros(len(names)), apart, note=NOTE_OF_DISTANCES)
    ]


def _first_that_differs(wanted_TD: np.ndarray, found_TD: np.ndarray | None) -> int:
    if found_TD is None:
        return 0
    rows = np.flatnonzero(differing(wanted_TD, found_TD).any(axis=-1))
    return int(rows[0]) if len(rows) else 0
