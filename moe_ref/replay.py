"""moe_ref, replay: a choice of experts that was recorded once is forced on any router.

    route -> capture -> save_records ... load_records -> replay

Reinforcement learning samples with one implementation and trains with another; where their routers disagree, the
gradient is of another model. A record carries the choice across: ids alone, so that the weights are those of the
router it is forced on, or ids with weights.

Legend: T tokens, K top_k.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from moe_ref.balance import mask_array
from moe_ref.layer import LayerTrace, moe_layer
from moe_ref.routing import RoutingTrace, route
from moe_ref.specs.checks import require
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.params import LayerParams
from moe_ref.specs.record import RoutingRecord
from moe_ref.specs.router import RouterSpec


def capture(routing: RoutingTrace, spec: RouterSpec, *, token_mask_T=None, sequence_lengths=None) -> RoutingRecord:
    """A record holds what a router chose, in slot order, with float32 weights. [RPL-8]

    `routing` is a RoutingTrace or a CapacityTrace, or anything with expert_ids_TK and weights_TK.
    """
    T = len(routing.expert_ids_TK)
    lengths = np.asarray([T] if sequence_lengths is None else sequence_lengths, dtype=np.int64)
    require(int(lengths.sum()) == T, f"sequence_lengths sums to {int(lengths.sum())}; there are {T} tokens")
    return RoutingRecord(
        expert_ids_TK=routing.expert_ids_TK,
        weights_TK=routing.weights_TK,
        token_mask_T=mask_array(token_mask_T, T),
        sequence_starts_B=np.cumsum(lengths) - lengths,
        spec=spec,
    )


def replay_spec(spec: RouterSpec, *, with_weights: bool = False) -> RouterSpec:
    """The same router with its choice replaced by a given one: no selection, no groups, no bias on the choice.

    The scores of a group count as they are, dropped by this router or not.

    Raises:
        ValueError: its weights are not a function of the chosen ids alone (sparsemixer).
    """
    require(
        with_weights or spec.selector != "sparsemixer",
        "selector is 'sparsemixer', whose weights depend on how it chose; replay it with recorded weights",
    )
    return spec.replace(
        selector="given", num_expert_groups=None, num_limited_groups=None, group_score_k=2, mask_fill=-np.inf,
        weights_from="scores",
    )  # fmt: skip


def replay(
    record: RoutingRecord, logits_TE, spec: RouterSpec, *, with_weights: bool = False, learned_scale=None,
    dtype: DTypeLike = np.float64,
) -> RoutingTrace:  # fmt: skip
    """The recorded choice on this router: its weights are those of these logits, or the recorded ones. [RPL-2 .. RPL-4]

    An unused slot stays unused. Recorded weights are constants: no gradient goes to the logits.
    """
    return route(
        logits_TE, replay_spec(spec, with_weights=with_weights), learned_scale=learned_scale, dtype=dtype,
        **replay_inputs(record, spec, with_weights=with_weights),
    )  # fmt: skip


def replay_layer(
    record: RoutingRecord, x_TD, params: LayerParams, spec: LayerSpec, *, with_weights: bool = False,
    dtype: DTypeLike = np.float64,
) -> LayerTrace:  # fmt: skip
    """The layer with the recorded choice; expert_bias takes part in a choice alone, and is not asked. [RPL-4]"""
    inputs = replay_inputs(record, spec.router, with_weights=with_weights)
    forced = spec.replace(router=replay_spec(spec.router, with_weights=with_weights))
    return moe_layer(x_TD, replace(params, expert_bias_E=None), forced, dtype=dtype, **inputs)


def replay_inputs(record: RoutingRecord, spec: RouterSpec, *, with_weights: bool = False) -> dict[str, Any]:
    """What `route` and `moe_layer` take beside the tokens to replay a record on a router with as many choices."""
    for field in ("top_k", "num_choices"):
        recorded, wanted = getattr(record.spec, field), getattr(spec, field)
        require(recorded == wanted, f"{field} is {wanted}; the record has {recorded}")
    inputs = {"given_ids_TK": record.expert_ids_TK, "token_mask_T": record.token_mask_T}
    if not with_weights:
        return inputs
    require(record.weights_TK is not None, "with_weights is True, but weights_TK of the record is None")
    return inputs | {"given_weights_TK": record.weights_TK}
