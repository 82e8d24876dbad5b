"""conformance, layer, faults of the backward pass of what a layer is given besides tokens, and of many rows.

Legend: T tokens, K top_k, E experts.
"""

from dataclasses import replace

import numpy as np

from conformance.core.fault import replaces, surrounds
from moe_ref.backward.balance import capacity_backward
from moe_ref.backward.layer import experts_backward
from moe_ref.backward.routing import route_backward


@replaces("capacity_backward", breaks="BWD-13")
def dropped_slots_send_the_gradient_of_the_token(trace, capacity, d_weights_TK):
    """A dropped slot sends its weight the largest gradient of its token."""
    found_TK = capacity_backward(trace, capacity, d_weights_TK)
    return np.where(trace.dropped_TK, d_weights_TK.max(axis=-1, keepdims=True), found_TK)


@surrounds(breaks="BWD-13")
def the_backward_pass_has_no_capacity(run, memory, x_TD, params, spec, d_output_TD, **inputs):
    """The backward pass is that of all slots."""
    rest = {n: v for n, v in inputs.items() if n not in ("capacity", "sequence_lengths", "tokens_per_shard")}
    return run(x_TD, params, spec, d_output_TD, **rest)


@surrounds(breaks="BWD-14")
def a_capacity_changes_the_last_bit(run, memory, x_TD, params, spec, d_output_TD, *, capacity=None, **inputs):
    """With a capacity gradients are summed in another order."""
    found = run(x_TD, params, spec, d_output_TD, capacity=capacity, **inputs)
    return found if capacity is None else found | {"x_TD": np.nextafter(found["x_TD"], np.float32(np.inf))}


@replaces("route_backward", breaks="BWD-15")
def given_weights_train_the_gate(routing, spec, *rest, **more):
    """The gradient of given weights goes to the logits as if they were their own."""
    return route_backward(replace(routing, weights_are_given=False), spec, *rest, **more)


@surrounds(breaks="BWD-16")
def the_gradient_is_scaled_in_place(run, memory, x_TD, params, spec, d_output_TD, **inputs):
    """The gradient that comes in is used as scratch memory."""
    found = run(x_TD, params, spec, d_output_TD, **inputs)
    d_output_TD[:] = 0
    return found


@surrounds(breaks="BWD-16")
def gradients_add_up_in_a_parameter(run, memory, x_TD, params, spec, d_output_TD, **inputs):
    """The gradient of the down projections is subtracted from them, as if it were a step."""
    found = run(x_TD, params, spec, d_output_TD, **inputs)
    params.w_down_EFD[:] -= found["w_down_EFD"]
    return found


@replaces("experts_backward", breaks="BWD-3")
def gradients_of_the_first_256_rows(d_rows_ND, trace, tokens_per_expert_E, params, spec):
    """The gradients of an expert sum its first 256 rows, one block."""
    begins_E = np.cumsum(tokens_per_expert_E) - tokens_per_expert_E
    place_N = np.arange(len(d_rows_ND)) - np.repeat(begins_E, tokens_per_expert_E)
    d_inputs_ND, _ = experts_backward(d_rows_ND, trace, tokens_per_expert_E, params, spec)
    _, grads = experts_backward(
        np.where(place_N[:, None] < 256, d_rows_ND, 0), trace, tokens_per_expert_E, params, spec
    )
    return d_inputs_ND, grads


@surrounds(breaks="BWD-17", links=("AI-Hypercomputer/maxtext#3699",))
def padding_rows_train_the_down_bias(run, memory, x_TD, params, spec, d_output_TD, *, align=None, **inputs):
    """The gradient of a padding row is that of the first token, and the down bias of its expert gets it."""
    found = run(x_TD, params, spec, d_output_TD, align=align, **inputs)
    if align is None or "b_down_ED" not in found or not len(d_output_TD):
        return found
    return found | {"b_down_ED": found["b_down_ED"] + (align.multiple - 1) * d_output_TD[0]}


@surrounds(breaks="BWD-17")
def aligned_gradients_stay_in_the_padded_order(run, memory, x_TD, params, spec, d_output_TD, *, align=None, **inputs):
    """With padded rows the gradients of the tokens are one token off."""
    found = run(x_TD, params, spec, d_output_TD, align=align, **inputs)
    return found if align is None else found | {"x_TD": np.roll(found["x_TD"], 1, axis=0)}
