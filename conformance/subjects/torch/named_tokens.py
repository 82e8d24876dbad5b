"""conformance, what the subjects of PyTorch share: the plan of a dispatcher, seen by tokens that name themselves.

A dispatcher moves rows and need not say where each comes from. So each token is (source rank, its number), and what
arrives says it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from conformance.subjects.torch.arrays import to_numpy


def named_tokens(num_tokens: int, e: int) -> torch.Tensor:
    """The (T, 2) tokens of expert rank e."""
    return torch.stack([torch.full((num_tokens,), float(e)), torch.arange(num_tokens).float()], dim=1)


def plan_of_rows(
    rows_R2: torch.Tensor, sizes_e: Any, sends_S: Any, recvs_S: Any, *, e: int, ids_by_source: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """What `Subject.dispatch` returns of expert rank e.

    Args:
        rows_R2: the named tokens that arrived, in the order of this rank's experts.
        sizes_e: how many for each of its experts.
        sends_S: rows to each expert rank; recvs_S: from each.
        ids_by_source: (T, K) expert ids of each expert rank's tokens; a token has an expert in one slot at most.
    """
    sizes_e = to_numpy(sizes_e)
    experts_R = np.repeat(e * len(sizes_e) + np.arange(len(sizes_e)), sizes_e)
    order = []
    for (source, token), expert in zip(to_numpy(rows_R2).astype(int).tolist(), experts_R.tolist(), strict=True):
        slots_K = np.asarray(ids_by_source[source][token]).tolist()
        order.append((source, token * len(slots_K) + slots_K.index(expert)))
    return {
        "send_sizes_S": np.array(sends_S, np.int64),
        "recv_sizes_S": np.array(recvs_S, np.int64),
        "group_sizes_e": sizes_e,
        "order_R2": np.array(order, np.int64).reshape(-1, 2),
    }
