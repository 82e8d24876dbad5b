"""examples, train_jax: a tiny transformer with MoE layers, trained over devices, stopped, and trained on over others.

    python examples/train_jax.py --expert 4 --fsdp 2                             # experts on 4 x 2 devices of this host
    python examples/train_jax.py --expert 2 --fsdp 2 --processes 2 --resume      # goes on from step 10 on 2 x 2 devices
    python examples/train_jax.py                                                 # the same losses on one device

On CPUs. What a cluster needs besides is its own `jax.distributed.initialize()` in place of `launch`. Read `loss_of` and
`train_step`: layers are scanned and rematerialised, and the balancing biases are updated in the program of the step.
The model and its text are those of `train_torch.py`: `--beside train_torch` draws the curves of both.

Legend: B sequences, L tokens of each, V vocabulary, D model dim, H heads, N layers, E experts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax import bias_update, load_statistics, make_mesh, param_specs, sharded_sparse_matmul, use_cpu_devices
from moe_ref import BiasUpdateSpec, ExpertSpec, LayerParams, LayerSpec, RouterSpec, ShardLayout, SharedSpec

B, L, V, D, H, N = 8, 32, 128, 32, 4, 2
SPEC = LayerSpec(
    router=RouterSpec(
        num_experts=8, top_k=2, score_func="sigmoid", route_norm=True, num_expert_groups=4, num_limited_groups=2
    ),
    experts=ExpertSpec(dim=D, hidden_dim=32),
    shared=SharedSpec(hidden_dim=32),
)
BALANCE = BiasUpdateSpec(rate=0.02)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(5e-3, weight_decay=0.01))
SEQUENCES = ("data", "fsdp", "expert")
"""The axes of the mesh that sequences are divided over."""
TEXT = np.frombuffer(Path(__file__).with_name("train_torch.py").read_bytes(), np.uint8).clip(max=V - 1).astype(np.int32)
"""What is learned: the example of PyTorch, as there."""


# the model


def init() -> dict[str, Any]:
    """Parameters on the host; those of the layers are stacked. Balancing biases are no parameters: see `train_step`."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32) / np.sqrt(D, dtype=np.float32)

    layers = [replace(LayerParams.init(SPEC, seed).astype(np.float32), expert_bias_E=None) for seed in range(N)]
    blocks = {
        "norms": np.ones((N, 2, D), np.float32),
        "qkv": normal(N, D, 3 * D),
        "out": normal(N, D, D),
        "moe": jax.tree.map(lambda *values: np.stack(values), *layers),
    }
    return {
        "tokens": normal(V, D), "places": normal(L, D), "blocks": blocks,
        "norm": np.ones(D, np.float32), "head": normal(D, V),
    }  # fmt: skip


def rms_norm(x_BLD: jax.Array, scale_D: jax.Array) -> jax.Array:
    """Each token divided by its root mean square."""
    return scale_D * x_BLD * jax.lax.rsqrt(jnp.mean(jnp.square(x_BLD), axis=-1, keepdims=True) + 1e-6)


def whole_sequences(x_BLD: jax.Array, mesh: Mesh) -> jax.Array:
    """FSDP: each device has its own sequences, whole, and gathers the parameters that it reads."""
    return jax.lax.with_sharding_constraint(x_BLD, NamedSharding(mesh, PartitionSpec(SEQUENCES)))


def block(layout: ShardLayout, mesh: Mesh, x_BLD: jax.Array, layer: tuple) -> tuple[jax.Array, jax.Array]:
    """Attention, then the MoE layer, each added to what came in; and the tokens of each expert."""
    params, expert_bias_E = layer
    qkv_BLD = whole_sequences(rms_norm(x_BLD, params["norms"][0]), mesh) @ params["qkv"]
    qkv_BL3HC = qkv_BLD.reshape(*x_BLD.shape[:2], 3, H, D // H)
    attended = jax.nn.dot_product_attention(*jnp.moveaxis(qkv_BL3HC, 2, 0), is_causal=True)
    x_BLD = x_BLD + attended.reshape(x_BLD.shape) @ params["out"]
    x_BLD = whole_sequences(x_BLD, mesh)
    tokens_TD = whole_sequences(rms_norm(x_BLD, params["norms"][1]), mesh).reshape(-1, D)
    moe = sharded_sparse_matmul(tokens_TD, replace(params["moe"], expert_bias_E=expert_bias_E), SPEC, layout, mesh)
    return x_BLD + moe.output_TD.reshape(x_BLD.shape), moe.tokens_per_expert_E


def loss_of(
    params: dict[str, Any], bias_NE: jax.Array, ids_BL: jax.Array, layout: ShardLayout, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """The mean over all tokens of the cross entropy of the next one, and (N, E) the tokens of each expert."""
    # The tables are gathered first: a gradient of a part of each row is not what a device can add up by itself.
    gathered = partial(jax.lax.with_sharding_constraint, shardings=NamedSharding(mesh, PartitionSpec()))
    x_BLD = whole_sequences(gathered(params["tokens"])[ids_BL[:, :-1]] + gathered(params["places"]), mesh)
    # Of each layer its input alone is kept for the backward pass.
    scanned = jax.checkpoint(partial(block, layout, mesh), prevent_cse=False)
    x_BLD, counts_NE = jax.lax.scan(scanned, x_BLD, (params["blocks"], bias_NE))
    logits_BLV = rms_norm(x_BLD, params["norm"]) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits_BLV, ids_BL[:, 1:]).mean(), counts_NE


def train_step(state: dict[str, Any], ids_BL: jax.Array, *, layout: ShardLayout, mesh: Mesh) -> tuple[dict, dict]:
    """The state after one step, and what there is to show of it.

    The balancing biases have no gradient, and the optimizer has not got them: its weight decay would pull on them.
    """
    of_params = jax.value_and_grad(loss_of, has_aux=True)
    (loss, counts_NE), gradients = of_params(state["params"], state["bias_NE"], ids_BL, layout, mesh)
    updates, optimizer = OPTIMIZER.update(gradients, state["optimizer"], state["params"])
    after = {
        "params": optax.apply_updates(state["params"], updates),
        "bias_NE": bias_update(counts_NE, BALANCE, state["bias_NE"]),
        "optimizer": optimizer,
    }
    load = jnp.max(jax.vmap(load_statistics)(counts_NE).max_over_mean)
    return after, {"loss": loss, "norm": optax.global_norm(gradients), "load": load}


# where things lie


def shardings_of(state: dict[str, Any], layout: ShardLayout, mesh: Mesh) -> dict[str, Any]:
    """MoE parameters as the layout says, below an axis of layers; of the others D lies over the fsdp axis."""
    moe: Any = jax.tree.map(
        lambda spec: PartitionSpec(None, *spec), param_specs(state["params"]["blocks"]["moe"], SPEC, layout)
    )

    def of(path: tuple, array: Any) -> PartitionSpec:
        sizes = array.shape[1:] if path[0].key == "blocks" else array.shape
        before = (None,) * (array.ndim - len(sizes))
        at = sizes.index(D) if D in sizes else None
        return PartitionSpec(*before, *("fsdp" if axis == at else None for axis in range(len(sizes))))

    rest = dict(state["params"], blocks={name: v for name, v in state["params"]["blocks"].items() if name != "moe"})
    specs: Any = jax.tree_util.tree_map_with_path(of, rest)
    specs["blocks"]["moe"] = moe
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    everywhere = NamedSharding(mesh, PartitionSpec())
    moments = optax.tree_utils.tree_map_params(
        OPTIMIZER, lambda _, sharding: sharding, state["optimizer"], placed, transform_non_params=lambda _: everywhere
    )
    return {"params": placed, "bias_NE": everywhere, "optimizer": moments}


def put(host: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that each process has, on the devices of the mesh: each process fills its own."""
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def batch(step: int, mesh: Mesh) -> jax.Array:
    """(B, L + 1) bytes: sequences of a step, the same over any devices."""
    starts_B = np.random.default_rng(step).integers(len(TEXT) - L - 1, size=B)
    host_BL = np.stack([TEXT[start : start + L + 1] for start in starts_B])
    return put(host_BL, NamedSharding(mesh, PartitionSpec(SEQUENCES)))


# the loop


def train(args: argparse.Namespace) -> None:
    """Trains, and writes losses, loads and a picture."""
    layout = ShardLayout(expert=args.expert, fsdp=args.fsdp)
    mesh = make_mesh(layout)
    params = init()
    bias_NE = np.zeros((N, SPEC.router.num_choices), np.float32)
    shapes = {"params": params, "bias_NE": bias_NE, "optimizer": jax.eval_shape(OPTIMIZER.init, params)}
    shardings = shardings_of(shapes, layout, mesh)
    folder = args.folder.absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        if args.resume:
            # The devices need not be those that wrote.
            target = jax.tree.map(
                lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes, shardings
            )
            first, state = args.save_at, checkpointer.restore(folder / f"step_{args.save_at}", target)
        else:
            first = 0
            state = jax.tree.map(put, {"params": params, "bias_NE": bias_NE},
                                 {name: shardings[name] for name in ("params", "bias_NE")})  # fmt: skip
            moments = jax.jit(OPTIMIZER.init, out_shardings=shardings["optimizer"])(state["params"])
            state["optimizer"] = moments
        run = jax.jit(partial(train_step, layout=layout, mesh=mesh), out_shardings=(shardings, None), donate_argnums=0)
        history = []
        for step in range(first, args.steps):
            state, found = run(state, batch(step, mesh))
            history.append({"step": step} | {name: float(value) for name, value in found.items()})
            if jax.process_index() == 0:
                show(history[-1], args.steps)
            if step + 1 == args.save_at:
                checkpointer.save(folder / f"step_{step + 1}", state, force=True)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "history.json").write_text(json.dumps(history))
        runs = {"jax": history}
        if args.beside is not None:
            runs[args.beside.name] = json.loads((args.beside / "history.json").read_text())
        plot(runs, folder / "history.png")


def show(now: dict, steps: int) -> None:
    """A progress bar."""
    done = now["step"] + 1
    bar = "#" * (30 * done // steps)
    text = f"[{bar:30}] {done}/{steps}  loss {now['loss']:.3f}  busiest expert {now['load']:.2f} x the mean"
    print(f"\r{text}", end="\n" if done == steps else "", flush=True)


def plot(runs: dict[str, list[dict]], path: Path) -> None:
    """Loss and load by step of each run, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure = Figure(figsize=(8, 3), layout="constrained")
    names = {"loss": "loss", "load": "busiest expert / mean"}
    for axes, (name, title) in zip(figure.subplots(1, 2), names.items(), strict=True):
        for run, history in runs.items():
            axes.plot([now["step"] for now in history], [now[name] for now in history], label=run)
        axes.set(xlabel="step", title=title)
        axes.legend()
    figure.savefig(path)
    print(f"loss and load: {path}")


# processes


def launch(processes: int) -> None:
    """Runs this command once for each process, and ends all when one fails."""
    with tempfile.TemporaryDirectory() as folder:
        own = [sys.executable, *sys.argv, "--coordinator", f"unix:{folder}/coordinator", "--process"]
        running = [subprocess.Popen([*own, str(process)]) for process in range(processes)]
        try:
            while any(each.poll() is None for each in running) and not any(each.poll() for each in running):
                time.sleep(0.1)
        finally:
            for each in running:
                each.kill()
                each.wait()
    for process, each in enumerate(running):
        if each.returncode > 0:
            raise SystemExit(f"process {process} of {processes} ended with exit code {each.returncode}")
    if any(each.returncode for each in running):
        raise SystemExit(f"exit codes of the processes: {[each.returncode for each in running]}")


def main() -> None:
    """Reads the command line; joins the processes, where there are several."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--expert", type=int, default=1, help="devices that the experts are divided over")
    parser.add_argument("--fsdp", type=int, default=1, help="devices that each parameter is divided over besides")
    parser.add_argument("--processes", type=int, default=1, help="processes that have the devices, as many each")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-at", type=int, default=10, help="the step after which a checkpoint is written")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint, which any devices have written"
    )
    parser.add_argument("--folder", type=Path, default=Path("train_jax"), help="for checkpoint, losses and picture")
    parser.add_argument("--beside", type=Path, help="the folder of another run, whose curves are drawn beside its own")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.beside is not None and not (args.beside / "history.json").is_file():
        parser.error(f"--beside is {args.beside}; a run that ended there has left a history.json")
    devices = args.expert * args.fsdp
    if devices % args.processes or B % devices:
        parser.error(f"--expert x --fsdp is {devices}; it is a multiple of --processes and divides {B} sequences")
    if args.processes > 1 and args.process is None:
        launch(args.processes)
        return
    jax.config.update("jax_platforms", "cpu")
    use_cpu_devices(devices // args.processes)
    if args.processes > 1:
        jax.distributed.initialize(
            coordinator_address=args.coordinator,
            coordinator_bind_address=args.coordinator,
            num_processes=args.processes,
            process_id=args.process,
            cluster_detection_method="deactivate",
        )
    train(args)


if __name__ == "__main__":
    main()
