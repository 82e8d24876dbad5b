"""moe_torch, tests: what runs on each rank; the whole batch comes to all of them, and each takes its own part."""

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from moe_ref import BalanceSpec, BiasUpdateSpec, CapacitySpec, LayerSpec, ShardLayout
from moe_torch.balance import tokens_per_expert
from moe_torch.bias_hook import BiasHook
from moe_torch.capacity import apply_capacity
from moe_torch.losses import balance_loss, z_loss
from moe_torch.moe import MoE
from moe_torch.parallel.parallelize import parallelize


def own_part(tokens_per_shard) -> slice:
    """The tokens of this rank."""
    ends = np.cumsum(tokens_per_shard).tolist()
    return slice(ends[dist.get_rank()] - tokens_per_shard[dist.get_rank()], ends[dist.get_rank()])


def loss_and_gradient(spec: BalanceSpec | str, tokens_per_shard, logits_TE, ids_TK, mask_T, sequence_of_T):
    """The loss of the whole batch, and the gradient of this rank's own logits; z-loss for a scope instead of a spec."""
    own, group = own_part(tokens_per_shard), dist.group.WORLD
    logits, mask = torch.tensor(logits_TE[own], requires_grad=True), torch.tensor(mask_T[own])
    if isinstance(spec, str):
        loss = z_loss(logits, scope=spec, token_mask_T=mask, group=group)
    else:
        loss = balance_loss(
            logits,
            torch.tensor(ids_TK[own]),
            spec,
            token_mask_T=mask,
            sequence_of_T=torch.tensor(sequence_of_T[own]),
            num_sequences=int(sequence_of_T.max()) + 1,
            group=group,
        )
    loss.backward()
    assert logits.grad is not None
    return loss.item(), logits.grad.numpy()


def counts(tokens_per_shard, ids_TK, num_experts: int):
    """The counts of the whole batch."""
    return tokens_per_expert(
        torch.tensor(ids_TK[own_part(tokens_per_shard)]), num_experts, group=dist.group.WORLD
    ).numpy()


def kept_ids(spec: CapacitySpec, tokens_per_shard, ids_TK, weights_TK, mask_T, sequence_of_T, num_experts: int):
    """What is left of this rank's choice."""
    own = own_part(tokens_per_shard)
    limited = apply_capacity(
        torch.tensor(ids_TK[own]),
        torch.tensor(weights_TK[own]),
        spec,
        num_experts,
        token_mask_T=torch.tensor(mask_T[own]),
        sequence_of_T=torch.tensor(sequence_of_T[own]),
        num_sequences=int(sequence_of_T.max()) + 1,
        group=dist.group.WORLD,
    )
    return limited.expert_ids_TK.numpy()


def biases_after_a_step(spec: LayerSpec, update: BiasUpdateSpec, micro_batches, wrapped: str):
    """Two layers on this rank's tokens, several micro-batches, one step: biases, counts, and how often it reduced."""
    torch.manual_seed(0)
    layers = nn.Sequential(MoE(spec), MoE(spec))
    model = DistributedDataParallel(layers) if wrapped == "first" else layers
    hook = BiasHook(model, update, group=dist.group.WORLD)
    model = DistributedDataParallel(layers) if wrapped == "later" else model
    for x_STD in micro_batches:
        model(torch.tensor(x_STD[dist.get_rank()])).sum().backward()
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **options: (calls.append(1), all_reduce(*args, **options))
    try:
        hook.step()
    finally:
        dist.all_reduce = all_reduce
    biases = [layer.router.expert_bias.numpy() for layer in layers]
    return biases, {name: counts_E.numpy() for name, counts_E in hook.counts.items()}, len(calls)


def hook_without_a_group(spec: LayerSpec):
    """It has to be told which ranks see different tokens."""
    BiasHook(MoE(spec), BiasUpdateSpec())


def sharded_layer(spec: LayerSpec, params, capacity: CapacitySpec, update: BiasUpdateSpec, x_by_shard):
    """A layer over two ranks of data by two of experts: this rank's output, and the biases after a step."""
    group = dist.group.WORLD
    moe = MoE(spec, capacity=capacity, capacity_group=group, dtype=torch.float64)
    moe.load_params(params)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    parallelize(moe, mesh, ShardLayout(data=2, expert=2))
    hook = BiasHook(moe, update, group=group)
    with torch.no_grad():
        output = moe(torch.tensor(x_by_shard[dist.get_rank()]))
    hook.step()
    return output.numpy(), moe.router.expert_bias.numpy()
