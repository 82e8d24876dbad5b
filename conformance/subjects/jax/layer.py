"""conformance, subject jax: the layer of moe_jax on one device, compiled."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np

from conformance.core.inputs import LayerInputs, split_inputs
from conformance.core.subject import Subject
from conformance.subjects.jax.arrays import narrow, narrow_inputs, narrow_params, with_bias
from moe_jax.align import align_rows
from moe_jax.fused import fused_matmul
from moe_jax.replay import capture
from moe_jax.replicas import home, place_by_table
from moe_jax.sparse_matmul import RouteMetadata, activate, gmm_down, gmm_up, permute, sparse_matmul, unpermute
from moe_ref import AlignSpec, LayerParams, LayerSpec, ReplicaSpec, RoutingRecord
from moe_ref.specs.fused import fuse_params
from moe_ref.specs.params import FeedForward
from moe_ref.specs.upcycle import upcycle

_place = jax.jit(place_by_table, static_argnames="in_turn")
_permute = jax.jit(permute, static_argnames="num_experts")
_align = jax.jit(align_rows, static_argnames="spec")


class JaxLayer(Subject):
    """`moe_jax.sparse_matmul`, and its stages one by one."""

    def permute(self, expert_ids_TK: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
        """Its rows are all slots; those of the tail, which belong to no expert, are left off here."""
        found = _permute(narrow(expert_ids_TK), num_experts=num_experts)
        counts_E = np.asarray(found.group_sizes_E)
        return np.asarray(found.slot_of_row_R)[: counts_E.sum()], counts_E

    def align(self, expert_ids_TK: np.ndarray, num_experts: int, align: AlignSpec) -> tuple[np.ndarray, np.ndarray]:
        """Its rows are as many as the spec allows at most; those past the experts are sentinels."""
        found = _align(_permute(narrow(expert_ids_TK), num_experts=num_experts), spec=align)
        return np.asarray(found.slot_of_row_R), np.asarray(found.group_sizes_E)

    def experts(
        self, rows_RD: np.ndarray, tokens_per_expert_E: np.ndarray, params: LayerParams, spec: LayerSpec
    ) -> np.ndarray:
        """Both projections and the activation between them, of a buffer with a tail of NaN, as a layer has one."""
        tail = -len(rows_RD) % ROWS
        padded_RD = np.pad(rows_RD, ((0, tail), (0, 0)), constant_values=np.nan)
        made_RD = _experts(narrow(padded_RD), narrow(tokens_per_expert_E), narrow_params(params), spec=spec)
        return np.asarray(made_RD)[: len(rows_RD)]

    def combine(self, rows_ND: np.ndarray, order_N: np.ndarray, weights_TK: np.ndarray, spec: LayerSpec) -> np.ndarray:
        """The weighted sum; slots that are no row become a tail of NaN, which it does not read."""
        T, K = weights_TK.shape
        slot_of_row_R = np.concatenate([order_N, np.setdiff1d(np.arange(T * K), order_N)])
        rows_RD = np.full((T * K, rows_ND.shape[1]), np.nan)
        rows_RD[: len(order_N)] = rows_ND
        metadata = RouteMetadata(
            group_sizes_E=narrow([len(order_N)]),
            slot_of_row_R=narrow(slot_of_row_R),
            row_of_slot_TK=narrow(np.argsort(slot_of_row_R).reshape(T, K)),
        )
        return np.asarray(_combine(narrow(rows_RD), metadata, narrow(weights_TK), spec=spec))

    def layer(
        self,
        x_TD: np.ndarray,
        params: LayerParams,
        spec: LayerSpec,
        *,
        batch_invariant: bool = False,
        **inputs: Unpack[LayerInputs],
    ) -> np.ndarray:
        """`sparse_matmul`, whose second output, the routing, is not read."""
        how, limits = _arguments(spec, inputs)
        if batch_invariant:
            limits["batch_invariant"] = True
        made = _layer(narrow(x_TD), narrow_params(with_bias(params, spec)), spec=spec, how=how, **limits)
        return np.asarray(made[0])

    def fused_layer(
        self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, **inputs: Unpack[LayerInputs]
    ) -> tuple[np.ndarray, np.ndarray]:
        """`fused_matmul`, and the counts of what it decided."""
        how, _ = _arguments(spec, inputs)
        router, experts = narrow_params(with_bias(params, spec)), narrow_params(fuse_params(params, spec))
        output_TD, decided = _fused(narrow(x_TD), router, experts, spec=spec, how=how)
        counts_E = permute(decided.expert_ids_TK, spec.router.num_experts).group_sizes_E
        return np.asarray(output_TD), np.asarray(counts_E)

    def upcycled_layer(self, x_TD: np.ndarray, dense: Mapping[str, np.ndarray], spec: LayerSpec) -> np.ndarray:
        """`sparse_matmul` with what `upcycle` makes."""
        return self.layer(x_TD, upcycle(FeedForward(**dense), spec, gate_std=1.0), spec)

    def layer_gradients(
        self,
        x_TD: np.ndarray,
        params: LayerParams,
        spec: LayerSpec,
        d_output_TD: np.ndarray,
        **inputs: Unpack[LayerInputs],
    ) -> dict[str, np.ndarray]:
        """By `jax.grad` of the sum of output times d_output."""
        how, limits = _arguments(spec, inputs)
        d_x_TD, d_params = _layer_gradients(
            narrow(x_TD), narrow_params(with_bias(params, spec)), narrow(d_output_TD), spec=spec, how=how, **limits
        )
        return {"x_TD": np.asarray(d_x_TD)} | {name: np.asarray(getattr(d_params, name)) for name in params.by_name()}

    def place_slots(self, expert_ids_TK: np.ndarray, replicas: ReplicaSpec) -> np.ndarray:
        """By a table that is data, so that one program serves every placement of as many replicas at most."""
        table_ER, counts_E = replicas.table()
        table_ER = np.pad(table_ER, ((0, 0), (0, -table_ER.shape[1] % 4)))
        in_turn = replicas.choice == "in_turn"
        arrays = (narrow(each) for each in (expert_ids_TK, table_ER, counts_E, np.asarray(replicas.num_places)))
        return np.asarray(_place(*arrays, in_turn=in_turn))

    def home(self, values_P: np.ndarray, replicas: ReplicaSpec) -> np.ndarray:
        """A segment sum."""
        return np.asarray(home(narrow(values_P), replicas))

    def record(
        self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, **inputs: Unpack[LayerInputs]
    ) -> RoutingRecord:
        """What `sparse_matmul` decided."""
        how, limits = _arguments(spec, inputs)
        made = _layer(narrow(x_TD), narrow_params(with_bias(params, spec)), spec=spec, how=how, **limits)
        return capture(made[1], spec.router, token_mask_T=how["token_mask_T"])

    def replay(self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, record: RoutingRecord) -> np.ndarray:
        """`sparse_matmul` with the spec of a replay; a balancing bias takes part in a choice alone."""
        with_weights = record.weights_TK is not None
        forced = spec.replace(router=spec.router.given(with_weights=with_weights))
        inputs, mask_T = record.inputs(spec.router, with_weights=with_weights)
        params = narrow_params(replace(params, expert_bias_E=None))
        how = {"token_mask_T": mask_T, "inputs": inputs}
        return np.asarray(_layer(narrow(x_TD), params, spec=forced, how=how)[0])


STATIC = ("spec", "capacity", "align", "num_sequences", "batch_invariant")
ROWS = 32
"""Buffers of rows have a multiple of so many: each size is a program."""


@partial(jax.jit, static_argnames=STATIC)
def _layer(x_TD, params: LayerParams, *, spec: LayerSpec, how: dict, **limits):
    return sparse_matmul(x_TD, params, spec, **how, **limits)


@partial(jax.jit, static_argnames="spec")
def _fused(x_TD, params: LayerParams, fused: LayerParams, *, spec: LayerSpec, how: dict):
    return fused_matmul(x_TD, params, fused, spec, **how)


@partial(jax.jit, static_argnames=STATIC)
def _layer_gradients(x_TD, params: LayerParams, d_output_TD, *, spec: LayerSpec, how: dict, **limits):
    def loss(x_TD, params):
        return jnp.sum(sparse_matmul(x_TD, params, spec, **how, **limits)[0] * d_output_TD)

    return jax.grad(loss, argnums=(0, 1))(x_TD, params)


@partial(jax.jit, static_argnames="spec")
def _experts(rows_RD, tokens_per_expert_E, params: LayerParams, *, spec: LayerSpec):
    slots_R = jnp.arange(len(rows_RD), dtype=jnp.int32)
    metadata = RouteMetadata(
        group_sizes_E=tokens_per_expert_E, slot_of_row_R=slots_R, row_of_slot_TK=slots_R[:, None]
    )  # fmt: skip
    gate_RF, up_RF = gmm_up(rows_RD, params.w_gate_EDF, params.w_up_EDF, metadata)
    hidden_RF = activate(gate_RF, up_RF, params, metadata, spec.experts)
    return gmm_down(hidden_RF, params.w_down_EFD, params.b_down_ED, metadata)


@partial(jax.jit, static_argnames="spec")
def _combine(rows_RD, metadata: RouteMetadata, weights_TK, *, spec: LayerSpec):
    # A weight that is on the input is not applied again.
    summed_TD = unpermute(rows_RD, metadata, weights_TK if spec.router.weight_on == "output" else None)
    return summed_TD * spec.router.output_scale


def _arguments(spec: LayerSpec, inputs: LayerInputs) -> tuple[dict, dict]:
    """Keyword arguments of `sparse_matmul`: those that are arrays, and those that are static."""
    own, rest = split_inputs(inputs, LayerInputs)
    how = {"token_mask_T": rest.get("token_mask_T"), "inputs": narrow_inputs(own, spec.router)}
    limits: dict = {name: rest[name] for name in ("capacity", "align") if rest.get(name) is not None}
    if (lengths := rest.get("sequence_lengths")) is not None:
        how["sequence_of_T"] = narrow(np.repeat(np.arange(len(lengths)), lengths))
        limits["num_sequences"] = len(lengths)
    return how, limits
