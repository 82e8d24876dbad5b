"""conformance, sharded: the picture of a failure. What goes from rank to rank, or what each rank returns.

Legend: T tokens, D model dim, S ranks of a rank group, e experts on a rank, Q ranks of all groups.
"""

from collections.abc import Sequence

import numpy as np

from conformance.core.check import CHECKS
from conformance.core.judge import Judge, Violation
from conformance.core.picture import MOST_COLUMNS, Panel, asked, grid
from conformance.router import picture as of_router
from conformance.sharded.case import ShardedCase
from conformance.sharded.plans import SIZES, Plan, name_of_place, plans_of_subject
from conformance.sharded.verdicts import name_of_rank, outputs_of_subject, trace_on_layout
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
    panels: list[Panel] = []
    plans = layout.num_token_chunks == 1
    if plans:
        found = asked(judge, plans_of_subject, case) if CHECKS[violation.requirement].method == "dispatch" else None
        panels += [_sizes(case, name, found) for name in SIZES]
    if CHECKS[violation.requirement].method != "dispatch":
        panels = [*_outputs(judge, case), *panels[:1]]
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
    wanted_by_shard = trace_on_layout(case).outputs_by_shard
    apart = np.full((len(found), longest), np.nan)
    for rank, output_TD in enumerate(found):
        wanted_TD = wanted_by_shard[case.layout.shard_of(rank)]
        largest_T = np.maximum(np.abs(wanted_TD).max(axis=-1, initial=0), np.finfo(np.float32).tiny)
        with np.errstate(all="ignore"):
            apart[rank, : len(output_TD)] = np.abs(output_TD - wanted_TD).max(axis=-1, initial=0) / largest_T
    names = [name_of_rank(case, rank) for rank in range(len(found))]
    # A token that is not there has no number; one whose output is none is infinitely far.
    there = np.array([[t < len(each) for t in range(longest)] for each in found])
    apart = np.where(there & np.isnan(apart), np.inf, apart)
    rounded = np.where(there, np.where(apart < 1e-3, 0.0, apart), np.nan)
    title = "Distance of each output from the reference, as a part of its largest number"
    tokens = [str(t) for t in range(longest)]
    note = "Below 0.001 a distance is shown as 0."
    none = np.where(there, 0.0, np.nan)
    return [grid(title, names, tokens, none, rounded, note=note, of_rows="on", of_columns="token of its shard")]
