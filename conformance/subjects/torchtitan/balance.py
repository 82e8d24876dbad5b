"""conformance, subject torchtitan: the hook of its optimizer that moves the expert biases, as it is.

A model of one block holds the real MoE; the counts of a step are added to it as its forward pass adds them, and a step
of the optimizer runs the hook.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from conformance.core.subject import LoadRule, Subject
from conformance.subjects.torch.arrays import to_numpy, to_torch
from conformance.subjects.torchtitan.layer import build_layer
from moe_ref import (
    BiasUpdateSpec,
    ExpertSpec,
    LayerSpec,
    QuantileSpec,
    RouterSpec,
)


class TorchtitanBalance(Subject):
    """Its bias update; it has no balance loss and no capacity."""

    def supports_load(self, spec: LoadRule) -> str | None:
        if isinstance(spec, QuantileSpec):
            return "the hook of torchtitan that is judged moves every bias by the sign; its quantile balancing is not"
        if not isinstance(spec, BiasUpdateSpec):
            return "torchtitan has no balance loss, and drops no token"
        if (spec.rule, spec.centred, spec.frozen_E, spec.momentum) != ("sign", True, None, 0):
            return "torchtitan moves every bias by the sign, less the mean of the signs"
        if spec.rate == 0:
            return "torchtitan's load_balance_coeff is greater than 0"
        return None

    def bias_update(self, counts_SE: np.ndarray, update: BiasUpdateSpec, expert_bias_E: np.ndarray) -> np.ndarray:
        """One step of the optimizer, after as many forward passes as there are counts."""
        moe, optimizer = _trained(len(expert_bias_E))
        moe.load_balance_coeff = update.rate
        moe.expert_bias_E.copy_(to_torch(expert_bias_E))
        moe.tokens_per_expert_E.zero_()
        for counts_E in to_torch(counts_SE):
            moe.tokens_per_expert_E.add_(counts_E)
        optimizer.step()
        return to_numpy(moe.expert_bias_E.clone())


class Block(nn.Module):
    """What its hook and its FSDP look for in a transformer block."""

    moe_enabled = True

    def __init__(self, moe: nn.Module):
        super().__init__()
        self.moe = moe

    def forward(self, x_1TD: torch.Tensor) -> torch.Tensor:
        """The MoE alone."""
        return self.moe(x_1TD)


@lru_cache(maxsize=64)
def _trained(num_experts: int):
    """The MoE layer of a model, and an optimizer with the hook, on one rank."""
    spec = LayerSpec(router=RouterSpec(num_experts=num_experts, top_k=1), experts=ExpertSpec(dim=8, hidden_dim=8))
    moe = build_layer.__wrapped__(spec, "float32")
    model = nn.Module()
    model.layers = nn.ModuleDict({"0": Block(moe)})
    return moe, optimizer_with_hook(model)


def optimizer_with_hook(model: nn.Module, dims=None) -> torch.optim.Optimizer:
    """An optimizer of a model part, with a rate of 0, whose steps run the hook: on the ranks of dims, or on one."""
    from torchtitan.components.optimizer.optimizer import register_moe_load_balancing_hook

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    register_moe_load_balancing_hook(optimizer, [model], dims or _one_rank())  # pyright: ignore[reportArgumentType]
    return optimizer


@lru_cache(maxsize=1)
def _one_rank():
    from torchtitan.distributed.parallel_dims import ParallelDims

    one_rank = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, world_size=1)
    build_meshes(one_rank)
    return one_rank


def build_meshes(one_rank) -> None:
    """Its meshes of one rank need a process group while they are built, and none after."""
    if dist.is_initialized():
        one_rank.build_mesh()
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    try:
        one_rank.build_mesh()
    finally:
        dist.destroy_process_group()
