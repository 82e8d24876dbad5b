"""conformance, balance: load. What holds the number of experts of a token, where it varies, at a target."""

from conformance.balance.kind import requires
from conformance.balance.load.checks_quantile import hold_quantile, quantiles
from conformance.balance.verdicts import (
    COEFF,
    coefficient_of_subject,
    hold_balance,
    tokens_of_counts,
    wanted_coefficient,
)
from conformance.core.judge import accuse
from conformance.core.rounding import EPSILON


@requires(
    "LOD-48",
    method="balance_loss",
    ids=("own", "unused"),
    spec=lambda s: s.balance.target_top_k is not None,
    after=("LOD-5",),
)
def f_is_a_share_of_the_slots_that_tokens_are_to_have(judge, case):
    hold_balance(judge, case, "not the L1 norm with that f", gradient=True)


@requires("LOD-49", method="next_coefficient", counts=("mixed", "equal", "zero", "large"), tokens=(1,))
def a_coefficient_grows_where_tokens_have_too_many_experts(judge, case):
    found, wanted = coefficient_of_subject(judge, case), wanted_coefficient(case)
    if not abs(found - wanted) <= 4 * EPSILON[judge.subject.compute_dtype] * wanted:
        total, layers, tokens = int(case.counts_SE.sum()), len(case.counts_SE), tokens_of_counts(case)
        slots = f"{total} slots of {tokens} tokens in {layers} layers, {case.rule('sparsity').target_top_k} wanted"
        accuse(f"{slots}; before {COEFF:.9g}", expected=f"{wanted:.9g}", received=f"{found:.9g}")


@quantiles("LOD-50", spec=lambda s: s.router.selector == "threshold", logits=("normal", "large"))
def the_bias_wins_a_share_against_the_threshold(judge, case):
    hold_quantile(judge, case, "not the quantile of threshold less score")
