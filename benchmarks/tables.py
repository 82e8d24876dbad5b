"""benchmarks, the tables: the README's, made from the committed results."""

import json

from benchmarks.harness import RESULTS


def read(name: str) -> dict:
    """A committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def router() -> list[str]:
    """From logits to ids and weights: each candidate's median and its speed relative to the baselines."""
    found = read("router")
    spec = found["spec"]
    lines = [
        f"**Router**, from {found['tokens']} tokens' logits, E={spec['num_experts']} G={spec['num_expert_groups']} "
        f"L={spec['num_limited_groups']} K={spec['top_k']}, float32, {where(found)}:",
        "",
        "| router | ms | times as fast as |",
        "|---|---|---|",
    ]
    for timing in [*found["torch"], *found["jax"]]:
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in timing["speedup"].items() if name != timing["name"])
        lines.append(f"| {timing['name']} | {timing['median_ms']:.1f} | {ratios or '(baseline)'} |")
    return lines


def grouped_matmul() -> list[str]:
    """moe_jax.grouped_matmul beside jax.lax.ragged_dot, and beside a dense matmul of equal FLOPs."""
    found = read("grouped_matmul")
    lines = [
        f"**JAX grouped_matmul**, {found['rows']} rows, D={found['D']} F={found['F']} {found['dtype']}, "
        f"{where(found)}. "
        "The roof is a dense matmul of equal FLOPs plus one reading of each used expert's weights:",
        "",
        "| experts | pass | times as fast as `jax.lax.ragged_dot` | of the roof | compile |",
        "|---|---|---|---|---|",
    ]
    for case in found["cases"]:
        for name in ("forward", "forward and backward"):
            row = case.get(name)
            if row:
                speedup = f"{row['speedup']:.0f}" if row.get("speedup") else "-"
                compiled = case["compile_s"][name]
                cells = (f"{case['experts']}, {case['load']} load", name, speedup, f"{row['of_roof']:.2f}x")
                lines.append(f"| {' | '.join(cells)} | {compiled:.1f} s |")
    return lines


def where(found: dict) -> str:
    """The machine in words."""
    machine = found["machine"]
    return f"{machine['cores']} cores of an {machine['processor']}"


def markdown() -> str:
    """Every table."""
    return "\n".join([*router(), "", *grouped_matmul()])


if __name__ == "__main__":
    print(markdown())
