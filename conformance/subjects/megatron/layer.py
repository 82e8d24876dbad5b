"""conformance, subject megatron: its MoELayer on one rank, with the dispatcher that is asked for, and its stages."""

from typing import Any, ClassVar, Unpack

import numpy as np
import torch

from conformance.core.inputs import LayerInputs
from conformance.core.subject import Subject, Unsupported
from conformance.subjects.megatron.module import (
    Rounds,
    built_layer,
    hold_slots,
    load_params,
    map_of,
    moe_utils,
    replaying,
    to_canonical,
)
from conformance.subjects.megatron.settings import layer_entries
from conformance.subjects.torch.arrays import to_numpy, to_torch
from moe_ref import LayerParams, LayerSpec, RoutingRecord, ShardLayout

ALLTOALL = (("moe_token_dispatcher_type", "alltoall"),)


class MegatronLayer(Subject):
    """`permute`, `unpermute`, `SequentialMLP` and `MoELayer`."""

    more: ClassVar[tuple] = ALLTOALL
    """Further entries of its config."""

    def supports_layer(self, spec: LayerSpec, layout: ShardLayout | None = None) -> str | None:
        layer_entries(spec)  # a ValueError is the sentence
        return None if layout is None else "Megatron is judged over ranks as megatron-alltoall and megatron-allgather"

    def permute(self, expert_ids_TK: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
        """`permute` of numbered tokens; a token has an expert once, so that its expert tells the slot."""
        ids_TK = np.asarray(expert_ids_TK)
        map_TE = map_of(ids_TK, num_experts)
        tokens_T1 = torch.arange(len(ids_TK))[:, None]
        _, _, token_of_N, *_ = moe_utils.permute(tokens_T1, map_TE, num_out_tokens=int(map_TE.sum()))
        counts_E, token_of_N = to_numpy(map_TE.sum(dim=0)), to_numpy(token_of_N)
        expert_of_N = np.repeat(np.arange(num_experts), counts_E)
        slot_of_N = (ids_TK[token_of_N] == expert_of_N[:, None]).argmax(axis=-1)
        return token_of_N * ids_TK.shape[1] + slot_of_N, counts_E

    def experts(
        self, rows_RD: np.ndarray, tokens_per_expert_E: np.ndarray, params: LayerParams, spec: LayerSpec
    ) -> np.ndarray:
        """`SequentialMLP` with weights of 1, whose counts are of all rows: a tail is left off here."""
        layer = self._built(spec, params)
        used = int(np.sum(tokens_per_expert_E))
        with torch.no_grad():
            outputs, _ = layer.experts(to_torch(rows_RD[:used]), to_torch(tokens_per_expert_E), torch.ones(used))
        return np.concatenate([to_numpy(outputs), np.zeros((len(rows_RD) - used, rows_RD.shape[1]), np.float32)])

    def combine(self, rows_ND: np.ndarray, order_N: np.ndarray, weights_TK: np.ndarray, spec: LayerSpec) -> np.ndarray:
        """`unpermute` with weights, as if each row were an expert's only one."""
        (T, K), N, D = weights_TK.shape, len(order_N), rows_ND.shape[1]
        token_of_N = to_torch(np.asarray(order_N, np.int64) // K)
        map_TN = torch.zeros(T, N, dtype=torch.bool)
        map_TN[token_of_N, torch.arange(N)] = True
        weights_TN = torch.zeros(T, N)
        weights_TN[token_of_N, torch.arange(N)] = to_torch(np.reshape(weights_TK, -1)[order_N]).float()
        if spec.router.weight_on == "input":
            weights_TN = map_TN.float()
        summed_TD = moe_utils.unpermute(
            to_torch(rows_ND).float(), token_of_N, torch.Size((T, D)), probs=weights_TN, routing_map=map_TN
        )
        return to_numpy(summed_TD)

    def layer(
        self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, **inputs: Unpack[LayerInputs]
    ) -> np.ndarray:
        """The module as a decoder calls it, in training: sinkhorn evens then alone."""
        layer = self._built(spec, params, **inputs)
        with torch.no_grad():
            return to_numpy(called(layer, to_torch(x_TD), inputs.get("given_ids_TK")))

    def layer_gradients(
        self,
        x_TD: np.ndarray,
        params: LayerParams,
        spec: LayerSpec,
        d_output_TD: np.ndarray,
        **inputs: Unpack[LayerInputs],
    ) -> dict[str, np.ndarray]:
        """By autograd, brought back into the canonical layout; the balancing bias is a buffer and has none."""
        layer, tokens_TD = self._built(spec, params, **inputs), to_torch(x_TD).requires_grad_()
        trained = dict(layer.named_parameters())
        output_TD = called(layer, tokens_TD, inputs.get("given_ids_TK"))
        d_x_TD, *gradients = torch.autograd.grad(
            output_TD, [tokens_TD, *trained.values()], to_torch(d_output_TD), allow_unused=True, materialize_grads=True
        )
        by_path = {path: to_numpy(gradient) for path, gradient in zip(trained, gradients, strict=True)}
        return {"x_TD": to_numpy(d_x_TD)} | to_canonical(by_path, params)

    def replay(self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, record: RoutingRecord) -> np.ndarray:
        """`RouterReplay`, which takes ids."""
        if record.weights_TK is not None:
            raise Unsupported("Megatron replays ids, whose weights are its own")
        if not record.token_mask_T.all():
            raise Unsupported("Megatron computes the output of padding as any other")
        layer = self._built(spec, params, more=(("moe_enable_routing_replay", True),))
        with torch.no_grad():
            return to_numpy(called(layer, to_torch(x_TD), record.expert_ids_TK))

    def _built(self, spec: LayerSpec, params: LayerParams, *, more: tuple = (), **inputs: Any) -> Any:
        """The layer with these parameters, and with the capacity of the inputs."""
        if inputs.get("token_mask_T") is not None:
            raise Unsupported("Megatron computes the output of padding as any other")
        for name in ("given_weights_TK", "align"):
            if inputs.get(name) is not None:
                raise Unsupported(f"Megatron's layer takes no {name.removesuffix('_TK')}")
        capacity = inputs.get("capacity")
        if capacity is not None and capacity.scope == "rank" and inputs.get("tokens_per_shard") is not None:
            raise Unsupported("one rank has one capacity")
        bias = params.expert_bias_E is not None
        layer = built_layer(spec, expert_bias=bias, capacity=capacity, more=self.more + more)
        load_params(layer, params)
        return layer


def called(layer: Any, x_TD: torch.Tensor, given_TK: np.ndarray | None = None) -> torch.Tensor:
    """The (T, D) output of the tokens as one sequence."""
    hold_slots(layer.router, len(x_TD))
    with replaying(layer.router, given_TK):
        if layer.router.routing_type == "sinkhorn":
            with Rounds():
                output, bias = layer(x_TD[:, None])
        else:
            output, bias = layer(x_TD[:, None])
    assert bias is None
    return output[:, 0]
