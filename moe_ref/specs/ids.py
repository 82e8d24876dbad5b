"""moe_ref, the expert ids: which integers they are, and what an unused slot has.

Legend: T tokens, K top_k.
"""

import numpy as np

from moe_ref.specs.checks import array, entries, require

UNUSED = -1
"""The expert id of an unused slot: a padding token, or a slot that a replay leaves empty."""


def ids_array(
    field: str, value: np.ndarray | None, shape: tuple[int | None, ...], bound: int, *, low: int = 0
) -> np.ndarray:
    """Integer ids in [low, bound); the used ids of a row of experts are distinct."""
    require(value is not None, f"{field} is None; the selector needs it")
    ids = array(field, value, shape, kind="int").astype(np.int64)
    entries(field, ids, (ids >= low) & (ids < bound), f"ids are between {low} and {bound - 1}")
    if ids.ndim == 2:
        in_order = np.sort(ids, axis=-1)
        twice = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] != UNUSED)
        entries(field, ids, ~twice.any(axis=-1), "the experts of a token are distinct")
    return ids
