"""conformance, the faults of layers: named wrong layers, each a minimal change to the reference, by stage."""

from conformance.core.register import STAGES
from conformance.faults.layer_fault import LAYER_REGISTER, LayerFault
from conformance.layer.backward import faults as layer_backward  # noqa: F401  (they register)
from conformance.layer.combine import faults as layer_combine  # noqa: F401  (they register)
from conformance.layer.experts import faults as layer_experts  # noqa: F401  (they register)
from conformance.layer.layer import faults as layer_whole  # noqa: F401  (they register)
from conformance.layer.permute import faults as layer_permute  # noqa: F401  (they register)

LAYER_FAULTS: tuple[LayerFault, ...] = tuple(
    sorted(LAYER_REGISTER.values(), key=lambda fault: STAGES.index(fault.stage))
)

__all__ = ["LAYER_FAULTS", "LayerFault"]
