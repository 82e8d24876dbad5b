"""conformance, layer, faults of upcycling: what makes a layer another function than the dense one it is made of.

Legend: D model dim, E experts, G experts that hold one copy of the dense feed-forward.
"""

from dataclasses import replace

import numpy as np

from conformance.core.fault import replaces
from moe_ref.specs.upcycle import granularity, upcycle


@replaces("upcycle", breaks="LAY-27")
def the_weights_of_a_token_are_not_made_up_for(dense, spec, **how):
    """The down projections are cut and copied as they are, and each is weighed by a part of 1."""
    made = upcycle(dense, spec, **how)
    return replace(made, w_down_EFD=made.w_down_EFD / granularity(dense, spec))


@replaces("upcycle", breaks="LAY-27")
def every_expert_has_a_gate_row_of_its_own(dense, spec, *, seed=0, gate_std=0.02, **how):
    """There are no virtual groups, and a token takes some parts twice and others not at all."""
    made = upcycle(dense, spec, seed=seed, gate_std=gate_std, **how)
    rows_ED = gate_std * np.random.default_rng(seed).standard_normal(made.gate_ED.shape)
    return replace(made, gate_ED=rows_ED)


@replaces("upcycle", breaks="LAY-27")
def the_down_bias_is_multiplied_too(dense, spec, **how):
    """The factor that makes up for the weights is on the down bias as well, which has no parts."""
    made = upcycle(dense, spec, **how)
    G = granularity(dense, spec)
    return made if made.b_down_ED is None else replace(made, b_down_ED=G * made.b_down_ED)
