"""moe_ref, gradients: constant experts backwards.

Legend: T tokens, K top_k, D model dim, Z constant experts, R rows of one of them.
"""

import numpy as np

from moe_ref.routing import softmax
from moe_ref.specs.params import LayerParams
from moe_ref.specs.router import RouterSpec


def constants_backward(
    d_slot_outputs_TKD: np.ndarray,
    slot_inputs_TKD: np.ndarray,
    expert_ids_TK: np.ndarray,
    params: LayerParams,
    spec: RouterSpec,
) -> tuple[np.ndarray, dict]:
    """The gradients of the slots that constant experts see, 0 elsewhere, and of their parameters by name. [NUL-2]"""
    d_inputs_TKD = np.zeros_like(slot_inputs_TKD)
    if params.constant_ZD is None or params.constant_w_ZD2 is None:
        return d_inputs_TKD, {}
    grads = {"constant_ZD": np.zeros_like(params.constant_ZD), "constant_w_ZD2": np.zeros_like(params.constant_w_ZD2)}
    for z, (w_D2, v_D) in enumerate(zip(params.constant_w_ZD2, params.constant_ZD, strict=True)):
        own_TK = expert_ids_TK == spec.num_experts + z
        d_inputs_TKD[own_TK], grads["constant_w_ZD2"][z], grads["constant_ZD"][z] = mix_backward(
            d_slot_outputs_TKD[own_TK], slot_inputs_TKD[own_TK], w_D2, v_D
        )
    return d_inputs_TKD, grads


def mix_backward(
    d_output_RD: np.ndarray, input_RD: np.ndarray, w_D2: np.ndarray, v_D: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gradients of the input, of w and of v."""
    a_R2 = softmax(input_RD @ w_D2)
    d_a_R2 = np.stack([(d_output_RD * input_RD).sum(axis=-1), d_output_RD @ v_D], axis=-1)
    d_logits_R2 = a_R2 * (d_a_R2 - (d_a_R2 * a_R2).sum(axis=-1, keepdims=True))
    d_input_RD = a_R2[:, :1] * d_output_RD + d_logits_R2 @ w_D2.T
    return d_input_RD, input_RD.T @ d_logits_R2, (a_R2[:, 1:] * d_output_RD).sum(axis=0)
