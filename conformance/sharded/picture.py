"""conformance, sharded: the picture of a failure. What goes from rank to rank, or what each rank returns.

Legend: T tokens, D model dim, S ranks of a rank group, e experts on a rank, Q ranks of all groups.
"""

from collections.abc import Sequence

import numpy as np

from conformance.core.check import CHECKS
from conformance.core.judge import Judge, Violation
from conformance.core.picture import MOST_COLUMNS, NOTE_OF_DISTANCES, Panel, asked, distance, grid
from conformance.router import picture as of_router
from conformance.sharded.case import ShardedCase
from conformance.sharded.plans import SIZES, Plan, name_of_place, plans_of_subject
from conformance.sharded.verdicts import (
    gradients_of_subject,
    gradients_on_layout,
    name_of_rank,
    outputs_of_subject,
    trace_on_layout,
)
from moe_ref.strategies.base import RankPlan

MOST_RANKS = 64
WHAT = {
    "send_sizes_S": ("Rows that each rank sends", "from", "to"),
    "recv_sizes_S": ("Rows that each rank receives", "at", "from"),
    "group_sizes_e": ("Rows of each local expert", "on", "local expert"),
}


def picture(judge: Judge | None, violation: Violation, case: ShardedCase) -> list[Panel]:
    """The exchange between ranks for a plan; for outputs and gradients the output of each rank by token.

    Args:
        judge: None where the subject is not called again.
    """
    layout = case.layout
    if layout.num_ranks > MOST_RANKS:
        return []
    method, panels = CHECKS[violation.requirement].method, list[Panel]()
    if method == "sharded_gradients":
        panels += _gradients(judge, case)
    elif method == "sharded_layer":
        panels += _outputs(judge, case)
    if layout.num_token_chunks == 1:
        found = asked(judge, plans_of_subject, case) if method == "dispatch" else None
        panels += [_sizes(case, name, found) for name in (SIZES if method == "dispatch" else SIZES[:1])]
    if violation.token is not None:
        panels += of_router.picture(None, case.router_case, violation.token)
    return panels


def _sizes(case: ShardedCase, name: str, found: Sequence[Plan] | None) -> Panel:
    """One table of sizes, a row for each rank of each group."""
    title, of_rows, of_columns = WHAT[name]
    wanted = _stacked(case.plans, name)
    names = [name_of_place(case, rank) for rank in range(len(wanted))]
    columns = [str(number) for number in range(wanted.shape[1])][:MOST_COLUMNS]
    return grid(title, names, columns, wanted[:, :MOST_COLUMNS],
                None if found is None else _stacked(found, name)[:, :MOST_COLUMNS],
                of_rows=of_rows, of_columns=of_columns)  # fmt: skip


def _stacked(plans: Sequence[Plan] | Sequence[RankPlan], name: str) -> np.ndarray:
    return np.stack([getattr(each, name) for each in plans]).astype(float)


def _outputs(judge: Judge | None, case: ShardedCase) -> list[Panel]:
    """How far the output of each token is from the reference's, on each rank; nothing where the subject shows none."""
    longest = max(case.tokens_per_shard, default=0)
    found = asked(judge, outputs_of_subject, case) if 0 < longest <= MOST_COLUMNS else None
    if found is None:
        return []
    # A token that is not there has no number.
    apart = np.full((len(found), longest), np.nan)
    wanted_by_shard = trace_on_layout(case).outputs_by_shard
    for rank, output_TD in enumerate(found):
        for t, pair in enumerate(zip(wanted_by_shard[case.layout.shard_of(rank)], output_TD, strict=True)):
            apart[rank, t] = distance(*pair)
    return [_distances("Distance of each output from the reference", case, list(map(str, range(longest))), apart,
                       of_columns="token of its shard")]  # fmt: skip


def _gradients(judge: Judge | None, case: ShardedCase) -> list[Panel]:
    """How far each gradient is from the reference's, on each rank."""
    found = asked(judge, gradients_of_subject, case)
    if not found:
        return []
    wanted = gradients_on_layout(case)
    own_by_shard = case.by_shard(wanted["x_TD"])
    names = [name for name in wanted if name in found[0]]
    apart = np.zeros((len(found), len(names)))
    for rank, grads in enumerate(found):
        own = wanted | {"x_TD": own_by_shard[case.layout.shard_of(rank)]}
        apart[rank] = [distance(own[name], grads[name]) for name in names]
    return [_distances("Distance of each gradient from the reference", case, names, apart, of_columns="gradient")]


def _distances(title: str, case: ShardedCase, columns: list[str], apart: np.ndarray, *, of_columns: str) -> Panel:
    ranks = [name_of_rank(case, rank) for rank in range(len(apart))]
    none = np.where(np.isnan(apart), np.nan, 0.0)
    return grid(title, ranks, columns, none, apart, note=NOTE_OF_DISTANCES, of_rows="on", of_columns=of_columns)
