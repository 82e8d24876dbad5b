"""conformance, subject: the reference itself, in a dtype of your choice. The judge never accuses it."""

import moe_ref
from conformance.subject import Routing, Subject
from moe_ref import RouterSpec


class Reference(Subject):
    """moe_ref computed in float32, so that the judge's bounds are tried on ordinary rounding."""

    name, version = "reference", "float32"
    logit_dtypes = ("float32", "float64", "bfloat16")
    compute_dtype = "float32"

    def route(self, logits_TE, spec, expert_bias_E, **inputs):
        trace = moe_ref.route(logits_TE, spec, expert_bias_E=expert_bias_E, dtype=self.compute_dtype, **inputs)
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
