"""moe_torch, balance: how tokens spread over experts, and how the balancing bias answers an uneven spread.

    expert ids -> tokens_per_expert -> bias_update, load_statistics      (what an uneven spread costs: `losses.py`)

`group` is the process group over which the tokens of a batch are spread; with it a count is that of the whole batch.
None is this process alone. What is computed is `moe_ref.balance`; the step that moves `expert_bias` in training is in
`bias_hook.py`. Nothing here reads the device.

Legend: T tokens, E experts, K top_k, N = T * K slots, S ranks.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ref.specs.balance import BiasUpdateSpec


def tokens_per_expert(
    expert_ids_TK: Tensor,
    num_experts: int,
    token_mask_T: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The count of an expert is the number of slots of valid tokens that chose it. [LOD-2, LOD-3, MSK-1]

    Args:
        expert_ids_TK: (T, K) integers; unused slots (-1) and null experts (num_experts and above) are not counted.
        num_experts: E.
        token_mask_T: (T,) bools; a padding token (False) is not counted.
        group: the ranks over which the tokens are spread.

    Returns:
        (E,) int64.
    """
    if token_mask_T is not None:
        expert_ids_TK = expert_ids_TK.masked_fill(~token_mask_T[:, None], -1)
    counts_E = count(expert_ids_TK.flatten().long(), num_experts)
    if group is not None:
        dist.all_reduce(counts_E, group=group)
    return counts_E


def count(keys_N: Tensor, num_keys: int) -> Tensor:
    """How often each key in [0, num_keys) occurs; other keys are not counted."""
    inside_N = (keys_N >= 0) & (keys_N < num_keys)
    # Into a bin of its own: bincount and a selection would have to ask the device for their lengths.
    bins_N = keys_N.where(inside_N, num_keys)
    return torch.zeros(num_keys + 1, dtype=torch.int64, device=keys_N.device).scatter_add_(
        0, bins_N, torch.ones_like(bins_N)
    )[:num_keys]


@torch.library.custom_op("moe_torch::add_counts", mutates_args=("total_E",))
def add_counts(total_E: Tensor, counts_E: Tensor) -> None:
    """total += counts, unless this forward pass is a recomputation of one that has counted.

    Activation checkpointing repeats a forward pass in the middle of a backward pass, and nothing else does
    (pytorch/torchtitan#1593). An operator of its own, so that a compiled layer asks when it runs.
    """
    # torch.utils.checkpoint itself asks this; -1 is outside of any backward pass.
    if torch._C._current_graph_task_id() == -1:
        total_E.add_(counts_E)


@add_counts.register_vmap
def _(info, in_dims, total_E: Tensor, counts_E: Tensor):
    """The examples of vmap are one batch."""
    if in_dims[0] is not None:
        raise RuntimeError("vmap over tokens_per_expert: each example has counts of its own, which no layer has")
    add_counts(total_E, counts_E if in_dims[1] is None else counts_E.sum(in_dims[1]))
    return None, None


@dataclass(frozen=True, kw_only=True)
class LoadStatistics:
    """How even a load is; the fields are those of `moe_ref.LoadStatistics`, as tensors."""

    total: Tensor
    mean: Tensor
    largest: Tensor
    smallest: Tensor
    num_empty: Tensor
    max_over_mean: Tensor
    """The load of the busiest expert in units of the mean; 0 without tokens."""
    rows_of_rank_S: Tensor
    required_buffer_factor: Tensor
    """The busiest rank's rows in units of the mean over ranks: the smallest buffer factor that drops no row."""


def load_statistics(
    counts_E: Tensor, *, num_ranks: int = 1, placement: tuple[int, ...] | None = None
) -> LoadStatistics:
    """Statistics of a count; ranks own equal shares of the places, in order.

    Args:
        counts_E: (E,) tokens per expert, summed over everything that is to be described.
        num_ranks: of the expert axis; it divides E.
        placement: the expert at each place; None: expert i is at place i.
    """
    E = len(counts_E)
    if num_ranks < 1 or E % num_ranks:
        raise ValueError(f"num_ranks is {num_ranks}, which does not divide the {E} experts")
    if placement is not None and sorted(placement) != list(range(E)):
        raise ValueError(f"placement is {placement}; it has each of the {E} expert ids once")
    placed_E = counts_E if placement is None else counts_E[torch.tensor(placement, device=counts_E.device)]
    rows_of_rank_S = placed_E.view(num_ranks, -1).sum(1)
    total = counts_E.sum()
    return LoadStatistics(
        total=total,
        mean=total / E,
        largest=counts_E.max(),
        smallest=counts_E.min(),
        num_empty=(counts_E == 0).sum(),
        max_over_mean=counts_E.max() * E / total.clamp(min=1),
        rows_of_rank_S=rows_of_rank_S,
        required_buffer_factor=rows_of_rank_S.max() * num_ranks / total.clamp(min=1),
    )


def bias_update(
    counts_E: Tensor, spec: BiasUpdateSpec, expert_bias_E: Tensor, last_step_E: Tensor | None = None
) -> Tensor:
    """An expert with less than its share of the load gets a larger bias, one with more a smaller. [LOD-19 .. LOD-24]

    Args:
        counts_E: (..., E) integers, leading axes are layers: counts of the whole step, summed over ranks, micro-batches
            and chunks first, so that the sign is taken once, of the sum.
        spec: the rule.
        expert_bias_E: the biases before, of the same shape.
        last_step_E: what `bias_step` returned at the step before, for a rule with momentum; None: there was none.

    Returns:
        The biases after, in their own dtype.
    """
    if counts_E.shape != expert_bias_E.shape:
        raise ValueError(f"counts_E has shape {list(counts_E.shape)}; it is that of expert_bias_E, "
                         f"{list(expert_bias_E.shape)}")  # fmt: skip
    dtype = torch.promote_types(expert_bias_E.dtype, torch.float32)
    step_E = bias_step(counts_E, spec, last_step_E, dtype=dtype)
    return (expert_bias_E.to(dtype) + step_E).to(expert_bias_E.dtype)


def bias_step(
    counts_E: Tensor,
    spec: BiasUpdateSpec,
    last_step_E: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What is added to the biases, and what momentum goes on from; arguments as in `bias_update`. [LOD-46]"""
    if counts_E.is_floating_point():
        raise ValueError(
            f"counts_E is {counts_E.dtype}{list(counts_E.shape)}; it is integers of the shape of the biases"
        )
    E = counts_E.shape[-1]
    frozen = (False,) * E if spec.frozen_E is None else spec.frozen_E
    if len(frozen) != E:
        raise ValueError(f"frozen_E has {len(frozen)} entries; there are {E} biases")
    n = E - sum(frozen)
    # Made where it is needed: a copy from the host would wait for the device.
    frozen_E = torch.zeros(E, dtype=torch.bool, device=counts_E.device)
    for number, is_frozen in enumerate(frozen):
        if is_frozen:
            frozen_E[number].fill_(True)

    total_1 = counts_E.masked_fill(frozen_E, 0).sum(-1, keepdim=True)
    # In whole numbers: a mean that is rounded can give a balanced expert a sign.
    excess_E = total_1 - counts_E.long() * n
    if spec.rule == "sign":
        step_E = excess_E.sign().to(dtype)
    elif spec.rule == "proportional":
        step_E = excess_E.to(dtype) / n
    elif spec.rule == "share":
        every_1 = counts_E.sum(-1, keepdim=True)
        share_E = counts_E.to(dtype) / every_1.clamp(min=1)
        step_E = torch.where(every_1 == 0, 0, spec.wanted_share / n - share_E)
    else:
        step_E = excess_E.to(dtype) / total_1.clamp(min=1)
    if spec.rule == "tanh":
        step_E = torch.tanh(spec.steepness * step_E)
    if spec.centred:
        step_E = step_E - step_E.masked_fill(frozen_E, 0).sum(-1, keepdim=True) / n
    step_E = (spec.rate * step_E).masked_fill(frozen_E, 0)
    if spec.momentum == 0:
        return step_E
    last_E = torch.zeros_like(step_E) if last_step_E is None else last_step_E
    return spec.momentum * last_E + (1 - spec.momentum) * step_E
