"""conformance, sharded: small worlds of dispatch. Every assignment of a few tokens to a few experts, on two and three
ranks.

A slot is unused, or has any expert; the experts of a token are distinct, in any order. What this covers needs no
luck. It leaves out more tokens, more experts, and loads that only many tokens make.

Legend: T tokens, E experts, K top_k.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from conformance.core.judge import Judge, Violation
from conformance.layer.draw import SIGMOID
from conformance.sharded.case import ShardedCase
from conformance.sharded.check import ShardedCheck
from conformance.sharded.draw import case_of_ids
from conformance.sharded.plans import (
    hold_exchanged_sizes,
    hold_group_sizes,
    hold_matching,
    hold_rows,
    hold_sorted,
    plans_of_subject,
)
from moe_ref import UNUSED, ExpertSpec, LayerSpec, RouterSpec
from moe_ref.specs.layout import STRATEGY_FACTS, ShardLayout

SIZES = (
    # ranks, experts, top_k, tokens of each shard
    (2, 4, 1, (2, 1)),
    (2, 4, 1, (1, 1)),
    (2, 2, 2, (1, 2)),
    (2, 4, 2, (1, 1)),
    (3, 3, 1, (1, 2, 1)),
    (3, 3, 1, (1, 1, 1)),
)
PARTS = (
    ("DSP-2", hold_rows),
    ("DSP-3", hold_matching),
    ("DSP-4", hold_exchanged_sizes),
    ("DSP-5", hold_group_sizes),
    ("DSP-6", hold_sorted),
)
"""The parts of a plan, each with the requirement that it is blamed on."""


def empty_worlds() -> list[ShardedCase]:
    """One case of each world, with every slot unused; where nodes count, with one for each rank."""
    found = []
    for (ranks, E, K, tokens), (strategy, facts) in product(SIZES, STRATEGY_FACTS.items()):
        shards = tokens[:1] if facts.shares_tokens else tokens
        nodes: dict[str, Any] = {"ranks_per_node": 1} if facts.by_node else {}
        layout = ShardLayout(expert=ranks, strategy=strategy, **nodes)
        router = RouterSpec(num_experts=E, top_k=K, **SIGMOID, selector="given")
        spec = LayerSpec(router=router, experts=ExpertSpec(dim=2, hidden_dim=2))
        found.append(case_of_ids(spec, np.full((sum(shards), K), UNUSED), layout=layout, tokens_per_shard=shards))
    return found


def assignments(world: ShardedCase) -> Iterator[ShardedCase]:
    """Every assignment of a world."""
    router, laid_out = world.spec.router, {"layout": world.layout, "tokens_per_shard": world.tokens_per_shard}
    slots = product((UNUSED, *range(router.num_experts)), repeat=router.top_k)
    tokens = [ids for ids in slots if len({i for i in ids if i >= 0}) == sum(i >= 0 for i in ids)]
    for assignment in product(tokens, repeat=world.num_tokens):
        ids_TK = np.array(assignment, dtype=np.int64).reshape(-1, router.top_k)
        yield case_of_ids(world.spec, ids_TK, **laid_out)


def hold_everything(judge: Judge, case: ShardedCase) -> None:
    """Each part of the plan, blamed on its own requirement."""
    requirement = "DSP-1"
    try:
        found = plans_of_subject(judge, case)
        for requirement, hold in PARTS:  # noqa: B007  (the part that raises is to blame)
            hold(case, found, case.plans)
    except Violation as violation:
        violation.requirement, violation.case = requirement, case
        raise


EVERYTHING = ShardedCheck(requirement="DSP-2", run=hold_everything, method="dispatch")


def worlds_of(judge: Judge) -> Iterator[tuple[ShardedCheck, ShardedCase]]:
    """Every assignment of every world that the subject supports."""
    if EVERYTHING.method not in judge.capabilities:
        return
    for world in empty_worlds():
        if world.why_not(judge.subject, EVERYTHING.method) is None:
            yield from ((EVERYTHING, case) for case in assignments(world))
