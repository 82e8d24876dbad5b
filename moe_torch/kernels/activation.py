"""moe_torch, kernels: what stands between the projections of an expert, and its gradient, in float32.

The meaning of each function is that of the same name in `moe_torch.experts`, which is `moe_ref.experts`.
"""

import triton.language as tl

from moe_torch.kernels.jit import jit


@jit
def tanh(z):
    """To the last bits near 0 too, where 1 - exp(-2 |z|) loses them."""
    e = tl.exp(-2.0 * tl.abs(z))
    far = (1.0 - e) / (1.0 + e)
    q = z * z
    near = z * (1.0 - q * (0.33333333 - q * (0.13333333 - q * (0.053968254 - q * 0.021869488))))
    return tl.where(q < 0.0625, near, tl.where(z < 0, -far, far))


@jit
def activation(z, NAME: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """silu (with alpha), gelu, gelu_tanh, situ (with beta), relu or relu2 of each entry."""
    if NAME == "silu":
        a = z * tl.sigmoid(ALPHA * z)
    elif NAME == "gelu":
        a = 0.5 * z * (1.0 + tl.erf(0.7071067811865476 * z))
    elif NAME == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u)
        a = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif NAME == "situ":
        a = BETA * tanh(z / BETA) * tl.sigmoid(z)
    else:
        r = tl.where(z > 0, z, 0.0)
        a = r if NAME == "relu" else r * r
    return a


@jit
def activation_slope(z, NAME: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """The derivative of each entry; that of relu at 0 is 0."""
    if NAME == "silu":
        s = tl.sigmoid(ALPHA * z)
        d = s + ALPHA * z * s * (1.0 - s)
    elif NAME == "gelu":
        d = 0.5 * (1.0 + tl.erf(0.7071067811865476 * z)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif NAME == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        d = s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif NAME == "situ":
        s = tl.sigmoid(z)
        t = tanh(z / BETA)
        d = s * ((1.0 - t * t) + BETA * t * (1.0 - s))
    elif NAME == "relu":
        d = tl.where(z > 0, 1.0, 0.0)
    else:
        d = tl.where(z > 0, 2.0 * z, 0.0)
    return d


@jit
def activated(
    z, NAME: tl.constexpr, ALPHA: tl.constexpr, CLAMP: tl.constexpr, CLAMP_AT: tl.constexpr, BETA: tl.constexpr
):
    """The activation's input is clamped from above before it, or its output after it."""
    if CLAMP is None:
        a = activation(z, NAME, ALPHA, BETA)
    elif CLAMP_AT == "before":
        a = activation(tl.where(z > CLAMP, CLAMP, z), NAME, ALPHA, BETA)
    else:
        a = activation(z, NAME, ALPHA, BETA)
        a = tl.where(a > CLAMP, CLAMP, a)
    return a


@jit
def activated_slope(
    z, NAME: tl.constexpr, ALPHA: tl.constexpr, CLAMP: tl.constexpr, CLAMP_AT: tl.constexpr, BETA: tl.constexpr
):
    """0 where the clamped value is above the limit."""
    d = activation_slope(z, NAME, ALPHA, BETA)
    if CLAMP is not None:
        clamped = z if CLAMP_AT == "before" else activation(z, NAME, ALPHA, BETA)
        d = tl.where(clamped <= CLAMP, d, 0.0)
    return d


@jit
def clamped_up(up, OFFSET: tl.constexpr, CLAMP: tl.constexpr, LINEAR_BETA: tl.constexpr):
    """The up half is clamped on both sides, or softly by a tanh, then offset."""
    u = up
    if CLAMP is not None:
        u = tl.where(u > CLAMP, CLAMP, tl.where(u < -CLAMP, -CLAMP, u))
    if LINEAR_BETA is not None:
        u = LINEAR_BETA * tanh(u / LINEAR_BETA)
    return u + OFFSET


@jit
def clamped_up_slope(d, up, CLAMP: tl.constexpr, LINEAR_BETA: tl.constexpr):
    """A clamp passes the gradient of a value exactly at its limit."""
    if LINEAR_BETA is not None:
        t = tanh(clamped_up(up, 0.0, CLAMP, None) / LINEAR_BETA)
        d = d * (1.0 - t * t)
    if CLAMP is not None:
        d = tl.where((up <= CLAMP) & (up >= -CLAMP), d, 0.0)
    return d
