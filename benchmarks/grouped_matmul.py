"""benchmarks, the grouped matmul: ours, jax.lax.ragged_dot, and the roof of the machine, in one run.

    python -m benchmarks.grouped_matmul --name amd-epyc    # tables, and results/grouped_matmul-amd-epyc.json

The roof of the forward pass is one dense matmul with as many multiplications, and reading the weights of every expert
once. Backward adds the two dense matmuls of the gradients, reading the weights once more, and writing their gradient
to fresh memory. Results are compared with those of ragged_dot.
"""

import argparse
import time
from collections.abc import Callable

from benchmarks.harness import RESULTS, machine, paired, table, use_cores, write_json

ROWS, D, F, CORES = 4096, 512, 1024, 2
EXPERTS = (64, 256)
LOADS = ("random", "skewed")


def group_sizes(load: str, num_experts: int):
    """ROWS rows over the experts: uniformly at random, or by a power law (the largest group is about a tenth)."""
    import numpy as np

    rng = np.random.default_rng(0)
    popularity_E = rng.permutation(1.0 / np.arange(1, num_experts + 1) ** (0.8 if load == "skewed" else 0))
    return rng.multinomial(ROWS, popularity_E / popularity_E.sum()).astype(np.int32)


def candidates(num_experts: int, load: str) -> tuple[dict, dict, dict]:
    """Forward candidates, forward and backward candidates, and seconds to compile ours."""
    import jax
    import jax.numpy as jnp

    from moe_jax.grouped_matmul import grouped_matmul

    keys = jax.random.split(jax.random.key(0), 3)
    rows_RD = jax.random.normal(keys[0], (ROWS, D))
    kernel_EDF = jax.random.normal(keys[1], (num_experts, D, F))
    d_rows_RF = jax.random.normal(keys[2], (ROWS, F))
    sizes_E = jnp.asarray(group_sizes(load, num_experts))
    one_kernel_DF = kernel_EDF[0]
    compile_s = {}

    def both(matmul):
        def value_and_gradients(rows_RD, kernel_EDF, sizes_E, d_rows_RF):
            value_RF, pull = jax.vjp(lambda rows, kernel: matmul(rows, kernel, sizes_E), rows_RD, kernel_EDF)
            return value_RF, *pull(d_rows_RF)

        return value_and_gradients

    def roof_forward(rows_RD, one_kernel_DF, kernel_EDF):
        return rows_RD @ one_kernel_DF, kernel_EDF.sum()

    def roof_both(rows_RD, one_kernel_DF, kernel_EDF, d_rows_RF):
        # Two sums, since the weights are read twice; the barrier keeps them from being one.
        again_EDF = jax.lax.optimization_barrier(kernel_EDF)
        products = rows_RD @ one_kernel_DF, d_rows_RF @ one_kernel_DF.T, rows_RD.T @ d_rows_RF
        return *products, kernel_EDF.sum(), again_EDF.max(), jnp.full(kernel_EDF.shape, rows_RD[0, 0])

    def ready(name, function, *arguments):
        lowered = jax.jit(function).lower(*arguments)
        begin = time.perf_counter()
        compiled = lowered.compile()
        compile_s[name] = time.perf_counter() - begin
        return lambda: jax.block_until_ready(compiled(*arguments))

    given = (rows_RD, kernel_EDF, sizes_E)
    forward = {
        "ours": ready("forward", grouped_matmul, *given),
        "roof": ready("roof", roof_forward, rows_RD, one_kernel_DF, kernel_EDF),
        "ragged_dot": ready("ragged_dot", jax.lax.ragged_dot, *given),
    }
    backward = {
        "ours": ready("forward and backward", both(grouped_matmul), *given, d_rows_RF),
        "roof": ready("roof, both", roof_both, rows_RD, one_kernel_DF, kernel_EDF, d_rows_RF),
        "ragged_dot": ready("ragged_dot, both", both(jax.lax.ragged_dot), *given, d_rows_RF),
    }
    return forward, backward, compile_s


def check_agreement(ours, ragged_dot) -> None:
    """Both give the same arrays."""
    import jax
    import numpy as np

    for found, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(ragged_dot), strict=True):
        # float32 sums of up to 1024 products of numbers around 1: rounding is around 1e-4.
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-3)


def measure(calls: dict, *, rounds: int) -> dict:
    """Ours and the roof, in turns."""
    timings = paired({name: calls[name] for name in ("roof", "ours")}, baselines=("roof",), rounds=rounds)
    found = {"of_roof": 1 / timings[1].speedup["roof"], "timings": timings}
    print(table(timings), f"\n{found['of_roof']:.2f} x roof", sep="\n")
    return found


def measure_ragged_dot(calls: dict, found: dict, *, rounds: int) -> None:
    """ragged_dot, E times slower, in few rounds; its results are those of ours."""
    kept: dict = {}
    ragged_dot: dict[str, Callable[[], object]] = {"ragged_dot": lambda: kept.update(arrays=calls["ragged_dot"]())}
    (timing,) = paired(ragged_dot, baselines=(), rounds=rounds, warmup=0)
    check_agreement(calls["ours"](), kept["arrays"])
    found["timings"].append(timing)
    found["speedup"] = timing.median_ms / found["timings"][1].median_ms
    print(table([timing]), f"\nours is {found['speedup']:.0f} x as fast as ragged_dot", sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--experts", type=int, nargs="*", default=EXPERTS)
    parser.add_argument("--loads", nargs="*", default=("random",), choices=LOADS)
    parser.add_argument("--name", required=True, help="of the machine, in the name of the file of results")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--slow-rounds", type=int, default=2)
    arguments = parser.parse_args()
    use_cores(CORES)
    results: dict = {"machine": machine(["jax", "jaxlib"]), "rows": ROWS, "D": D, "F": F, "dtype": "float32"}
    results["cases"] = []
    ready = []
    for load in arguments.loads:
        for num_experts in arguments.experts:
            forward, backward, compile_s = candidates(num_experts, load)
            case: dict = {"experts": num_experts, "load": load, "compile_s": compile_s}
            results["cases"].append(case)
            for name, calls in (("forward", forward), ("forward and backward", backward)):
                print(f"\n{num_experts} experts, {load} load, {name}: {compile_s[name]:.2f} s to compile\n")
                case[name] = measure(calls, rounds=arguments.rounds)
                ready.append((f"{num_experts} experts, {load} load, {name}", calls, case[name]))
    # Last: it takes and gives back gigabytes, which slows down whatever comes next.
    for title, calls, found in ready:
        print(f"\n{title}\n")
        measure_ragged_dot(calls, found, rounds=arguments.slow_rounds)
    write_json(RESULTS / f"grouped_matmul-{arguments.name}.json", results)


if __name__ == "__main__":
    main()
