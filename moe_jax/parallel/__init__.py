"""moe_jax, parallel: the layer over a mesh of devices. This is its face; start reading at `sharded_sparse_matmul`."""

from moe_jax.parallel.exchange import unsupported
from moe_jax.parallel.layer import (
    ShardedOutput,
    abstract_params,
    make_mesh,
    place,
    shard,
    sharded_sparse_matmul,
    unplace,
    use_cpu_devices,
)
from moe_jax.parallel.stages import Stages, param_specs, split, stage_specs, token_axes

__all__ = [
    "ShardedOutput",
    "Stages",
    "abstract_params",
    "make_mesh",
    "param_specs",
    "place",
    "shard",
    "sharded_sparse_matmul",
    "split",
    "stage_specs",
    "token_axes",
    "unplace",
    "unsupported",
    "use_cpu_devices",
]
