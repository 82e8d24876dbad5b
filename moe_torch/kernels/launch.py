"""moe_torch, kernels: the sizes of tiles, and the launches of one forward and one backward pass of the experts.

Sizes are a function of shapes, dtype and device alone: nothing is tuned at run time, so that equal inputs give equal
bits, a CUDA graph can capture all but the first call, which loads kernels, and nothing waits for the host.

Legend: T tokens, D model dim, F expert hidden dim, E experts, K top_k, R = T * K rows and slots.
"""

import math
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from moe_torch.kernels.backward import hidden_kernel, tokens_kernel, weights_kernel
from moe_torch.kernels.forward import down_kernel, sum_kernel, up_kernel
from moe_torch.kernels.tiles import most_tiles, table_kernel

SUM_COLUMNS = 1024
"""Columns that a program of the sum over slots adds up."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What a program works on: columns of its result and the depth of one product; and how it is scheduled."""

    columns: int
    depth: int
    warps: int = 8
    stages: int = 3
    rows: int = 128
    """Of a weight's gradient alone; elsewhere the rows are those of `Tiles`."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The tiles of all kernels of a pass; one table of rows serves them all."""

    rows: int
    group: int = 8
    """Tiles of rows that go through all columns side by side, so that an expert's weights stay in L2."""
    up: Tile
    down: Tile
    hidden: Tile
    tokens: Tile
    weights: Tile


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the sizes of tiles depend on."""

    room: int
    """Bytes of shared memory that a program may have."""
    wide: bool
    """Whether tensor cores read shared memory and not registers, which are then there for wider tiles (Hopper)."""


def tiles_of(
    num_rows: int,
    num_experts: int,
    dim: int,
    hidden_dim: int,
    dtype: torch.dtype,
    exact: bool,
    device: Device | None,
) -> Tiles:
    """The sizes for R rows of E experts.

    Args:
        exact: float32 without TF32, which no tensor core multiplies.
        device: None: the interpreter, where small tiles show more.
    """
    if device is None:
        # Of many rows there are enough tiles in any case, and each costs milliseconds.
        size = 16 if num_rows <= 256 and max(dim, hidden_dim) <= 64 else 128
        tile = Tile(columns=size, depth=size, rows=size, warps=4, stages=1)
        return Tiles(rows=size, group=2, up=tile, down=tile, hidden=tile, tokens=tile, weights=tile)
    per_expert = num_rows / num_experts
    rows = next(size for size in (16, 32, 64, 128) if per_expert <= size * 0.75 or size == 128)
    if exact:
        rows = min(rows, 64)
        tile = Tile(columns=64, depth=16, rows=64, warps=8, stages=2)
        found = Tiles(rows=rows, up=tile, down=tile, hidden=tile, tokens=tile, weights=tile)
    else:
        warps, depth = 8 if rows == 128 else 4, 128 // dtype.itemsize
        # Columns of one product, and of two side by side.
        one, two = (256 if rows == 128 else 128, 128) if device.wide else (128, 64)
        single, double = Tile(columns=one, depth=depth, warps=warps), Tile(columns=two, depth=depth, warps=warps)
        hidden, both = Tile(columns=128, depth=depth, warps=warps), Tile(columns=two, depth=depth, rows=128)
        found = Tiles(rows=rows, up=double, down=single, hidden=hidden, tokens=single, weights=both)
    fit = _fitting(dtype.itemsize, device.room)
    return replace(
        found,
        up=fit(found.up, rows, hidden_dim, 2),
        down=fit(found.down, rows, dim, 1),
        hidden=fit(found.hidden, rows, hidden_dim, 1),
        tokens=fit(found.tokens, rows, dim, 1),
        weights=fit(found.weights, None, None, 2),
    )


def _fitting(itemsize: int, room: int):
    """A tile with so few stages, and columns where that is not enough, that its operands have room."""

    def fit(tile: Tile, rows: int | None, width: int | None, matrices: int) -> Tile:
        columns = tile.columns if width is None else min(tile.columns, max(16, triton.next_power_of_2(width)))
        rows = tile.rows if rows is None else rows
        while True:
            # Of a weight's gradient it is the rows that there are two of.
            operands = rows + matrices * columns if width is not None else matrices * rows + columns
            stages = min(tile.stages, room // (operands * tile.depth * itemsize))
            if stages >= 2 or columns <= 32:
                return replace(tile, columns=columns, stages=max(stages, 1))
            columns //= 2

    return fit


@lru_cache(maxsize=16)
def device_of(device: torch.device) -> Device | None:
    """What a device has; None for a CPU, where kernels are interpreted."""
    if device.type == "cpu":
        return None
    number = torch.cuda.current_device() if device.index is None else device.index
    room = torch.cuda.get_device_properties(number).shared_memory_per_block_optin
    return Device(room=room, wide=torch.cuda.get_device_capability(number)[0] in (9, 10))


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def takes_tf32() -> bool:
    """Whether the user lets float32 products be rounded to TF32; PyTorch's default says no."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What the launches of one pass share."""

    x_TD: Tensor
    order_R: Tensor | None
    """None: row r is slot r."""
    counts_E: Tensor
    top_k: int
    hidden_dim: int
    act: tuple
    """name, alpha, up_offset, clamp, clamp_at, beta, linear_beta; see `moe_torch.experts.Activation`."""

    def __post_init__(self):
        x_TD = self.x_TD
        tf32 = x_TD.dtype == torch.float32 and takes_tf32()
        exact = x_TD.dtype == torch.float32 and not tf32
        sizes = (self.num_rows, len(self.counts_E), x_TD.shape[1], self.hidden_dim)
        tiles = tiles_of(*sizes, x_TD.dtype, exact, device_of(x_TD.device))
        widen = x_TD.dtype == torch.bfloat16 and is_interpreted()
        E, B = len(self.counts_E), most_tiles(self.num_rows, len(self.counts_E), tiles.rows)
        tiles_3B = torch.empty(3, B, dtype=torch.int32, device=x_TD.device)
        ends_E = torch.empty(E, dtype=torch.int32, device=x_TD.device)
        experts = triton.next_power_of_2(E + 1)
        each = max(8, min(128, 8192 // experts))
        table_kernel[(triton.cdiv(B, each),)](
            self.counts_E, tiles_3B, ends_E, self.num_rows, E, B,
            ROWS=tiles.rows, TILES=each, EXPERTS=experts, **options(warps=8 if experts > 128 else 4),
        )  # fmt: skip
        precision = {"PRECISION": "tf32" if tf32 else "ieee", "WIDEN": widen}
        for name, value in (("tiles", tiles), ("tiles_3B", tiles_3B), ("ends_E", ends_E), ("precision", precision)):
            object.__setattr__(self, name, value)

    tiles: Any = None
    tiles_3B: Any = None
    ends_E: Any = None
    precision: Any = None

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.x_TD) * self.top_k if self.order_R is None else len(self.order_R)

    @property
    def activation(self) -> dict[str, Any]:
        """Arguments of the kernels that have one."""
        return dict(zip(("NAME", "ALPHA", "OFFSET", "CLAMP", "CLAMP_AT", "BETA", "LINEAR_BETA"), self.act, strict=True))

    def sizes(self, tile: Tile) -> dict[str, Any]:
        """Arguments of a kernel whose tiles are of rows."""
        return {
            "ROWS": self.tiles.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "GROUP": self.tiles.group,
            **self.precision, **options(tile.warps, tile.stages),
        }  # fmt: skip

    def grid(self, tile: Tile, width: int) -> tuple[int]:
        """A program for each tile of rows and columns."""
        return (self.tiles_3B.shape[1] * triton.cdiv(width, tile.columns),)

    def new(self, *shape: int) -> Tensor:
        """An array in the dtype of the tokens."""
        return self.x_TD.new_empty(shape)


def options(warps: int, stages: int = 1) -> dict[str, Any]:
    """How a kernel is compiled. A product and the sum it joins are rounded once; Triton 3.9 warns where this is left
    unsaid."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def unit_of(*sizes: int) -> int:
    """What all of these sizes and strides are multiples of, where Triton, which looks for 16 alone, sees nothing.

    Rows of 360 numbers are read in pieces of 16 bytes then, like those of 352, and not one by one.
    """
    unit = math.gcd(16, *sizes)
    return 1 if unit == 16 else unit


def forward(p: Pass, weights_R: Tensor | None, weights: list[Tensor | None], keep: bool):
    """out_TD, and with `keep` the halves gate_RF and up_RF, in the order of the rows."""
    w1, w2, w3, b1_EF, b2_ED, b3_EF = weights
    assert w1 is not None
    assert w2 is not None
    (T, D), F, R, E, B = p.x_TD.shape, p.hidden_dim, p.num_rows, len(p.counts_E), p.tiles_3B.shape[1]
    gate_RF = p.new(R, F) if keep else None
    up_RF = p.new(R, F) if keep and w3 is not None else None
    hidden_RF, tile, strides = p.new(R, F), p.tiles.up, _strides(w1, w3)
    up_kernel[p.grid(tile, F)](
        p.x_TD, p.order_R, w1, w3, b1_EF, b3_EF, hidden_RF, gate_RF, up_RF, p.tiles_3B,
        B, E, D, F, p.top_k, *strides,
        **p.activation, **p.sizes(tile), EVEN_DEPTH=D % tile.depth == 0, UNIT=unit_of(D, F, *strides),
    )  # fmt: skip
    slots_RD, tile = p.new(R, D), p.tiles.down
    down_kernel[p.grid(tile, D)](
        hidden_RF, p.order_R, weights_R, w2, b2_ED, slots_RD, p.tiles_3B, B, E, D, F, *w2.stride()[:2],
        **p.sizes(tile), EVEN_DEPTH=F % tile.depth == 0, UNIT=unit_of(D, F, *w2.stride()[:2]),
    )  # fmt: skip
    return sum_of_slots(slots_RD, T, p.top_k), gate_RF, up_RF


def _strides(w1: Tensor, w3: Tensor | None) -> tuple[int, ...]:
    """Those of the first two axes; where there is no w3, those of w1 stand in."""
    return *w1.stride()[:2], *(w1 if w3 is None else w3).stride()[:2]


def sum_of_slots(slots_RD: Tensor, num_tokens: int, top_k: int) -> Tensor:
    """Each token's sum over its slots."""
    if top_k == 1:
        return slots_RD
    D = slots_RD.shape[1]
    out_TD = slots_RD.new_empty(num_tokens, D)
    columns = min(SUM_COLUMNS, triton.next_power_of_2(D))
    grid = (num_tokens, triton.cdiv(D, columns))
    sum_kernel[grid](slots_RD, out_TD, D, top_k, COLUMNS=columns, UNIT=unit_of(D), **options(warps=4))
    return out_TD


def backward(
    p: Pass,
    d_out_TD: Tensor,
    gate_RF: Tensor,
    up_RF: Tensor | None,
    weights_R: Tensor | None,
    weights: list[Tensor | None],
    train: bool,
):
    """d_x_TD, d_weights_R or None, and with `train` the gradients of w1, w2, w3, b1, b2 and b3, None where there is
    none.

    Tokens come before weights: the slots' gradients, the largest array, are gone when those of the weights are made.
    """
    w1, w2, w3, _, b2_ED, _ = weights
    assert w1 is not None
    assert w2 is not None
    (T, D), F, R, E, B = p.x_TD.shape, p.hidden_dim, p.num_rows, len(p.counts_E), p.tiles_3B.shape[1]
    d_gate_RF, hidden_RF, tile = p.new(R, F), p.new(R, F), p.tiles.hidden
    d_up_RF = None if up_RF is None else p.new(R, F)
    d_weights_CR = None
    if weights_R is not None:
        d_weights_CR = torch.empty(triton.cdiv(F, tile.columns), R, dtype=torch.float32, device=p.x_TD.device)
    hidden_kernel[p.grid(tile, F)](
        d_out_TD, p.order_R, weights_R, w2, b2_ED, gate_RF, up_RF, d_gate_RF, d_up_RF, hidden_RF, d_weights_CR,
        p.tiles_3B, B, E, R, D, F, p.top_k, *w2.stride()[:2],
        **p.activation, **p.sizes(tile), EVEN_DEPTH=D % tile.depth == 0, EVEN_COLUMNS=F % tile.columns == 0,
        UNIT=unit_of(D, F, *w2.stride()[:2]),
    )  # fmt: skip
    d_slots_RD, tile, strides = p.new(R, D), p.tiles.tokens, _strides(w1, w3)
    tokens_kernel[p.grid(tile, D)](
        d_gate_RF, d_up_RF, p.order_R, w1, w3, d_slots_RD, p.tiles_3B,
        B, E, D, F, *strides,
        **p.sizes(tile), EVEN_DEPTH=F % tile.depth == 0, EVEN_COLUMNS=D % tile.columns == 0,
        UNIT=unit_of(D, F, *strides),
    )  # fmt: skip
    d_x_TD = sum_of_slots(d_slots_RD, T, p.top_k)
    del d_slots_RD
    d_weights_R = None if d_weights_CR is None else d_weights_CR.sum(0)
    if not train:
        return d_x_TD, d_weights_R, [None] * 6
    d_w1, d_w2, d_w3, d_b1, d_b2, d_b3 = (None if w is None else p.new(*w.shape) for w in weights)
    assert d_w1 is not None
    assert d_w2 is not None
    weights_gradient(p, d_out_TD, hidden_RF, d_w2, d_b2, weights_R=weights_R, gather="a")
    del hidden_RF
    weights_gradient(p, d_gate_RF, p.x_TD, d_w1, d_b1, also=(d_up_RF, d_w3, d_b3), gather="b")
    return d_x_TD, d_weights_R, [d_w1, d_w2, d_w3, d_b1, d_b2, d_b3]


def weights_gradient(
    p: Pass,
    a_M: Tensor,
    b_N: Tensor,
    d_w_EMN: Tensor,
    d_bias_EM: Tensor | None,
    *,
    weights_R: Tensor | None = None,
    also: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    gather: str,
) -> None:
    """d_w_EMN and d_bias_EM, in place, and those of a second a; `gather` says which side is one of tokens."""
    tile, (E, M, N) = p.tiles.weights, d_w_EMN.shape
    # Triton gives half of the stages to the loads of which rows are gathered, and half to those of the rows: of five
    # stages there are two tiles of rows, for which any room of two stages is enough; of three one, and nothing ahead.
    stages = tile.stages if p.order_R is None or tile.stages == 1 else 2 * max(tile.stages, 3) - 1
    also_M, d_also_EMN, d_also_bias_EM = also
    weights_kernel[(E * triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),)](
        a_M, also_M, b_N, p.order_R, weights_R, d_w_EMN, d_also_EMN, d_bias_EM, d_also_bias_EM, p.ends_E, M, N, p.top_k,
        GATHER_A=gather == "a", GATHER_B=gather == "b",
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        EVEN_ROWS=M % tile.rows == 0, EVEN_COLUMNS=N % tile.columns == 0, UNIT=unit_of(M, N),
        **p.precision, **options(tile.warps, stages),
    )  # fmt: skip
