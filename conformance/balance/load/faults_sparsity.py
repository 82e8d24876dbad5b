"""conformance, balance, faults of load: what holds the number of experts of a token at a target."""

import numpy as np

from conformance.core.fault import replaces, surrounds
from moe_ref.balance import balance_scores
from moe_ref.quantile import needs, needs_of
from moe_ref.sparsity import next_coefficient


@surrounds(breaks="LOD-48")
def f_is_a_share_of_slots_that_nobody_uses(run, memory, logits_TE, ids_TK, balance, router, **inputs):
    """f is a share of all slots, used or not, in place of those that tokens are to have."""
    return run(logits_TE, ids_TK, balance.replace(target_top_k=None), router, **inputs)


@replaces("balance_scores", breaks="LOD-48")
def an_l1_norm_is_of_shares(logits_TE, spec):
    """relu scores are divided by their sum."""
    scores_TE = balance_scores(logits_TE, spec)
    if spec.score_func != "relu" or spec.target_top_k is None:
        return scores_TE
    sum_T1 = scores_TE.sum(axis=-1, keepdims=True)
    return scores_TE / np.where(sum_T1 == 0, 1, sum_T1)


@surrounds(breaks="LOD-49")
def the_coefficient_shrinks_where_it_is_to_grow(run, memory, coeff, counts_LE, num_tokens, sparsity):
    """The coefficient is divided where tokens have too many experts."""
    return coeff * coeff / run(coeff, counts_LE, num_tokens, sparsity)


@surrounds(breaks="LOD-49")
def the_coefficient_grows_at_the_target(run, memory, coeff, counts_LE, num_tokens, sparsity):
    """At exactly the target the coefficient is multiplied."""
    exact = counts_LE.sum() == sparsity.target_top_k * num_tokens * len(counts_LE)
    return coeff * sparsity.factor if exact else run(coeff, counts_LE, num_tokens, sparsity)


@replaces("next_coefficient", breaks="LOD-49")
def the_first_layer_alone_moves_the_coefficient(coeff, counts_LE, num_tokens, spec):
    """The experts of the first layer alone are counted."""
    return next_coefficient(coeff, counts_LE[:1], num_tokens, spec)


@replaces("needs_of", breaks="LOD-50")
def a_threshold_is_taken_for_a_ranking(ranked_TE, router, expert_bias_E, token_mask_T=None):
    """Under a threshold, too, what wins a token is above its next best biased score."""
    if router.selector != "threshold":
        return needs_of(ranked_TE, router, expert_bias_E, token_mask_T)
    return needs(ranked_TE, expert_bias_E, min(router.top_k, len(expert_bias_E) - 1), token_mask_T)


@replaces("needs_of", breaks="LOD-50")
def the_threshold_is_forgotten(ranked_TE, router, expert_bias_E, token_mask_T=None):
    """The bias wins a share where the threshold is 0."""
    found_NE = needs_of(ranked_TE, router, expert_bias_E, token_mask_T)
    return found_NE - router.threshold if router.selector == "threshold" else found_NE


@surrounds(breaks="LOD-50")
def a_share_is_of_the_slots_of_a_token(run, memory, logits_TE, router, update, expert_bias_E, **inputs):
    """Each expert is to win its share of all slots, of which tokens are to use few."""
    if update.target_top_k is not None:
        update = update.replace(target_top_k=min(router.top_k, router.num_experts - 1))
    return run(logits_TE, router, update, expert_bias_E, **inputs)
