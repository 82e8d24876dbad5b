"""conformance, the kill table: which requirements accuse which fault."""

from collections.abc import Iterable

from conformance.core.judge import CHECKS, Judge, Violation, stage_order
from conformance.core.register import REQUIREMENTS
from conformance.core.trial import DEFAULT_EXAMPLES, accuse, load_suite
from conformance.faults.fault import Fault, FaultySubject


def kill_table(faults: Iterable[Fault], seed: int, *, examples: int = DEFAULT_EXAMPLES, open: bool = False) -> dict:
    """The requirements that accuse each fault, earliest stage first.

    Args:
        faults: each is run through the whole suite, a few seconds for each.
        seed: of the generated cases.
        examples: cases per requirement.
        open: the subject shows its scores and groups as well.
    """
    return {
        fault: list(accuse(Judge(FaultySubject(fault, open=open)), seed=seed, examples=examples)) for fault in faults
    }


def first_accusation(fault: Fault, *, seed: int, open: bool = False) -> Violation | None:
    """What accuses the fault, its own requirement tried first, then those of the stages that may be accused."""
    load_suite()
    ids = [id for id in sorted(CHECKS, key=stage_order) if REQUIREMENTS[id].stage in fault.stages]
    ids.sort(key=lambda id: id != fault.requirement)
    found = accuse(Judge(FaultySubject(fault, open=open)), seed=seed, ids=ids, first=True)
    return next(iter(found.values()), None)
