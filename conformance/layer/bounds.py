"""conformance, layer: its bounds. How far rounding can take each number of a layer and of its gradients.

Legend: T tokens, K top_k, D model dim, E choices, S shared experts, G groups, P experts of a group, L groups kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from conformance.core.case import found_once
from conformance.core.rounding import EPSILON
from conformance.layer import balls_constant
from conformance.layer.balls import LIBRARY, Ball, FeedForwardBall, exact, feed_forward, feed_forward_backward, narrower
from conformance.layer.balls_latent import LatentBall, compress, compress_backward, expand, expand_backward
from conformance.layer.case import LayerCase
from conformance.router.bounds import (
    ROUNDINGS,
    choice_error,
    edges,
    taken_clearly_T,
    unlimited_choice,
    weight_error,
    weight_floor,
)
from conformance.router.case import RouterCase
from conformance.router.varying import settled_T
from moe_ref import UNUSED, LayerParams
from moe_ref.experts import identity_slots, sigmoid
from moe_ref.routing import gather
from moe_ref.specs.params import FeedForward
from moe_ref.specs.router import RouterSpec
from moe_ref.specs.router_rules import VARYING


@dataclass(frozen=True, kw_only=True)
class LayerBall:
    """The balls of a layer's intermediates; rows of the experts by expert."""

    x_TD: Ball
    logits_TE: Ball
    weights_TK: Ball
    expert_input_TD: Ball
    slot_inputs_TKD: Ball
    experts: dict[int, FeedForwardBall]
    """Of the experts that have rows."""
    slot_outputs_TKD: Ball
    latent: LatentBall | None
    factors_TS: Ball
    shared: tuple[FeedForwardBall, ...]
    output_TD: Ball


@found_once
def layer(case: LayerCase, dtype: str, expert_dtype: str) -> LayerBall:
    """The bounds of `moe_ref.moe_layer`, for the reference's choice of experts.

    Args:
        case: the layer.
        dtype: of the router, and of what is summed at the end.
        expert_dtype: of the experts, where it is narrower.
    """
    spec, params, trace = case.spec, case.params, case.reference
    narrow = narrower(dtype, expert_dtype)
    # A padding row is 0 in the trace, whatever the case has there.
    x_TD = exact(trace.x_TD, dtype)
    logits_TE = gate(case, dtype)
    weights_TK, shared_weights_TS = routing_weights(case, logits_TE)
    weights_TK = kept(case, weights_TK)
    expert_input_TD = x_TD if spec.latent is None else compress(x_TD.to(narrow), params)
    centre_and_radius = (expert_input_TD.centre, expert_input_TD.radius)
    slot_inputs_TKD = expert_input_TD.made(
        *(np.repeat(v[:, None], spec.router.top_k, axis=1) for v in centre_and_radius)
    )
    if spec.router.weight_on == "input":
        slot_inputs_TKD = slot_inputs_TKD * weights_TK[:, :, None]
    slot_inputs_TKD = slot_inputs_TKD.to(narrow)
    experts = {}
    shape = trace.slot_outputs_TKD.shape
    centre, radius = np.zeros(shape), np.zeros(shape)
    for expert_id, tokens, slots in rows_of_experts(case):
        made = feed_forward(slot_inputs_TKD[tokens, slots], params.expert(expert_id), spec.experts)
        experts[expert_id] = made
        centre[tokens, slots], radius[tokens, slots] = made.output_RD.centre, made.output_RD.radius
    identity_TK = identity_slots(trace.expert_ids_TK, spec.router)
    centre[identity_TK], radius[identity_TK] = (
        slot_inputs_TKD.centre[identity_TK],
        slot_inputs_TKD.radius[identity_TK],
    )
    slot_outputs_TKD = slot_inputs_TKD.made(centre, radius)
    balls_constant.fill(slot_outputs_TKD, slot_inputs_TKD, trace.expert_ids_TK, params, spec.router)
    latent, output_TD = expand(combine(slot_outputs_TKD, weights_TK.to(narrow), spec.router), params, spec)

    factors_TS, shared = shared_factors(case, x_TD, shared_weights_TS), ()
    if spec.shared_experts is not None:
        shared = tuple(
            feed_forward(x_TD.to(narrow), params.shared_expert(s), spec.shared_experts)
            for s in range(spec.num_shared_experts)
        )
        for s, each in enumerate(shared):
            output_TD = output_TD + factors_TS[:, s, None].to(narrow) * each.output_RD
        if spec.shared is not None and spec.shared.combine == "average":
            output_TD = output_TD.times(0.5)
    return LayerBall(
        x_TD=x_TD,
        logits_TE=logits_TE,
        weights_TK=weights_TK,
        expert_input_TD=expert_input_TD,
        slot_inputs_TKD=slot_inputs_TKD,
        experts=experts,
        slot_outputs_TKD=slot_outputs_TKD,
        latent=latent,
        factors_TS=factors_TS,
        shared=shared,
        output_TD=output_TD,
    )


def gate(case: LayerCase, dtype: str) -> Ball:
    """The logits."""
    x_TD = exact(np.where(case.valid_T[:, None], case.x_TD, 0), dtype)
    logits_TE = x_TD @ exact(case.params.gate_ED, dtype).T
    return logits_TE if case.params.gate_bias_E is None else logits_TE + exact(case.params.gate_bias_E, dtype)


def rows_of_experts(case: LayerCase) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(expert, tokens of its rows, slots of its rows) of each expert that has rows."""
    permutation = case.reference.permutation
    for expert_id in np.flatnonzero(permutation.tokens_per_expert_E):
        own = permutation.expert_of_row_N == expert_id
        yield int(expert_id), permutation.token_of_row_N[own], permutation.slot_of_row_N[own]


def combine(slot_outputs_TKD: Ball, weights_TK: Ball, spec: RouterSpec) -> Ball:
    """The weighted sum of a token's slots."""
    weighted = slot_outputs_TKD if spec.weight_on == "input" else slot_outputs_TKD * weights_TK[:, :, None]
    # A sum over the slots may be kept in the narrow dtype: a rounding for each.
    return weighted.rounded(spec.top_k).sum(1).times(spec.output_scale)


def relative_weight_error(case: LayerCase, logits_TE: Ball) -> np.ndarray:
    """(T, 1) relative error of a token's weights that comes from its logits."""
    # Where all logits move by at most 1, a weight changes by at most twice its own size: with its own, and the norm.
    return 2 * case.spec.router.logit_scale * radius_T1(case, logits_TE) * steepness_T1(case)


def steepness_T1(case: LayerCase) -> np.ndarray:
    """(T, 1) how much a token's weights change with one logit, in units of themselves: 1, but for relu 1 / score."""
    routing = case.reference.routing
    if case.spec.router.score_func != "relu":
        return np.ones((case.num_tokens, 1))
    assert routing.scores_TE is not None  # relu scores all
    scores_TK = gather(routing.scores_TE, routing.expert_ids_TK)
    return 1 / np.where(scores_TK > 0, scores_TK, 1).min(axis=-1, keepdims=True, initial=1)


def radius_T1(case: LayerCase, logits_TE: Ball) -> np.ndarray:
    """(T, 1) how far a token's logits may be off as the router holds them: a narrow one rounds them to a neighbour."""
    off_TE = logits_TE.radius
    if case.spec.router.rounds:
        off_TE = off_TE + EPSILON[case.spec.router.router_dtype] * np.abs(logits_TE.centre) * (off_TE > 0)
    return off_TE.max(axis=-1, keepdims=True, initial=0)


def routing_weights(case: LayerCase, logits_TE: Ball) -> tuple[Ball, Ball]:
    """The weights of the slots, and of router-scored shared experts."""
    routing = case.reference.routing
    if routing.weights_are_given:
        return exact(routing.weights_TK, logits_TE.dtype), logits_TE.made(*(np.zeros((case.num_tokens, 0)),) * 2)
    from_logits_T1 = relative_weight_error(case, logits_TE)
    error_TK = weight_error(case.router_case, routing.expert_ids_TK, logits_TE.dtype) + from_logits_T1
    floor_T1 = weight_floor(case.router_case, routing.expert_ids_TK, routing.weights_TK, logits_TE.dtype)
    weights_TK = logits_TE.made(routing.weights_TK, error_TK * np.abs(routing.weights_TK) + floor_T1)
    if routing.shared_weights_TS is None:
        nothing = np.zeros((case.num_tokens, 0))
        return weights_TK, logits_TE.made(nothing, nothing)
    # Their scores are rounded as those of the choices are, of other logits.
    shared_logits_TS = np.abs(logits_TE.centre[:, case.spec.router.num_choices :])
    size_T1 = shared_logits_TS.max(axis=-1, keepdims=True)
    error_T1 = (
        error_TK.max(axis=-1, keepdims=True) + from_logits_T1 + 2 * (ROUNDINGS + size_T1) * EPSILON[logits_TE.dtype]
    )
    return weights_TK, logits_TE.made(routing.shared_weights_TS, error_T1 * np.abs(routing.shared_weights_TS))


def kept(case: LayerCase, values_TK: Ball) -> Ball:
    """What a capacity leaves of the weights, or of their gradients: 0 in a slot that it dropped."""
    trace = case.reference.capacity
    if trace is None:
        return values_TK
    return values_TK.made(np.where(trace.kept_TK, values_TK.centre, 0), np.where(trace.kept_TK, values_TK.radius, 0))


def shared_factors(case: LayerCase, x_TD: Ball, shared_weights_TS: Ball) -> Ball:
    """What each shared expert is multiplied by."""
    gate_D = case.params.shared_token_gate_D
    if gate_D is None:
        factors_TS = case.reference.shared_factors_TS
        return shared_weights_TS if shared_weights_TS.centre.shape[1] else x_TD.made(factors_TS, 0 * factors_TS)
    logit_T = x_TD @ exact(gate_D, x_TD.dtype)[:, None]
    factor_T1 = sigmoid(logit_T.centre)
    relative = logit_T.radius + LIBRARY * x_TD.unit * (1 + np.abs(logit_T.centre))
    return x_TD.made(factor_T1 * case.valid_T[:, None], relative * factor_T1)


@found_once
def gradients(case: LayerCase, dtype: str, expert_dtype: str) -> dict[str, Ball]:
    """The bounds of `moe_ref.layer_backward`: of x_TD, and of each parameter of the layer by name."""
    spec, params, trace = case.spec, case.params, case.reference
    ball = layer(case, dtype, expert_dtype)
    narrow = ball.slot_inputs_TKD.dtype
    d_output_TD = exact(np.where(case.valid_T[:, None], case.d_output_TD, 0), narrow)
    if spec.shared is not None and spec.shared.combine == "average":
        d_output_TD = d_output_TD.times(0.5)
    d_combined_TD, latent_grads = expand_backward(d_output_TD, ball.latent, params)
    d_slots_T1D = d_combined_TD.times(spec.router.output_scale)[:, None]
    on_input = spec.router.weight_on == "input"
    weights_TK1 = ball.weights_TK.to(narrow)[:, :, None]
    used_TK1 = (trace.expert_ids_TK != UNUSED)[:, :, None]
    d_outputs_TKD = (d_slots_T1D if on_input else d_slots_T1D * weights_TK1).times(used_TK1 * 1.0)
    d_rows = d_outputs_TKD.times(identity_slots(trace.expert_ids_TK, spec.router)[:, :, None] * 1.0)
    found = {name: [exact(np.zeros(shape), narrow)] * spec.router.num_experts for name, shape in _routed(params)}
    for expert_id, tokens, slots in rows_of_experts(case):
        d_input_RD, grads = feed_forward_backward(
            d_outputs_TKD[tokens, slots], ball.experts[expert_id], params.expert(expert_id), spec.experts
        )
        d_rows.centre[tokens, slots], d_rows.radius[tokens, slots] = d_input_RD.centre, d_input_RD.radius
        for name, grad in grads.items():
            found[name][expert_id] = grad
    stacked = {_routed_name(name): _stack(balls) for name, balls in found.items()}
    stacked |= balls_constant.backward(
        d_outputs_TKD, ball.slot_inputs_TKD, d_rows, trace.expert_ids_TK, params, spec.router
    )

    if on_input:
        d_weights_TK = (d_rows * ball.expert_input_TD.to(narrow)[:, None]).sum(2)
        d_input_TD = (d_rows * weights_TK1).sum(1)
    else:
        d_weights_TK = (d_slots_T1D * ball.slot_outputs_TKD).sum(2)
        d_input_TD = d_rows.sum(1)
    d_x_TD, compress_grads = compress_backward(d_input_TD, ball.x_TD.to(narrow), params)
    stacked |= latent_grads | compress_grads
    d_weights_TK = kept(case, d_weights_TK)
    d_shared_weights_TS = ball.factors_TS.made(*(np.zeros(ball.factors_TS.centre.shape) for _ in range(2)))
    shared_grads: list[dict[str, Ball]] = []
    for s, each in enumerate(ball.shared):
        assert spec.shared_experts is not None
        d_factor_T = (d_output_TD * each.output_RD).sum(1)
        d_shared_weights_TS.centre[:, s], d_shared_weights_TS.radius[:, s] = d_factor_T.centre, d_factor_T.radius
        d_rows_TD = d_output_TD * ball.factors_TS[:, s, None].to(narrow)
        weights = params.shared_expert(s)
        d_input_TD, grads = feed_forward_backward(d_rows_TD, each, weights, spec.shared_experts)
        d_x_TD = d_x_TD + d_input_TD
        shared_grads.append(grads)
    for name in shared_grads[0] if shared_grads else ():
        stacked["shared_" + _routed_name(name).replace("E", "S", 1)] = _stack([grads[name] for grads in shared_grads])
    if params.shared_token_gate_D is not None:
        factor_T = ball.factors_TS[:, 0]
        rest_T = factor_T.made(1 - factor_T.centre, factor_T.radius)
        d_logit_T = d_shared_weights_TS[:, 0] * factor_T * rest_T
        d_x_TD = d_x_TD + d_logit_T[:, None] * exact(params.shared_token_gate_D, dtype)[None]
        stacked["shared_token_gate_D"] = (d_logit_T[None] @ ball.x_TD)[0]

    logits_grads = router_gradients(case, ball, d_weights_TK.to(dtype), d_shared_weights_TS.to(dtype))
    d_logits_TE = logits_grads.pop("logits_TE")
    stacked |= logits_grads | {"gate_ED": d_logits_TE.T @ ball.x_TD}
    if params.gate_bias_E is not None:
        stacked["gate_bias_E"] = d_logits_TE.sum(0)
    stacked["x_TD"] = (d_x_TD + d_logits_TE @ exact(params.gate_ED, dtype)).to(narrow)
    return stacked


def router_gradients(
    case: LayerCase, ball: LayerBall, d_weights_TK: Ball, d_shared_weights_TS: Ball
) -> dict[str, Ball]:
    """The bounds of the gradients of the logits, and of the learned scale where there is one.

    Of any one logit a weight is no steeper than its own size. So one number for a token bounds the errors of its
    logits: the errors of its weights' gradients, and the roundings of the derivatives.
    """
    routing, spec = case.reference.routing, case.spec.router
    weights, d_weights = ball.weights_TK, d_weights_TK
    if spec.num_scored_shared_experts:
        weights, d_weights = (_beside(a, b) for a, b in ((weights, ball.factors_TS), (d_weights, d_shared_weights_TS)))
    from_logits_T1 = relative_weight_error(case, ball.logits_TE) + LIBRARY * weights.unit
    relative = weights.radius / np.where(weights.centre == 0, 1, np.abs(weights.centre)) + from_logits_T1
    terms = weights.largest * steepness_T1(case) * (d_weights.radius + 2 * relative * d_weights.largest)
    radius_T1 = spec.logit_scale * terms.sum(axis=-1, keepdims=True)
    if routing.weights_are_given:  # constants, of which nothing is a function
        terms, radius_T1 = 0 * terms, 0 * radius_T1
    found = {"logits_TE": weights.made(case.gradients.logits_TE, np.broadcast_to(radius_T1, routing.logits_TE.shape))}
    if spec.learned_scale != "none":
        scale = np.asarray(case.params.learned_scale)
        ids_TK = np.maximum(routing.expert_ids_TK, 0)
        radius = np.zeros(spec.num_choices)
        np.add.at(radius, ids_TK, 4 * terms[:, : spec.top_k])
        radius = radius if scale.ndim else 4 * terms.sum()
        grad = np.asarray(case.gradients.params.learned_scale)
        found["learned_scale"] = weights.made(grad, radius / np.abs(scale) + weights.unit * 8 * np.abs(grad))
    return found


def _beside(left: Ball, right: Ball) -> Ball:
    return left.made(*(np.concatenate([getattr(b, n) for b in (left, right)], -1) for n in ("centre", "radius")))


def _stack(balls: list[Ball]) -> Ball:
    return balls[0].made(np.stack([b.centre for b in balls]), np.stack([b.radius for b in balls]))


def _routed(params: LayerParams):
    """(name of one expert's array, its shape) of each array that the routed experts have."""
    for field in fields(FeedForward):
        value = getattr(params, _routed_name(field.name))
        if value is not None:
            yield field.name, value.shape[1:]


def _routed_name(name: str) -> str:
    """w_up_DF of one expert is w_up_EDF of all."""
    stem, _, suffix = name.rpartition("_")
    return f"{stem}_E{suffix}"


# the choice of experts


@found_once
def stable_T(case: LayerCase, dtype: str) -> np.ndarray:
    """(T,) whether the choice of experts is the same for all choice scores within the error of a dtype.

    A token for which it is not is not judged: with other experts its whole output is another.
    """
    spec, router = case.spec.router, case.router_case
    if spec.selector not in ("top_k", "expert_choice", *VARYING) or case.num_tokens == 0:
        return np.ones(case.num_tokens, dtype=bool)
    trace = router.reference
    assert trace.scores_for_choice_TE is not None  # they are what is ranked
    slope_TE = 1 if spec.select_by == "logit" or spec.score_func == "relu" else trace.scores_TE
    assert slope_TE is not None  # without scores it is logits that are ranked
    from_logits_T1 = 2 * spec.logit_scale * radius_T1(case, gate(case, dtype))
    from_logits_TE = from_logits_T1 * slope_TE
    error_TE = choice_error(router, dtype) + from_logits_TE
    if spec.selector == "expert_choice":
        return taken_clearly_T(router, error_TE) | ~case.valid_T
    if spec.varies:
        return settled_T(router, error_TE) | ~case.valid_T
    chosen_TE = np.zeros(error_TE.shape, dtype=bool)
    np.put_along_axis(chosen_TE, np.maximum(trace.expert_ids_TK, 0), True, axis=-1)
    choice_TE = trace.scores_for_choice_TE
    worst_in_T, best_out_T = edges(chosen_TE, choice_TE - error_TE, choice_TE + error_TE)
    return (worst_in_T > best_out_T) & stable_groups_T(router, error_TE, dtype) | ~case.valid_T


def stable_groups_T(router: RouterCase, error_TE: np.ndarray, dtype: str) -> np.ndarray:
    """(T,) whether the kept groups are the same for all choice scores within the error."""
    spec, T = router.spec, router.num_tokens
    G, L = spec.num_expert_groups, spec.num_limited_groups
    if G is None or L is None or L == G:
        return np.ones(T, dtype=bool)
    choice_TGP = unlimited_choice(router).reshape(T, G, -1)
    scores_TG = np.sort(choice_TGP, axis=-1)[:, :, -spec.group_score_k :].sum(axis=-1)
    slack_T = spec.group_score_k * (error_TE.max(axis=-1) + EPSILON[dtype] * np.abs(choice_TGP).max(axis=(1, 2)))
    in_order_TG = -np.sort(-scores_TG, axis=-1)
    return in_order_TG[:, L - 1] - in_order_TG[:, L] > 2 * slack_T
