"""benchmarks, the chart: the committed results in a picture. `python -m benchmarks.chart` writes results/speed.svg."""

from collections.abc import Iterable

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.harness import RESULTS
from benchmarks.tables import grouped_matmul_runs, read, where

PEERS = {
    "torchtitan (bfloat16)": "#0072B2",
    "transformers, grouped_mm": "#E69F00",
    "transformers, eager": "#999999",
    "MaxText sparse": "#0072B2",
    "MaxText dense": "#E69F00",
    "jax.lax.ragged_dot": "#0072B2",
}
"""Colours that a colour-blind reader tells apart (Okabe and Ito)."""


def bars(axes: Axes, title: str, rows: Iterable[tuple[str, dict[str, float]]], *, log: bool) -> None:
    """How many times the time of ours each peer takes, a bar for each peer, a group for each row."""
    labels, drawn, place = [], set(), 0.0
    for label, ratios in rows:
        begin = place
        for peer, ratio in ratios.items():
            axes.barh(place, ratio, height=0.9, color=PEERS[peer], label=None if peer in drawn else peer)
            axes.text(ratio, place, f" {ratio:.3g}", va="center", fontsize=7)
            drawn.add(peer)
            place += 1
        labels.append(((begin + place - 1) / 2, label))
        place += 0.8
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([at for at, _ in labels], [label for _, label in labels], fontsize=7)
    axes.invert_yaxis()
    if log:
        axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("time of the peer / ours", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
    axes.spines[["top", "right"]].set_visible(False)


def grouped_rows() -> Iterable[tuple[str, dict[str, float]]]:
    """moe_jax.grouped_matmul, on each machine."""
    for found in grouped_matmul_runs():
        for case in found["cases"]:
            for way in ("forward", "forward and backward"):
                label = f"E={case['experts']}, {way},\n{where(found)}"
                yield label, {"jax.lax.ragged_dot": case[way]["speedup"]}


def jax_layer_rows() -> Iterable[tuple[str, dict[str, float]]]:
    """moe_jax.sparse_matmul beside MaxText."""
    found = read("jax_layer_maxtext")
    for way in ("forward", "forward and backward"):
        ratios = {t["name"]: 1 / t["speedup"]["sparse_matmul"] for t in found[way]["timings"] if t["name"] in PEERS}
        yield f"E={found['experts']} K={found['top_k']}\n{way}", ratios


def torch_layer_rows() -> Iterable[tuple[str, dict[str, float]]]:
    """moe_torch's experts beside their peers."""
    found = read("torch_layer")
    for name, size in found["sizes"].items():
        for dtype in ("float32", "bfloat16"):
            for way in ("forward", "training"):
                ours = found[f"{name} {dtype} {way}"][0]["speedup"]
                label = f"E={size['num_experts']} {dtype}\n{way}"
                yield label, {peer: ratio for peer, ratio in ours.items() if peer in PEERS}


def main() -> None:
    mpl.rcParams["svg.hashsalt"] = "moe-conformance"  # the same file for the same results
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 5.5), layout="constrained")
    bars(left, "JAX grouped_matmul", grouped_rows(), log=True)
    bars(middle, "JAX layer", jax_layer_rows(), log=True)
    bars(right, "PyTorch layer", torch_layer_rows(), log=False)
    figure.savefig(RESULTS / "speed.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
