"""moe_ref, strategies: the traffic of collectives that go round the ring of ranks.

Gathering and reducing go round the ring, as on a TPU or with the ring algorithm of NCCL: a rank sends to the next one
alone, and passes on what it got.

Legend: S ranks of a rank group.
"""

import numpy as np


def gathered(tokens_S: np.ndarray) -> np.ndarray:
    """(S, S) rows of an all-gather: of all tokens a rank sends on all but those that the next one began with."""
    return _around(tokens_S.sum() - np.roll(tokens_S, -1))


def reduced(tokens_S: np.ndarray) -> np.ndarray:
    """(S, S) rows of a reduce-scatter: of all tokens a rank sends on all but its own, whose sum ends there."""
    return _around(tokens_S.sum() - tokens_S)


def _around(sent_S: np.ndarray) -> np.ndarray:
    """What each rank sends to the next, as links. One rank sends nothing."""
    S = len(sent_S)
    rows_SS = np.zeros((S, S), np.int64)
    if S > 1:
        rows_SS[np.arange(S), np.roll(np.arange(S), -1)] = sent_S
    return rows_SS
