"""Tests, what ranks run of training: a small model with a parallel layer, its optimizer, clipping, and checkpoints."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from conformance.subjects.torch.sharded import mesh_of, parallel_layer
from moe_ref import BiasUpdateSpec, LayerParams, LayerSpec
from moe_ref.specs.layout import ShardLayout
from moe_torch.bias_hook import BiasHook
from moe_torch.moe import MoE
from moe_torch.parallel import states
from moe_torch.parallel.parallelize import parallelize, sync_gradients
from moe_torch.parallel.params import full_tensors

OPTIMIZERS = {
    "AdamW, foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


class Model(nn.Module):
    """A layer between others, as in a transformer."""

    def __init__(self, spec: LayerSpec, params: LayerParams | None):
        super().__init__()
        torch.manual_seed(0)
        dim = spec.experts.dim
        self.first = nn.Linear(dim, dim)
        self.moe = MoE(spec)
        self.last = nn.Linear(dim, dim)
        if params is not None:
            self.moe.load_params(params)

    def forward(self, x_TD: Tensor) -> Tensor:
        hidden_TD = self.first(x_TD)
        return self.last(hidden_TD + self.moe(hidden_TD))


def model_on_rank(spec: LayerSpec, params: LayerParams | None, layout: ShardLayout, rest: str = "plain") -> Model:
    """The model over ranks.

    rest: 'plain', the same on all; 'same mesh', by FSDP2 over the mesh of the layer; 'other mesh', over all ranks.
    """
    model = Model(spec, params)
    mesh = mesh_of(layout.data, layout.fsdp, layout.expert, layout.tensor)
    parallelize(model.moe, mesh, layout)
    if rest != "plain":
        other = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model, mesh=mesh if rest == "same mesh" else other, ignored_params=set(model.moe.parameters()))
        assert isinstance(model, FSDPModule)
        model.set_gradient_divide_factor(1.0)
        model.set_force_sum_reduction_for_comms(True)
    return model


def own_tokens(x_TD: np.ndarray, layout: ShardLayout) -> Tensor:
    """Consecutive tokens for each rank that has its own."""
    parts = np.array_split(x_TD, layout.num_token_shards)
    return torch.tensor(parts[layout.shard_of(dist.get_rank())])


def backward(model: Model, x_TD: Tensor) -> None:
    """For a loss that is the sum over all tokens of all ranks."""
    model(x_TD).square().sum().backward()


def finish(model: Model, layout: ShardLayout, rest: str) -> None:
    """Sums what is still to be summed: of a layer, and of plain parameters outside of it."""
    sync_gradients(model.moe)
    if rest == "plain" and not layout.facts.shares_tokens:
        for parameter in (*model.first.parameters(), *model.last.parameters()):
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= layout.tensor


def train(model: Model, optimizer, hook: BiasHook, batches, layout: ShardLayout, rest: str) -> None:
    """A step for each batch."""
    for x_TD in batches:
        backward(model, own_tokens(x_TD, layout))
        finish(model, layout, rest)
        optimizer.step()
        optimizer.zero_grad()


def whole(model: nn.Module) -> dict[str, np.ndarray]:
    """Every parameter and buffer that a checkpoint has, whole."""
    found = {**dict(model.named_parameters()), **model.state_dict()}
    return {
        name: (v.full_tensor() if isinstance(v, DTensor) else v).detach().numpy().copy() for name, v in found.items()
    }


# What the tests call.


def clip_on_rank(spec: LayerSpec, params, layout: ShardLayout, x_TD, sync: bool) -> tuple[float, dict]:
    """The norm of a layer's gradients by torch's own function, and all gradients after it."""
    moe = parallel_layer(params, spec, layout)
    moe(own_tokens(x_TD, layout)).square().sum().backward()
    if sync:
        sync_gradients(moe)
    norm = clip_grad_norm_(moe.parameters(), 1.0)
    assert isinstance(norm, DTensor)
    gradients = {name: value.numpy() for name, value in full_tensors(moe, gradients=True).items()}
    return norm.full_tensor().item(), gradients


def clip_model_on_rank(spec: LayerSpec, params, layout: ShardLayout, x_TD, rest: str) -> tuple[float, dict, str]:
    """The norm of a model's gradients, gradients after it, and the error of torch's own function where it raises."""
    model, message = model_on_rank(spec, params, layout, rest), ""
    backward(model, own_tokens(x_TD, layout))
    finish(model, layout, rest)
    try:
        norm = clip_grad_norm_(model.parameters(), 1.0)
    except RuntimeError as error:
        message, norm = str(error), states.clip_grad_norm_(model.parameters(), 1.0)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    full = {name: (g.full_tensor() if isinstance(g, DTensor) else g).numpy() for name, g in gradients.items()}
    return norm.item(), full, message


def outer_fsdp_on_rank(spec: LayerSpec, params, x_TD) -> dict[str, np.ndarray]:
    """Gradients of a layer over two ranks, where the model's FSDP2 takes its parameters with all others."""
    layout, model = ShardLayout(fsdp=2, expert=2), Model(spec, params)
    mesh = mesh_of(1, 2, 2, 1)
    parallelize(model.moe, mesh["expert"], ShardLayout(expert=2))
    fully_shard(model, mesh=mesh["fsdp"])
    assert isinstance(model, FSDPModule)
    model.set_gradient_divide_factor(1.0)
    model.set_force_sum_reduction_for_comms(True)
    backward(model, own_tokens(x_TD, layout))
    return {name: value.numpy() for name, value in full_tensors(model.moe, gradients=True).items()}


def optimize_on_rank(spec: LayerSpec, params, layout: ShardLayout, batches, rest: str, name: str) -> dict:
    """All parameters after some steps, with all of them in one group."""
    model = model_on_rank(spec, params, layout, rest)
    hook = BiasHook(model, BiasUpdateSpec(rate=0.01), group=dist.group.WORLD)
    optimizer = OPTIMIZERS[name](model.parameters())
    hook.register(optimizer)
    train(model, optimizer, hook, batches, layout, rest)
    return whole(model)


def save_on_rank(spec: LayerSpec, params, layout: ShardLayout, batches, folder: Path) -> tuple[dict, dict, dict]:
    """Trains, saves, trains on: all when it saved, what a full state dict had then, and all at the end."""
    model = model_on_rank(spec, params, layout, "same mesh")
    hook = BiasHook(model, BiasUpdateSpec(rate=0.01), group=dist.group.WORLD)
    optimizer = OPTIMIZERS["AdamW, foreach"](model.parameters())
    hook.register(optimizer)
    train(model, optimizer, hook, batches[:2], layout, "same mesh")
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    saved, state = whole(model), get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    full = {name: value.numpy().copy() for name, value in state.items()}
    train(model, optimizer, hook, batches[2:], layout, "same mesh")
    return saved, full, whole(model)


def load_on_rank(spec: LayerSpec, params, layout: ShardLayout, batches, folder: Path) -> tuple[dict, dict]:
    """Loads what another layout saved into a model that starts from other numbers, and trains on."""
    model = model_on_rank(spec, params, layout, "same mesh")
    hook = BiasHook(model, BiasUpdateSpec(rate=0.01), group=dist.group.WORLD)
    optimizer = OPTIMIZERS["AdamW, foreach"](model.parameters())
    hook.register(optimizer)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    loaded = whole(model)
    train(model, optimizer, hook, batches[2:], layout, "same mesh")
    return loaded, whole(model)


def take_back_on_rank(spec: LayerSpec, params, others, layout: ShardLayout) -> dict[str, dict]:
    """A layer that starts from `others` takes the state dict of one with `params`, in each of the ways there are."""
    one = MoE(spec)
    one.load_params(params)
    plain, found = one.state_dict(), {}
    for way in (
        "load_params",
        "load_state_dict, whole",
        "load_state_dict, over ranks",
        "set_model_state_dict",
        "deepcopy",
    ):
        moe = parallel_layer(others, spec, layout)
        if way == "load_params":
            moe.load_params(params)
        elif way == "load_state_dict, whole":
            moe.load_state_dict(plain)
        elif way == "deepcopy":
            # As an average of weights keeps one; FSDP2 refuses it.
            moe = parallel_layer(params, spec, layout)
            moe = moe if isinstance(moe, FSDPModule) else deepcopy(moe)
        elif way == "load_state_dict, over ranks":
            moe.load_state_dict(parallel_layer(params, spec, layout).state_dict())
        else:
            set_model_state_dict(moe, dict(plain), options=StateDictOptions(full_state_dict=True))
        found[way] = whole(moe)
    return found | {"wanted": {name: value.numpy() for name, value in plain.items()}}


def placed_on_rank(spec: LayerSpec, params, others, layout: ShardLayout) -> tuple[list[str], dict]:
    """The errors of a layer with a placement, and what it has of a whole state dict."""
    moe, errors = parallel_layer(others, spec, layout), []
    plain = MoE(spec)
    plain.load_params(params)
    same = parallel_layer(params, spec, layout.replace(placement=None)).state_dict()
    for call in (moe.state_dict, lambda: get_model_state_dict(moe), lambda: moe.load_state_dict(same)):
        try:
            call()
        except ValueError as error:
            errors.append(str(error))
    moe.load_state_dict(plain.state_dict())
    return errors, {name: value.numpy() for name, value in full_tensors(moe).items()}


def meta_on_rank(spec: LayerSpec, params, layout: ShardLayout, way: str) -> dict[str, list]:
    """A layer that is built on the meta device, laid over ranks and filled: its state by what each rank stores."""
    with torch.device("meta"):
        moe = MoE(spec)
    parallelize(moe, mesh_of(layout.data, layout.fsdp, layout.expert, layout.tensor), layout)
    torch.use_deterministic_algorithms(True)  # then uninitialised memory holds NaN
    moe.to_empty(device="cpu")
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(dist.get_rank())  # nobody promises that ranks have the same seed
    if way == "reset_parameters":
        moe.reset_parameters()
    else:
        one = MoE(spec)
        one.load_params(params)
        moe.load_state_dict(one.state_dict())
    own = {n: (v.to_local() if isinstance(v, DTensor) else v).detach().numpy() for n, v in moe.named_parameters()}
    return own | {name: value.numpy() for name, value in moe.named_buffers()}


def second_order(moe: MoE, x_TD: Tensor) -> dict[str, np.ndarray]:
    """Gradients of the squared gradient of the tokens, of the tokens and of each parameter."""
    x_TD.requires_grad_()
    (d_x_TD,) = torch.autograd.grad(moe(x_TD).square().sum(), x_TD, create_graph=True)
    d_x_TD.square().sum().backward()
    assert x_TD.grad is not None
    found = {name: p.grad for name, p in moe.named_parameters() if p.grad is not None}
    full = {name: (g.full_tensor() if isinstance(g, DTensor) else g).numpy() for name, g in found.items()}
    return {"x": x_TD.grad.numpy()} | full


def second_order_on_rank(spec: LayerSpec, params, layout: ShardLayout, x_TD) -> dict[str, np.ndarray]:
    """The same of this rank's tokens, and of all parameters."""
    return second_order(parallel_layer(params, spec, layout), own_tokens(x_TD, layout))


def refused_transform_on_rank(spec: LayerSpec, layout: ShardLayout) -> str:
    """The error of torch.func over ranks."""
    moe = parallel_layer(None, spec, layout)
    try:
        torch.func.grad(lambda x_TD: moe(x_TD).sum())(torch.ones(3, spec.experts.dim))
    except RuntimeError as error:
        return str(error)
    return ""
