"""conformance, subject megatron: its modules TopKRouter and MoELayer, built without a trainer, on a CPU.

megatron-core asks for a GPU in a few places of its MoE layer. What stands in for one is all here (`_Stream`,
`SUBSTITUTES`): a device that is the CPU, streams that do nothing, split sizes that are handed to a collective as NumPy
arrays, as they are for tensors of a GPU; and a mean over ranks, which gloo has not. `torch.compile` leaves functions as
they are.
"""

import contextlib
import importlib
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from conformance.core.subject import Unsupported
from conformance.subjects.megatron.settings import BALANCING, capacity_entries, layer_entries, router_entries
from conformance.subjects.torch.arrays import to_numpy, to_torch
from moe_ref import CapacitySpec, LayerParams, LayerSpec, RouterSpec


class _Stream:
    """A stream, and an event of it, of a device that has none."""

    def wait_stream(self, other: Any) -> None:
        """Nothing is out of order."""

    def record_event(self) -> "_Stream":
        return self

    def synchronize(self) -> None:
        """Nothing is out of order."""


def _as_on_a_gpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """`maybe_move_tensor_to_cpu`, which leaves tensors that are there already as they are, as_numpy or not."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


_of_torch = dist.all_reduce


def _all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
    """`all_reduce`, with the mean that gloo has not, of which `_update_router_qb_beta` makes use."""
    if op != dist.ReduceOp.AVG:
        return _of_torch(tensor, op, group, async_op)
    _of_torch(tensor, dist.ReduceOp.SUM, group)
    tensor /= dist.get_world_size(group)
    return None


torch.compiler.set_stance("force_eager")
# By name: it is not in the environment in which types are checked.
_load: Callable[[str], Any] = importlib.import_module
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what else is not installed
    finalize = _load("megatron.core.distributed.finalize_model_grads")
    parallel_state = _load("megatron.core.parallel_state")
    moe_utils = _load("megatron.core.transformer.moe.moe_utils")
    routers = _load("megatron.core.transformer.moe.router")
    router_replay = _load("megatron.core.transformer.moe.router_replay")
    token_dispatcher = _load("megatron.core.transformer.moe.token_dispatcher")
    tracker = _load("megatron.core.transformer.moe.moe_logging").get_moe_metrics_tracker
    activations = _load("megatron.core.activations")
    get_moe_module_spec = _load("megatron.core.models.gpt.moe_module_specs").get_moe_module_spec
    TransformerConfig = _load("megatron.core.transformer.transformer_config").TransformerConfig
    ProcessGroupCollection = _load("megatron.core.process_groups_config").ProcessGroupCollection

SUBSTITUTES: tuple[tuple[Any, str, Any], ...] = (
    (torch.cuda, "current_device", lambda: "cpu"),
    (torch.cuda, "Stream", _Stream),
    (torch.cuda, "current_stream", lambda device=None: None),
    (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
    (token_dispatcher, "maybe_move_tensor_to_cpu", _as_on_a_gpu),
    (dist, "all_reduce", _all_reduce),
)
for _module, _name, _substitute in SUBSTITUTES:
    setattr(_module, _name, _substitute)

ACTIVATIONS = {
    "silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu, "relu": torch.nn.functional.relu,
    "quick_gelu": activations.quick_gelu, "fast_gelu": activations.fast_gelu,
    "squared_relu": activations.squared_relu,
}  # fmt: skip


@lru_cache(maxsize=1)
def groups_of_one() -> Any:
    """The process groups of a world of one rank, which is made where there is none."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    start_model_parallel()
    return moe_utils.get_default_pg_collection()


def start_model_parallel() -> None:
    """Its globals, for as many ranks as there are, each with all experts."""
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()


def config_of(entries: dict[str, Any]) -> Any:
    """A config as a training would have it, with its own validation, of a model with one layer."""
    sizes = {"num_layers": 1, "num_attention_heads": 1, "hidden_size": 8, "add_bias_linear": False}
    plain = {"use_cpu_initialization": True, "perform_initialization": False, "moe_router_load_balancing_type": "none"}
    found = sizes | plain | entries
    found.setdefault("moe_ffn_hidden_size", 8)
    found["ffn_hidden_size"] = found["moe_ffn_hidden_size"]
    found["activation_func"] = ACTIVATIONS[found.get("activation_func", "silu")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that many experts are better scored in float32
        return TransformerConfig(**found)


def built_router(spec: RouterSpec, *, expert_bias: bool, more: tuple = ()) -> Any:
    """The router of a spec, with further entries of its config; kept.

    Raises:
        Unsupported: Megatron has no such router; a sentence that says why.
    """
    try:
        entries = router_entries(spec, expert_bias=expert_bias)
    except ValueError as sentence:
        raise Unsupported(str(sentence)) from None
    if both := sorted(entries.keys() & dict(more).keys()):
        raise Unsupported(f"Megatron has {entries[both[0]]} in place of another {both[0]}")
    return router_of(tuple((entries | dict(more)).items()))


@lru_cache(maxsize=512)
def router_of(entries: tuple) -> Any:
    """A router with untrained weights, in training, which is when it counts and has losses."""
    router = routers.TopKRouter(config=config_of(dict(entries)), pg_collection=groups_of_one())
    router.set_layer_number(1)
    with torch.no_grad():
        router.weight.zero_()
    return router.train()


def built_layer(
    spec: LayerSpec, *, expert_bias: bool = False, capacity: CapacitySpec | None = None, more: tuple = ()
) -> Any:
    """The layer of a spec on one rank, with a capacity and further entries of its config; kept. Errors as above."""
    return layer_of(entries_of(spec, expert_bias=expert_bias, capacity=capacity, more=more))


def entries_of(spec: LayerSpec, *, expert_bias: bool, capacity: CapacitySpec | None = None, more: tuple = ()) -> tuple:
    """All entries of a layer.

    Raises:
        Unsupported: Megatron has no such layer; a sentence that says why.
    """
    try:
        entries = layer_entries(spec, expert_bias=expert_bias) | capacity_entries(capacity)
    except ValueError as sentence:
        raise Unsupported(str(sentence)) from None
    if capacity is not None and BALANCING in entries:
        raise Unsupported(f"Megatron has no capacity with {entries[BALANCING]}")
    return tuple((entries | dict(more)).items())


@lru_cache(maxsize=256)
def layer_of(entries: tuple) -> Any:
    """A layer on one rank."""
    return made_layer(config_of(dict(entries)), groups_of_one())


def made_layer(config: Any, groups: Any) -> Any:
    """A layer with untrained weights, whose experts are a slice of all."""
    build = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts)
    layer = build(config=config, pg_collection=groups)
    layer.set_layer_number(1)
    return layer.train()


# parameters


def parameters_of(layer: Any, params: LayerParams, first: int = 0) -> dict[str, np.ndarray]:
    """Path in the layer -> the value that it has of these parameters; its first expert is `first`."""
    found = {}
    for path, parameter in layer.named_parameters():
        value = to_native(path, params, first)
        found[path] = np.reshape(value, tuple(parameter.shape))
    return found


def to_native(path: str, params: LayerParams, first: int) -> np.ndarray:
    """A parameter as the layer keeps it: gate and up are one, [out, in]."""
    names = path.split(".")
    if names[0] == "router":
        found = params.gate_ED if names[1] == "weight" else params.gate_bias_E
    elif names[0] == "shared_experts":
        if names[1] == "gate_weight":
            found = params.shared_token_gate_D
        elif names[1] == "linear_fc1":
            found = _fused(params.shared_w_gate_SDF, params.shared_w_up_SDF, 0)
        else:
            found = _one(params.shared_w_down_SFD, 0)
    else:
        e, what = first + int(names[2]), names[3:]
        if what == ["linear_fc1", "weight"]:
            found = _fused(params.w_gate_EDF, params.w_up_EDF, e)
        elif what == ["linear_fc2", "weight"]:
            found = _one(params.w_down_EFD, e)
        elif what == ["linear_fc1", "bias"]:
            halves = [params.b_gate_EF, params.b_up_EF]
            found = np.concatenate([half[e] for half in halves if half is not None])
        else:
            found = _row(params.b_down_ED, e)
    assert found is not None
    return found


def _row(values: np.ndarray | None, index: int) -> np.ndarray:
    assert values is not None
    return values[index]


def _one(values: np.ndarray | None, index: int) -> np.ndarray:
    return _row(values, index).T


def _fused(gate: np.ndarray | None, up: np.ndarray | None, index: int) -> np.ndarray:
    halves = [half[index] for half in (gate, up) if half is not None]
    return np.concatenate(halves, axis=1).T


def load_params(layer: Any, params: LayerParams, first: int = 0) -> None:
    """Write parameters and balancing bias into a layer."""
    with torch.no_grad():
        for path, value in parameters_of(layer, params, first).items():
            layer.get_parameter(path).copy_(to_torch(value))
        set_bias(layer.router, params.expert_bias_E)


def to_canonical(by_path: dict[str, np.ndarray], params: LayerParams, first: int = 0) -> dict[str, np.ndarray]:
    """Gradients by path -> by field of LayerParams; those of experts that a rank has not got are 0."""
    found: dict[str, np.ndarray] = {}

    def add(name: str, index: int, value: np.ndarray) -> None:
        whole = getattr(params, name)
        found.setdefault(name, np.zeros(whole.shape, value.dtype))[index] = value

    for path, value in by_path.items():
        names = path.split(".")
        if names[0] == "router":
            found["gate_ED" if names[1] == "weight" else "gate_bias_E"] = value
        elif names[-1] == "gate_weight":
            found["shared_token_gate_D"] = value.reshape(-1)
        else:
            shared = names[0] == "shared_experts"
            index = 0 if shared else first + int(names[2])
            of = {"fc1": ("gate", "up"), "fc2": ("down",)}[names[-2].removeprefix("linear_")]
            letter = {("fc1", "weight"): "DF", ("fc2", "weight"): "FD", ("fc1", "bias"): "F", ("fc2", "bias"): "D"}
            suffix = letter[names[-2].removeprefix("linear_"), names[-1]]
            kind, axis = ("w", "S" if shared else "E") if names[-1] == "weight" else ("b", "E")
            halves = [f"{'shared_' if shared else ''}{kind}_{half}_{axis}{suffix}" for half in of]
            halves = [name for name in halves if getattr(params, name) is not None]
            for name, part in zip(halves, np.split(value, len(halves), axis=0), strict=True):
                add(name, index, part.T)
    return found


# routing


def set_bias(router: Any, expert_bias_E: np.ndarray | None) -> None:
    """Write the balancing bias, whose negative is the beta of quantile balancing, which is always there."""
    if router.qb_beta is not None:
        router.qb_beta.zero_()
        if expert_bias_E is not None:
            router.qb_beta.sub_(to_torch(expert_bias_E))
    elif expert_bias_E is not None:
        router.expert_bias.copy_(to_torch(expert_bias_E))


def hold_slots(router: Any, num_tokens: int) -> None:
    """In training it takes the quantile of each batch, which it refuses where that is not of a whole number of tokens.

    Raises:
        Unsupported: the sentence.
    """
    if router.qb_beta is not None and torch.is_grad_enabled():
        hold_share(num_tokens, router.topk, router.config.num_moe_experts)


def hold_share(num_tokens: int, top_k: int, num_experts: int) -> None:
    """The number of slots is a multiple of that of the experts.

    Raises:
        Unsupported: it is not.
    """
    if num_tokens * top_k % num_experts:
        sizes = f"{num_tokens} * {top_k}, {num_experts}"
        raise Unsupported(f"Megatron's quantile balancing asks for slots that are a multiple of the experts ({sizes})")


def routed_ids(probs_TE: torch.Tensor, map_TE: torch.Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """(T, K) ids in ascending order and their weights, from its dense arrays; -1 where a token has fewer experts."""
    dense_TE, chosen_TE = to_numpy(probs_TE.detach()), to_numpy(map_TE)
    order_TE = np.argsort(~chosen_TE, axis=-1, kind="stable")
    K = max(top_k, int(chosen_TE.sum(axis=-1).max(initial=0)))
    ids_TK = order_TE[:, :K]
    used_TK = np.take_along_axis(chosen_TE, ids_TK, axis=-1)
    weights_TK = np.take_along_axis(dense_TE, ids_TK, axis=-1)
    return np.where(used_TK, ids_TK, -1), np.where(used_TK, weights_TK, 0)


def map_of(expert_ids_TK: np.ndarray, num_experts: int) -> torch.Tensor:
    """Its (T, E) map of a choice; unused slots and null experts are nowhere."""
    ids_TK = torch.from_numpy(np.ascontiguousarray(expert_ids_TK, np.int64))
    inside_TK = (ids_TK >= 0) & (ids_TK < num_experts)
    found_TE = torch.zeros((len(ids_TK), num_experts + 1), dtype=torch.bool)
    found_TE.scatter_(1, torch.where(inside_TK, ids_TK, num_experts), True)
    return found_TE[:, :num_experts]


@contextlib.contextmanager
def replaying(router: Any, given_TK: np.ndarray | None):
    """Its replay: the given ids are chosen; without them it chooses."""
    if given_TK is None:
        yield
        return
    if (np.asarray(given_TK) < 0).any():
        raise Unsupported("Megatron's replay has an expert in each slot")
    replay = router.router_replay
    replay.set_target_indices(to_torch(np.asarray(given_TK, np.int64)))
    replay.set_router_replay_action(router_replay.RouterReplayAction.REPLAY_FORWARD)
    try:
        yield
    finally:
        replay.clear_router_replay_action()
        replay.clear_indices()


MOST_ROUNDS = 1000
"""Most calls of `sinkhorn` end within a hundred rounds; others go on for more than 100,000."""


class Rounds(TorchFunctionMode):
    """Counts the rounds of its `sinkhorn`, each of which takes one mean, and ends a loop that goes on and on."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.mean:
            self.number += 1
            if self.number > MOST_ROUNDS:
                raise RuntimeError(f"sinkhorn is not within its tolerance after {MOST_ROUNDS} rounds, and goes on")
        return func(*args, **(kwargs or {}))


def routed(router: Any, logits_T1E: torch.Tensor, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Its `routing`: (T, E) weights, and the map of what is chosen."""
    with Rounds() if router.routing_type == "sinkhorn" else contextlib.nullcontext():
        return router.routing(logits_T1E, **more)
