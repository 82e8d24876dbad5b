"""conformance, router: weigh. The selected experts get their weights; judged given the subject's own selection."""

import numpy as np

from conformance.core.check import given
from conformance.core.judge import accuse
from conformance.core.rounding import EPSILON, close, coarse
from conformance.router.bounds import (
    ROUNDINGS,
    coarseness,
    expected_weights,
    score_floor,
    smallest,
    taken,
    underflows_T,
    weight_error,
)
from conformance.router.case import RouterCase
from conformance.router.draw import BIASES, LOGITS
from conformance.router.kind import requires
from conformance.router.observation import Observation, observe
from conformance.router.predicates import (
    BIASED,
    MODERATE,
    SCORES,
    WEIGHS_WRONG_UNBIASED,
    WEIGHS_WRONG_WHATEVER_BIAS,
    tame,
    visible,
    weighs_wrong_with,
    without_bias,
)
from conformance.router.verdicts import hold_weights, not_the_best_E, selection_differs, unused, weights_differ
from moe_ref import RouterSpec
from moe_ref.routing import gather


def plain(spec) -> bool:
    """Weights that are scores, normed and scaled, and nothing else."""
    return (
        spec.learned_scale == "none"
        and spec.num_null_experts == 0
        and spec.num_scored_shared_experts == 0
        and spec.weights_from == "scores"
        and spec.selector != "sparsemixer"
        and spec.fills_slots
    )


def normed(spec) -> bool:
    return plain(spec) and spec.route_norm and spec.score_over == "all"


@requires(
    "WGT-1",
    spec=plain,
    bias=("mixed", "positive", "negative", "strong"),
    logits=MODERATE,
    given=(BIASED,),
    after=("WGT-8",),
    unless=(WEIGHS_WRONG_UNBIASED, WEIGHS_WRONG_WHATEVER_BIAS),
)
def the_bias_never_enters_a_weight(judge, case):
    hold_weights(judge, case, "the weights depend on the bias")


def eps_is_small(case) -> bool:
    return case.spec.norm_eps == 0 or "small_scores" not in case.tags


@requires(
    "WGT-2",
    spec=lambda s: normed(s) and s.route_scale == 1 and s.norm_p == 1 and s.norm_eps <= 1e-12,
    logits=(*MODERATE, "negative"),
    bias=("none",),
    given=(given("judged where norm_eps is small against the scores", eps_is_small),),
    after=("WGT-8", *SCORES),
)
def normed_weights_sum_to_1(judge, case):
    seen = observe(judge, case)
    total_T = seen.weights_TK.sum(axis=-1)
    error_T = weight_error(case, seen.expert_ids_TK, judge.subject.compute_dtype).max(axis=-1, initial=0)
    off_T = ~close(total_T, 1.0, 2 * error_T + 1e-9, 0)
    for t in weights_differ(judge, seen):  # a sum that is off by little: its ratios are the scores', or they are not
        wanted_K = expected_weights(case, seen.expert_ids_TK)[t] * total_T[t]
        off_T[t] |= bool(close(seen.weights_TK[t], wanted_K, EPSILON[judge.subject.compute_dtype], 0).all())
    for t in np.flatnonzero(off_T):
        accuse(
            "the weights do not sum to 1",
            token=int(t),
            expected="1",
            received=f"{total_T[t]:.7g}, the sum of {seen.weights_TK[t].round(7).tolist()}",
        )
    hold_weights(judge, case, "the weights sum to 1, but in another ratio than the scores")


@requires(
    "WGT-3",
    spec=lambda s: plain(s) and not s.route_norm and s.score_over == "all" and s.route_scale == 1,
    logits=MODERATE,
    bias=("none",),
    after=("WGT-8", *SCORES),
)
def without_norm_the_weights_are_the_scores(judge, case):
    hold_weights(judge, case, "the weights are not the scores")


@requires(
    "WGT-4",
    spec=lambda s: plain(s) and s.route_scale != 1,
    logits=MODERATE,
    bias=("none",),
    after=("WGT-8", *SCORES),
    unless=(weighs_wrong_with(route_scale=1.0),),
)
def the_scale_multiplies_once(judge, case):
    hold_weights(judge, case, f"not scaled by {case.spec.route_scale:g}, once")


@requires(
    "WGT-5",
    spec=lambda s: normed(s) and s.norm_eps > 0,
    logits=(*MODERATE, "negative"),
    bias=("none",),
    after=("WGT-8", "WGT-4", *SCORES),
    unless=(weighs_wrong_with(norm_form="add_eps", norm_eps=0.0),),
)
def the_divisor_is_as_norm_form_says(judge, case):
    hold_weights(judge, case, f"not divided with {case.spec.norm_form} {case.spec.norm_eps:g}")


@requires(
    "WGT-6",
    spec=lambda s: normed(s) and s.norm_p != 1,
    logits=MODERATE,
    bias=("none",),
    after=("WGT-8", *SCORES),
    unless=(weighs_wrong_with(norm_p=1.0),),
)
def the_norm_is_the_p_norm(judge, case):
    hold_weights(judge, case, f"not divided by the {case.spec.norm_p:g}-norm")


@requires(
    "WGT-7",
    spec=lambda s: normed(s) and s.top_k == 1 and s.norm_eps <= 1e-12,
    logits=MODERATE,
    bias=("none",),
    unless=(weighs_wrong_with(route_scale=1.0),),
)
def one_expert_with_norm_weighs_the_scale(judge, case):
    seen, scale = observe(judge, case), case.spec.route_scale
    error = EPSILON[judge.subject.compute_dtype] * ROUNDINGS + 4 * coarseness(case)
    for t in np.flatnonzero(~close(seen.weights_TK[:, 0], scale, error + 1e-9, 0)):
        accuse(
            "the only expert does not weigh route_scale",
            token=int(t),
            expected=f"{scale:g}",
            received=f"{seen.weights_TK[t, 0]:.7g}",
        )


@requires("WGT-8", spec=lambda s: plain(s) and s.top_k > 1, logits=MODERATE, bias=("none", "mixed"))
def a_weight_stands_in_the_slot_of_its_expert(judge, case):
    seen = observe(judge, case)
    in_any_order = set(weights_differ(judge, seen, in_any_order=True))
    for t in weights_differ(judge, seen):
        if t not in in_any_order:
            wanted_K = expected_weights(case, seen.expert_ids_TK)[t]
            accuse(
                "the right weights in the wrong slots",
                token=t,
                expected=f"experts {seen.expert_ids_TK[t].tolist()} weigh {wanted_K.round(7).tolist()}",
                received=str(seen.weights_TK[t].round(7).tolist()),
            )


@requires(
    "WGT-9",
    spec=lambda s: s.learned_scale != "none",
    logits=MODERATE,
    bias=("none",),
    unless=(weighs_wrong_with(learned_scale="none"),),
)
def the_learned_scale_multiplies_once_by_id(judge, case):
    hold_weights(judge, case, "not multiplied by the learned scale, once")


def only_masked_T(case: RouterCase, seen: Observation) -> np.ndarray:
    """Tokens that have experts, all of logit -inf: a softmax over them is not defined."""
    masked_TK = np.isneginf(gather(case.reference.scaled_logits_TE, seen.expert_ids_TK))
    return np.logical_and(masked_TK.any(axis=-1), (masked_TK | unused(seen.expert_ids_TK)).all(axis=-1))


# Twice "far": only there are all scores 0.
def hold_finite(judge, case, *, underflow: bool) -> None:
    """Weights are finite where the largest selected score is, or is not, a normal number of the dtype.

    Of a token whose chosen experts are all masked nothing is said: none of its logits that count is finite.
    """
    seen = observe(judge, case)
    concerned_T = underflows_T(case, seen.expert_ids_TK, judge.subject.compute_dtype) == underflow
    wrong_T = ~np.isfinite(seen.weights_TK).all(axis=-1) & concerned_T & ~only_masked_T(case, seen)
    for t in np.flatnonzero(wrong_T):
        accuse(
            "a weight is not finite", token=int(t), expected="finite weights", received=str(seen.weights_TK[t].tolist())
        )


@requires("WGT-10", logits=("huge", "large", "negative", "one_hot", "masked", "saturated"), bias=("none", "mixed"))
def weights_are_finite(judge, case):
    hold_finite(judge, case, underflow=False)


@requires(
    "WGT-16", logits=("far", "huge"), bias=("none", "mixed"), spec=lambda s: s.has_scores and s.selector == "top_k"
)
def weights_are_finite_where_scores_underflow(judge, case):
    hold_finite(judge, case, underflow=True)


def norms_scores_of_other_choices(spec: RouterSpec) -> bool:
    """Whether scores that did not decide the choice are divided by their sum, which may be 0."""
    return spec.has_scores and spec.selector != "top_k" and spec.route_norm


@requires(
    "WGT-18",
    logits=("large", "huge", "negative", "far"),
    bias=("none",),
    spec=norms_scores_of_other_choices,
)
def weights_of_given_ids_are_finite_where_scores_underflow(judge, case):
    hold_finite(judge, case, underflow=True)


@requires("WGT-11", spec=lambda s: not s.fills_slots, bias=("none",), logits=MODERATE)
def an_unused_slot_weighs_nothing(judge, case):
    seen = observe(judge, case)
    for t in np.flatnonzero((unused(seen.expert_ids_TK) & (seen.weights_TK != 0)).any(axis=-1)):
        accuse(
            "an unused slot has a weight",
            token=int(t),
            expected="0 where the id is -1",
            received=f"ids {seen.expert_ids_TK[t].tolist()} weigh {seen.weights_TK[t].tolist()}",
        )
    hold_weights(judge, case, "the used slots weigh otherwise")


@requires("WGT-12", spec=lambda s: s.num_null_experts > 0, logits=MODERATE, after=("SEL-11", *SCORES))
def null_experts_weigh_as_their_kind_says(judge, case):
    hold_weights(judge, case, f"null experts ({case.spec.null_kind}) weigh otherwise")


@requires("WGT-13", spec=lambda s: s.num_scored_shared_experts > 0, logits=MODERATE, bias=("none", "mixed"))
def scored_shared_experts_weigh_their_scores(judge, case):
    seen, wanted_TS = observe(judge, case), case.reference.shared_weights_TS
    hold_weights(judge, case, "routed weights beside shared experts")
    if seen.shared_weights_TS is None:
        accuse("no shared weights are returned", expected="shared_weights_TS", received="None")
    eps = EPSILON[judge.subject.compute_dtype]
    error = 4 * (eps * (ROUNDINGS + np.abs(case.logits_TE).max(initial=0)) + 2 * coarseness(case))
    own = [coarse(judge.subject.compute_dtype, stage, case.spec.num_choices) for stage in ("scores", "weights")]
    error = error + 4 * sum(own)
    if not np.array_equal(seen.expert_ids_TK, case.reference.expert_ids_TK):
        return  # another selection, another norm; the routed weights above were judged given it
    for t in np.flatnonzero(~close(seen.shared_weights_TS, wanted_TS, error, 1e-30).all(axis=-1)):
        accuse(
            "shared experts weigh otherwise",
            token=int(t),
            expected=str(wanted_TS[t].tolist()),
            received=str(seen.shared_weights_TS[t].tolist()),
        )


@requires(
    "WGT-14",
    spec=lambda s: s.weights_from == "masked_scores",
    logits=(*MODERATE, "negative"),
    bias=("none", "negative"),
)
def masked_scores_weigh_0(judge, case):
    hold_weights(judge, case, "weights are not read after the fill")


@requires("WGT-15", spec=lambda s: s.selector == "sparsemixer", logits=("separated", "normal", "tied"), bias=("none",))
def sparsemixer_weighs_by_its_band(judge, case):
    seen = observe(judge, case)
    same_T = (seen.expert_ids_TK == case.reference.expert_ids_TK).all(axis=-1)
    eps, size = EPSILON[judge.subject.compute_dtype], np.abs(case.logits_TE).max(initial=0)
    error = eps * (ROUNDINGS + 4 * size) + 4 * coarseness(case)
    wrong_T = ~close(seen.weights_TK, case.reference.weights_TK, error, 1e-30).all(axis=-1)
    for t in np.flatnonzero(same_T & wrong_T & ~_at_a_band_edge(case)):
        accuse(
            "not the softmax over the band",
            token=int(t),
            expected=str(case.reference.weights_TK[t].tolist()),
            received=str(seen.weights_TK[t].tolist()),
        )


def _at_a_band_edge(case):
    """Tokens with an expert so near the edge of a band that float32 may see it on the other side."""
    z_TE, width = case.reference.scaled_logits_TE, 2 * case.spec.mixer_eps
    edge_T = np.zeros(case.num_tokens, dtype=bool)
    for k in range(case.spec.top_k):
        best_T1 = np.take_along_axis(z_TE, case.reference.expert_ids_TK[:, k : k + 1], axis=-1)
        size_TE = np.maximum(np.maximum(np.abs(z_TE), best_T1), 1e-30)
        edge_T |= (np.abs((best_T1 - z_TE) / size_TE - width) < max(1e-5, 2 * coarseness(case))).any(axis=-1)
    return edge_T


def plainer(case: RouterCase) -> RouterCase:
    """The same spec and size in float32, with moderate logits and without a bias."""
    return tame(visible(without_bias(case).with_(dtype="float32")))


OF_THE_CHOICE = ("RUN-3", "GRP-2", "SEL-3", "SEL-11", "SEL-2", "SEL-4", "GRP-1", "GRP-3", "GRP-6", "SEL-9", "SEL-14",
                 "SEL-15", "SEL-16", "SEL-21", "SEL-22", "SEL-23", "SEL-30", "SEL-31", "SEL-34")  # fmt: skip
OF_THE_WEIGHTS = tuple(f"WGT-{number}" for number in (8, 2, 3, 4, 5, 6, 7, 9, 11, 12, 13, 14))


# "masked" with a bias leaves the ids out: SEL-10 is a SHOULD.
@requires(
    "WGT-17",
    logits=LOGITS,
    bias=BIASES,
    after=(*SCORES, "SCR-14", *OF_THE_CHOICE),
    simpler=((plainer, (*SCORES, *OF_THE_CHOICE, *OF_THE_WEIGHTS)),),
    sweeps=True,
    published=True,
    pairs=True,
)
def everything_combines(judge, case):
    seen, spec = observe(judge, case), case.spec
    wrong = []
    ranks_alone = spec.selector == "top_k" or spec.varies
    if ranks_alone and not (case.expert_bias_E is not None and "masked_logits" in case.tags):
        wrong = selection_differs(judge, seen)
    elif spec.selector in ("table", "given", "round_robin"):
        wrong = np.flatnonzero((seen.expert_ids_TK != case.reference.expert_ids_TK).any(axis=-1) & case.valid_T)
    elif spec.selector == "expert_choice":
        experts = not_the_best_E(judge, seen)
        both = (seen.expert_ids_TK, case.reference.expert_ids_TK)
        found_TE, wanted_TE = (taken(ids_TK, spec.num_choices) for ids_TK in both)
        wrong = np.flatnonzero((found_TE != wanted_TE)[:, experts].any(axis=-1))
    for t in wrong:
        accuse(
            "another selection",
            token=int(t),
            expected=str(case.reference.expert_ids_TK[t].tolist()),
            received=str(seen.expert_ids_TK[t].tolist()),
        )
    if spec.selector == "sparsemixer":
        return  # its weights are those of its own selection alone: WGT-15
    normal_T = scores_are_normal(judge, case, seen.expert_ids_TK) & ~only_masked_T(case, seen)
    for t in weights_differ(judge, seen):
        if normal_T[t]:
            accuse(
                "other weights",
                token=t,
                expected=f"experts {seen.expert_ids_TK[t].tolist()} weigh "
                f"{[float(f'{w:.7g}') for w in expected_weights(case, seen.expert_ids_TK)[t]]}",
                received=[float(f"{w:.7g}") for w in seen.weights_TK[t]],
            )


def scores_are_normal(judge, case: RouterCase, expert_ids_TK: np.ndarray) -> np.ndarray:
    """(T,) whether the largest selected score, and its power in a norm, is a normal number: the rest is WGT-16."""
    if case.reference.scores_TE is None:
        return np.ones(case.num_tokens, dtype=bool)
    dtype = judge.subject.compute_dtype
    largest_T = gather(case.reference.scores_TE, expert_ids_TK).max(axis=-1, initial=0)
    power = max(1.0, case.spec.norm_p) if case.spec.route_norm else 1.0
    return (largest_T > score_floor(case, dtype)) & (largest_T**power > smallest(case, dtype))
