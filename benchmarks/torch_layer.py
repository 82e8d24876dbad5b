"""benchmarks, the torch layer: permute, experts and combine, beside the expert layers people use.

    python -m benchmarks.torch_layer        # tables, and benchmarks/results/torch_layer.json

Routing is given. The dense bound is one feed-forward network over T * K rows: the same products, with one expert's
weights (and one expert's gradients) instead of E. torchtitan's experts compute in bfloat16 whatever they are given, so
that only its bfloat16 times compare like with like. The eager loop of transformers is left out of the backward pass,
where each w[e] becomes a gradient of the size of all experts: 20 s for A, 58 s for B.
"""

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import RESULTS, Timing, machine, paired, table, use_cores, write_json
from moe_ref.specs.layer import ExpertSpec
from moe_torch.dispatcher import LocalTokenDispatcher
from moe_torch.experts import GroupedExperts

TOKENS, DIM, CORES = 4096, 512, 2
OURS, DENSE = "moe_torch", "dense bound"


@dataclass(frozen=True, kw_only=True)
class Size:
    """F, E and K."""

    hidden_dim: int
    num_experts: int
    top_k: int


SIZES = {
    "A": Size(hidden_dim=1024, num_experts=64, top_k=6),
    "B": Size(hidden_dim=256, num_experts=256, top_k=8),
}
CASES = [f"{s} {dtype} {way}" for s in SIZES for dtype in ("float32", "bfloat16") for way in ("forward", "training")]


class Ours(nn.Module):
    """The routed part of `moe_torch.MoE`."""

    def __init__(self, size: Size, dtype: torch.dtype):
        super().__init__()
        self.dispatcher = LocalTokenDispatcher(size.num_experts)
        self.experts = GroupedExperts(size.num_experts, ExpertSpec(dim=DIM, hidden_dim=size.hidden_dim), dtype=dtype)

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return self.experts.sum_of_slots(x_TD, self.dispatcher.permute(expert_ids_TK), weights_TK)


class Torchtitan(nn.Module):
    """torchtitan's RoutedExperts, and the count that its MoE hands to it."""

    def __init__(self, size: Size, ours: GroupedExperts):
        super().__init__()
        from torchtitan.distributed.utils import set_spmd_backend
        from torchtitan.models.common.moe import GroupedExperts as Experts
        from torchtitan.models.common.moe import RoutedExperts
        from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher as Dispatcher

        set_spmd_backend("default")
        E = size.num_experts
        self.routed = RoutedExperts(
            RoutedExperts.Config(
                inner_experts=Experts.Config(dim=DIM, hidden_dim=size.hidden_dim, num_experts=E),
                token_dispatcher=Dispatcher.Config(num_experts=E, top_k=size.top_k),
            )
        ).to(ours.w1_EFD.dtype)
        self.routed.inner_experts.load_state_dict(ours.state_dict())
        self.num_experts = E

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        map_TE = torch.zeros(len(x_TD), self.num_experts, dtype=torch.bool).scatter_(-1, expert_ids_TK, True)
        return self.routed(x_TD[None], weights_TK[None], expert_ids_TK[None], map_TE.sum(0))[0]


class Transformers(nn.Module):
    """The DeepSeek-V3 experts of transformers, in one of their implementations."""

    def __init__(self, size: Size, ours: GroupedExperts, implementation: str):
        super().__init__()
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

        assert ours.w3_EFD is not None
        config = SimpleNamespace(
            num_local_experts=size.num_experts, hidden_size=DIM, moe_intermediate_size=size.hidden_dim,
            hidden_act="silu", _experts_implementation=implementation,
        )  # fmt: skip
        with torch.device("meta"):
            self.experts = DeepseekV3Experts(config)
        self.experts.gate_up_proj = nn.Parameter(torch.cat([ours.w1_EFD, ours.w3_EFD], dim=1).detach())
        self.experts.down_proj = nn.Parameter(ours.w2_EDF.detach())

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return self.experts(x_TD, expert_ids_TK, weights_TK)


class Dense(nn.Module):
    """One expert over T * K rows."""

    def __init__(self, size: Size, ours: GroupedExperts):
        super().__init__()
        assert ours.w3_EFD is not None
        w1_FD, w2_DF, w3_FD = (w[0].detach().clone() for w in (ours.w1_EFD, ours.w2_EDF, ours.w3_EFD))
        self.w1_FD, self.w2_DF, self.w3_FD = nn.Parameter(w1_FD), nn.Parameter(w2_DF), nn.Parameter(w3_FD)
        self.rows_ND = nn.Parameter(torch.randn(TOKENS * size.top_k, DIM).to(w1_FD.dtype))

    def forward(self, *routing: Tensor) -> Tensor:
        hidden_NF = F.silu(F.linear(self.rows_ND, self.w1_FD)) * F.linear(self.rows_ND, self.w3_FD)
        return F.linear(hidden_NF, self.w2_DF)


def inputs(size: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(T, D) tokens, and the distinct expert ids and weights of each, all experts equally likely."""
    x_TD = torch.randn(TOKENS, DIM).to(dtype)
    ids_TK = torch.rand(TOKENS, size.num_experts).topk(size.top_k).indices
    return x_TD, ids_TK, torch.rand(TOKENS, size.top_k)


def time_case(case: str, rounds: int) -> list[Timing]:
    """All candidates of one case, once they are seen to agree."""
    name, dtype_name, way = case.split()
    size, dtype, training = SIZES[name], getattr(torch, dtype_name), way == "training"
    torch.set_num_threads(CORES)
    torch.manual_seed(0)
    ours = Ours(size, dtype)
    modules: dict[str, nn.Module] = {
        OURS: ours,
        "torchtitan (bfloat16)": Torchtitan(size, ours.experts),
        "transformers, grouped_mm": Transformers(size, ours.experts, "grouped_mm"),
        DENSE: Dense(size, ours.experts),
    }
    if not training:
        modules["transformers, eager"] = Transformers(size, ours.experts, "eager")
    x_TD, ids_TK, weights_TK = inputs(size, dtype)
    check_agreement(modules, x_TD, ids_TK, weights_TK)

    def forward(module: nn.Module):
        with torch.no_grad():
            module(x_TD, ids_TK, weights_TK)

    def train(module: nn.Module):
        x, weights = x_TD.requires_grad_(), weights_TK.requires_grad_()
        output = module(x, ids_TK, weights)
        output.backward(torch.ones_like(output))
        module.zero_grad(set_to_none=True)
        x.grad = weights.grad = None

    call = train if training else forward
    candidates: dict[str, Callable[[], object]] = {key: partial(call, module) for key, module in modules.items()}
    return paired(candidates, baselines=tuple(candidates), rounds=rounds, warmup=1)


def check_agreement(modules: dict[str, nn.Module], *routing: Tensor) -> None:
    """Every candidate computes the same, but for the dense bound."""
    with torch.no_grad():
        outputs = {name: module(*routing).float() for name, module in modules.items() if name != DENSE}
    for name, output_TD in outputs.items():
        error = (output_TD - outputs[OURS]).norm() / outputs[OURS].norm()
        # Six roundings to bfloat16, which torchtitan makes in any case.
        if error > 6 * 2.0**-9:
            raise RuntimeError(f"{name} differs from {OURS} by {error:.1%}; there is nothing to time")


def peak_mib(name: str = "A") -> float:
    """Memory that one float32 forward pass takes on top of weights and inputs, at its peak (Linux alone)."""
    torch.set_num_threads(CORES)
    module, routing = Ours(SIZES[name], torch.float32), inputs(SIZES[name], torch.float32)
    with torch.no_grad():
        # The matmul library keeps a workspace of its own from the first call on; few tokens leave nothing else.
        module(*(t[:64] for t in routing))
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
        before = _status_kib("VmRSS")
        module(*routing)
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def in_a_process(part: str, rounds: int, prefix: tuple[str, ...] = ()):
    """One case, or `memory`, in a process of its own: what an earlier one allocated does not matter."""
    command = [*prefix, sys.executable, "-m", "benchmarks.torch_layer", "--part", part, "--rounds", str(rounds)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    return found if part == "memory" else [Timing(**fields) for fields in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--part", choices=[*CASES, "memory"], help="one case, as JSON on the last line")
    parser.add_argument("--prefix", default="", help="put before the command of each case, such as a lock or a pin")
    args = parser.parse_args()
    use_cores(CORES)
    warnings.filterwarnings("ignore", message="In CPU autocast")
    if args.part == "memory":
        print(json.dumps(peak_mib()))
        return
    if args.part:
        print(json.dumps([asdict(timing) for timing in time_case(args.part, args.rounds)]))
        return
    prefix = tuple(args.prefix.split())
    results: dict = {"tokens": TOKENS, "dim": DIM, "sizes": {name: asdict(size) for name, size in SIZES.items()}}
    for case in CASES:
        results[case] = in_a_process(case, args.rounds, prefix)
        print(f"\n{case}: {TOKENS} tokens, {CORES} threads\n\n{table(results[case])}", flush=True)
    results["peak MiB, A float32 forward"] = in_a_process("memory", 1, prefix)
    print(f"\npeak above weights and inputs, A float32 forward: {results['peak MiB, A float32 forward']:.0f} MiB")
    packages = ("torch", "torchtitan", "transformers", "numpy")
    write_json(RESULTS / "torch_layer.json", {"machine": machine(packages), **results})


if __name__ == "__main__":
    main()
