"""moe_torch, dispatch over ranks: what stands between the router and the experts when experts live on several ranks.

    AllToAllTokenDispatcher     each rank has its own tokens, and sends each slot to the rank that has its expert
    ReplicatedTokenDispatcher   all ranks have the same tokens; each works on the slots of its own experts
    NodeDedupTokenDispatcher    a token crosses to a node once, then fans out inside it (`nodes.py`)

A place is a position of an expert in the order of the ranks: rank e owns places e * E/S and on. Nothing here depends
on how experts are placed but where rows go: each token's slots are added up in the order k = 0 .. K-1.

Legend: T tokens, K top_k, D model dim, E experts, e experts on this rank, S ranks of the expert axis, C token chunks,
N = T * K slots, R rows received.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ref.specs.align import AlignSpec
from moe_ref.specs.layout import even_pieces
from moe_ref.specs.router import RouterSpec
from moe_torch.dispatcher import LocalTokenDispatcher, Permutation, TokenDispatcher
from moe_torch.experts import GroupedExperts, moves_rows, run_experts
from moe_torch.parallel.collectives import NOT_SHARED, Parallel, Pending, Shared, exchange
from moe_torch.parallel.rows import Rows


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """The token chunks of a rank: the permutation of each by place, or its places."""

    of_chunk: tuple[Permutation, ...] | tuple[Tensor, ...]
    tokens_per_expert_E: Tensor
    """Of all chunks, by expert id."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one chunk sends and receives; `dispatch` goes by it and `combine` undoes it."""

    slot_R: Tensor
    """The flat slot of each row sent: by place, then by token."""
    rows: Rows
    """The same as rows of tokens; slots k = 0 .. K-1 are the segments."""
    send_sizes_S: list[int]
    recv_sizes_S: list[int]
    arrived: Permutation
    """Of the rows received, one slot each: they come source by source, and stay in this order within an expert."""


class ParallelTokenDispatcher(TokenDispatcher):
    """What the dispatchers share: places, token chunks, and ranks that share tokens.

    Args:
        num_experts: experts that do work, on all ranks of the group together.
        num_choices: experts and null experts.
        group: the ranks of the expert axis; None: this rank alone.
        shared: ranks that have the same tokens as this one, and parts of the same experts.
        placement: placement[i] is the expert at place i; None: expert i.
        num_token_chunks: exchanges that the tokens are divided over.
        align: the experts of this rank see their rows padded up to a multiple; what travels is not padded.
    """

    parallel: Parallel | None = None
    """Where the rank stands; `of` sets it."""

    def __init__(
        self,
        num_experts: int,
        num_choices: int,
        group: dist.ProcessGroup | None,
        *,
        shared: Shared = NOT_SHARED,
        placement: Sequence[int] | None = None,
        num_token_chunks: int = 1,
        align: AlignSpec | None = None,
    ):
        self.align = align
        self.num_experts = num_experts
        self.num_choices = num_choices
        self.group = group
        self.shared = shared
        self.num_token_chunks = num_token_chunks
        self.experts_per_rank = num_experts // (1 if group is None else group.size())
        self.local = LocalTokenDispatcher(num_experts, num_choices)
        # Null experts follow the experts, wherever those are placed.
        self.expert_of_place = None
        if placement is not None and list(placement) != list(range(num_experts)):
            self.expert_of_place = [*placement, *range(num_experts, num_choices)]

    @classmethod
    def of(cls, router: RouterSpec, parallel: Parallel, align: AlignSpec | None = None) -> Self:
        """The dispatcher of this rank, for a layout that fits the router."""
        layout, groups = parallel.layout, parallel.groups
        axes = ("expert", "tensor") if layout.facts.shares_tokens else ("tensor",)
        dispatcher = cls(
            router.num_experts,
            router.num_choices,
            groups.get("expert"),
            shared=Shared(tuple(groups[axis] for axis in axes if axis in groups)),
            placement=layout.placement,
            num_token_chunks=layout.num_token_chunks,
            align=align,
            **cls.further_groups(parallel),
        )
        dispatcher.parallel = parallel
        return dispatcher

    @classmethod
    def further_groups(cls, parallel: Parallel) -> dict[str, dist.ProcessGroup]:
        """What it needs besides the ranks of the expert axis, by the name of its argument."""
        return {}

    def places(self, expert_ids_TK: Tensor) -> Tensor:
        """The place of each expert; ids that are none are left as they are."""
        if self.expert_of_place is None:
            return expert_ids_TK
        place_of_E = torch.empty(len(self.expert_of_place), dtype=torch.int64)
        place_of_E[self.expert_of_place] = torch.arange(len(self.expert_of_place))
        used_TK = (expert_ids_TK >= 0) & (expert_ids_TK < self.num_choices)
        places_TK = place_of_E.to(expert_ids_TK.device)[expert_ids_TK.where(used_TK, 0)]
        return places_TK.where(used_TK, expert_ids_TK)

    def permute(self, expert_ids_TK: Tensor) -> Chunks:
        """Slots sorted by place, chunk by chunk; the first T % C chunks have a token more than the others."""
        places = self.places(expert_ids_TK).split(even_pieces(len(expert_ids_TK), self.num_token_chunks))
        of_chunk: tuple = tuple(self.permute_places(places_TK) for places_TK in places)
        counts_E = self.local.permute(expert_ids_TK).tokens_per_expert_E
        return Chunks(of_chunk=of_chunk, tokens_per_expert_E=counts_E)

    def permute_places(self, places_TK: Tensor) -> Permutation | Tensor:
        """What `run_chunks` needs of one chunk: here the slots that it sends away."""
        return self.local.permute(places_TK)

    def run(
        self, experts: GroupedExperts, x_TD: Tensor, permutation: Chunks, weights_TK: Tensor, *, on_input: bool
    ) -> Tensor:
        """dispatch, experts and combine; the next chunk is on its way while the experts work on this one."""
        return _run(self, experts, x_TD, permutation, weights_TK, on_input)

    def run_chunks(
        self,
        experts: GroupedExperts,
        xs: Sequence[Tensor],
        permutations: Sequence,
        weights: Sequence[Tensor],
        on_input: bool,
    ) -> list[Tensor]:
        """The output of each chunk, of this rank's part of the experts where `shared` has others."""
        raise NotImplementedError


class AllToAllTokenDispatcher(ParallelTokenDispatcher):
    """Each rank sends each slot to the rank of its expert, and gets the expert's output back. [two exchanges]

    The sizes of all chunks are exchanged first, which is the one time that the host waits for a device.
    """

    def plan(self, permutations: Sequence[Permutation]) -> list[Plan]:
        """What each chunk sends and receives."""
        assert self.group is not None
        S, e, E = self.group.size(), self.experts_per_rank, self.num_experts
        device = permutations[0].order_N.device
        counts_CSe = torch.stack([p.tokens_per_expert_E[:E] for p in permutations]).view(-1, S, e)
        counts_SCe = counts_CSe.transpose(0, 1).contiguous()
        arriving_SCe = exchange(counts_SCe, [1] * S, [1] * S, self.group, "counts").wait()
        used_CK = torch.stack([p.has_expert_TK.sum(0) for p in permutations])
        sizes = torch.cat([counts_SCe.sum(2).t(), arriving_SCe.sum(2).t(), used_CK], dim=1).tolist()
        plans = []
        for chunk, permutation in enumerate(permutations):
            send_sizes_S, recv_sizes_S, used_K = sizes[chunk][:S], sizes[chunk][S : 2 * S], sizes[chunk][2 * S :]
            arriving_Se = arriving_SCe[:, chunk]
            expert_of_row_R = torch.arange(e, device=device).repeat(S).repeat_interleave(
                arriving_Se.flatten(), output_size=sum(recv_sizes_S)
            )  # fmt: skip
            slot_R = permutation.order_N[: sum(send_sizes_S)]
            T, K = permutation.has_expert_TK.shape
            token_R = slot_R // K
            rows = Rows(
                token_R=token_R, order_R=(slot_R % K * T + token_R).argsort(), sizes=used_K, num_tokens=T
            )  # fmt: skip
            plans.append(
                Plan(
                    slot_R=slot_R,
                    rows=rows,
                    send_sizes_S=send_sizes_S,
                    recv_sizes_S=recv_sizes_S,
                    arrived=LocalTokenDispatcher(e).permute(expert_of_row_R[:, None]),
                )
            )
        return plans

    def dispatch(self, x_TD: Tensor, plan: Plan, weights_TK: Tensor | None = None) -> Pending:
        """The rows for this rank's experts, source by source; times their weights where weights are given."""
        assert self.group is not None
        rows_RD = plan.rows.copies(x_TD)
        if weights_TK is not None:
            rows_RD = (rows_RD * weights_TK.flatten().index_select(0, plan.slot_R)[:, None]).to(x_TD.dtype)
        return exchange(rows_RD, plan.send_sizes_S, plan.recv_sizes_S, self.group)

    def combine(self, rows_RD: Tensor, plan: Plan, weights_TK: Tensor | None = None) -> Tensor:
        """Rows return to the tokens they came from; a token's output is the weighted sum of its slots, in order."""
        assert self.group is not None
        returned_RD = exchange(rows_RD, plan.recv_sizes_S, plan.send_sizes_S, self.group).wait()
        if weights_TK is None:
            return plan.rows.sums(returned_RD)
        wide = torch.promote_types(returned_RD.dtype, torch.float32)
        weights_R1 = weights_TK.flatten().to(wide).index_select(0, plan.slot_R)[:, None]
        return plan.rows.sums(returned_RD.to(wide) * weights_R1).to(returned_RD.dtype)

    def run_chunks(
        self,
        experts: GroupedExperts,
        xs: Sequence[Tensor],
        permutations: Sequence[Permutation],
        weights: Sequence[Tensor],
        on_input: bool,
    ) -> list[Tensor]:
        plans = self.plan(permutations)
        inputs = [weights_TK if on_input else None for weights_TK in weights]
        pending = self.dispatch(xs[0], plans[0], inputs[0])
        outputs = []
        for chunk, plan in enumerate(plans):
            rows_RD = pending.wait()
            if chunk + 1 < len(plans):
                pending = self.dispatch(xs[chunk + 1], plans[chunk + 1], inputs[chunk + 1])
            rows_RD = run_on_arrival(experts, rows_RD, plan.arrived, self.align)
            outputs.append(self.combine(rows_RD, plan, None if on_input else weights[chunk]))
        return outputs


def run_on_arrival(
    experts: GroupedExperts, rows_RD: Tensor, arrived: Permutation, align: AlignSpec | None = None
) -> Tensor:
    """The experts' outputs in the order in which the rows arrived."""
    local = LocalTokenDispatcher(experts.num_experts, align=align)
    if align is not None:
        return run_experts(experts, local, rows_RD, arrived, None, on_input=False)
    if not moves_rows(experts, rows_RD):
        return experts.sum_of_slots(rows_RD, arrived, None)
    return local.unpermute(experts(local.dispatch(rows_RD, arrived), arrived.tokens_per_expert_E), arrived).squeeze(1)


class ReplicatedTokenDispatcher(ParallelTokenDispatcher):
    """All ranks of the expert axis have the same tokens; each works on the slots of its own experts.

    `shared` has the expert axis, so that the partial outputs are summed and router, shared experts and tokens get equal
    and complete gradients on all of them.
    """

    def __init__(self, num_experts: int, num_choices: int, group: dist.ProcessGroup | None, **options):
        super().__init__(num_experts, num_choices, group, **options)
        self.own = LocalTokenDispatcher(self.experts_per_rank, align=self.align)

    def permute_places(self, places_TK: Tensor) -> Permutation:
        """Its own experts are numbered from 0; slots of others are unused."""
        first = 0 if self.group is None else self.group.rank() * self.experts_per_rank
        is_own_TK = (places_TK >= first) & (places_TK < first + self.experts_per_rank)
        return self.own.permute((places_TK - first).masked_fill(~is_own_TK, -1))

    def run_chunks(
        self,
        experts: GroupedExperts,
        xs: Sequence[Tensor],
        permutations: Sequence[Permutation],
        weights: Sequence[Tensor],
        on_input: bool,
    ) -> list[Tensor]:
        return [
            run_experts(experts, self.own, x_TD, permutation, weights_TK, on_input=on_input)
            for x_TD, permutation, weights_TK in zip(xs, permutations, weights, strict=True)
        ]


def _run_in_eager_mode(
    dispatcher: ParallelTokenDispatcher, experts, x_TD, permutation: Chunks, weights_TK, on_input: bool
):
    sizes = even_pieces(len(x_TD), dispatcher.num_token_chunks)
    xs = dispatcher.shared.enter(x_TD).split(sizes)
    weights = dispatcher.shared.enter(weights_TK).split(sizes)
    outputs = dispatcher.run_chunks(experts, xs, permutation.of_chunk, weights, on_input)
    return dispatcher.shared.leave(outputs[0] if len(outputs) == 1 else torch.cat(outputs))


# Sizes are read on the host, and a graph must not reorder collectives: there is nothing to compile.
_run: Any = torch.compiler.disable(_run_in_eager_mode)
