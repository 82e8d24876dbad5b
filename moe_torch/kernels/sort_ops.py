"""moe_torch, kernels: the permutation as a custom operator.

Legend: T tokens, K top_k, C choices, N = T * K slots.
"""

import torch
from torch import Tensor

from moe_torch.kernels.device import on_its_device


@torch.library.custom_op("moe_torch::sort_slots", mutates_args=())
@on_its_device
def sort_slots(expert_ids_TK: Tensor, num_choices: int) -> tuple[Tensor, Tensor, Tensor]:
    """order_N, its inverse row_of_slot_N, and counts_C: slots by choice, in the order of tokens within one.

    A slot whose id is not in 0 .. C-1 comes last. All in int64.
    """
    from moe_torch.kernels.sort import sort

    ids_N = expert_ids_TK.flatten().contiguous()
    order_N = torch.empty(len(ids_N), dtype=torch.int64, device=ids_N.device)
    row_of_slot_N, counts_C = torch.empty_like(order_N), order_N.new_zeros(num_choices)
    if len(ids_N):
        sort(ids_N, num_choices, order_N, row_of_slot_N, counts_C)
    return order_N, row_of_slot_N, counts_C


@sort_slots.register_fake
def _(expert_ids_TK, num_choices):
    order_N = expert_ids_TK.new_empty(expert_ids_TK.numel(), dtype=torch.int64)
    return order_N, torch.empty_like(order_N), expert_ids_TK.new_empty(num_choices, dtype=torch.int64)
