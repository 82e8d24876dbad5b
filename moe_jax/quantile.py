"""moe_jax, quantile balancing: the bias with which each expert would have won its share of a step's tokens.

    scores -> needs -> total_of (micro-batches add up) -> bias_of_total

All of it is pure: a training step adds up the totals of its micro-batches and hands them on; evaluation calls none of
this. `axis_name` names the mesh axes over which the tokens of a batch are spread, inside `jax.shard_map`. What is
computed is `moe_ref.quantile`, in float32 at least.

Legend: T tokens, E experts, K top_k, B bins.
"""

import jax
import jax.numpy as jnp

from moe_jax.arrays import AxisName, wide_dtype
from moe_jax.balance import sum_over
from moe_jax.explicit import everywhere, in_any_mode
from moe_jax.routing import scale_logits, score
from moe_jax.top_k import top_k as largest
from moe_ref.specs.quantile import QuantileSpec
from moe_ref.specs.router import RouterSpec


def needs(ranked_TE: jax.Array, expert_bias_E: jax.Array, router: RouterSpec) -> jax.Array:
    """(T, E) what each expert needs to win a token: the (K + 1)-th largest biased score, less its own. [LOD-40]

    Of a router of selector threshold it is the threshold less its own. [LOD-50]

    Args:
        ranked_TE: (T, E) scores, or logits, without bias.
        expert_bias_E: (E,) the bias with which the tokens chose.
        router: static.
    """
    if router.selector == "threshold":
        return jax.lax.stop_gradient(router.threshold - ranked_TE)
    cutoff_T1 = largest(ranked_TE + expert_bias_E[None], router.top_k + 1)[0][:, -1:]
    return jax.lax.stop_gradient(cutoff_T1 - ranked_TE)


def ranked(logits_TE: jax.Array, router: RouterSpec) -> jax.Array:
    """(T, E) what expert_bias is added to."""
    scaled_TE = scale_logits(logits_TE, router)[:, : router.num_choices]
    return scaled_TE if router.select_by == "logit" else score(scaled_TE, router)


@in_any_mode(everywhere)
def total_of(
    logits_TE: jax.Array,
    router: RouterSpec,
    update: QuantileSpec,
    expert_bias_E: jax.Array,
    token_mask_T: jax.Array | None = None,
    *,
    axis_name: AxisName = None,
) -> jax.Array:
    """What a micro-batch adds to the total of a step, by which the bias is set: counts of bins, or a sum of quantiles.

    Args:
        logits_TE: (T, E) of the micro-batch, finite.
        router, update: static.
        expert_bias_E: (E,) the bias with which the tokens chose.
        token_mask_T: (T,) bools; a padding token (False) is in no total. [LOD-43]
        axis_name: mesh axes over which the tokens are spread; None: these tokens alone.

    Returns:
        (E, B) int32, the needs of valid tokens in each bin; with over 'batches' (E + 1,), the exact quantile of each
        expert and 1, or zeros without a valid token. Totals add up.

    Raises:
        ValueError: the rule does not go with the router; or neither bins nor over 'batches': an exact quantile of a
            pool needs all scores of the step at once (`quantile_bias`).
    """
    update.check(router)
    expert_bias_E = jnp.asarray(expert_bias_E).astype(wide_dtype(jnp.asarray(expert_bias_E).dtype))
    needs_TE = needs(ranked(logits_TE, router).astype(expert_bias_E.dtype), expert_bias_E, router)
    valid_T = jnp.ones(len(needs_TE), bool) if token_mask_T is None else jnp.asarray(token_mask_T)
    if update.bins is not None:
        return sum_over(axis_name, _counts(needs_TE, valid_T, expert_bias_E, update.bins))
    if update.over == "pool":
        raise ValueError(
            "bins is None and over is 'pool'; a total of micro-batches is of bins (QuantileSpec.of('kimi_k3')), and an "
            "exact quantile of all scores of a step is quantile_bias"
        )
    has_tokens = valid_T.any()[None]
    found_E = jnp.where(has_tokens, _smallest(needs_TE, valid_T, update.wins(router)), 0)
    return sum_over(axis_name, jnp.concatenate([found_E, has_tokens.astype(found_E.dtype)]))


def bias_of_total(total: jax.Array, update: QuantileSpec, expert_bias_E: jax.Array, top_k: int) -> jax.Array:
    """The biases after a step; without a token they stay. [LOD-40 .. LOD-45]

    Args:
        total: the sum of what `total_of` returned for the micro-batches of the step.
        update: static.
        expert_bias_E: (E,) the bias before, with which all of them chose.
        top_k: K, static: `QuantileSpec.wins`.
    """
    bias_E = jnp.asarray(expert_bias_E)
    before_E, E = bias_E.astype(wide_dtype(bias_E.dtype)), len(bias_E)
    if update.bins is None:
        number, found_E = total[-1], total[:-1] / jnp.maximum(total[-1], 1)
    else:
        low, width = _bins(before_E, update.bins)
        reached_EB, number = total.cumsum(axis=-1), total[0].sum()
        # number * K / E is whole + rest / E: the product itself may exceed int32.
        whole, rest = number // E * top_k + number % E * top_k // E, number % E * top_k % E
        bin_E1 = (reached_EB < whole + (rest > 0)).sum(axis=-1, keepdims=True)
        in_bin_E1 = jnp.take_along_axis(total, bin_E1, axis=-1, mode="clip")
        before_bin_E1 = jnp.take_along_axis(reached_EB, bin_E1, axis=-1, mode="clip") - in_bin_E1
        wanted_E1 = (whole - before_bin_E1).astype(before_E.dtype) + rest.astype(before_E.dtype) / E
        found_E = (low + width * (bin_E1 + wanted_E1 / jnp.maximum(in_bin_E1, 1)))[:, 0]
    return jnp.where(number > 0, _mixed(found_E, update, before_E), before_E).astype(bias_E.dtype)


@in_any_mode(everywhere)
def quantile_bias(
    logits_TE: jax.Array,
    router: RouterSpec,
    update: QuantileSpec,
    expert_bias_E: jax.Array,
    token_mask_T: jax.Array | None = None,
) -> jax.Array:
    """The biases after a step of which all tokens are at hand, as one batch. [LOD-40 .. LOD-45]

    Arguments as in `total_of`; this is the way to an exact quantile.
    """
    if update.bins is not None or update.over != "pool":
        total = total_of(logits_TE, router, update, expert_bias_E, token_mask_T)
        return bias_of_total(total, update, expert_bias_E, update.wins(router))
    update.check(router)
    bias_E = jnp.asarray(expert_bias_E)
    before_E = bias_E.astype(wide_dtype(bias_E.dtype))
    needs_TE = needs(ranked(logits_TE, router).astype(before_E.dtype), before_E, router)
    valid_T = jnp.ones(len(needs_TE), bool) if token_mask_T is None else jnp.asarray(token_mask_T)
    found_E = _mixed(_smallest(needs_TE, valid_T, update.wins(router)), update, before_E)
    return jnp.where(valid_T.any(), found_E, before_E).astype(bias_E.dtype)


def _mixed(found_E: jax.Array, update: QuantileSpec, before_E: jax.Array) -> jax.Array:
    mixed_E = update.keep * before_E + (1 - update.keep) * found_E
    return mixed_E - mixed_E.mean() if update.centred else mixed_E


def _smallest(needs_TE: jax.Array, valid_T: jax.Array, top_k: int) -> jax.Array:
    """(E,) the (floor(N * K / E) + 1)-th smallest need of each expert, of N valid tokens; 0 without a token."""
    T, E = needs_TE.shape
    if not T:
        return jnp.zeros(E, needs_TE.dtype)
    number = valid_T.sum()
    place = number // E * top_k + number % E * top_k // E
    sorted_TE = jnp.sort(jnp.where(valid_T[:, None], needs_TE, jnp.inf), axis=0)
    return jnp.where(number > 0, sorted_TE[place], 0)


def _counts(needs_TE: jax.Array, valid_T: jax.Array, expert_bias_E: jax.Array, bins: int) -> jax.Array:
    low, width = _bins(expert_bias_E, bins)
    E = needs_TE.shape[1]
    bin_TE = jnp.clip(jnp.floor((needs_TE - low) / width), 0, bins - 1).astype(jnp.int32)
    ones_TE = jnp.broadcast_to(valid_T[:, None], bin_TE.shape).astype(jnp.int32)
    return jnp.zeros((E, bins), jnp.int32).at[jnp.arange(E), bin_TE].add(ones_TE)


def _bins(expert_bias_E: jax.Array, bins: int) -> tuple[jax.Array, jax.Array]:
    low, high = expert_bias_E.min() - 1, expert_bias_E.max() + 1
    return low, (high - low) / bins
