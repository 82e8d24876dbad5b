"""conformance, subject: the reference itself, its methods of load, capacity and replay."""
# They name their inputs, which is how a subject says what it takes.
# pyright: reportIncompatibleMethodOverride=false

import numpy as np

import moe_ref
from conformance.core.subject import Subject
from moe_ref.backward.routing import scale_logits_backward
from moe_ref.routing import scale_logits


class ReferenceBalance(Subject):
    """What moe_ref counts, charges, bounds and records, in the dtype of the subject."""

    def load(self, expert_ids_TK, num_experts, *, token_mask_T=None):
        return moe_ref.tokens_per_expert(expert_ids_TK, num_experts, token_mask_T)

    def balance_loss(self, logits_TE, expert_ids_TK, balance, router, *, expert_bias_E=None, **inputs):
        how = {"dtype": self.compute_dtype, **inputs}
        scaled_TE = scale_logits(logits_TE.astype(self.compute_dtype), router)
        d_scaled_TE = moe_ref.balance_loss_backward(scaled_TE, expert_ids_TK, balance, **how)
        return {
            "loss": moe_ref.balance_loss(scaled_TE, expert_ids_TK, balance, **how),
            "d_logits_TE": scale_logits_backward(d_scaled_TE, scaled_TE, router),
        }

    def z_loss(self, logits_TE, coeff, *, token_mask_T=None, tokens_per_shard=None):
        inputs = {"token_mask_T": token_mask_T, "tokens_per_shard": tokens_per_shard}
        how = {"coeff": coeff, "dtype": self.compute_dtype, **inputs}
        return {"loss": moe_ref.z_loss(logits_TE, **how), "d_logits_TE": moe_ref.z_loss_backward(logits_TE, **how)}

    def bias_update(self, counts_SE, update, expert_bias_E):
        return moe_ref.bias_update(counts_SE.sum(axis=0), update, expert_bias_E).astype(self.compute_dtype)

    def capacity(self, expert_ids_TK, weights_TK, capacity, num_experts, *, d_weights_TK=None, **inputs):
        weights_TK = weights_TK.astype(self.compute_dtype)
        trace = moe_ref.apply_capacity(expert_ids_TK, weights_TK, capacity, num_experts, **inputs)
        found = {"expert_ids_TK": trace.expert_ids_TK, "weights_TK": trace.weights_TK.astype(self.compute_dtype)}
        if trace.slot_table_UEC is not None:
            found["slot_table_UEC"] = trace.slot_table_UEC
        if d_weights_TK is not None:
            found["d_weights_TK"] = moe_ref.capacity_backward(trace, capacity, d_weights_TK)
        return found

    def record(self, x_TD, params, spec, **inputs):
        named = moe_ref.RouterInputs.keywords(inputs)
        trace = moe_ref.moe_layer(x_TD, params, spec, dtype=self.compute_dtype, **named)
        return moe_ref.capture(trace.routing, spec.router, token_mask_T=inputs.get("token_mask_T"))

    def replay(self, x_TD, params, spec, record):
        with_weights = record.weights_TK is not None
        return np.asarray(
            moe_ref.replay_layer(
                record, x_TD, params, spec, with_weights=with_weights, dtype=self.compute_dtype
            ).output_TD
        )
