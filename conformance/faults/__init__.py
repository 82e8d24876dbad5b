"""conformance, the faults: named wrong routers, each a minimal change to the reference, with where it happened.

They judge the judge: every fault is accused, at its own stage. They are the diagnosis as well: `diagnose` names the
faults that reproduce what a subject returned.
"""

from conformance.core.register import STAGES
from conformance.faults.fault import REGISTER, Fault, FaultySubject, run_under
from conformance.faults.table import kill_table
from conformance.router.config import faults as config  # noqa: F401  (they register)
from conformance.router.gate import faults as gate  # noqa: F401  (they register)
from conformance.router.groups import faults as groups  # noqa: F401  (they register)
from conformance.router.run import faults as run  # noqa: F401  (they register)
from conformance.router.score import faults as score  # noqa: F401  (they register)
from conformance.router.select import faults as select  # noqa: F401  (they register)
from conformance.router.select import faults_selectors as selectors  # noqa: F401  (they register)
from conformance.router.weights import faults as weights  # noqa: F401  (they register)
from conformance.router.weights import faults_special as special_weights  # noqa: F401  (they register)

FAULTS: tuple[Fault, ...] = tuple(sorted(REGISTER.values(), key=lambda fault: STAGES.index(fault.stage)))

__all__ = ["FAULTS", "Fault", "FaultySubject", "kill_table", "run_under"]
