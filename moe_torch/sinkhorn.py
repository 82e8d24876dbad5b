"""moe_torch, sinkhorn: a choice that is evened over the batch; what is computed is `moe_ref.sinkhorn`.

Legend: T tokens, E choices.
"""

import torch
from torch import Tensor

from moe_torch.modes import transformed

EPS, TOLERANCE, MOST_ROUNDS = 1e-8, 1e-4, 100


def sinkhorn(logits_TE: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """(E,) logarithms of the experts' factors; padding tokens take no part in the batch. [SEL-19, SEL-20]

    A constant of the gradient. Over ranks each one evens its own tokens, as in Megatron. In a compiled graph it is one
    operator: a graph of all rounds takes longer to trace than the rest of a layer.

    Args:
        logits_TE: scaled logits.
        token_mask_T: bools, False for padding.
    """
    fixed_TE = logits_TE.detach()
    if transformed():
        return _rounds(fixed_TE, token_mask_T, ends_early=False)
    if torch.compiler.is_compiling():
        return even_experts(fixed_TE, token_mask_T)
    return _rounds(fixed_TE, token_mask_T, ends_early=True)


@torch.library.custom_op("moe_torch::even_experts", mutates_args=())
def even_experts(logits_TE: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """What `sinkhorn` returns. Nothing of it waits for an accelerator, so that CUDA graphs take it."""
    return _rounds(logits_TE, token_mask_T, ends_early=logits_TE.device.type == "cpu")


@even_experts.register_fake
def _(logits_TE, token_mask_T):
    return logits_TE.new_empty(logits_TE.shape[1])


def _rounds(fixed_TE: Tensor, token_mask_T: Tensor | None, *, ends_early: bool) -> Tensor:
    """Rounds until the factors rest; without `ends_early`, which reads a value, the last ones are of no effect."""
    E = fixed_TE.shape[1]
    largest_T1 = fixed_TE.amax(-1, keepdim=True).clamp(min=torch.finfo(fixed_TE.dtype).min)
    share_TE = torch.exp(fixed_TE - largest_T1)
    tokens: Tensor | int = share_TE.shape[0]
    if token_mask_T is not None:
        share_TE = share_TE.masked_fill(~token_mask_T[:, None], 0)
        tokens = token_mask_T.sum()
    tokens = tokens.clamp(min=1) if isinstance(tokens, Tensor) else max(tokens, 1)
    factors_E = share_TE.new_ones(E)
    going: Tensor | bool = True
    for _ in range(MOST_ROUNDS):
        # Sums, not products of matrices, which autocast and TF32 would round.
        factors_T1 = 1 / (tokens * ((share_TE * factors_E).sum(-1, keepdim=True) + EPS))
        next_E = 1 / (E * ((share_TE * factors_T1).sum(0) + EPS))
        moves = (next_E - factors_E).abs().mean() > TOLERANCE
        factors_E = next_E if ends_early else torch.where(torch.as_tensor(going), next_E, factors_E)
        going = moves if going is True else going & moves
        if ends_early and not moves:
            break
    return factors_E.log()
