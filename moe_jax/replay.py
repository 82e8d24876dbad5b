"""moe_jax, replay: the choice of one run is recorded, and forced on another, here or in another framework.

    output_TD, decided = sparse_matmul(x_TD, params, spec)
    record = capture(decided, spec.router)                       # save_records, load_records: moe_ref
    again_TD, _ = replay_layer(x_TD, params, spec, record)       # ids alone: the weights are this router's
    again_TD, _ = replay_layer(x_TD, params, spec, record, with_weights=True)

Legend: T tokens, K top_k, B sequences.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.sparse_matmul import RouteOutput, sparse_matmul
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.params import LayerParams
from moe_ref.specs.record import RoutingRecord
from moe_ref.specs.router import RouterSpec


def capture(
    decided: RouteOutput,
    spec: RouterSpec,
    *,
    token_mask_T: jax.Array | None = None,
    sequence_lengths: Sequence[int] | None = None,
) -> RoutingRecord:
    """A record holds what the experts worked on, in slot order, with float32 weights; it is on the host. [RPL-8]

    Args:
        decided: of a layer or of `route`, outside of jit; slots that a capacity dropped are unused.
        spec: the router that chose.
        token_mask_T: (T,) bools, or in the leading shape of the tokens, False where a token is padding.
        sequence_lengths: of consecutive sequences; None: one.
    """
    return RoutingRecord.of_choice(
        np.asarray(decided.expert_ids_TK),
        np.asarray(decided.weights_TK, dtype=np.float32),
        spec,
        token_mask_T=None if token_mask_T is None else np.asarray(token_mask_T).reshape(-1),
        sequence_lengths=sequence_lengths,
    )


def replay_layer(
    x: jax.Array,
    params: LayerParams,
    spec: LayerSpec,
    record: RoutingRecord,
    *,
    with_weights: bool = False,
    layer: Callable[..., tuple[jax.Array, RouteOutput]] = sparse_matmul,
    **options: Any,
) -> tuple[jax.Array, RouteOutput]:
    """The layer with the recorded choice; its own router gives the weights, or the record does. [RPL-2, RPL-3]

    Recorded weights are constants. Under jit, pass what `record.inputs` returns as arguments instead, so that each
    record is not a program of its own; the spec of the layer's router is then that of `RouterSpec.given`.

    Args:
        x: (..., D) tokens, as many as the record has.
        layer: `sparse_matmul`, `dense_matmul`, or what takes the same arguments.
        options: further ones of it.
    """
    forced = spec.replace(router=spec.router.given(with_weights=with_weights))
    inputs, mask_T = record.inputs(spec.router, with_weights=with_weights, num_tokens=math.prod(jnp.shape(x)[:-1]))
    # A balancing bias takes part in a choice alone.
    return layer(x, replace(params, expert_bias_E=None), forced, token_mask_T=mask_T, inputs=inputs, **options)
