"""moe_torch, states over ranks: what goes into a parallel layer's state dict and back, and one norm for all gradients.

A state dict has DTensors of the whole layer's shapes, under the whole layer's names. What reads and writes those
(torch.distributed.checkpoint, get_model_state_dict, set_model_state_dict) needs nothing from here.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from moe_torch.moe import MoE
from moe_torch.parallel.params import parallel_of

PLACED = (
    "the layout has a placement, in whose order a rank stores its experts, and a checkpoint has them in the order of "
    "their ids; "
)


def guard_states(moe: MoE) -> None:
    """A state dict of a parallel layer is that of the whole layer, whatever the layout, or an error."""
    if parallel_of(moe).layout.placement is not None:
        moe.register_state_dict_pre_hook(_refuse_to_save)
    moe.register_load_state_dict_pre_hook(_take_whole_tensors)


def _refuse_to_save(moe: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise ValueError(f"{PLACED}save `full_tensors(moe)`, or parallelize without a placement")


def _take_whole_tensors(moe: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Of a tensor of the whole layer, which every rank has, each rank takes its part."""
    assert isinstance(moe, MoE)
    placement = parallel_of(moe).layout.placement
    for name, parameter in moe.named_parameters():
        value = state_dict.get(prefix + name)
        if value is None or not isinstance(parameter, DTensor):
            continue
        is_placed = placement is not None and name.startswith("experts.")
        if isinstance(value, DTensor):
            if is_placed:
                raise ValueError(f"{PLACED}load whole tensors, or parallelize without a placement")
        elif value.shape == parameter.shape:
            whole = value[torch.tensor(placement, device=value.device)] if is_placed else value
            # Every rank has it: nothing is to be sent.
            state_dict[prefix + name] = distribute_tensor(
                whole.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None
            )


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_, also where parameters lie on several meshes, for which that one raises.

    Args:
        parameters: on any meshes, each of which has all ranks that hold a part of it; a plain gradient is complete, and
            the same on all ranks.
        max_norm, norm_type, error_if_nonfinite, foreach: as there.

    Returns:
        The norm of all gradients as one vector, a plain tensor, the same on all ranks.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for parameter in parameters:
        mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
        by_mesh.setdefault(mesh, []).append(parameter)
    norms = []
    for alike in by_mesh.values():
        norm = get_total_norm([p.grad for p in alike if p.grad is not None], norm_type, foreach=foreach)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = get_total_norm([norm.to(norms[0].device) for norm in norms], norm_type, error_if_nonfinite)
    for alike in by_mesh.values():
        clip_grads_with_norm_(alike, max_norm, total, foreach)
    return total
