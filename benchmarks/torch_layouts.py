"""benchmarks, torch layouts: bytes between nodes and times of node_dedup against all_to_all, on gloo ranks.

    python -m benchmarks.torch_layouts

Routing is DeepSeek-V3's: 256 experts in 8 groups, 8 of each token out of 4 groups; 8 nodes, one group each. Every node
is one rank, a process of this machine. What each rank sends is counted where it is handed to the collective, and must
be what the reference's plan predicts. Times are those of processes that share the cores and a loopback device: they say
what the two ways cost in work, and nothing about a network.
"""

import argparse
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from benchmarks.harness import RESULTS, Timing, machine, paired, table, write_json
from conformance.subjects.ranks import Ranks
from moe_ref import ExpertSpec, LayerSpec, RouterSpec
from moe_ref.dispatch import plan
from moe_ref.specs.families import preset
from moe_ref.specs.layout import ShardLayout
from moe_ref.traffic import exact_traffic

NODES = 8
TOKENS = 512
"""Of each rank."""
DIM, HIDDEN_DIM = 512, 32
"""Few hidden columns: what is timed is the moving of rows."""
MODULES = ("benchmarks.torch_layouts", "conformance.subjects.torch.sharded")
STRATEGIES = ("all_to_all", "node_dedup")
ROUTERS = {
    "node-limited": preset("deepseek_v3"),
    "any node": preset("deepseek_v3", num_expert_groups=None, num_limited_groups=None),
}


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """What crosses nodes in one pass forward, there and back; a pass backward moves as much again."""

    rows: int
    payload: int
    """Bytes of these rows."""
    beside: int
    """Bytes of ids, weights and counts."""
    predicted_rows: int
    predicted_payload: int


def spec_of(router: RouterSpec) -> LayerSpec:
    """The layer that is timed."""
    return LayerSpec(router=router, experts=ExpertSpec(dim=DIM, hidden_dim=HIDDEN_DIM))


def layout_of(strategy: str) -> ShardLayout:
    """One rank on each node."""
    return ShardLayout(expert=NODES, strategy=strategy, ranks_per_node=1)


# On a rank.


def run_on_rank(router: RouterSpec, rounds: int) -> tuple[dict, np.ndarray, dict[str, list[Timing]]]:
    """For each strategy (rows, payload, beside) that this rank sent to others; its ids; and the times."""
    import torch
    import torch.distributed as dist

    from conformance.subjects.torch.sharded import mesh_of
    from moe_torch.moe import MoE
    from moe_torch.parallel.collectives import recorded
    from moe_torch.parallel.parallelize import parallelize

    torch.manual_seed(0)
    layers = {}
    for strategy in STRATEGIES:
        torch.manual_seed(1)  # the same layer on every rank
        mesh = mesh_of(1, 1, NODES, 1)
        layers[strategy] = parallelize(MoE(spec_of(router)), mesh, layout_of(strategy))
    torch.manual_seed(2 + dist.get_rank())
    x_TD = torch.randn(TOKENS, DIM, requires_grad=True)

    sent, outputs = {}, {}
    for strategy, moe in layers.items():
        with torch.no_grad(), recorded() as record:
            outputs[strategy] = moe(x_TD)
        totals = {"rows": 0, "payload": 0, "beside": 0}
        for each in record:
            ranks = dist.get_process_group_ranks(each.group)
            far = sum(n for rank, n in zip(ranks, each.rows_S, strict=True) if rank != dist.get_rank())
            totals["rows"] += far if each.what == "rows" else 0
            totals["payload" if each.what == "rows" else "beside"] += far * each.bytes_per_row
        sent[strategy] = totals
    torch.testing.assert_close(outputs["node_dedup"], outputs["all_to_all"], rtol=1e-5, atol=1e-5)

    def forward(moe: MoE) -> None:
        dist.barrier()
        with torch.no_grad():
            moe(x_TD)
        dist.barrier()

    def train(moe: MoE) -> None:
        dist.barrier()
        moe(x_TD).sum().backward()
        dist.barrier()

    times = {
        way: paired({s: partial(call, moe) for s, moe in layers.items()}, baselines=("all_to_all",), rounds=rounds)
        for way, call in (("forward", forward), ("training", train))
    }
    with torch.no_grad():
        ids_TK = layers["all_to_all"].router.route(x_TD).expert_ids_TK.numpy()
    return sent, ids_TK, times


# Here.


def predicted(strategy: str, router: RouterSpec, ids_by_shard: list[np.ndarray]) -> int:
    """Rows across nodes, there and back, by the reference's plan."""
    layout = layout_of(strategy)
    traffic = exact_traffic(plan(ids_by_shard, layout, router), layout)
    return traffic.out.across + traffic.back.across


def measure(ranks: Ranks, router: RouterSpec, rounds: int) -> tuple[dict[str, Bytes], dict[str, list[Timing]]]:
    """Bytes of each strategy, held against the plan, and times."""
    from benchmarks.torch_layouts import run_on_rank as function  # of a module that ranks can import

    found = ranks.run(NODES, function, router, rounds, timeout=300)
    by_strategy = {}
    for strategy in STRATEGIES:
        total = {name: sum(sent[strategy][name] for sent, _, _ in found) for name in ("rows", "payload", "beside")}
        rows = predicted(strategy, router, [ids_TK for _, ids_TK, _ in found])
        by_strategy[strategy] = Bytes(**total, predicted_rows=rows, predicted_payload=rows * DIM * 4)
        if total["payload"] != rows * DIM * 4:
            raise RuntimeError(f"{strategy} sent {total['payload']} bytes; the plan predicts {rows * DIM * 4}")
    return by_strategy, found[0][2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    results: dict = {"nodes": NODES, "tokens of each rank": TOKENS, "dim": DIM, "hidden_dim": HIDDEN_DIM}
    with Ranks(preload=MODULES, timeout=300) as ranks:
        for name, router in ROUTERS.items():
            found, times = measure(ranks, router, args.rounds)
            ratio = found["all_to_all"].payload / found["node_dedup"].payload
            results[name] = {
                "bytes across nodes": {strategy: asdict(each) for strategy, each in found.items()},
                "all_to_all / node_dedup": ratio,
                "times": times,
            }
            print(f"\n{name}: bytes across nodes, measured = predicted: " + ", ".join(
                f"{strategy} {each.payload / 2**20:.1f} MiB ({each.rows} rows)" for strategy, each in found.items()
            ) + f"; ratio {ratio:.3f}")  # fmt: skip
            for way, timings in times.items():
                print(f"\n{way}\n\n{table(timings)}", flush=True)
    write_json(RESULTS / "torch_layouts.json", {"machine": machine(("torch", "numpy")), **results})


if __name__ == "__main__":
    main()
