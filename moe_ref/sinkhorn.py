"""moe_ref, sinkhorn: a choice that is evened over the whole batch.

The matrix exp(logits) is scaled, rows and columns in turn, until each token has a share of 1 / T and each expert one
of 1 / E. A token takes the experts with the largest entries of its row. A row's own factor ranks nothing, so what is
ranked is the logit plus the logarithm of the expert's factor.

Source: S-BASE (arXiv:2202.01169); loop, tolerance and epsilon as `sinkhorn` of NVIDIA/Megatron-LM (core,
transformer/moe/moe_utils.py). Two things differ where that one fails: rows are shifted by their largest logit before
exp (which overflows there from 89), and there are at most `MOST_ROUNDS` rounds (float32 may never come within the
tolerance).

Legend: T tokens, E choices.
"""

import numpy as np

EPS = 1e-8
"""Added to each sum that is divided by."""
TOLERANCE = 1e-4
"""It ends where the experts' factors move by at most this in the mean."""
MOST_ROUNDS = 100


def sinkhorn(logits_TE: np.ndarray, valid_T1: np.ndarray, *, tolerance: float = TOLERANCE) -> np.ndarray:
    """(E,) logarithms of the experts' factors; padding tokens take no part in the batch. [SEL-19, SEL-20]"""
    E = logits_TE.shape[1]
    largest_T1 = logits_TE.max(axis=-1, keepdims=True, initial=-np.inf)
    exp_TE = np.exp(logits_TE - np.where(np.isneginf(largest_T1), 0, largest_T1))
    share_TE = np.where(valid_T1, exp_TE, 0)
    tokens = max(int(valid_T1.sum()), 1)
    factors_E = np.ones(E, logits_TE.dtype)
    for _ in range(MOST_ROUNDS):
        factors_T1 = 1 / (tokens * ((share_TE * factors_E).sum(axis=-1, keepdims=True) + EPS))
        before_E, factors_E = factors_E, 1 / (E * ((share_TE * factors_T1).sum(axis=0) + EPS))
        if np.abs(factors_E - before_E).mean() <= tolerance:
            break
    return np.log(factors_E).astype(logits_TE.dtype)
