"""moe_ref: the reference. It says what a Mixture-of-Experts layer computes, in NumPy and float64."""

from moe_ref.gradient import layer_backward
from moe_ref.layer import moe_layer
from moe_ref.routing import UNUSED, RoutingTrace, gate, route
from moe_ref.spec import ExpertSpec, LayerSpec, RouterSpec, SharedSpec
from moe_ref.weights import LayerParams, WeightLayout

__all__ = [
    "UNUSED",
    "ExpertSpec",
    "LayerParams",
    "LayerSpec",
    "RouterSpec",
    "RoutingTrace",
    "SharedSpec",
    "WeightLayout",
    "gate",
    "layer_backward",
    "moe_layer",
    "route",
]
