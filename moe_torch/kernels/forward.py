"""moe_torch, kernels: the forward pass of the experts in three kernels, up, down and the sum over the slots of a token.

Rows are gathered in the first and scattered in the second; no tensor of gathered rows exists. Every width and count is
taken as it is: masks, no padding.

Legend: T tokens, D model dim, F expert hidden dim, E experts, K top_k, R = T * K rows and slots.
"""

import triton.language as tl

from moe_torch.kernels.activation import activated, clamped_up
from moe_torch.kernels.jit import jit
from moe_torch.kernels.tiles import place, product, read, rows_of, slots_of, tokens_of, whole


@jit(do_not_specialize=["num_tiles"])
def up_kernel(
    x_TD, order_R, w1, w3, b1_EF, b3_EF, hidden_RF, gate_RF, up_RF, tiles_3B,
    num_tiles, num_experts, D, F, top_k, w1_E, w1_F, w3_E, w3_F,
    NAME: tl.constexpr, ALPHA: tl.constexpr, OFFSET: tl.constexpr, CLAMP: tl.constexpr, CLAMP_AT: tl.constexpr,
    BETA: tl.constexpr, LINEAR_BETA: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    EVEN_DEPTH: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """hidden[r] = act(x[t] @ w1[e].T + b1[e]) * up(x[t] @ w3[e].T + b3[e]) with t = order[r] // top_k, e of the tile.

    gate_RF and up_RF, where given, get the halves before the activation. w1_E and w1_F are strides in entries; the last
    axis has stride 1. Without w3 there is no up half; without order_R row r is token r.
    """
    D, F, w1_E, w1_F = whole(D, UNIT), whole(F, UNIT), whole(w1_E, UNIT), whole(w1_F, UNIT)
    w3_E, w3_F = whole(w3_E, UNIT), whole(w3_F, UNIT)
    tile, column = place(num_tiles, F, COLUMNS, GROUP)
    expert = tl.load(tiles_3B + tile)
    if expert < num_experts:
        r = tl.arange(0, ROWS)
        first, row_in = rows_of(tiles_3B, num_tiles, tile, r)
        token = slots_of(order_R, first + r, row_in)
        if order_R is not None:
            token = tokens_of(token, top_k)
        f = column * COLUMNS + tl.arange(0, COLUMNS)
        # A column past F reads one that there is, and is not stored.
        f_read = tl.where(f < F, f, 0)
        d = tl.arange(0, DEPTH)
        e = expert.to(tl.int64)
        x_at = x_TD + token[:, None] * D + d[None, :]
        w1_at = (w1 + e * w1_E) + f_read[None, :] * w1_F + d[:, None]
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        if w3 is not None:
            w3_at = (w3 + e * w3_E) + f_read[None, :] * w3_F + d[:, None]
            up = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, D, DEPTH):
            d_in = d < D - k
            x = read(x_at, row_in, d_in, True, not EVEN_DEPTH)
            gate = product(x, read(w1_at, d_in, d_in, not EVEN_DEPTH, False), gate, PRECISION, WIDEN)
            if w3 is not None:
                up = product(x, read(w3_at, d_in, d_in, not EVEN_DEPTH, False), up, PRECISION, WIDEN)
                w3_at += DEPTH
            x_at += DEPTH
            w1_at += DEPTH
        if b1_EF is not None:
            gate += tl.load(b1_EF + e * F + f_read).to(tl.float32)[None, :]
        base, at = first.to(tl.int64) * F, r[:, None] * F + f[None, :]
        inside = row_in[:, None] & (f < F)[None, :]
        if gate_RF is not None:
            tl.store(gate_RF + base + at, gate.to(gate_RF.dtype.element_ty), mask=inside)
        hidden = activated(gate, NAME, ALPHA, CLAMP, CLAMP_AT, BETA)
        if w3 is not None:
            if b3_EF is not None:
                up += tl.load(b3_EF + e * F + f_read).to(tl.float32)[None, :]
            if up_RF is not None:
                tl.store(up_RF + base + at, up.to(up_RF.dtype.element_ty), mask=inside)
            hidden = hidden * clamped_up(up, OFFSET, CLAMP, LINEAR_BETA)
        tl.store(hidden_RF + base + at, hidden.to(hidden_RF.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["num_tiles"])
def down_kernel(
    hidden_RF, order_R, weights_R, w2, b2_ED, slots_RD, tiles_3B,
    num_tiles, num_experts, D, F, w2_E, w2_D,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    EVEN_DEPTH: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """slots[s] = weight[s] * (hidden[r] @ w2[e].T + b2[e]) with s = order[r]; 0 in a slot without an expert.

    Without weights_R the weight is 1; without order_R row r is slot r.
    """
    D, F, w2_E, w2_D = whole(D, UNIT), whole(F, UNIT), whole(w2_E, UNIT), whole(w2_D, UNIT)
    tile, column = place(num_tiles, D, COLUMNS, GROUP)
    expert = tl.load(tiles_3B + tile)
    r = tl.arange(0, ROWS)
    first, row_in = rows_of(tiles_3B, num_tiles, tile, r)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    d = column * COLUMNS + tl.arange(0, COLUMNS)
    slot = slots_of(order_R, first + r, row_in)
    if expert < num_experts:
        d_read = tl.where(d < D, d, 0)
        f = tl.arange(0, DEPTH)
        e = expert.to(tl.int64)
        hidden_at = (hidden_RF + first.to(tl.int64) * F) + r[:, None] * F + f[None, :]
        w2_at = (w2 + e * w2_E) + d_read[None, :] * w2_D + f[:, None]
        for k in range(0, F, DEPTH):
            f_in = f < F - k
            hidden = read(hidden_at, row_in, f_in, True, not EVEN_DEPTH)
            total = product(hidden, read(w2_at, f_in, f_in, not EVEN_DEPTH, False), total, PRECISION, WIDEN)
            hidden_at += DEPTH
            w2_at += DEPTH
        if b2_ED is not None:
            total += tl.load(b2_ED + e * D + d_read).to(tl.float32)[None, :]
        if weights_R is not None:
            total = total * tl.load(weights_R + slot, mask=row_in, other=0.0).to(tl.float32)[:, None]
    at = slot[:, None] * D + d[None, :]
    tl.store(slots_RD + at, total.to(slots_RD.dtype.element_ty), mask=row_in[:, None] & (d < D)[None, :])


@jit
def sum_kernel(slots_TKD, out_TD, D, top_k, COLUMNS: tl.constexpr, UNIT: tl.constexpr):
    """out[t] = the sum over k = 0 .. K-1 of slots[t, k], in this order, in float32, rounded once."""
    D, token = whole(D, UNIT), tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in range(0, top_k):
        total += tl.load(slots_TKD + (token * top_k + k) * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_TD + token * D + d, total.to(out_TD.dtype.element_ty), mask=d < D)
