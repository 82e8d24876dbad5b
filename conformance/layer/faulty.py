"""conformance, layer: the reference with one fault in it, and what its faults share."""

from conformance.core.fault import Fault, faulty
from conformance.core.subject import Subject
from conformance.subjects.reference import Reference
from moe_ref import LayerSpec


def faulty_layer(fault: Fault) -> Subject:
    """The reference in float32 with one fault in one of its methods; its router and its other stages are right."""
    return faulty(Reference(), fault)


def with_router(spec: LayerSpec, **changes) -> LayerSpec:
    """The layer with other fields of its router."""
    return spec.replace(router=spec.router.replace(**changes))


def with_experts(spec: LayerSpec, **changes) -> LayerSpec:
    """The layer with other fields of its experts."""
    return spec.replace(experts=spec.experts.replace(**changes))
