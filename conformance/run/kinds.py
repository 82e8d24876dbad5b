"""conformance, running: the one list of kinds, and the loading of their chapters."""

import importlib
import pkgutil
from typing import Any

from conformance.balance.kind import BALANCE
from conformance.core.case import Case
from conformance.core.fault import FAULTS, Fault, function_named
from conformance.core.kind import KIND_OF_STAGE, Kind
from conformance.core.register import STAGES
from conformance.layer.kind import LAYER
from conformance.router.kind import ROUTER
from conformance.sharded.kind import SHARDED
from conformance.training.kind import TRAINING

KINDS: tuple[Kind, ...] = (ROUTER, LAYER, SHARDED, BALANCE, TRAINING)
"""Every kind of thing that is judged, in the order of the data. A further kind is a folder and one line here."""


def _load(*names: str) -> None:
    """Import the modules of every chapter whose names begin so, chapter by chapter."""
    for name in names:
        for kind in KINDS:
            for stage in kind.stages:
                chapter = importlib.import_module(f"conformance.{kind.name}.{stage}")
                for module in pkgutil.iter_modules(chapter.__path__):
                    if module.name.partition("_")[0] == name:
                        importlib.import_module(f"{chapter.__name__}.{module.name}")


KIND_OF_STAGE.update({stage: kind for kind in KINDS for stage in kind.stages})
_load("requirements", "checks")


def load_faults() -> dict[str, Fault]:
    """Every fault by name, in the order of the stages."""
    _load("faults")
    for fault in FAULTS.values():
        for path in fault.patches:
            function_named(path)  # here, where it is no error of a subject
    return dict(sorted(FAULTS.items(), key=lambda item: STAGES.index(item[1].stage)))


def every_tag() -> set[str]:
    """The tags of the cases of every kind."""
    return {tag for kind in KINDS for tag in kind.case.TAGS}


def case_of_json(data: dict[str, Any]) -> Case:
    """A case of the kind whose keys the data has; of several the one with the most keys.

    Raises:
        ValueError: it has the keys of no kind.
    """
    fitting = [kind.case for kind in KINDS if data.keys() >= kind.case.KEYS]
    if not fitting:
        known = "; ".join(f"{kind.name}: {', '.join(sorted(kind.case.KEYS))}" for kind in KINDS)
        raise ValueError(f"a case has the keys of a kind ({known}), not {sorted(data)}")
    return max(fitting, key=lambda case: len(case.KEYS)).from_json(data)
