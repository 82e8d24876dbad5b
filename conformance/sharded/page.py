"""conformance, sharded: what a page of a failure and a replay show of a case."""

from collections.abc import Callable
from typing import Any

from conformance.core.judge import Judge, NotRun, Violation
from conformance.core.show import shown
from conformance.layer.page import rows_of_spec, rows_of_token
from conformance.sharded.case import ShardedCase
from conformance.sharded.plans import PARTS, plans_of_subject
from conformance.sharded.verdicts import name_of_rank, outputs_of_subject, trace_on_layout


def rows_of_page(case: ShardedCase, token: int | None) -> list[tuple[str, str]]:
    """The specs, the layout, and the token with its place and its experts."""
    return [*rows_of_spec(case), *rows_of_layout(case, token), *rows_of_token(case, token)]


def rows_of_layout(case: ShardedCase, token: int | None) -> list[tuple[str, str]]:
    """The fields of the layout, and where the token is."""
    rows = [("layout", " ".join(f"{name}={value}" for name, value in case.laid_out.items()))]
    if token is not None:
        shard = int(case.shard_of_T[token])
        number = token - sum(case.tokens_per_shard[:shard])
        ranks = [str(rank) for rank in range(case.layout.num_ranks) if case.layout.shard_of(rank) == shard]
        rows.append((f"place[{token}]", f"token {number} of shard {shard}, on rank {', '.join(ranks)}"))
    return rows


def side_by_side(judge: Judge, case: ShardedCase, most_tokens: int) -> str:
    """Each rank's plan and outputs in the reference, and the subject's beside them."""
    layout = case.layout
    lines = [f"    {name}  {text}" for name, text in rows_of_layout(case, None)]
    plans, outputs = (_or_why(judge, lines, call, case) for call in (plans_of_subject, outputs_of_subject))
    for number, wanted in enumerate(case.plans if layout.num_token_chunks == 1 else ()):
        group, e = divmod(number, layout.expert)
        lines.append(f"    {name_of_rank(case, layout.rank(*divmod(group, layout.fsdp), e))}")
        for name in PARTS:
            lines.append(f"      {name:<21} reference {getattr(wanted, name).tolist()}")
            if plans is not None:
                lines.append(f"      {'':<21} {judge.name:<9} {getattr(plans[number], name).tolist()}")
    wanted_by_shard = trace_on_layout(case).outputs_by_shard
    for rank, output_TD in enumerate(outputs or ()):
        shard = layout.shard_of(rank)
        for t in range(min(most_tokens, len(output_TD))):
            lines.append(f"    {name_of_rank(case, rank)}, token {t} of shard {shard}")
            lines.append(f"      {'output_TD':<21} reference {shown(wanted_by_shard[shard][t])}")
            lines.append(f"      {'':<21} {judge.name:<9} {shown(output_TD[t])}")
    return "\n".join(lines)


def _or_why(judge: Judge, lines: list[str], call: Callable[[Judge, ShardedCase], Any], case: ShardedCase) -> Any:
    """What the subject returns, or None and a line that says why there is nothing."""
    try:
        return call(judge, case)
    except (NotRun, Violation) as error:
        lines.append(f"    {judge.name} returned nothing that can be shown: {error}")
        return None
