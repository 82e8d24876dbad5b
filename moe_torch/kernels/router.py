"""moe_torch, kernels: a router in one kernel, and the gradient of its weights in another.

A program has some tokens and all their columns in registers, as (G, P): groups, and experts of a group, each padded to
a power of two. What is ranked is an integer with the order of the float; of equal ones the lower column is the best.

Legend: T tokens, E choices, K top_k, G groups, P experts per group, L groups kept.
"""

import triton.language as tl

from moe_torch.kernels.jit import jit

NEG_INF = tl.constexpr(-2139095041)
"""The rank of -inf: nothing of this rank or below is chosen."""
DROPPED = tl.constexpr(-2147483648)
"""The rank of what is out: a column past the last, one of a dropped group, one that is chosen already."""


@jit
def rank_of(values):
    """Integers in the order of the floats; -0.0 is 0.0."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@jit
def value_of(ranks):
    """The float of a rank."""
    return tl.where(ranks < 0, ranks ^ 0x7FFFFFFF, ranks).to(tl.float32, bitcast=True)


@jit
def score(z, FUNC: tl.constexpr):
    """sigmoid, or sqrt(log(1 + exp(z))), entry by entry."""
    if FUNC == "sigmoid":
        s = tl.sigmoid(z)
    else:
        e = tl.exp(-tl.abs(z))
        u = 1.0 + e
        # log1p: what 1 + e lost of e is made up for by e / (u - 1).
        log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
        s = tl.sqrt_rn(tl.where(z > 0, z, 0.0) + log1p)
    return s


@jit
def score_slope(z, s, FUNC: tl.constexpr):
    """The derivative of `score`, given its value; 0 where the score is 0."""
    if FUNC == "sigmoid":
        d = s * (1.0 - s)
    else:
        d = tl.where(s > 0, tl.sigmoid(z) / (2.0 * tl.where(s > 0, s, 1.0)), 0.0)
    return d


@jit
def softmax_stats(z):
    """(the largest, the sum of exp(z - largest)) of each row; a row of -inf alone sums to 1."""
    largest = tl.max(z, 1)
    largest = tl.where(largest < -3.4028234e38, -3.4028234e38, largest)
    total = tl.sum(tl.exp(z - largest[:, None]), 1)
    return largest, tl.where(total < 1.0, 1.0, total)


@jit
def divisor_of(norm, norm_eps, NORM_CLAMP: tl.constexpr):
    """norm + eps, or at least eps."""
    if NORM_CLAMP:
        found = tl.where(norm < norm_eps, norm_eps, norm)
    else:
        found = norm + norm_eps
    return found


# Numbers of tokens, eps and scale are no part of what is compiled.
@jit(do_not_specialize=["num_tokens"])
def route_kernel(
    logits_TE, bias_E, mask_T, ids_TK, weights_TK, group_ids_TL, num_tokens, stride, norm_eps, scale,
    G: tl.constexpr, P: tl.constexpr, L: tl.constexpr, K: tl.constexpr,
    GROUPS: tl.constexpr, EACH: tl.constexpr, KEPT: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr,
    FUNC: tl.constexpr, SELECTED: tl.constexpr, BY_LOGIT: tl.constexpr, GROUP_SCORE_K: tl.constexpr,
    NORM: tl.constexpr, NORM_CLAMP: tl.constexpr, LOGIT_SCALE: tl.constexpr,
):  # fmt: skip
    """ids and weights of the K best columns, best first; -1 and 0 where nothing above -inf is left.

    GROUPS, EACH, KEPT and SLOTS are powers of two of at least G, P, L and K. Without group_ids_TL there is one group.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < num_tokens
    routed = there
    if mask_T is not None:
        routed = there & (tl.load(mask_T + token, mask=there, other=0) != 0)
    g, p = tl.arange(0, GROUPS), tl.arange(0, EACH)
    column = g[:, None] * P + p[None, :]
    is_column = (g < G)[:, None] & (p < P)[None, :]
    row = token.to(tl.int64) * stride
    inside = routed[:, None, None] & is_column[None, :, :]
    z3 = tl.load(logits_TE + row[:, None, None] + column[None, :, :], mask=inside, other=0.0).to(tl.float32)
    z3 = tl.where(is_column[None, :, :], z3 * LOGIT_SCALE, float("-inf"))
    if FUNC == "softmax":
        largest, total = softmax_stats(tl.reshape(z3, (TOKENS, GROUPS * EACH)))
    if BY_LOGIT:
        choice = z3
    elif FUNC == "softmax":
        choice = tl.exp(z3 - largest[:, None, None]) / total[:, None, None]
    else:
        choice = score(z3, FUNC)
    if bias_E is not None:
        choice += tl.load(bias_E + column, mask=is_column, other=0.0).to(tl.float32)[None, :, :]
    # A logit of -inf is never chosen, whatever its score and bias.
    rank3 = tl.where(z3 == float("-inf"), NEG_INF, rank_of(choice))
    rank3 = tl.where(is_column[None, :, :], rank3, DROPPED)
    if group_ids_TL is not None:
        left = rank3
        group_score = tl.zeros((TOKENS, GROUPS), tl.float32)
        for _ in tl.static_range(GROUP_SCORE_K):
            best = tl.max(left, 2)
            group_score += value_of(best)
            at = tl.min(tl.where(left == best[:, :, None], p[None, None, :], EACH), 2)
            left = tl.where(p[None, None, :] == at[:, :, None], DROPPED, left)
        group_rank = tl.where((g < G)[None, :], rank_of(group_score), DROPPED)
        kept = tl.zeros((TOKENS, GROUPS), tl.int32)
        slot = tl.arange(0, KEPT)
        group_ids = tl.zeros((TOKENS, KEPT), tl.int32)
        for j in tl.static_range(L):
            best = tl.max(group_rank, 1)
            at = tl.min(tl.where(group_rank == best[:, None], g[None, :], GROUPS), 1)
            hit = g[None, :] == at[:, None]
            kept = tl.where(hit, 1, kept)
            group_rank = tl.where(hit, DROPPED, group_rank)
            group_ids = tl.where((slot == j)[None, :], at[:, None], group_ids)
        at_group = token.to(tl.int64)[:, None] * L + slot[None, :]
        tl.store(group_ids_TL + at_group, group_ids.to(tl.int64), mask=there[:, None] & (slot < L)[None, :])
        rank3 = tl.where(kept[:, :, None] != 0, rank3, DROPPED)
    rank = tl.reshape(rank3, (TOKENS, GROUPS * EACH))
    place = tl.arange(0, GROUPS * EACH)
    slot = tl.arange(0, SLOTS)
    ids = tl.full((TOKENS, SLOTS), -1, tl.int32)
    for j in tl.static_range(K):
        best = tl.max(rank, 1)
        at = tl.min(tl.where(rank == best[:, None], place[None, :], GROUPS * EACH), 1)
        rank = tl.where(place[None, :] == at[:, None], DROPPED, rank)
        found = tl.where(best > NEG_INF, at // EACH * P + at % EACH, -1)
        ids = tl.where((slot == j)[None, :], found[:, None], ids)
    ids = tl.where(routed[:, None], ids, -1)
    used = ids >= 0
    z = tl.load(logits_TE + row[:, None] + ids, mask=used, other=0.0).to(tl.float32) * LOGIT_SCALE
    if SELECTED:
        largest, total = softmax_stats(tl.where(used, z, float("-inf")))
    if FUNC == "softmax":
        weights = tl.exp(z - largest[:, None]) / total[:, None]
    else:
        weights = score(z, FUNC)
    weights = tl.where(used, weights, 0.0)
    if NORM:
        divisor = divisor_of(tl.sum(weights, 1), norm_eps, NORM_CLAMP)
        weights = weights / tl.where(divisor == 0, 1.0, divisor)[:, None]
    at_slot = token.to(tl.int64)[:, None] * K + slot[None, :]
    stored = there[:, None] & (slot < K)[None, :]
    tl.store(ids_TK + at_slot, ids.to(tl.int64), mask=stored)
    tl.store(weights_TK + at_slot, weights * scale, mask=stored)


@jit(do_not_specialize=["num_tokens"])
def route_backward_kernel(
    d_weights_TK, logits_TE, ids_TK, d_logits_TE, num_tokens, stride, num_logits, norm_eps, scale,
    K: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr,
    FUNC: tl.constexpr, SELECTED: tl.constexpr,
    NORM: tl.constexpr, NORM_CLAMP: tl.constexpr, LOGIT_SCALE: tl.constexpr,
):  # fmt: skip
    """d_logits, 0 but for the chosen columns; a softmax over all spreads it. The choice is not differentiated."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < num_tokens
    slot = tl.arange(0, SLOTS)
    at_slot = token.to(tl.int64)[:, None] * K + slot[None, :]
    inside = there[:, None] & (slot < K)[None, :]
    ids = tl.load(ids_TK + at_slot, mask=inside, other=-1).to(tl.int32)
    used = ids >= 0
    routed = tl.max(ids, 1) >= 0
    d = tl.load(d_weights_TK + at_slot, mask=used, other=0.0).to(tl.float32) * scale
    row = token.to(tl.int64) * stride
    z = tl.load(logits_TE + row[:, None] + ids, mask=used, other=0.0).to(tl.float32) * LOGIT_SCALE
    column = tl.arange(0, COLUMNS)
    is_column = column < num_logits
    if SELECTED:
        largest, total = softmax_stats(tl.where(used, z, float("-inf")))
    elif FUNC == "softmax":
        all_z = tl.load(
            logits_TE + row[:, None] + column[None, :], mask=routed[:, None] & is_column[None, :], other=0.0
        ).to(tl.float32) * LOGIT_SCALE  # fmt: skip
        all_z = tl.where(is_column[None, :], all_z, float("-inf"))
        largest, total = softmax_stats(all_z)
    if FUNC == "softmax":
        s = tl.exp(z - largest[:, None]) / total[:, None]
    else:
        s = score(z, FUNC)
    s = tl.where(used, s, 0.0)
    if NORM:
        norm = tl.sum(s, 1)
        divisor = divisor_of(norm, norm_eps, NORM_CLAMP)
        # As in `routing.normalise`: over such a divisor the weight is a constant.
        vanishing = divisor < 1.1754944e-38 * 1024
        divisor = tl.where(vanishing, 1.0, divisor)
        pull = tl.sum(d * s, 1) / divisor
        if NORM_CLAMP:
            pull = tl.where(norm < norm_eps, 0.0, pull)
        d = tl.where(vanishing[:, None], 0.0, (d - pull[:, None]) / divisor[:, None])
    d = tl.where(used, d, 0.0)
    spread = tl.sum(d * s, 1)
    if SELECTED:
        d = s * (d - spread[:, None])
    elif FUNC == "softmax":
        d = s * d
    else:
        d = d * score_slope(z, s, FUNC)
    d_row = tl.zeros((TOKENS, COLUMNS), tl.float32)
    if FUNC == "softmax":
        if not SELECTED:
            d_row -= tl.exp(all_z - largest[:, None]) / total[:, None] * spread[:, None]
    for j in tl.static_range(K):
        own = (slot == j)[None, :]
        at = tl.sum(tl.where(own, ids, 0), 1)
        d_row += tl.where(column[None, :] == at[:, None], tl.sum(tl.where(own, d, 0.0), 1)[:, None], 0.0)
    d_row = tl.where(routed[:, None], d_row * LOGIT_SCALE, 0.0)
    at_column = token.to(tl.int64)[:, None] * num_logits + column[None, :]
    tl.store(d_logits_TE + at_column, d_row.to(d_logits_TE.dtype.element_ty), mask=there[:, None] & is_column[None, :])
