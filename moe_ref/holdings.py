"""moe_ref, holdings: which part of each parameter a rank stores, and which it computes with.

* expert axis: a rank has the routed experts of its places; all else is on every rank.
* tensor axis: a rank has one slice of F of the routed experts; all else, b_down included, is on every rank.
* fsdp axis: what has a D axis is stored in pieces of D, as even as can be, the earlier ones larger, and gathered
  before use; all else is stored on every rank.
* data axis: every rank stores the same.

An implementation may store other pieces of the same whole; what it computes with is the same.

Legend: E experts, D model dim, F expert hidden dim.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import lru_cache

import numpy as np

from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.layout import ShardLayout
from moe_ref.specs.params import LayerParams, param_shapes

ROUTED = ("w_up_EDF", "w_down_EFD", "w_gate_EDF", "b_up_EF", "b_down_ED", "b_gate_EF")
"""The parameters of the routed experts: what the expert and the tensor axis split."""

CONSTANTS = ("constant_w_ZD2", "constant_ZD")
"""Those of constant experts, which see what the routed experts see, on the rank of the token."""

RANKS = 256
"""So many parts of ranks are kept: they are asked for again by each of their peers, forward and backward."""

Part = tuple[np.ndarray, ...]
"""The indices along each axis, as `numpy.ix_` takes them."""


@lru_cache(maxsize=RANKS)
def used(rank: int, layout: ShardLayout, spec: LayerSpec) -> dict[str, Part]:
    """The part of each parameter that a rank computes with, by name."""
    _, _, e, t = layout.coordinates(rank)
    experts = np.array(layout.experts_of(e, spec.router.num_experts))
    hidden = np.split(np.arange(spec.experts.hidden_dim), layout.tensor)[t]
    parts = {}
    for name, shape in param_shapes(spec).items():
        if shape is not None:
            whole = tuple(np.arange(size) for size in shape)
            split = {"E": experts, "F": hidden} if name in ROUTED else {}
            parts[name] = tuple(split.get(axis, every) for axis, every in zip(_axes(name, shape), whole, strict=True))
    return parts


@lru_cache(maxsize=RANKS)
def held(rank: int, layout: ShardLayout, spec: LayerSpec) -> dict[str, Part]:
    """The part of each parameter that a rank stores, by name: of what it uses, its piece of D."""
    _, f, _, _ = layout.coordinates(rank)
    # The D of the routed experts is that of the latent where there is one.
    of_token, of_experts = (
        np.array_split(np.arange(e.dim), layout.fsdp)[f] for e in (spec.experts, spec.routed_experts)
    )
    parts = {}
    for name, part in used(rank, layout, spec).items():
        axes, piece = _axes(name, part), of_experts if name in (*ROUTED, *CONSTANTS) else of_token
        parts[name] = tuple(piece if axis == "D" else indices for axis, indices in zip(axes, part, strict=True))
    return parts


def gather(params: LayerParams, rank: int, layout: ShardLayout, spec: LayerSpec) -> LayerParams:
    """The parameters that a rank computes with: the pieces that its fsdp peers hold, put together along D.

    The down bias is on the first tensor rank alone: partial outputs are summed, and it is added once.
    """
    d, _, e, t = layout.coordinates(rank)
    peers = [held(layout.rank(d, f, e, t), layout, spec) for f in range(layout.fsdp)]
    values: dict = {}
    for field in fields(LayerParams):
        value = getattr(params, field.name)
        if value is not None:
            pieces = [take(value, peer[field.name]) for peer in peers]
            axes = _axes(field.name, value.shape)
            values[field.name] = np.concatenate(pieces, axis=axes.index("D")) if "D" in axes else pieces[0]
    gathered = replace(params, **values)
    return gathered if t == 0 else replace(gathered, b_down_ED=None)


def take(value: np.ndarray, part: Part) -> np.ndarray:
    """The part of a value."""
    return value[np.ix_(*part)] if part else value


def add(total: np.ndarray, part: Part, value: np.ndarray) -> None:
    """Adds a value to a part of the total, in place."""
    total[np.ix_(*part) if part else ()] += value


def _axes(name: str, axes: Sequence) -> str:
    """The letters of the axes: the suffix of the name. learned_scale has none, nor an axis that is split."""
    return "?" * len(axes) if name == "learned_scale" else name.rpartition("_")[2]
