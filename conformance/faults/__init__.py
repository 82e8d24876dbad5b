"""conformance, the faults: named wrong routers, each a minimal change to the reference, with where it happened.

They judge the judge: every fault is accused, at its own stage. They are the diagnosis as well: `diagnose` names the
faults that reproduce what a subject returned.
"""

from conformance.faults import (  # noqa: F401  (they register)
    config,
    gate,
    groups,
    run,
    score,
    select,
    selectors,
    special_weights,
    weights,
)
from conformance.faults.fault import REGISTER, Fault, FaultySubject, run_under
from conformance.faults.table import kill_table
from conformance.requirements import STAGES

FAULTS: tuple[Fault, ...] = tuple(sorted(REGISTER.values(), key=lambda fault: STAGES.index(fault.stage)))

__all__ = ["FAULTS", "Fault", "FaultySubject", "kill_table", "run_under"]
