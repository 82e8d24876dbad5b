"""moe_torch, kernels: a stable counting sort of slots by expert, in two launches.

A key is the id of a slot's choice; of a slot that has none it is C, so that those come last, and past the last slot
C + 1. A block of slots is counted by one program of the first kernel, and put in place by one of the second.

Legend: N slots, C choices, B blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_torch.kernels.jit import jit


@jit
def keys_of(ids_N, slot, num_slots, num_choices):
    """The key of each slot."""
    ids = tl.load(ids_N + slot, mask=slot < num_slots, other=-1)
    used = (ids >= 0) & (ids < num_choices)
    return tl.where(slot < num_slots, tl.where(used, ids, num_choices), num_choices + 1).to(tl.int32)


@jit(do_not_specialize=["num_slots"])
def count_kernel(ids_N, counts_BC, num_slots, num_choices, BLOCK: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr):
    """counts[b] is the histogram of the keys of block b; KEYS is a power of two of at least C + 2."""
    block = tl.program_id(0)
    total = tl.zeros((KEYS,), tl.int32)
    for first in range(0, BLOCK, PART):
        total += tl.histogram(keys_of(ids_N, block * BLOCK + first + tl.arange(0, PART), num_slots, num_choices), KEYS)
    tl.store(counts_BC + block * KEYS + tl.arange(0, KEYS), total)


@jit(do_not_specialize=["num_slots", "num_blocks"])
def place_kernel(
    ids_N, counts_BC, order_N, row_of_slot_N, counts_C, num_slots, num_choices, num_blocks,
    BLOCK: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """order[row] = slot and row_of_slot[slot] = row; counts_C is the sum over blocks.

    A slot's row is: slots of smaller keys, plus slots of its key in blocks before, plus those before it in its own.
    """
    block = tl.program_id(0)
    key = tl.arange(0, KEYS)
    total = tl.zeros((KEYS,), tl.int32)
    before = tl.zeros((KEYS,), tl.int32)
    for start in range(0, num_blocks, AT_ONCE):
        other = start + tl.arange(0, AT_ONCE)
        counts = tl.load(counts_BC + other[:, None] * KEYS + key[None, :], mask=(other < num_blocks)[:, None], other=0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where((other < block)[:, None], counts, 0), 0)
    if block == 0:
        tl.store(counts_C + key, total.to(tl.int64), mask=key < num_choices)
    next_row = tl.cumsum(total, 0) - total + before
    for first in range(0, BLOCK, PART):
        i = tl.arange(0, PART)
        slot = block * BLOCK + first + i
        keys = keys_of(ids_N, slot, num_slots, num_choices)
        equal_before = (keys[:, None] == keys[None, :]) & (i[None, :] < i[:, None])
        row = tl.gather(next_row, keys, 0) + tl.sum(equal_before.to(tl.int32), 1)
        tl.store(order_N + row, slot.to(tl.int64), mask=slot < num_slots)
        tl.store(row_of_slot_N + slot, row.to(tl.int64), mask=slot < num_slots)
        next_row += tl.histogram(keys, KEYS)


PART, MOST_BLOCKS = 128, 256
"""Slots that are compared with each other at a time, and blocks at most: each program adds up the counts of all."""


def sort(ids_N: Tensor, num_choices: int, order_N: Tensor, row_of_slot_N: Tensor, counts_C: Tensor) -> None:
    """The permutation of ids, in place."""
    N = len(ids_N)
    block = max(4 * PART, triton.next_power_of_2(triton.cdiv(N, MOST_BLOCKS)))
    blocks, keys = triton.cdiv(N, block), max(64, triton.next_power_of_2(num_choices + 2))
    counts_BC = torch.empty(blocks, keys, dtype=torch.int32, device=ids_N.device)
    how = {"num_warps": 4, "enable_fp_fusion": True}
    count_kernel[(blocks,)](ids_N, counts_BC, N, num_choices, BLOCK=block, PART=PART, KEYS=keys, **how)
    place_kernel[(blocks,)](
        ids_N, counts_BC, order_N, row_of_slot_N, counts_C, N, num_choices, blocks,
        BLOCK=block, PART=PART, KEYS=keys, AT_ONCE=max(1, 4096 // keys), **how,
    )  # fmt: skip
