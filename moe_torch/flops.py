"""moe_torch, flops: what torch.utils.flop_counter.FlopCounterMode counts for the operators of the experts.

Legend: D model dim, F expert hidden dim, E experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def _products(counts_E: Tensor, w1_EFD: Tensor) -> int:
    """Floating point operations of one projection of all rows that have an expert."""
    _, F, D = w1_EFD.shape
    return 2 * int(counts_E.sum()) * D * F


@register_flop_formula([torch.ops.moe_torch.expert_loop, torch.ops.moe_torch.expert_tiles], get_raw=True)
def expert_loop_flops(
    x_TD: Tensor,
    order_N: Tensor,
    counts_E: Tensor,
    weights_TK,
    top_k: int,
    w1_EFD: Tensor,
    w2_EDF,
    w3_EFD,
    *_: Any,
    **__: Any,
) -> int:
    """Two projections, or three where there is a gate."""
    return (2 if w3_EFD is None else 3) * _products(counts_E, w1_EFD)


@register_flop_formula(
    [torch.ops.moe_torch.expert_loop_backward, torch.ops.moe_torch.expert_tiles_backward], get_raw=True
)
def expert_loop_backward_flops(
    d_out_TD, gate_NF, up_NF, x_TD, order_N, counts_E: Tensor, weights_TK, top_k: int, w1_EFD: Tensor, w2_EDF, w3_EFD,
    *rest: Any, **_: Any,
) -> int:  # fmt: skip
    """The gradient of the input of each projection, and that of its weight where experts are trained."""
    train = rest[-1]
    return (2 if train else 1) * (2 if w3_EFD is None else 3) * _products(counts_E, w1_EFD)
