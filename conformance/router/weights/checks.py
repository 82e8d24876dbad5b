"""conformance, suite: weigh. The selected experts get their weights; judged given the subject's own selection."""

import numpy as np

from conformance.core.check import requires
from conformance.core.judge import NotRun, Violation
from conformance.core.rounding import EPSILON, TINY, close
from conformance.router.bounds import ROUNDINGS, expected_weights, weight_error
from conformance.router.groups.checks import SCORES, without_bias
from conformance.router.verdicts import unused, weights_differ
from moe_ref.routing import gather

MODERATE = ("separated", "normal")


def plain(spec) -> bool:
    """Weights that are scores, normed and scaled, and nothing else."""
    return (
        spec.learned_scale == "none"
        and spec.num_null_experts == 0
        and spec.num_scored_shared_experts == 0
        and spec.weights_from == "scores"
        and spec.selector not in ("given", "sparsemixer")
    )


def normed(spec) -> bool:
    return plain(spec) and spec.route_norm and spec.score_over == "all"


def hold_weights(judge, case, id: str, title: str) -> None:
    """The weights of the selected experts are the reference's for these experts."""
    seen = judge.observe(case)
    for t in weights_differ(judge, seen):
        wanted_K = expected_weights(case, seen.expert_ids_TK)[t]
        raise Violation(
            id,
            case,
            title,
            token=t,
            expected=f"experts {seen.expert_ids_TK[t].tolist()} weigh {[float(f'{w:.7g}') for w in wanted_K]}",
            received=str([float(f"{w:.7g}") for w in seen.weights_TK[t]]),
        )


def neighbour_is_wrong(judge, case, **changes) -> bool:
    """The same case under a simpler spec, where the subject supports it, has wrong weights already."""
    simpler = case.spec.replace(**changes)
    inputs = {k: v for k, v in case.inputs.items() if k != "learned_scale" or simpler.learned_scale != "none"}
    if judge.subject.supports(simpler) is not None:
        return False
    try:
        return bool(weights_differ(judge, judge.observe(case.with_(spec=simpler, inputs=inputs))))
    except NotRun:
        return False


@requires("WGT-1", spec=plain, bias=("mixed", "positive", "negative", "strong"), logits=MODERATE)
def test_the_bias_never_enters_a_weight(judge, case):
    if case.expert_bias_E is None:
        raise NotRun("judged with a bias")
    if weights_differ(judge, judge.observe(without_bias(case))):
        return
    hold_weights(judge, case, "WGT-1", "the weights depend on the bias")


@requires(
    "WGT-2",
    spec=lambda s: normed(s) and s.route_scale == 1 and s.norm_p == 1 and s.norm_eps <= 1e-12,
    logits=(*MODERATE, "negative"),
    bias=("none",),
    after=("WGT-8", *SCORES),
)
def test_normed_weights_sum_to_1(judge, case):
    if case.spec.norm_eps > 0 and "small_scores" in case.tags:
        raise NotRun("judged where norm_eps is small against the scores")
    seen = judge.observe(case)
    total_T = seen.weights_TK.sum(axis=-1)
    error_T = weight_error(case, seen.expert_ids_TK, judge.subject.compute_dtype).max(axis=-1, initial=0)
    for t in np.flatnonzero(~close(total_T, 1.0, 2 * error_T + 1e-9, 0)):
        raise Violation(
            "WGT-2",
            case,
            "the weights do not sum to 1",
            token=int(t),
            expected="1",
            received=f"{total_T[t]:.7g}, the sum of {seen.weights_TK[t].round(7).tolist()}",
        )
    hold_weights(judge, case, "WGT-2", "the weights sum to 1, but in another ratio than the scores")


@requires(
    "WGT-3",
    spec=lambda s: plain(s) and not s.route_norm and s.score_over == "all" and s.route_scale == 1,
    logits=MODERATE,
    bias=("none",),
    after=("WGT-8", *SCORES),
)
def test_without_norm_the_weights_are_the_scores(judge, case):
    hold_weights(judge, case, "WGT-3", "the weights are not the scores")


@requires(
    "WGT-4", spec=lambda s: plain(s) and s.route_scale != 1, logits=MODERATE, bias=("none",), after=("WGT-8", *SCORES)
)
def test_the_scale_multiplies_once(judge, case):
    if neighbour_is_wrong(judge, case, route_scale=1.0):
        return
    hold_weights(judge, case, "WGT-4", f"not scaled by {case.spec.route_scale:g}, once")


@requires(
    "WGT-5",
    spec=lambda s: normed(s) and s.norm_eps > 0,
    logits=(*MODERATE, "negative"),
    bias=("none",),
    after=("WGT-8", "WGT-4", *SCORES),
)
def test_the_divisor_is_as_norm_form_says(judge, case):
    if neighbour_is_wrong(judge, case, norm_form="add_eps", norm_eps=0.0):
        return
    hold_weights(judge, case, "WGT-5", f"not divided with {case.spec.norm_form} {case.spec.norm_eps:g}")


@requires(
    "WGT-6", spec=lambda s: normed(s) and s.norm_p != 1, logits=MODERATE, bias=("none",), after=("WGT-8", *SCORES)
)
def test_the_norm_is_the_p_norm(judge, case):
    if neighbour_is_wrong(judge, case, norm_p=1.0):
        return
    hold_weights(judge, case, "WGT-6", f"not divided by the {case.spec.norm_p:g}-norm")


@requires("WGT-7", spec=lambda s: normed(s) and s.top_k == 1 and s.norm_eps <= 1e-12, logits=MODERATE, bias=("none",))
def test_one_expert_with_norm_weighs_the_scale(judge, case):
    if neighbour_is_wrong(judge, case, route_scale=1.0) and case.spec.route_scale != 1:
        return
    seen, scale = judge.observe(case), case.spec.route_scale
    error = EPSILON[judge.subject.compute_dtype] * ROUNDINGS
    for t in np.flatnonzero(~close(seen.weights_TK[:, 0], scale, error + 1e-9, 0)):
        raise Violation(
            "WGT-7",
            case,
            "the only expert does not weigh route_scale",
            token=int(t),
            expected=f"{scale:g}",
            received=f"{seen.weights_TK[t, 0]:.7g}",
        )


@requires("WGT-8", spec=lambda s: plain(s) and s.top_k > 1, logits=MODERATE, bias=("none", "mixed"))
def test_a_weight_stands_in_the_slot_of_its_expert(judge, case):
    seen = judge.observe(case)
    in_any_order = set(weights_differ(judge, seen, in_any_order=True))
    for t in weights_differ(judge, seen):
        if t not in in_any_order:
            wanted_K = expected_weights(case, seen.expert_ids_TK)[t]
            raise Violation(
                "WGT-8",
                case,
                "the right weights in the wrong slots",
                token=t,
                expected=f"experts {seen.expert_ids_TK[t].tolist()} weigh {wanted_K.round(7).tolist()}",
                received=str(seen.weights_TK[t].round(7).tolist()),
            )


@requires("WGT-9", spec=lambda s: s.learned_scale != "none", logits=MODERATE, bias=("none",))
def test_the_learned_scale_multiplies_once_by_id(judge, case):
    if neighbour_is_wrong(judge, case, learned_scale="none"):
        return
    hold_weights(judge, case, "WGT-9", "not multiplied by the learned scale, once")


# Twice "far": only there are all scores 0.
def hold_finite(judge, case, id: str, *, underflow: bool) -> None:
    """Weights are finite where the largest selected score is, or is not, a normal number of float32."""
    seen = judge.observe(case)
    scores_TE = case.reference.scores_TE
    largest_T = np.ones(case.num_tokens) if scores_TE is None else gather(scores_TE, seen.expert_ids_TK).max(axis=-1)
    wrong_T = ~np.isfinite(seen.weights_TK).all(axis=-1) & ((largest_T < TINY["float32"]) == underflow)
    for t in np.flatnonzero(wrong_T):
        raise Violation(
            id,
            case,
            "a weight is not finite",
            token=int(t),
            expected="finite weights",
            received=str(seen.weights_TK[t].tolist()),
        )


@requires("WGT-10", logits=("huge", "large", "negative", "one_hot", "masked"), bias=("none", "mixed"))
def test_weights_are_finite(judge, case):
    hold_finite(judge, case, "WGT-10", underflow=False)


@requires("WGT-16", logits=("far", "huge"), bias=("none", "mixed"), spec=lambda s: s.has_scores)
def test_weights_are_finite_where_scores_underflow(judge, case):
    hold_finite(judge, case, "WGT-16", underflow=True)


@requires("WGT-11", spec=lambda s: s.selector == "given", bias=("none",), logits=MODERATE)
def test_an_unused_slot_weighs_nothing(judge, case):
    seen = judge.observe(case)
    for t in np.flatnonzero((unused(seen.expert_ids_TK) & (seen.weights_TK != 0)).any(axis=-1)):
        raise Violation(
            "WGT-11",
            case,
            "an unused slot has a weight",
            token=int(t),
            expected="0 where the id is -1",
            received=f"ids {seen.expert_ids_TK[t].tolist()} weigh {seen.weights_TK[t].tolist()}",
        )
    hold_weights(judge, case, "WGT-11", "the used slots weigh otherwise")


@requires("WGT-12", spec=lambda s: s.num_null_experts > 0, logits=MODERATE, after=("SEL-11", *SCORES))
def test_null_experts_weigh_as_their_kind_says(judge, case):
    hold_weights(judge, case, "WGT-12", f"null experts ({case.spec.null_kind}) weigh otherwise")


@requires("WGT-13", spec=lambda s: s.num_scored_shared_experts > 0, logits=MODERATE, bias=("none", "mixed"))
def test_scored_shared_experts_weigh_their_scores(judge, case):
    seen, wanted_TS = judge.observe(case), case.reference.shared_weights_TS
    hold_weights(judge, case, "WGT-13", "routed weights beside shared experts")
    if seen.shared_weights_TS is None:
        raise Violation("WGT-13", case, "no shared weights are returned", expected="shared_weights_TS", received="None")
    error = 4 * EPSILON[judge.subject.compute_dtype] * (ROUNDINGS + np.abs(case.logits_TE).max(initial=0))
    if not np.array_equal(seen.expert_ids_TK, case.reference.expert_ids_TK):
        return  # another selection, another norm; the routed weights above were judged given it
    for t in np.flatnonzero(~close(seen.shared_weights_TS, wanted_TS, error, 1e-30).all(axis=-1)):
        raise Violation(
            "WGT-13",
            case,
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
def test_masked_scores_weigh_0(judge, case):
    hold_weights(judge, case, "WGT-14", "weights are not read after the fill")


@requires("WGT-15", spec=lambda s: s.selector == "sparsemixer", logits=("separated", "normal", "tied"), bias=("none",))
def test_sparsemixer_weighs_by_its_band(judge, case):
    seen = judge.observe(case)
    same_T = (seen.expert_ids_TK == case.reference.expert_ids_TK).all(axis=-1)
    error = EPSILON[judge.subject.compute_dtype] * (ROUNDINGS + 4 * np.abs(case.logits_TE).max(initial=0))
    wrong_T = ~close(seen.weights_TK, case.reference.weights_TK, error, 1e-30).all(axis=-1)
    for t in np.flatnonzero(same_T & wrong_T & ~_at_a_band_edge(case)):
        raise Violation(
            "WGT-15",
            case,
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
        edge_T |= (np.abs((best_T1 - z_TE) / size_TE - width) < 1e-5).any(axis=-1)
    return edge_T
