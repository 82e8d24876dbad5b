"""moe_ref, strategies: how rows reach their experts, one file each.

What each of them does is in one sentence in `specs/layout.py`, in full at the head of its file.
"""

from moe_ref.strategies.all_to_all import ALL_TO_ALL
from moe_ref.strategies.base import Strategy
from moe_ref.strategies.node_dedup import NODE_DEDUP
from moe_ref.strategies.ragged_all_to_all import RAGGED_ALL_TO_ALL
from moe_ref.strategies.replicated import REPLICATED
from moe_ref.strategies.replicated_ragged import REPLICATED_RAGGED
from moe_ref.strategies.ring_of_experts import RING_OF_EXPERTS

STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        ALL_TO_ALL,
        RAGGED_ALL_TO_ALL,
        RING_OF_EXPERTS,
        REPLICATED,
        NODE_DEDUP,
        REPLICATED_RAGGED,
    )
}
"""Every strategy by name; in the order of `specs.layout.STRATEGY_FACTS`."""
