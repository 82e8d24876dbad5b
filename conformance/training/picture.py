"""conformance, training: the picture of a failure. Counts and biases after the event where they go apart."""

import numpy as np

from conformance.core.judge import Judge
from conformance.core.picture import MOST_COLUMNS, Panel, asked, bars, differing
from conformance.training.case import TrainingCase
from conformance.training.verdicts import name_of, states_of_subject
from moe_ref import TrainingState

MOST_LAYERS = 4


def picture(judge: Judge | None, case: TrainingCase) -> list[Panel]:
    """The state after the first event after which the two differ; after the last one where they do not.

    Args:
        judge: None where the subject is not called again.
    """
    found = asked(judge, states_of_subject, case)
    number = _first_that_differs(case.states, found)
    event, wanted = case.events[number], case.states[number]
    panels: list[Panel] = []
    for layer, (counts_E, bias_E) in enumerate(zip(wanted.counts_by_layer, wanted.bias_by_layer, strict=True)):
        if layer < MOST_LAYERS and len(counts_E) <= MOST_COLUMNS:
            names = list(map(str, range(len(counts_E))))
            where = f"layer {layer}, after event {number}: {name_of(event)}"
            own = None if found is None else found[number]
            for what, values_E, of in (("Counts", counts_E, "counts_by_layer"), ("Bias", bias_E, "bias_by_layer")):
                found_E = None if own is None else np.asarray(getattr(own, of)[layer], dtype=np.float64)
                panels.append(bars(f"{what} of {where}", names, values_E.astype(np.float64), found_E))
    return panels


def _first_that_differs(wanted: list[TrainingState], found: list[TrainingState] | None) -> int:
    for number, (own, other) in enumerate(zip(wanted, found or (), strict=False)):
        pairs = zip([*own.counts_by_layer, *own.bias_by_layer], [*other.counts_by_layer, *other.bias_by_layer],
                    strict=True)  # fmt: skip
        if any(differing(a.astype(np.float64), np.asarray(b, np.float64)).any() for a, b in pairs):
            return number
    return len(wanted) - 1
