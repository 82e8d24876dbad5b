"""moe_torch, losses: what an uneven load costs, and the z-loss. Start reading at `balance_loss`.

`group` is the process group over which the tokens of a batch are spread; with it a loss is that of the whole batch, the
same on every rank, in one all-reduce. None is this process alone. What is computed is `moe_ref.balance_loss` and
`moe_ref.z_loss`. Nothing here reads the device.

Legend: T tokens, E choices (experts, then null experts), K top_k, U units (the batch, or its sequences).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from moe_ref.specs.balance import RUNNING_SCOPES, BalanceSpec
from moe_ref.specs.router import RouterSpec
from moe_torch.balance import count
from moe_torch.routing import score, softmax
from moe_torch.selection import NEG_INF, top_k

SMALL_LOGIT = -40.0
"""Below it, log(1 + exp(z)) is exp(z) to the last bit of float64."""


@dataclass(frozen=True, kw_only=True)
class BalanceSums:
    """What a balance loss knows of its tokens. Sums of shards, micro-batches, chunks or pooled layers can be added."""

    counts_UE: Tensor
    """Constants of the gradient."""
    scores_UE: Tensor
    tokens_U: Tensor
    """Valid tokens of each unit."""
    slots_per_token: int

    def __add__(self, other: "BalanceSums") -> "BalanceSums":
        return BalanceSums(
            counts_UE=self.counts_UE + other.counts_UE,
            scores_UE=self.scores_UE + other.scores_UE,
            tokens_U=self.tokens_U + other.tokens_U,
            slots_per_token=self.slots_per_token,
        )


def balance_loss(
    logits_TE: Tensor,
    expert_ids_TK: Tensor,
    spec: BalanceSpec,
    *,
    token_mask_T: Tensor | None = None,
    sequence_of_T: Tensor | None = None,
    num_sequences: int = 1,
    earlier: BalanceSums | None = None,
    num_earlier: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The balance loss of one layer. [LOD-6 .. LOD-14]

    Differentiable in the logits. With a group the loss is that of the whole batch, on every rank, and each rank's
    gradient is that of its own logits: gradients of parameters are to be summed over the group. What averages them
    instead (DistributedDataParallel, FSDP without a divide factor of 1) divides the loss by the number of ranks.

    Args:
        logits_TE: (T, E) the logits that the router scores, without any bias.
        expert_ids_TK: (T, K) the choice, before any capacity; with counts 'unbiased' only K is taken from it.
        spec: which loss.
        token_mask_T: (T,) bools; a padding token (False) is in no sum.
        sequence_of_T: (T,) ints in [0, num_sequences), for per 'sequence'; None: one sequence. A sequence that is
            spread over ranks has the same number on each of them.
        num_sequences: the same on every rank.
        earlier: for scopes 'running' and 'running_mean': the sums over all earlier micro-batches.
        num_earlier: for 'running_mean': their number.
        group: the ranks over which tokens are spread.
    """
    sums = balance_sums(
        logits_TE, expert_ids_TK, spec, token_mask_T=token_mask_T, sequence_of_T=sequence_of_T,
        num_sequences=num_sequences,
    )  # fmt: skip
    if spec.scope != "local":
        sums = sum_over(group, sums)
    if spec.scope in RUNNING_SCOPES and earlier is not None:
        # Earlier sums are this rank's own, like these.
        earlier = sum_over(group, earlier)
    loss, has_tokens = loss_of_sums(sums, spec, earlier=earlier, num_earlier=num_earlier)
    return _mean_of_ranks(loss, has_tokens, group) if spec.scope == "local" else loss


def balance_sums(
    logits_TE: Tensor,
    expert_ids_TK: Tensor,
    spec: BalanceSpec,
    *,
    token_mask_T: Tensor | None = None,
    sequence_of_T: Tensor | None = None,
    num_sequences: int = 1,
) -> BalanceSums:
    """Counts, summed scores and valid tokens of each unit of these tokens; arguments as in `balance_loss`."""
    logits_TE = _masked(logits_TE, token_mask_T)
    (T, E), K = logits_TE.shape, expert_ids_TK.shape[1]
    slots = min(K, spec.counted_slots or K)
    scores_TE, counted_TK = balance_scores(logits_TE, spec), _counted_ids(logits_TE, expert_ids_TK, K, spec)[:, :slots]
    valid_T = torch.ones(T, dtype=torch.bool, device=logits_TE.device) if token_mask_T is None else token_mask_T
    if token_mask_T is not None:
        scores_TE = scores_TE.masked_fill(~valid_T[:, None], 0)
        counted_TK = counted_TK.masked_fill(~valid_T[:, None], -1)

    if spec.per == "batch" or sequence_of_T is None:
        counts_UE, scores_UE, tokens_U = (
            count(counted_TK.flatten(), E)[None],
            scores_TE.sum(0)[None],
            valid_T.sum()[None],
        )
    else:
        U, unit_of_T = num_sequences, sequence_of_T.long()
        keys_TK = torch.where((counted_TK >= 0) & (counted_TK < E), counted_TK + unit_of_T[:, None] * E, -1)
        own_UT = (unit_of_T == torch.arange(U, device=unit_of_T.device)[:, None]) & valid_T
        counts_UE, tokens_U = count(keys_TK.flatten(), U * E).view(U, E), own_UT.sum(1)
        # A product, not index_add_, whose order differs from run to run on CUDA (NVIDIA/Megatron-LM#6967).
        scores_UE = own_UT.to(scores_TE.dtype) @ scores_TE
    per_token = spec.target_top_k or slots
    return BalanceSums(counts_UE=counts_UE, scores_UE=scores_UE, tokens_U=tokens_U, slots_per_token=per_token)


def loss_of_sums(
    sums: BalanceSums, spec: BalanceSpec, *, earlier: BalanceSums | None = None, num_earlier: int = 0
) -> tuple[Tensor, Tensor]:
    """coeff * E ** expert_power * sum over experts of f * P, in the mean over the units with a valid token. [LOD-6]

    Sums of several micro-batches or layers (`BalanceSums` can be added) give the loss of all of them as one batch.

    Returns:
        The loss, and whether there is a valid token.
    """
    dtype = sums.scores_UE.dtype
    counts_UE, counted_U = sums.counts_UE.to(dtype), sums.tokens_U
    if spec.scope in RUNNING_SCOPES and earlier is not None:
        counts_UE = counts_UE + earlier.counts_UE.to(dtype)
        if spec.scope == "running":
            counted_U = counted_U + earlier.tokens_U
        else:
            counts_UE = counts_UE / (1 + num_earlier)
    tokens_U1, counted_U1 = (each.clamp(min=1)[:, None] for each in (sums.tokens_U, counted_U))
    fractions_UE = counts_UE / (counted_U1 * (sums.slots_per_token if spec.counts_over == "slots" else 1))
    losses_U = (fractions_UE * (sums.scores_UE / tokens_U1)).sum(-1)
    has_tokens_U = sums.tokens_U > 0
    mean = torch.where(has_tokens_U, losses_U, 0).sum() / has_tokens_U.sum().clamp(min=1)
    return spec.coeff * float(counts_UE.shape[1]) ** spec.expert_power * mean, has_tokens_U.any()


def sum_over(group: dist.ProcessGroup | None, sums: BalanceSums) -> BalanceSums:
    """The sums of all ranks, in one all-reduce."""
    if group is None:
        return sums
    E, dtype = sums.scores_UE.shape[1], sums.scores_UE.dtype
    parts = (sums.scores_UE, sums.counts_UE.to(dtype), sums.tokens_U.to(dtype)[:, None])
    scores_UE, counts_UE, tokens_U1 = _sum_over(group, torch.cat(parts, dim=1)).split([E, E, 1], dim=1)
    return BalanceSums(
        counts_UE=counts_UE.detach(),
        scores_UE=scores_UE,
        tokens_U=tokens_U1.detach()[:, 0],
        slots_per_token=sums.slots_per_token,
    )


def _mean_of_ranks(loss: Tensor, has_tokens: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The mean over the ranks with a valid token; `loss` is 0 on others."""
    if group is None:
        return loss
    total, num_ranks = _sum_over(group, torch.stack([loss, has_tokens.to(loss.dtype)])).unbind()
    return total / num_ranks.detach().clamp(min=1)


class _SumOver(torch.autograd.Function):
    """The sum over the ranks; a rank's gradient is that of its own term."""

    @staticmethod
    def forward(values, group):
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], None


def _sum_over(group: dist.ProcessGroup | None, values: Tensor) -> Tensor:
    return values if group is None else _SumOver.apply(values, group)


def balance_scores(logits_TE: Tensor, spec: BalanceSpec) -> Tensor:
    """Scores are a function of the logits, once: shares of their sum, or raw. [LOD-7]"""
    if not spec.scores_sum_to_1:
        return score(logits_TE, RouterSpec(num_experts=1, top_k=1, score_func=spec.score_func, selector="given"))
    # From logarithms, as a softmax of them: scores of very negative logits keep their ratios where their sum vanishes.
    logs_TE = _log_scores(logits_TE, spec.score_func)
    if spec.score_eps == 0:
        return softmax(logs_TE)
    log_eps_T1 = torch.full_like(logs_TE[:, :1], spec.score_eps).log()
    return softmax(torch.cat([logs_TE, log_eps_T1], dim=-1))[:, :-1]


def _log_scores(logits_TE: Tensor, score_func: str) -> Tensor:
    if score_func == "softmax":
        return logits_TE
    if score_func == "sigmoid":
        return F.logsigmoid(logits_TE)
    # Two branches, each fed its own logits: the log of a softplus that underflows has no slope.
    small_TE = logits_TE < SMALL_LOGIT
    large_TE = F.softplus(logits_TE.masked_fill(small_TE, 0), threshold=40).log()
    return 0.5 * torch.where(small_TE, logits_TE, large_TE)


def _counted_ids(logits_TE: Tensor, expert_ids_TK: Tensor, k: int, spec: BalanceSpec) -> Tensor:
    """The given choice, or the top k of the scores without bias and groups. [LOD-9]"""
    if spec.counts == "routed":
        return expert_ids_TK.long()
    # Scores rise with logits, which do not saturate.
    ids_TK = top_k(logits_TE.detach(), k)
    return ids_TK.masked_fill(logits_TE.detach().gather(-1, ids_TK) == NEG_INF, -1)


def z_loss(
    logits_TE: Tensor,
    *,
    coeff: float = 1.0,
    scope: str = "global",
    token_mask_T: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The z-loss is coeff times the mean over valid tokens of log(sum(exp(logits))) ** 2. [LOD-16]

    Of raw logits, not of scores (huggingface/transformers#48421). Scope 'local': each rank's mean, then over ranks.
    Gradients as in `balance_loss`.
    """
    if scope not in ("global", "local"):
        raise ValueError(f"scope is {scope!r}; it is 'global' or 'local'")
    sums_2 = z_sums(logits_TE, token_mask_T=token_mask_T)
    if scope == "local":
        return _mean_of_ranks(z_loss_of_sums(sums_2, coeff=coeff), sums_2[1] > 0, group)
    return z_loss_of_sums(_sum_over(group, sums_2), coeff=coeff)


def z_sums(logits_TE: Tensor, *, token_mask_T: Tensor | None = None) -> Tensor:
    """(2,) the sum of log(sum(exp(logits))) ** 2 over the valid tokens, and their number.

    Those of micro-batches and chunks can be added, so that the mean is over the tokens of all (`z_loss_of_sums`).
    """
    squares_T = torch.logsumexp(_masked(logits_TE, token_mask_T), dim=-1).square()
    num_tokens = torch.full((), len(logits_TE), dtype=squares_T.dtype, device=squares_T.device)
    if token_mask_T is not None:
        squares_T, num_tokens = squares_T.masked_fill(~token_mask_T, 0), token_mask_T.sum().to(squares_T.dtype)
    return torch.stack([squares_T.sum(), num_tokens])


def z_loss_of_sums(sums_2: Tensor, *, coeff: float = 1.0) -> Tensor:
    """coeff times the mean over the valid tokens that the sums are of; 0 where there is none. [LOD-16, LOD-28]"""
    total, num_tokens = sums_2.unbind()
    return coeff * total / num_tokens.detach().clamp(min=1)


def _masked(logits_TE: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """Logits in the dtype of routing; those of padding tokens are 0, so that no NaN of theirs reaches a gradient."""
    if logits_TE.ndim != 2 or not logits_TE.is_floating_point():
        raise ValueError(f"logits_TE is {logits_TE.dtype}{list(logits_TE.shape)}; it is floats of 2 axes")
    wide_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    return wide_TE if token_mask_T is None else wide_TE.masked_fill(~token_mask_T[:, None], 0)
