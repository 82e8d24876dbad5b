"""Tests, what ranks run to show more of moe_torch.parallel than outputs and gradients."""

from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from conformance.subjects.torch.sharded import mesh_of, parallel_layer
from moe_ref import LayerParams, LayerSpec
from moe_ref.specs.align import AlignSpec
from moe_ref.specs.layout import ShardLayout
from moe_torch import experts as experts_module
from moe_torch.moe import MoE
from moe_torch.parallel import dispatch as parallel_dispatch
from moe_torch.parallel.collectives import recorded
from moe_torch.parallel.parallelize import parallelize, sync_gradients
from moe_torch.parallel.params import full_tensors


def own(by_shard: list, layout: ShardLayout, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The tokens of this rank."""
    return torch.tensor(np.asarray(by_shard[layout.shard_of(dist.get_rank())])).to(dtype)


@contextmanager
def grouped_matmuls():
    """The path of accelerators: rows of all experts side by side."""
    before = experts_module.moves_rows
    experts_module.moves_rows = parallel_dispatch.moves_rows = lambda *_: True
    try:
        yield
    finally:
        experts_module.moves_rows = parallel_dispatch.moves_rows = before


def train(moe: MoE, x_TD: torch.Tensor, call: Callable | None = None) -> dict[str, np.ndarray]:
    """Output, and every gradient, whole, for a loss of sum(output ** 2)."""
    x_TD.requires_grad_()
    output_TD = moe(x_TD) if call is None else call(x_TD)
    output_TD.float().square().sum().backward()
    sync_gradients(moe)
    assert x_TD.grad is not None
    found = {"output": output_TD.detach(), "x": x_TD.grad} | full_tensors(moe, gradients=True)
    return {name: value.float().numpy() for name, value in found.items()}


OPTIONS: dict[str, dict] = {"aligned": {"align": AlignSpec(multiple=8, idle_blocks=1)}}
"""Of the layer, by the way in which it is trained."""


def train_on_rank(params, spec: LayerSpec, layout: ShardLayout, x_by_shard, way: str) -> dict[str, np.ndarray]:
    """In one of several ways."""
    moe = parallel_layer(params, spec, layout, **OPTIONS.get(way, {}))
    if way == "aligned":
        seen: list = []
        moe.experts.register_forward_hook(lambda _, given, out: seen.append(given[1]))
        found = train(moe, own(x_by_shard, layout))
        assert seen
        assert all(bool((rows_E > 0).all()) and bool((rows_E % 8 == 0).all()) for rows_E in seen)
        return found
    if way == "bfloat16":
        return train(moe.to(torch.bfloat16), own(x_by_shard, layout, torch.bfloat16))
    if way == "grouped":
        with grouped_matmuls():
            return train(moe, own(x_by_shard, layout))
    if way == "with routing":
        return train(moe, own(x_by_shard, layout), lambda x_TD: moe.forward_and_routing(x_TD)[0])
    if way == "twice":
        train(moe, own(x_by_shard, layout))
        moe.zero_grad()
    if way == "compiled":
        torch._dynamo.reset()
        return train(moe, own(x_by_shard, layout), torch.compile(moe, backend="aot_eager"))
    return train(moe, own(x_by_shard, layout))


def sent_on_rank(params, spec: LayerSpec, layout: ShardLayout, x_by_shard) -> list[tuple]:
    """(what, backward, rank of the expert axis, rows, bytes per row) of all that went to somebody, itself included."""
    moe = parallel_layer(params, spec, layout)
    axis = dist.get_process_group_ranks(moe.dispatcher.group)
    with recorded() as sent:
        train(moe, own(x_by_shard, layout))
    return [
        (each.what, each.backward, axis.index(rank), rows, each.bytes_per_row)
        for each in sent
        for rank, rows in zip(dist.get_process_group_ranks(each.group), each.rows_S, strict=True)
    ]


def parameters_on_rank(params: LayerParams, spec: LayerSpec, layout: ShardLayout) -> tuple[dict, dict, dict]:
    """Parameters of the whole layer, those that are put together again, and how many numbers of each are stored."""
    whole = MoE(spec)
    whole.load_params(params)
    moe = parallel_layer(params, spec, layout)
    stored = {
        name: (p.to_local() if isinstance(p, torch.distributed.tensor.DTensor) else p).numel()
        for name, p in moe.named_parameters()
    }
    again = {name: value.numpy() for name, value in full_tensors(moe).items()}
    return {name: value.detach().numpy() for name, value in whole.named_parameters()}, again, stored


def refused_on_rank(spec: LayerSpec, sizes: tuple[int, ...], layout: ShardLayout, options: dict) -> str:
    """The error of `parallelize`."""
    try:
        parallelize(MoE(spec), mesh_of(*sizes), layout, **options)
    except ValueError as error:
        return str(error)
    return ""


def misused_on_rank(spec: LayerSpec) -> list[str]:
    """Errors of calls that a layer is not ready for."""
    strange = torch.distributed.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("pipeline",))
    layout = ShardLayout(expert=2)
    parallel = parallelize(MoE(spec), mesh_of(1, 1, 2, 1), layout)
    calls: list[Callable] = [
        lambda: sync_gradients(MoE(spec)),
        lambda: full_tensors(MoE(spec)),
        lambda: parallelize(parallel, mesh_of(1, 1, 2, 1), layout),
        lambda: parallelize(MoE(spec), strange, layout),
    ]
    found = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            found.append(str(error))
    return found


def kinds_on_rank(spec: LayerSpec) -> dict:
    """What `parallelize` keeps of a layer on the meta device, of frozen experts, and of the mode."""
    with torch.device("meta"):
        moe = MoE(spec, dtype=torch.bfloat16)
    moe.experts.w1_EFD.requires_grad_(False)
    moe = parallelize(moe.eval(), mesh_of(1, 1, 2, 1), ShardLayout(expert=2))
    w1, w2 = moe.experts.w1_EFD, moe.experts.w2_EDF
    return {
        "device": w1.device.type, "dtype": str(w1.dtype), "trained": [w1.requires_grad, w2.requires_grad],
        "training": moe.experts.training, "experts": [len(w1.to_local()), moe.experts.num_experts],
    }  # fmt: skip


def counts_on_rank(params, spec: LayerSpec, layout: ShardLayout, x_by_shard) -> np.ndarray:
    """Tokens of each choice that this rank's tokens made in training."""
    moe = parallel_layer(params, spec, layout).train()
    moe(own(x_by_shard, layout))
    return moe.tokens_per_expert.numpy()


def plan_on_rank(params, spec: LayerSpec, layout: ShardLayout, ids_by_shard) -> tuple[list, list, list]:
    """Of each chunk's rows: the segments of flat slots in the order in which they are added, and the tokens of each."""
    dispatcher = parallel_layer(params, spec, layout).dispatcher
    plans = dispatcher.plan(dispatcher.permute(own(ids_by_shard, layout, torch.int64)).of_chunk)
    parts = [each.rows.order_R.split(each.rows.sizes) for each in plans]
    slots = [[each.slot_R[part].tolist() for part in own_parts] for each, own_parts in zip(plans, parts, strict=True)]
    tokens = [[each.rows.token_R[part].tolist() for part in own] for each, own in zip(plans, parts, strict=True)]
    return slots, tokens, [each.rows.num_tokens for each in plans]


def part_of_a_mesh_on_rank(params, spec: LayerSpec, x_by_shard: list) -> tuple[np.ndarray, str]:
    """The output on the expert axis of a mesh with pipeline stages, and the error of node_dedup there."""
    stages = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "expert"))
    whole = MoE(spec)
    whole.load_params(params)
    layout = ShardLayout(expert=2, ranks_per_node=1)
    moe = parallelize(whole, stages["expert"], layout)
    output_TD = moe(torch.tensor(x_by_shard[stages.get_local_rank("expert")]))
    try:
        parallelize(MoE(spec), stages["expert"], layout.replace(strategy="node_dedup"))
    except ValueError as error:
        return output_TD.detach().numpy(), str(error)
    return output_TD.detach().numpy(), ""
