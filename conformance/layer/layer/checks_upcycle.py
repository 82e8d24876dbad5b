"""conformance, layer: a layer that a dense feed-forward became is that feed-forward, until it is trained.

Legend: T tokens, D model dim, F width of the dense feed-forward, E experts, G experts that hold one copy of it.
"""

import numpy as np

from conformance.core.case import float32
from conformance.core.holding import hold
from conformance.layer.kind import requires
from conformance.layer.verdicts import array_of, radius_of_output
from moe_ref import LayerSpec
from moe_ref.experts import feed_forward
from moe_ref.specs.params import FeedForward
from moe_ref.specs.upcycle import upcycle, why_not_exact


def parts_of_dense(spec: LayerSpec) -> int:
    """G, as many as the slots of a token hold; 0 where the layer is no dense feed-forward at the start."""
    router = spec.router
    plain = spec.shared is None and spec.latent is None and not router.num_null_experts
    if not plain or router.weight_on != "output" or router.route_scale * router.output_scale <= 0:
        return 0
    divisors = [G for G in range(router.top_k, 0, -1) if router.top_k % G == router.num_experts % G == 0]
    return next((G for G in divisors if not why_not_exact(spec, G)), 0)


def dense_of(spec: LayerSpec, G: int, rng: np.random.Generator) -> FeedForward:
    """A feed-forward of the form of the experts, G times as wide."""
    D, F, experts = spec.experts.dim, G * spec.experts.hidden_dim, spec.experts

    def drawn(*shape: int) -> np.ndarray:
        return float32(rng.normal(size=shape) / np.sqrt(D))

    return FeedForward(
        w_up_DF=drawn(D, F),
        w_down_FD=drawn(F, D),
        w_gate_DF=drawn(D, F) if experts.gated else None,
        b_up_F=drawn(F) if experts.bias else None,
        b_down_D=drawn(D) if experts.bias else None,
        b_gate_F=drawn(F) if experts.bias and experts.gated else None,
    )


@requires("LAY-27", method="upcycled_layer", spec=lambda spec: parts_of_dense(spec) > 0, tokens=(7, 17))
def an_upcycled_layer_is_the_dense_feed_forward(judge, case):
    spec, G = case.spec, parts_of_dense(case.spec)
    dense = dense_of(spec, G, case.rng())
    wide = spec.experts.replace(hidden_dim=G * spec.experts.hidden_dim)
    wanted_TD = feed_forward(case.x_TD, dense, wide).output_RD
    # How far rounding takes a layer does not hang on the rows of its gate; the factor on the down projection is rounded
    # once more.
    made = upcycle(dense, spec, gate_std=1.0)
    radius_TD = 2 * radius_of_output(judge, case.with_(params=made, inputs={}))
    given = {name: value for name, value in vars(dense).items() if value is not None}
    found_TD = array_of(judge.call(case, "upcycled_layer", case.x_TD.copy(), given, spec), case.x_TD.shape)
    hold(f"not the dense feed-forward whose {G} parts are its experts", found_TD, wanted_TD, radius_TD)
