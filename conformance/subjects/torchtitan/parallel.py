"""conformance, subject torchtitan: its MoE on a rank, by its own `parallelize` and its own FSDP2.

What a trainer does, in its order: the sharding config, `MoE.parallelize`, and `apply_fsdp_to_decoder` on a decoder of
this one block; sequence parallel is on, as by default. Of its backends partial_dtensor does all of this on CPUs. The
default, spmd_types, sends uneven rows by an all_to_all that gloo has not got, and its FSDP2 needs a later torch than
2.13: what is left of it is a forward pass over tensor ranks.

A layout has the axes data, fsdp, expert and tensor; torchtitan's expert ranks are the tensor ranks too.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from types import MethodType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from conformance.subjects.torch.arrays import to_torch
from conformance.subjects.torchtitan.arrays import native
from conformance.subjects.torchtitan.balance import Block
from conformance.subjects.torchtitan.layer import forward_in_float32, is_gpt_oss, layer_config
from moe_ref import LayerParams, LayerSpec

Backend = Literal["partial_dtensor", "spmd_types"]
DTENSOR: Backend = "partial_dtensor"
SPMD: Backend = "spmd_types"


@dataclass(frozen=True, kw_only=True)
class ParallelLayer:
    """A layer on a rank."""

    model: nn.Module
    """Tokens in, output out: each tensor rank has its part of the sequence; within `meshes`."""
    moe: Any
    dims: Any
    """ParallelDims of torchtitan."""
    places: dict[str, torch.Tensor]
    """Path -> where the entries of this rank's part of a parameter are in the whole, which is flat."""

    def meshes(self) -> AbstractContextManager:
        """What the trainer enters around a step."""
        from torchtitan.distributed.utils import get_spmd_context, set_spmd_backend

        set_spmd_backend(self.dims.spmd_backend)
        return get_spmd_context(parallel_dims=self.dims)()

    def load_params(self, params: LayerParams) -> None:
        """Write this rank's part of the parameters; no balancing bias is one of zeros."""
        with torch.no_grad():
            for path, parameter in self.moe.named_parameters():
                own = local(parameter)
                own.copy_(to_torch(native(path, params)).flatten()[self.places[path]].reshape(own.shape))
            bias_E, kept_E = params.expert_bias_E, local(self.moe.expert_bias_E)
            kept_E.copy_(torch.zeros(len(kept_E)) if bias_E is None else to_torch(bias_E))


class OneBlock(nn.Module):
    """What FSDP and the hook look for in a decoder."""

    enable_weight_tying = False
    tok_embeddings = norm = lm_head = None

    def __init__(self, moe: nn.Module):
        super().__init__()
        self.layers = nn.ModuleDict({"0": Block(moe)})

    def forward(self, x_1TD: torch.Tensor) -> torch.Tensor:
        """The block alone."""
        return self.layers["0"](x_1TD)


@lru_cache(maxsize=64)
def parallel_layer(spec: LayerSpec, data: int, fsdp: int, expert: int, tensor: int, backend: Backend) -> ParallelLayer:
    """The layer with untrained weights; its experts compute in float32."""
    import spmd_types as spmd
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.models.common.moe_sharding import set_moe_sharding_config
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher
    from torchtitan.models.gpt_oss.sharding import _GPT_OSS_EXPERTS_PARAM_LAYOUT

    set_spmd_backend(backend)
    dims, config = parallel_dims(data, fsdp, expert, tensor, backend), layer_config(spec)
    config.routed_experts.token_dispatcher = AllToAllTokenDispatcher.Config(
        num_experts=spec.router.num_experts, top_k=spec.router.top_k
    )
    plain: dict[str, Any] = {"w1_EFD": spmd.S(1), "w2_EDF": spmd.S(2), "w3_EFD": spmd.S(1)}
    layout: dict[str, Any] = _GPT_OSS_EXPERTS_PARAM_LAYOUT if is_gpt_oss(spec.experts) else plain
    set_moe_sharding_config(config, enable_ep=dims.ep_enabled, enable_sp=True, expert_param_layout=layout)
    moe = config.build().eval()
    with torch.no_grad():
        for parameter in moe.parameters():
            # Each entry is its own place, so that what a rank has left of it says which it has.
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape))
    experts = moe.routed_experts.inner_experts
    experts.forward = MethodType(forward_in_float32, experts)
    if backend == SPMD or dims.tp_enabled or dims.ep_enabled:
        moe.parallelize(dims)
    model = OneBlock(moe)
    if backend == DTENSOR:
        shard_fully(model, dims)
    places = {path: local(parameter).detach().long().flatten() for path, parameter in moe.named_parameters()}
    return ParallelLayer(model=model, moe=moe, dims=dims, places=places)


@lru_cache(maxsize=64)
def parallel_dims(data: int, fsdp: int, expert: int, tensor: int, backend: Backend):
    """The meshes; process groups are never freed, so that each is made once."""
    from torchtitan.distributed import parallel_dims as module

    module.device_type = "cpu"  # a machine without an accelerator is one of CUDA to it
    dims = module.ParallelDims(
        dp_replicate=data,
        dp_shard=fsdp * expert,
        cp=1,
        tp=tensor,
        pp=1,
        ep=expert * tensor if expert > 1 else 1,
        world_size=dist.get_world_size(),
        spmd_backend=backend,
    )
    dims.build_mesh()
    return dims


def shard_fully(model: OneBlock, dims) -> None:
    """FSDP2 as the partial_dtensor branch of its `parallelize_deepseekv3` applies it, in float32."""
    from torchtitan.distributed.fsdp import apply_fsdp_to_decoder

    replicated = ["dp_replicate"] if dims.dp_replicate_enabled else []
    apply_fsdp_to_decoder(
        model,  # pyright: ignore[reportArgumentType]
        dims.get_mesh([*replicated, "fsdp"]),
        param_dtype=torch.float32,
        reduce_dtype=torch.float32,
        pp_enabled=False,
        ep_degree=dims.ep,
        edp_mesh=dims.get_optional_mesh([*replicated, "efsdp"]) if dims.ep_enabled else None,
    )
    for module in model.modules():
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)  # pyright: ignore[reportCallIssue]  # gloo has no other


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The parts of all ranks together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
