"""conformance, subject torch-layouts: moe_torch over real ranks, processes that are joined by gloo.

The first half runs here and needs the pool of ranks; the second half runs on a rank.
"""

from functools import lru_cache
from typing import Any, Unpack

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from conformance.core.inputs import ShardedInputs, split_inputs
from conformance.core.subject import Subject
from conformance.subjects.ranks import Ranks, shared
from conformance.subjects.torch.arrays import single, tensor, to_canonical, to_inputs
from moe_ref import LayerParams, LayerSpec
from moe_ref.specs.layout import AXES, ShardLayout
from moe_torch.moe import MoE
from moe_torch.parallel.collectives import Sent, recorded
from moe_torch.parallel.parallelize import parallelize, sync_gradients, unsupported
from moe_torch.parallel.params import full_tensors


class TorchLayouts(Subject):
    """`moe_torch.parallel` on as many processes as the layout has ranks."""

    name = "torch-layouts"
    version = torch.__version__

    @property
    def ranks(self) -> Ranks:
        """The pool, which starts with the first call."""
        return shared("conformance.subjects.torch.sharded")

    def supports_layer(self, spec, layout=None):
        if spec.router.selector == "random":
            return "each rank draws on its own, which is not what one rank would draw"
        if layout is None:
            return None
        return unsupported(layout)

    def dispatch(self, expert_ids_by_shard, layout, spec):
        """What the ranks exchanged, and the rows that their experts were given; tensor ranks do the same."""
        found = self.ranks.run(layout.num_ranks, plan_on_rank, expert_ids_by_shard, layout, spec)
        return found[:: layout.tensor]

    def sharded_layer(
        self,
        x_by_shard: list[np.ndarray],
        params: LayerParams,
        spec: LayerSpec,
        layout: ShardLayout,
        **inputs: Unpack[ShardedInputs],
    ) -> list[np.ndarray]:
        return self.ranks.run(layout.num_ranks, layer_on_rank, x_by_shard, params, spec, layout, inputs)

    def sharded_gradients(
        self,
        x_by_shard: list[np.ndarray],
        params: LayerParams,
        spec: LayerSpec,
        layout: ShardLayout,
        d_output_by_shard: list[np.ndarray],
        **inputs: Unpack[ShardedInputs],
    ) -> list[dict[str, np.ndarray]]:
        call = gradients_on_rank, x_by_shard, params, spec, layout, d_output_by_shard, inputs
        return self.ranks.run(layout.num_ranks, *call)


# On a rank.


def layer_on_rank(x_by_shard, params: LayerParams, spec: LayerSpec, layout: ShardLayout, inputs: dict) -> np.ndarray:
    """The output of this rank's shard."""
    shard = layout.shard_of(dist.get_rank())
    with torch.no_grad():
        return parallel_layer(params, spec, layout)(
            single(x_by_shard[shard]), **inputs_of(shard, spec, x_by_shard, inputs)
        ).numpy()


def gradients_on_rank(x_by_shard, params, spec, layout, d_output_by_shard, inputs) -> dict[str, np.ndarray]:
    """The gradients of this rank's tokens, and of all parameters, as every rank sees them after the sums."""
    shard = layout.shard_of(dist.get_rank())
    moe, x_TD = parallel_layer(params, spec, layout), single(x_by_shard[shard]).requires_grad_()
    moe(x_TD, **inputs_of(shard, spec, x_by_shard, inputs)).backward(single(d_output_by_shard[shard]))
    sync_gradients(moe)
    assert x_TD.grad is not None
    by_name = {name: gradient.numpy() for name, gradient in full_tensors(moe, gradients=True).items()}
    return {"x_TD": x_TD.grad.numpy()} | to_canonical(by_name, params)


def parallel_layer(params: LayerParams | None, spec: LayerSpec, layout: ShardLayout, **options: Any) -> MoE:
    """This rank's part of a layer; options are those of `MoE`."""
    moe = MoE(spec, **options).eval()
    if params is not None:
        moe.load_params(params)
    return parallelize(moe, mesh_of(layout.data, layout.fsdp, layout.expert, layout.tensor), layout)


@lru_cache(maxsize=64)
def mesh_of(*sizes: int) -> DeviceMesh:
    """The mesh of these sizes; process groups are never freed, so that each is made once."""
    axes = {axis: size for axis, size in zip(AXES, sizes, strict=True) if size > 1} or {"expert": 1}
    return init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))


def inputs_of(shard: int, spec: LayerSpec, x_by_shard, inputs: dict) -> dict:
    """The layer's further inputs for one shard."""
    whole, rest = split_inputs(inputs, ShardedInputs)
    masks = rest.get("token_mask_by_shard")
    return {
        "token_mask": None if masks is None else tensor(masks[shard]),
        "inputs": to_inputs(whole.shards(spec.router, tuple(map(len, x_by_shard)))[shard]),
    }


def plan_on_rank(expert_ids_by_shard, layout: ShardLayout, spec: LayerSpec) -> dict[str, np.ndarray]:
    """What the dispatcher exchanged of rows, and what it gave to the experts.

    Rows carry where they come from: a token is (source, 1), and the weight on its input is the slot, counted from 1.
    """
    rank = dist.get_rank()
    ids_TK = tensor(np.asarray(expert_ids_by_shard[layout.shard_of(rank)], np.int64))
    dispatcher = parallel_layer(None, spec, layout).dispatcher
    source = layout.coordinates(rank)[2]
    x_T2 = torch.tensor([[source, 1]], dtype=torch.float64).repeat(len(ids_TK), 1)
    slots_TK = torch.arange(1, ids_TK.numel() + 1, dtype=torch.float64).view(ids_TK.shape)
    seen = Seen(spec.router.num_experts // layout.expert)
    with recorded() as sent:
        dispatcher.run(seen, x_T2, dispatcher.permute(ids_TK), slots_TK, on_input=True)
    order_R2 = torch.stack([seen.rows_R2[:, 0] / seen.rows_R2[:, 1], seen.rows_R2[:, 1] - 1], dim=1)
    return {
        **sizes_of(sent, len(order_R2), layout, source),
        "group_sizes_e": seen.group_sizes_e.numpy(),
        "order_R2": order_R2.round().long().numpy(),
        "overflow": np.array(0),
    }


class Seen:
    """Stands where the experts do, keeps what they are given, and answers with zeros."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def __call__(self, x_R2, tokens_per_expert_E):
        """Rows that are sorted by expert; those past the last group are nobody's."""
        self.rows_R2 = x_R2[: int(tokens_per_expert_E.sum())]
        self.group_sizes_e = tokens_per_expert_E
        return torch.zeros_like(x_R2)

    def sum_of_slots(self, x_R2, permutation, weights_TK):
        """Rows in the order in which they arrived."""
        assert weights_TK is None
        return self(x_R2[permutation.order_N], permutation.tokens_per_expert_E)


def sizes_of(sent: list[Sent], own_rows: int, layout: ShardLayout, e: int) -> dict[str, np.ndarray]:
    """Rows to and from each rank of the expert axis, in the last exchange before the experts."""
    found = {"send_sizes_S": np.zeros(layout.expert, np.int64), "recv_sizes_S": np.zeros(layout.expert, np.int64)}
    there = [each for each in sent if each.what == "rows"]
    if layout.expert == 1 or layout.facts.shares_tokens:
        assert not there
        # Alone on the expert axis it sends all rows to itself, without an exchange.
        return {name: sizes + (0 if layout.facts.shares_tokens else own_rows) for name, sizes in found.items()}
    # Of exchanges there and back, the middle: across, inside, inside, across.
    to_experts = there[len(there) // 2 - 1]
    first = layout.node_of(e) * layout.node_size if layout.facts.by_node else 0
    for name, sizes in zip(found, (to_experts.rows_S, to_experts.received_S), strict=True):
        found[name][first : first + len(sizes)] = sizes
    return found
