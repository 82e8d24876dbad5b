"""conformance, subject torch: moe_torch on the CPU, in eager mode."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType

import numpy as np
import torch

from conformance.core.subject import Routing, Unsupported
from conformance.subjects.torch.balance import TorchBalance
from moe_ref import CapacitySpec, LayerParams, LayerSpec, RouterInputs, RouterSpec
from moe_torch.dispatcher import LocalTokenDispatcher, Permutation
from moe_torch.moe import MoE
from moe_torch.replay import capture, replay_layer
from moe_torch.router import Gate, NodeLimitedRouter
from moe_torch.routing import route


class Torch(TorchBalance):
    """`moe_torch`: the function that routes logits, and the modules of the router and of the layer."""

    name = "torch"
    version = torch.__version__
    url = "https://github.com/pytorch/pytorch"
    logit_dtypes = ("float32", "float64", "bfloat16")

    def __init__(self):
        torch.set_num_threads(1)  # a call on a few tokens is too small to share

    def route(self, logits_TE, spec, expert_bias_E, *, learned_scale=None, token_mask_T=None, **inputs):
        """Route without gradients; the seed becomes a generator."""
        with torch.no_grad():
            found = route(
                _tensor(logits_TE),
                spec,
                expert_bias_E=_maybe(expert_bias_E),
                learned_scale=_maybe(learned_scale),
                inputs=to_inputs(RouterInputs(**inputs)),
                token_mask_T=_maybe(token_mask_T),
            )
        return Routing(
            expert_ids_TK=found.expert_ids_TK.numpy(),
            weights_TK=found.weights_TK.numpy(),
            scores_TE=_numpy(found.scores_TE),
            group_ids_TL=_numpy(found.group_ids_TL),
            shared_weights_TS=_numpy(found.shared_weights_TS),
        )

    def gate(self, x_TD, gate_ED, gate_bias_E):
        """The logits of the router's own gate module."""
        gate = Gate(gate_ED.shape[1], gate_ED.shape[0], bias=gate_bias_E is not None)
        gate.weight = torch.nn.Parameter(_tensor(gate_ED))
        if gate_bias_E is not None:
            gate.bias = torch.nn.Parameter(_tensor(gate_bias_E))
        with torch.no_grad():
            return gate(_tensor(x_TD)).numpy()

    def configure(self, fields):
        """The module is built, with a small gate."""
        NodeLimitedRouter(4, RouterSpec.from_dict(fields))

    def permute(self, expert_ids_TK, num_experts):
        """Its rows are all slots; those past the experts are left off here."""
        found = LocalTokenDispatcher(num_experts).permute(_tensor(expert_ids_TK))
        counts_E = found.tokens_per_expert_E.numpy()
        return found.order_N[: counts_E.sum()].numpy(), counts_E

    def experts(self, rows_RD, tokens_per_expert_E, params, spec):
        """The module of the routed experts."""
        with torch.no_grad():
            return _loaded(params, spec).experts(_single(rows_RD), _tensor(tokens_per_expert_E)).numpy()

    def combine(self, rows_ND, order_N, weights_TK, spec):
        """The weighted sum; slots that are no row get a row of NaN, which it does not read."""
        T, K = weights_TK.shape
        slot_of_row_N = np.concatenate([order_N, np.setdiff1d(np.arange(T * K), order_N)])
        rows_RD = np.full((T * K, rows_ND.shape[1]), np.nan)
        rows_RD[: len(order_N)] = rows_ND
        permutation = Permutation(
            order_N=_tensor(slot_of_row_N),
            row_of_slot_N=_tensor(np.argsort(slot_of_row_N)),
            tokens_per_expert_E=torch.tensor([len(order_N)]),
            has_expert_TK=_tensor(np.isin(np.arange(T * K), order_N).reshape(T, K)),
        )
        # A weight that is on the input is not applied again.
        weights = _single(weights_TK) if spec.router.weight_on == "output" else None
        summed_TD = LocalTokenDispatcher(1).combine(_single(rows_RD), permutation, weights)
        return (summed_TD * spec.router.output_scale).numpy()

    def layer(self, x_TD, params, spec, **inputs):
        """The module, without gradients."""
        with torch.no_grad():
            moe, named = _loaded(params, spec, inputs), _layer_inputs(**inputs)
            return moe(_single(x_TD), **named).numpy()

    def layer_gradients(self, x_TD, params, spec, d_output_TD, **inputs):
        """By autograd, brought back into the canonical layout; the balancing bias is a buffer and has none."""
        moe, tokens_TD = _loaded(params, spec, inputs), _single(x_TD).requires_grad_()
        trained = dict(moe.named_parameters())
        output_TD = moe(tokens_TD, **_layer_inputs(**inputs))
        d_x_TD, *gradients = torch.autograd.grad(
            output_TD, [tokens_TD, *trained.values()], _single(d_output_TD), allow_unused=True, materialize_grads=True
        )
        by_name = {name: gradient.numpy() for name, gradient in zip(trained, gradients, strict=True)}
        return {"x_TD": d_x_TD.numpy()} | to_canonical(by_name, params)

    def record(self, x_TD, params, spec, **inputs):
        """What the module decided."""
        named = _layer_inputs(**inputs)
        with torch.no_grad():
            _, routing = _loaded(params, spec, inputs).forward_and_routing(_single(x_TD), **named)
        return capture(routing, spec.router, token_mask=named["token_mask"])

    def replay(self, x_TD, params, spec, record):
        """The module, with the ids of the record, and its weights where it has any."""
        with torch.no_grad():
            moe, with_weights = _loaded(params, spec), record.weights_TK is not None
            return replay_layer(moe, _single(x_TD), record, with_weights=with_weights).numpy()


@lru_cache(maxsize=64)
def _built(spec: LayerSpec, capacity: CapacitySpec | None) -> MoE:
    return MoE(spec, capacity=capacity).eval()


def _loaded(params: LayerParams, spec: LayerSpec, inputs: Mapping = MappingProxyType({})) -> MoE:
    """The layer of a spec with these parameters, and with the capacity among the inputs."""
    moe = _built(spec, inputs.get("capacity"))
    moe.load_params(params)
    return moe


def _layer_inputs(*, token_mask_T=None, capacity=None, sequence_lengths=None, tokens_per_shard=None, **inputs) -> dict:
    """Keyword arguments of the layer; its capacity is one of the module."""
    if tokens_per_shard is not None:
        raise Unsupported("a layer of moe_torch is on one rank, and has no shards")
    named = {"token_mask": _maybe(token_mask_T), "inputs": to_inputs(RouterInputs(**inputs))}
    return named if sequence_lengths is None else named | {"sequence_lengths": sequence_lengths}


def to_inputs(inputs: RouterInputs) -> RouterInputs:
    """The same inputs as tensors; the seed becomes a generator."""
    generator = None if inputs.seed is None else torch.Generator().manual_seed(inputs.seed)
    return replace(inputs.map(_tensor), seed=generator)


def to_canonical(by_name: dict[str, np.ndarray], params: LayerParams) -> dict[str, np.ndarray]:
    """Field of LayerParams -> value, from the names and shapes of the module; `params` gives the shapes."""
    gated = params.w_gate_EDF is not None
    # Without a gate the activation stands on the up projection, and that is w1.
    first, third = ("gate", "up") if gated else ("up", "none")
    names = {
        "router.gate.weight": "gate_ED",
        "router.gate.bias": "gate_bias_E",
        "router.learned_scale": "learned_scale",
        "experts.w1_EFD": f"w_{first}_EDF",
        "experts.w2_EDF": "w_down_EFD",
        "experts.w3_EFD": f"w_{third}_EDF",
        "experts.b1_EF": f"b_{first}_EF",
        "experts.b2_ED": "b_down_ED",
        "experts.b3_EF": f"b_{third}_EF",
        "shared_experts.w1.weight": f"shared_w_{first}_SDF",
        "shared_experts.w2.weight": "shared_w_down_SFD",
        "shared_experts.w3.weight": f"shared_w_{third}_SDF",
        "shared_experts.token_gate.weight": "shared_token_gate_D",
    }
    found = {}
    for name, value in by_name.items():
        field = names[name]
        shape = np.shape(getattr(params, field))
        if field == "shared_w_down_SFD":
            value = value.T  # (D, S * F)
        elif "w_" in field:
            # (E, out, in), or (S * out, in) where shared experts are side by side.
            value = np.swapaxes(value.reshape(shape[0], shape[2], shape[1]), 1, 2)
        found[field] = value.reshape(shape)
    return found


def _tensor(array) -> torch.Tensor:
    """A tensor of the same dtype, with its own memory; bfloat16 arrives as ml_dtypes arrays, unknown to torch."""
    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _single(array) -> torch.Tensor:
    """A float32 tensor."""
    return _tensor(array).float()


def _maybe(array) -> torch.Tensor | None:
    return None if array is None else _tensor(array)


def _numpy(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.numpy()
