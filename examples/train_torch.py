"""examples, train_torch: a tiny transformer with MoE layers, trained over ranks, stopped, and trained on over others.

    torchrun --nproc-per-node 4 examples/train_torch.py --expert 2 --fsdp 2      # experts on 2 x 2 ranks
    torchrun --nproc-per-node 2 examples/train_torch.py --expert 2 --resume      # goes on from step 10 on 2 ranks
    python examples/train_torch.py                                               # the same losses in one process

On gloo and a CPU. What a GPU needs besides is the device of the mesh and of the model. Read `main`: nothing else of a
training loop changes for a parallel MoE layer but the call of `parallelize`, that of `sync_gradients`, and BiasHook.

Legend: B sequences, L tokens of each, V vocabulary, D model dim, H heads, E experts.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from moe_ref import BiasUpdateSpec, ExpertSpec, LayerSpec, RouterSpec, ShardLayout, SharedSpec
from moe_torch import BiasHook, MoE, load_statistics, parallelize, sync_gradients

B, L, V, D, H, LAYERS = 8, 32, 128, 32, 4, 2
SPEC = LayerSpec(
    router=RouterSpec(
        num_experts=8, top_k=2, score_func="sigmoid", route_norm=True, num_expert_groups=4, num_limited_groups=2
    ),
    experts=ExpertSpec(dim=D, hidden_dim=32),
    shared=SharedSpec(hidden_dim=32),
)
TEXT = Path(__file__).read_bytes()
"""What is learned: this file."""


class Block(nn.Module):
    """Attention, then the MoE layer, each added to what came in."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(D), nn.RMSNorm(D)])
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.moe = MoE(SPEC)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D), of the same shape."""
        heads = self.qkv(self.norms[0](x_BLD)).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x_BLD = x_BLD + self.out(attended.transpose(1, 2).flatten(2))
        return x_BLD + self.moe(self.norms[1](x_BLD))


class Model(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(V, D), nn.Embedding(L, D)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.RMSNorm(D), nn.Linear(D, V, bias=False))

    def forward(self, ids_BL: Tensor) -> Tensor:
        """(B, L, V) logits."""
        x_BLD = self.tokens(ids_BL) + self.places(torch.arange(ids_BL.shape[1]))
        return self.head(self.blocks(x_BLD))


def layers_of(model: nn.Module) -> list[MoE]:
    """The MoE layers of a model."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def over_ranks(model: Model, mesh: DeviceMesh, layout: ShardLayout) -> None:
    """MoE layers by their layout; the rest by FSDP2 over all ranks, on the same mesh.

    On one mesh torch's own clipping takes all parameters at once. FSDP2 reads its two axes as replicas and shards.
    Where the rest is to lie over another mesh, `moe_torch.parallel.clip_grad_norm_` clips.
    """
    layers = layers_of(model)
    for moe in layers:
        parallelize(moe, mesh, layout)
    of_layers = {parameter for moe in layers for parameter in moe.parameters()}
    for module in (*model.blocks, model):
        part = fully_shard(module, mesh=mesh, ignored_params=of_layers)
        # The loss is a sum over ranks, of which each has divided its own by all tokens.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)


def batch(step: int, part: int, parts: int) -> tuple[Tensor, Tensor]:
    """Bytes and next bytes of one of the parts of a step's sequences; a step has the same for any number of parts."""
    starts = np.random.default_rng(step).integers(len(TEXT) - L - 1, size=B).tolist()
    rows = [list(TEXT[start : start + L + 1]) for start in starts[part * B // parts : (part + 1) * B // parts]]
    ids = torch.tensor(rows).clamp(max=V - 1)
    return ids[:, :-1], ids[:, 1:]


def main() -> None:
    """Trains, and writes losses, loads and a picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--expert", type=int, default=1, help="ranks that the experts are divided over")
    parser.add_argument("--fsdp", type=int, default=1, help="ranks that each expert's parameters are divided over")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-at", type=int, default=10, help="the step after which a checkpoint is written")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, which any ranks have written")
    parser.add_argument("--folder", type=Path, default=Path("train_torch"), help="for checkpoint, losses and picture")
    args = parser.parse_args()

    # What torchrun sets; without it, one process.
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)
    dist.init_process_group("gloo")
    if dist.get_world_size() != args.expert * args.fsdp:
        raise SystemExit(f"{dist.get_world_size()} ranks, but --expert {args.expert} x --fsdp {args.fsdp}")
    torch.manual_seed(0)  # parallelize takes a layer that is the same on all ranks
    model = Model()
    mesh = init_device_mesh("cpu", (args.fsdp, args.expert), mesh_dim_names=("fsdp", "expert"))
    mesh._flatten()  # for sums over both axes at once
    over_ranks(model, mesh, ShardLayout(fsdp=args.fsdp, expert=args.expert))

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    hook = BiasHook(model, BiasUpdateSpec(rate=0.02), group=dist.group.WORLD)
    hook.register(optimizer)
    first = read(model, optimizer, args.folder) if args.resume else 0

    history = []
    for step in range(first, args.steps):
        ids_BL, next_BL = batch(step, dist.get_rank(), dist.get_world_size())
        loss = F.cross_entropy(model(ids_BL).flatten(0, 1), next_BL.flatten(), reduction="sum") / (B * L)
        loss.backward()
        for moe in layers_of(model):
            sync_gradients(moe)
        norm = clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        dist.all_reduce(total)
        load = max(load_statistics(counts_E).max_over_mean.item() for counts_E in hook.counts.values())
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        history.append({"step": step, "loss": total.item(), "norm": norm.item(), "load": load})
        show(history[-1], args.steps)
        if step + 1 == args.save_at:
            write(model, optimizer, step + 1, args.folder)
    if dist.get_rank() == 0:
        args.folder.mkdir(parents=True, exist_ok=True)
        (args.folder / "history.json").write_text(json.dumps(history))
        plot(history, args.folder / "history.png")
    dist.destroy_process_group()


def write(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, folder: Path) -> None:
    """Parameters, balancing biases and the optimizer's state, each rank its part."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    save({"model": model_state, "optimizer": optimizer_state, "step": step}, checkpoint_id=folder / "checkpoint")


def read(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """The step to go on with; the ranks need not be those that wrote."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": 0}
    load(state, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return state["step"]


def show(now: dict, steps: int) -> None:
    """A progress bar."""
    done = now["step"] + 1
    if dist.get_rank() == 0:
        bar = "#" * (30 * done // steps)
        end = "\n" if done == steps else ""
        text = f"[{bar:30}] {done}/{steps}  loss {now['loss']:.3f}  busiest expert {now['load']:.2f} x the mean"
        print(f"\r{text}", end=end, flush=True)


def plot(history: list[dict], path: Path) -> None:
    """Loss and load by step, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, name, title in zip(
        figure.subplots(1, 2), ("loss", "load"), ("loss", "busiest expert / mean"), strict=True
    ):
        axes.plot([now["step"] for now in history], [now[name] for now in history])
        axes.set(xlabel="step", title=title)
    figure.savefig(path)
    print(f"loss and load: {path}")


if __name__ == "__main__":
    main()
