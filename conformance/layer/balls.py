"""conformance, layer: balls. Numbers with a radius that follows every rounding, through sums, products and one expert.

Radii are made of the absolute values of what is summed, so that they scale with each row and each expert; their
constants are counts of roundings, worst case.

Legend: R rows of one expert, D model dim, F expert hidden dim.
"""

from dataclasses import dataclass

import numpy as np

from conformance.core.rounding import EPSILON, TINY
from moe_ref import ExpertSpec
from moe_ref.backward.layer import activation_slope
from moe_ref.experts import activated, activation, clamped_up
from moe_ref.specs.params import FeedForward

LIBRARY = 8
"""Roundings granted to exp, tanh and erf, and to what is built of one of them."""
STEEPEST = {"silu": 1.1, "gelu": 1.13, "gelu_tanh": 1.13, "relu": 1.0, "situ": 1.1}
"""The largest slope of each activation; relu2 has none."""
BENT = {"silu": 0.5, "gelu": 0.8, "gelu_tanh": 0.85, "relu": 0.0, "relu2": 2.0, "situ": 0.7}
"""The largest second derivative, away from kinks; that of silu grows with alpha, that of situ with 1 / beta."""


@dataclass(frozen=True, kw_only=True)
class Ball:
    """Numbers that are each within `radius` of `centre`, however they were rounded in a dtype."""

    centre: np.ndarray
    radius: np.ndarray
    dtype: str

    @property
    def unit(self) -> float:
        """One rounding."""
        return EPSILON[self.dtype] / 2

    @property
    def largest(self) -> np.ndarray:
        """The absolute value at most."""
        return np.abs(self.centre) + self.radius

    def __getitem__(self, key) -> "Ball":
        return self.made(self.centre[key], self.radius[key])

    @property
    def T(self) -> "Ball":
        return self.made(self.centre.T, self.radius.T)

    def made(self, centre, radius) -> "Ball":
        """Another ball of this dtype."""
        return Ball(centre=centre, radius=radius, dtype=self.dtype)

    def rounded(self, times: float = 1) -> "Ball":
        """After so many more roundings of the number itself; one that underflows may be flushed to 0."""
        floor = np.where(self.largest > 0, TINY[self.dtype], 0)
        return self.made(self.centre, self.radius + times * (self.unit * self.largest + floor))

    def to(self, dtype: str) -> "Ball":
        """The same numbers in another dtype, rounded to it where it is the narrower one."""
        moved = Ball(centre=self.centre, radius=self.radius, dtype=dtype)
        return moved.rounded() if EPSILON[dtype] > EPSILON[self.dtype] else moved

    def __add__(self, other: "Ball") -> "Ball":
        return self.made(self.centre + other.centre, self.radius + other.radius).rounded()

    def __mul__(self, other: "Ball") -> "Ball":
        radius = np.abs(self.centre) * other.radius + self.radius * other.largest
        return self.made(self.centre * other.centre, radius).rounded()

    def times(self, factor) -> "Ball":
        """Times numbers that are exact."""
        return self.made(self.centre * factor, self.radius * np.abs(factor)).rounded()

    def sum(self, axis) -> "Ball":
        """Summed, in whatever order."""
        return self.made(self.centre.sum(axis), self._of_sum(self.largest, axis) + self.radius.sum(axis))

    def __matmul__(self, other: "Ball") -> "Ball":
        radius = np.abs(self.centre) @ other.radius + self.radius @ other.largest
        terms = self.largest @ other.largest
        length = self.centre.shape[-1]
        return self.made(self.centre @ other.centre, radius + self._sum_unit(length) * terms)

    def _of_sum(self, sizes, axis):
        return self._sum_unit(sizes.shape[axis]) * sizes.sum(axis)

    def _sum_unit(self, length: int) -> float:
        """Relative error of a sum of products: each is rounded, and each addition; narrow dtypes add in float32."""
        adding = min(self.unit, EPSILON["float32"] / 2)
        return 2 * self.unit + length * adding


def exact(values, dtype: str) -> Ball:
    """float32 numbers as a subject gets them; a narrower dtype rounds them first."""
    values = np.asarray(values, dtype=np.float64)
    return Ball(centre=values, radius=np.zeros(values.shape), dtype="float32").to(dtype)


def narrower(first: str, second: str) -> str:
    """The dtype with the larger rounding."""
    return max(first, second, key=EPSILON.__getitem__)


# one expert


@dataclass(frozen=True, kw_only=True)
class FeedForwardBall:
    """The balls of an expert's intermediates."""

    input_RD: Ball
    gate_RF: Ball | None
    up_RF: Ball
    hidden_RF: Ball
    output_RD: Ball


def feed_forward(input_RD: Ball, weights: FeedForward, spec: ExpertSpec) -> FeedForwardBall:
    """The bounds of `moe_ref.experts.feed_forward`."""
    gate_RF = None if weights.w_gate_DF is None else project(input_RD, weights.w_gate_DF, weights.b_gate_F)
    up_RF = project(input_RD, weights.w_up_DF, weights.b_up_F)
    hidden_RF = act(up_RF, spec) if gate_RF is None else act(gate_RF, spec) * offset_up(up_RF, spec)
    return FeedForwardBall(
        input_RD=input_RD,
        gate_RF=gate_RF,
        up_RF=up_RF,
        hidden_RF=hidden_RF,
        output_RD=project(hidden_RF, weights.w_down_FD, weights.b_down_D),
    )


def project(rows: Ball, w_in_out, b_out) -> Ball:
    """rows @ w + b."""
    product = rows @ exact(w_in_out, rows.dtype)
    return product if b_out is None else product + exact(b_out, rows.dtype)


def act(z_RF: Ball, spec: ExpertSpec) -> Ball:
    """The activation with its clamp, which widens nothing."""
    steepest = 2 * z_RF.largest if spec.activation == "relu2" else STEEPEST[spec.activation]
    # A rounded exponent, or 1 + erf in the tail, is off by roundings of z, not of the small result.
    library = LIBRARY * z_RF.unit * np.maximum(z_RF.largest, np.abs(activation(z_RF.centre, spec)))
    return z_RF.made(activated(z_RF.centre, spec), steepest * z_RF.radius + library)


def offset_up(up_RF: Ball, spec: ExpertSpec) -> Ball:
    """The up half, clamped and offset; a tanh widens nothing, and is rounded as one."""
    roundings = 1 if spec.linear_beta is None else LIBRARY
    rounding = up_RF.unit * (roundings * up_RF.largest + abs(spec.up_offset))
    return up_RF.made(clamped_up(up_RF.centre, spec), up_RF.radius + rounding)


def slope(z_RF: Ball, spec: ExpertSpec) -> Ball:
    """The slope of the activation with its clamp; across a kink it can be that of either side."""
    centre = activation_slope(z_RF.centre, spec)
    argument = z_RF.radius + LIBRARY * z_RF.unit * z_RF.largest
    bent = BENT[spec.activation] * max(1.0, spec.alpha, 1 / spec.beta)
    radius = bent * argument + LIBRARY * z_RF.unit * (1 + np.abs(centre))
    if spec.activation == "relu":
        radius = radius + (np.abs(z_RF.centre) <= z_RF.radius)
    if spec.clamp is None:
        return z_RF.made(centre, radius)
    clamped = z_RF if spec.clamp_at == "before" else act(z_RF, spec.replace(clamp=None, clamp_at="before"))
    over = clamped.centre > spec.clamp
    near = np.abs(clamped.centre - spec.clamp) <= clamped.radius
    return z_RF.made(np.where(over, 0, centre), np.where(near, np.abs(centre) + radius, np.where(over, 0, radius)))


def up_slope(up_RF: Ball, spec: ExpertSpec) -> Ball:
    """1 inside the clamp, or the slope of its tanh, and 0 outside; at the clamp it can be either."""
    limit = np.inf if spec.clamp is None else spec.clamp
    if spec.linear_beta is not None:
        t_RF = np.tanh(np.clip(up_RF.centre, -limit, limit) / spec.linear_beta)
        # The slope of 1 - tanh ** 2 is at most 0.77 in size.
        moved_RF = 0.77 * (up_RF.radius + LIBRARY * up_RF.unit * up_RF.largest) / spec.linear_beta
        smooth = up_RF.made(1 - t_RF**2, moved_RF + LIBRARY * up_RF.unit)
        hard = up_slope(up_RF, spec.replace(linear_beta=None))
        return smooth * hard
    near = np.abs(np.abs(up_RF.centre) - limit) <= up_RF.radius if np.isfinite(limit) else False
    return up_RF.made((np.abs(up_RF.centre) <= limit) * 1.0, np.zeros(up_RF.centre.shape) + near)


def feed_forward_backward(d_output_RD: Ball, trace: FeedForwardBall, weights: FeedForward, spec: ExpertSpec):
    """The bounds of `moe_ref.gradient.feed_forward_backward`: of the input, and of the weights by name."""
    dtype = d_output_RD.dtype
    d_hidden_RF = d_output_RD @ exact(weights.w_down_FD, dtype).T
    grads = {"w_down_FD": trace.hidden_RF.T @ d_output_RD}
    if trace.gate_RF is None:
        d_up_RF, d_gate_RF = d_hidden_RF * slope(trace.up_RF, spec), None
    else:
        d_gate_RF = d_hidden_RF * offset_up(trace.up_RF, spec) * slope(trace.gate_RF, spec)
        d_up_RF = d_hidden_RF * act(trace.gate_RF, spec) * up_slope(trace.up_RF, spec)
    d_input_RD = d_up_RF @ exact(weights.w_up_DF, dtype).T
    grads["w_up_DF"] = trace.input_RD.T @ d_up_RF
    if d_gate_RF is not None:
        assert weights.w_gate_DF is not None
        d_input_RD = d_input_RD + d_gate_RF @ exact(weights.w_gate_DF, dtype).T
        grads["w_gate_DF"] = trace.input_RD.T @ d_gate_RF
    if spec.bias:
        grads |= {"b_down_D": d_output_RD.sum(0), "b_up_F": d_up_RF.sum(0)}
        grads |= {} if d_gate_RF is None else {"b_gate_F": d_gate_RF.sum(0)}
    return d_input_RD, grads
