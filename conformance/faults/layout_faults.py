"""conformance, the faults between devices: named wrong sharded layers, each a minimal change to the reference."""

from conformance.core.register import STAGES
from conformance.faults.layout_fault import LAYOUT_REGISTER, LayoutFault
from conformance.sharded.dispatch import faults as layout_dispatch  # noqa: F401  (they register)
from conformance.sharded.layout import faults as layout_forward  # noqa: F401  (they register)
from conformance.sharded.layout import faults_backward as layout_backward  # noqa: F401  (they register)

LAYOUT_FAULTS: tuple[LayoutFault, ...] = tuple(
    sorted(LAYOUT_REGISTER.values(), key=lambda fault: STAGES.index(fault.stage))
)

__all__ = ["LAYOUT_FAULTS", "LayoutFault"]
