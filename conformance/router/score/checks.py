"""conformance, router: score. Logits become scores; seen in the scores, or in the ratios of the weights."""

from dataclasses import replace

import numpy as np

from conformance.core.check import Condition
from conformance.core.judge import NotRun, Violation, accuse
from conformance.core.rounding import EPSILON, close
from conformance.router.bounds import LOW_PRECISION, expected_weights, score_error, score_floor
from conformance.router.kind import requires
from conformance.router.observation import observe
from conformance.router.predicates import (
    EXACT,
    MODERATE,
    UNBIASED,
    respecified,
    selects_right,
    shows_scores,
    tame,
    visible,
)
from conformance.router.verdicts import (
    differ,
    scores_differ,
    selection_differs,
    shares,
    shares_differ,
    weights_differ,
    wrong_selections,
)
from moe_ref.rounding import round_to

OF_ANY_FUNCTION = ("SCR-1", "SCR-2", "SCR-3", "SCR-5")
PLAIN_WEIGHTS = {
    "route_norm": False,
    "norm_form": "add_eps",
    "norm_eps": 0.0,
    "norm_p": 1.0,
    "norm_with_shared": False,
    "route_scale": 1.0,
    "learned_scale": "none",
}


def scored(score_func: str):
    """Specs that score every choice with this function, from logits as they are."""
    return lambda spec: spec.score_func == score_func and shows_scores(spec) and not spec.scales_logits


def hold_scores(judge, case) -> None:
    """The subject's scores, or else the ratios of its weights, are the reference's."""
    seen = observe(judge, case)
    for t in scores_differ(judge, seen):
        assert seen.scores_TE is not None
        accuse(
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
        accuse(
            f"the scores of experts {seen.expert_ids_TK[t].tolist()} are in another ratio",
            token=t,
            expected=str(wanted),
            received=str(found),
        )


def right_when_plain(judge, case, verdict) -> bool:
    """The subject finds no fault with the same case without norm and scale: norm or scale is at fault, no score."""
    plain = respecified(case, **PLAIN_WEIGHTS)
    if plain.spec == case.spec or judge.subject.supports(plain.spec) is not None:
        return False
    try:
        return not verdict(judge, observe(judge, plain))
    except (NotRun, Violation):
        return False


NORM_OR_SCALE_IS_WRONG = Condition(
    sentence="judged where norm and scale are right",
    holds=lambda judge, case: right_when_plain(judge, case, weights_differ),
)


@requires("SCR-1", spec=scored("softmax"), logits=MODERATE, bias=("none",), given=(UNBIASED,), after=("SEL-11",))
def softmax_scores(judge, case):
    hold_scores(judge, case)


@requires("SCR-2", spec=scored("sigmoid"), logits=MODERATE, bias=("none",), given=(UNBIASED,), after=("SEL-11",))
def sigmoid_scores(judge, case):
    hold_scores(judge, case)


# "huge" here too: among all score functions SCR-7 meets this one by luck.
@requires(
    "SCR-3",
    spec=scored("sqrtsoftplus"),
    logits=(*MODERATE, "huge"),
    bias=("none",),
    given=(UNBIASED,),
    after=("SEL-11",),
)
def sqrtsoftplus_scores(judge, case):
    hold_scores(judge, case)


@requires(
    "SCR-14",
    spec=lambda s: s.score_func == "relu" and s.selector != "given" and not s.scales_logits,
    logits=MODERATE,
    bias=("none",),
    after=("SEL-11", "SEL-23"),
    unless=(NORM_OR_SCALE_IS_WRONG,),
)
def relu_scores(judge, case):
    seen = observe(judge, case)
    # In any order: which slot a weight belongs to is judged with the weights.
    for t in sorted({*scores_differ(judge, seen), *weights_differ(judge, seen, in_any_order=True)}):
        accuse(
            "the scores are not max(logit, 0)",
            token=t,
            expected=f"weights {expected_weights(case, seen.expert_ids_TK)[t].round(7).tolist()}",
            received=f"weights {seen.weights_TK[t].round(7).tolist()}",
        )


@requires(
    "SCR-4",
    spec=lambda spec: spec.score_over == "selected" and spec.fills_slots,
    logits=MODERATE,
    after=("WGT-8",),
    unless=(NORM_OR_SCALE_IS_WRONG,),
)
def softmax_over_the_selected(judge, case):
    seen = observe(judge, case)
    for t in weights_differ(judge, seen):
        accuse(
            "the weights are no softmax over the selected logits",
            token=t,
            expected=str(expected_weights(case, seen.expert_ids_TK)[t].round(7).tolist()),
            received=str(seen.weights_TK[t].round(7).tolist()),
        )


@requires(
    "SCR-5",
    spec=lambda s: shows_scores(s) and s.scales_logits,
    logits=(*MODERATE, "large"),
    bias=("none",),
    given=(UNBIASED,),
)
def logits_are_scaled_and_capped(judge, case):
    hold_scores(judge, case)


def shift_invariant(spec) -> bool:
    return (
        spec.score_func == "softmax" and spec.selector in ("top_k", "table") and not (spec.scales_logits or spec.rounds)
    )


@requires("SCR-6", spec=shift_invariant, logits=MODERATE, bias=("none",), dtypes=EXACT)
def a_constant_on_all_logits_changes_nothing(judge, case):
    # Multiples of 1/1024 below 2^13 are exact in float32, shifted or not.
    grid = case.with_(logits_TE=np.round(case.logits_TE * 1024) / 1024)
    shift_T1 = np.round(case.rng().uniform(-2000, 2000, (case.num_tokens, 1)))
    seen, shifted = observe(judge, grid), observe(judge, grid.with_(logits_TE=grid.logits_TE + shift_T1))
    # Where the scores of neither are wrong, the selection is: it is judged by itself.
    wrong = {t for each in (seen, shifted) for t in (scores_differ(judge, each) or shares_differ(judge, each))}
    for t in [t for t in differ(judge, seen, shifted) if t in wrong]:
        accuse(
            f"{shift_T1[t, 0]:+g} on all logits of the token changes its routing",
            token=t,
            expected=_pairs(seen, t),
            received=_pairs(shifted, t),
        )


def _pairs(seen, t: int) -> str:
    return f"{seen.expert_ids_TK[t].tolist()} {seen.weights_TK[t].round(6).tolist()}"


@requires(
    "SCR-7",
    logits=("large", "huge", "negative", "below_zero", "saturated"),
    bias=("none",),
    spec=shows_scores,
    given=(UNBIASED,),
    simpler=((tame, OF_ANY_FUNCTION),),
)
def logits_of_any_size_are_scored_right(judge, case):
    hold_scores(judge, case)
    # An expert whose score overflows may not be selected; then no weight shows it.
    if case.spec.selector != "top_k" or case.spec.num_expert_groups is not None:
        return
    seen = observe(judge, case)
    wrong = wrong_selections(judge, seen)
    if wrong and not selects_right(judge, case):
        return
    for t in wrong:
        accuse(
            "logits of this size are ranked otherwise",
            token=t,
            expected=str(case.reference.expert_ids_TK[t].tolist()),
            received=str(seen.expert_ids_TK[t].tolist()),
        )


TAKES_LOW_PRECISION = Condition(
    sentence="judged with logits of bfloat16 or float16, where these are taken",
    holds=lambda judge, case: case.dtype in LOW_PRECISION and case.dtype in judge.subject.logit_dtypes,
)


def exact_is_wrong(judge, case) -> bool:
    """Logits of these values are routed wrong in float32 too, where it is taken: it is not a matter of precision."""
    if "float32" not in judge.subject.logit_dtypes:
        return False
    exact = observe(judge, case.with_(dtype="float32"))
    return bool(selection_differs(judge, exact) or weights_differ(judge, exact))


EXACT_IS_WRONG = Condition(sentence="judged where float32 logits are routed right", holds=exact_is_wrong)


@requires(
    "SCR-8",
    dtypes=LOW_PRECISION,
    logits=("normal", "confident"),
    bias=("none", "mixed"),
    spec=lambda s: s.selector == "top_k" and not s.rounds,
    given=(TAKES_LOW_PRECISION,),
    after=("SCR-10",),
    unless=(EXACT_IS_WRONG,),
)
def low_precision_logits_are_scored_in_float32(judge, case):
    seen, dtype = observe(judge, case), judge.subject.compute_dtype
    if dtype in LOW_PRECISION:
        dtype = "float32"  # a subject that says it is coarser is so all the same
    other_selection = selection_differs(judge, replace(seen, case=case.with_(dtype="float32")), dtype=dtype)
    # The weights may be returned in bfloat16: one rounding each.
    other_weights = weights_differ(judge, seen, dtype=case.dtype)
    for t in other_selection:
        accuse(
            "another selection than in float32",
            token=t,
            expected=str(case.reference.expert_ids_TK[t].tolist()),
            received=str(seen.expert_ids_TK[t].tolist()),
        )
    for t in other_weights:
        accuse(
            "other weights than in float32",
            token=t,
            expected=str(expected_weights(case, seen.expert_ids_TK)[t].round(5).tolist()),
            received=str(seen.weights_TK[t].round(5).tolist()),
        )


@requires(
    "SCR-10",
    dtypes=LOW_PRECISION,
    logits=("normal", "separated", "below_zero", "close"),
    bias=("none", "mixed"),
    spec=lambda s: s.selector == "top_k",
    given=(TAKES_LOW_PRECISION,),
    unless=(EXACT_IS_WRONG,),
)
def a_choice_from_low_precision_logits_is_explained(judge, case):
    seen = observe(judge, case)
    for t in selection_differs(judge, seen):
        accuse(
            f"no rounding to {case.dtype} explains this selection",
            token=t,
            expected=str(case.reference.expert_ids_TK[t].tolist()),
            received=str(seen.expert_ids_TK[t].tolist()),
        )


@requires(
    "SCR-11",
    spec=lambda s: s.rounds and s.has_scores and s.fills_slots,
    logits=(*MODERATE, "close"),
    bias=("none",),
)
def a_narrow_router_rounds_what_it_hands_on(judge, case):
    spec, seen = case.spec, observe(judge, case)
    # The same from the rounded logits, with no rounding after them.
    wide = case.with_(logits_TE=case.reference.scaled_logits_TE, spec=spec.replace(router_dtype="float32", **AS_SCORED))
    shown = {"scores": (seen.scores_TE, wide.reference.scores_TE), "weights": (seen.weights_TK, None)}
    if respecified(case, **PLAIN_WEIGHTS).spec == spec and spec.weights_from == "scores" and not spec.num_null_experts:
        shown["weights"] = (seen.weights_TK, expected_weights(wide, seen.expert_ids_TK))
    for name, (found, wanted) in shown.items():
        if found is None:
            continue
        for t in np.flatnonzero((~nearest_of(found, spec.router_dtype)).any(axis=-1) & case.valid_T).tolist():
            accuse(
                f"{name} are no numbers of {spec.router_dtype}",
                token=t,
                expected=str(round_to(found[t], spec.router_dtype).tolist()),
                received=str(found[t].tolist()),
            )
        if wanted is None:
            continue
        # Half of the distance to the next number, and what float32 does before it is rounded.
        dtype = judge.subject.compute_dtype
        error = EPSILON[spec.router_dtype] / 2 + score_error(wide, dtype).max(axis=-1, keepdims=True, initial=0)
        # In any order: which slot a weight belongs to is judged with the weights.
        ok_T = close(np.sort(found), np.sort(wanted), error, score_floor(case, dtype)).all(axis=-1)
        for t in np.flatnonzero(~ok_T & case.valid_T).tolist():
            accuse(
                f"{name} are not those of the rounded logits",
                token=t,
                expected=str(wanted[t].round(7).tolist()),
                received=str(found[t].round(7).tolist()),
            )


AS_SCORED = {"logit_scale": 1.0, "logit_softcap": None}


def nearest_of(values: np.ndarray, router_dtype: str) -> np.ndarray:
    """Which entries a narrow dtype holds; an infinity or NaN is for others to find."""
    finite = np.where(np.isfinite(values), values, 0)
    return round_to(finite, router_dtype) == finite


@requires("SCR-12", spec=lambda s: s.router_dtype == "float64" and s.selector != "sparsemixer", logits=MODERATE)
def a_router_of_float64_is_that_accurate(judge, case):
    seen = observe(judge, case.with_(dtype="float64"))
    otherwise_wrong = weights_differ(judge, seen)
    for t in weights_differ(judge, seen, dtype="float64"):
        if t in otherwise_wrong:
            continue
        accuse(
            "the weights are not as accurate as those of float64",
            token=t,
            expected=str(expected_weights(case, seen.expert_ids_TK)[t].tolist()),
            received=str(seen.weights_TK[t].tolist()),
        )


@requires(
    "SCR-9",
    logits=("masked",),
    bias=("none",),
    spec=lambda s: s.has_scores and s.selector == "top_k" and s.mask_fill != 0,
    given=(UNBIASED,),
    simpler=((visible, OF_ANY_FUNCTION),),
)
def minus_infinity_adds_nothing(judge, case):
    hold_scores(judge, case)
    # The ratio of the weights does not show a divisor that counts masked experts.
    if weights_differ(judge, observe(judge, visible(case))):
        return
    seen = observe(judge, case)
    for t in weights_differ(judge, seen):
        accuse(
            "the weights depend on masked experts",
            token=t,
            expected=str(expected_weights(case, seen.expert_ids_TK)[t].round(7).tolist()),
            received=str(seen.weights_TK[t].round(7).tolist()),
        )


@requires(
    "SCR-13",
    tokens=(7,),
    spec=lambda s: s.selector == "top_k",
    logits=MODERATE,
    bias=("none", "mixed"),
    dtypes=EXACT,
    inputs=("logit_factors_TE", "logit_noise_TE"),
    few=True,
)
def noise_is_what_is_given(judge, case):
    named = {"logit_factors_TE": None, "logit_noise_TE": None}
    case = case.with_logits(np.round(case.logits_TE * 64) / 64)  # so that float32 holds the noisy ones exactly
    noisy_TE = case.logits_TE * case.inputs["logit_factors_TE"] + case.inputs["logit_noise_TE"]
    # What the router makes of logits is for others to judge; here it is the same of noisy ones.
    seen, plain = observe(judge, case), observe(judge, case.with_inputs(**named).with_logits(noisy_TE))
    for t in differ(judge, seen, plain):
        accuse("noise is not what is given", token=t, expected=_pairs(plain, t), received=_pairs(seen, t))
