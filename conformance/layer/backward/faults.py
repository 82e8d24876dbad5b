"""conformance, layer, faults of the backward pass: wrong gradients of a right layer.

Legend: T tokens, K top_k, D model dim, F expert hidden dim, E experts, N used slots, R rows of one expert,
S shared experts.
"""

from dataclasses import replace

import numpy as np

from conformance.core.fault import replaces, surrounds
from conformance.layer.faulty import with_router
from conformance.layer.predicates import MATRICES
from moe_ref import UNUSED, moe_layer
from moe_ref.backward.layer import (
    activation_slope,
    combine_backward,
    experts_backward,
    fill_slots_backward,
    gate_backward,
    hide_backward,
    join_backward,
    shared_backward,
    weigh_inputs_backward,
)
from moe_ref.backward.routing import normalise_backward, route_backward, scale_weights_backward


@surrounds(breaks="BWD-1", links=("jax-ml/jax#26915",))
def dispatch_has_no_transpose(run, memory, x_TD, params, spec, d_output_TD, **inputs):
    """Nobody wrote the backward pass of dispatch."""
    raise NotImplementedError("Differentiation rule for 'ragged_all_to_all' not implemented")


@surrounds(breaks="BWD-1")
def the_gate_is_detached(run, memory, *arguments, **inputs):
    """The gate is not among the parameters that get a gradient."""
    return {name: grad for name, grad in run(*arguments, **inputs).items() if name != "gate_ED"}


@surrounds(breaks="BWD-2", links=("jax-ml/jax#26915",))
def tokens_get_no_gradient(run, memory, *arguments, **inputs):
    """The tokens get a gradient of 0."""
    found = run(*arguments, **inputs)
    return found | {"x_TD": 0 * found["x_TD"]}


@replaces("gate_backward", breaks="BWD-2")
def the_path_through_the_gate_is_missing(d_logits_TE, x_TD, gate_ED):
    """The gate sends its tokens no gradient."""
    d_x_TD, d_gate_ED, d_bias_E = gate_backward(d_logits_TE, x_TD, gate_ED)
    return 0 * d_x_TD, d_gate_ED, d_bias_E


@replaces("shared_backward", breaks="BWD-2")
def the_path_through_shared_experts_is_missing(d_shared_TD, x_TD, factors_TS, shared_experts, params, spec):
    """The shared experts send their tokens no gradient."""
    d_x_TD, d_factors_TS, grads = shared_backward(d_shared_TD, x_TD, factors_TS, shared_experts, params, spec)
    return 0 * d_x_TD, d_factors_TS, grads


@replaces("fill_slots_backward", breaks="BWD-2")
def the_path_past_null_experts_is_missing(d_slot_outputs_TKD, order_N, expert_ids_TK, spec):
    """A null expert that returns its input sends it no gradient."""
    d_rows_ND, d_passed_TKD = fill_slots_backward(d_slot_outputs_TKD, order_N, expert_ids_TK, spec)
    return d_rows_ND, 0 * d_passed_TKD


@replaces("experts_backward", breaks="BWD-2", links=("NVIDIA-NeMo/Automodel#1260",))
def tokens_get_the_gradient_of_one_rank(d_rows_ND, trace, tokens_per_expert_E, params, spec):
    """The gradients of the tokens are not summed over the ranks: the experts of the second one are missing."""
    d_inputs_ND, grads = experts_backward(d_rows_ND, trace, tokens_per_expert_E, params, spec)
    own = int(tokens_per_expert_E[: len(tokens_per_expert_E) // 2].sum())
    return np.where(np.arange(len(d_inputs_ND))[:, None] < own, d_inputs_ND, 0), grads


@replaces("experts_backward", breaks="BWD-3")
def gradients_of_gate_and_up_swapped(d_rows_ND, trace, tokens_per_expert_E, params, spec):
    """The gate gets the gradient of the up projection, and the other way round."""
    d_inputs_ND, grads = experts_backward(d_rows_ND, trace, tokens_per_expert_E, params, spec)
    if spec.gated:
        grads |= {"w_gate_EDF": grads["w_up_EDF"], "w_up_EDF": grads["w_gate_EDF"]}
    return d_inputs_ND, grads


@replaces("experts_backward", breaks="BWD-3", links=("NVIDIA/Megatron-LM#1628",))
def the_mean_over_the_rows(d_rows_ND, trace, tokens_per_expert_E, params, spec):
    """The gradients of an expert are means over its rows."""
    d_inputs_ND, grads = experts_backward(d_rows_ND, trace, tokens_per_expert_E, params, spec)
    sizes = np.maximum(tokens_per_expert_E, 1).astype(d_rows_ND.dtype)[:, None, None]
    return d_inputs_ND, grads | {name: grads[name] / sizes for name in MATRICES if grads[name] is not None}


@replaces("activation_slope", breaks="BWD-3")
def the_slope_of_silu_is_its_sigmoid(z_RF, spec):
    """The slope of silu leaves out the slope of its sigmoid."""
    if spec.activation == "silu":
        return 1 / (1 + np.exp(-spec.alpha * z_RF))
    return activation_slope(z_RF, spec)


@replaces("hide_backward", breaks="BWD-3")
def a_clamp_passes_every_gradient(d_hidden_RF, gate_RF, up_RF, spec):
    """What is clamped gets a gradient all the same, as if straight through."""
    return hide_backward(d_hidden_RF, gate_RF, up_RF, spec.replace(clamp=None, clamp_at="before"))


@replaces("combine_backward", breaks="BWD-3")
def output_scale_has_no_gradient(d_routed_TD, slot_outputs_TKD, weights_TK, spec):
    """The backward pass forgets output_scale."""
    return combine_backward(d_routed_TD, slot_outputs_TKD, weights_TK, spec.replace(output_scale=1.0))


@replaces("join_backward", breaks="BWD-3")
def an_average_passes_the_whole_gradient(d_output_TD, spec):
    """The backward pass of the average is that of the sum."""
    if spec.shared is None:
        return join_backward(d_output_TD, spec)
    return d_output_TD, d_output_TD


@surrounds(breaks="BWD-4", links=("AI-Hypercomputer/maxtext#3699",))
def a_bias_gets_the_rows_of_all_experts(run, memory, *arguments, **inputs):
    """The gradient of a bias is summed over all rows of the buffer."""
    found = run(*arguments, **inputs)
    if "b_down_ED" not in found:
        return found
    return found | {"b_down_ED": np.broadcast_to(found["b_down_ED"].sum(axis=0), found["b_down_ED"].shape)}


@surrounds(breaks="BWD-4")
def the_hidden_bias_gets_no_gradient(run, memory, *arguments, **inputs):
    """The bias of the up projection is detached."""
    found = run(*arguments, **inputs)
    return found | {"b_up_EF": 0 * found["b_up_EF"]} if "b_up_EF" in found else found


@replaces("combine_backward", breaks="BWD-5", links=("NVIDIA/Megatron-LM#894", "davidmrau/mixture-of-experts#27"))
def the_weights_are_detached(d_routed_TD, slot_outputs_TKD, weights_TK, spec):
    """The weights are constants of the backward pass."""
    d_slots_TKD, d_weights_TK = combine_backward(d_routed_TD, slot_outputs_TKD, weights_TK, spec)
    return d_slots_TKD, 0 * d_weights_TK


@surrounds(breaks="BWD-5", links=("NVIDIA/Megatron-LM#894", "davidmrau/mixture-of-experts#27"))
def one_weight_is_a_softmax_of_one(run, memory, *arguments, **inputs):
    """With top_k 1 the gate gets no gradient, as if its weight were a softmax of one logit."""
    found, spec = run(*arguments, **inputs), arguments[2]
    return found | {"gate_ED": 0 * found["gate_ED"]} if spec.router.top_k == 1 else found


@replaces("combine_backward", breaks="BWD-5", links=("huggingface/kernels-community#1056",))
def the_first_slot_gets_foreign_gradients(d_routed_TD, slot_outputs_TKD, weights_TK, spec):
    """The gradients of rows that are none are added to the first slot."""
    d_slots_TKD, d_weights_TK = combine_backward(d_routed_TD, slot_outputs_TKD, weights_TK, spec)
    d_weights_TK[:1, :1] += 1
    return d_slots_TKD, d_weights_TK


@replaces("weigh_inputs_backward", breaks="BWD-5")
def weights_on_the_input_are_detached(d_slot_inputs_TKD, x_TD, weights_TK, spec):
    """A weight on the input gets no gradient."""
    d_x_TD, d_weights_TK = weigh_inputs_backward(d_slot_inputs_TKD, x_TD, weights_TK, spec)
    return d_x_TD, 0 * d_weights_TK


@replaces("route_backward", breaks="BWD-5")
def every_expert_gets_the_gradient_of_the_choice(routing, spec, learned_scale, d_weights_TK, *rest, **more):
    """The gradient passes straight through the selection, to the experts that were not chosen too."""
    d_logits_TE, d_scale = route_backward(routing, spec, learned_scale, d_weights_TK, *rest, **more)
    return d_logits_TE + 0.1 * d_weights_TK.sum(axis=1, keepdims=True), d_scale


@replaces("scale_weights_backward", breaks="BWD-5")
def route_scale_has_no_gradient(d_weights_TK, d_shared_TS, normed_TK, normed_shared_TS, ids_TK, learned_scale, spec):
    """The backward pass forgets route_scale."""
    unscaled = spec.replace(route_scale=1.0)
    return scale_weights_backward(
        d_weights_TK, d_shared_TS, normed_TK, normed_shared_TS, ids_TK, learned_scale, unscaled
    )


@surrounds(breaks="BWD-5")
def the_gate_bias_gets_no_gradient(run, memory, *arguments, **inputs):
    """The bias of the gate is detached."""
    found = run(*arguments, **inputs)
    return found | {"gate_bias_E": 0 * found["gate_bias_E"]} if "gate_bias_E" in found else found


@surrounds(breaks="BWD-6", links=("openxla/tokamax#887",))
def an_idle_expert_gets_the_gradient_before_it(run, memory, *arguments, **inputs):
    """An expert without rows gets the gradient of the expert before it."""
    return idle_experts(run, arguments, inputs, lambda grad: np.roll(grad, 1, axis=0))


@surrounds(breaks="BWD-6", links=("openxla/tokamax#1016", "meta-pytorch/MSLK#158"))
def an_idle_expert_gets_nan(run, memory, *arguments, **inputs):
    """The gradient of an expert without rows is not written."""
    return idle_experts(run, arguments, inputs, lambda grad: np.full_like(grad, np.nan))


@surrounds(breaks="BWD-6", links=("meta-pytorch/MSLK#158",))
def an_idle_expert_keeps_its_last_gradient(run, memory, *arguments, **inputs):
    """The gradient of an expert without rows is what the last call wrote."""
    before = dict(memory)

    def last(grad, name):
        return before[name] if name in before and before[name].shape == grad.shape else grad

    found = run(*arguments, **inputs)
    kept = {name: only_idle(found[name], last(found[name], name)) for name in MATRICES if name in found}
    memory.update(found)
    return found | kept


def idle_experts(run, arguments, inputs, change) -> dict:
    """The gradients, those of experts without rows changed."""
    found = run(*arguments, **inputs)
    return found | {name: only_idle(found[name], change(found[name])) for name in MATRICES if name in found}


def only_idle(grad, changed) -> np.ndarray:
    idle_E = (grad == 0).all(axis=(1, 2))
    return np.where(idle_E[:, None, None], changed, grad)


@surrounds(breaks="BWD-7")
def expert_bias_is_trained(run, memory, *arguments, **inputs):
    """The selection bias gets the gradient of the logits."""
    found = run(*arguments, **inputs)
    if "expert_bias_E" not in found:
        return found
    return found | {"expert_bias_E": found["gate_ED"][: len(found["expert_bias_E"])].sum(axis=1)}


@replaces("normalise_backward", breaks="BWD-8")
def the_norm_is_detached(d_normed_TK, d_normed_shared_TS, raw_TK, shared_scores_TS, spec):
    """The divisor of the weights is a constant of the backward pass."""
    if not spec.route_norm or spec.norm_with_shared:
        return normalise_backward(d_normed_TK, d_normed_shared_TS, raw_TK, shared_scores_TS, spec)
    total_T1 = np.maximum(raw_TK.sum(axis=1, keepdims=True), 1e-30)
    return d_normed_TK / total_T1, d_normed_shared_TS


@surrounds(breaks="BWD-9", links=("huggingface/transformers#45621", "pytorch/pytorch#193633"))
def gradients_of_padding_are_multiplied_by_0(
    run, memory, x_TD, params, spec, d_output_TD, *, token_mask_T=None, **more
):
    """Padding rows are multiplied by 0, which NaN survives."""
    found = run(x_TD, params, spec, d_output_TD, token_mask_T=token_mask_T, **more)
    if token_mask_T is None:
        return found
    spilled_D = 0 * x_TD[~token_mask_T].sum(axis=0)
    return found | {"gate_ED": found["gate_ED"] + spilled_D}


@surrounds(breaks="BWD-9", links=("AI-Hypercomputer/maxtext#3699",))
def padding_is_part_of_the_loss(run, memory, x_TD, params, spec, d_output_TD, *, token_mask_T=None, **more):
    """The rows of padding are computed backward as any."""
    return run(np.nan_to_num(x_TD), params, spec, d_output_TD, **more)


@surrounds(breaks="BWD-9", links=("huggingface/transformers#48205",))
def padding_of_the_last_call_is_read(run, memory, x_TD, params, spec, d_output_TD, *, token_mask_T=None, **more):
    """What padding held in the last call is added with weight 0."""
    found = run(x_TD, params, spec, d_output_TD, token_mask_T=token_mask_T, **more)
    spilled = 0 * memory.get("padding", np.float32(0))
    if token_mask_T is not None:
        memory["padding"] = x_TD[~token_mask_T].sum()
    return found | {"w_down_EFD": found["w_down_EFD"] + spilled}


@replaces("shared_backward", breaks="BWD-10")
def shared_experts_get_no_gradient(d_shared_TD, x_TD, factors_TS, shared_experts, params, spec):
    """The down projection of the shared experts is detached."""
    d_x_TD, d_factors_TS, grads = shared_backward(d_shared_TD, x_TD, factors_TS, shared_experts, params, spec)
    detached = {"shared_w_down_SFD": 0 * grads["shared_w_down_SFD"]} if grads else {}
    return d_x_TD, d_factors_TS, grads | detached


@replaces("shared_backward", breaks="BWD-10")
def the_shared_gate_has_no_slope(d_shared_TD, x_TD, factors_TS, shared_experts, params, spec):
    """The gradient of the shared gate leaves out the slope of the sigmoid."""
    d_x_TD, d_factors_TS, grads = shared_backward(d_shared_TD, x_TD, factors_TS, shared_experts, params, spec)
    if "shared_token_gate_D" in grads:
        grads["shared_token_gate_D"] = x_TD.T @ d_factors_TS[:, 0]
    return d_x_TD, d_factors_TS, grads


@replaces("shared_backward", breaks="BWD-10")
def shared_gradients_are_not_weighed(d_shared_TD, x_TD, factors_TS, shared_experts, params, spec):
    """The backward pass of the shared experts forgets their factors."""
    return shared_backward(d_shared_TD, x_TD, np.ones_like(factors_TS), shared_experts, params, spec)


@surrounds(breaks="BWD-11", links=("NVIDIA-NeMo/Automodel#1260",))
def the_gradients_of_the_gate_are_means(run, memory, x_TD, params, spec, d_output_TD, **inputs):
    """The gradient of the gate is the mean over the tokens."""
    found = run(x_TD, params, spec, d_output_TD, **inputs)
    return found | {"gate_ED": found["gate_ED"] / max(1, len(x_TD))}


@surrounds(breaks="BWD-11")
def large_gradients_are_clipped(run, memory, x_TD, params, spec, d_output_TD, **inputs):
    """Numbers of a gradient above 1 are clipped inside the layer."""
    found = run(x_TD, params, spec, d_output_TD, **inputs)
    return found | {"w_up_EDF": np.clip(found["w_up_EDF"], -1, 1)}


@surrounds(breaks="BWD-12")
def zero_tokens_have_no_backward_pass(run, memory, x_TD, params, spec, d_output_TD, **inputs):
    """The backward pass of zero tokens is an error."""
    if not len(x_TD):
        raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
    return run(x_TD, params, spec, d_output_TD, **inputs)


@surrounds(breaks="BWD-12", links=("meta-pytorch/MSLK#158",))
def zero_tokens_leave_gradients_unwritten(run, memory, x_TD, params, spec, d_output_TD, **inputs):
    """Without tokens no kernel is launched, and the gradients keep what their memory held."""
    found = run(x_TD, params, spec, d_output_TD, **inputs)
    return found if len(x_TD) else found | {"w_up_EDF": np.full_like(found["w_up_EDF"], np.nan)}


@surrounds(breaks="BWD-3")
def backward_of_the_weight_on_the_output(run, memory, x_TD, params, spec, d_output_TD, **inputs):
    """The backward pass takes a weight on the input for one on the output."""
    return run(x_TD, params, with_router(spec, weight_on="output"), d_output_TD, **inputs)


@replaces("weigh_inputs_backward", breaks="BWD-2")
def gradients_return_to_the_next_token(d_slot_inputs_TKD, x_TD, weights_TK, spec):
    """The gradients of the rows return to their tokens one place too far."""
    d_x_TD, d_weights_TK = weigh_inputs_backward(d_slot_inputs_TKD, x_TD, weights_TK, spec)
    return np.roll(d_x_TD, 1, axis=0), d_weights_TK


@replaces("route_backward", breaks="BWD-18")
def an_unused_slot_is_the_last_expert(routing, spec, learned_scale, *rest, **more):
    """In the backward pass of experts that take tokens, -1 is an index: the last expert is in the norm once more."""
    if spec.selector == "expert_choice":
        ids_TK = np.where(routing.expert_ids_TK == UNUSED, spec.num_experts - 1, routing.expert_ids_TK)
        routing = replace(routing, expert_ids_TK=ids_TK)
    return route_backward(routing, spec, learned_scale, *rest, **more)


@replaces("route_backward", breaks="BWD-18")
def taking_is_no_constant(routing, spec, learned_scale, d_weights_TK, *rest, **more):
    """The gradient passes straight through the taking of tokens, to the experts that left them too."""
    d_logits_TE, d_scale = route_backward(routing, spec, learned_scale, d_weights_TK, *rest, **more)
    if spec.selector == "expert_choice":
        d_logits_TE = d_logits_TE + 0.1 * d_weights_TK.sum(axis=1, keepdims=True)
    return d_logits_TE, d_scale


@surrounds(breaks="BWD-19")
def a_token_of_nobody_trains_the_gate(run, memory, x_TD, params, spec, d_output_TD, **inputs):
    """Tokens that no expert took pull the gate towards them."""
    found = run(x_TD, params, spec, d_output_TD, **inputs)
    if spec.router.selector != "expert_choice" or not len(x_TD) or inputs.get("token_mask_T") is not None:
        return found
    ids_TK = moe_layer(x_TD, params, spec).expert_ids_TK
    nobody_T = (ids_TK == UNUSED).all(axis=-1)
    pull_D = (x_TD[nobody_T] * (d_output_TD[nobody_T] ** 2).sum(axis=-1, keepdims=True)).sum(axis=0)
    return found | {"gate_ED": found["gate_ED"] - pull_D.astype(found["gate_ED"].dtype)}
