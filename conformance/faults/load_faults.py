"""conformance, the faults of load: named wrong counts, losses, capacities and replays, by stage."""

from conformance.faults import load_balance, load_capacity  # noqa: F401  (they register)
from conformance.faults.load_fault import LOAD_REGISTER, LoadFault
from conformance.requirements import STAGES

LOAD_FAULTS: tuple[LoadFault, ...] = tuple(sorted(LOAD_REGISTER.values(), key=lambda fault: STAGES.index(fault.stage)))

__all__ = ["LOAD_FAULTS", "LoadFault"]
