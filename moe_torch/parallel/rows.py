"""moe_torch, rows of tokens: a row is a copy of a token, a token is a sum of rows, each the gradient of the other.

A token is copied into a segment at most once. Segment by segment, no two rows are added to the same place, and the sum
has one order: that of the segments. A scattered add of all rows would have none on CUDA (pytorch/torchtitan#3336).

Legend: T tokens, D model dim, R rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Which token each row is of, and in which order the rows of a token are added."""

    token_R: Tensor
    order_R: Tensor | None
    """The rows in the order of their segments; None: they are in it."""
    sizes: list[int]
    """Rows of each segment."""
    num_tokens: int

    def copies(self, x_TD: Tensor) -> Tensor:
        """Row r is the token token_R[r]."""
        return _Copies.apply(x_TD, self)

    def sums(self, rows_RD: Tensor) -> Tensor:
        """A token is the sum of its rows, 0 without any; added in float32 at least and rounded once."""
        return _Sums.apply(rows_RD, self)


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, rows):
        ctx.rows = rows
        return x_TD.index_select(0, rows.token_R)

    @staticmethod
    def backward(ctx, *grads):
        return _Sums.apply(grads[0], ctx.rows), None


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD, rows):
        ctx.rows = rows
        return _sums(rows_RD, rows)

    @staticmethod
    def backward(ctx, *grads):
        return _Copies.apply(grads[0], ctx.rows), None


def _sums(rows_RD: Tensor, rows: Rows) -> Tensor:
    dtype = torch.promote_types(rows_RD.dtype, torch.float32)
    total_TD = rows_RD.new_zeros(rows.num_tokens, rows_RD.shape[1], dtype=dtype)
    if rows.order_R is None:
        segments = zip(rows_RD.split(rows.sizes), rows.token_R.split(rows.sizes), strict=True)
    else:
        orders = rows.order_R.split(rows.sizes)
        segments = ((rows_RD.index_select(0, own_R), rows.token_R.index_select(0, own_R)) for own_R in orders)
    for own_RD, token_R in segments:
        total_TD.index_add_(0, token_R, own_RD.to(dtype))
    return total_TD.to(rows_RD.dtype)
