"""moe_ref: the reference. It says what a Mixture-of-Experts layer computes, in NumPy and float64."""

from moe_ref.routing import UNUSED, RoutingTrace, gate, route
from moe_ref.spec import RouterSpec

__all__ = ["UNUSED", "RouterSpec", "RoutingTrace", "gate", "route"]
