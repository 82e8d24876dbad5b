"""conformance, sharded: what its chapters share. Kinds of layouts and counts, simpler neighbours, who is to blame."""

import numpy as np

from conformance.core.check import given
from conformance.layer.predicates import WHOLE
from conformance.sharded.case import ShardedCase
from moe_ref import LayerSpec
from moe_ref.specs.layout import ShardLayout

FILLED = ("equal", "uneven", "prime")
"""Counts of tokens that leave no rank without any."""
SOME_EMPTY = ("some_empty",)

OUTPUTS = (*WHOLE, "LYT-2", "LYT-3", "LYT-4", "LYT-6", "LYT-14", "LYT-15")
"""Where one of these fails on the same or a simpler case, its outputs are wrong, and so is what follows from them."""


# kinds of layouts and layers


def any_layout(layout: ShardLayout) -> bool:
    """With a small buffer too."""
    return True


def lossless(layout: ShardLayout) -> bool:
    """No buffer is too small for what comes."""
    return layout.buffer_factor is None


def small_buffer(layout: ShardLayout) -> bool:
    """A buffer may be too small for what comes."""
    return layout.buffer_factor is not None and layout.expert > 1


def has_chunks(layout: ShardLayout) -> bool:
    """Chunks of tokens or of features."""
    return layout.num_token_chunks > 1 or layout.num_emb_chunks > 1


def chunked(layout: ShardLayout) -> bool:
    """Chunks, and no small buffer."""
    return lossless(layout) and has_chunks(layout)


def unchunked(layout: ShardLayout) -> bool:
    """Neither chunks nor a small buffer."""
    return lossless(layout) and not has_chunks(layout)


def unplaced(layout: ShardLayout) -> bool:
    """Expert i at place i, and no small buffer."""
    return lossless(layout) and layout.placement is None


def placed(layout: ShardLayout) -> bool:
    """Several ranks own experts of other places, and nothing else is special."""
    return unchunked(layout) and layout.placement is not None and layout.expert > 1


def is_plain(layout: ShardLayout) -> bool:
    """Rows travel, and nothing else is special."""
    return unchunked(layout) and unplaced(layout) and layout.tensor == 1


def by_tensor(layout: ShardLayout) -> bool:
    """Partial sums besides."""
    return unchunked(layout) and unplaced(layout) and layout.tensor > 1


def routed_only(spec: LayerSpec) -> bool:
    """Routed experts without shared ones."""
    return spec.shared is None


# conditions on a case

HAS_TOKENS = given("judged where there is a token", lambda case: case.num_tokens > 0)
AN_EMPTY_RANK = given("judged where a rank has no token", lambda case: 0 in case.tokens_per_shard)


# neighbours


def on_one_tensor_rank(case: ShardedCase) -> ShardedCase | None:
    """The same without a tensor axis, where it has one."""
    return None if case.layout.tensor == 1 else case.relaid(tensor=1)


def without_small_buffer(case: ShardedCase) -> ShardedCase:
    """The same with room for every row."""
    return case.relaid(buffer_factor=None)


def without_chunks(case: ShardedCase) -> ShardedCase:
    """The same in one exchange, with the features in one piece."""
    return case.relaid(num_token_chunks=1, num_emb_chunks=1)


def in_order(case: ShardedCase) -> ShardedCase:
    """The same with expert i at place i."""
    return case.relaid(placement=None)


def without_bias_of_down(case: ShardedCase) -> ShardedCase:
    """The same with 0 as the bias of every down projection."""
    return case.with_params(b_down_ED=np.zeros_like(case.params.b_down_ED))
