"""moe_torch, collectives: how rows travel between ranks, with gradients; the same calls on NCCL and on gloo.

Every collective has as its gradient the one that carries gradients the other way, any number of times. Each rank of a
group makes the same calls in the same order, forward and backward, also with no row at all.

Legend: R rows sent, Q rows received, S ranks of the group.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_ref.specs.layout import ShardLayout


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Where this rank stands in a mesh, and how the layer lies over it."""

    mesh: DeviceMesh
    layout: ShardLayout
    groups: dict[str, dist.ProcessGroup]
    """By axis; an axis of one rank has none."""

    def rank(self, axis: str) -> int:
        """This rank's coordinate on an axis."""
        return self.groups[axis].rank() if axis in self.groups else 0

    def size(self, axis: str) -> int:
        """Ranks on an axis."""
        return self.groups[axis].size() if axis in self.groups else 1


class Sent(NamedTuple):
    """What this rank gave to one exchange."""

    what: str
    """rows, weights, ids or counts; a gradient is named after what it is the gradient of."""
    backward: bool
    group: dist.ProcessGroup
    rows_S: tuple[int, ...]
    """Rows for each rank of the group, itself included."""
    received_S: tuple[int, ...]
    """Rows from each rank of the group."""
    bytes_per_row: int


_RECORD: ContextVar[list[Sent] | None] = ContextVar("record", default=None)


@contextmanager
def recorded() -> Iterator[list[Sent]]:
    """Everything that this rank sends meanwhile, in the order of sending."""
    record: list[Sent] = []
    token = _RECORD.set(record)
    try:
        yield record
    finally:
        _RECORD.reset(token)


class Pending(NamedTuple):
    """Rows that are on their way."""

    rows: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """The rows, once they are there."""
        if self.work is not None:
            self.work.wait()
        return self.rows


def exchange(
    rows: Tensor, sizes: Sequence[int], received: Sequence[int], group: dist.ProcessGroup, what: str = "rows"
) -> Pending:
    """Sends the first sizes[0] rows to the first rank of the group, the next sizes[1] to the second, and so on.

    What arrives comes rank by rank, `received` rows of each. It is under way until `wait`.
    """
    works: list = []
    arrived = _Exchange.apply(rows, list(sizes), list(received), group, what, works, False)
    return Pending(arrived, works[0])


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, sizes, received, group, what, works, is_backward):
        ctx.call = sizes, received, group, what
        pending = _send(rows, sizes, received, group, what, backward=is_backward)
        works.append(pending.work)
        return pending.rows

    @staticmethod
    def backward(ctx, *grads):
        sizes, received, group, what = ctx.call
        works: list = []
        # An exchange again, so that it has a gradient too.
        returned = _Exchange.apply(grads[0], received, sizes, group, what, works, True)
        return Pending(returned, works[0]).wait(), *(None,) * 6


def _send(rows: Tensor, sizes, received, group, what: str, *, backward: bool) -> Pending:
    record = _RECORD.get()
    if record is not None:
        bytes_per_row = rows.shape[1:].numel() * rows.element_size()
        record.append(Sent(what, backward, group, tuple(sizes), tuple(received), bytes_per_row))
    if group.size() == 1:
        return Pending(rows.view_as(rows), None)
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    work = dist.all_to_all_single(arrived, rows.contiguous(), received, sizes, group=group, async_op=True)
    return Pending(arrived, work)


class Shared(NamedTuple):
    """Ranks that have the same tokens and each a part of the work: their partial outputs are summed.

    Megatron's pair f and g: `enter` is the identity and sums gradients, `leave` sums and is the identity backward.
    What enters is equal on these ranks, and so is what leaves; then so are all gradients outside of the region.
    """

    groups: tuple[dist.ProcessGroup, ...]

    def enter(self, value: Tensor) -> Tensor:
        """The same value; its gradient is the sum of what the ranks found."""
        return _Enter.apply(value, self.groups) if self.groups else value

    def leave(self, partial: Tensor) -> Tensor:
        """The sum of the parts, taken in float32 at least and rounded once."""
        return _Leave.apply(partial, self.groups) if self.groups else partial


NOT_SHARED = Shared(())
"""A rank that has its tokens, and its part of the work, to itself."""


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, groups):
        ctx.groups = groups
        return value.view_as(value)

    @staticmethod
    def backward(ctx, *grads):
        return _Leave.apply(grads[0], ctx.groups), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial, groups):
        ctx.groups = groups
        return _sum(partial, groups)

    @staticmethod
    def backward(ctx, *grads):
        return _Enter.apply(grads[0], ctx.groups), None


def _sum(value: Tensor, groups) -> Tensor:
    total = value.to(torch.promote_types(value.dtype, torch.float32), copy=True).contiguous()
    for group in groups:
        dist.all_reduce(total, group=group)
    return total.to(value.dtype)


def sum_in_place(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Each tensor := its sum over the ranks of the group; one collective for each dtype."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in alike])
        dist.all_reduce(flat, group=group)
        for tensor, total in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(total.view_as(tensor))


def gather(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> list[list[Tensor]]:
    """For each tensor that of every rank of the group, alike in shape and dtype on all; one collective."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    of_ranks = [torch.empty_like(flat) for _ in range(group.size())]
    dist.all_gather(of_ranks, flat, group=group)
    sizes = [tensor.numel() for tensor in tensors]
    parts = zip(*(of_rank.split(sizes) for of_rank in of_ranks), strict=True)
    return [[part.view(tensor.shape) for part in of_tensor] for tensor, of_tensor in zip(tensors, parts, strict=True)]
