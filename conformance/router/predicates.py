"""conformance, router: what its chapters share. Kinds of data, simpler neighbours, and what explains a violation."""

import numpy as np

from conformance.core.check import Condition, given
from conformance.core.judge import Judge, NotRun, Violation
from conformance.router.case import RouterCase
from conformance.router.observation import observe
from conformance.router.verdicts import differ, leaves_groups, weights_differ, wrong_selections
from moe_ref import RouterSpec

MODERATE = ("separated", "normal")
EXACT = ("float32", "float64")
"""dtypes of logits that need no rounding in float32."""
SCORES = ("SCR-1", "SCR-2", "SCR-3", "SCR-4", "SCR-5", "SCR-10")
PANEL = 127
"""Other tokens that tell which stage is at fault: one token's wrong selection may look right by chance."""

BIASED = given("judged with a bias", lambda case: case.expert_bias_E is not None)
UNBIASED = given("judged without a bias", lambda case: case.expert_bias_E is None)


def ranks(spec: RouterSpec) -> bool:
    """Specs that select by choice score, and from the kept groups alone."""
    return spec.selector == "top_k" and spec.mask_fill != 0


def by_token(spec: RouterSpec) -> bool:
    """Selectors that look at the token alone, not at its place, at a draw or at the batch."""
    return spec.selector not in ("round_robin", "random") and not spec.reads_batch


def shows_scores(spec: RouterSpec) -> bool:
    """Specs whose weights show the scores, whichever groups are kept and whichever experts selected."""
    # Unused slots: WGT-11, SEL-23.
    return spec.has_scores and spec.weights_from == "scores" and spec.fills_slots


# simpler neighbours


def without_bias(case: RouterCase) -> RouterCase:
    """The same case without a bias."""
    return case.with_(expert_bias_E=None)


def above_zero(case: RouterCase) -> RouterCase | None:
    """The groups are at fault, not the sign, where the same biases above zero go wrong as well."""
    if case.spec.select_by != "score" or case.expert_bias_E is None:
        return None
    return case.with_(expert_bias_E=case.expert_bias_E - min(0.0, float(case.expert_bias_E.min())))


def untied(case: RouterCase) -> RouterCase:
    """The same case with logits that are all apart."""
    T, E = case.logits_TE.shape
    return case.with_logits(case.rng().permuted(np.tile(np.linspace(-3, 3, E), (T, 1)), axis=-1))


def tame(case: RouterCase) -> RouterCase:
    """The same case with moderate logits."""
    finite = np.where(np.isfinite(case.logits_TE), case.logits_TE, 0)
    largest = max(1.0, float(np.abs(finite).max(initial=0)))
    return case.with_logits(case.logits_TE * (3 / largest))


def visible(case: RouterCase) -> RouterCase:
    """The same case with -20 for each logit of -inf."""
    return case.with_logits(np.where(np.isneginf(case.logits_TE), -20.0, case.logits_TE))


def panel(case: RouterCase) -> RouterCase:
    """Other tokens under the same spec and bias, half of them negative: many tell which stage is at fault."""
    logits_TE = case.rng().normal(0, 2, (PANEL, case.spec.num_logits)).astype(np.float32)
    logits_TE[::2] -= 6
    of_no_token = {name: value for name, value in case.inputs.items() if not name.endswith(("_T", "_TK", "_TE"))}
    return case.with_logits(logits_TE).with_(inputs=of_no_token)


def respecified(case: RouterCase, **changes) -> RouterCase:
    """The same case under a spec with other fields."""
    spec = case.spec.replace(**changes)
    return case.with_(spec=spec).with_inputs(**({"learned_scale": None} if spec.learned_scale == "none" else {}))


# what explains a violation


def selects_right(judge: Judge, case: RouterCase) -> bool:
    """The experts of many other tokens are the best of their groups, and the best of all where there are no groups."""
    dropping = case.spec.replace(mask_fill=-np.inf, weights_from="scores")
    ungrouped = dropping.without_groups()
    for each in (dropping, ungrouped):
        if judge.subject.supports(each) is None:
            try:
                seen = observe(judge, panel(case.with_(spec=each)))
            except (NotRun, Violation):
                return False
            if wrong_selections(judge, seen):
                return False
    return True


def keeps_to_groups(judge: Judge, case: RouterCase) -> bool:
    """Many other tokens have no expert of a dropped group."""
    try:
        return not leaves_groups(observe(judge, panel(case)))
    except (NotRun, Violation):
        return False


SELECTS_WRONG = Condition(
    sentence="judged where the best experts of the kept groups are selected",
    holds=lambda judge, case: not selects_right(judge, case),
)
SELECTS_WRONG_UNBIASED = Condition(
    sentence="judged where the best experts are selected without a bias",
    holds=lambda judge, case: not selects_right(judge, without_bias(case)),
)
LEAVES_GROUPS = Condition(
    sentence="judged where no expert of a dropped group is selected",
    holds=lambda judge, case: not keeps_to_groups(judge, case),
)


def sign_matters(requirement: str) -> Condition:
    """The requirement holds where every bias is above zero: how dropped experts are masked is at fault (SEL-3)."""

    def holds(judge: Judge, case: RouterCase) -> bool:
        lifted = above_zero(case)
        return lifted is not None and judge.holds(requirement, lifted)

    return Condition(sentence="judged where the sign of the bias is no matter", holds=holds)


def weighs_wrong_with(**changes) -> Condition:
    """The weights are wrong already under a spec with these fields, where the subject supports it."""

    def holds(judge: Judge, case: RouterCase) -> bool:
        simpler = respecified(case, **changes)
        if simpler.spec == case.spec or judge.subject.supports(simpler.spec) is not None:
            return False
        try:
            return bool(weights_differ(judge, observe(judge, simpler)))
        except NotRun:
            return False

    fields = ", ".join(f"{name} {value}" for name, value in changes.items())
    return Condition(sentence=f"judged where the weights are right with {fields}", holds=holds)


WEIGHS_WRONG_UNBIASED = Condition(
    sentence="judged where the weights are right without a bias",
    holds=lambda judge, case: bool(weights_differ(judge, observe(judge, without_bias(case)))),
)


STEPS = (0.5, 0.75, 1.0)
"""By which the bias of chosen experts is raised, in turn: they stay chosen, and a weight that has it moves."""


def _weighs_alike_with_more_bias(judge: Judge, case: RouterCase) -> bool:
    """Whether no wrong weight moves where the bias of a token's own experts is raised."""
    for token in weights_differ(judge, observe(judge, case)):
        alone = case.tokens(np.array([token]))
        seen = observe(judge, alone)
        if alone.expert_bias_E is None or not weights_differ(judge, seen):
            return False  # another fault, of which a token alone says nothing
        raised_E = alone.expert_bias_E.copy()
        raised_E[seen.expert_ids_TK[0]] += np.resize(STEPS, case.spec.top_k)
        if differ(judge, seen, observe(judge, alone.with_(expert_bias_E=raised_E))):
            return False
    return True


WEIGHS_WRONG_WHATEVER_BIAS = Condition(
    sentence="judged where wrong weights move with the bias", holds=_weighs_alike_with_more_bias
)
