"""moe_jax: the Mixture-of-Experts layer in JAX, equal to moe_ref and fast.

Start at `sparse_matmul`, or at `sharded_sparse_matmul` for a mesh of devices. To import this starts no JAX backend.
"""

from moe_jax import pytrees  # noqa: F401  # before anything is traced
from moe_jax.align import AlignedMetadata, align_rows
from moe_jax.balance import LoadStatistics, bias_step, bias_update, load_statistics, tokens_per_expert
from moe_jax.capacity import KeptSlots, apply_capacity, slot_table
from moe_jax.choice import Chosen, chosen
from moe_jax.dense_matmul import dense_matmul
from moe_jax.grouped_matmul import grouped_matmul
from moe_jax.losses import BalanceSums, balance_loss, balance_sums, loss_of_sums, z_loss
from moe_jax.parallel.layer import (
    ShardedOutput,
    abstract_params,
    make_mesh,
    param_specs,
    place,
    shard,
    sharded_sparse_matmul,
    token_axes,
    unplace,
    use_cpu_devices,
)
from moe_jax.permute import RouteMetadata, permute
from moe_jax.quantile import bias_of_total, quantile_bias, total_of
from moe_jax.replay import capture, replay_layer
from moe_jax.replicas import home, place_slots, replicate
from moe_jax.routing import RoutingTrace, gate, route
from moe_jax.rows import dispatch, unpermute
from moe_jax.sparse_matmul import RouteOutput, activate, gmm_down, gmm_up, limit, route_tokens, sparse_matmul
from moe_jax.sparsity import next_coefficient

__all__ = [
    "AlignedMetadata",
    "BalanceSums",
    "Chosen",
    "KeptSlots",
    "LoadStatistics",
    "RouteMetadata",
    "RouteOutput",
    "RoutingTrace",
    "ShardedOutput",
    "abstract_params",
    "activate",
    "align_rows",
    "apply_capacity",
    "balance_loss",
    "balance_sums",
    "bias_of_total",
    "bias_step",
    "bias_update",
    "capture",
    "chosen",
    "dense_matmul",
    "dispatch",
    "gate",
    "gmm_down",
    "gmm_up",
    "grouped_matmul",
    "home",
    "limit",
    "load_statistics",
    "loss_of_sums",
    "make_mesh",
    "next_coefficient",
    "param_specs",
    "permute",
    "place",
    "place_slots",
    "quantile_bias",
    "replay_layer",
    "replicate",
    "route",
    "route_tokens",
    "shard",
    "sharded_sparse_matmul",
    "slot_table",
    "sparse_matmul",
    "token_axes",
    "tokens_per_expert",
    "total_of",
    "unpermute",
    "unplace",
    "use_cpu_devices",
    "z_loss",
]
