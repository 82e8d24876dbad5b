"""moe_torch, kernels: which way experts, permutation and router go, and why. Nothing here imports triton.

    triton       the kernels of this folder
    grouped_mm   experts alone: three `F.grouped_mm`, on widths whose rows are multiples of 16 bytes
    loop         experts alone: one expert after the other, which asks the device for its counts
    composition  router and permutation: operators of PyTorch

The first that can be is taken. On CUDA another one than the first is said once, with its reason.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

from moe_ref.specs.layer import ExpertSpec
from moe_ref.specs.router import RouterSpec

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What experts compute in on kernels, or on grouped matmuls."""
LEAST_CAPABILITY = (8, 0)
"""Compute capability: older tensor cores have no bfloat16."""
MOST_CHOICES, MOST_TOP_K = 1024, 32
"""Columns and slots that the router's kernel keeps in registers."""

_interpreted = False


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A way, and why it is not the fastest one; empty where it is."""

    way: str
    why: str = ""


def chosen(
    spec: ExpertSpec | RouterSpec, *, device: str | torch.device = "cuda", dtype: torch.dtype = torch.bfloat16
) -> Chosen:
    """The way that experts, or a router, of this spec go on a device.

    Args:
        spec: what is computed.
        device: where.
        dtype: that the experts compute in, or that of the logits.
    """
    kind = torch.device(device).type
    if isinstance(spec, RouterSpec):
        return for_router(spec, kind, dtype)
    return for_experts(spec.dim, spec.hidden_dim, kind, dtype)


def for_experts(dim: int, hidden_dim: int, device: str, dtype: torch.dtype) -> Chosen:
    """The way of experts of these widths, on a type of device."""
    if device == "cpu" and not _interpreted:
        return Chosen(way="loop")
    if dtype not in DTYPES:
        return Chosen(way="loop", why=f"experts compute in {dtype}; kernels in bfloat16, float16 or float32")
    why = without_kernels(device)
    if not why:
        return Chosen(way="triton")
    for name, width in (("dim", dim), ("hidden_dim", hidden_dim)):
        if width * dtype.itemsize % 16:
            why += f"; and {name} is {width}, so that rows are no multiple of 16 bytes, as F.grouped_mm wants them"
            return Chosen(way="loop", why=why)
    return Chosen(way="grouped_mm", why=why)


def for_router(spec: RouterSpec, device: str, dtype: torch.dtype) -> Chosen:
    """The way of a router, on a type of device."""
    if device == "cpu" and not _interpreted:
        return Chosen(way="composition")
    why = without_kernels(device)
    if not why and dtype not in DTYPES:
        why = f"logits are {dtype}; the kernel takes bfloat16, float16 or float32"
    why = why or unfit(spec)
    return Chosen(way="composition" if why else "triton", why=why)


def for_permutation(device: str, num_choices: int) -> Chosen:
    """The way of the sort by expert, on a type of device."""
    if device == "cpu" and not _interpreted:
        return Chosen(way="composition")
    why = without_kernels(device)
    if not why and num_choices > MOST_CHOICES:
        why = f"there are {num_choices} choices; the kernel takes up to {MOST_CHOICES}"
    return Chosen(way="composition" if why else "triton", why=why)


def unfit(spec: RouterSpec) -> str:
    """The field of a router for which its kernel has no line; empty: it fits."""
    groups = spec.num_expert_groups or 1
    padded = _power_of_two(groups) * _power_of_two(spec.num_choices // groups)
    for field, limit in (("num_choices", MOST_CHOICES), ("top_k", MOST_TOP_K)):
        if getattr(spec, field) > limit:
            return f"{field} is {getattr(spec, field)}; the router's kernel takes up to {limit}"
    if padded > 2 * MOST_CHOICES:
        return f"{groups} groups of {spec.experts_per_group} experts are {padded} columns once padded to powers of two"
    for field, only in (
        ("selector", "top_k"), ("router_dtype", "float32"),
        ("logit_softcap", None), ("mask_fill", -float("inf")), ("weights_from", "scores"),
        ("norm_p", 1.0), ("norm_with_shared", False), ("learned_scale", "none"), ("null_kind", "identity"),
        ("num_zero_experts", 0),        ("num_scored_shared_experts", 0),
    ):  # fmt: skip
        if getattr(spec, field) != only:
            return f"{field} is {getattr(spec, field)!r}; the router's kernel has {only!r} alone"
    return ""


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


def without_kernels(device: str) -> str:
    """Why there are no kernels on a type of device; empty: there are."""
    if device == "cpu":
        return "" if _interpreted else "a CPU"
    return _without_kernels_on(device)


# What torch.compiler.assume_constant_result sets; called, it imports torch._dynamo, for more than a second.
without_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=8)
def _without_kernels_on(device: str) -> str:
    if device != "cuda":
        return f"device {device!r} has not been tried with the kernels"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET is set, with which no kernel is compiled"
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken installation raises what it likes
        return f"triton cannot be imported: {error!r}"
    if torch.cuda.is_available():
        have = min(torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count()))
        if torch.version.hip is None and have < LEAST_CAPABILITY:
            return f"compute capability is {have[0]}.{have[1]}; the kernels need {LEAST_CAPABILITY[0]}.0"
    return ""


def say_once(found: Chosen, what: str) -> None:
    """A slower way on an accelerator is a warning, once for each reason."""
    if found.why and not torch.compiler.is_compiling():
        _say(f"{what} of moe_torch take the way {found.way!r}: {found.why}")


@lru_cache(maxsize=256)
def _say(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=5)


@contextmanager
def interpreted() -> Iterator[None]:
    """Within it kernels run on CPU tensors too, in Triton's interpreter: far slower, to test them without a GPU.

    Raises:
        RuntimeError: TRITON_INTERPRET is not 1. Triton reads it when it is first imported.
    """
    global _interpreted
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET is not 1; it is set before triton is first imported")
    before, _interpreted = _interpreted, True
    try:
        yield
    finally:
        _interpreted = before
