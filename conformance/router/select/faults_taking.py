"""conformance, router, faults of select where experts take tokens.

Legend: T tokens, E experts, K slots.
"""

import numpy as np

from conformance.core.fault import replaces
from moe_ref import UNUSED
from moe_ref.routing import bias_choice, list_takers, take_tokens


def by_row(ranked_TE, valid_T1):
    """Scores without padding."""
    return np.where(valid_T1, ranked_TE, -np.inf)


@replaces("take_tokens", breaks="SEL-30")
def each_half_of_a_batch_is_taken_alone(ranked_TE, valid_T1, spec):
    """Experts take one half of their tokens from each half of the batch: micro-batches."""
    half, C = len(ranked_TE) // 2, spec.takes(int(valid_T1.sum()))
    part = spec.replace(take_factor=1e-6, take_rounding="floor")
    first_TE = take_tokens(ranked_TE[:half], valid_T1[:half], part.replace(take_least=C // 2))
    second_TE = take_tokens(ranked_TE[half:], valid_T1[half:], part.replace(take_least=C - C // 2))
    return np.concatenate([first_TE, second_TE])


@replaces("bias_choice", breaks="SEL-30", links=("deepspeedai/DeepSpeed#7986",))
def tokens_are_ranked_by_logits(scaled_logits_TE, scores_TE, expert_bias_E, spec):
    """Tokens are ranked by logits, which no softmax over the experts made comparable."""
    if spec.selector == "expert_choice" and spec.score_func == "softmax":
        spec = spec.replace(select_by="logit")
    return bias_choice(scaled_logits_TE, scores_TE, expert_bias_E, spec)


@replaces("take_tokens", breaks="SEL-30")
def the_worst_tokens_are_taken(ranked_TE, valid_T1, spec):
    """Ranks are ascending."""
    turned_TE = take_tokens(-ranked_TE, valid_T1 & np.isfinite(ranked_TE).all(axis=-1, keepdims=True), spec)
    return -np.where(np.isneginf(turned_TE), np.inf, turned_TE)


@replaces("take_tokens", breaks="SEL-31")
def the_number_is_rounded_otherwise(ranked_TE, valid_T1, spec):
    """The number of tokens is rounded down where it is to be rounded up, and the other way round."""
    other = {"ceil": "floor", "floor": "ceil", "round": "floor"}[spec.take_rounding]
    return take_tokens(ranked_TE, valid_T1, spec.replace(take_rounding=other))


@replaces("take_tokens", breaks="SEL-31")
def the_least_number_is_forgotten(ranked_TE, valid_T1, spec):
    """Experts take no more than the factor says."""
    return take_tokens(ranked_TE, valid_T1, spec.replace(take_least=0))


@replaces("take_tokens", breaks="SEL-31")
def each_token_has_one_expert_in_the_mean(ranked_TE, valid_T1, spec):
    """The factor is left out."""
    return take_tokens(ranked_TE, valid_T1, spec.replace(take_factor=1.0))


@replaces("take_tokens", breaks="SEL-32")
def padding_is_counted(ranked_TE, valid_T1, spec):
    """Experts take as many tokens as if none were padding."""
    T, least = len(ranked_TE), spec.takes(len(ranked_TE))
    return take_tokens(ranked_TE, valid_T1, spec.replace(take_least=least)) if T else ranked_TE


@replaces("take_tokens", breaks="SEL-32")
def padding_has_a_place(ranked_TE, valid_T1, spec):
    """Padding is ranked with the tokens, and leaves its place empty: of flaxformer's router it may be chosen."""
    return by_row(take_tokens(ranked_TE, np.ones_like(valid_T1), spec), valid_T1)


@replaces("take_tokens", breaks="SEL-33")
def of_equal_tokens_the_last_is_taken(ranked_TE, valid_T1, spec):
    """Ties go to the higher token."""
    return take_tokens(ranked_TE[::-1], valid_T1[::-1], spec)[::-1]


@replaces("take_tokens", breaks="SEL-34")
def a_logit_of_minus_infinity_is_taken(ranked_TE, valid_T1, spec):
    """Where an expert has not enough tokens, it takes some whose logit is -inf."""
    return take_tokens(np.where(np.isneginf(ranked_TE), -1e30, ranked_TE), valid_T1, spec)


@replaces("list_takers", breaks="SEL-35")
def takers_are_listed_by_id(scores_for_choice_TE, spec):
    """The experts that took a token are in the order of their ids."""
    ids_TK = list_takers(scores_for_choice_TE, spec)
    by_id_TK = np.sort(np.where(ids_TK == UNUSED, spec.num_experts, ids_TK), axis=-1)
    return np.where(by_id_TK == spec.num_experts, UNUSED, by_id_TK)


@replaces("list_takers", breaks="SEL-35")
def each_expert_has_its_own_slot(scores_for_choice_TE, spec):
    """Slot e is that of expert e, taken or not: unused slots stand between the others."""
    taken_TE = scores_for_choice_TE > -np.inf
    return np.where(taken_TE, np.arange(taken_TE.shape[1]), UNUSED)
