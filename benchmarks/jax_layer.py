"""benchmarks, the JAX layer: sparse_matmul forward and backward, its memory, and MaxText's strategies where installed.

    python -m benchmarks.jax_layer                   # tables, and benchmarks/results/jax_layer.json
    python -m benchmarks.jax_layer --experts 64 --hidden-dim 512 --top-k 6 --rounds 3 --name jax_layer_maxtext

In an environment with MaxText (Python 3.12, `pip install -r benchmarks/maxtext-requirements.txt`) its `RoutedMoE` joins
the same run on the same parameters, sparse (jax.lax.ragged_dot, which is what runs on CPU) and dense. Peak memory is
what XLA plans to allocate besides arguments and results, and how much the process grew.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, machine, paired, table, use_cores, write_json
from moe_ref import RouterSpec
from moe_ref.specs.layer import ExpertSpec, LayerSpec
from moe_ref.specs.params import LayerParams, param_shapes

CORES = 2


def layer_spec(arguments) -> LayerSpec:
    """Mixtral's layer, the plainest that MaxText has: softmax over the selected logits, SwiGLU experts."""
    return LayerSpec(
        router=RouterSpec(
            num_experts=arguments.experts, top_k=arguments.top_k, score_over="selected", select_by="logit"
        ),
        experts=ExpertSpec(dim=arguments.dim, hidden_dim=arguments.hidden_dim),
    )


def forward_and_backward(layer: Callable) -> Callable:
    """Output, and the gradients of tokens and parameters, of layer(x_TD, params)."""
    import jax

    def run(x_TD, params, d_output_TD):
        output_TD, pull = jax.vjp(layer, x_TD, params)
        return output_TD, *pull(d_output_TD)

    return run


scopes: dict[Callable, Callable] = {}
"""The context in which a layer is traced, where it needs one: a mesh cannot be set inside jax.jit."""


def maxtext_layers(spec: LayerSpec, num_tokens: int) -> dict[str, Callable]:
    """MaxText's sparse and dense layer as functions of (x_TD, params), on our parameters; empty without MaxText."""
    if importlib.util.find_spec("maxtext") is None:
        return {}
    load: Callable[[str], Any] = importlib.import_module
    jax, np = load("jax"), load("numpy")
    nnx, partitioning = load("flax.nnx"), load("flax.linen.partitioning")
    pyconfig, moe = load("maxtext.configs.pyconfig"), load("maxtext.layers.moe")
    initializers = load("maxtext.layers.initializers")
    base_yml = str(Path(str(pyconfig.__file__)).with_name("base.yml"))
    E, K, D, F = spec.router.num_experts, spec.router.top_k, spec.experts.dim, spec.experts.hidden_dim

    def build(sparse: bool) -> Callable:
        config = pyconfig.initialize(
            [None, base_yml], run_name="benchmark", enable_checkpointing=False, skip_jax_distributed_system=True,
            decoder_block="mixtral", base_emb_dim=D, base_mlp_dim=F, base_moe_mlp_dim=F, num_experts=E,
            num_experts_per_tok=K, base_num_decoder_layers=1, base_num_query_heads=2, base_num_kv_heads=2, head_dim=16,
            vocab_size=64, max_target_length=num_tokens, per_device_batch_size=1, dtype="float32",
            weight_dtype="float32", matmul_precision="highest", float32_gate_logits=True, megablox=False,
            sparse_matmul=sparse,
        )  # fmt: skip
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape([1] * len(config.mesh_axes)), config.mesh_axes)
        with jax.set_mesh(mesh), partitioning.axis_rules(config.logical_axis_rules):
            module = moe.RoutedMoE(
                config=config, num_experts=E, num_experts_per_tok=K, mesh=mesh,
                kernel_init=initializers.nd_dense_init(1.0, "fan_in", "truncated_normal"),
                kernel_axes=("embed", None), intermediate_dim=F, dtype=config.dtype,
                weight_dtype=config.weight_dtype, rngs=nnx.Rngs(params=0),
            )  # fmt: skip
        definition, state = nnx.split(module)
        paths_and_leaves, tree = jax.tree.flatten_with_path(state)

        def layer(x_TD, params: LayerParams):
            own = {
                "gate": params.gate_ED.T, "wi_0": params.w_gate_EDF, "wi_1": params.w_up_EDF, "wo": params.w_down_EFD,
            }  # fmt: skip
            leaves = [own.get(path[0].key, leaf) for path, leaf in paths_and_leaves]
            return nnx.merge(definition, jax.tree.unflatten(tree, leaves))(x_TD[None])[0][0]

        @contextmanager
        def scope():
            with jax.set_mesh(mesh), partitioning.axis_rules(config.logical_axis_rules):
                yield

        scopes[layer] = scope
        return layer

    return {"MaxText sparse": build(True), "MaxText dense": build(False)}


def layers(spec: LayerSpec, arguments) -> dict[str, Callable]:
    """Each layer as a function of (x_TD, params)."""
    from moe_jax.dense_matmul import dense_matmul
    from moe_jax.sparse_matmul import sparse_matmul

    def ours(layer, **options):
        return lambda x_TD, params: layer(x_TD, params, spec, **options)[0]

    found = {"sparse_matmul": ours(sparse_matmul)}
    if arguments.chunks > 1:
        found[f"sparse_matmul, {arguments.chunks} token chunks"] = ours(
            sparse_matmul, num_token_chunks=arguments.chunks
        )
    if arguments.dense:
        found["dense_matmul"] = ours(dense_matmul)
    return {**found, **maxtext_layers(spec, arguments.tokens)}


def check_agreement(expected, found) -> None:
    """Same output, same gradients: relative to their size, within float32 sums."""
    import jax
    import numpy as np

    for wanted, array in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(np.asarray(array) / scale, np.asarray(wanted) / scale, atol=1e-4)


def random_params(spec: LayerSpec) -> LayerParams:
    """float32 arrays of the shapes of the spec; `LayerParams.init` makes float64, which would be the peak of memory."""
    import jax
    import jax.numpy as jnp

    # Without a balancing bias, which MaxText's mixtral has not either.
    shapes = {name: shape for name, shape in param_shapes(spec).items() if shape and name != "expert_bias_E"}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    # 0.05 is near 1 / sqrt(fan-in) for these widths.
    values = {
        name: 0.05 * jax.random.normal(key, shape, jnp.float32)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return LayerParams(**values)  # type: ignore[arg-type]  # jax arrays, where the reference has NumPy's


def resident_growth(call: Callable[[], object]) -> int | None:
    """Bytes by which the process grows at most during the call, results included; None where Linux does not tell."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return None

    def resident(field: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field)) * 1024

    clear.write_text("5")  # resets the peak
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def forward(layer: Callable) -> Callable:
    """The output alone, of the same arguments as `forward_and_backward`."""
    return lambda x_TD, params, d_output_TD: layer(x_TD, params)


PASSES = {"forward": forward, "forward and backward": forward_and_backward}


def measure(to_time: dict[str, Callable], make: Callable, given: tuple, *, rounds: int) -> dict:
    """Compile time, memory and paired times of each layer, once they are seen to agree."""
    import jax

    found: dict = {"layers": {}}
    calls: dict[str, Callable[[], Any]] = {}
    for name, layer in to_time.items():
        with scopes.get(layer, nullcontext)():
            lowered = jax.jit(make(layer)).lower(*given)
        begin = time.perf_counter()
        compiled = lowered.compile()
        compile_s = time.perf_counter() - begin
        memory = compiled.memory_analysis()
        assert memory is not None
        calls[name] = lambda compiled=compiled: jax.block_until_ready(compiled(*given))
        figures = found["layers"][name] = {
            "compile_s": compile_s,
            "peak_temp_bytes": memory.temp_size_in_bytes,
            "result_bytes": memory.output_size_in_bytes,
            "resident_growth_bytes": resident_growth(calls[name]),
        }
        sizes = ", ".join(f"{key} {figures[key] / 2**20:.0f} Mi" for key in figures if key.endswith("bytes"))
        print(f"{name}: {compile_s:.1f} s to compile, {sizes}", flush=True)
    expected = calls["sparse_matmul"]()
    for call in calls.values():
        check_agreement(expected, call())
    del expected
    # Every candidate has run twice by now.
    found["timings"] = paired(calls, baselines=("sparse_matmul",), rounds=rounds, warmup=0)
    print("\n" + table(found["timings"]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("experts", 256), ("tokens", 2048), ("dim", 512), ("hidden-dim", 256), ("top-k", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunks", type=int, default=1, help="also run in this many chunks of tokens")
    parser.add_argument("--dense", action="store_true", help="also run dense_matmul")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--name", default="jax_layer", help="of the file of results")
    arguments = parser.parse_args()
    use_cores(CORES)

    import numpy as np

    spec = layer_spec(arguments)
    to_time = layers(spec, arguments)
    x_TD, d_output_TD = np.random.default_rng(1).standard_normal((2, arguments.tokens, arguments.dim), np.float32)
    given = (x_TD, random_params(spec), d_output_TD)
    results: dict = {"machine": machine(["jax", "jaxlib", "maxtext"]), **vars(arguments)}
    for way, make in PASSES.items():
        print(f"\n{way}\n")
        results[way] = measure(to_time, make, given, rounds=arguments.rounds)
    write_json(RESULTS / f"{arguments.name}.json", results)


if __name__ == "__main__":
    main()
