"""benchmarks, the part of the GPU's that is JAX: what `moe_jax.grouped_matmul` takes there, and what else there is."""

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.gpu_parts import SIZES, TINY, keep, place, tried

ROUNDS = 3
CALLS = 10
"""In a round, one after the other, waited for together."""


def clock(call: Callable[[], Any]) -> float:
    """A function's time in ms, once it is compiled."""
    import jax

    jax.block_until_ready(call())
    times = []
    for _ in range(ROUNDS):
        begin = perf_counter()
        for _ in range(CALLS - 1):
            call()
        jax.block_until_ready(call())
        times.append(1e3 * (perf_counter() - begin) / CALLS)
    return median(times)


def jax_part(dry: bool) -> dict:
    """The ways, whether they agree, and times of products and of a layer, in bfloat16."""
    import jax
    import jax.numpy as jnp

    from moe_jax import chosen

    if not dry and jax.default_backend() != "gpu":
        return {"left out": f"JAX has the platform {jax.default_backend()} alone"}
    where = place(dry)
    found: dict[str, Any] = {
        str(dtype.__name__): vars(chosen(where, dtype=dtype)) for dtype in (jnp.bfloat16, jnp.float32)
    }
    found["device"] = str(jax.devices()[0].device_kind)
    size = TINY if dry else SIZES[0]
    # A dry run is there for what would break: as few programs as show it.
    sizes, tails = ([3, 0, 2], (3,)) if dry else ([7, 0, 300, 5, 129], (0, 100))
    for tail in tails:
        for dtype in (jnp.float32, jnp.bfloat16)[: 1 if dry else 2]:
            name = f"tail {tail}, result in {dtype.__name__}"
            different = tried(partial(differences, sizes, tail, dtype))
            found.setdefault("largest difference from blocked", {})[name] = different
            keep(found)
    for name in ("forward", "training")[: 1 if dry else 2]:
        found.setdefault("layer", {})[name] = tried(partial(layer, size, name))
        keep(found)
    for kind, name, rate in products(size):
        found.setdefault("products", {}).setdefault(kind, {})[name] = tried(rate)
        keep(found)
    return found


def differences(sizes: list[int], tail: int, out_dtype: Any) -> list[float]:
    """Of value and gradients, as a part of the largest number: odd widths, an empty expert, a tail of NaN."""
    import jax
    import jax.numpy as jnp

    from moe_jax import grouped_matmul

    sizes_E = jnp.array(sizes)
    R, D, F, E = sum(sizes) + tail, 90, 70, len(sizes)
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((R, D), (E, D, F), (R, F))
    rows_RD, kernel_EDF, d_rows_RF = (
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    )
    rows_RD, d_rows_RF = (rows.at[R - tail :].set(jnp.nan) for rows in (rows_RD, d_rows_RF))

    @partial(jax.jit, static_argnums=2)
    def run(rows_RD, kernel_EDF, implementation):
        matmul = partial(
            grouped_matmul, group_sizes_E=sizes_E, preferred_element_type=out_dtype, implementation=implementation
        )
        value_RF, pull = jax.vjp(matmul, rows_RD, kernel_EDF)
        return value_RF, *pull(d_rows_RF.astype(out_dtype))

    pairs = zip(run(rows_RD, kernel_EDF, "auto"), run(rows_RD, kernel_EDF, "blocked"), strict=True)
    return [float(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max() / jnp.abs(b).max()) for a, b in pairs]


def products(size) -> Iterator[tuple[str, str, Callable[[], float]]]:
    """TF/s of both products, by each way and kernel that there is; one expert's matrix for all rows is the bound."""
    import jax
    import jax.numpy as jnp

    from moe_jax import blocked, ragged

    R, D, F, E = size.tokens * size.top_k, size.dim, size.hidden_dim, size.num_experts
    keys = jax.random.split(jax.random.key(0), 4)
    x_RD, d_RF = jax.random.normal(keys[0], (R, D), jnp.bfloat16), jax.random.normal(keys[1], (R, F), jnp.bfloat16)
    kernel_EDF = jax.random.normal(keys[2], (E, D, F), jnp.bfloat16)
    share_E = jax.random.dirichlet(keys[3], jnp.full(E, 20.0))
    ends_E = (jnp.cumsum(share_E) * R).astype(jnp.int32).at[-1].set(R)
    sizes_E = jnp.diff(ends_E, prepend=0)
    half, flops, one = jnp.bfloat16, 2 * R * D * F, blocked.ONE_SIZE
    forward = {
        "blocked": partial(blocked.rows_times_matrices, contract=0, out_dtype=half, precision=None, block_sizes=one),
        **{
            name: partial(ragged.tokamax_rows_times_matrices, contract=0, out_dtype=half, kernel=name)
            for name in ("mosaic_gpu", "triton")
        },
        "dense": lambda x_RD, kernel_EDF, sizes_E: x_RD @ kernel_EDF[0],
    }
    gradient = {
        "blocked": partial(blocked.rows_times_rows, out_dtype=half, precision=None, block_sizes=one),
        **{
            name: partial(ragged.tokamax_rows_times_rows, out_dtype=half, kernel=name)
            for name in ("mosaic_gpu", "triton")
        },
        "dense": lambda x_RD, d_RF, sizes_E: x_RD.T @ d_RF,
    }

    def rate(product, *arrays) -> float:
        compiled = jax.jit(product)
        return flops / clock(lambda: compiled(*arrays)) / 1e9

    for kind, ways, other in (("rows with matrices", forward, kernel_EDF), ("rows with rows", gradient, d_RF)):
        for name, way in ways.items():
            yield f"{kind}, TF/s", name, partial(rate, way, x_RD, other, sizes_E)


def layer(size, kind: str) -> dict:
    """ms of a whole layer, and MiB that XLA asks for beside arguments and results."""
    import jax
    import jax.numpy as jnp

    from moe_jax import sparse_matmul
    from moe_ref.specs.layer import ExpertSpec, LayerSpec
    from moe_ref.specs.params import LayerParams
    from moe_ref.specs.router import RouterSpec

    D, F, E = size.dim, size.hidden_dim, size.num_experts
    spec = LayerSpec(
        router=RouterSpec(num_experts=E, top_k=size.top_k, route_norm=True), experts=ExpertSpec(dim=D, hidden_dim=F)
    )
    keys = jax.random.split(jax.random.key(0), 5)

    def weights(key, *shape) -> Any:
        return 0.03 * jax.random.normal(key, shape, jnp.bfloat16)

    gate_ED: Any = jax.random.normal(keys[0], (E, D)) * D**-0.5
    params = LayerParams(
        gate_ED=gate_ED, w_gate_EDF=weights(keys[1], E, D, F),
        w_up_EDF=weights(keys[2], E, D, F), w_down_EFD=weights(keys[3], E, F, D),
    )  # fmt: skip
    x_TD = jax.random.normal(keys[4], (size.tokens, D), jnp.bfloat16)

    def forward(x_TD, params):
        return sparse_matmul(x_TD, params, spec)[0]

    def training(x_TD, params):
        return jax.grad(lambda *leaves: (forward(*leaves).astype(jnp.float32) ** 2).sum(), argnums=(0, 1))(x_TD, params)

    compiled = jax.jit({"forward": forward, "training": training}[kind]).lower(x_TD, params).compile()
    memory = compiled.memory_analysis()
    beside = None if memory is None else memory.temp_size_in_bytes / 2**20
    return {"ms": clock(lambda: compiled(x_TD, params)), "MiB beside": beside}
