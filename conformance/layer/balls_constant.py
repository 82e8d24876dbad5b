"""conformance, layer: balls of constant experts.

Legend: T tokens, K top_k, D model dim, Z constant experts, R rows of one of them.
"""

from collections.abc import Iterator

import numpy as np

from conformance.layer.balls import LIBRARY, Ball, exact
from moe_ref import LayerParams, RouterSpec
from moe_ref.routing import softmax


def fill(slot_outputs: Ball, slot_inputs: Ball, ids_TK: np.ndarray, params: LayerParams, spec: RouterSpec) -> None:
    """The bounds of `moe_ref.constants.fill_constants`, written into the outputs."""
    for _, own_TK, w_D2, v_D in _each(ids_TK, params, spec):
        input_RD = slot_inputs[own_TK]
        a_R2 = _coefficients(input_RD, w_D2)
        mixed_RD = a_R2[:, :1] * input_RD + a_R2[:, 1:] * exact(v_D, input_RD.dtype)[None]
        slot_outputs.centre[own_TK], slot_outputs.radius[own_TK] = mixed_RD.centre, mixed_RD.radius


def backward(
    d_outputs: Ball, slot_inputs: Ball, d_inputs: Ball, ids_TK: np.ndarray, params: LayerParams, spec: RouterSpec
) -> dict[str, Ball]:
    """The bounds of `moe_ref.backward.constants.constants_backward`; gradients of inputs are written into theirs."""
    if params.constant_ZD is None or params.constant_w_ZD2 is None:
        return {}
    shapes = {"constant_ZD": params.constant_ZD.shape, "constant_w_ZD2": params.constant_w_ZD2.shape}
    found = {name: d_outputs.made(np.zeros(shape), np.zeros(shape)) for name, shape in shapes.items()}
    for z, own_TK, w_D2, v_D in _each(ids_TK, params, spec):
        d_RD, input_RD = d_outputs[own_TK], slot_inputs[own_TK]
        a_R2 = _coefficients(input_RD, w_D2)
        d_a_R2 = _beside((d_RD * input_RD).sum(1), (d_RD * exact(v_D, d_RD.dtype)[None]).sum(1))
        d_logits_R2 = a_R2 * (d_a_R2 + (d_a_R2 * a_R2).sum(1)[:, None].times(-1))
        d_input_RD = a_R2[:, :1] * d_RD + d_logits_R2 @ exact(w_D2, d_RD.dtype).T
        d_inputs.centre[own_TK], d_inputs.radius[own_TK] = d_input_RD.centre, d_input_RD.radius
        for name, grad in (
            ("constant_w_ZD2", input_RD.T @ d_logits_R2),
            ("constant_ZD", (a_R2[:, 1:] * d_RD).sum(0)),
        ):
            found[name].centre[z], found[name].radius[z] = grad.centre, grad.radius
    return found


def _each(ids_TK: np.ndarray, params: LayerParams, spec: RouterSpec) -> Iterator[tuple]:
    """(number, its slots, w, v) of each constant expert."""
    for z in range(spec.num_constant_experts):
        assert params.constant_w_ZD2 is not None
        assert params.constant_ZD is not None
        yield z, ids_TK == spec.num_experts + z, params.constant_w_ZD2[z], params.constant_ZD[z]


def _coefficients(input_RD: Ball, w_D2: np.ndarray) -> Ball:
    """a1 and a2: of any one logit a softmax is no steeper than its own size."""
    logits_R2 = input_RD @ exact(w_D2, input_RD.dtype)
    a_R2 = softmax(logits_R2.centre)
    size_R1 = logits_R2.largest.max(axis=-1, keepdims=True, initial=0)
    relative_R1 = logits_R2.radius.sum(axis=-1, keepdims=True) + LIBRARY * input_RD.unit * (1 + size_R1)
    return input_RD.made(a_R2, relative_R1 * a_R2)


def _beside(first_R: Ball, second_R: Ball) -> Ball:
    return first_R.made(*(np.stack([getattr(b, n) for b in (first_R, second_R)], -1) for n in ("centre", "radius")))
