"""tests of the judge: the traffic command prints what the plan says, and refuses what cannot be counted."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

from conformance.pictures.traffic import blocks, heading, layout_of, routings_of, table
from conformance.pictures.traffic import line as line_of
from conformance.run.cli import EXIT_USAGE, main
from moe_ref import RouterSpec, ShardLayout, plan
from moe_ref.specs.families import family
from moe_ref.strategies import STRATEGIES
from moe_ref.traffic import demand, exact_traffic

SMALL = ("--tokens", "256", "--ep", "16", "--ranks-per-node", "4", "--dim", "64")


def rows_of(printed: str) -> list[list[str]]:
    """The cells of the lines of the table."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_it_prints_each_strategy_with_and_without_node_limits(capsys):
    assert main(["traffic", *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "256 tokens, rows of 64 numbers of 2 bytes" in printed
    assert (
        "16 ranks: 1 x 16, 4 nodes of 4 in each. The router's 8 groups lie whole on their nodes, 2 on each." in printed
    )
    cells = rows_of(printed)
    assert [row[:2] for row in cells] == [[s, r] for s in STRATEGIES for r in ("any experts", "4 of 8 groups")]
    share = {(row[0], row[1]): float(row[5]) for row in cells}
    assert share["all_to_all", "any experts"] == 1
    assert share["node_dedup", "4 of 8 groups"] < share["node_dedup", "any experts"] < 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_its_counts_are_those_of_the_plan(strategy):
    options = argparse.Namespace(
        data=2, ep=8, ranks_per_node=4, tokens=90, seed=3, skew=1.0, distribution=None, dim=10, bytes=2
    )
    layout, router = layout_of(options), family("deepseek_v3").tiny
    routings = routings_of(router)
    assert list(routings) == ["any experts", "2 of 4 groups"]
    for name, spec in routings.items():
        ids_by_shard = [ids for _, ids in blocks(spec, layout, options)]
        if STRATEGIES[strategy].facts.shares_tokens:
            ids_by_shard = [np.concatenate(ids_by_shard[8 * group : 8 * group + 8]) for group in range(2)]
        mesh = layout.replace(strategy=strategy)
        plans = plan(ids_by_shard, mesh, spec)
        exact = [exact_traffic(plans[8 * group : 8 * group + 8], mesh) for group in range(2)]
        found = line_of(strategy, name, demand(blocks(spec, layout, options), layout, spec), layout, spec)
        assert found.rows_across == sum(t.out.across + t.back.across for t in exact)
        assert found.rows_inside == sum(t.out.inside + t.back.inside for t in exact)
        assert found.most_across == max(t.across_by_rank_S.max() for t in exact)
        assert found.per_token == sum(t.out.across for t in exact) / 90


def test_a_router_without_groups_has_one_routing_and_one_node_no_share(capsys):
    assert main(["traffic", "--family", "mixtral", "--tokens", "64", "--ep", "8"]) == 0
    printed = capsys.readouterr().out
    assert "The router has no groups." in printed
    assert [row[1] for row in rows_of(printed)] == ["any experts"] * len(STRATEGIES)
    assert {row[5] for row in rows_of(printed)} == {"-"}


@pytest.mark.parametrize(("num_groups", "num_experts", "sentence"), [
    (None, 12, "The router has no groups."),
    (4, 12, "The router's 4 groups lie whole on their nodes, 2 on each."),
    (1, 12, "Each of the router's 1 groups has 2 nodes."),
    (3, 12, "The router's 3 groups straddle nodes."),
])  # fmt: skip
def test_how_groups_lie_on_nodes_is_said(num_groups, num_experts, sentence):
    router = RouterSpec(
        num_experts=num_experts, top_k=1, num_expert_groups=num_groups, num_limited_groups=num_groups and 1
    )
    layout = ShardLayout(expert=4, ranks_per_node=2)
    assert sentence in heading(router, layout, argparse.Namespace(family="mine", tokens=4, dim=1, bytes=1))[1]


def test_bytes_are_rows_times_width():
    options = argparse.Namespace(
        data=1, ep=2, ranks_per_node=1, tokens=100, seed=0, skew=0.0, distribution=None, dim=500, bytes=4
    )
    layout, router = layout_of(options), family("mixtral").tiny
    found = line_of(
        "ring_of_experts", "any experts", demand(blocks(router, layout, options), layout, router), layout, router
    )
    # Each of two ranks sends its 50 tokens to the other, and 50 partial sums back.
    assert found.rows_across == 200
    assert "| 200 | 0.4 | 1.000 | 0.0 | 0.2 |" in table([found], options)[-1]


def test_a_plot_is_drawn(tmp_path, capsys):
    assert main(["traffic", *SMALL, "--plot", str(tmp_path / "t.png")]) == 0
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert rows_of(capsys.readouterr().out)


@pytest.mark.parametrize(("options", "message"), [
    (("--family", "deepsek_v3"), "unknown family 'deepsek_v3' (did you mean deepseek_v3?)"),
    (("--family", "deepseek_v4_hash"), "selector is 'table'; traffic is of a router that chooses by its logits"),
    (("--ep", "48"), "expert is 48, which does not divide num_experts (256)"),
    (("--ranks-per-node", "7"), "ranks_per_node is 7, which does not divide the expert axis (64)"),
    (("--distribution", "pareto"), "distribution is 'pareto'; it is one of uniform, zipf:S, hot:P"),
    (("--skew", "nan"), "skew is nan; it is a finite number of at least 0.0"),
    (("--seed", "-1"), "seed is -1; it is an integer at least 0"),
])  # fmt: skip
def test_what_cannot_be_counted_is_a_usage_error(options, message, capsys):
    assert main(["traffic", *options]) == EXIT_USAGE
    assert message in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_a_usage_error(monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["traffic", *SMALL, "--plot", str(Path("never.png"))]) == EXIT_USAGE
    captured = capsys.readouterr()
    assert "matplotlib, which is not installed: pip install matplotlib" in captured.err
    assert not captured.out
