"""conformance, layer, faults of null experts."""

from dataclasses import replace

import numpy as np

from conformance.core.fault import replaces
from moe_ref.backward.constants import mix_backward
from moe_ref.constants import fill_constants, mix


@replaces("mix", breaks="NUL-1")
def a_constant_expert_forgets_its_token(input_RD, w_D2, v_D):
    """A constant expert returns its vector, whatever it sees."""
    return np.broadcast_to(v_D, input_RD.shape).astype(input_RD.dtype)


@replaces("mix", breaks="NUL-1")
def the_coefficients_are_swapped(input_RD, w_D2, v_D):
    """The first coefficient is that of the vector."""
    return mix(input_RD, w_D2[:, ::-1], v_D)


@replaces("mix", breaks="NUL-1")
def the_coefficients_have_no_softmax(input_RD, w_D2, v_D):
    """The two logits are the coefficients."""
    a_R2 = input_RD @ w_D2
    return a_R2[:, :1] * input_RD + a_R2[:, 1:] * v_D


@replaces("fill_constants", breaks="NUL-1")
def the_vector_of_the_next_constant_expert(slot_outputs_TKD, slot_inputs_TKD, expert_ids_TK, params, spec):
    """Constant experts are numbered from the last one."""
    if params.constant_ZD is not None:
        params = replace(params, constant_ZD=params.constant_ZD[::-1], constant_w_ZD2=params.constant_w_ZD2[::-1])
    return fill_constants(slot_outputs_TKD, slot_inputs_TKD, expert_ids_TK, params, spec)


@replaces("mix_backward", breaks="NUL-2")
def the_coefficients_are_constants(d_output_RD, input_RD, w_D2, v_D):
    """The matrix of a constant expert gets no gradient."""
    d_input_RD, d_w_D2, d_v_D = mix_backward(d_output_RD, input_RD, w_D2, v_D)
    return d_input_RD, 0 * d_w_D2, d_v_D


@replaces("mix_backward", breaks="NUL-2")
def the_vector_gets_the_whole_gradient(d_output_RD, input_RD, w_D2, v_D):
    """The gradient of the vector is that of the output, without its coefficient."""
    d_input_RD, d_w_D2, _ = mix_backward(d_output_RD, input_RD, w_D2, v_D)
    return d_input_RD, d_w_D2, d_output_RD.sum(axis=0)
