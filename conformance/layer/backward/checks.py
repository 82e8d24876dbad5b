"""conformance, layer: backward. The gradients of tokens and parameters.

Legend: T tokens, E experts.
"""

import numpy as np

from conformance.core.check import given
from conformance.core.holding import hold
from conformance.core.show import spec_fields
from conformance.layer import bounds
from conformance.layer.kind import requires
from conformance.layer.predicates import (
    BIASES,
    CHOICE_IS_CLEAR,
    GRADIENTS,
    IDLE_EXPERT,
    MATRICES,
    PARTS,
    POISON,
    ROUTER,
    SHARED,
    WHOLE,
    by_token,
    chosen_alone,
    poisoned,
    takes_ids,
    takes_tokens,
    tokens_choose,
    unaligned,
    unlimited,
    unlimited_and_unmasked,
    unmasked,
    without_given_weights,
)
from conformance.layer.verdicts import (
    ROUTER_IS_WRONG,
    arguments_of,
    dtypes,
    gradients_of_subject,
    hold_gradients,
    hold_parameter,
    hold_unchanged,
    wanted_gradients,
)
from moe_ref import UNUSED, CapacitySpec, LayerSpec

FORWARD = (*PARTS, *WHOLE, "BWD-1")


def has_constant_weights(spec: LayerSpec) -> bool:
    """One slot, whose weight is normed to a constant."""
    router = spec.router
    normed = (router.route_norm and router.norm_eps == 0) or router.score_over == "selected"
    return router.top_k == 1 and normed and router.selector == "top_k"


@requires("BWD-1", method="layer_gradients")
def the_backward_pass_runs_and_returns_a_gradient_for_each_parameter(judge, case):
    gradients_of_subject(judge, case)


@requires(
    "BWD-2",
    large=1,
    method="layer_gradients",
    spec=tokens_choose,
    after=(*FORWARD, "BWD-3", "BWD-5", "BWD-10"),
    unless=(ROUTER_IS_WRONG,),
)
def the_gradient_of_the_tokens_is_that_of_every_path(judge, case):
    hold_gradients(judge, case, ["x_TD"], "not the gradient of the tokens")


@requires("BWD-3", large=1, method="layer_gradients", after=FORWARD, unless=(ROUTER_IS_WRONG,))
def the_matrices_of_an_expert_get_the_gradients_of_its_rows(judge, case):
    hold_gradients(judge, case, MATRICES, "not the gradient of its rows")


@requires(
    "BWD-4",
    method="layer_gradients",
    spec=lambda s: s.experts.bias,
    after=(*FORWARD, "BWD-3"),
    unless=(ROUTER_IS_WRONG,),
)
def the_biases_of_an_expert_get_the_gradients_of_its_rows(judge, case):
    hold_gradients(judge, case, BIASES, "not the gradient of its rows")


@requires(
    "BWD-5",
    large=1,
    method="layer_gradients",
    spec=lambda s: tokens_choose(s) and not has_constant_weights(s),
    after=FORWARD,
    unless=(ROUTER_IS_WRONG,),
)
def the_router_gets_the_gradients_of_the_weights(judge, case):
    hold_gradients(judge, case, ROUTER, "not the gradient of the weights")


@requires(
    "BWD-6",
    large=3,
    method="layer_gradients",
    bias=("crowded",),
    tokens=(7, 1),
    given=(IDLE_EXPERT,),
    after=("BWD-1",),
)
def an_expert_without_tokens_gets_gradients_of_0(judge, case):
    idle_E = case.reference.permutation.tokens_per_expert_E == 0
    # Memory that a fuller call has used is not 0.
    gradients_of_subject(judge, case.with_params(expert_bias_E=None))
    found = gradients_of_subject(judge, case)
    for name in (n for n in (*MATRICES, *BIASES) if n in found):
        nothing = np.zeros(found[name].shape)
        hold_parameter("an expert without tokens has a gradient", name, found[name], nothing, rows=idle_E)


@requires(
    "BWD-7", method="layer_gradients", spec=lambda s: s.router.selector == "top_k", bias=("mixed",), after=("BWD-1",)
)
def expert_bias_gets_no_gradient(judge, case):
    found = gradients_of_subject(judge, case).get("expert_bias_E")
    if found is not None:
        hold_parameter("not 0", "expert_bias_E", found, np.zeros(found.shape))


@requires("BWD-8", method="layer_gradients", spec=has_constant_weights, after=FORWARD, unless=(ROUTER_IS_WRONG,))
def a_constant_weight_sends_no_gradient_to_the_gate(judge, case):
    hold_gradients(judge, case, ROUTER, "not 0, though every weight is a constant")


@requires(
    "BWD-9",
    large=4,
    method="layer_gradients",
    spec=chosen_alone,
    inputs=("token_mask_T",),
    tokens=(7,),
    after=("BWD-1",),
    simpler=((unmasked, ("BWD-1",)),),
    given=(CHOICE_IS_CLEAR,),
)
def padding_adds_nothing_to_any_gradient(judge, case):
    valid_T1 = case.valid_T[:, None]
    # The same without padding, where the loss does not look at these tokens.
    unread = unmasked(case).with_(d_output_TD=np.where(valid_T1, case.d_output_TD, 0))
    wanted = gradients_of_subject(judge, unread)
    balls = bounds.gradients(unread, *dtypes(judge))
    for poison in POISON:
        spoiled = poisoned(case, poison).with_(d_output_TD=np.where(valid_T1, case.d_output_TD, 1e30))
        found = gradients_of_subject(judge, spoiled)
        nothing = np.zeros(case.x_TD.shape)
        title = f"with {poison:g} in the padding"
        hold(f"{title} it has a gradient", found["x_TD"], nothing, rows=~case.valid_T)
        for name in wanted_gradients(case):
            hold_parameter(title, name, found[name], wanted[name], 2 * balls[name].radius)


@requires(
    "BWD-10", method="layer_gradients", spec=lambda s: s.shared is not None, after=FORWARD, unless=(ROUTER_IS_WRONG,)
)
def shared_experts_get_the_gradients_of_every_token(judge, case):
    hold_gradients(judge, case, SHARED, "not the gradient of every token")


@requires(
    "BWD-11",
    method="layer_gradients",
    spec=by_token,
    tokens=(2,),
    after=("BWD-1",),
    given=(CHOICE_IS_CLEAR,),
    few=True,
)
def the_gradients_of_a_batch_are_the_sums_of_its_parts(judge, case):
    whole = gradients_of_subject(judge, case)
    parts = [gradients_of_subject(judge, case.tokens(np.array([t]))) for t in range(2)]
    balls = bounds.gradients(case, *dtypes(judge))
    for name in wanted_gradients(case):
        each = np.stack([part[name] for part in parts])
        sum_of_parts = each.sum(axis=0) if name != "x_TD" else np.concatenate(each)
        title = "not the sum of two single tokens"
        hold_parameter(title, name, whole[name], sum_of_parts, 3 * balls[name].radius)


@requires("BWD-12", method="layer_gradients", tokens=(0,), bias=("none",))
def zero_tokens_give_gradients_of_0(judge, case):
    for name, found in gradients_of_subject(judge, case).items():
        hold_parameter("not 0", name, found, np.zeros(found.shape))


def hold_all_gradients(judge, case, title):
    """Every gradient of the layer is the reference's."""
    hold_gradients(judge, case, wanted_gradients(case), title)


@requires(
    "BWD-13",
    large=3,
    method="layer_gradients",
    spec=tokens_choose,
    inputs=("capacity",),
    tokens=(7, 17),
    after=(*FORWARD, "LAY-19", "BWD-1"),
    simpler=((unlimited, GRADIENTS), (unlimited_and_unmasked, GRADIENTS)),
    unless=(ROUTER_IS_WRONG,),
    few=True,
)
def a_dropped_slot_sends_no_gradient(judge, case):
    title = f"not with a capacity of {spec_fields(case.inputs['capacity'])}"
    hold_all_gradients(judge, case, title)


@requires("BWD-14", method="layer_gradients", spec=tokens_choose, tokens=(7,), after=("BWD-1", "LAY-18"), few=True)
def a_capacity_that_nothing_exceeds_changes_no_gradient(judge, case):
    first, second = (gradients_of_subject(judge, case) for _ in range(2))
    limited = gradients_of_subject(judge, case.with_inputs(capacity=CapacitySpec(slots=2**20)))
    for name in wanted_gradients(case):
        if np.array_equal(first[name], second[name]):  # bits that differ from call to call are no capacity's
            hold_parameter("changed by a capacity of 2**20 slots", name, limited[name], first[name])


@requires(
    "BWD-15",
    method="layer_gradients",
    spec=takes_ids,
    inputs=("given_weights_TK",),
    after=(*FORWARD, "LAY-20", "BWD-1"),
    simpler=((without_given_weights, GRADIENTS),),
    few=True,
)
def given_weights_send_no_gradient_to_the_gate(judge, case):
    found = gradients_of_subject(judge, case)
    for name in (each for each in ROUTER if each in found):
        hold_parameter("not 0, though the weights are given", name, found[name], np.zeros(found[name].shape))
    hold_all_gradients(judge, case, "not with given weights")


@requires("BWD-16", method="layer_gradients", tokens=(7,), after=("BWD-1",))
def the_backward_pass_changes_no_array_that_it_is_given(judge, case):
    arguments = (*arguments_of(case), case.d_output_TD.astype(np.float32))
    hold_unchanged(judge, case, "layer_gradients", arguments)


@requires(
    "BWD-17",
    method="layer_gradients",
    inputs=("align",),
    tokens=(7, 17),
    after=(*FORWARD, "LAY-22", "BWD-1"),
    simpler=((unaligned, GRADIENTS),),
    unless=(ROUTER_IS_WRONG,),
    few=True,
)
def aligned_rows_change_no_gradient(judge, case):
    hold_all_gradients(judge, case, f"not with {spec_fields(case.inputs['align'])}")


def taken_by_nobody_T(case) -> np.ndarray:
    """(T,) tokens that are no padding and that no expert took."""
    return case.valid_T & (case.reference.expert_ids_TK == UNUSED).all(axis=-1)


@requires(
    "BWD-18",
    method="layer_gradients",
    spec=takes_tokens,
    inputs=("token_mask_T",),
    tokens=(7,),
    after=(*FORWARD, "BWD-3", "BWD-10", "BWD-19"),
    unless=(ROUTER_IS_WRONG,),
)
def a_slot_that_no_expert_took_sends_no_gradient(judge, case):
    hold_all_gradients(judge, case, "not with experts that take tokens")


@requires(
    "BWD-19",
    method="layer_gradients",
    spec=takes_tokens,
    tokens=(7,),
    after=("BWD-1",),
    given=(
        CHOICE_IS_CLEAR,
        given("judged where no expert took some token", lambda c: bool(taken_by_nobody_T(c).any())),
    ),
)
def a_token_that_no_expert_took_adds_to_no_gradient_of_routed_experts(judge, case):
    unread = np.where(taken_by_nobody_T(case)[:, None], 0, case.d_output_TD)
    wanted = gradients_of_subject(judge, case.with_(d_output_TD=unread))
    found, balls = gradients_of_subject(judge, case), bounds.gradients(case, *dtypes(judge))
    for name in (each for each in (*ROUTER, *MATRICES, *BIASES) if each in wanted_gradients(case)):
        title = "it depends on the loss of a token that no expert took"
        hold_parameter(title, name, found[name], wanted[name], 2 * balls[name].radius)
