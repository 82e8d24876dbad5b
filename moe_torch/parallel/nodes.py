"""moe_torch, dispatch over nodes: a token crosses to a node once, however many of its experts live there.

    rank (node m, position l) --across--> (node m', position l) --inside--> (node m', position of the expert)

The first exchange sends whole tokens, each to the rank of its own position on every node that has experts of it; its
expert ids and weights go along. There the token is one of that rank's own, and an exchange inside the node does the
rest (`AllToAllTokenDispatcher`). What comes back over the node boundary is one row again: the weighted sum of the slots
of that node. This is what makes node-limited routing (arXiv:2412.19437) pay.

Legend: T tokens, K top_k, D model dim, M nodes, R tokens sent across, Q tokens that land here.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_ref.specs.checks import require
from moe_torch.experts import GroupedExperts
from moe_torch.parallel.collectives import Parallel, exchange
from moe_torch.parallel.dispatch import AllToAllTokenDispatcher, ParallelTokenDispatcher
from moe_torch.parallel.rows import Rows


class Crossing(NamedTuple):
    """Which tokens one chunk sends across; to_M and from_M count this rank's own node too."""

    rows: Rows
    """For node 0, then for node 1, and so on, which are the segments; ascending for each."""
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
        self.inside = AllToAllTokenDispatcher(self.experts_per_node, self.experts_per_node, inside, align=self.align)

    @classmethod
    def further_groups(cls, parallel: Parallel) -> dict[str, dist.ProcessGroup]:
        """The ranks across nodes, and those inside this one."""
        nodes = mesh_of_nodes(parallel.mesh, parallel.layout.node_size)
        return {"across": nodes.get_group("node"), "inside": nodes.get_group("position")}

    def permute_places(self, places_TK: Tensor) -> Tensor:
        return places_TK

    def run_chunks(
        self,
        experts: GroupedExperts,
        xs: Sequence[Tensor],
        permutations: Sequence[Tensor],
        weights: Sequence[Tensor],
        on_input: bool,
    ) -> list[Tensor]:
        return [
            self.run_chunk(experts, x_TD, places_TK, weights_TK, on_input)
            for x_TD, places_TK, weights_TK in zip(xs, permutations, weights, strict=True)
        ]

    def run_chunk(
        self, experts: GroupedExperts, x_TD: Tensor, places_TK: Tensor, weights_TK: Tensor, on_input: bool
    ) -> Tensor:
        """One chunk: across, inside, and back."""
        crossing = self.plan(places_TK)
        arriving = [
            exchange(sent_R, crossing.to_M, crossing.from_M, self.across, what)
            for what, sent_R in (
                ("rows", crossing.rows.copies(x_TD)),
                ("weights", crossing.rows.copies(weights_TK)),
                ("ids", places_TK.to(torch.int32).index_select(0, crossing.rows.token_R)),
            )
        ]
        x_QD, weights_QK, places_QK = (pending.wait() for pending in arriving)
        first = self.across.rank() * self.experts_per_node
        is_here_QK = (places_QK >= first) & (places_QK < first + self.experts_per_node)
        ids_QK = (places_QK.long() - first).masked_fill(~is_here_QK, -1)
        sums_QD = self.inside.run(experts, x_QD, self.inside.permute(ids_QK), weights_QK, on_input=on_input)
        sums_RD = exchange(sums_QD, crossing.from_M, crossing.to_M, self.across).wait()
        return crossing.rows.sums(sums_RD)

    def plan(self, places_TK: Tensor) -> Crossing:
        """The tokens that go to each node, and how many come from each."""
        M = self.across.size()
        has_expert_TK = (places_TK >= 0) & (places_TK < self.num_experts)
        nodes_TK = (places_TK // self.experts_per_node).where(has_expert_TK, M)
        goes_TM = torch.zeros(len(places_TK), M + 1, dtype=torch.bool, device=places_TK.device)
        goes_MT = goes_TM.scatter_(1, nodes_TK, True)[:, :M].t()
        to_M = goes_MT.sum(1)
        from_M = exchange(to_M[:, None].contiguous(), [1] * M, [1] * M, self.across, "counts").wait()[:, 0]
        sizes_to_M, sizes_from_M = torch.stack([to_M, from_M]).tolist()
        rows = Rows(token_R=goes_MT.nonzero()[:, 1], order_R=None, sizes=sizes_to_M, num_tokens=len(places_TK))
        return Crossing(rows, sizes_to_M, sizes_from_M)


def mesh_of_nodes(mesh: DeviceMesh, ranks_per_node: int) -> DeviceMesh:
    """The mesh with its expert axis divided into node and position; the same object for the same arguments."""
    size = dist.get_world_size()
    # New groups are made by all processes together.
    require(mesh.size() == size, f"the mesh has {mesh.size()} of {size} ranks; for strategy 'node_dedup' it has all")
    # An equal mesh of another life of torch.distributed has other groups.
    return _mesh_of_nodes(mesh, ranks_per_node, dist.group.WORLD)


@lru_cache(maxsize=32)
def _mesh_of_nodes(mesh: DeviceMesh, ranks_per_node: int, _world) -> DeviceMesh:
    names = mesh.mesh_dim_names or ()
    axis = names.index("expert")
    ranks = mesh.mesh.unflatten(axis, (-1, ranks_per_node))
    divided = (*names[:axis], "node", "position", *names[axis + 1 :])
    return DeviceMesh(mesh.device_type, ranks, mesh_dim_names=divided)
