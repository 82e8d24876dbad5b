"""moe_ref, strategies: how rows reach their experts, one file each.

    all_to_all         a rank sends each slot to the owner of its expert; the same rows return
    ragged_all_to_all  the same, into a receive buffer; what finds no room is dropped
    ring_of_experts    a rank sends its tokens to every rank, which picks the rows of its own experts; partial sums
                       are reduced and scattered
    replicated         nothing is sent; each rank has the tokens, and picks the rows of its own experts; partial sums
                       are reduced, scattered and gathered
    node_dedup         a token is sent once to each node that has experts of it, then each slot to its owner there; the
                       same back, of partial sums across nodes

A new strategy is a file here, a line in `STRATEGIES`, and its facts in `specs/layout.py`.
"""

from moe_ref.strategies.all_to_all import ALL_TO_ALL
from moe_ref.strategies.base import Strategy
from moe_ref.strategies.node_dedup import NODE_DEDUP
from moe_ref.strategies.ragged_all_to_all import RAGGED_ALL_TO_ALL
from moe_ref.strategies.replicated import REPLICATED
from moe_ref.strategies.ring_of_experts import RING_OF_EXPERTS

STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy for strategy in (ALL_TO_ALL, RAGGED_ALL_TO_ALL, RING_OF_EXPERTS, REPLICATED, NODE_DEDUP)
}
"""Every strategy by name; in the order of `specs.layout.STRATEGY_FACTS`."""
