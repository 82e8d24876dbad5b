"""moe_ref, constant experts: null experts that mix what they see with a vector of their own (MoE++, arXiv:2410.07348).

Legend: T tokens, K top_k, D model dim, Z constant experts.
"""

import numpy as np

from moe_ref.routing import softmax
from moe_ref.specs.params import LayerParams
from moe_ref.specs.router import RouterSpec


def fill_constants(
    slot_outputs_TKD: np.ndarray,
    slot_inputs_TKD: np.ndarray,
    expert_ids_TK: np.ndarray,
    params: LayerParams,
    spec: RouterSpec,
) -> np.ndarray:
    """A slot's output is a1 * input + a2 * v of its constant expert; other slots stay as they are. [NUL-1]"""
    if params.constant_ZD is None or params.constant_w_ZD2 is None:
        return slot_outputs_TKD
    filled_TKD = slot_outputs_TKD.copy()
    for z, (w_D2, v_D) in enumerate(zip(params.constant_w_ZD2, params.constant_ZD, strict=True)):
        own_TK = expert_ids_TK == spec.num_experts + z
        filled_TKD[own_TK] = mix(slot_inputs_TKD[own_TK], w_D2, v_D)
    return filled_TKD


def mix(input_RD: np.ndarray, w_D2: np.ndarray, v_D: np.ndarray) -> np.ndarray:
    """a1 * input + a2 * v, with (a1, a2) = softmax(input @ w). [NUL-1]"""
    a_R2 = softmax(input_RD @ w_D2)
    return a_R2[:, :1] * input_RD + a_R2[:, 1:] * v_D
