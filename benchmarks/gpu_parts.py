"""benchmarks, the parts of the GPU's: each a function that returns plain data. `benchmarks.gpu` runs them."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from benchmarks.harness import machine


@dataclass(frozen=True, kw_only=True)
class Size:
    """A layer."""

    tokens: int
    dim: int
    hidden_dim: int
    num_experts: int
    top_k: int

    def __str__(self) -> str:
        return f"T{self.tokens} D{self.dim} F{self.hidden_dim} E{self.num_experts} K{self.top_k}"


SIZES = (
    Size(tokens=16384, dim=2048, hidden_dim=768, num_experts=128, top_k=8),
    Size(tokens=32768, dim=1536, hidden_dim=256, num_experts=128, top_k=8),
    Size(tokens=8192, dim=7168, hidden_dim=2048, num_experts=256, top_k=8),
)
TINY = Size(tokens=9, dim=24, hidden_dim=16, num_experts=4, top_k=2)
ROUTER_TOKENS = (16384, 65536)


class LeftOut(Exception):
    """A sentence that says why a part cannot run."""


# what the parts share


def clock(dry: bool) -> Callable[[Callable[[], Any]], float]:
    """A function's time in ms: the median on the device."""
    if dry:

        def once(call: Callable[[], Any]) -> float:
            begin = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - begin)

        return once
    from triton.testing import do_bench

    bench: Any = do_bench
    return lambda call: bench(call, warmup=25, rep=100, return_mode="median")


def clock_of_graph(dry: bool) -> Callable[[Callable[[], Any]], float]:
    """The same without what the host does between launches: in a CUDA graph."""
    if dry:
        return clock(dry)
    from triton.testing import do_bench_cudagraph

    bench: Any = do_bench_cudagraph
    return lambda call: bench(call, rep=100, return_mode="median")


def place(dry: bool) -> str:
    return "cpu" if dry else "cuda"


def tried(call: Callable[[], Any]) -> Any:
    """What a call returns, or the error it raises as a sentence."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}" if str(error) else type(error).__name__


def keep(found: dict) -> None:
    """What a part has found so far, on a line of its own: the last one counts, also where the part is cut."""
    print(json.dumps(found), flush=True)


# the parts


def device(dry: bool) -> dict:
    """What it is, and what it can do at best."""
    import torch

    found: dict[str, Any] = {"machine": machine(("torch", "triton", "jax", "transformers", "tokamax"))}
    if dry:
        return found | {"name": "interpreter"}
    ms = clock(dry)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return found | {
        "name": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "cuda": torch.version.cuda,
        "matmul TF/s": 2 * 8192**3 / ms(lambda: a @ a) / 1e9,
        "copy TB/s": 2 * 2**30 / ms(lambda: target.copy_(source)) / 1e9,
    }


def layer(size: Size, dry: bool) -> dict:
    """Times, peak memory and errors of the candidates, forward and training, in bfloat16 with given routing."""
    import torch

    ms, where = clock(dry), place(dry)
    torch.manual_seed(0)
    candidates, x_TD, ids_TK, weights_TK, rows_ND, missing = layers(size, where)
    found: dict[str, Any] = {"size": str(size), "way": way(size, where), "not timed": missing}
    found["error"] = tried(lambda: error_of_rows(candidates["moe_torch"], x_TD, ids_TK, weights_TK))
    d_out_TD = torch.randn_like(x_TD)
    found["gradients beside grouped_mm"] = tried(
        lambda: gradient_differences(candidates, (x_TD, ids_TK, weights_TK), d_out_TD)
    )
    for kind in ("forward", "training"):
        for name, module in candidates.items():
            row = found.setdefault(kind, {}).setdefault(name, {})
            leaves = [rows_ND if name == "dense" else x_TD, weights_TK]
            leaves = [leaf.detach().requires_grad_(kind == "training") for leaf in leaves]
            upstream = torch.randn_like(leaves[0]) if name == "dense" else d_out_TD

            def call(module=module, leaves=leaves, upstream=upstream, kind=kind, name=name) -> None:
                with torch.set_grad_enabled(kind == "training"):
                    output = module(leaves[0], ids_TK, leaves[1])
                if kind == "training":
                    trained = [*leaves[: 1 if name == "dense" else 2], *module.parameters()]
                    torch.autograd.grad(output, trained, upstream)

            row["ms"] = tried(lambda call=call: ms(call))
            row["peak MiB"] = tried(lambda call=call: peak_of(call, dry))
            keep(found)
    return found


def layers(size: Size, where: str):
    """The candidates by name, what they are called with, and why others are missing."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    from moe_ref.specs.layer import ExpertSpec
    from moe_torch.dispatcher import LocalTokenDispatcher
    from moe_torch.experts import GroupedExperts, run_experts

    T, K, E = size.tokens, size.top_k, size.num_experts
    spec = ExpertSpec(dim=size.dim, hidden_dim=size.hidden_dim)
    experts = GroupedExperts(E, spec, device=where, dtype=torch.bfloat16)
    x_TD = torch.randn(T, size.dim, device=where, dtype=torch.bfloat16)
    ids_TK, weights_TK = torch.rand(T, E, device=where).topk(K).indices, torch.rand(T, K, device=where)
    rows_ND = torch.randn(T * K, size.dim, device=where, dtype=torch.bfloat16)

    class Ours(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts, self.dispatcher = experts, LocalTokenDispatcher(E)

        def forward(self, x, ids, weights):
            return run_experts(self.experts, self.dispatcher, x, self.dispatcher.permute(ids), weights, on_input=False)

    class GroupedMm(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = experts

        def forward(self, x, ids, weights):
            own, flat = self.experts, ids.reshape(-1)
            order = torch.argsort(flat, stable=True)
            token = order // ids.shape[1]
            # A map of who goes where, as torchtitan has it: bincount would wait for the device.
            chosen_TE = torch.zeros(len(ids), E, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)
            ends = chosen_TE.sum(0).cumsum(0, dtype=torch.int32)

            def project(rows, w):
                return F.grouped_mm(rows, w.transpose(-2, -1), offs=ends)

            hidden = F.silu(project(x[token], own.w1_EFD)) * project(x[token], own.w3_EFD)
            out = project(hidden, own.w2_EDF)
            out = (out.float() * weights.reshape(-1)[order][:, None]).to(x.dtype)
            return torch.zeros_like(x).scatter_add(0, token[:, None].expand(-1, x.shape[1]), out)

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            assert experts.w3_EFD is not None
            w1, w2, w3 = (w[0].detach().clone() for w in (experts.w1_EFD, experts.w2_EDF, experts.w3_EFD))
            self.w1, self.w2, self.w3 = nn.Parameter(w1), nn.Parameter(w2), nn.Parameter(w3)

        def forward(self, rows, *_):
            return F.linear(F.silu(F.linear(rows, self.w1)) * F.linear(rows, self.w3), self.w2)

    candidates: dict[str, nn.Module] = {"moe_torch": Ours(), "grouped_mm": GroupedMm()}
    missing: dict[str, str] = {}
    try:
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

        config = SimpleNamespace(
            num_local_experts=E, hidden_size=size.dim, moe_intermediate_size=size.hidden_dim, hidden_act="silu",
            _experts_implementation="grouped_mm",
        )  # fmt: skip
        with torch.device("meta"):
            peer = DeepseekV3Experts(config)
        assert experts.w3_EFD is not None
        both = torch.cat([experts.w1_EFD, experts.w3_EFD], dim=1)
        peer.gate_up_proj, peer.down_proj = nn.Parameter(both.detach()), nn.Parameter(experts.w2_EDF.detach())
        candidates["transformers"] = peer
    except Exception as error:
        missing["transformers"] = repr(error)
    candidates["dense"] = Dense()
    return candidates, x_TD, ids_TK, weights_TK, rows_ND, missing


def way(size: Size, where: str) -> dict:
    """Which way the experts go there, and why."""
    import torch

    from moe_ref.specs.layer import ExpertSpec
    from moe_torch.kernels import chosen

    found = chosen(ExpertSpec(dim=size.dim, hidden_dim=size.hidden_dim), device=where, dtype=torch.bfloat16)
    return {"way": found.way, "why": found.why}


def error_of_rows(ours, x_TD, ids_TK, weights_TK) -> float:
    """The largest relative error of some output rows, against float32 with nothing rounded in between."""
    import torch
    from torch.nn import functional as F

    own, worst = ours.experts, 0.0
    with torch.no_grad():
        found = ours(x_TD, ids_TK, weights_TK)
        for t in range(0, len(x_TD), max(1, len(x_TD) // 16)):
            x, right = x_TD[t].double(), torch.zeros_like(x_TD[t]).double()
            for e, weight in zip(ids_TK[t], weights_TK[t], strict=True):
                w1, w2, w3 = (w[e].double() for w in (own.w1_EFD, own.w2_EDF, own.w3_EFD))
                right = right + weight.double() * (w2 @ (F.silu(w1 @ x) * (w3 @ x)))
            worst = max(worst, float((found[t].double() - right).norm() / right.norm()))
    return worst


MOST_COMPARED = 2**28
"""Numbers of a gradient: of a larger one some experts, for the largest layer has room for all gradients but once."""


def gradient_differences(candidates, inputs, d_out_TD) -> dict[str, float]:
    """Relative difference of each gradient from that of the grouped_mm composition."""
    import torch

    grads, names = [], []
    for name in ("moe_torch", "grouped_mm"):
        module, (x_TD, ids_TK, weights_TK) = candidates[name], inputs
        x, weights = x_TD.detach().requires_grad_(), weights_TK.detach().requires_grad_()
        trained = dict(module.named_parameters())
        names = ["x", "weights", *(each.rpartition(".")[2] for each in trained)]
        own = torch.autograd.grad(module(x, ids_TK, weights), [x, weights, *trained.values()], d_out_TD)
        grads.append([grad[:: -(-grad.numel() // MOST_COMPARED)].clone() for grad in own])
        del own
    return {n: float((a.float() - b.float()).norm() / b.float().norm()) for n, a, b in zip(names, *grads, strict=True)}


def peak_of(call: Callable[[], Any], dry: bool) -> float:
    """MiB above what is there before the call, gradients included."""
    if dry:
        call()
        return 0.0
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def router(dry: bool) -> dict:
    """From float32 logits to ids and weights, E256 G8 L4 K8; with the backward pass of the weights for ours."""
    import torch

    from moe_ref.specs.router import RouterSpec
    from moe_torch.routing import route

    E, G, L, K = (16, 4, 2, 3) if dry else (256, 8, 4, 8)
    spec = RouterSpec(
        num_experts=E, top_k=K, num_expert_groups=G, num_limited_groups=L, score_func="sigmoid", route_norm=True,
        norm_eps=1e-20, route_scale=2.5,
    )  # fmt: skip

    def plain(logits_TE, bias_E):
        """The manner of torchtitan."""
        scores = torch.sigmoid(logits_TE)
        choice = (scores + bias_E).view(-1, G, E // G)
        groups = choice.topk(2, dim=-1)[0].sum(-1).topk(L, dim=-1, sorted=False)[1]
        dropped = torch.ones_like(choice[..., 0], dtype=torch.bool).scatter_(1, groups, False)
        ids = choice.masked_fill(dropped[..., None], -torch.inf).flatten(1).topk(K, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, ids

    def ours(logits_TE, bias_E):
        found = route(logits_TE, spec, expert_bias_E=bias_E)
        return found.weights_TK, found.expert_ids_TK

    def train(logits_TE, bias_E, d_weights_TK):
        leaf = logits_TE.detach().requires_grad_()
        torch.autograd.grad(ours(leaf, bias_E)[0], leaf, d_weights_TK)

    found: dict[str, Any] = {"spec": spec.to_dict()}
    ms, graph, where = clock(dry), clock_of_graph(dry), place(dry)
    for T in (7,) if dry else ROUTER_TOKENS:
        torch.manual_seed(0)
        logits_TE, bias_E = torch.randn(T, E, device=where), 0.05 * torch.randn(E, device=where)
        row = found[f"T{T}"] = {"floor us": 1e6 * (T * E * 4 + T * K * 12) / 3e12}
        with torch.no_grad():
            weights, ids = ours(logits_TE, bias_E)
            plain_weights, plain_ids = plain(logits_TE, bias_E)
            dense, plain_dense = (
                torch.zeros(T, E, device=where).scatter(1, i, w)
                for i, w in ((ids, weights), (plain_ids, plain_weights))
            )
            row["differing tokens"] = float(((dense - plain_dense).abs().amax(1) > 1e-5).float().mean())
            candidates: dict[str, Callable[[], Any]] = {
                "moe_torch": partial(ours, logits_TE, bias_E),
                "torchtitan's manner": partial(plain, logits_TE, bias_E),
                f"topk({E}, {K}) alone": partial(logits_TE.topk, K, dim=-1),
            }
            if not dry:
                compiled = torch.compile(plain, fullgraph=True, dynamic=False)  # a program for each size
                candidates["torchtitan's manner, compiled"] = partial(compiled, logits_TE, bias_E)
            for name, call in candidates.items():
                row[f"{name}, us"] = tried(lambda call=call: 1e3 * ms(call))
                row[f"{name}, in a graph, us"] = tried(lambda call=call: 1e3 * graph(call))
                keep(found)
        both = partial(train, logits_TE, bias_E, torch.randn_like(weights))
        row["moe_torch with backward, us"] = tried(lambda both=both: 1e3 * ms(both))
    return found


def promises(dry: bool) -> dict:
    """What the kernels promise: no wait for the host, equal bits, capture in a CUDA graph, torch.compile."""
    import torch

    from moe_ref.specs.layer import ExpertSpec, LayerSpec
    from moe_ref.specs.router import RouterSpec
    from moe_torch.moe import MoE

    where = place(dry)
    size = TINY if dry else Size(tokens=2048, dim=1024, hidden_dim=512, num_experts=32, top_k=4)
    spec = LayerSpec(
        router=RouterSpec(num_experts=size.num_experts, top_k=size.top_k, score_func="sigmoid", route_norm=True),
        experts=ExpertSpec(dim=size.dim, hidden_dim=size.hidden_dim, bias=True),
    )
    torch.manual_seed(0)
    moe = MoE(spec, device=where, dtype=torch.bfloat16)
    x_TD = torch.randn(size.tokens, size.dim, device=where, dtype=torch.bfloat16, requires_grad=True)
    trained = [x_TD, *moe.parameters()]

    def step(module: Any = moe):
        return torch.autograd.grad(module(x_TD).float().sum(), trained)

    def no_wait() -> bool:
        step()
        if not dry:
            torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            if not dry:
                torch.cuda.set_sync_debug_mode("default")
        return True

    def captured() -> bool:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            grads = step()
        graph.replay()
        torch.cuda.synchronize()
        return all(torch.equal(a, b) for a, b in zip(grads, step(), strict=True))

    def compiled() -> bool:
        found = step(torch.compile(moe, fullgraph=True, backend="aot_eager" if dry else "inductor"))
        # Inductor fuses the gate and the sums otherwise.
        return all(
            float((a.float() - b.float()).norm()) <= 0.05 * float(b.float().norm()) + 1e-6
            for a, b in zip(found, step(), strict=True)
        )

    def equal() -> bool:
        return all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))

    found: dict[str, Any] = {}
    for name, holds in (
        ("waits for no host", no_wait), ("equal bits", equal), ("captured in a CUDA graph", captured),
        ("compiled", compiled),
    ):  # fmt: skip
        found[name] = "there is no CUDA here" if dry and holds is captured else tried(holds)
        keep(found)
    return found


def tiles(dry: bool) -> dict:
    """Other sizes of tiles than those in `moe_torch/kernels/launch.py`, one kernel at a time: ms of a training step."""
    from dataclasses import replace

    import torch

    from moe_torch.kernels import launch

    size, where, ms = (TINY if dry else SIZES[0]), place(dry), clock(dry)
    candidates, x_TD, ids_TK, weights_TK, *_ = layers(size, where)
    module, usual = candidates["moe_torch"], launch.tiles_of
    x, weights = x_TD.requires_grad_(), weights_TK.requires_grad_()
    d_out_TD = torch.randn_like(x_TD)

    def step() -> None:
        torch.autograd.grad(module(x, ids_TK, weights), [x, weights, *module.parameters()], d_out_TD)

    found: dict[str, Any] = {"usual": tried(lambda: ms(step))}
    begin = time.monotonic()
    changes = [
        {"stages": 4},
        {"stages": 2},
        {"columns": 256},
        {"columns": 128},
        {"depth": 32, "stages": 5},
        {"warps": 4},
    ]
    for kernel in ("weights", "tokens", "up", "hidden", "down"):
        for change in changes[:1] if dry else changes:
            if time.monotonic() - begin > 100:
                return found | {"left out": "no time for more"}

            def changed(*sizes, kernel=kernel, change=change):
                own = usual(*sizes)
                return replace(own, **{kernel: replace(getattr(own, kernel), **change)})

            launch.tiles_of = changed
            try:
                found[f"{kernel} {change}"] = tried(lambda: ms(step))
                keep(found)
            finally:
                launch.tiles_of = usual
    for group in () if dry else (4, 16):
        launch.tiles_of = lambda *sizes, group=group: replace(usual(*sizes), group=group)
        found[f"group {group}"] = tried(lambda: ms(step))
        launch.tiles_of = usual
    return found
