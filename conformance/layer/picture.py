"""conformance, layer: the picture of a failure. The experts of a token, and its output beside that of the subject.

Legend: T tokens, D model dim, E experts.
"""

import numpy as np

from conformance.core.judge import Judge
from conformance.core.picture import MOST_COLUMNS, Panel, asked, bars, differing
from conformance.layer.case import LayerCase
from conformance.layer.verdicts import output_of_subject
from conformance.router import picture as of_router


def picture(judge: Judge | None, case: LayerCase, token: int | None) -> list[Panel]:
    """The rows of each expert, the output of the token, and how its experts are ranked.

    Args:
        token: None: the first one that differs.
        judge: None where the subject is not called again.
    """
    trace = case.reference
    counts_E = trace.permutation.tokens_per_expert_E
    panels: list[Panel] = []
    if 0 < len(counts_E) <= MOST_COLUMNS:
        names = [str(e) for e in range(len(counts_E))]
        panels.append(bars("Rows of each expert in this case", names, counts_E.astype(float), None))
    if not case.num_tokens:
        return panels
    found_TD = asked(judge, output_of_subject, case)
    t = _first_that_differs(trace.output_TD, found_TD) if token is None else token
    D = min(case.x_TD.shape[1], MOST_COLUMNS)
    found_D = None if found_TD is None else found_TD[t, :D]
    panels.append(bars(f"Token {t}: output of the layer", list(map(str, range(D))), trace.output_TD[t, :D], found_D))
    return [*panels, *of_router.picture(None, case.router_case, t)]


def _first_that_differs(wanted_TD: np.ndarray, found_TD: np.ndarray | None) -> int:
    if found_TD is None:
        return 0
    rows = np.flatnonzero(differing(wanted_TD, found_TD).any(axis=-1))
    return int(rows[0]) if len(rows) else 0
