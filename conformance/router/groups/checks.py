"""conformance, router: limit_groups. Only some groups of experts are kept for each token."""

import numpy as np

from conformance.core.check import given
from conformance.core.judge import accuse
from conformance.router.kind import requires
from conformance.router.observation import observe
from conformance.router.predicates import (
    EXACT,
    LEAVES_GROUPS,
    MODERATE,
    SCORES,
    SELECTS_WRONG,
    SELECTS_WRONG_UNBIASED,
    UNBIASED,
    panel,
    selects_right,
    sign_matters,
    untied,
    without_bias,
)
from conformance.router.verdicts import (
    best_of_other_groups,
    groups_used,
    hold_few_groups,
    hold_renamed,
    other_groups,
    selection_differs,
)


def grouped(spec) -> bool:
    return spec.num_expert_groups is not None and spec.mask_fill != 0


def hold_groups(judge, case) -> None:
    """Where the selection is the best of some groups, these are the groups with the best scores."""
    seen = observe(judge, case)
    other = [t for t in selection_differs(judge, seen) if best_of_other_groups(judge, seen, t)]
    if other and selects_right(judge, case):
        t = other[0]
        wanted = sorted(set(case.reference.group_ids_TL[t].tolist()))
        accuse(
            "other groups are kept",
            token=t,
            expected=f"experts {sorted(case.reference.expert_ids_TK[t].tolist())} of groups {wanted}",
            received=f"experts {sorted(seen.expert_ids_TK[t].tolist())} of groups {sorted(groups_used(seen, t))}",
        )
    for t in other_groups(judge, seen):
        assert seen.group_ids_TL is not None
        accuse(
            "other groups are reported",
            token=t,
            expected=str(sorted(case.reference.group_ids_TL[t].tolist())),
            received=str(sorted(seen.group_ids_TL[t].tolist())),
        )


@requires(
    "GRP-1",
    spec=grouped,
    bias=("none",),
    logits=(*MODERATE, "close", "below_zero"),
    given=(UNBIASED,),
    after=("GRP-2", *SCORES),
    sweeps=True,
)
def the_groups_with_the_best_scores_are_kept(judge, case):
    hold_groups(judge, case)


@requires(
    "GRP-2",
    spec=grouped,
    bias=("none", "positive"),
    logits=MODERATE,
    given=(given("judged where no choice score is negative", lambda case: "negative_choice" not in case.tags),),
)
def experts_come_from_few_groups(judge, case):
    hold_few_groups(judge, case)


@requires(
    "GRP-3",
    spec=grouped,
    bias=("mixed", "positive"),
    logits=MODERATE,
    after=("GRP-2", "SEL-3"),
    simpler=((without_bias, ("GRP-1", "SEL-2", *SCORES)),),
)
def group_scores_include_the_bias(judge, case):
    hold_groups(judge, case)


@requires(
    "GRP-4",
    spec=grouped,
    bias=("none",),
    logits=("tied", "equal"),
    dtypes=EXACT,
    simpler=((untied, ("GRP-1", "GRP-2")),),
    unless=(SELECTS_WRONG, LEAVES_GROUPS),
)
def of_equal_groups_the_lower_is_kept(judge, case):
    seen = observe(judge, case)
    for t in range(case.num_tokens):
        wanted = set(map(int, case.reference.group_ids_TL[t]))
        # Which experts of the kept groups are selected is a matter of SEL-5.
        if not groups_used(seen, t) <= wanted:
            accuse(
                "of equal groups a higher one is kept",
                token=t,
                expected=f"groups {sorted(wanted)}",
                received=f"groups {sorted(groups_used(seen, t))}",
            )


@requires(
    "GRP-5",
    spec=grouped,
    bias=("none", "mixed", "negative"),
    logits=MODERATE,
    after=("SEL-3",),
    unless=(SELECTS_WRONG, SELECTS_WRONG_UNBIASED, LEAVES_GROUPS, sign_matters("GRP-5")),
)
def renaming_groups_renames_the_selection(judge, case):
    spec, order = case.spec, case.rng().permutation(case.spec.num_expert_groups)
    new_to_old = (order[:, None] * spec.experts_per_group + np.arange(spec.experts_per_group)).reshape(-1)
    hold_renamed(judge, case, new_to_old)


def panel_without_bias(case):
    """Many other tokens under the same spec, without a bias."""
    return panel(without_bias(case))


@requires(
    "GRP-6",
    spec=lambda spec: spec.mask_fill == 0,
    logits=MODERATE,
    simpler=((panel_without_bias, SCORES),),
    unless=(SELECTS_WRONG, SELECTS_WRONG_UNBIASED),
)
def mask_fill_0_ranks_dropped_experts_at_0(judge, case):
    seen = observe(judge, case)
    for t in selection_differs(judge, seen):
        accuse(
            "another selection with dropped experts at 0",
            token=t,
            expected=str(sorted(case.reference.expert_ids_TK[t].tolist())),
            received=str(sorted(seen.expert_ids_TK[t].tolist())),
        )
