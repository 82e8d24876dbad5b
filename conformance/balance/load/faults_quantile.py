"""conformance, balance, faults of load: quantile balancing, and steps that are soft."""

import numpy as np

from conformance.core.fault import replaces, surrounds
from moe_ref.balance import bias_step
from moe_ref.quantile import bins_of, histogram, needs, quantile, quantile_bias

# quantiles


@replaces("quantile.quantile", breaks="LOD-40", links=("NVIDIA/Megatron-LM#6802",))
def a_quantile_has_the_other_sign(needs_NE, update, expert_bias_E, top_k):
    """What is to be subtracted from the scores is added to them."""
    return -quantile(needs_NE, update, expert_bias_E, top_k)


@replaces("needs", breaks="LOD-40")
def the_cutoff_is_the_last_chosen_score(ranked_TE, expert_bias_E, top_k, token_mask_T=None):
    """The K-th largest biased score is the cutoff, in place of the (K + 1)-th."""
    return needs(ranked_TE, expert_bias_E, top_k - 1, token_mask_T)


@replaces("needs", breaks="LOD-40")
def the_cutoff_is_of_scores_without_bias(ranked_TE, expert_bias_E, top_k, token_mask_T=None):
    """The bias takes no part in the cutoff."""
    return needs(ranked_TE, np.zeros_like(expert_bias_E), top_k, token_mask_T)


@replaces("needs", breaks="LOD-40")
def a_need_is_of_the_biased_score(ranked_TE, expert_bias_E, top_k, token_mask_T=None):
    """The biased score is subtracted, so that the bias is counted twice."""
    return needs(ranked_TE, expert_bias_E, top_k, token_mask_T) - expert_bias_E


@surrounds(breaks="LOD-40")
def a_quantile_is_added_to_the_bias(run, memory, logits_TE, router, update, expert_bias_E, **inputs):
    """The bias moves by the quantile, in place of becoming it."""
    return expert_bias_E + run(logits_TE, router, update, expert_bias_E, **inputs)


@replaces("quantile.quantile", breaks="LOD-40")
def a_quantile_leaves_the_share_above(needs_NE, update, expert_bias_E, top_k):
    """The quantile is taken at 1 - K / E."""
    return quantile(needs_NE, update, expert_bias_E, len(expert_bias_E) - top_k)


@surrounds(breaks="LOD-40")
def a_quantile_is_never_centred(run, memory, logits_TE, router, update, expert_bias_E, **inputs):
    """The mean over experts stays in the biases."""
    return run(logits_TE, router, update.replace(centred=False), expert_bias_E, **inputs)


@surrounds(breaks="LOD-41")
def the_share_that_stays_is_the_other_one(run, memory, logits_TE, router, update, expert_bias_E, **inputs):
    """1 - keep of the bias before stays."""
    return run(logits_TE, router, update.replace(keep=1 - update.keep if update.keep else 0), expert_bias_E, **inputs)


@replaces("quantile_bias", breaks="LOD-41")
def what_stays_is_not_centred(needs_by_batch, update, expert_bias_E, top_k):
    """The mean of the quantiles alone is subtracted, before the bias that stays is added."""
    found_E = quantile_bias(needs_by_batch, update.replace(keep=0.0), expert_bias_E, top_k)
    return update.keep * expert_bias_E + (1 - update.keep) * found_E


@surrounds(breaks="LOD-42", links=("NVIDIA/Megatron-LM#5349",))
def quantiles_of_ranks_are_averaged(run, memory, logits_TE, router, update, expert_bias_E, **inputs):
    """Each rank takes the quantile of its own tokens, and the quantiles are averaged."""
    exact = update.replace(over="batches") if update.bins is None else update
    if update.bins is None or inputs.get("tokens_per_shard") is None:
        return run(logits_TE, router, exact, expert_bias_E, **inputs)
    ends = np.cumsum(inputs["tokens_per_shard"])
    parts = [logits_TE[end - own : end] for end, own in zip(ends, inputs["tokens_per_shard"], strict=True) if own]
    return np.mean([run(part_TE, router, update, expert_bias_E) for part_TE in parts], axis=0)


@replaces("quantile_bias", breaks="LOD-42")
def the_first_rank_alone_sets_the_bias(needs_by_batch, update, expert_bias_E, top_k):
    """What the other ranks need is not summed."""
    return quantile_bias(needs_by_batch[:1], update, expert_bias_E, top_k)


@surrounds(breaks="LOD-43")
def padding_needs_as_tokens_do(run, memory, logits_TE, router, update, expert_bias_E, *, token_mask_T=None, **inputs):
    """The mask does not reach the quantile."""
    return run(logits_TE, router, update, expert_bias_E, **inputs)


@replaces("bins_of", breaks="LOD-44")
def bins_are_between_minus_1_and_1(expert_bias_E, bins):
    """The bins do not follow the biases: what is outside of them is in the last bin there."""
    return np.asarray(-1.0), np.asarray(2.0 / bins)


@replaces("quantile.quantile", breaks="LOD-44")
def the_lower_edge_of_a_bin_is_the_quantile(needs_NE, update, expert_bias_E, top_k):
    """The place inside the bin is not looked for."""
    if update.bins is None:
        return quantile(needs_NE, update, expert_bias_E, top_k)
    low, width = bins_of(expert_bias_E, update.bins)
    reached_EB = histogram(needs_NE, low, width, update.bins).cumsum(axis=-1)
    return low + width * (reached_EB * len(expert_bias_E) < len(needs_NE) * top_k).sum(axis=-1)


@surrounds(breaks="LOD-45")
def without_tokens_a_quantile_is_0(run, memory, logits_TE, router, update, expert_bias_E, **inputs):
    """The bias of a step of padding is 0."""
    mask_T = inputs.get("token_mask_T")
    found_E = run(logits_TE, router, update, expert_bias_E, **inputs)
    return found_E if mask_T is None or mask_T.any() else 0 * found_E


# soft steps


@surrounds(breaks="LOD-46")
def a_soft_step_is_not_clamped(run, memory, counts_SE, update, expert_bias_E):
    """The tanh is left out."""
    if update.rule == "tanh":
        update = update.replace(rule="relative", steepness=1.0, rate=update.rate * update.steepness)
    return run(counts_SE, update, expert_bias_E)


@surrounds(breaks="LOD-46")
def a_soft_step_is_of_counts(run, memory, counts_SE, update, expert_bias_E):
    """The excess is not divided by the mean, so that the tanh is a sign."""
    if update.rule == "tanh":
        update = update.replace(rule="sign", steepness=1.0)
    return run(counts_SE, update, expert_bias_E)


@surrounds(breaks="LOD-46")
def momentum_adds_the_whole_step(run, memory, counts_SE, update, expert_bias_E):
    """The step is added in full, besides momentum of the last move."""
    return run(counts_SE, update.replace(momentum=0.0), expert_bias_E)


@replaces("bias_step", breaks="LOD-47")
def a_share_is_of_the_slots_of_experts_that_move(counts_E, spec, last_step_E=None):
    """The slots of frozen experts, as null ones are, are left out of what a count is a share of."""
    if spec.rule == "share" and spec.frozen_E is not None:
        counts_E = np.where(np.array(spec.frozen_E), 0, counts_E)
    return bias_step(counts_E, spec, last_step_E)


@surrounds(breaks="LOD-47")
def the_wanted_share_is_always_all(run, memory, counts_SE, update, expert_bias_E):
    """The experts that move are to have every slot."""
    return run(counts_SE, update.replace(wanted_share=1.0), expert_bias_E)
