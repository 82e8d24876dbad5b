"""moe_ref, the spec of redundant experts: one expert at several places, and which of them a slot goes to.

Legend: E experts, P places, R replicas of the expert that has most.
"""

from dataclasses import dataclass

import numpy as np

from moe_ref.specs.base import Spec
from moe_ref.specs.checks import integer, one_axis, one_of, require

CHOICES = ("by_slot", "in_turn")


@dataclass(frozen=True, kw_only=True)
class ReplicaSpec(Spec):
    """Where copies of experts are; what a layer computes does not depend on it.

    Counts, records and gradients are of experts, not of places. Sources: deepseek-ai/EPLB (its phy2log is
    `placement`), vllm-project/vllm (`eplb_map_to_physical_and_record`).

    Raises:
        ValueError: a field is out of its range, or an expert has no place.
    """

    num_experts: int
    """E, of the router."""
    placement: tuple[int, ...]
    """placement[i] is the expert at place i; each expert has one place or more."""
    choice: str = "by_slot"
    """by_slot: slot k of token t goes to replica (t * K + k) mod R of its expert (vLLM); in_turn: the slots of an
    expert, in their order, go to its replicas in turn, so that these have as many rows, up to one. Replicas of an
    expert are numbered in the order of their places."""

    def __post_init__(self):
        super().__post_init__()
        integer("num_experts", self.num_experts, 1)
        object.__setattr__(self, "placement", one_axis("placement", self.placement))
        for place, expert in enumerate(self.placement):
            integer(f"placement[{place}]", expert, 0, self.num_experts - 1, why="num_experts")
        missing = sorted(set(range(self.num_experts)) - set(self.placement))
        require(not missing, f"placement is {self.placement}; it has no place for the experts {missing[:5]}")
        one_of("choice", self.choice, CHOICES)

    @property
    def num_places(self) -> int:
        """P."""
        return len(self.placement)

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """(E, R) the places of each expert, its first one again past its own, and (E,) how many it has."""
        places = [np.flatnonzero(np.array(self.placement) == expert) for expert in range(self.num_experts)]
        counts_E = np.array([len(own) for own in places])
        table_ER = np.stack([np.pad(own, (0, counts_E.max() - len(own)), mode="edge") for own in places])
        beyond_ER = np.arange(counts_E.max()) >= counts_E[:, None]
        return np.where(beyond_ER, table_ER[:, :1], table_ER), counts_E
