"""conformance, the faults of layers: named wrong layers, each a minimal change to the reference, by stage."""

from conformance.faults import (  # noqa: F401  (they register)
    layer_backward,
    layer_combine,
    layer_experts,
    layer_permute,
    layer_whole,
)
from conformance.faults.layer_fault import LAYER_REGISTER, LayerFault
from conformance.requirements import STAGES

LAYER_FAULTS: tuple[LayerFault, ...] = tuple(
    sorted(LAYER_REGISTER.values(), key=lambda fault: STAGES.index(fault.stage))
)

__all__ = ["LAYER_FAULTS", "LayerFault"]
