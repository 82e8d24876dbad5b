"""moe_ref, permute: slots become rows sorted by expert, and come back as slots.

A slot is one (token, k) pair; slot (t, k) has the flat number t * K + k. A row is a slot that an expert works on.

Legend: T tokens, K top_k, D model dim, E experts, N rows.
"""

from dataclasses import dataclass

import numpy as np

from moe_ref.specs.checks import array, integer


@dataclass(frozen=True, kw_only=True)
class Permutation:
    """Which slot each row is, and how many rows each expert has."""

    order_N: np.ndarray
    """The flat number of each row's slot: rows of expert 0 first, and each expert's in the order of the tokens."""
    token_of_row_N: np.ndarray
    slot_of_row_N: np.ndarray
    """The k of each row's slot."""
    expert_of_row_N: np.ndarray
    tokens_per_expert_E: np.ndarray


def permute(expert_ids_TK: np.ndarray, num_experts: int) -> Permutation:
    """Rows are sorted by expert id, and stay in the order of the tokens within an expert. [PRM-2 .. PRM-6]

    Unused slots (-1) and null experts (num_experts and above) are no rows, so N may be less than T * K.
    """
    integer("num_experts", num_experts, 1)
    ids_TK = array("expert_ids_TK", expert_ids_TK, (None, None), kind="int")
    flat_ids = ids_TK.reshape(-1)
    by_expert = np.argsort(flat_ids, kind="stable")
    has_expert = (flat_ids[by_expert] >= 0) & (flat_ids[by_expert] < num_experts)
    order_N = by_expert[has_expert]
    return Permutation(
        order_N=order_N,
        token_of_row_N=order_N // ids_TK.shape[1],
        slot_of_row_N=order_N % ids_TK.shape[1],
        expert_of_row_N=flat_ids[order_N],
        tokens_per_expert_E=np.bincount(flat_ids[order_N], minlength=num_experts),
    )


def dispatch(slot_inputs_TKD: np.ndarray, order_N: np.ndarray) -> np.ndarray:
    """A row is the input of its slot."""
    T, K, D = slot_inputs_TKD.shape
    return slot_inputs_TKD.reshape(T * K, D)[order_N]


def unpermute(rows_ND: np.ndarray, order_N: np.ndarray, top_k: int, num_tokens: int) -> np.ndarray:
    """Each row returns to its slot; a slot that is no row is 0. [CMB-3]"""
    slots = np.zeros((num_tokens * top_k, rows_ND.shape[1]), rows_ND.dtype)
    slots[order_N] = rows_ND
    return slots.reshape(num_tokens, top_k, rows_ND.shape[1])
