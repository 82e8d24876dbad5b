"""conformance, suite: score. Logits become scores; seen in the scores, or in the ratios of the weights."""

import numpy as np

from conformance.core.check import requires
from conformance.core.judge import NotRun, Violation
from conformance.router.bounds import expected_weights
from conformance.router.case import Case
from conformance.router.groups.checks import selects_right
from conformance.router.verdicts import (
    differ,
    scores_differ,
    selection_differs,
    shares,
    shares_differ,
    weights_differ,
    wrong_selections,
)

MODERATE = ("separated", "normal")


def scored(score_func: str):
    """Specs that score every choice with this function, from logits as they are."""
    return lambda spec: (
        spec.score_func == score_func and whatever_groups(spec) and spec.logit_scale == 1 and spec.logit_softcap is None
    )


def whatever_groups(spec) -> bool:
    """Specs whose weights show the scores, whichever groups are kept and whichever experts selected."""
    # Given ids can leave slots unused: WGT-11.
    return spec.has_scores and spec.weights_from == "scores" and spec.selector != "given"


def hold_scores(judge, case, id: str) -> None:
    """The subject's scores, or else the ratios of its weights, are the reference's."""
    if case.expert_bias_E is not None and np.any(case.expert_bias_E):
        raise NotRun("scores are judged without a bias")
    seen = judge.observe(case)
    for t in scores_differ(judge, seen):
        raise Violation(
            id,
            case,
            "other scores",
            token=t,
            expected=str(case.reference.scores_TE[t].round(7).tolist()),
            received=str(seen.scores_TE[t].round(7).tolist()),
        )
    if seen.scores_TE is not None and case.reference.scores_TE is not None:
        return  # the scores are right; what the weights make of them is judged with the weights
    wrong = shares_differ(judge, seen)
    if wrong and right_when_plain(judge, case, shares_differ):
        return
    for t in wrong:
        wanted, found = (
            shares(case, w, seen.expert_ids_TK)[t].round(7).tolist()
            for w in (expected_weights(case, seen.expert_ids_TK), seen.weights_TK)
        )
        raise Violation(
            id,
            case,
            f"the scores of experts {seen.expert_ids_TK[t].tolist()} are in another ratio",
            token=t,
            expected=str(wanted),
            received=str(found),
        )


def right_when_plain(judge, case, verdict) -> bool:
    """The subject finds no fault with the same case without norm and scale: norm or scale is at fault, no score."""
    plain = case.spec.replace(
        route_norm=False,
        norm_form="add_eps",
        norm_eps=0.0,
        norm_p=1.0,
        norm_with_shared=False,
        route_scale=1.0,
        learned_scale="none",
    )
    if plain == case.spec or judge.subject.supports(plain) is not None:
        return False
    inputs = {name: value for name, value in case.inputs.items() if name != "learned_scale"}
    try:
        return not verdict(judge, judge.observe(case.with_(spec=plain, inputs=inputs)))
    except (NotRun, Violation):
        return False


@requires("SCR-1", spec=scored("softmax"), logits=MODERATE, bias=("none",), after=("SEL-11",))
def test_softmax_scores(judge, case):
    hold_scores(judge, case, "SCR-1")


@requires("SCR-2", spec=scored("sigmoid"), logits=MODERATE, bias=("none",), after=("SEL-11",))
def test_sigmoid_scores(judge, case):
    hold_scores(judge, case, "SCR-2")


# "huge" here too: among all score functions SCR-7 meets this one by luck.
@requires("SCR-3", spec=scored("sqrtsoftplus"), logits=(*MODERATE, "huge"), bias=("none",), after=("SEL-11",))
def test_sqrtsoftplus_scores(judge, case):
    hold_scores(judge, case, "SCR-3")


@requires(
    "SCR-4",
    spec=lambda spec: spec.score_over == "selected" and spec.selector != "given",
    logits=MODERATE,
    after=("WGT-8",),
)
def test_softmax_over_the_selected(judge, case):
    seen = judge.observe(case)
    wrong = weights_differ(judge, seen)
    if wrong and right_when_plain(judge, case, weights_differ):
        return
    for t in wrong:
        raise Violation(
            "SCR-4",
            case,
            "the weights are no softmax over the selected logits",
            token=t,
            expected=str(expected_weights(case, seen.expert_ids_TK)[t].round(7).tolist()),
            received=str(seen.weights_TK[t].round(7).tolist()),
        )


@requires(
    "SCR-5",
    spec=lambda s: whatever_groups(s) and (s.logit_scale != 1 or s.logit_softcap is not None),
    logits=(*MODERATE, "large"),
    bias=("none",),
)
def test_logits_are_scaled_and_capped(judge, case):
    hold_scores(judge, case, "SCR-5")


def shift_invariant(spec) -> bool:
    return (
        spec.score_func == "softmax"
        and spec.selector in ("top_k", "table")
        and spec.logit_scale == 1
        and spec.logit_softcap is None
    )


@requires("SCR-6", spec=shift_invariant, logits=("separated", "normal"), bias=("none",))
def test_a_constant_on_all_logits_changes_nothing(judge, case):
    # Multiples of 1/1024 below 2^13 are exact in float32, shifted or not.
    grid = case.with_(logits_TE=np.round(case.logits_TE * 1024) / 1024)
    shift_T1 = np.round(case.rng().uniform(-2000, 2000, (case.num_tokens, 1)))
    seen, shifted = judge.observe(grid), judge.observe(grid.with_(logits_TE=grid.logits_TE + shift_T1))
    # Where the scores of neither are wrong, the selection is: it is judged by itself.
    wrong = {t for each in (seen, shifted) for t in (scores_differ(judge, each) or shares_differ(judge, each))}
    for t in [t for t in differ(judge, seen, shifted) if t in wrong]:
        raise Violation(
            "SCR-6",
            case,
            f"{shift_T1[t, 0]:+g} on all logits of the token changes its routing",
            token=t,
            expected=_pairs(seen, t),
            received=_pairs(shifted, t),
        )


def _pairs(seen, t: int) -> str:
    return f"{seen.expert_ids_TK[t].tolist()} {seen.weights_TK[t].round(6).tolist()}"


def tame(case: Case) -> Case:
    """The same case with moderate logits."""
    finite = np.where(np.isfinite(case.logits_TE), case.logits_TE, 0)
    largest = max(1.0, float(np.abs(finite).max(initial=0)))
    return case.with_(logits_TE=np.float32(case.logits_TE * (3 / largest)).astype(np.float64))


@requires("SCR-7", logits=("large", "huge", "negative"), bias=("none",), spec=whatever_groups)
def test_logits_of_any_size_are_scored_right(judge, case):
    if not judge.sound(tame(case), "SCR-1", "SCR-2", "SCR-3", "SCR-5"):
        return
    hold_scores(judge, case, "SCR-7")
    # An expert whose score overflows may not be selected; then no weight shows it.
    if case.spec.selector != "top_k" or case.spec.num_expert_groups is not None:
        return
    seen = judge.observe(case)
    wrong = wrong_selections(judge, seen, "SCR-7")
    if wrong and not selects_right(judge, case):
        return
    for t in wrong:
        raise Violation(
            "SCR-7",
            case,
            "logits of this size are ranked otherwise",
            token=t,
            expected=str(case.reference.expert_ids_TK[t].tolist()),
            received=str(seen.expert_ids_TK[t].tolist()),
        )


@requires("SCR-8", dtype="bfloat16", logits=("normal",), bias=("none", "mixed"), spec=lambda s: s.selector == "top_k")
def test_low_precision_logits_are_scored_in_float32(judge, case):
    if "bfloat16" not in judge.subject.logit_dtypes:
        raise NotRun("logits of dtype bfloat16 are not taken")
    seen = judge.observe(case)
    other_selection = selection_differs(judge, seen, "SCR-8")
    # The weights may be returned in bfloat16: one rounding each.
    other_weights = weights_differ(judge, seen, dtype="bfloat16")
    if other_selection or other_weights:
        exact = judge.observe(case.with_(dtype="float32"))
        if selection_differs(judge, exact, "SCR-8") or weights_differ(judge, exact):
            return  # not a matter of precision
    for t in other_selection:
        raise Violation(
            "SCR-8",
            case,
            "another selection than in float32",
            token=t,
            expected=str(case.reference.expert_ids_TK[t].tolist()),
            received=str(seen.expert_ids_TK[t].tolist()),
        )
    for t in other_weights:
        raise Violation(
            "SCR-8",
            case,
            "other weights than in float32",
            token=t,
            expected=str(expected_weights(case, seen.expert_ids_TK)[t].round(5).tolist()),
            received=str(seen.weights_TK[t].round(5).tolist()),
        )


@requires(
    "SCR-9",
    logits=("masked",),
    bias=("none",),
    spec=lambda s: s.has_scores and s.selector == "top_k" and s.mask_fill != 0,
)
def test_minus_infinity_adds_nothing(judge, case):
    visible = case.with_(logits_TE=np.where(np.isneginf(case.logits_TE), -20.0, case.logits_TE))
    if not judge.sound(visible, "SCR-1", "SCR-2", "SCR-3", "SCR-5"):
        return
    hold_scores(judge, case, "SCR-9")
    # The ratio of the weights does not show a divisor that counts masked experts.
    if weights_differ(judge, judge.observe(visible)):
        return
    seen = judge.observe(case)
    for t in weights_differ(judge, seen):
        raise Violation(
            "SCR-9",
            case,
            "the weights depend on masked experts",
            token=t,
            expected=str(expected_weights(case, seen.expert_ids_TK)[t].round(7).tolist()),
            received=str(seen.weights_TK[t].round(7).tolist()),
        )
