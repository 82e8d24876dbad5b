"""moe_torch, permute -> dispatch -> (experts) -> combine, on one device: slots become rows sorted by expert.

Legend: T tokens, K top_k, D model dim, E choices (experts, then null experts), N = T * K slots and rows, A rows whose
experts have multiples of them.
A slot is one (token, k) pair with the flat number t * K + k. Nothing here reads the device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ref.specs.align import AlignSpec
from moe_ref.specs.ids import UNUSED
from moe_torch.kernels.choice import for_permutation
from moe_torch.kernels.sort_ops import sort_slots
from moe_torch.modes import transformed


@dataclass(frozen=True, kw_only=True)
class Permutation:
    """Which slot each row is, and back, and how many rows each choice has.

    Rows of expert 0 come first, then those of expert 1 and so on, each in the order of the tokens. Rows of null
    experts follow, then unused slots (id -1), so that the rows that experts work on are a prefix.
    """

    order_N: Tensor
    """The flat slot number of each row."""
    row_of_slot_N: Tensor
    """The inverse of order_N."""
    tokens_per_expert_E: Tensor
    has_expert_TK: Tensor
    """Whether each slot belongs to an expert, and not to a null expert or to none."""


@dataclass(frozen=True, kw_only=True)
class AlignedRows:
    """A permutation whose experts have multiples of rows; all but the slots' own are zeros and get no gradient."""

    slot_of_row_A: Tensor
    """The flat slot number of each row; -1 in padding rows, and past the last expert."""
    row_of_slot_N: Tensor
    """Its inverse; the last row, which is padding, for slots without an expert."""
    rows_per_expert_E: Tensor
    """Of the experts alone."""
    has_expert_TK: Tensor


class TokenDispatcher:
    """What a layer asks of its dispatcher. One that moves rows between ranks runs the experts in between itself."""

    align: AlignSpec | None = None

    def permute(self, expert_ids_TK: Tensor) -> Any:
        """Where each slot goes; the result has `tokens_per_expert_E`, the slots of each choice on this rank."""
        raise NotImplementedError

    def run(self, experts: Any, x_TD: Tensor, permutation: Any, weights_TK: Tensor, *, on_input: bool) -> Tensor:
        """dispatch, experts and combine; the weight is on the output, or on the input."""
        raise NotImplementedError


class LocalTokenDispatcher(TokenDispatcher):
    """Reorders tokens by expert, and combines their outputs; no parameters, no communication.

    Args:
        num_experts: experts that do work.
        num_choices: experts and null experts; None: no null experts.
        align: the experts see their rows padded up to a multiple; None: as they are. No value depends on it.
    """

    def __init__(self, num_experts: int, num_choices: int | None = None, align: AlignSpec | None = None):
        self.align = align
        self.num_experts = num_experts
        self.num_choices = num_experts if num_choices is None else num_choices
        if num_experts < 1:
            raise ValueError(f"num_experts is {num_experts}; it is at least 1")
        if self.num_choices < num_experts:
            raise ValueError(f"num_choices is {num_choices}; it is at least num_experts ({num_experts})")

    def permute(self, expert_ids_TK: Tensor) -> Permutation:
        """Rows are sorted by expert id, and stay in the order of the tokens within an expert."""
        unused_TK = (expert_ids_TK < 0) | (expert_ids_TK >= self.num_choices)
        has_expert_TK = ~unused_TK & (expert_ids_TK < self.num_experts)
        if not transformed() and for_permutation(expert_ids_TK.device.type, self.num_choices).way == "triton":
            order_N, row_of_slot_N, counts_E = sort_slots(expert_ids_TK, self.num_choices)
            return Permutation(
                order_N=order_N,
                row_of_slot_N=row_of_slot_N,
                tokens_per_expert_E=counts_E,
                has_expert_TK=has_expert_TK,
            )
        keys_N = expert_ids_TK.masked_fill(unused_TK, self.num_choices).flatten()
        sorted_keys_N, order_N = keys_N.sort(stable=True)
        # bincount would have to ask the device for its own length.
        choices_E = torch.arange(self.num_choices, device=keys_N.device, dtype=keys_N.dtype)
        if transformed():  # vmap has no rule for what is faster
            ends_E, row_of_slot_N = (sorted_keys_N[:, None] <= choices_E).sum(0), order_N.argsort()
        else:
            ends_E = torch.searchsorted(sorted_keys_N, choices_E, right=True)
            row_of_slot_N = torch.empty_like(order_N).scatter_(
                0, order_N, torch.arange(order_N.shape[0], device=order_N.device, dtype=order_N.dtype)
            )
        return Permutation(
            order_N=order_N,
            row_of_slot_N=row_of_slot_N,
            tokens_per_expert_E=torch.diff(ends_E, prepend=ends_E.new_zeros(1)),
            has_expert_TK=has_expert_TK,
        )

    def align_rows(self, permutation: Permutation, align: AlignSpec) -> AlignedRows:
        """Each expert has its rows rounded up to the multiple: its slots first, then sentinels. [PRM-10 .. PRM-12]

        `align.max_rows` of all slots is A, so that no shape depends on the choice.
        """
        counts_E, (N,) = permutation.tokens_per_expert_E[: self.num_experts], permutation.order_N.shape
        A, last = align.max_rows(N, self.num_experts), self.num_experts - 1
        blocks_E = torch.where(counts_E == 0, align.idle_blocks, -(-counts_E // align.multiple))
        rows_E = blocks_E * align.multiple
        ends_E, aligned_ends_E = counts_E.cumsum(0), rows_E.cumsum(0)
        starts_E, aligned_starts_E = ends_E - counts_E, aligned_ends_E - rows_E
        row_A = torch.arange(A, device=counts_E.device)
        if N == 0:
            slot_of_row_A, row_of_slot_N = torch.full_like(row_A, UNUSED), permutation.row_of_slot_N
        else:
            expert_A = torch.searchsorted(aligned_ends_E, row_A, right=True).clamp(max=last)
            place_A = row_A - aligned_starts_E[expert_A]
            is_slot_A = place_A < counts_E[expert_A]
            row_of_own_A = torch.where(is_slot_A, starts_E[expert_A] + place_A, 0)
            slot_of_row_A = torch.where(is_slot_A, permutation.order_N[row_of_own_A], UNUSED)
            expert_N = torch.searchsorted(ends_E, permutation.row_of_slot_N, right=True).clamp(max=last)
            shifted_N = permutation.row_of_slot_N + (aligned_starts_E - starts_E)[expert_N]
            row_of_slot_N = torch.where(permutation.has_expert_TK.flatten(), shifted_N, A - 1)
        return AlignedRows(
            slot_of_row_A=slot_of_row_A,
            row_of_slot_N=row_of_slot_N,
            rows_per_expert_E=rows_E,
            has_expert_TK=permutation.has_expert_TK,
        )

    def dispatch_aligned(self, x_TD: Tensor, aligned: AlignedRows, weights_TK: Tensor | None = None) -> Tensor:
        """As `dispatch`, and zeros in the rows that are no slot."""
        if not len(x_TD):
            # Zeros of this graph: over ranks the backward pass of a rank without rows is waited for.
            return torch.nn.functional.pad(x_TD, (0, 0, 0, len(aligned.slot_of_row_A)))
        rows_AD = _DispatchAligned.apply(x_TD, aligned.slot_of_row_A, aligned.row_of_slot_N, aligned.has_expert_TK)
        if weights_TK is None:
            return rows_AD
        weights_TK = torch.where(aligned.has_expert_TK, weights_TK, 0)
        weights_A = weights_TK.flatten().index_select(0, aligned.slot_of_row_A.clamp(min=0))
        # What a padding row gets as a gradient may be anything: it must not reach the weight of slot 0.
        weights_A = torch.where(aligned.slot_of_row_A < 0, 0, weights_A)
        return (rows_AD * weights_A[:, None]).to(x_TD.dtype)

    def combine_aligned(self, rows_AD: Tensor, aligned: AlignedRows, weights_TK: Tensor | None = None) -> Tensor:
        """As `combine`; what padding rows hold is not read, and their gradient is 0."""
        slots_TKD = _UnpermuteAligned.apply(
            rows_AD, aligned.slot_of_row_A, aligned.row_of_slot_N, aligned.has_expert_TK
        )
        return weighted_sum(slots_TKD, weights_TK)

    def dispatch(self, x_TD: Tensor, permutation: Permutation, weights_TK: Tensor | None = None) -> Tensor:
        """Row n is the token of slot order_N[n], times that slot's weight where weights are given."""
        order_N, has_expert_TK = permutation.order_N, permutation.has_expert_TK
        if transformed():
            rows_ND = x_TD.index_select(0, order_N // has_expert_TK.shape[1])
        else:
            rows_ND = _Dispatch.apply(x_TD, order_N, permutation.row_of_slot_N, has_expert_TK)
        if weights_TK is None:
            return rows_ND
        # Rows past the experts may get any gradient; it must not reach a weight.
        weights_TK = torch.where(has_expert_TK, weights_TK, 0)
        weights_N = weights_TK.flatten().index_select(0, order_N)
        return (rows_ND * weights_N[:, None]).to(x_TD.dtype)

    def unpermute(self, rows_ND: Tensor, permutation: Permutation) -> Tensor:
        """Each row returns to its slot, (T, K, D); a slot without an expert is 0, whatever its row holds."""
        if transformed():
            return _fill_slots(rows_ND, permutation.row_of_slot_N, permutation.has_expert_TK)
        return _Unpermute.apply(rows_ND, permutation.order_N, permutation.row_of_slot_N, permutation.has_expert_TK)

    def combine(self, rows_ND: Tensor, permutation: Permutation, weights_TK: Tensor | None = None) -> Tensor:
        """A token's output is the weighted sum of its slots, k = 0 .. K-1 in this order, rounded once.

        The order is part of the result: it does not depend on how experts are numbered, placed or scheduled.
        """
        return weighted_sum(self.unpermute(rows_ND, permutation), weights_TK)


def weighted_sum(slots_TKD: Tensor, weights_TK: Tensor | None) -> Tensor:
    """sum over k of weight * slot, in slot order, in float32 at least; without weights the plain sum."""
    dtype = torch.promote_types(slots_TKD.dtype, torch.float32)
    # unbind, not [:, k]: the gradient of each index would be as large as all slots.
    slots = slots_TKD.unbind(1)
    weights = [None] * len(slots) if weights_TK is None else weights_TK.to(dtype).unbind(1)
    total_TD = slots_TKD.new_zeros(slots_TKD.shape[0], slots_TKD.shape[2], dtype=dtype)
    for slot_TD, weight_T in zip(slots, weights, strict=True):
        total_TD = total_TD + (slot_TD if weight_T is None else slot_TD * weight_T[:, None])
    return total_TD.to(slots_TKD.dtype)


# Both moves are gathers by a permutation, and so are their gradients. Left to autograd they would be scattered adds,
# which on CUDA are slower and, for repeated tokens, differ from run to run (pytorch/torchtitan#3336).


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(x_TD, order_N, row_of_slot_N, has_expert_TK):
        return x_TD.index_select(0, order_N // has_expert_TK.shape[1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx, *grads):
        row_of_slot_N, has_expert_TK = ctx.saved_tensors
        return _fill_slots(grads[0], row_of_slot_N, has_expert_TK).sum(1), None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(rows_ND, order_N, row_of_slot_N, has_expert_TK):
        return _fill_slots(rows_ND, row_of_slot_N, has_expert_TK)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, *grads):
        (order_N,) = ctx.saved_tensors
        # reshape, not flatten: vmap over a gradient (`is_grads_batched`) has no rule for that.
        return grads[0].reshape(-1, grads[0].shape[2]).index_select(0, order_N), None, None, None


class _DispatchAligned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, slot_of_row_A, row_of_slot_N, has_expert_TK):
        ctx.save_for_backward(row_of_slot_N, has_expert_TK)
        return _rows_of(x_TD, slot_of_row_A, has_expert_TK.shape[1])

    @staticmethod
    def backward(ctx, *grads):
        return _fill_slots(grads[0], *ctx.saved_tensors).sum(1), None, None, None


class _UnpermuteAligned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_AD, slot_of_row_A, row_of_slot_N, has_expert_TK):
        ctx.save_for_backward(slot_of_row_A)
        if not has_expert_TK.numel():
            return rows_AD.new_zeros(*has_expert_TK.shape, rows_AD.shape[1])
        return _fill_slots(rows_AD, row_of_slot_N, has_expert_TK)

    @staticmethod
    def backward(ctx, *grads):
        (slot_of_row_A,) = ctx.saved_tensors
        if not grads[0].numel():
            return grads[0].new_zeros(len(slot_of_row_A), grads[0].shape[2]), None, None, None
        return _rows_of(grads[0].reshape(-1, grads[0].shape[2]), slot_of_row_A, 1), None, None, None


def _rows_of(values: Tensor, slot_of_row_A: Tensor, slots_of_value: int) -> Tensor:
    """The value of each row's slot, 0 in a padding row."""
    rows = values.index_select(0, slot_of_row_A.clamp(min=0) // slots_of_value)
    return rows.masked_fill((slot_of_row_A < 0)[:, None], 0)


def _fill_slots(rows_ND: Tensor, row_of_slot_N: Tensor, has_expert_TK: Tensor) -> Tensor:
    slots_TKD = rows_ND.index_select(0, row_of_slot_N).view(*has_expert_TK.shape, rows_ND.shape[1])
    # A grouped matmul leaves rows past the last group unwritten, and 0 * NaN is NaN: replaced, not multiplied.
    return torch.where(has_expert_TK[:, :, None], slots_TKD, 0)
