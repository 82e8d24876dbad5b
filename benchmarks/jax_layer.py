"""benchmarks, the JAX layer: sparse_matmul forward and backward, its memory, and MaxText's strategies where installed.

    python -m benchmarks.jax_layer                   # a table, and benchmarks/results/jax_layer.json
    python -m benchmarks.jax_layer --experts 16 --tokens 512 --dense

In an environment with MaxText (Python 3.12, maxtext 0.2.5) its `RoutedMoE` joins the same run on the same parameters,
sparse (jax.lax.ragged_dot, which is what runs on CPU) and dense. Peak memory is what XLA plans to allocate besides
arguments and results, and how much the process grew.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, machine, paired, table, use_cores, write_json
from moe_ref import RouterSpec
from moe_ref.spec import ExpertSpec, LayerSpec
from moe_ref.weights import LayerParams, param_shapes

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

        def layer(x_TD, params: LayerParams):
            with jax.set_mesh(mesh), partitioning.axis_rules(config.logical_axis_rules):
                rebuilt = nnx.merge(definition, state)
                rebuilt.gate.kernel.value = params.gate_ED.T
                rebuilt.wi_0.value, rebuilt.wi_1.value = params.w_gate_EDF, params.w_up_EDF
                rebuilt.wo.value = params.w_down_EFD
                return rebuilt(x_TD[None])[0][0]

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
        scale = np.abs(wanted).max() or 1.0  # the gradient of expert_bias_E is 0
        np.testing.assert_allclose(np.asarray(array) / scale, np.asarray(wanted) / scale, atol=1e-4)


def random_params(spec: LayerSpec) -> LayerParams:
    """float32 arrays of the shapes of the spec; `LayerParams.init` makes float64, which would be the peak of memory."""
    import jax
    import jax.numpy as jnp

    shapes = {name: shape for name, shape in param_shapes(spec).items() if shape is not None}
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


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("experts", 256), ("tokens", 2048), ("dim", 512), ("hidden-dim", 256), ("top-k", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunks", type=int, default=1, help="also run in this many chunks of tokens")
    parser.add_argument("--dense", action="store_true", help="also run dense_matmul")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    use_cores(CORES)

    import jax
    import numpy as np

    spec = layer_spec(arguments)
    to_time = layers(spec, arguments)
    params = random_params(spec)
    x_TD, d_output_TD = np.random.default_rng(1).standard_normal((2, arguments.tokens, arguments.dim), np.float32)
    results: dict = {"machine": machine(["jax", "jaxlib", "maxtext"]), **vars(arguments), "layers": {}}
    calls = {}
    for name, layer in to_time.items():
        lowered = jax.jit(forward_and_backward(layer)).lower(x_TD, params, d_output_TD)
        begin = time.perf_counter()
        compiled = lowered.compile()
        compile_s = time.perf_counter() - begin
        memory = compiled.memory_analysis()
        assert memory is not None
        calls[name] = lambda compiled=compiled: jax.block_until_ready(compiled(x_TD, params, d_output_TD))
        found = {
            "compile_s": compile_s,
            "peak_temp_bytes": memory.temp_size_in_bytes,
            "result_bytes": memory.output_size_in_bytes,
            "resident_growth_bytes": resident_growth(calls[name]),
        }
        results["layers"][name] = found
        sizes = ", ".join(f"{key} {found[key] / 2**20:.0f} Mi" for key in found if key != "compile_s" and found[key])
        print(f"{name}: {compile_s:.1f} s to compile, {sizes}")
    expected = calls["sparse_matmul"]()
    for call in calls.values():
        check_agreement(expected, call())
    del expected
    timings = results["timings"] = paired(calls, baselines=("sparse_matmul",), rounds=arguments.rounds, warmup=1)
    print("\n" + table(timings))
    write_json(RESULTS / "jax_layer.json", results)


if __name__ == "__main__":
    main()
