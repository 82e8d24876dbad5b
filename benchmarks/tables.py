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


def grouped_matmul_runs() -> list[dict]:
    """The results on each machine."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("grouped_matmul-*.json"))]


def grouped_matmul() -> list[str]:
    """moe_jax.grouped_matmul beside jax.lax.ragged_dot, and beside a dense matmul of equal FLOPs, on each machine."""
    runs = grouped_matmul_runs()
    lines = [
        f"**JAX grouped_matmul**, {runs[0]['rows']} rows, D={runs[0]['D']} F={runs[0]['F']} {runs[0]['dtype']}. "
        "The roof is a dense matmul of equal FLOPs plus one reading of each used expert's weights:",
        "",
        "| on | experts | pass | times as fast as `jax.lax.ragged_dot` | of the roof | compile |",
        "|---|---|---|---|---|---|",
    ]
    for found in runs:
        for case in found["cases"]:
            for way in ("forward", "forward and backward"):
                row = case[way]
                cells = (where(found), str(case["experts"]), way, f"{row['speedup']:.0f}", f"{row['of_roof']:.2f}x")
                lines.append(f"| {' | '.join(cells)} | {case['compile_s'][way]:.1f} s |")
    return lines


def torch_layer() -> list[str]:
    """moe_torch's experts beside those of the peers that compute in the same dtype, and the dense bound."""
    found = read("torch_layer")
    lines = [
        f"**PyTorch layer** (permute, experts, combine), {found['tokens']} tokens, D={found['dim']}, {where(found)}. "
        "torchtitan's experts compute in bfloat16 whatever they are given; in float32 they do less exact work. The "
        "dense bound is one feed-forward network over as many rows:",
        "",
        "| F, E, K | dtype | pass | ms | times as fast as | of the dense bound |",
        "|---|---|---|---|---|---|",
    ]
    for name, size in found["sizes"].items():
        for dtype in ("float32", "bfloat16"):
            for way in ("forward", "training"):
                by_name = {timing["name"]: timing for timing in found[f"{name} {dtype} {way}"]}
                ours = by_name["moe_torch"]
                peers = {peer: r for peer, r in ours["speedup"].items() if peer not in ("moe_torch", "dense bound")}
                ratios = ", ".join(f"{peer} {ratio:.2f}" for peer, ratio in peers.items())
                sizes = f"{size['hidden_dim']}, {size['num_experts']}, {size['top_k']}"
                bound = f"{1 / ours['speedup']['dense bound']:.2f}x"
                lines.append(f"| {sizes} | {dtype} | {way} | {ours['median_ms']:.0f} | {ratios} | {bound} |")
    peak = found["peak MiB, A float32 forward"]
    return [*lines, "", f"A float32 forward pass of the first takes {peak:.0f} MiB besides weights and tokens."]


def jax_layer() -> list[str]:
    """moe_jax.sparse_matmul beside MaxText's two strategies, and what a large layer needs."""
    large = read("jax_layer")
    temporaries = large["forward and backward"]["layers"]["sparse_matmul"]["peak_temp_bytes"] / 2**20
    lines = [
        f"**JAX layer**, forward and backward with E=256, T={large['tokens']} D={large['dim']} "
        f"F={large['hidden_dim']} K={large['top_k']}: {temporaries:.0f} MiB of temporaries.",
    ]
    found = read("jax_layer_maxtext")
    lines += [
        "",
        f"Beside MaxText {found['machine']['versions']['maxtext']} (its CPU strategies), {where(found)}, "
        f"T={found['tokens']} D={found['dim']} F={found['hidden_dim']} E={found['experts']} K={found['top_k']}:",
        "",
        "| layer | pass | ms | time of sparse_matmul | compile | temporaries |",
        "|---|---|---|---|---|---|",
    ]
    for way in ("forward", "forward and backward"):
        for timing in found[way]["timings"]:
            figures = found[way]["layers"][timing["name"]]
            of_ours = 1 / timing["speedup"]["sparse_matmul"]
            cells = (timing["name"], way, f"{timing['median_ms']:.0f}", f"{of_ours:.1f}x",
                     f"{figures['compile_s']:.1f} s", f"{figures['peak_temp_bytes'] / 2**20:.0f} MiB")  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def layouts() -> list[str]:
    """The JAX layer on 8 devices of one processor, and the bytes that two PyTorch dispatchers send between nodes."""
    found = read("jax_layouts")
    lines = [
        f"**JAX layouts**, forward and backward, the same work on {found['devices']} devices of {where(found)}, "
        f"T={found['tokens']} D={found['dim']} F={found['hidden_dim']} E={found['experts']} K={found['top_k']}:",
        "",
        "| layout | ms | time of one device |",
        "|---|---|---|",
    ]
    for timing in found["timings"]:
        of_one = 1 / timing["speedup"]["one device"]
        lines.append(f"| {timing['name']} | {timing['median_ms']:.0f} | {of_one:.2f}x |")
    found = read("torch_layouts")
    lines += [
        "",
        f"**PyTorch, bytes between nodes**, {found['nodes']} gloo ranks as {found['nodes']} nodes, "
        f"{found['tokens of each rank']} tokens each, DeepSeek-V3 routing (E=256 G=8 L=4 K=8), measured, and equal to "
        "what the reference's plan says:",
        "",
        "| routing | all_to_all, MB | node_dedup, MB | ratio |",
        "|---|---|---|---|",
    ]
    for routing in ("any node", "node-limited"):
        sent = found[routing]["bytes across nodes"]
        megabytes = [sent[name]["payload"] / 1e6 for name in ("all_to_all", "node_dedup")]
        lines.append(f"| {routing} | {megabytes[0]:.1f} | {megabytes[1]:.1f} | {megabytes[0] / megabytes[1]:.2f} |")
    return lines


def where(found: dict) -> str:
    """The machine in words."""
    machine = found["machine"]
    processor = machine["processor"].replace("(R)", "").replace(" Processor", "")
    return f"{machine['cores']} cores of an {processor}"


def markdown() -> str:
    """Every table."""
    parts = (router, grouped_matmul, jax_layer, torch_layer, layouts)
    return "\n\n".join("\n".join(part()) for part in parts)


if __name__ == "__main__":
    print(markdown())
