"""conformance, the faults between devices: named wrong sharded layers, each a minimal change to the reference."""

from conformance.faults import (  # noqa: F401  (they register)
    layout_backward,
    layout_dispatch,
    layout_forward,
)
from conformance.faults.layout_fault import LAYOUT_REGISTER, LayoutFault
from conformance.requirements import STAGES

LAYOUT_FAULTS: tuple[LayoutFault, ...] = tuple(
    sorted(LAYOUT_REGISTER.values(), key=lambda fault: STAGES.index(fault.stage))
)

__all__ = ["LAYOUT_FAULTS", "LayoutFault"]
