"""moe_torch, kernels: the experts as custom operators, with fake formulas; `moe_torch/experts.py` registers autograd.

Triton is imported with the first call.

Legend: T tokens, D model dim, F expert hidden dim, E experts, K top_k, R = T * K rows and slots.
"""

import torch
from torch import Tensor

from moe_torch.kernels.device import on_its_device

EightGradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Each a result of its own, not a list of them: autograd has a vmap of gradients that knows no lists."""


@torch.library.custom_op("moe_torch::expert_tiles", mutates_args=())
@on_its_device
def expert_tiles(
    x_TD: Tensor,
    order_R: Tensor | None,
    counts_E: Tensor,
    weights_TK: Tensor | None,
    top_k: int,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor | None,
    b1_EF: Tensor | None,
    b2_ED: Tensor | None,
    b3_EF: Tensor | None,
    name: str,
    alpha: float,
    up_offset: float,
    clamp: float | None,
    clamp_at: str,
    beta: float,
    linear_beta: float | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's sum over k of weight * expert(token), in slot order; with top_k 1, weights may be None.

    Args:
        order_R: flat slot numbers, sorted by expert; those past the counts have no expert and add nothing. None: tokens
            are sorted.
        counts_E: rows of each expert.
        w1_EFD, w2_EDF, w3_EFD: views of any stride but on the last axis, such as halves of one tensor, stacked or
            interleaved.
        keep: whether the two halves are returned for the backward pass.

    Returns:
        out_TD, and gate_RF and up_RF in the order of order_R; rows without an expert hold anything there, and without
        `keep` there are none.
    """
    from moe_torch.kernels import launch

    none = x_TD.new_empty(0, w1_EFD.shape[1])
    if x_TD.numel() == 0:
        return torch.empty_like(x_TD), none, none.clone()
    act = (name, alpha, up_offset, clamp, clamp_at, beta, linear_beta)
    p = _pass(launch, x_TD, order_R, counts_E, top_k, w1_EFD, act)
    weights = [_readable(w) for w in (w1_EFD, w2_EDF, w3_EFD)] + [_dense(b) for b in (b1_EF, b2_ED, b3_EF)]
    out_TD, gate_RF, up_RF = launch.forward(p, _dense(weights_TK), weights, keep)
    return out_TD, none if gate_RF is None else gate_RF, none.clone() if up_RF is None else up_RF


@expert_tiles.register_fake
def _(x_TD, order_R, counts_E, weights_TK, top_k, w1_EFD, w2_EDF, w3_EFD, b1, b2, b3, *act_and_keep):
    F, kept = w1_EFD.shape[1], len(x_TD) * top_k if act_and_keep[-1] else 0
    return (
        torch.empty_like(x_TD, memory_format=torch.contiguous_format),
        x_TD.new_empty(kept, F),
        x_TD.new_empty(0 if w3_EFD is None else kept, F),
    )


@torch.library.custom_op("moe_torch::expert_tiles_backward", mutates_args=())
@on_its_device
def expert_tiles_backward(
    d_out_TD: Tensor,
    gate_RF: Tensor,
    up_RF: Tensor,
    x_TD: Tensor,
    order_R: Tensor | None,
    counts_E: Tensor,
    weights_TK: Tensor | None,
    top_k: int,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor | None,
    b1_EF: Tensor | None,
    b2_ED: Tensor | None,
    b3_EF: Tensor | None,
    name: str,
    alpha: float,
    up_offset: float,
    clamp: float | None,
    clamp_at: str,
    beta: float,
    linear_beta: float | None,
    train: bool,
) -> EightGradients:
    """Gradients of x_TD, weights_TK, w1, w2, w3, b1, b2 and b3; one that does not exist has no rows.

    An expert without rows gets exactly 0.

    Args:
        train: whether the experts' own gradients are asked for.
    """
    from moe_torch.kernels import launch

    trained = (w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF)
    if x_TD.numel() == 0:
        grads = [x_TD.new_zeros(w.shape) if w is not None and train else x_TD.new_empty(0) for w in trained]
        return torch.empty_like(x_TD), _weights_like(x_TD, weights_TK, top_k), *grads  # type: ignore[return-value]  # of six
    p = _pass(
        launch, x_TD, order_R, counts_E, top_k, w1_EFD, (name, alpha, up_offset, clamp, clamp_at, beta, linear_beta)
    )
    weights = [_readable(w) for w in trained[:3]] + [_dense(b) for b in trained[3:]]
    d_x_TD, d_weights_R, found = launch.backward(
        p, d_out_TD.contiguous(), gate_RF, None if w3_EFD is None else up_RF, _dense(weights_TK), weights, train
    )
    d_weights_TK = _weights_like(x_TD, weights_TK, top_k) if d_weights_R is None else d_weights_R.view(-1, top_k)
    return d_x_TD, d_weights_TK, *(x_TD.new_empty(0) if grad is None else grad for grad in found)  # type: ignore[return-value]  # of six


@expert_tiles_backward.register_fake
def _(d_out_TD, gate_RF, up_RF, x_TD, order_R, counts_E, weights_TK, top_k, *weights_and_rest):
    train, trained = weights_and_rest[-1], weights_and_rest[:6]
    grads = (x_TD.new_empty(w.shape) if w is not None and train else x_TD.new_empty(0) for w in trained)
    d_x_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    return d_x_TD, _weights_like(x_TD, weights_TK, top_k), *grads


def _pass(launch, x_TD, order_R, counts_E, top_k, w1_EFD, act):
    return launch.Pass(
        x_TD=x_TD.contiguous(), order_R=order_R, counts_E=counts_E, top_k=top_k, hidden_dim=w1_EFD.shape[1], act=act
    )


def _weights_like(x_TD: Tensor, weights_TK: Tensor | None, top_k: int) -> Tensor:
    return x_TD.new_empty(0 if weights_TK is None else len(weights_TK), top_k, dtype=torch.float32)


def _readable(w: Tensor | None) -> Tensor | None:
    """The kernels take any strides but that of the last axis."""
    return w if w is None or w.stride(-1) == 1 else w.contiguous()


def _dense(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()
