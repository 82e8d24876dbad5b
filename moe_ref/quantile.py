"""moe_ref, quantile balancing: the bias with which each expert would have won its share of a step's tokens.

    ranked scores -> needs -> quantile_bias      (what is ranked, and the bias that is added to it: `routing.py`)

Training alone does this: evaluation reads the bias and moves nothing.

Legend: T tokens, E experts, K top_k, B bins, N needs of a step (its valid tokens).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from moe_ref.balance import masked_logits, part_of_tokens
from moe_ref.routing import scale_logits, score
from moe_ref.specs.checks import array, entries
from moe_ref.specs.quantile import QuantileSpec
from moe_ref.specs.router import RouterSpec


def needs(
    ranked_TE: np.ndarray, expert_bias_E: np.ndarray, top_k: int, token_mask_T: np.ndarray | None = None
) -> np.ndarray:
    """What each expert needs to win a token: the (K + 1)-th largest biased score, less its own without bias. [LOD-40]

    Args:
        ranked_TE: (T, E) scores, or logits, without bias.
        expert_bias_E: (E,) the bias with which the tokens chose.
        top_k: K, less than E.
        token_mask_T: (T,) bools; a padding token (False) has no need. [LOD-43]

    Returns:
        (N, E), of the valid tokens.
    """
    if token_mask_T is not None:
        ranked_TE = ranked_TE[token_mask_T]
    cutoff_N1 = -np.sort(-(ranked_TE + expert_bias_E), axis=-1)[:, top_k, None]
    return cutoff_N1 - ranked_TE


def needs_of(
    ranked_TE: np.ndarray, router: RouterSpec, expert_bias_E: np.ndarray, token_mask_T: np.ndarray | None = None
) -> np.ndarray:
    """What each expert needs to win a token of this router: of a threshold, that less its own score. [LOD-40, LOD-50]

    Arguments and result as in `needs`.
    """
    if router.selector != "threshold":
        return needs(ranked_TE, expert_bias_E, router.top_k, token_mask_T)
    return router.threshold - (ranked_TE if token_mask_T is None else ranked_TE[token_mask_T])


def quantile_bias(
    needs_by_batch: Sequence[np.ndarray], update: QuantileSpec, expert_bias_E: np.ndarray, top_k: int
) -> np.ndarray:
    """The biases after a step; without a token they stay. [LOD-40 .. LOD-45]

    Args:
        needs_by_batch: (N, E) of each rank and micro-batch of the step, all of them with the same bias.
        update: the rule.
        expert_bias_E: (E,) the bias before.
        top_k: K.
    """
    given = [needs_NE for needs_NE in needs_by_batch if len(needs_NE)]
    if not given:
        return expert_bias_E
    pools = given if update.over == "batches" else [np.concatenate(given)]
    found_E = np.mean([quantile(needs_NE, update, expert_bias_E, top_k) for needs_NE in pools], axis=0)
    mixed_E = update.keep * expert_bias_E + (1 - update.keep) * found_E
    return mixed_E - mixed_E.mean() if update.centred else mixed_E


def quantile(needs_NE: np.ndarray, update: QuantileSpec, expert_bias_E: np.ndarray, top_k: int) -> np.ndarray:
    """(E,) the quantile K / E of the needs of each expert, N of them. [LOD-40, LOD-44]"""
    N, E = needs_NE.shape
    if update.bins is None:
        # In whole numbers: with this bias as many tokens as are below it are won.
        return np.sort(needs_NE, axis=0)[N * top_k // E]
    low, width = bins_of(expert_bias_E, update.bins)
    counts_EB = histogram(needs_NE, low, width, update.bins)
    reached_EB = counts_EB.cumsum(axis=-1)
    # The first bin where E times the counts so far are at least N * K.
    bin_E = (reached_EB * E < N * top_k).sum(axis=-1)
    in_bin_E = np.take_along_axis(counts_EB, bin_E[:, None], axis=-1)[:, 0]
    before_E = np.take_along_axis(reached_EB, bin_E[:, None], axis=-1)[:, 0] - in_bin_E
    return low + width * (bin_E + (N * top_k / E - before_E) / in_bin_E)


def bins_of(expert_bias_E: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The lower end of the first bin, and the width of each: scores between 0 and 1 need nothing outside them."""
    low, high = expert_bias_E.min() - 1, expert_bias_E.max() + 1
    return low, (high - low) / bins


def histogram(needs_NE: np.ndarray, low: np.ndarray, width: np.ndarray, bins: int) -> np.ndarray:
    """(E, B) how many needs each bin holds; one that rounding takes past the ends is in the last bin there."""
    bin_NE = np.clip(np.floor((needs_NE - low) / width), 0, bins - 1).astype(np.int64)
    return np.stack([np.bincount(bin_N, minlength=bins) for bin_N in bin_NE.T])


def quantile_update(
    logits_TE: np.ndarray,
    router: RouterSpec,
    update: QuantileSpec,
    expert_bias_E: np.ndarray,
    *,
    token_mask_T: np.ndarray | None = None,
    tokens_per_shard: Sequence[int] | None = None,
    dtype: DTypeLike = np.float64,
) -> np.ndarray:
    """The biases after a step on these tokens.

    Args:
        logits_TE: (T, E) of the whole step, finite.
        router: how they are scored and ranked.
        update: the rule.
        expert_bias_E: (E,) the bias of the step.
        token_mask_T: (T,) bools; a padding token (False) is in no quantile.
        tokens_per_shard: lengths of the consecutive ranks and micro-batches, sum T; None: one.
        dtype: of the scores and all that follows; the specification is float64.

    Raises:
        ValueError: the router is not one whose bias a quantile sets, or an array has another shape.
    """
    update.check(router)
    logits_TE, valid_T = masked_logits(logits_TE, token_mask_T, dtype)
    entries("logits_TE", logits_TE, np.isfinite(logits_TE), "logits of quantile balancing are finite")
    bias_E = array("expert_bias_E", expert_bias_E, (router.num_choices,)).astype(dtype)
    ranked_TE = ranked(scale_logits(logits_TE, router)[:, : router.num_choices], router)
    shard_of_T = part_of_tokens("tokens_per_shard", tokens_per_shard, len(logits_TE))
    shards = range(1 if tokens_per_shard is None else len(tokens_per_shard))
    found = [needs_of(ranked_TE, router, bias_E, valid_T & (shard_of_T == shard)) for shard in shards]
    return quantile_bias(found, update, bias_E, update.wins(router)).astype(dtype)


def ranked(scaled_logits_TE: np.ndarray, router: RouterSpec) -> np.ndarray:
    """What expert_bias is added to."""
    return scaled_logits_TE if router.select_by == "logit" else score(scaled_logits_TE, router)
