"""moe_jax, exchange: a rank's rows are planned, dispatched and brought back, as the strategy of the layout does it.

`EXCHANGES` has a class for each strategy; those are in `strategies.py`. To be called inside shard_map.

Legend: T tokens of a shard, K top_k, D model dim, E experts, R rows worked on.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.parallel.collectives import vary
from moe_jax.parallel.strategies import (
    Alone,
    Blocks,
    Exchange,
    Replicated,
    ReplicatedRagged,
    Ring,
    Runs,
    ShardMetadata,
    aligned,
)
from moe_ref.specs.align import AlignSpec
from moe_ref.specs.layout import AXES, ShardLayout
from moe_ref.specs.router import RouterSpec

EXCHANGES: dict[str, Exchange] = {
    "all_to_all": Blocks(),
    "ragged_all_to_all": Runs(),
    "ring_of_experts": Ring(),
    "replicated": Replicated(),
    "replicated_ragged": ReplicatedRagged(),
}
"""The strategies that moe_jax has."""


def unsupported(layout: ShardLayout) -> str | None:
    """Why moe_jax cannot run a layout; None where it can."""
    if layout.strategy not in EXCHANGES:
        return f"strategy is {layout.strategy!r}; moe_jax has {', '.join(EXCHANGES)}"
    return None


def exchange_of(layout: ShardLayout) -> Exchange:
    """One rank alone exchanges nothing, but may have a buffer that is too small."""
    several = layout.expert > 1 or layout.buffer_factor is not None or layout.facts.shares_tokens
    return EXCHANGES[layout.strategy] if several else Alone(EXCHANGES[layout.strategy])


def plan(
    expert_ids_TK: jax.Array, layout: ShardLayout, router: RouterSpec, align: AlignSpec | None = None
) -> ShardMetadata:
    """Where the slots of a shard go, and what arrives from all others; `layout` is that of the mesh.

    Args:
        expert_ids_TK: (T, K) ids of this shard; the experts of a token are distinct.
        align: the experts of this rank see their rows padded up to a multiple; what travels is not padded.
    """
    found = exchange_of(layout).plan(_places(expert_ids_TK, layout, router), layout, router)
    return found if align is None else aligned(found, align)


def dispatch(
    x_TD: jax.Array,
    metadata: ShardMetadata,
    layout: ShardLayout,
    *,
    input_weights_TK: jax.Array | None = None,
    buffer_fill: float | jax.Array = 0.0,
) -> jax.Array:
    """The rows of this rank's experts, from the tokens of all ranks, sorted by expert; then the tail.

    Every tensor rank of a shard gets them; the gradient of x_TD is the sum over those.

    Args:
        input_weights_TK: (T, K) factors on the rows, where the weight is on the input.
        buffer_fill: what a buffer row holds that nobody sent; nothing depends on it.
    """
    x_TD = vary(x_TD, AXES)
    weights_TK = None if input_weights_TK is None else vary(input_weights_TK, AXES).astype(x_TD.dtype)
    return exchange_of(layout).dispatch(x_TD, weights_TK, metadata, jnp.asarray(buffer_fill, x_TD.dtype))


def unpermute(
    rows_RD: jax.Array,
    metadata: ShardMetadata,
    layout: ShardLayout,
    *,
    output_weights_TK: jax.Array | None = None,
    buffer_fill: float | jax.Array = 0.0,
) -> jax.Array:
    """Each token's weighted sum of its rows, which come back from the ranks of their experts. Undoes `dispatch`.

    Rows of tensor ranks are partial sums; so is the result, which differs between them. A row that was not admitted
    is 0.
    """
    exchange = exchange_of(layout)
    axes = set(AXES) - ({"expert"} if exchange.returns_alike else set())
    weights_TK = None if output_weights_TK is None else vary(output_weights_TK, axes)
    return exchange.unpermute(rows_RD, weights_TK, metadata, jnp.asarray(buffer_fill, rows_RD.dtype))


def _places(expert_ids_TK, layout: ShardLayout, router: RouterSpec):
    """The place of each slot's expert; -1 without one."""
    E = router.num_experts
    has_expert_TK = (expert_ids_TK >= 0) & (expert_ids_TK < E)
    if layout.placement is None:
        return jnp.where(has_expert_TK, expert_ids_TK, -1)
    place_of_E = jnp.asarray(np.argsort(layout.placement), jnp.int32)
    return jnp.where(has_expert_TK, place_of_E[jnp.clip(expert_ids_TK, 0, E - 1)], -1)
