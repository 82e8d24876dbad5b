"""conformance, the report of a layout: what a failure page and a replay show of a case that lies over devices."""

from conformance.core.judge import Judge, NotRun, Violation
from conformance.layer.case import LayerCase
from conformance.layer.verdicts import shown
from conformance.sharded.case import LayoutCase
from conformance.sharded.plans import planned
from conformance.sharded.verdicts import name_of, outputs


def layout_rows(case: LayerCase, token: int | None) -> list[tuple[str, str]]:
    """What a page shows of the layout: its fields, and where the token is; nothing for a case without one."""
    if not isinstance(case, LayoutCase):
        return []
    layout = case.layout
    rows = [("layout", " ".join(f"{name}={value}" for name, value in case.laid_out.items()))]
    if token is not None:
        shard = next(s for s in range(layout.num_token_shards) if token < sum(case.tokens_per_shard[: s + 1]))
        ranks = [rank for rank in range(layout.num_ranks) if layout.shard_of(rank) == shard]
        rows.append((f"place[{token}]", f"token {token - sum(case.tokens_per_shard[:shard])} of shard {shard}, "
                                        f"on rank {', '.join(map(str, ranks))}"))  # fmt: skip
    return rows


def ranks_side_by_side(judge: Judge, case: LayoutCase, most_tokens: int) -> str:
    """Each rank's plan and outputs in the reference, and the subject's beside them."""
    lines = [f"    {name}  {text}" for name, text in layout_rows(case, None)]
    plans, found = _or_why(judge, lines, planned, case, "DSP-1"), _or_why(judge, lines, outputs, case, "LYT-1")
    if case.layout.num_token_chunks == 1:
        for number, wanted in enumerate(case.plans):
            group, e = divmod(number, case.layout.expert)
            lines.append(f"    {name_of(case, case.layout.rank(*divmod(group, case.layout.fsdp), e))}")
            for name in ("send_sizes_S", "recv_sizes_S", "group_sizes_e", "order_R2"):
                lines.append(f"      {name:<21} reference {getattr(wanted, name).tolist()}")
                if plans is not None:
                    lines.append(f"      {'':<21} {judge.name:<9} {getattr(plans[number], name).tolist()}")
    wanted = case.by_shard(case.reference.output_TD)
    for rank, output_TD in enumerate(found or ()):
        shard = case.layout.shard_of(rank)
        for t in range(min(most_tokens, len(wanted[shard]))):
            lines.append(f"    {name_of(case, rank)}, token {t} of shard {shard}")
            lines.append(f"      {'output_TD':<21} reference {shown(wanted[shard][t])}")
            lines.append(f"      {'':<21} {judge.name:<9} {shown(output_TD[t])}")
    return "\n".join(lines)


def _or_why(judge: Judge, lines: list[str], call, case: LayoutCase, id: str):
    """What the subject returns, or None and a line that says why there is nothing."""
    try:
        return call(judge, case, id)
    except (NotRun, Violation) as error:
        lines.append(f"    {judge.name} returned nothing that can be shown: {error}")
        return None
