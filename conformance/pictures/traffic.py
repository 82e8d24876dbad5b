"""conformance, pictures: rows and bytes across nodes for each strategy of a layout, with and without node limits.

    moe-conformance traffic --family deepseek_v3 --ep 64 --ranks-per-node 8

Tokens get random logits, the reference routes them, and `moe_ref.traffic` counts what each rank sends. Blocks of tokens
come one after the other, so that memory depends on the ranks, not on the tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conformance.core.chosen import router_of
from conformance.core.usage import UsageError
from conformance.pictures.figure import figure_class, save
from moe_ref.loads import logits_of_load
from moe_ref.routing import route
from moe_ref.specs.checks import integer, number
from moe_ref.specs.layout import ShardLayout, even_pieces
from moe_ref.specs.router import RouterSpec
from moe_ref.strategies import STRATEGIES
from moe_ref.traffic import Demand, bytes_of, counted_traffic, demand

BLOCK = 1024
"""Tokens routed at a time."""
NO_GROUPS = {
    "num_expert_groups": None,
    "num_limited_groups": None,
    "group_score_k": 2,
    "mask_fill": -np.inf,
    "weights_from": "scores",
}
"""Changes a router into the same without groups."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the table: what one strategy moves with one routing, over all rank groups."""

    strategy: str
    routing: str
    rows_across: int
    """Out and back."""
    rows_inside: int
    """Out and back, between ranks of a node."""
    most_across: int
    """Rows across nodes of the rank that has most."""
    per_token: float
    """Rows across nodes, out alone, for each token."""


def traffic(options) -> int:
    """The command: prints the table, and draws it where a file is named."""
    try:
        router = router_of(options.family)
        layout = layout_of(options)
        layout.check(router)
        routings = routings_of(router)
        number("skew", options.skew, low=0.0)
        if options.distribution is not None:
            logits_of_load(options.distribution, 0, router, np.random.default_rng(0))
        integer("seed", options.seed, 0)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if options.plot is not None:
        figure_class()
    asked = {name: demand(blocks(spec, layout, options), layout, spec) for name, spec in routings.items()}
    lines = [
        line(strategy, name, asked[name], layout, spec) for strategy in STRATEGIES for name, spec in routings.items()
    ]
    print("\n".join([*heading(router, layout, options), "", *table(lines, options)]))
    if options.plot is not None:
        draw(lines, options)
    return 0


def layout_of(options) -> ShardLayout:
    """The ranks; the tokens are spread over them as evenly as can be."""
    return ShardLayout(data=options.data, expert=options.ep, ranks_per_node=options.ranks_per_node)


def routings_of(router: RouterSpec) -> dict[str, RouterSpec]:
    """The router as it is; and, where it keeps some groups alone, without that limit."""
    if router.selector not in ("top_k", "sparsemixer"):
        raise ValueError(f"selector is {router.selector!r}; traffic is of a router that chooses by its logits")
    if router.num_expert_groups in (None, router.num_limited_groups):
        return {"any experts": router}
    limited = f"{router.num_limited_groups} of {router.num_expert_groups} groups"
    return {"any experts": router.replace(**NO_GROUPS), limited: router}


def blocks(router: RouterSpec, layout: ShardLayout, options) -> Iterator[tuple[int, np.ndarray]]:
    """(token shard, expert ids) a block at a time. The logits are the same for every routing."""
    popularity_E = options.skew * np.random.default_rng(options.seed).standard_normal(router.num_logits)
    for shard, num_tokens in enumerate(even_pieces(options.tokens, layout.num_token_shards)):
        rng = np.random.default_rng((options.seed, shard))
        for begin in range(0, num_tokens, BLOCK):
            size = min(BLOCK, num_tokens - begin)
            if options.distribution is None:
                logits_BE = rng.standard_normal((size, router.num_logits)) + popularity_E
            else:
                logits_BE = logits_of_load(options.distribution, size, router, rng)
            yield shard, route(logits_BE, router).expert_ids_TK


def line(strategy: str, routing: str, asked: list[Demand], layout: ShardLayout, router: RouterSpec) -> Line:
    """What all rank groups move."""
    mesh = layout.replace(strategy=strategy)
    found = [counted_traffic(group, mesh, router) for group in asked]
    return Line(
        strategy=strategy,
        routing=routing,
        rows_across=sum(t.out.across + t.back.across for t in found),
        rows_inside=sum(t.out.inside + t.back.inside for t in found),
        most_across=max(int(t.across_by_rank_S.max()) for t in found),
        per_token=sum(t.out.across for t in found) / max(1, sum(int(group.tokens_S.sum()) for group in asked)),
    )


def heading(router: RouterSpec, layout: ShardLayout, options) -> list[str]:
    """What was counted, in two lines."""
    return [
        f"{' '.join(options.family)}: {router.num_experts} experts, {router.top_k} of them for each token; "
        f"{options.tokens} tokens, rows of {options.dim} numbers of {options.bytes} bytes",
        f"{layout.num_ranks} ranks: {layout.num_rank_groups} x {layout.expert}, {layout.num_nodes} nodes of "
        f"{layout.node_size} in each. {_groups_on_nodes(router, layout)}",
    ]


def _groups_on_nodes(router: RouterSpec, layout: ShardLayout) -> str:
    if router.num_expert_groups is None:
        return "The router has no groups."
    groups, nodes = router.num_expert_groups, layout.num_nodes
    if groups % nodes == 0:
        return f"The router's {groups} groups lie whole on their nodes, {groups // nodes} on each."
    if nodes % groups == 0:
        return f"Each of the router's {groups} groups has {nodes // groups} nodes."
    return f"The router's {groups} groups straddle nodes."


def table(lines: list[Line], options) -> list[str]:
    """The lines as a Markdown table. The share is of the first line: all_to_all without limit."""
    found = [
        "| strategy | routing | rows across nodes, out, per token | rows across nodes, out and back | MB across nodes "
        "| share | MB inside nodes | MB across nodes, busiest rank |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for each in lines:
        share = f"{each.rows_across / lines[0].rows_across:.3f}" if lines[0].rows_across else "-"
        across, inside, most = (
            _megabytes(rows, options) for rows in (each.rows_across, each.rows_inside, each.most_across)
        )
        found.append(
            f"| {each.strategy} | {each.routing} | {each.per_token:.3f} | {each.rows_across} | {across:.1f} | {share} "
            f"| {inside:.1f} | {most:.1f} |"
        )
    return found


def _megabytes(rows: int, options) -> float:
    return bytes_of(rows, options.dim, options.bytes) / 1e6


def draw(lines: list[Line], options) -> None:
    """Bars: bytes across nodes of each strategy, one colour for each routing."""
    figure = figure_class()(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    routings = list(dict.fromkeys(each.routing for each in lines))
    for index, routing in enumerate(routings):
        own = [each for each in lines if each.routing == routing]
        places = np.arange(len(own)) + 0.8 * (index + 0.5) / len(routings) - 0.4
        bars = axes.bar(places, [_megabytes(e.rows_across, options) for e in own], 0.8 / len(routings), label=routing)
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    axes.set_xticks(np.arange(len(STRATEGIES)), STRATEGIES)
    axes.set_ylabel("MB across nodes, out and back")
    axes.set_title(f"{' '.join(options.family)}, {options.ep} expert ranks, {options.ranks_per_node} on each node")
    axes.legend(title="routing")
    save(figure, options.plot)


def add_options(command, positive) -> None:
    """The options of the command; `positive` reads an integer of at least 1."""
    command.add_argument(
        "--family",
        nargs="+",
        default=["deepseek_v3"],
        metavar=("NAME", "FIELD=VALUE"),
        help="whose router (default deepseek_v3), and what is another in it, such as num_experts=384",
    )
    for name, default, meaning in (
        ("--ep", 64, "ranks of the expert axis"),
        ("--ranks-per-node", 8, "ranks of the expert axis on a node"),
        ("--data", 1, "how often the expert axis is there"),
        ("--tokens", 65536, "tokens in all"),
        ("--dim", 7168, "numbers in a row"),
        ("--bytes", 2, "bytes of a number"),
    ):
        command.add_argument(name, type=positive, default=default, metavar="N", help=f"{meaning} (default {default})")
    command.add_argument("--skew", type=float, default=0.0, metavar="S", help="spread of the experts' mean logits")
    command.add_argument(
        "--distribution",
        metavar="D",
        help="the shares of experts, in place of --skew: uniform, zipf:S, hot:P, or a number for each with commas",
    )
    command.add_argument("--seed", type=int, default=0, metavar="S", help="of the logits (default 0)")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw the bytes across nodes, with matplotlib")
