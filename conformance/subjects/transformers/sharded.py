"""conformance, subject transformers-layouts: MoE blocks of huggingface/transformers under their expert-parallel plans.

Each rank builds the block from its config, writes the parameters into it, and has the plan of the config's
`base_model_ep_plan` applied to it by `apply_expert_parallelism`, as `from_pretrained` does: the experts are split over
the ranks, and tokens reach them by an exchange or by a sum of partial outputs, on gloo. What is left to a trainer is
done here: gradients of what every rank has are summed.
"""

import importlib
from functools import cache

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from conformance.core.subject import Subject, Unsupported
from conformance.subjects.ranks import Ranks, shared
from conformance.subjects.torch.arrays import to_numpy, to_torch
from conformance.subjects.transformers.arrays import load_params, prefix, to_canonical, to_native
from conformance.subjects.transformers.blocks import RealBlock
from conformance.subjects.transformers.layer import build_block, find_block, run
from conformance.subjects.transformers.router import turn
from conformance.subjects.transformers.subject import Transformers
from moe_ref import LayerParams, LayerSpec
from moe_ref.specs.layout import ShardLayout

PRELOAD = ("conformance.subjects.transformers.sharded", "transformers.distributed.expert_parallel")
"""transformers takes seconds to import: once, and not on every rank."""
MOST_RANKS = 4
PATIENCE = 15.0
"""Seconds after which a rank hangs: layers are tiny, and backward passes of eager experts are known to (LYT-18)."""
STRATEGIES = ("all_to_all", "replicated")
"""Ranks with tokens of their own (`ep_size > tp_size`), and ranks that share them (`ep_size == tp_size`)."""
SHARED = ("auto", "all_reduce", "all_to_all")
"""Implementations of the plan for ranks that share their tokens; those with tokens of their own have one."""


class TransformersLayouts(Subject):
    """The blocks whose config has an expert-parallel plan, on the axes expert and data."""

    name = "transformers-layouts"

    def __init__(self, family: str = "", experts_implementation: str = ""):
        plain = Transformers(family, experts_implementation)
        self.family, self.experts_implementation = plain.family, plain.experts_implementation
        self.version = plain.version

    @property
    def ranks(self) -> Ranks:
        """The pool, which starts with the first call."""
        return shared(*PRELOAD)

    def supports_layer(self, spec: LayerSpec, layout: ShardLayout | None = None) -> str | None:
        found, why = find_block(spec, self.family, False, self.experts_implementation)
        if found is None or layout is None:
            return why or None
        if layout.strategy not in STRATEGIES:
            return f"transformers has the strategies {' and '.join(STRATEGIES)}, not {layout.strategy}"
        if not 1 < layout.expert <= layout.num_ranks <= MOST_RANKS:
            return f"the plans are judged on 2 to {MOST_RANKS} ranks, several of them on the expert axis"
        for field in ("fsdp", "tensor", "num_token_chunks", "num_emb_chunks"):
            if getattr(layout, field) != 1:
                return f"the plans are judged without {field}, which is {getattr(layout, field)}"
        if layout.placement is not None:
            return "transformers' experts are placed in their order"
        return None if with_plan(spec, self.family, False, self.experts_implementation, 0) else "no block has a plan"

    # They name their inputs (none further), which is how a subject says what it takes.
    def sharded_layer(self, x_by_shard, params, spec, layout):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.ranks.run(
            layout.num_ranks,
            layer_on_rank,
            self._asked(x_by_shard, params, spec),
            x_by_shard,
            params,
            layout,
            timeout=PATIENCE,
        )

    def sharded_gradients(self, x_by_shard, params, spec, layout, d_output_by_shard):  # pyright: ignore[reportIncompatibleMethodOverride]
        asked = self._asked(x_by_shard, params, spec)
        return self.ranks.run(
            layout.num_ranks, gradients_on_rank, asked, x_by_shard, params, layout, d_output_by_shard, timeout=PATIENCE
        )

    def _asked(self, x_by_shard, params: LayerParams, spec: LayerSpec) -> tuple:
        """What a rank finds the block by; the numbers of tokens decide whose turn it is."""
        key = tuple(len(x_TD) for x_TD in x_by_shard)
        asked = spec, self.family, params.expert_bias_E is not None, self.experts_implementation, key
        if not with_plan(*asked):
            raise Unsupported("no block that computes this layer with an expert bias has a plan")
        return asked


def with_plan(spec: LayerSpec, family: str, with_bias: bool, implementation: str, key) -> tuple[RealBlock, str] | None:
    """A block that computes the layer and has a plan, and how its experts do."""
    for number in range(8):  # another turn, until it is that of one
        found = find_block(spec, family, with_bias, implementation, (key, number))[0]
        if found is not None and plan_of(found[0]):
            return found
    return None


@cache
def plan_of(block: RealBlock) -> dict[str, str]:
    """The expert-parallel plan of the block's config, with the names that things have in the block."""
    module = importlib.import_module(f"transformers.models.{block.row.module}.configuration_{block.row.module}")
    plan = getattr(getattr(module, block.row.config), "base_model_ep_plan", None) or {}
    return {name[name.index("experts") :]: style for name, style in plan.items() if ".experts" in name}


# On a rank.


def layer_on_rank(asked: tuple, x_by_shard, params: LayerParams, layout: ShardLayout) -> np.ndarray:
    """The output of this rank's tokens."""
    module = parallel_block(asked, params, layout)[1]
    with torch.no_grad():
        return to_numpy(run(module, own(x_by_shard, layout)))


def gradients_on_rank(
    asked: tuple, x_by_shard, params: LayerParams, layout: ShardLayout, d_output_by_shard
) -> dict[str, np.ndarray]:
    """The gradients of this rank's tokens, and of all parameters, summed as each needs it."""
    block, module = parallel_block(asked, params, layout)
    x_TD = own(x_by_shard, layout).requires_grad_()
    natives = to_native(block, params)
    weights = {path: module.get_parameter(path).requires_grad_() for path in natives}
    output_TD = run(module, x_TD)
    gradients = torch.autograd.grad(
        output_TD, [x_TD, *weights.values()], own(d_output_by_shard, layout), allow_unused=True, materialize_grads=True
    )
    by_path = {}
    for path, gradient in zip(weights, gradients[1:], strict=True):
        of_experts = isinstance(gradient, DTensor)  # of the rank's own, and of the rows of every rank of the group
        whole = (gradient.full_tensor() if of_experts else gradient).contiguous()
        alone = of_experts or layout.facts.shares_tokens
        dist.all_reduce(whole, group=mesh_of(layout.data, layout.expert)["data"].get_group() if alone else None)
        by_path[path] = prefix(to_numpy(whole), natives[path])
    return {"x_TD": to_numpy(gradients[0])} | to_canonical(block, by_path, params)


def own(by_shard, layout: ShardLayout) -> torch.Tensor:
    """What is this rank's of a list of shards."""
    rank = dist.get_rank()
    return to_torch(by_shard[layout.group_of(rank) if layout.facts.shares_tokens else rank])


def parallel_block(asked: tuple, params: LayerParams, layout: ShardLayout) -> tuple[RealBlock, torch.nn.Module]:
    """This rank's block with these parameters, the plan applied to it."""
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    found = with_plan(*asked)
    assert found is not None
    block, implementation = found
    module = build_block.__wrapped__(block, asked[0], implementation)
    load_params(module, block, params)
    shares, mesh = layout.facts.shares_tokens, mesh_of(layout.data, layout.expert)
    names = dict(module.named_modules()) | dict(module.named_parameters())
    apply_expert_parallelism(
        module,
        mesh["expert"],
        mesh["expert" if shares else "alone"],
        {name: style for name, style in plan_of(block).items() if name in names},
        SHARED[turn(asked, len(SHARED))] if shares else "auto",
    )
    return block, module


@cache
def mesh_of(data: int, expert: int) -> DeviceMesh:
    """The mesh, with an axis of one rank; process groups are never freed, so that each is made once."""
    return init_device_mesh("cpu", (data, expert, 1), mesh_dim_names=("data", "expert", "alone"))
