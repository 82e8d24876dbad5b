"""moe_torch, kernels: the backward pass of the experts in three kernels: of hidden values, of tokens and of weights.

The gradient of a weight of the router is <d_output @ w2, hidden> + <d_output, b2>: outputs of slots are never kept.

Legend: T tokens, D model dim, F expert hidden dim, E experts, K top_k, R = T * K rows and slots, M and N the axes of a
weight.
"""

import triton.language as tl

from moe_torch.kernels.activation import activated, activated_slope, clamped_up, clamped_up_slope
from moe_torch.kernels.jit import jit
from moe_torch.kernels.tiles import place, product, read, rows_of, slots_of, tokens_of, whole


@jit
def finish_hidden(
    d_hidden, weight, row_in, base, f, gate_RF, up_RF, d_gate_RF, d_up_RF, hidden_RF, F,
    NAME: tl.constexpr, ALPHA: tl.constexpr, OFFSET: tl.constexpr, CLAMP: tl.constexpr, CLAMP_AT: tl.constexpr,
    BETA: tl.constexpr, LINEAR_BETA: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Stores what follows from d_hidden, for the columns f; returns the sum over them of d_hidden * hidden."""
    at = base + (tl.arange(0, ROWS)[:, None] * F + f[None, :])
    inside = row_in[:, None] & (f < F)[None, :]
    gate = tl.load(gate_RF + at, mask=inside, other=0.0).to(tl.float32)
    hidden = activated(gate, NAME, ALPHA, CLAMP, CLAMP_AT, BETA)
    weighted = d_hidden * weight[:, None]
    d_gate = weighted
    if up_RF is not None:
        up = tl.load(up_RF + at, mask=inside, other=0.0).to(tl.float32)
        d_up = clamped_up_slope(weighted * hidden, up, CLAMP, LINEAR_BETA)
        tl.store(d_up_RF + at, d_up.to(d_up_RF.dtype.element_ty), mask=inside)
        offset_up = clamped_up(up, OFFSET, CLAMP, LINEAR_BETA)
        hidden = hidden * offset_up
        d_gate = weighted * offset_up
    # Columns past F have a d_hidden of 0.
    d_weight = tl.sum(d_hidden * hidden, 1)
    tl.store(hidden_RF + at, (hidden * weight[:, None]).to(hidden_RF.dtype.element_ty), mask=inside)
    d_gate = d_gate * activated_slope(gate, NAME, ALPHA, CLAMP, CLAMP_AT, BETA)
    tl.store(d_gate_RF + at, d_gate.to(d_gate_RF.dtype.element_ty), mask=inside)
    return d_weight


@jit(do_not_specialize=["num_tiles", "num_rows"])
def hidden_kernel(
    d_out_TD, order_R, weights_R, w2, b2_ED, gate_RF, up_RF, d_gate_RF, d_up_RF, hidden_RF, d_weights_CR, tiles_3B,
    num_tiles, num_experts, num_rows, D, F, top_k, w2_E, w2_D,
    NAME: tl.constexpr, ALPHA: tl.constexpr, OFFSET: tl.constexpr, CLAMP: tl.constexpr, CLAMP_AT: tl.constexpr,
    BETA: tl.constexpr, LINEAR_BETA: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """d_gate and d_up of each row; hidden times its weight, for the gradient of w2; and parts of d_weights.

    With d = d_out[t] @ w2[e], which is the gradient of weight * hidden: d_weights_CR[c, s] is the sum over the columns
    of tile c of d * hidden, plus <d_out[t], b2[e]> in tile 0. A slot without an expert gets 0 there.
    """
    D, F, w2_E, w2_D = whole(D, UNIT), whole(F, UNIT), whole(w2_E, UNIT), whole(w2_D, UNIT)
    tile, column = place(num_tiles, F, COLUMNS, GROUP)
    expert = tl.load(tiles_3B + tile)
    r = tl.arange(0, ROWS)
    first, row_in = rows_of(tiles_3B, num_tiles, tile, r)
    slot = slots_of(order_R, first + r, row_in)
    d_weight = tl.zeros((ROWS,), tl.float32)
    if expert < num_experts:
        token = tokens_of(slot, top_k)
        f = column * COLUMNS + tl.arange(0, COLUMNS)
        f_in = f < F
        d = tl.arange(0, DEPTH)
        e = expert.to(tl.int64)
        d_out_at = d_out_TD + token[:, None] * D + d[None, :]
        w2_at = (w2 + e * w2_E) + d[:, None] * w2_D + f[None, :]
        d_hidden = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, D, DEPTH):
            d_in = d < D - k
            d_out = read(d_out_at, row_in, d_in, True, not EVEN_DEPTH)
            w2_tile = read(w2_at, d_in, f_in, not EVEN_DEPTH, not EVEN_COLUMNS)
            d_hidden = product(d_out, w2_tile, d_hidden, PRECISION, WIDEN)
            if b2_ED is not None:
                if d_weights_CR is not None:
                    b2 = tl.load(b2_ED + e * D + k + d, mask=d_in, other=0.0).to(tl.float32)
                    d_weight += tl.sum(d_out.to(tl.float32) * b2[None, :], 1)
            d_out_at += DEPTH
            w2_at += DEPTH * w2_D
        if column != 0:
            d_weight = tl.zeros((ROWS,), tl.float32)
        weight = tl.full((ROWS,), 1.0, tl.float32)
        if weights_R is not None:
            weight = tl.load(weights_R + slot, mask=row_in, other=0.0).to(tl.float32)
        # Half of the columns at a time: what an entry needs at once does not fit into registers for all of them.
        left, right = tl.split(tl.permute(tl.reshape(d_hidden, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        half = column * COLUMNS + tl.arange(0, COLUMNS // 2)
        base = first.to(tl.int64) * F
        d_weight += finish_hidden(
            left, weight, row_in, base, half, gate_RF, up_RF, d_gate_RF, d_up_RF, hidden_RF, F,
            NAME, ALPHA, OFFSET, CLAMP, CLAMP_AT, BETA, LINEAR_BETA, ROWS,
        )  # fmt: skip
        d_weight += finish_hidden(
            right, weight, row_in, base, half + COLUMNS // 2, gate_RF, up_RF, d_gate_RF, d_up_RF, hidden_RF, F,
            NAME, ALPHA, OFFSET, CLAMP, CLAMP_AT, BETA, LINEAR_BETA, ROWS,
        )  # fmt: skip
    if d_weights_CR is not None:
        tl.store(d_weights_CR + column.to(tl.int64) * num_rows + slot, d_weight, mask=row_in)


@jit(do_not_specialize=["num_tiles"])
def tokens_kernel(
    d_gate_RF, d_up_RF, order_R, w1, w3, d_slots_RD, tiles_3B,
    num_tiles, num_experts, D, F, w1_E, w1_F, w3_E, w3_F,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """d_slots[s] = d_gate[r] @ w1[e] + d_up[r] @ w3[e] with s = order[r]; 0 in a slot without an expert."""
    D, F, w1_E, w1_F = whole(D, UNIT), whole(F, UNIT), whole(w1_E, UNIT), whole(w1_F, UNIT)
    w3_E, w3_F = whole(w3_E, UNIT), whole(w3_F, UNIT)
    tile, column = place(num_tiles, D, COLUMNS, GROUP)
    expert = tl.load(tiles_3B + tile)
    r = tl.arange(0, ROWS)
    first, row_in = rows_of(tiles_3B, num_tiles, tile, r)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    d = column * COLUMNS + tl.arange(0, COLUMNS)
    d_in = d < D
    if expert < num_experts:
        f = tl.arange(0, DEPTH)
        e = expert.to(tl.int64)
        row_at, steps = first.to(tl.int64) * F + (r[:, None] * F + f[None, :]), tl.cdiv(F, DEPTH)
        # One loop over both halves: between two the loads would run dry.
        for step in range(0, steps if w3 is None else 2 * steps):
            rows, matrix, stride, k = d_gate_RF, w1 + e * w1_E, w1_F, step * DEPTH
            if w3 is not None:
                is_up = step >= steps
                rows, matrix = tl.where(is_up, d_up_RF, rows), tl.where(is_up, w3 + e * w3_E, matrix)
                stride, k = tl.where(is_up, w3_F, stride), tl.where(is_up, k - steps * DEPTH, k)
            f_in = f < F - k
            d_rows = read(rows + k + row_at, row_in, f_in, True, not EVEN_DEPTH)
            w = read(matrix + ((k + f)[:, None] * stride + d[None, :]), f_in, d_in, not EVEN_DEPTH, not EVEN_COLUMNS)
            total = product(d_rows, w, total, PRECISION, WIDEN)
    slot = slots_of(order_R, first + r, row_in)
    at_slot = slot[:, None] * D + d[None, :]
    tl.store(d_slots_RD + at_slot, total.to(d_slots_RD.dtype.element_ty), mask=row_in[:, None] & d_in[None, :])


@jit
def weights_kernel(
    a_M, also_M, b_N, order_R, weights_R, d_w_EMN, d_also_EMN, d_bias_EM, d_also_bias_EM, ends_E, M, N, top_k,
    GATHER_A: tl.constexpr, GATHER_B: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """d_w[e] = sum over the rows r of expert e of a[r].T b[r]; d_bias[e] = the sum of weight[r] * a[r].

    A side that is gathered is one of tokens: its row is order[r] // top_k. also_M, where given, is a second a for the
    same b, which is then read once. Exactly 0 for an expert without rows.
    """
    M, N = whole(M, UNIT), whole(N, UNIT)
    down, across = tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS)
    number = tl.program_id(0)
    expert = number // (down * across)
    inside = number % (down * across)
    m_tile, n_tile = inside % down, inside // down
    end = tl.load(ends_E + expert)
    start = tl.load(ends_E + expert - 1, mask=expert > 0, other=0)
    m = m_tile * ROWS + tl.arange(0, ROWS)
    n = n_tile * COLUMNS + tl.arange(0, COLUMNS)
    m_in, n_in = m < M, n < N
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if d_bias_EM is not None:
        bias = tl.zeros((ROWS,), tl.float32)
    if also_M is not None:
        also_total = tl.zeros((ROWS, COLUMNS), tl.float32)
        if d_also_bias_EM is not None:
            also_bias = tl.zeros((ROWS,), tl.float32)
    for first in range(start, end, DEPTH):
        row = first + tl.arange(0, DEPTH)
        row_in = row < end
        slot = slots_of(order_R, row, row_in)
        a_row = tokens_of(slot, top_k) if GATHER_A else row.to(tl.int64)
        b_row = tokens_of(slot, top_k) if GATHER_B else row.to(tl.int64)
        a_at = a_row[:, None] * M + m[None, :]
        a = read(a_M + a_at, row_in, m_in, True, not EVEN_ROWS)
        b = read(b_N + b_row[:, None] * N + n[None, :], row_in, n_in, True, not EVEN_COLUMNS)
        total = product(tl.trans(a), b, total, PRECISION, WIDEN)
        if d_bias_EM is not None:
            if weights_R is None:
                bias += tl.sum(a.to(tl.float32), 0)
            else:
                weight = tl.load(weights_R + slot, mask=row_in, other=0.0).to(tl.float32)
                bias += tl.sum(a.to(tl.float32) * weight[:, None], 0)
        if also_M is not None:
            also = read(also_M + a_at, row_in, m_in, True, not EVEN_ROWS)
            also_total = product(tl.trans(also), b, also_total, PRECISION, WIDEN)
            if d_also_bias_EM is not None:
                also_bias += tl.sum(also.to(tl.float32), 0)
    e = expert.to(tl.int64)
    base, at = e * M * N, m[:, None] * N + n[None, :]
    there = m_in[:, None] & n_in[None, :]
    tl.store(d_w_EMN + base + at, total.to(d_w_EMN.dtype.element_ty), mask=there)
    if also_M is not None:
        tl.store(d_also_EMN + base + at, also_total.to(d_also_EMN.dtype.element_ty), mask=there)
    if n_tile == 0:
        if d_bias_EM is not None:
            tl.store(d_bias_EM + e * M + m, bias.to(d_bias_EM.dtype.element_ty), mask=m_in)
        if d_also_bias_EM is not None:
            tl.store(d_also_bias_EM + e * M + m, also_bias.to(d_also_bias_EM.dtype.element_ty), mask=m_in)
