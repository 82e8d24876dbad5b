"""conformance, layer, faults of the fused form: shared experts inside the routed slots.

Legend: T tokens, K top_k, E experts.
"""

import numpy as np

from conformance.core.fault import replaces, surrounds
from moe_ref.fused import fuse_routing


@replaces("fused_weight", breaks="LAY-25")
def fused_shared_experts_weigh_1(spec):
    """A fused shared expert weighs 1, and is multiplied by the factor on the routed output."""
    return 1.0


@replaces("fuse_routing", breaks="LAY-25")
def first_fused_shared_expert_alone(expert_ids_TK, weights_TK, spec, *, token_mask_T=None):
    """Of several fused shared experts all slots take the first."""
    ids, weights = fuse_routing(expert_ids_TK, weights_TK, spec, token_mask_T=token_mask_T)
    return np.minimum(ids, spec.router.num_experts), weights


@surrounds(breaks="LAY-26")
def fused_shared_experts_are_counted(run, memory, x_TD, params, spec, **inputs):
    """The slots of fused shared experts are counted for the last routed one."""
    output_TD, counts_E = run(x_TD, params, spec, **inputs)
    return output_TD, counts_E + len(x_TD) * (np.arange(len(counts_E)) == len(counts_E) - 1)
