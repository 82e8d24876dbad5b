"""moe_ref, align: the rows of each expert are padded up to a multiple, and come back as they were.

    permute -> dispatch -> pad_rows -> experts -> unpad_rows -> unpermute

Legend: N rows, A aligned rows, E experts. A row of either may have any shape; `...` stands for it.
"""

from dataclasses import dataclass, replace

import numpy as np

from moe_ref.experts import FeedForwardTrace, run_experts
from moe_ref.permute import Permutation
from moe_ref.specs.align import AlignSpec
from moe_ref.specs.ids import UNUSED
from moe_ref.specs.layer import ExpertSpec
from moe_ref.specs.params import LayerParams


@dataclass(frozen=True, kw_only=True)
class AlignedRows:
    """Which slot each aligned row is, and how many each expert has."""

    slot_of_row_A: np.ndarray
    """The flat number of each row's slot; -1, the sentinel, in a padding row, which is no slot."""
    rows_per_expert_E: np.ndarray
    """Multiples, whose sum is A."""


def align_rows(permutation: Permutation, spec: AlignSpec) -> AlignedRows:
    """Each expert has its rows rounded up to the multiple: its slots first, then sentinels. [PRM-10 .. PRM-12]"""
    counts_E = permutation.tokens_per_expert_E
    blocks_E = -(-counts_E // spec.multiple)
    aligned_E = np.where(counts_E == 0, spec.idle_blocks, blocks_E) * spec.multiple
    slot_of_row_A = np.full(aligned_E.sum(), UNUSED, dtype=np.int64)
    first, first_aligned = 0, 0
    for count, aligned in zip(counts_E, aligned_E, strict=True):
        slot_of_row_A[first_aligned : first_aligned + count] = permutation.order_N[first : first + count]
        first, first_aligned = first + count, first_aligned + aligned
    return AlignedRows(slot_of_row_A=slot_of_row_A, rows_per_expert_E=aligned_E)


def pad_rows(rows_N: np.ndarray, aligned: AlignedRows) -> np.ndarray:
    """(A, ...): the (N, ...) rows at their aligned places, and zeros in padding rows."""
    padded_A = np.zeros((len(aligned.slot_of_row_A), *rows_N.shape[1:]), rows_N.dtype)
    padded_A[aligned.slot_of_row_A != UNUSED] = rows_N
    return padded_A


def unpad_rows(rows_A: np.ndarray, aligned: AlignedRows) -> np.ndarray:
    """(N, ...): the inverse of `pad_rows`; whatever padding rows hold is gone."""
    return rows_A[aligned.slot_of_row_A != UNUSED]


def run_aligned(
    rows_ND: np.ndarray, permutation: Permutation, params: LayerParams, spec: ExpertSpec, how: AlignSpec
) -> FeedForwardTrace:
    """`run_experts` on aligned rows; the trace has the N rows alone, so that no gradient is of padding. [LAY-22]"""
    aligned = align_rows(permutation, how)
    trace = run_experts(pad_rows(rows_ND, aligned), aligned.rows_per_expert_E, params, spec)
    made = {name: value for name, value in vars(trace).items() if value is not None}
    return replace(trace, **{name: unpad_rows(value, aligned) for name, value in made.items()})
