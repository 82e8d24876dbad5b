"""conformance, a fault between devices: one thing done wrong in a simulated sharded subject, and what it breaks."""

from collections.abc import Iterable
from dataclasses import dataclass

from conformance.core.judge import CHECKS, Judge, Violation
from conformance.core.trial import accuse, load_suite
from conformance.faults.layer_fault import FaultyLayer, LayerFault, registrars, stage_requirements


@dataclass(frozen=True, kw_only=True, eq=False)
class LayoutFault(LayerFault):
    """A minimal change to the reference laid over devices."""

    @property
    def method(self) -> str:
        """The method of a subject that is faulty; the others are right."""
        load_suite()
        return CHECKS[self.requirement].method


LAYOUT_REGISTER: dict[str, LayoutFault] = {}
"""Every fault by name; filled as the modules of this package are imported."""


replaces, surrounds = registrars(LAYOUT_REGISTER, LayoutFault)


class FaultyLayout(FaultyLayer):
    """The sharded reference in float32 with one fault in one of its methods."""

    def dispatch(self, expert_ids_by_shard, layout, spec):
        return self._run("dispatch", expert_ids_by_shard, layout, spec)

    def sharded_layer(self, x_by_shard, params, spec, layout, **inputs):
        return self._run("sharded_layer", x_by_shard, params, spec, layout, **inputs)

    def sharded_gradients(self, x_by_shard, params, spec, layout, d_output_by_shard, **inputs):
        return self._run("sharded_gradients", x_by_shard, params, spec, layout, d_output_by_shard, **inputs)


def layout_kill_table(faults: Iterable[LayerFault], seed: int, *, examples: int) -> dict[str, list[str]]:
    """The requirements of its own stage that accuse each fault."""
    return {
        fault.name: list(
            accuse(Judge(FaultyLayout(fault)), seed=seed, examples=examples, ids=stage_requirements(fault.stage))
        )
        for fault in faults
    }


def first_accusation(fault: LayerFault, *, seed: int, examples: int) -> Violation | None:
    """What accuses the fault, its own requirement tried first."""
    ids = sorted(stage_requirements(fault.stage), key=lambda id: id != fault.requirement)
    found = accuse(Judge(FaultyLayout(fault)), seed=seed, examples=examples, ids=ids, first=True)
    return next(iter(found.values()), None)
