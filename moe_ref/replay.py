"""moe_ref, replay: a choice of experts that was recorded once is forced on any router.

    route -> capture -> save_records ... load_records -> replay

Reinforcement learning samples with one implementation and trains with another; where their routers disagree, the
gradient is of another model. A record carries the choice across: ids alone, so that the weights are those of the
router it is forced on, or ids with weights.

Legend: T tokens, K top_k.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import DTypeLike

from moe_ref.capacity import CapacityTrace
from moe_ref.layer import LayerTrace, moe_layer
from moe_ref.routing import RoutingTrace, route
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.params import LayerParams
from moe_ref.specs.record import RoutingRecord
from moe_ref.specs.router import RouterSpec


def capture(
    routing: RoutingTrace | CapacityTrace,
    spec: RouterSpec,
    *,
    token_mask_T: np.ndarray | None = None,
    sequence_lengths: Sequence[int] | None = None,
) -> RoutingRecord:
    """A record holds what a router chose, in slot order, with float32 weights. [RPL-8]

    `routing` is a RoutingTrace or a CapacityTrace, or anything with expert_ids_TK and weights_TK.
    """
    return RoutingRecord.of_choice(
        routing.expert_ids_TK, routing.weights_TK, spec, token_mask_T=token_mask_T, sequence_lengths=sequence_lengths
    )


def replay(
    record: RoutingRecord,
    logits_TE: np.ndarray,
    spec: RouterSpec,
    *,
    with_weights: bool = False,
    learned_scale: np.ndarray | None = None,
    dtype: DTypeLike = np.float64,
) -> RoutingTrace:
    """The recorded choice on this router: its weights are those of these logits, or the recorded ones. [RPL-2 .. RPL-4]

    An unused slot stays unused. Recorded weights are constants: no gradient goes to the logits.
    """
    inputs, mask_T = record.inputs(spec, with_weights=with_weights, num_tokens=len(logits_TE))
    forced = spec.given(with_weights=with_weights)
    return route(logits_TE, forced, learned_scale=learned_scale, inputs=inputs, token_mask_T=mask_T, dtype=dtype)


def replay_layer(
    record: RoutingRecord,
    x_TD: np.ndarray,
    params: LayerParams,
    spec: LayerSpec,
    *,
    with_weights: bool = False,
    dtype: DTypeLike = np.float64,
) -> LayerTrace:
    """The layer with the recorded choice; expert_bias takes part in a choice alone, and is not asked. [RPL-4]"""
    inputs, mask_T = record.inputs(spec.router, with_weights=with_weights, num_tokens=len(x_TD))
    forced = spec.replace(router=spec.router.given(with_weights=with_weights))
    without_bias = replace(params, expert_bias_E=None)
    return moe_layer(x_TD, without_bias, forced, inputs=inputs, token_mask_T=mask_T, dtype=dtype)
