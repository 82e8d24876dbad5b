"""conformance, subject torch: the layer of moe_torch on one rank, in eager mode."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Unpack

import numpy as np
import torch

from conformance.core.inputs import LayerInputs, split_inputs
from conformance.core.subject import Subject
from conformance.subjects.torch.arrays import device, single, tensor, tensor_if_any, to_canonical, to_inputs, to_numpy
from moe_ref import AlignSpec, CapacitySpec, LayerParams, LayerSpec, ReplicaSpec, RoutingRecord
from moe_ref.specs.params import FeedForward
from moe_ref.specs.upcycle import upcycle
from moe_torch.balance import tokens_per_expert
from moe_torch.dispatcher import LocalTokenDispatcher, Permutation
from moe_torch.fused import FusedMoE
from moe_torch.moe import MoE
from moe_torch.replay import capture, replay_layer
from moe_torch.replicas import home, place_slots


class TorchLayer(Subject):
    """The module `MoE`, and its parts one by one."""

    def permute(self, expert_ids_TK: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
        """Its rows are all slots; those past the experts are left off here."""
        found = LocalTokenDispatcher(num_experts).permute(tensor(expert_ids_TK))
        counts_E = to_numpy(found.tokens_per_expert_E)
        return to_numpy(found.order_N[: counts_E.sum()]), counts_E

    def align(self, expert_ids_TK: np.ndarray, num_experts: int, align: AlignSpec) -> tuple[np.ndarray, np.ndarray]:
        """Its rows are as many as the spec allows at most; those past the experts are sentinels."""
        dispatcher = LocalTokenDispatcher(num_experts)
        found = dispatcher.align_rows(dispatcher.permute(tensor(expert_ids_TK)), align)
        return to_numpy(found.slot_of_row_A), to_numpy(found.rows_per_expert_E)

    def experts(
        self, rows_RD: np.ndarray, tokens_per_expert_E: np.ndarray, params: LayerParams, spec: LayerSpec
    ) -> np.ndarray:
        """The module of the routed experts."""
        with torch.no_grad():
            return to_numpy(_loaded(params, spec).experts(single(rows_RD), tensor(tokens_per_expert_E)))

    def combine(self, rows_ND: np.ndarray, order_N: np.ndarray, weights_TK: np.ndarray, spec: LayerSpec) -> np.ndarray:
        """The weighted sum; slots that are no row get a row of NaN, which it does not read."""
        T, K = weights_TK.shape
        slot_of_row_N = np.concatenate([order_N, np.setdiff1d(np.arange(T * K), order_N)])
        rows_RD = np.full((T * K, rows_ND.shape[1]), np.nan)
        rows_RD[: len(order_N)] = rows_ND
        permutation = Permutation(
            order_N=tensor(slot_of_row_N),
            row_of_slot_N=tensor(np.argsort(slot_of_row_N)),
            tokens_per_expert_E=tensor([len(order_N)]),
            has_expert_TK=tensor(np.isin(np.arange(T * K), order_N).reshape(T, K)),
        )
        # A weight that is on the input is not applied again.
        weights = single(weights_TK) if spec.router.weight_on == "output" else None
        summed_TD = LocalTokenDispatcher(1).combine(single(rows_RD), permutation, weights)
        return to_numpy(summed_TD * spec.router.output_scale)

    def layer(
        self,
        x_TD: np.ndarray,
        params: LayerParams,
        spec: LayerSpec,
        *,
        batch_invariant: bool = False,
        **inputs: Unpack[LayerInputs],
    ) -> np.ndarray:
        """The module, without gradients."""
        with torch.no_grad():
            moe = _loaded(params, spec, inputs)
            moe.batch_invariant = batch_invariant
            try:
                return to_numpy(moe(single(x_TD), **_how(inputs)))
            finally:
                moe.batch_invariant = False

    def fused_layer(
        self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, **inputs: Unpack[LayerInputs]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The module `FusedMoE`."""
        moe = FusedMoE(spec, device=device()).eval()
        moe.load_params(params)
        with torch.no_grad():
            output_TD, routing = moe.forward_and_routing(single(x_TD), **_how(inputs))
        counts_E = tokens_per_expert(routing.expert_ids_TK, spec.router.num_experts)
        return to_numpy(output_TD), to_numpy(counts_E)

    def upcycled_layer(self, x_TD: np.ndarray, dense: Mapping[str, np.ndarray], spec: LayerSpec) -> np.ndarray:
        """The module, loaded with what `upcycle` makes."""
        return self.layer(x_TD, upcycle(FeedForward(**dense), spec, gate_std=1.0), spec)

    def layer_gradients(
        self,
        x_TD: np.ndarray,
        params: LayerParams,
        spec: LayerSpec,
        d_output_TD: np.ndarray,
        **inputs: Unpack[LayerInputs],
    ) -> dict[str, np.ndarray]:
        """By autograd, brought back into the canonical layout; the balancing bias is a buffer and has none."""
        moe, tokens_TD = _loaded(params, spec, inputs), single(x_TD).requires_grad_()
        trained = dict(moe.named_parameters())
        output_TD = moe(tokens_TD, **_how(inputs))
        d_x_TD, *gradients = torch.autograd.grad(
            output_TD, [tokens_TD, *trained.values()], single(d_output_TD), allow_unused=True, materialize_grads=True
        )
        by_name = {name: to_numpy(gradient) for name, gradient in zip(trained, gradients, strict=True)}
        return {"x_TD": to_numpy(d_x_TD)} | to_canonical(by_name, params)

    def place_slots(self, expert_ids_TK: np.ndarray, replicas: ReplicaSpec) -> np.ndarray:
        """The function, on the device."""
        return to_numpy(place_slots(tensor(expert_ids_TK), replicas))

    def home(self, values_P: np.ndarray, replicas: ReplicaSpec) -> np.ndarray:
        """The function, on the device."""
        return to_numpy(home(tensor(values_P), replicas))

    def record(
        self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, **inputs: Unpack[LayerInputs]
    ) -> RoutingRecord:
        """What the module decided."""
        how = _how(inputs)
        with torch.no_grad():
            _, routing = _loaded(params, spec, inputs).forward_and_routing(single(x_TD), **how)
        return capture(routing, spec.router, token_mask=how["token_mask"])

    def replay(self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, record: RoutingRecord) -> np.ndarray:
        """The module, with the ids of the record, and its weights where it has any."""
        with torch.no_grad():
            moe, with_weights = _loaded(params, spec), record.weights_TK is not None
            return to_numpy(replay_layer(moe, single(x_TD), record, with_weights=with_weights))


@lru_cache(maxsize=64)
def _built(spec: LayerSpec, capacity: CapacitySpec | None, align: AlignSpec | None) -> MoE:
    return MoE(spec, capacity=capacity, align=align, device=device()).eval()


def _loaded(params: LayerParams, spec: LayerSpec, inputs: LayerInputs | None = None) -> MoE:
    """The layer of a spec with these parameters, and with the capacity and the alignment of the inputs."""
    given = inputs or {}
    moe = _built(spec, given.get("capacity"), given.get("align"))
    moe.load_params(params)
    return moe


def _how(inputs: LayerInputs) -> dict:
    """Keyword arguments of the layer; its capacity is one of the module."""
    own, rest = split_inputs(inputs, LayerInputs)
    named = {"token_mask": tensor_if_any(rest.get("token_mask_T")), "inputs": to_inputs(own)}
    lengths = rest.get("sequence_lengths")
    return named if lengths is None else named | {"sequence_lengths": lengths}
