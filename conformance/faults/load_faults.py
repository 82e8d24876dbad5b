"""conformance, the faults of load: named wrong counts, losses, capacities and replays, by stage."""

from conformance.balance.capacity import faults as load_capacity  # noqa: F401  (they register)
from conformance.balance.load import faults as load_balance  # noqa: F401  (they register)
from conformance.core.register import STAGES
from conformance.faults.load_fault import LOAD_REGISTER, LoadFault

LOAD_FAULTS: tuple[LoadFault, ...] = tuple(sorted(LOAD_REGISTER.values(), key=lambda fault: STAGES.index(fault.stage)))

__all__ = ["LOAD_FAULTS", "LoadFault"]
