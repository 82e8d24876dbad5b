"""conformance, subject: the reference itself, in a dtype of your choice. The judge never accuses it."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Unpack

import numpy as np

import moe_ref
from conformance.core.inputs import CutLayerInputs, DrawnShardedInputs, LayerInputs, RouteInputs
from conformance.core.subject import Routing, Subject
from moe_ref import (
    AlignSpec,
    BalanceSpec,
    BiasUpdateSpec,
    CapacitySpec,
    Event,
    LayerParams,
    LayerSpec,
    QuantileSpec,
    ReplicaSpec,
    RouterInputs,
    RouterSpec,
    RoutingRecord,
    ShardLayout,
    SparsitySpec,
    StackSpec,
)
from moe_ref import experts as experts_room
from moe_ref.backward.routing import scale_logits_backward
from moe_ref.backward.sharded import sharded_backward
from moe_ref.dispatch import plan
from moe_ref.fused import fused_layer
from moe_ref.permute import permute, unpermute
from moe_ref.routing import scale_logits
from moe_ref.sharded import sharded_layer
from moe_ref.specs import upcycle
from moe_ref.specs.params import FeedForward


class Reference(Subject):
    """moe_ref computed in float32, so that the judge's bounds are tried on ordinary rounding."""

    name, version = "reference", "float32"
    # bfloat16 arrays are of ml_dtypes, which NumPy alone does not bring.
    logit_dtypes = ("float32", "float64", "float16", *(("bfloat16",) if find_spec("ml_dtypes") else ()))
    compute_dtype = "float32"

    # router

    def route(
        self, logits_TE: np.ndarray, spec: RouterSpec, expert_bias_E: np.ndarray | None, **inputs: Unpack[RouteInputs]
    ) -> Routing:
        how = RouterInputs.keywords(inputs)
        trace = moe_ref.route(logits_TE, spec, expert_bias_E=expert_bias_E, dtype=self.compute_dtype, **how)
        return Routing(
            expert_ids_TK=trace.expert_ids_TK,
            weights_TK=trace.weights_TK,
            scores_TE=trace.scores_TE,
            group_ids_TL=trace.group_ids_TL,
            shared_weights_TS=trace.shared_weights_TS,
        )

    def gate(self, x_TD: np.ndarray, gate_ED: np.ndarray, gate_bias_E: np.ndarray | None) -> np.ndarray:
        return moe_ref.gate(x_TD, gate_ED, gate_bias_E, dtype=self.compute_dtype)

    def configure(self, fields: dict[str, Any]) -> None:
        RouterSpec.from_dict(fields)

    # layer

    def permute(self, expert_ids_TK: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
        found = permute(expert_ids_TK, num_experts)
        return found.order_N, found.tokens_per_expert_E

    def align(self, expert_ids_TK: np.ndarray, num_experts: int, align: AlignSpec) -> tuple[np.ndarray, np.ndarray]:
        found = moe_ref.align_rows(permute(expert_ids_TK, num_experts), align)
        return found.slot_of_row_A, found.rows_per_expert_E

    def experts(
        self, rows_RD: np.ndarray, tokens_per_expert_E: np.ndarray, params: LayerParams, spec: LayerSpec
    ) -> np.ndarray:
        used = int(tokens_per_expert_E.sum())
        rows_ND = rows_RD[:used].astype(self.compute_dtype)
        trace = experts_room.run_experts(rows_ND, tokens_per_expert_E, params.astype(self.compute_dtype), spec.experts)
        tail = np.zeros((len(rows_RD) - used, spec.routed_experts.dim), self.compute_dtype)
        return np.concatenate([trace.output_RD, tail])

    def combine(self, rows_ND: np.ndarray, order_N: np.ndarray, weights_TK: np.ndarray, spec: LayerSpec) -> np.ndarray:
        T, K = weights_TK.shape
        slots_TKD = unpermute(rows_ND.astype(self.compute_dtype), order_N, K, T)
        return experts_room.combine(slots_TKD, weights_TK.astype(self.compute_dtype), spec.router)

    def layer(
        self,
        x_TD: np.ndarray,
        params: LayerParams,
        spec: LayerSpec,
        *,
        batch_invariant: bool = False,
        **inputs: Unpack[CutLayerInputs],
    ) -> np.ndarray:
        if batch_invariant:
            how = RouterInputs.keywords(inputs)
            return moe_ref.layer_of_each(x_TD, params, spec, dtype=self.compute_dtype, **how)
        return self._traced(x_TD, params, spec, inputs).output_TD

    def fused_layer(
        self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, **inputs: Unpack[LayerInputs]
    ) -> tuple[np.ndarray, np.ndarray]:
        return fused_layer(x_TD, params, spec, dtype=self.compute_dtype, **RouterInputs.keywords(inputs))

    def upcycled_layer(self, x_TD: np.ndarray, dense: Mapping[str, np.ndarray], spec: LayerSpec) -> np.ndarray:
        params = upcycle.upcycle(FeedForward(**dense), spec, gate_std=1.0)
        return moe_ref.moe_layer(x_TD, params, spec, dtype=self.compute_dtype).output_TD

    def layer_gradients(
        self,
        x_TD: np.ndarray,
        params: LayerParams,
        spec: LayerSpec,
        d_output_TD: np.ndarray,
        **inputs: Unpack[CutLayerInputs],
    ) -> dict[str, np.ndarray]:
        trace = self._traced(x_TD, params, spec, inputs)
        grads = moe_ref.layer_backward(trace, params, spec, d_output_TD, capacity=inputs.get("capacity"))
        return {"x_TD": grads.x_TD} | grads.params.by_name()

    def record(
        self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, **inputs: Unpack[CutLayerInputs]
    ) -> RoutingRecord:
        trace = self._traced(x_TD, params, spec, inputs)
        return moe_ref.capture(trace.routing, spec.router, token_mask_T=inputs.get("token_mask_T"))

    def place_slots(self, expert_ids_TK: np.ndarray, replicas: ReplicaSpec) -> np.ndarray:
        return moe_ref.place_slots(expert_ids_TK, replicas)

    def home(self, values_P: np.ndarray, replicas: ReplicaSpec) -> np.ndarray:
        is_count = np.issubdtype(values_P.dtype, np.integer)
        return moe_ref.home(values_P if is_count else values_P.astype(self.compute_dtype), replicas)

    def replay(self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, record: RoutingRecord) -> np.ndarray:
        with_weights = record.weights_TK is not None
        trace = moe_ref.replay_layer(record, x_TD, params, spec, with_weights=with_weights, dtype=self.compute_dtype)
        return np.asarray(trace.output_TD)

    def _traced(self, x_TD, params: LayerParams, spec: LayerSpec, inputs: CutLayerInputs):
        return moe_ref.moe_layer(x_TD, params, spec, dtype=self.compute_dtype, **RouterInputs.keywords(inputs))

    # sharded

    def dispatch(
        self, expert_ids_by_shard: list[np.ndarray], layout: ShardLayout, spec: LayerSpec
    ) -> list[dict[str, Any]]:
        names = ("send_sizes_S", "recv_sizes_S", "group_sizes_e", "order_R2", "overflow")
        plans = plan(expert_ids_by_shard, layout, spec)
        return [{name: getattr(each, name) for name in names} for each in plans]

    def sharded_layer(
        self,
        x_by_shard: list[np.ndarray],
        params: LayerParams,
        spec: LayerSpec,
        layout: ShardLayout,
        **inputs: Unpack[DrawnShardedInputs],
    ) -> list[np.ndarray]:
        trace = self._sharded_trace(x_by_shard, params, spec, layout, inputs)
        return trace.outputs_by_rank

    def sharded_gradients(
        self,
        x_by_shard: list[np.ndarray],
        params: LayerParams,
        spec: LayerSpec,
        layout: ShardLayout,
        d_output_by_shard: list[np.ndarray],
        **inputs: Unpack[DrawnShardedInputs],
    ) -> list[dict[str, np.ndarray]]:
        trace = self._sharded_trace(x_by_shard, params, spec, layout, inputs)
        grads = sharded_backward(trace, params, spec, d_output_by_shard)
        shards = [layout.shard_of(rank) for rank in range(layout.num_ranks)]
        return [{"x_TD": grads.x_by_shard[shard]} | grads.params.by_name() for shard in shards]

    def _sharded_trace(
        self, x_by_shard, params: LayerParams, spec: LayerSpec, layout: ShardLayout, inputs: DrawnShardedInputs
    ):
        how = RouterInputs.keywords(inputs)
        return sharded_layer(x_by_shard, params, spec, layout, dtype=self.compute_dtype, **how)

    # balance

    def load(
        self, expert_ids_TK: np.ndarray, num_experts: int, *, token_mask_T: np.ndarray | None = None
    ) -> np.ndarray:
        return moe_ref.tokens_per_expert(expert_ids_TK, num_experts, token_mask_T)

    def balance_loss(
        self,
        logits_TE: np.ndarray,
        expert_ids_TK: np.ndarray,
        balance: BalanceSpec,
        router: RouterSpec,
        *,
        expert_bias_E: np.ndarray | None = None,
        token_mask_T: np.ndarray | None = None,
        sequence_lengths: tuple[int, ...] | None = None,
        tokens_per_shard: tuple[int, ...] | None = None,
        num_layers: int = 1,
    ) -> dict[str, Any]:
        """The balancing bias enters no score of a loss."""
        how: dict[str, Any] = {
            "dtype": self.compute_dtype,
            "token_mask_T": token_mask_T,
            "sequence_lengths": sequence_lengths,
            "tokens_per_shard": tokens_per_shard,
        }
        scaled_TE = scale_logits(logits_TE.astype(self.compute_dtype), router)
        by_layer = np.split(scaled_TE, num_layers), np.split(expert_ids_TK, num_layers)
        d_scaled_TE = np.concatenate(moe_ref.balance_layers_backward(*by_layer, balance, **how))
        return {
            "loss": sum(trace.loss for trace in moe_ref.balance_layers(*by_layer, balance, **how)),
            "d_logits_TE": scale_logits_backward(d_scaled_TE, scaled_TE, router),
        }

    def z_loss(
        self,
        logits_TE: np.ndarray,
        coeff: float,
        *,
        token_mask_T: np.ndarray | None = None,
        tokens_per_shard: tuple[int, ...] | None = None,
    ) -> dict[str, Any]:
        cut: dict[str, Any] = {"token_mask_T": token_mask_T, "tokens_per_shard": tokens_per_shard}
        how = {"coeff": coeff, "dtype": self.compute_dtype, **cut}
        return {"loss": moe_ref.z_loss(logits_TE, **how), "d_logits_TE": moe_ref.z_loss_backward(logits_TE, **how)}

    def bias_update(self, counts_SE: np.ndarray, update: BiasUpdateSpec, expert_bias_E: np.ndarray) -> np.ndarray:
        return moe_ref.bias_update(counts_SE.sum(axis=0), update, expert_bias_E).astype(self.compute_dtype)

    def quantile_update(
        self,
        logits_TE: np.ndarray,
        router: RouterSpec,
        update: QuantileSpec,
        expert_bias_E: np.ndarray,
        *,
        token_mask_T: np.ndarray | None = None,
        tokens_per_shard: tuple[int, ...] | None = None,
    ) -> np.ndarray:
        cut: dict[str, Any] = {"token_mask_T": token_mask_T, "tokens_per_shard": tokens_per_shard}
        return moe_ref.quantile_update(logits_TE, router, update, expert_bias_E, dtype=self.compute_dtype, **cut)

    def next_coefficient(self, coeff: float, counts_LE: np.ndarray, num_tokens: int, sparsity: SparsitySpec) -> float:
        return moe_ref.next_coefficient(coeff, counts_LE, num_tokens, sparsity)

    def capacity(
        self,
        expert_ids_TK: np.ndarray,
        weights_TK: np.ndarray,
        capacity: CapacitySpec,
        num_experts: int,
        *,
        token_mask_T: np.ndarray | None = None,
        sequence_lengths: tuple[int, ...] | None = None,
        tokens_per_shard: tuple[int, ...] | None = None,
        d_weights_TK: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        trace = moe_ref.apply_capacity(
            expert_ids_TK,
            weights_TK.astype(self.compute_dtype),
            capacity,
            num_experts,
            token_mask_T=token_mask_T,
            sequence_lengths=sequence_lengths,
            tokens_per_shard=tokens_per_shard,
        )
        found = {"expert_ids_TK": trace.expert_ids_TK, "weights_TK": trace.weights_TK.astype(self.compute_dtype)}
        if trace.slot_table_UEC is not None:
            found["slot_table_UEC"] = trace.slot_table_UEC
        if d_weights_TK is not None:
            found["d_weights_TK"] = moe_ref.capacity_backward(trace, capacity, d_weights_TK)
        return found

    # training

    def train(self, events: Sequence[Event], stack: StackSpec, params: list[LayerParams]) -> list[dict]:
        states = moe_ref.train(events, stack, params, dtype=self.compute_dtype)
        return [{name: getattr(each, name) for name in ("counts_by_layer", "bias_by_layer", "loss")} for each in states]
