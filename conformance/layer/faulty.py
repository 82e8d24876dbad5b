"""conformance, layer: what its faults share."""

from moe_ref import LayerSpec


def with_router(spec: LayerSpec, **changes) -> LayerSpec:
    """The layer with other fields of its router."""
    return spec.replace(router=spec.router.replace(**changes))


def with_experts(spec: LayerSpec, **changes) -> LayerSpec:
    """The layer with other fields of its experts."""
    return spec.replace(experts=spec.experts.replace(**changes))
