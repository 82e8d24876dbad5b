"""moe_torch, transforms: the experts by plain tensor operations, for derivatives of any order and mode, and for vmap.

`experts.expert_loop` is one operator with one derivative, the fastest way to train. Whatever asks for more comes here:
torch.func (grad, vjp, jvp, vmap, hessian), forward-mode AD, and a gradient of a gradient.

Legend: T tokens, D model dim, F expert hidden dim, E experts, K top_k, N = T * K slots.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_torch.activation import Activation, hide
from moe_torch.dispatcher import weighted_sum


def sum_of_slots(
    x_TD: Tensor,
    order_N: Tensor,
    counts_E: Tensor,
    weights_TK: Tensor | None,
    top_k: int,
    weights: Sequence[Tensor | None],
    act: Activation,
) -> Tensor:
    """Each token's sum over k of weight * expert(token), as `experts.expert_loop` computes it.

    Under vmap over what decides the routing, group sizes are different for each example and cannot be read, and neither
    can they in a compiled graph. Then every expert computes every token, E / K times the work and (T, E, F) numbers,
    and each slot takes its own.

    Args:
        x_TD, order_N, counts_E, weights_TK, top_k: as there.
        weights: w1, w2, w3, b1, b2, b3.
        act: what stands between the projections.
    """
    counts = _read(counts_E)
    if counts is None:
        slots_ND = _slots_of_all_experts(x_TD, order_N, counts_E, top_k, weights, act)
    else:
        slots_ND = _slots_by_groups(x_TD, order_N, counts, top_k, weights, act)
    return slots_ND if weights_TK is None else weighted_sum(slots_ND.unflatten(0, (-1, top_k)), weights_TK)


def _read(counts_E: Tensor) -> list[int] | None:
    if torch.compiler.is_compiling():
        return None
    try:
        return counts_E.tolist()
    except RuntimeError:  # what vmap says of a number that depends on the example
        return None


def _slots_by_groups(x_TD: Tensor, order_N: Tensor, counts: list[int], top_k: int, weights, act: Activation) -> Tensor:
    of_experts: list = [[None] * len(counts) if w is None else w.unbind(0) for w in weights]
    w1, w2, w3, b1, b2, b3 = of_experts
    token_of_row_N = order_N // top_k
    outputs, start = [], 0
    for e, count in enumerate(counts):
        if count:
            rows_RD = x_TD.index_select(0, token_of_row_N[start : start + count])
            gate_RF = _project(rows_RD, w1[e], b1[e])
            up_RF = None if w3[e] is None else _project(rows_RD, w3[e], b3[e])
            outputs.append(_project(hide(gate_RF, up_RF, act), w2[e], b2[e]))
        start += count
    outputs.append(x_TD.new_zeros(len(order_N) - start, x_TD.shape[1]))
    return torch.cat(outputs).index_select(0, order_N.argsort())


def _project(rows: Tensor, w_OI: Tensor, b_O: Tensor | None) -> Tensor:
    projected = rows @ w_OI.t()
    return projected if b_O is None else projected + b_O


def _slots_of_all_experts(
    x_TD: Tensor, order_N: Tensor, counts_E: Tensor, top_k: int, weights, act: Activation
) -> Tensor:
    w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF = weights
    E, N = len(w1_EFD), len(order_N)
    ends_E, rows_N = counts_E.cumsum(0), torch.arange(N, device=order_N.device)
    expert_of_row_N = (rows_N[:, None] >= ends_E).sum(1)
    expert_of_slot_TK = expert_of_row_N.gather(0, order_N.argsort()).unflatten(0, (-1, top_k))

    def project(rows: Tensor, w_EOI: Tensor, b_EO: Tensor | None) -> Tensor:
        projected = torch.einsum("...ei,eoi->...eo", rows, w_EOI)
        return projected if b_EO is None else projected + b_EO

    x_TED = x_TD[:, None].expand(-1, E, -1)
    up_TEF = None if w3_EFD is None else project(x_TED, w3_EFD, b3_EF)
    all_TED = project(hide(project(x_TED, w1_EFD, b1_EF), up_TEF, act), w2_EDF, b2_ED)
    chosen_TK1 = expert_of_slot_TK.clamp(max=E - 1)[:, :, None]
    slots_TKD = all_TED.gather(1, chosen_TK1.expand(-1, -1, x_TD.shape[1]))
    return torch.where(expert_of_slot_TK[:, :, None] < E, slots_TKD, 0).flatten(0, 1)


def differentiable_gradients(ctx, d_out_TD: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of an operator of the experts from plain operations, which have derivatives themselves."""
    _, _, x_TD, order_N, counts_E, weights_TK, *weights = ctx.saved_tensors
    top_k, act = ctx.rest
    if order_N is None:  # one slot for each token, and tokens are sorted
        order_N = torch.arange(x_TD.shape[0], device=x_TD.device)
    # The weights are a function of the tokens, but this is the gradient with one of them alone: by names of their own.
    saved: list = [None if t is None else t.view_as(t) for t in (x_TD, weights_TK, *weights)]
    x_TD, weights_TK, *weights = saved
    out_TD = sum_of_slots(x_TD, order_N, counts_E, weights_TK, top_k, weights, Activation(*act))
    inputs = {n: t for n, t in zip((0, 3, *range(5, 11)), saved, strict=True) if ctx.needs_input_grad[n]}
    places, tensors = inputs.keys(), tuple(inputs.values())
    found = torch.autograd.grad(out_TD, tensors, d_out_TD, create_graph=True, allow_unused=True, materialize_grads=True)
    gradients = dict(zip(places, found, strict=True))
    return tuple(gradients.get(n) for n in range(len(ctx.needs_input_grad)))
