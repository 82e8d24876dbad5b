"""conformance, router: select, where experts take tokens. What each expert took is a column of the batch.

Legend: T tokens, E experts, K slots.
"""

import numpy as np

from conformance.core.judge import Judge, accuse
from conformance.router.bounds import taken, unlimited_choice
from conformance.router.case import RouterCase
from conformance.router.kind import requires
from conformance.router.observation import Observation, observe
from conformance.router.predicates import EXACT, MODERATE, SCORES
from conformance.router.verdicts import hold_order, not_the_best_E
from moe_ref import UNUSED, RouterSpec


def takes(spec: RouterSpec) -> bool:
    """Routers whose experts take tokens."""
    return spec.selector == "expert_choice"


def hold_numbers(seen: Observation, title: str) -> None:
    """Each expert takes as many tokens as the reference's."""
    case = seen.case
    wanted_E = taken(case.reference.expert_ids_TK, case.spec.num_choices).sum(axis=0)
    found_E = taken(seen.expert_ids_TK, case.spec.num_choices).sum(axis=0)
    for e in np.flatnonzero(found_E != wanted_E)[:1]:
        accuse(
            title,
            expected=f"expert {e} takes {wanted_E[e]} of {case.valid_T.sum()} tokens",
            received=f"it takes {found_E[e]}",
        )


def hold_taken(judge: Judge, case: RouterCase, title: str) -> None:
    """Each expert takes the tokens that rank best for it, near ties forgiven."""
    seen = observe(judge, case)
    for e in not_the_best_E(judge, seen)[:1]:
        wanted_T = np.flatnonzero(taken(case.reference.expert_ids_TK, case.spec.num_choices)[:, e]).tolist()
        found_T = np.flatnonzero(taken(seen.expert_ids_TK, case.spec.num_choices)[:, e]).tolist()
        accuse(
            title,
            token=next(iter(sorted(set(found_T) ^ set(wanted_T)))),
            expected=f"expert {e} takes tokens {wanted_T}",
            received=f"it takes {found_T}, which rank {unlimited_choice(case)[found_T, e].round(6).tolist()}",
        )


@requires("SEL-31", spec=takes, logits=MODERATE, bias=("none",), tokens=(7, 17, 1, 4))
def each_expert_takes_its_number(judge, case):
    hold_numbers(observe(judge, case), "another number of tokens")


@requires("SEL-30", spec=takes, logits=(*MODERATE, "negative", "large"), bias=("none",), after=("SEL-31", *SCORES))
def each_expert_takes_the_tokens_that_rank_best(judge, case):
    hold_taken(judge, case, "not the tokens that rank best for the expert")


@requires("SEL-32", spec=takes, logits=MODERATE, bias=("none",), tokens=(7,), inputs=("token_mask_T",))
def padding_is_never_taken(judge, case):
    # Padding that every expert would take first.
    full = np.where(case.valid_T[:, None], case.logits_TE, 40.0)
    case = case.with_logits(full)
    seen = observe(judge, case)
    for t in np.flatnonzero(~case.valid_T & (seen.expert_ids_TK != UNUSED).any(axis=-1))[:1]:
        accuse("padding is taken", token=int(t), expected="no expert", received=str(seen.expert_ids_TK[t].tolist()))
    hold_numbers(seen, "padding changes the number of tokens")
    hold_taken(judge, case, "padding changes what is taken")


def untied_tokens(case: RouterCase) -> RouterCase:
    """The same case with logits that are all apart."""
    size, shape = case.logits_TE.size, case.logits_TE.shape
    return case.with_logits(case.rng().permutation(np.linspace(-3, 3, size)).reshape(shape))


@requires(
    "SEL-33",
    spec=takes,
    logits=("tied", "one_hot"),
    bias=("none",),
    dtypes=EXACT,
    simpler=((untied_tokens, ("SEL-30", "SEL-31")),),
)
def of_equal_tokens_the_lower_is_taken(judge, case):
    # Equal rows: the scores of the two are equal in any arithmetic.
    case = case.tokens(np.repeat(np.arange(case.num_tokens), 2)[: case.num_tokens])
    seen = observe(judge, case)
    taken_TE, logits_TE = taken(seen.expert_ids_TK, case.spec.num_choices), case.logits_TE
    twins_T = np.flatnonzero((logits_TE[1:] == logits_TE[:-1]).all(axis=-1))
    for t in twins_T:
        for e in np.flatnonzero(taken_TE[t + 1] & ~taken_TE[t])[:1]:
            accuse(
                "of equal tokens a higher one is taken",
                token=int(t + 1),
                expected=f"expert {e} takes token {t} before token {t + 1}, whose logits are the same",
                received=f"it takes token {t + 1} alone",
            )


@requires("SEL-34", spec=takes, logits=("masked",), bias=("none",))
def a_token_of_minus_infinity_is_never_taken(judge, case):
    # One expert that hardly any token may go to.
    logits_TE = case.logits_TE.copy()
    logits_TE[1:, 0] = -np.inf
    case = case.with_logits(logits_TE)
    seen = observe(judge, case)
    never_TE = taken(seen.expert_ids_TK, case.spec.num_choices) & np.isneginf(logits_TE[:, : case.spec.num_experts])
    for t, e in np.argwhere(never_TE)[:1]:
        accuse(
            f"expert {e} takes a token of -inf",
            token=int(t),
            expected=str(case.reference.expert_ids_TK[t].tolist()),
            received=str(seen.expert_ids_TK[t].tolist()),
        )
    hold_numbers(seen, "another number of tokens beside logits of -inf")


@requires("SEL-35", spec=takes, logits=(*MODERATE, "tied"), bias=("none",))
def takers_are_in_descending_choice_score(judge, case):
    hold_order(judge, case)
