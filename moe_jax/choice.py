"""moe_jax, choice: which way a grouped matmul goes on a platform, and why.

    tokamax   its kernels, called by name (openxla/tokamax)
    ragged    jax.lax.ragged_dot, which XLA compiles well for TPU alone
    blocked   a loop over the experts that have rows; no memory but the result

On CUDA `jax.lax.ragged_dot` is never taken: it is expanded to a product of all rows with all experts, 3 TF/s and up to
128 GiB for a real layer on an H100. A way there that is not the first is said once, with its reason.
"""

import importlib
import warnings
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
from jax.extend import backend
from jax.typing import DTypeLike

from moe_jax.ragged import OUTER, without_types_of_meshes

WAYS = ("blocked", "ragged", "tokamax")
WEIGHT_GRADIENTS = {"triton": 622.0, "mosaic_gpu": 108.0, "blocked": 11.0}
"""TF/s of the product of rows with rows, on an H100: bfloat16, 131072 rows, D 2048, F 768, 128 experts. Those of the
two kernels of tokamax are in its own table of tuned shapes (0.0.17), where the first is 2 to 7 times as fast on every
other shape too, and the only one for a B200. `python -m benchmarks.gpu --only jax` times all three."""
FORWARD = "mosaic_gpu"
"""The kernel of tokamax for the product of rows with matrices: 424 TF/s there; the blocked way has 6."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A way, and why it is not the fastest one; empty where it is."""

    way: str
    why: str = ""
    kernel: str | None = None
    """tokamax's name of its kernel; None: it chooses."""
    weight_gradient: str | None = None
    """The same for the product of rows with rows; or blocked."""


def chosen(platform: str | None = None, *, dtype: DTypeLike = jnp.bfloat16) -> Chosen:
    """The way that `grouped_matmul` goes where `implementation` is auto.

    Args:
        platform: cpu, cuda, rocm or tpu; None: that of the default device.
        dtype: the wider one of rows and kernel.
    """
    platform = platform_of_default() if platform is None else platform
    if platform == "cpu":
        return Chosen(way="blocked")
    if platform == "cuda":
        return _on_cuda(jnp.dtype(dtype))
    if platform == "rocm":
        return Chosen(way="blocked", why="tokamax has no kernels for it")
    why = without_tokamax()
    return Chosen(way="ragged", why=why) if why else Chosen(way="tokamax")


def named(way: str, platform: str) -> Chosen:
    """The way that a user asked for; an error of it is the user's to see."""
    return Chosen(way=way, kernel=FORWARD, weight_gradient=FORWARD) if platform == "cuda" else Chosen(way=way)


def computed_in(a: DTypeLike, b: DTypeLike, out: DTypeLike) -> DTypeLike:
    """The dtype of a product: the wider one, but for a float32 gradient that meets bfloat16 and ends in it."""
    split = {jnp.dtype(a), jnp.dtype(b)} == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}
    return jnp.bfloat16 if split and out == jnp.bfloat16 else jnp.promote_types(a, b)


def platform_of_default() -> str:
    """As lowering names platforms: cuda or rocm, where JAX says gpu."""
    device = backend.get_default_device()
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version else "cuda"


def _on_cuda(dtype) -> Chosen:
    # The kernels multiply two of one dtype, of these two.
    if dtype not in (jnp.bfloat16, jnp.float16):
        return Chosen(way="blocked", why=f"it computes in {dtype}; tokamax's kernels for CUDA in bfloat16 and float16")
    if why := without_tokamax() or refusal(FORWARD, dtype, outer=False):
        return Chosen(way="blocked", why=why)
    fastest = sorted(WEIGHT_GRADIENTS, key=WEIGHT_GRADIENTS.__getitem__, reverse=True)
    refusals = {name: "" if name == "blocked" else refusal(name, dtype, outer=True) for name in fastest}
    taken = next(name for name in fastest if not refusals[name])
    why = "" if taken == fastest[0] else f"gradients of weights by {taken!r}: {refusals[fastest[0]]}"
    return Chosen(way="tokamax", why=why, kernel=FORWARD, weight_gradient=taken)


@lru_cache(maxsize=1)
def without_tokamax() -> str:
    """Why tokamax cannot be used; empty: it can."""
    try:
        tokamax = importlib.import_module("tokamax")
    except Exception as error:  # a broken installation raises what it likes
        return f"tokamax cannot be imported: {error!r}"
    missing = [name for name in ("ragged_dot", "ragged_dot_general") if not hasattr(tokamax, name)]
    return f"this tokamax has no {missing[0]}" if missing else ""


@lru_cache(maxsize=32)
def refusal(kernel: str, dtype: DTypeLike, *, outer: bool) -> str:
    """What tokamax says against one of its kernels on the default device; empty: it takes it.

    It is asked by lowering a small product, which runs nothing: its kernels are imported where they can be, without a
    word, each knows its devices and dtypes when it is traced, and what jax-triton compiles it compiles when it is
    lowered, by a Triton that may be too new or too old for it.
    """
    tokamax = importlib.import_module("tokamax")
    rows, sizes = jax.ShapeDtypeStruct((128, 128), dtype), jax.ShapeDtypeStruct((2,), jnp.int32)
    matrices = jax.ShapeDtypeStruct((2, 128, 128), dtype)

    def forward(rows, matrices, sizes):
        return tokamax.ragged_dot(rows, matrices, sizes, preferred_element_type=dtype, implementation=kernel)

    def backward(rows, sizes):
        dot = tokamax.ragged_dot_general
        return dot(rows, rows, sizes, OUTER, preferred_element_type=dtype, implementation=kernel)

    try:
        # The first to ask may be in the middle of a jax.shard_map.
        with without_types_of_meshes():
            traced = jax.jit(backward).trace(rows, sizes) if outer else jax.jit(forward).trace(rows, matrices, sizes)
            traced.lower(lowering_platforms=("cuda",))
    except Exception as error:  # NotImplementedError, ValueError, what a newer Pallas raises
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        needs = " (pip install 'tokamax[cuda]' has what it needs)" if said.startswith("Unknown implementation") else ""
        return f"tokamax's {kernel} refuses: {said}{needs}"
    return ""


def say_once(found: Chosen) -> None:
    """A slower way on CUDA is a warning, once for each reason."""
    if found.why:
        _say(f"grouped_matmul of moe_jax takes the way {found.way!r}: {found.why}")


@lru_cache(maxsize=64)
def _say(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=3)
