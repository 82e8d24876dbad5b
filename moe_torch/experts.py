"""moe_torch, experts: every expert works on its own rows, on kernels, on grouped matmuls or on a loop.

`kernels/choice.py` decides which, and `kernels.chosen` tells. On CUDA Triton's kernels gather, compute and scatter in
one pass; where there are none a grouped matmul takes the group sizes where they are, so that nothing waits for the
host. A CPU has no grouped kernel: there, tensors of all rows cost more than the moving of rows does, and a loop that
gathers, computes and puts away a few rows at a time is ahead.

Legend: T tokens, D model dim, F expert hidden dim, E experts, K top_k, N = T * K slots, R rows.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_ref.specs.layer import ExpertSpec
from moe_torch.activation import Activation, hide, hide_backward
from moe_torch.dispatcher import LocalTokenDispatcher, Permutation, weighted_sum
from moe_torch.kernels.choice import for_experts, say_once
from moe_torch.kernels.expert_ops import EightGradients, expert_tiles, expert_tiles_backward
from moe_torch.modes import transformed
from moe_torch.parts import OverRanks
from moe_torch.transforms import differentiable_gradients, sum_of_slots

CHUNK_ROWS = 512
"""Rows of one expert that the loop works on at a time: few enough for the cache, enough for the matmul."""
CHUNK_TOKENS = 512
"""Tokens whose slots it adds up at a time."""


class GroupedExperts(OverRanks, nn.Module):
    """Feed-forward networks side by side: w2(act(w1(x)) * w3(x)), or w2(act(w1(x))) where they are not gated.

    Names and shapes of the weights are torchtitan's. Rows are computed in the dtype of the weights, or in that of
    autocast, and returned in their own.

    Args:
        num_experts: E; under expert parallelism those of one rank.
        spec: what one expert computes.
    """

    w3_EFD: Tensor | None
    b1_EF: Tensor | None
    b2_ED: Tensor | None
    b3_EF: Tensor | None

    def __init__(self, num_experts: int, spec: ExpertSpec, *, device=None, dtype=None):
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts is {num_experts}; it is at least 1")
        E, D, F_ = num_experts, spec.dim, spec.hidden_dim
        self.num_experts = num_experts
        self.spec = spec
        self.activation = Activation.of(spec)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.w1_EFD = parameter(E, F_, D)
        self.w2_EDF = parameter(E, D, F_)
        self.register_parameter("w3_EFD", parameter(E, F_, D) if spec.gated else None)
        self.register_parameter("b1_EF", parameter(E, F_) if spec.bias else None)
        self.register_parameter("b2_ED", parameter(E, D) if spec.bias else None)
        self.register_parameter("b3_EF", parameter(E, F_) if spec.bias and spec.gated else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights have variance 1 / fan-in, biases are 0."""
        for name, weight in self.named_parameters():
            own, generator = self.to_fill(weight)
            if name.startswith("w"):
                nn.init.normal_(own, std=weight.shape[-1] ** -0.5, generator=generator)
            else:
                nn.init.zeros_(own)

    def forward(self, x_RD: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
        """The experts' outputs for rows that are sorted by expert; rows past the last group hold anything.

        Args:
            x_RD: rows of expert 0, then of expert 1, and so on.
            tokens_per_expert_E: rows of each expert, on the device of x_RD.
        """
        rows_RD, weights = self._cast(x_RD)
        way = way_of(self, x_RD)
        if way == "grouped_mm" and len(rows_RD):
            return _grouped(rows_RD, tokens_per_expert_E, weights, self.activation).to(x_RD.dtype)
        order_R = None if way == "triton" else torch.arange(rows_RD.shape[0], device=rows_RD.device)
        return _slots(way, rows_RD, order_R, tokens_per_expert_E, None, 1, weights, self.activation).to(x_RD.dtype)

    def sum_of_slots(self, x_TD: Tensor, permutation: Permutation, weights_TK: Tensor | None) -> Tensor:
        """dispatch, forward and combine in one pass, on kernels or the loop; without weights a token has one slot."""
        rows_TD, weights = self._cast(x_TD)
        counts_E = permutation.tokens_per_expert_E[: self.num_experts]
        order_N, K = permutation.order_N, 1 if weights_TK is None else weights_TK.shape[1]
        way = way_of(self, x_TD)
        return _slots(way, rows_TD, order_N, counts_E, weights_TK, K, weights, self.activation).to(x_TD.dtype)

    def compute_dtype(self, device: str) -> torch.dtype:
        """The dtype of the weights, or that of autocast."""
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.w1_EFD.dtype

    def _cast(self, x: Tensor):
        """The rows and the weights (w1, w2, w3, b1, b2, b3) in the dtype to compute in."""
        dtype = self.compute_dtype(x.device.type)
        weights = (self.own(name) for name in ("w1_EFD", "w2_EDF", "w3_EFD", "b1_EF", "b2_ED", "b3_EF"))
        return x.to(dtype), tuple(None if w is None else w.to(dtype) for w in weights)


def way_of(experts: GroupedExperts, x: Tensor) -> str:
    """triton, grouped_mm or loop; a slower one on an accelerator is said once, with its reason."""
    if transformed():  # torch.func and forward-mode AD follow plain operators alone
        return "loop"
    w1_EFD, device = experts.own("w1_EFD"), x.device.type
    assert w1_EFD is not None
    _, F_, D = w1_EFD.shape
    found = for_experts(D, F_, device, experts.compute_dtype(device))
    say_once(found, "experts")
    return found.way


def moves_rows(experts: GroupedExperts, x: Tensor) -> bool:
    """Whether rows go to their experts and back as tensors of all rows; else they are gathered and added up inside."""
    return way_of(experts, x) == "grouped_mm"


def run_experts(
    experts: GroupedExperts,
    dispatcher: LocalTokenDispatcher,
    x_TD: Tensor,
    permutation: Permutation,
    weights_TK: Tensor | None,
    *,
    on_input: bool,
) -> Tensor:
    """dispatch, experts and combine of the slots whose experts are here; without weights a token has one slot."""
    if dispatcher.align is not None and not transformed():
        aligned = dispatcher.align_rows(permutation, dispatcher.align)
        rows_AD = dispatcher.dispatch_aligned(x_TD, aligned, weights_TK if on_input else None)
        outputs_AD = experts(rows_AD, aligned.rows_per_expert_E)
        return dispatcher.combine_aligned(outputs_AD, aligned, None if on_input else weights_TK)
    if not on_input and not moves_rows(experts, x_TD):
        return experts.sum_of_slots(x_TD, permutation, weights_TK)
    rows_ND = dispatcher.dispatch(x_TD, permutation, weights_TK if on_input else None)
    counts_E = permutation.tokens_per_expert_E[: experts.num_experts]
    return dispatcher.combine(experts(rows_ND, counts_E), permutation, None if on_input else weights_TK)


def _grouped(x_RD: Tensor, tokens_per_expert_E: Tensor, weights, act: Activation) -> Tensor:
    """Three grouped matmuls; the group ends stay on the device."""
    w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF = weights
    ends_E = tokens_per_expert_E.cumsum(0, dtype=torch.int32)
    rows_R = torch.arange(x_RD.shape[0], device=x_RD.device, dtype=torch.int32)
    expert_of_row_R = torch.searchsorted(ends_E, rows_R, right=True)
    # Rows past the last group take no bias: a backward pass leaves their gradients unwritten.
    has_expert_R1 = (expert_of_row_R < len(ends_E))[:, None]
    expert_of_row_R = expert_of_row_R.clamp(max=len(ends_E) - 1)

    def project(rows, w_EOI, b_EO):
        out = F.grouped_mm(rows, w_EOI.transpose(-2, -1), offs=ends_E)
        return out if b_EO is None else out + torch.where(has_expert_R1, b_EO[expert_of_row_R], 0)

    gate_RF = project(x_RD, w1_EFD, b1_EF)
    up_RF = None if w3_EFD is None else project(x_RD, w3_EFD, b3_EF)
    return project(hide(gate_RF, up_RF, act), w2_EDF, b2_ED)


def _slots(way: str, x_TD, order_N, counts_E, weights_TK, top_k: int, weights, act: Activation) -> Tensor:
    """Kernels, or the loop, as one operator, which autograd and torch.compile take as it is."""
    if transformed():
        return sum_of_slots(x_TD, order_N, counts_E, weights_TK, top_k, weights, act)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_TD, weights_TK, *weights))
    operator = expert_tiles if way == "triton" else expert_loop
    return operator(x_TD, order_N, counts_E, weights_TK, top_k, *weights, *act, keep)[0]


def _chunks(counts_E: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end row) of each piece of work, in order; an expert without rows has none."""
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        end = start + count
        for first in range(start, end, CHUNK_ROWS):
            yield expert, first, min(first + CHUNK_ROWS, end)
        start = end


def _of_each_expert(weights_EOI: Tensor | None, num_experts: int) -> list:
    """The weights of each expert. Views are made once: to index in the loop costs as much as a small kernel."""
    return [None] * num_experts if weights_EOI is None else list(weights_EOI.unbind(0))


def _project(rows: Tensor, w_OI: Tensor, b_O: Tensor | None, out: Tensor | None = None) -> Tensor:
    """rows @ w.T, plus the bias."""
    projected = torch.mm(rows, w_OI.t(), out=out)
    return projected if b_O is None else projected.add_(b_O)


@torch.library.custom_op("moe_torch::expert_loop", mutates_args=())
def expert_loop(
    x_TD: Tensor,
    order_N: Tensor,
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
        order_N: flat slot numbers, sorted by expert; those past the counts have no expert and add nothing.
        keep: whether the two halves are returned for the backward pass.

    Returns:
        out_TD, and gate_NF and up_NF in the order of order_N; rows without an expert hold anything there, and
        without `keep` there are none.
    """
    act = Activation(name, alpha, up_offset, clamp, clamp_at, beta, linear_beta)
    N, (E, F_, D) = len(order_N), w1_EFD.shape
    token_of_row_N = order_N // top_k
    kept_rows = N if keep else 0
    gate_NF = x_TD.new_empty(kept_rows, F_)
    up_NF = x_TD.new_empty(0 if w3_EFD is None else kept_rows, F_)
    slots_ND = x_TD.new_empty(N, D)
    w1, w2, w3, b1, b2, b3 = (_of_each_expert(w, E) for w in (w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF))
    for e, first, end in _chunks(counts_E):
        rows_RD = x_TD.index_select(0, token_of_row_N[first:end])
        gate_RF = _project(rows_RD, w1[e], b1[e], gate_NF[first:end] if keep else None)
        up_RF = None if w3[e] is None else _project(rows_RD, w3[e], b3[e], up_NF[first:end] if keep else None)
        slots_ND.index_copy_(0, order_N[first:end], _project(hide(gate_RF, up_RF, act), w2[e], b2[e]))
    slots_ND.index_fill_(0, order_N[int(counts_E.sum()) :], 0)
    if weights_TK is None:
        return slots_ND, gate_NF, up_NF
    slots_TKD = slots_ND.view(-1, top_k, D)
    out_TD = torch.empty_like(x_TD)
    for first in range(0, len(x_TD), CHUNK_TOKENS):
        tokens = slice(first, first + CHUNK_TOKENS)
        out_TD[tokens] = weighted_sum(slots_TKD[tokens], weights_TK[tokens])
    return out_TD, gate_NF, up_NF


@expert_loop.register_fake
def _(x_TD, order_N, counts_E, weights_TK, top_k, w1_EFD, w2_EDF, w3_EFD, b1, b2, b3, *act_and_keep):
    kept_rows = order_N.shape[0] if act_and_keep[-1] else 0
    F_ = w1_EFD.shape[1]
    return torch.empty_like(x_TD), x_TD.new_empty(kept_rows, F_), x_TD.new_empty(0 if w3_EFD is None else kept_rows, F_)


@torch.library.custom_op("moe_torch::expert_loop_backward", mutates_args=())
def expert_loop_backward(
    d_out_TD: Tensor,
    gate_NF: Tensor,
    up_NF: Tensor,
    x_TD: Tensor,
    order_N: Tensor,
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

    An expert without rows gets exactly 0. The output of a row is not needed: weight * w2(h) = w2(weight * h).

    Args:
        train: whether the experts' own gradients are asked for.
    """
    act = Activation(name, alpha, up_offset, clamp, clamp_at, beta, linear_beta)
    E = len(w1_EFD)
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    token_of_row_N = order_N // top_k
    weights_N = None if weights_TK is None else weights_TK.flatten()
    d_x_TD = torch.zeros_like(x_TD, dtype=wide)
    d_weights_N = x_TD.new_zeros(0 if weights_TK is None else weights_TK.numel(), dtype=wide)
    trained = (w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF)
    grads = [torch.empty_like(w) if w is not None and train else x_TD.new_empty(0) for w in trained]
    w1, w2, w3, _, b2, _ = (_of_each_expert(w, E) for w in trained)
    d_w1, d_w2, d_w3, d_b1, d_b2, d_b3 = (_of_each_expert(g if len(g) else None, E) for g in grads)
    for grad_E in grads:
        if len(grad_E):
            grad_E[counts_E == 0] = 0

    last_expert = -1
    for e, first, end in _chunks(counts_E):
        keep_sum = int(e == last_expert)
        last_expert = e
        slots_R, tokens_R = order_N[first:end], token_of_row_N[first:end]
        rows_RD, d_rows_RD = x_TD.index_select(0, tokens_R), d_out_TD.index_select(0, tokens_R)
        d_hidden_RF = d_rows_RD @ w2[e]
        gate_RF, up_RF = gate_NF[first:end], None if w3[e] is None else up_NF[first:end]
        if weights_N is None:
            hidden_RF, d_gate_RF, d_up_RF = hide_backward(d_hidden_RF, gate_RF, up_RF, act)
        else:
            weights_R1 = weights_N.index_select(0, slots_R).to(x_TD.dtype)[:, None]
            hidden_RF, d_gate_RF, d_up_RF = hide_backward(d_hidden_RF * weights_R1, gate_RF, up_RF, act)
            d_weights_R = (d_hidden_RF * hidden_RF).sum(-1, dtype=wide)
            if b2[e] is not None:
                d_weights_R += (d_rows_RD * b2[e]).sum(-1, dtype=wide)
            d_weights_N.index_copy_(0, slots_R, d_weights_R)
            d_rows_RD = d_rows_RD * weights_R1
        if train:
            _add_product(d_w2[e], d_rows_RD, hidden_RF, d_b2[e], keep_sum)
            _add_product(d_w1[e], d_gate_RF, rows_RD, d_b1[e], keep_sum)
        d_x_RD = d_gate_RF @ w1[e]
        if d_up_RF is not None:
            d_x_RD.addmm_(d_up_RF, w3[e])
            if train:
                _add_product(d_w3[e], d_up_RF, rows_RD, d_b3[e], keep_sum)
        d_x_TD.index_add_(0, tokens_R, d_x_RD.to(wide))
    return d_x_TD.to(x_TD.dtype), d_weights_N.view(-1, top_k), *grads  # type: ignore[return-value]  # of six


def _add_product(d_w_OI: Tensor, d_out_RO: Tensor, rows_RI: Tensor, d_b_O: Tensor | None, keep_sum: int) -> None:
    """A projection's gradients, on top of those of the rows before (keep_sum 1) or of nothing (0)."""
    d_w_OI.addmm_(d_out_RO.t(), rows_RI, beta=keep_sum)
    if d_b_O is not None:
        d_b_O.copy_(d_out_RO.sum(0) + d_b_O if keep_sum else d_out_RO.sum(0))


@expert_loop_backward.register_fake
def _(d_out_TD, gate_NF, up_NF, x_TD, order_N, counts_E, weights_TK, top_k, *weights_and_rest):
    train, trained = weights_and_rest[-1], weights_and_rest[:6]
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    d_weights_TK = x_TD.new_empty(0 if weights_TK is None else weights_TK.shape[0], top_k, dtype=wide)
    grads = (torch.empty_like(w) if w is not None and train else x_TD.new_empty(0) for w in trained)
    return torch.empty_like(x_TD), d_weights_TK, *grads


# Both operators have the same arguments, and so the same gradient but for what computes it.


def _keep_for_backward(ctx, inputs, output) -> None:
    x_TD, order_R, counts_E, weights_TK, top_k, *rest = inputs
    ctx.rest = (top_k, rest[6:-1])
    ctx.save_for_backward(output[1], output[2], x_TD, order_R, counts_E, weights_TK, *rest[:6])


def _gradients(backward, ctx, d_out_TD: Tensor, _gate, _up):
    gate_RF, up_RF, x_TD, order_R, counts_E, weights_TK, *weights = ctx.saved_tensors
    top_k, act = ctx.rest
    if torch.is_grad_enabled():  # a gradient of this gradient will be asked for
        return differentiable_gradients(ctx, d_out_TD)
    train = any(ctx.needs_input_grad[5:11])
    d_x_TD, d_weights_TK, *d_weights = backward(
        d_out_TD.contiguous(), gate_RF, up_RF, x_TD, order_R, counts_E, weights_TK, top_k, *weights, *act, train
    )
    d_experts = (d if w is not None and train else None for d, w in zip(d_weights, weights, strict=True))
    d_weights_TK = None if weights_TK is None else d_weights_TK.to(weights_TK.dtype)
    return d_x_TD, None, None, d_weights_TK, None, *d_experts, *(None,) * (len(act) + 1)


def _one_by_one(operator, info, in_dims, *arguments):
    """torch.vmap over gradients of the output, as of a Jacobian: one after the other."""
    found = [
        operator(*(a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    stacked = tuple(torch.stack(of_all) for of_all in zip(*found, strict=True))
    return stacked, (0,) * len(stacked)


for operator, its_backward in ((expert_loop, expert_loop_backward), (expert_tiles, expert_tiles_backward)):
    operator.register_autograd(partial(_gradients, its_backward), setup_context=_keep_for_backward)
    its_backward.register_vmap(partial(_one_by_one, its_backward))
