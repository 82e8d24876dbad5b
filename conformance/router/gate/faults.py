"""conformance, router, faults of the gate: wrong logits."""

import numpy as np

from conformance.core.fault import replaces, rounded
from moe_ref.routing import gate


@replaces("gate", breaks="GAT-1")
def gate_reshaped_for_transposed(x_TD, gate_ED, gate_bias_E, *, dtype):
    """The gate is reshaped where it has to be transposed."""
    turned_ED = gate_ED.reshape(gate_ED.shape[::-1]).T
    return gate(x_TD, turned_ED, gate_bias_E, dtype=dtype)


@replaces("gate", breaks="GAT-1", links=("NVIDIA-NeMo/Automodel#1852",))
def gate_input_normed_twice(x_TD, gate_ED, gate_bias_E, *, dtype):
    """The gate reads tokens that are normed once more."""
    normed_TD = x_TD / np.sqrt((x_TD**2).mean(axis=-1, keepdims=True))
    return gate(normed_TD, gate_ED, gate_bias_E, dtype=dtype)


@replaces("gate", breaks="GAT-1", links=("vllm-project/vllm#23031",))
def gate_quantised(x_TD, gate_ED, gate_bias_E, *, dtype):
    """The gate's weights are rounded to 8 bits."""
    step = np.abs(gate_ED).max() / 127
    return gate(x_TD, np.round(gate_ED / step) * step, gate_bias_E, dtype=dtype)


@replaces("gate", breaks="GAT-1", links=("vllm-project/vllm#14027", "NVIDIA-NeMo/Automodel#3650"))
def gate_in_bfloat16(x_TD, gate_ED, gate_bias_E, *, dtype):
    """The logits are rounded to bfloat16."""
    return rounded(gate(x_TD, gate_ED, gate_bias_E, dtype=dtype), 8)


@replaces("gate", breaks="GAT-1")
def gate_without_its_last_input(x_TD, gate_ED, gate_bias_E, *, dtype):
    """The last input dimension is left out of the sum."""
    return gate(x_TD[:, :-1], gate_ED[:, :-1], gate_bias_E, dtype=dtype)


@replaces("gate", breaks="GAT-2", links=("vllm-project/vllm#29237",))
def gate_bias_missing(x_TD, gate_ED, gate_bias_E, *, dtype):
    """The gate bias is left out."""
    return gate(x_TD, gate_ED, None, dtype=dtype)


@replaces("gate", breaks="GAT-2")
def gate_bias_twice(x_TD, gate_ED, gate_bias_E, *, dtype):
    """The gate bias is added twice."""
    return gate(x_TD, gate_ED, None if gate_bias_E is None else 2 * gate_bias_E, dtype=dtype)


@replaces("gate", breaks="GAT-2", links=("NVIDIA/Megatron-LM#1971",))
def gate_bias_kept_for_the_choice(x_TD, gate_ED, gate_bias_E, *, dtype):
    """The gate bias is taken for a selection bias: it is centred and added later, not part of the logits."""
    return gate(x_TD, gate_ED, None if gate_bias_E is None else gate_bias_E - gate_bias_E.mean(), dtype=dtype)
