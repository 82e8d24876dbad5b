"""moe_torch, dispatch over nodes: a token crosses to a node once, however many of its experts live there.

    rank (node m, position l) --across--> (node m', position l) --inside--> (node m', position of the expert)

The first exchange sends whole tokens, each to the rank of its own position on every node that has experts of it; its
expert ids and weights go along. There the token is one of that rank's own, and an exchange inside the node does the
rest (`AllToAllTokenDispatcher`). What comes back over the node boundary is one row again: the weighted sum of the slots
of that node. This is what makes node-limited routing (arXiv:2412.19437) pay.

Legend: T tokens, K top_k, D model dim, M nodes, R tokens sent across, Q tokens that land here.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_torch.parallel_collectives import exchange
from moe_torch.parallel_dispatch import AllToAllTokenDispatcher, ParallelTokenDispatcher


class Crossing(NamedTuple):
    """Which tokens one chunk sends across; to_M and from_M count this rank's own node too."""

    token_R: Tensor
    """For node 0, then for node 1, and so on; ascending for each."""
    to_M: list[int]
    from_M: list[int]


class NodeDedupTokenDispatcher(ParallelTokenDispatcher):
    """Two exchanges there, two back; a token's sum is over the slots of each node in order, then over the nodes.

    Args:
        across: the ranks of the expert axis with this rank's position on their nodes, in the order of the nodes.
        inside: the ranks of this rank's node.
    """

    def __init__(
        self,
        num_experts: int,
        num_choices: int,
        group: dist.ProcessGroup,
        *,
        across: dist.ProcessGroup,
        inside: dist.ProcessGroup,
        **options,
    ):
        super().__init__(num_experts, num_choices, group, **options)
        self.across = across
        self.experts_per_node = self.experts_per_rank * inside.size()
        self.inside = AllToAllTokenDispatcher(self.experts_per_node, self.experts_per_node, inside)

    def permute_places(self, places_TK):
        return places_TK

    def run_chunks(self, experts, xs, permutations, weights, on_input):
        return [
            self.run_chunk(experts, x_TD, places_TK, weights_TK, on_input)
            for x_TD, places_TK, weights_TK in zip(xs, permutations, weights, strict=True)
        ]

    def run_chunk(self, experts, x_TD: Tensor, places_TK: Tensor, weights_TK: Tensor, on_input: bool) -> Tensor:
        """One chunk: across, inside, and back."""
        crossing = self.plan(places_TK)
        arriving = [
            exchange(sent_R, crossing.to_M, crossing.from_M, self.across, what)
            for what, sent_R in (
                ("rows", _FanOut.apply(x_TD, crossing.token_R, crossing.to_M)),
                ("weights", _FanOut.apply(weights_TK, crossing.token_R, crossing.to_M)),
                ("ids", places_TK.to(torch.int32).index_select(0, crossing.token_R)),
            )
        ]
        x_QD, weights_QK, places_QK = (pending.wait() for pending in arriving)
        first = self.across.rank() * self.experts_per_node
        is_here_QK = (places_QK >= first) & (places_QK < first + self.experts_per_node)
        ids_QK = (places_QK.long() - first).masked_fill(~is_here_QK, -1)
        sums_QD = self.inside.run(experts, x_QD, self.inside.permute(ids_QK), weights_QK, on_input=on_input)
        sums_RD = exchange(sums_QD, crossing.from_M, crossing.to_M, self.across).wait()
        return _FanIn.apply(sums_RD, crossing.token_R, crossing.to_M, len(x_TD))

    def plan(self, places_TK: Tensor) -> Crossing:
        """The tokens that go to each node, and how many come from each."""
        M = self.across.size()
        has_expert_TK = (places_TK >= 0) & (places_TK < self.num_experts)
        nodes_TK = (places_TK // self.experts_per_node).where(has_expert_TK, M)
        goes_TM = torch.zeros(len(places_TK), M + 1, dtype=torch.bool, device=places_TK.device)
        goes_MT = goes_TM.scatter_(1, nodes_TK, True)[:, :M].t()
        to_M = goes_MT.sum(1)
        from_M = exchange(to_M[:, None].contiguous(), [1] * M, [1] * M, self.across, "counts").wait()[:, 0]
        sizes_2M = torch.stack([to_M, from_M]).tolist()
        return Crossing(goes_MT.nonzero()[:, 1], *sizes_2M)


# A token goes to a node at most once: node by node, no two rows are added to the same place, and the sum has one order.
# A scattered add of all rows would have none on CUDA (pytorch/torchtitan#3336).


class _FanOut(torch.autograd.Function):
    """Row r is the token token_R[r]."""

    @staticmethod
    def forward(ctx, x_TD, token_R, sizes):
        ctx.save_for_backward(token_R)
        ctx.sizes, ctx.num_tokens = sizes, len(x_TD)
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx, *grads):
        (token_R,) = ctx.saved_tensors
        return _sum_of_segments(grads[0], token_R, ctx.sizes, ctx.num_tokens), None, None


class _FanIn(torch.autograd.Function):
    """A token is the sum of the rows that went out for it."""

    @staticmethod
    def forward(ctx, rows_RD, token_R, sizes, num_tokens):
        ctx.save_for_backward(token_R)
        return _sum_of_segments(rows_RD, token_R, sizes, num_tokens)

    @staticmethod
    def backward(ctx, *grads):
        (token_R,) = ctx.saved_tensors
        return grads[0].index_select(0, token_R), None, None, None


def _sum_of_segments(rows_RD: Tensor, token_R: Tensor, sizes: list[int], num_tokens: int) -> Tensor:
    dtype = torch.promote_types(rows_RD.dtype, torch.float32)
    total_TD = rows_RD.new_zeros(num_tokens, rows_RD.shape[1], dtype=dtype)
    for rows, tokens in zip(rows_RD.split(sizes), token_R.split(sizes), strict=True):
        total_TD.index_add_(0, tokens, rows.to(dtype))
    return total_TD.to(rows_RD.dtype)
