"""conformance, subject: the reference itself, in a dtype of your choice. The judge never accuses it."""

from dataclasses import fields

import numpy as np

import moe_ref
from conformance.core.subject import Routing
from conformance.subjects.reference_balance import ReferenceBalance
from moe_ref import RouterInputs, RouterSpec
from moe_ref import experts as experts_room
from moe_ref.backward.sharded import sharded_backward
from moe_ref.dispatch import plan
from moe_ref.permute import permute, unpermute
from moe_ref.sharded import sharded_layer

named = RouterInputs.keywords


class Reference(ReferenceBalance):
    """moe_ref computed in float32, so that the judge's bounds are tried on ordinary rounding."""

    name, version = "reference", "float32"
    logit_dtypes = ("float32", "float64", "bfloat16")
    compute_dtype = "float32"

    def route(self, logits_TE, spec, expert_bias_E, **inputs):
        trace = moe_ref.route(logits_TE, spec, expert_bias_E=expert_bias_E, dtype=self.compute_dtype, **named(inputs))
        return Routing(
            expert_ids_TK=trace.expert_ids_TK,
            weights_TK=trace.weights_TK,
            scores_TE=trace.scores_TE,
            group_ids_TL=trace.group_ids_TL,
            shared_weights_TS=trace.shared_weights_TS,
        )

    def gate(self, x_TD, gate_ED, gate_bias_E):
        return moe_ref.gate(x_TD, gate_ED, gate_bias_E, dtype=self.compute_dtype)

    def configure(self, fields):
        RouterSpec.from_dict(fields)

    def permute(self, expert_ids_TK, num_experts):
        found = permute(expert_ids_TK, num_experts)
        return found.order_N, found.tokens_per_expert_E

    def experts(self, rows_RD, tokens_per_expert_E, params, spec):
        used = int(tokens_per_expert_E.sum())
        rows_ND = rows_RD[:used].astype(self.compute_dtype)
        trace = experts_room.run_experts(rows_ND, tokens_per_expert_E, params.astype(self.compute_dtype), spec.experts)
        tail = np.zeros((len(rows_RD) - used, spec.experts.dim), self.compute_dtype)
        return np.concatenate([trace.output_RD, tail])

    def combine(self, rows_ND, order_N, weights_TK, spec):
        T, K = weights_TK.shape
        slots_TKD = unpermute(rows_ND.astype(self.compute_dtype), order_N, K, T)
        return experts_room.combine(slots_TKD, weights_TK.astype(self.compute_dtype), spec.router)

    def layer(self, x_TD, params, spec, **inputs):
        return moe_ref.moe_layer(x_TD, params, spec, dtype=self.compute_dtype, **named(inputs)).output_TD

    def layer_gradients(self, x_TD, params, spec, d_output_TD, **inputs):
        trace = moe_ref.moe_layer(x_TD, params, spec, dtype=self.compute_dtype, **named(inputs))
        grads = moe_ref.layer_backward(trace, params, spec, d_output_TD, capacity=inputs.get("capacity"))
        found = {f.name: getattr(grads.params, f.name) for f in fields(grads.params)}
        return {"x_TD": grads.x_TD} | {name: grad for name, grad in found.items() if grad is not None}

    def dispatch(self, expert_ids_by_shard, layout, spec):
        names = ("send_sizes_S", "recv_sizes_S", "group_sizes_e", "order_R2", "overflow")
        plans = plan(expert_ids_by_shard, layout, spec)
        return [{name: getattr(each, name) for name in names} for each in plans]

    def sharded_layer(self, x_by_shard, params, spec, layout, **inputs):
        trace = sharded_layer(x_by_shard, params, spec, layout, dtype=self.compute_dtype, **named(inputs))
        return trace.outputs_by_rank

    def sharded_gradients(self, x_by_shard, params, spec, layout, d_output_by_shard, **inputs):
        trace = sharded_layer(x_by_shard, params, spec, layout, dtype=self.compute_dtype, **named(inputs))
        grads = sharded_backward(trace, params, spec, d_output_by_shard)
        found = {f.name: getattr(grads.params, f.name) for f in fields(grads.params)}
        of_params = {name: grad for name, grad in found.items() if grad is not None}
        shards = [layout.shard_of(rank) for rank in range(layout.num_ranks)]
        return [{"x_TD": grads.x_by_shard[shard]} | of_params for shard in shards]
