"""conformance, suite: backward. The gradients of tokens and parameters."""

import numpy as np

from conformance.core.check import requires
from conformance.core.judge import NotRun
from conformance.layer import bounds as layer_bounds
from conformance.layer.layer.checks import POISON, STAGES, by_token, poisoned, unmasked
from conformance.layer.verdicts import (
    blaming,
    dtypes,
    gradients,
    hold,
    hold_gradients,
    hold_parameter,
    judged_T,
    wanted_gradients,
)

FORWARD = (*STAGES, "LAY-2", "LAY-8", "LAY-9", "LAY-10", "LAY-11", "LAY-12", "LAY-13", "BWD-1")
MATRICES = ("w_up_EDF", "w_gate_EDF", "w_down_EFD")
BIASES = ("b_up_EF", "b_gate_EF", "b_down_ED")
ROUTER = ("gate_ED", "gate_bias_E", "learned_scale")
SHARED = ("shared_w_up_SDF", "shared_w_gate_SDF", "shared_w_down_SFD", "shared_token_gate_D")


def constant_weights(spec) -> bool:
    """One slot, whose weight is normed to a constant."""
    router = spec.router
    normed = (router.route_norm and router.norm_eps == 0) or router.score_over == "selected"
    return router.top_k == 1 and normed and router.selector == "top_k"


@requires("BWD-1", method="layer_gradients")
def test_the_backward_pass_runs_and_returns_a_gradient_for_each_parameter(judge, case):
    gradients(judge, case)


@requires("BWD-2", method="layer_gradients", after=(*FORWARD, "BWD-3", "BWD-5", "BWD-10"))
def test_the_gradient_of_the_tokens_is_that_of_every_path(judge, case):
    hold_gradients(judge, case, ["x_TD"], "not the gradient of the tokens")


@requires("BWD-3", method="layer_gradients", after=FORWARD)
def test_the_matrices_of_an_expert_get_the_gradients_of_its_rows(judge, case):
    hold_gradients(judge, case, MATRICES, "not the gradient of its rows")


@requires("BWD-4", method="layer_gradients", spec=lambda s: s.experts.bias, after=(*FORWARD, "BWD-3"))
def test_the_biases_of_an_expert_get_the_gradients_of_its_rows(judge, case):
    hold_gradients(judge, case, BIASES, "not the gradient of its rows")


@requires("BWD-5", method="layer_gradients", spec=lambda s: not constant_weights(s), after=FORWARD)
def test_the_router_gets_the_gradients_of_the_weights(judge, case):
    hold_gradients(judge, case, ROUTER, "not the gradient of the weights")


@requires("BWD-6", method="layer_gradients", bias=("crowded",), tokens=(7, 1), after=("BWD-1",))
def test_an_expert_without_tokens_gets_gradients_of_0(judge, case):
    idle_E = case.reference.permutation.tokens_per_expert_E == 0
    if not idle_E.any() or not judged_T(judge, case).all():
        raise NotRun("judged where an expert is surely without tokens")
    # Memory that a fuller call has used is not 0.
    gradients(judge, case.with_params(expert_bias_E=None))
    found = gradients(judge, case)
    for name in (n for n in (*MATRICES, *BIASES) if n in found):
        nothing = np.zeros(found[name].shape)
        title = "an expert without tokens has a gradient"
        hold_parameter(case, title, name, found[name], nothing, nothing, rows=idle_E)


@requires("BWD-7", method="layer_gradients", spec=lambda s: s.router.selector == "top_k", bias=("mixed",),
          after=("BWD-1",))  # fmt: skip
def test_expert_bias_gets_no_gradient(judge, case):
    found = gradients(judge, case).get("expert_bias_E")
    if found is not None:
        nothing = np.zeros(found.shape)
        hold_parameter(case, "not 0", "expert_bias_E", found, nothing, nothing)


@requires("BWD-8", method="layer_gradients", spec=constant_weights, after=FORWARD)
def test_a_constant_weight_sends_no_gradient_to_the_gate(judge, case):
    hold_gradients(judge, case, ROUTER, "not 0, though every weight is a constant")


@requires("BWD-9", method="layer_gradients", inputs=("token_mask_T",), tokens=(7,), after=("BWD-1",))
def test_padding_adds_nothing_to_any_gradient(judge, case):
    if not judged_T(judge, case).all():
        raise NotRun("judged where every choice is beyond doubt")
    valid_T1 = case.valid_T[:, None]
    # The same without padding, where the loss does not look at these tokens.
    unread = unmasked(case).with_(d_output_TD=np.where(valid_T1, case.d_output_TD, 0))
    wanted = gradients(judge, unread)
    balls = layer_bounds.gradients(unread, *dtypes(judge))
    for poison in POISON:
        spoiled = poisoned(case, poison).with_(d_output_TD=np.where(valid_T1, case.d_output_TD, 1e30))
        found = gradients(judge, spoiled)
        nothing = np.zeros(case.x_TD.shape)
        title = f"with {poison:g} in the padding"
        hold(case, f"{title} it has a gradient", found["x_TD"], nothing, nothing, rows=~case.valid_T)
        for name in wanted_gradients(case):
            hold_parameter(case, title, name, found[name], wanted[name], 2 * balls[name].radius)


@requires("BWD-10", method="layer_gradients", spec=lambda s: s.shared is not None, after=FORWARD)
def test_shared_experts_get_the_gradients_of_every_token(judge, case):
    hold_gradients(judge, case, SHARED, "not the gradient of every token")


@requires("BWD-11", method="layer_gradients", spec=by_token, tokens=(2,), after=("BWD-1",))
def test_the_gradients_of_a_batch_are_the_sums_of_its_parts(judge, case):
    if not judged_T(judge, case).all():
        raise NotRun("judged where every choice is beyond doubt")
    whole = gradients(judge, case)
    parts = [gradients(judge, case.tokens(np.array([t]))) for t in range(2)]
    balls = layer_bounds.gradients(case, *dtypes(judge))
    for name in wanted_gradients(case):
        sum_of_parts = sum(part[name] for part in parts) if name != "x_TD" else np.concatenate([p[name] for p in parts])
        title = "not the sum of two single tokens"
        hold_parameter(case, title, name, whole[name], sum_of_parts, 3 * balls[name].radius)


@requires("BWD-12", method="layer_gradients", tokens=(0,), bias=("none",))
def test_zero_tokens_give_gradients_of_0(judge, case):
    for name, found in gradients(judge, case).items():
        nothing = np.zeros(found.shape)
        hold_parameter(case, "not 0", name, found, nothing, nothing)
