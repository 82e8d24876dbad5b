"""moe_ref, given weights: the last step of a replay, after every stage of routing.

Legend: T tokens, K top_k.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moe_ref.specs.checks import array, entries, require
from moe_ref.specs.router import RouterSpec

if TYPE_CHECKING:
    from moe_ref.routing import RoutingTrace


def give_weights(routing: "RoutingTrace", given_weights_TK, spec: RouterSpec) -> "RoutingTrace":
    """Given weights are final, after norm and scales; an unused slot weighs 0 whatever is given for it. [RPL-3]

    Shared experts that the router scores keep this router's weights.
    """
    if given_weights_TK is None:
        return routing
    require(spec.selector == "given", f"given_weights_TK is given, but selector is {spec.selector!r}, not 'given'")
    given_TK = array("given_weights_TK", given_weights_TK, routing.weights_TK.shape).astype(routing.weights_TK.dtype)
    given_TK = np.where(routing.expert_ids_TK < 0, 0, given_TK)
    entries("given_weights_TK", given_TK, np.isfinite(given_TK), "weights of used slots are finite")
    return replace(routing, weights_TK=given_TK, weights_are_given=True)
