"""conformance, layer: combine. The outputs of the experts become one sum for each token.

Legend: T tokens, K top_k, D model dim, N used slots.
"""

import numpy as np

from conformance.core.case import float32
from conformance.core.holding import hold
from conformance.core.judge import Judge
from conformance.layer.case import LayerCase
from conformance.layer.kind import requires
from conformance.layer.verdicts import sums_ball, sums_of_subject
from moe_ref import LayerSpec


def without_identity(spec: LayerSpec) -> bool:
    """Without null experts that return their input, which is not given here."""
    return len(spec.router.identity_ids) == 0 and spec.router.num_constant_experts == 0


def on_output(spec: LayerSpec) -> bool:
    """Weights that are applied here."""
    return without_identity(spec) and spec.router.weight_on == "output"


def rows_of(case: LayerCase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows (N, D), their order (N,) and the weights (T, K) of the reference, as float32 holds them."""
    trace = case.reference
    return float32(trace.experts.output_RD), trace.permutation.order_N, float32(trace.routing.weights_TK)


def hold_sums(
    judge: Judge, case: LayerCase, rows_ND: np.ndarray, order_N: np.ndarray, weights_TK: np.ndarray, title: str
) -> None:
    """The sums are the reference's."""
    found_TD = sums_of_subject(judge, case, rows_ND, order_N, weights_TK)
    ball = sums_ball(judge, case, rows_ND, order_N, weights_TK)
    hold(title, found_TD, ball.centre, ball.radius)


@requires("CMB-1", method="combine", spec=without_identity)
def combine_runs_and_returns_one_sum_for_each_token(judge, case):
    sums_of_subject(judge, case, *rows_of(case))


@requires("CMB-2", large=1, method="combine", spec=lambda s: on_output(s) and s.router.top_k > 1, after=("CMB-1",))
def a_sum_is_of_its_slots_times_their_weights(judge, case):
    hold_sums(judge, case, *rows_of(case), "not the weighted sum of its slots")


@requires("CMB-3", large=3, method="combine", spec=on_output, after=("CMB-1", "CMB-2", "CMB-7"))
def a_slot_that_is_no_row_adds_nothing(judge, case):
    rows_ND, order_N, weights_TK = rows_of(case)
    kept = case.rng().random(len(order_N)) < 0.6
    hold_sums(judge, case, rows_ND[kept], order_N[kept], float32(weights_TK + 1), "an unused slot adds something")


@requires("CMB-4", method="combine", spec=on_output, after=("CMB-1", "CMB-2", "CMB-7"))
def the_sum_is_linear_in_the_weights(judge, case):
    rows_ND, order_N, weights_TK = rows_of(case)
    # Few digits, so that float32 holds what is made of them.
    first_TK, second_TK = (
        np.round(w_TK * 2**10) / 2**10 for w_TK in (weights_TK, case.rng().uniform(-2, 2, weights_TK.shape))
    )
    sums = [sums_of_subject(judge, case, rows_ND, order_N, w_TK) for w_TK in (first_TK, second_TK)]
    both_TK = first_TK - 2 * second_TK
    together_TD = sums_of_subject(judge, case, rows_ND, order_N, both_TK)
    balls = [sums_ball(judge, case, rows_ND, order_N, w_TK) for w_TK in (first_TK, 2 * second_TK, both_TK)]
    radius_TD = sum(ball.radius for ball in balls)
    hold("f(w - 2 v) is not f(w) - 2 f(v)", together_TD, sums[0] - 2 * sums[1], radius_TD)


@requires(
    "CMB-5", method="combine", spec=lambda s: without_identity(s) and s.router.weight_on == "input", after=("CMB-1",)
)
def a_weight_on_the_input_is_not_applied_again(judge, case):
    hold_sums(judge, case, *rows_of(case), "not the bare sum of its slots")


@requires("CMB-6", method="combine", spec=without_identity, after=("CMB-1", "CMB-2", "CMB-5", "CMB-7"))
def the_order_within_an_expert_changes_no_sum(judge, case):
    rows_ND, order_N, weights_TK = rows_of(case)
    shuffled = np.lexsort((case.rng().random(len(order_N)), case.reference.permutation.expert_of_row_N))
    title = "in another order within the experts"
    hold_sums(judge, case, rows_ND[shuffled], order_N[shuffled], weights_TK, title)


@requires("CMB-7", method="combine", spec=lambda s: on_output(s) and s.router.top_k == 1, after=("CMB-1",))
def with_top_k_1_the_sum_is_the_scaled_row(judge, case):
    hold_sums(judge, case, *rows_of(case), "not its only row, weighted and scaled")


@requires("CMB-8", method="combine", spec=without_identity, after=("CMB-1",), tokens=(7, 0), bias=("none",))
def without_rows_the_sums_are_0(judge, case):
    rows_ND, order_N, weights_TK = rows_of(case)
    found_TD = sums_of_subject(judge, case, rows_ND[:0], order_N[:0], weights_TK)
    hold("not 0 without any row", found_TD, np.zeros(found_TD.shape))
