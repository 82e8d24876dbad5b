"""benchmarks, JAX layouts: the sharded layer on 8 CPU devices beside the layer on one, forward and backward.

    python -m benchmarks.jax_layouts                 # a table, and benchmarks/results/jax_layouts.json
    python -m benchmarks.jax_layouts --experts 16 --tokens 512 --rounds 3

All do the same work: the same tokens and parameters, split as each layout says. The devices share the cores of one
machine, so that what is measured is the overhead of a layout: what is moved, copied, waited for and padded. How fast
links between real devices are is not in it.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness import RESULTS, machine, paired, table, use_cores, write_json
from benchmarks.jax_layer import check_agreement, forward_and_backward, random_params
from moe_ref import RouterSpec
from moe_ref.specs.layer import ExpertSpec, LayerSpec
from moe_ref.specs.layout import ShardLayout

CORES, DEVICES = 2, 8
ONE = "one device"
FUSED: dict[str, dict[str, Any]] = {"fsdp 8": {"fsdp": 8}, "fsdp 2, expert 4": {"fsdp": 2, "expert": 4}}
"""Meshes that are also run with split stages."""


def layouts() -> dict[str, tuple[ShardLayout, dict]]:
    """Layouts by name, with options of the layer."""
    strategies = ("all_to_all", "ragged_all_to_all", "ring_of_experts", "replicated")
    found: dict = {f"expert 8, {strategy}": (ShardLayout(strategy=strategy, expert=8), {}) for strategy in strategies}
    small = ShardLayout(strategy="ragged_all_to_all", expert=8, buffer_factor=1.5)
    found["expert 8, ragged_all_to_all, buffer 1.5"] = small, {}
    found["data 8"] = ShardLayout(data=8), {}
    found["expert 4, tensor 2"] = ShardLayout(expert=4, tensor=2), {}
    for name, mesh in FUSED.items():
        found[name] = ShardLayout(**mesh), {}
        found[f"{name}, split stages"] = ShardLayout(**mesh), {"split_stages": True}
    found["fsdp 2, expert 4, 2 chunks of tokens"] = ShardLayout(fsdp=2, expert=4, num_token_chunks=2), {}
    found["fsdp 2, expert 4, 2 chunks of the model dim"] = ShardLayout(fsdp=2, expert=4, num_emb_chunks=2), {}
    return found


def sharded(layout: ShardLayout, spec: LayerSpec, options: dict, x_TD, params, d_output_TD) -> Callable[[], object]:
    """The compiled layer on arrays that lie where it wants them."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from moe_jax.parallel import make_mesh, shard, sharded_sparse_matmul, token_axes

    mesh = make_mesh(layout)
    tokens = NamedSharding(mesh, PartitionSpec(token_axes(layout)))

    def layer(x_TD, params):
        return sharded_sparse_matmul(x_TD, params, spec, layout, mesh, **options).output_TD

    own_params = shard(params, spec, layout, mesh)
    in_place = jax.tree.map(lambda array: array.sharding, own_params)
    run = jax.jit(forward_and_backward(layer), out_shardings=(tokens, tokens, in_place))
    own_x_TD, own_d_output_TD = jax.device_put((x_TD, d_output_TD), tokens)
    return lambda: jax.block_until_ready(run(own_x_TD, own_params, own_d_output_TD))


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("experts", 64), ("tokens", 2048), ("dim", 256), ("hidden-dim", 256), ("top-k", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    use_cores(CORES)

    import jax
    import numpy as np

    from moe_jax.parallel import use_cpu_devices
    from moe_jax.sparse_matmul import sparse_matmul

    use_cpu_devices(DEVICES)
    spec = LayerSpec(
        router=RouterSpec(num_experts=arguments.experts, top_k=arguments.top_k, score_func="sigmoid", route_norm=True),
        experts=ExpertSpec(dim=arguments.dim, hidden_dim=arguments.hidden_dim),
    )
    params = random_params(spec)
    x_TD, d_output_TD = np.random.default_rng(1).standard_normal((2, arguments.tokens, arguments.dim), np.float32)
    run = jax.jit(forward_and_backward(lambda x_TD, params: sparse_matmul(x_TD, params, spec)[0]))
    calls: dict[str, Callable[[], object]] = {ONE: lambda: jax.block_until_ready(run(x_TD, params, d_output_TD))}
    results: dict = {"machine": machine(["jax", "jaxlib"]), "devices": DEVICES, **vars(arguments), "compile_s": {}}
    expected = calls[ONE]()
    for name, (layout, options) in layouts().items():
        calls[name] = sharded(layout, spec, options, x_TD, params, d_output_TD)
        begin = time.perf_counter()
        found = calls[name]()
        results["compile_s"][name] = time.perf_counter() - begin
        if layout.buffer_factor is None:
            check_agreement(expected, found)
    timings = results["timings"] = paired(calls, baselines=(ONE, *FUSED), rounds=arguments.rounds, warmup=1)
    print(table(timings))
    write_json(RESULTS / "jax_layouts.json", results)


if __name__ == "__main__":
    main()
