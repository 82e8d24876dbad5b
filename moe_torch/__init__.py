"""moe_torch: the Mixture-of-Experts layer in PyTorch, equal to moe_ref and fast.

Start at `MoE`; `parallelize` lays it over a mesh of ranks.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moe_torch.balance import LoadStatistics, bias_step, bias_update, load_statistics, tokens_per_expert
from moe_torch.bias_hook import BiasHook
from moe_torch.capacity import KeptSlots, apply_capacity, slot_table
from moe_torch.dispatcher import LocalTokenDispatcher, TokenDispatcher
from moe_torch.experts import GroupedExperts
from moe_torch.losses import (
    BalanceSums,
    balance_loss,
    balance_sums,
    loss_of_sums,
    z_loss,
    z_loss_of_sums,
    z_sums,
)
from moe_torch.moe import MoE, SharedExperts
from moe_torch.names import from_torchtitan, to_torchtitan
from moe_torch.quantile import NeedCounts, bias_of_total, quantile_bias, total_of
from moe_torch.replay import capture, replay_layer
from moe_torch.replicas import home, place_slots, replicate
from moe_torch.router import Gate, NodeLimitedRouter
from moe_torch.routing import Routing, route
from moe_torch.sparsity import next_coefficient

if TYPE_CHECKING:
    from moe_torch.parallel.parallelize import parallelize, sync_gradients
    from moe_torch.parallel.params import full_tensors

# FSDP and DTensor take as long to import as all the rest: they are imported when they are asked for.
_PARALLEL = {
    "full_tensors": "moe_torch.parallel.params",
    "parallelize": "moe_torch.parallel.parallelize",
    "sync_gradients": "moe_torch.parallel.parallelize",
}


def __getattr__(name: str) -> Any:
    if name in _PARALLEL:
        return getattr(import_module(_PARALLEL[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BalanceSums",
    "BiasHook",
    "Gate",
    "GroupedExperts",
    "KeptSlots",
    "LoadStatistics",
    "LocalTokenDispatcher",
    "MoE",
    "NeedCounts",
    "NodeLimitedRouter",
    "Routing",
    "SharedExperts",
    "TokenDispatcher",
    "apply_capacity",
    "balance_loss",
    "balance_sums",
    "bias_of_total",
    "bias_step",
    "bias_update",
    "capture",
    "from_torchtitan",
    "full_tensors",
    "home",
    "load_statistics",
    "loss_of_sums",
    "next_coefficient",
    "parallelize",
    "place_slots",
    "quantile_bias",
    "replay_layer",
    "replicate",
    "route",
    "slot_table",
    "sync_gradients",
    "to_torchtitan",
    "tokens_per_expert",
    "total_of",
    "z_loss",
    "z_loss_of_sums",
    "z_sums",
]
