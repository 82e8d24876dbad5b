"""conformance, identify: the band of sparsemixer, whose width is searched for.

Legend: T tokens, C columns, K top_k.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from conformance.identify.box import Question
from conformance.identify.choice import Guess
from conformance.identify.law import near_numbers
from moe_ref import RouterSpec


def sparsemixer(
    ask: Callable[..., Question | None], columns: int, first: Question, sizes: dict[str, Any]
) -> Guess | None:
    """A band below the best expert, whose width is searched for; None where nothing is banded."""
    C = columns

    def pair(gaps: np.ndarray) -> np.ndarray:
        """(T,) whether the second best counts beside the best, which is 1."""
        logits_TC = np.tile(-50.0 - 40.0 * np.arange(C), (len(gaps), 1)).astype(np.float64)
        logits_TC[:, 0], logits_TC[:, 1] = 1.0, 1.0 - gaps
        question = ask(logits_TC, plain=True)
        if question is None or len(question.logits_TC) != len(gaps):
            return np.zeros(0, bool)
        best_TK = question.expert_ids_TK == 0
        weights_T = np.where(best_TK, question.weights_TK, 0).sum(axis=-1)
        return weights_T < 0.9 * weights_T.max(initial=0)

    gaps, inside = np.geomspace(1e-4, 0.95, 60), np.zeros(0, bool)
    for _ in range(3):
        inside = pair(gaps)
        if not (len(inside) and inside[0] and not inside[-1]):
            return None
        at = int(np.argmin(inside))
        gaps = np.linspace(gaps[at - 1], gaps[at], 60)
    measured = float(gaps.mean()) / 2
    scale = float(np.median(first.weights_TK.max(axis=-1)))
    nice = [round(measured, n) for n in (2, 3, 4, 5) if abs(round(measured, n) / measured - 1) < 2e-3]
    scales = near_numbers("route_scale", scale, 1e-3)
    banded = {"selector": "sparsemixer", "select_by": "logit", "mixer_eps": [*nice, measured][0]}
    spec = RouterSpec.from_dict(sizes | banded | {"route_scale": [*scales, scale][0]})
    return Guess(spec=spec, bias_used=False)
