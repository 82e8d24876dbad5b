"""moe_jax, replay: the choice of one run is recorded, and forced on another, here or in another framework.

    output_TD, decided = sparse_matmul(x_TD, params, spec)
    record = capture(decided, spec.router)                       # save_records, load_records: moe_ref.record
    again_TD, _ = replay_layer(x_TD, params, spec, record)       # ids alone: the weights are this router's
    again_TD, _ = replay_layer(x_TD, params, spec, record, with_weights=True)

Legend: T tokens, K top_k, B sequences.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from moe_jax.sparse_matmul import RouteOutput, sparse_matmul
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.params import LayerParams
from moe_ref.specs.record import RoutingRecord
from moe_ref.specs.router import RouterSpec


def capture(
    decided: RouteOutput, spec: RouterSpec, *, token_mask_T=None, sequence_lengths: Sequence[int] | None = None
) -> RoutingRecord:
    """A record holds what the experts worked on, in slot order, with float32 weights; it is on the host. [RPL-8]

    Args:
        decided: of a layer or of `route`, outside of jit; slots that a capacity dropped are unused.
        spec: the router that chose.
        token_mask_T: (T,) bools, False where a token is padding.
        sequence_lengths: of consecutive sequences; None: one.
    """
    ids_TK = np.asarray(decided.expert_ids_TK)
    T = len(ids_TK)
    lengths_B = np.array([T] if sequence_lengths is None else sequence_lengths, dtype=np.int64)
    if lengths_B.sum() != T:
        raise ValueError(f"sequence_lengths sums to {lengths_B.sum()}; there are {T} tokens")
    return RoutingRecord(
        expert_ids_TK=ids_TK,
        weights_TK=np.asarray(decided.weights_TK, dtype=np.float32),
        token_mask_T=np.ones(T, dtype=bool) if token_mask_T is None else np.asarray(token_mask_T),
        sequence_starts_B=lengths_B.cumsum() - lengths_B,
        spec=spec,
    )


def replay_layer(
    x_TD,
    params: LayerParams,
    spec: LayerSpec,
    record: RoutingRecord,
    *,
    with_weights: bool = False,
    layer: Callable[..., tuple[jax.Array, RouteOutput]] = sparse_matmul,
    **options,
) -> tuple[jax.Array, RouteOutput]:
    """The layer with the recorded choice; its own router gives the weights, or the record does. [RPL-2, RPL-3]

    Recorded weights are constants. Under jit, pass `replay_inputs` as an argument instead, so that each record is not a
    program of its own: layer(x_TD, params, forced_spec, **inputs) with forced_spec of `replay_spec`.

    Args:
        layer: `sparse_matmul`, `dense_matmul`, or what takes the same arguments.
        options: further ones of it.
    """
    forced = spec.replace(router=replay_spec(spec.router, with_weights=with_weights))
    inputs = replay_inputs(record, spec.router, with_weights=with_weights)
    # A balancing bias takes part in a choice alone.
    return layer(x_TD, replace(params, expert_bias_E=None), forced, **inputs, **options)


def replay_spec(spec: RouterSpec, *, with_weights: bool = False) -> RouterSpec:
    """The same router with its choice replaced by a given one. [RPL-4]

    Raises:
        ValueError: its weights are not a function of the chosen ids alone (sparsemixer).
    """
    if spec.selector == "sparsemixer" and not with_weights:
        raise ValueError("selector is 'sparsemixer', whose weights depend on how it chose; replay it with_weights")
    identity = RouterSpec(num_experts=1, top_k=1)
    groups = ("num_expert_groups", "num_limited_groups", "group_score_k", "mask_fill", "weights_from")
    return replace(spec, selector="given", **{name: getattr(identity, name) for name in groups})


def replay_inputs(record: RoutingRecord, spec: RouterSpec, *, with_weights: bool = False) -> dict[str, Any]:
    """What `route` and the layers take to replay a record on a router with as many choices."""
    for field in ("top_k", "num_choices"):
        recorded, wanted = getattr(record.spec, field), getattr(spec, field)
        if recorded != wanted:
            raise ValueError(f"{field} is {wanted}; the record has {recorded}")
    inputs = {"given_ids_TK": record.expert_ids_TK, "token_mask_T": record.token_mask_T}
    if not with_weights:
        return inputs
    if record.weights_TK is None:
        raise ValueError("with_weights is True, but weights_TK of the record is None")
    return inputs | {"given_weights_TK": record.weights_TK}
