"""moe_torch, quantile balancing: the bias with which each expert would have won its share of a step's tokens.

    Routing -> needs -> NeedCounts (micro-batches add up) -> one all-reduce -> bias_of_total    (step: `bias_hook.py`)

What is computed is `moe_ref.quantile`, in float32 at least. Nothing here reads the device.

Legend: T tokens, E experts, K top_k, B bins.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_ref.specs.quantile import QuantileSpec
from moe_ref.specs.router import RouterSpec
from moe_torch.balance import add_counts
from moe_torch.routing import Routing, scale_logits, score


def needs(ranked_TE: Tensor, expert_bias_E: Tensor, router: RouterSpec) -> Tensor:
    """(T, E) what each expert needs to win a token: the (K + 1)-th largest biased score, less its own. [LOD-40]

    Of a router of selector threshold it is the threshold less its own. [LOD-50]

    Args:
        ranked_TE: (T, E) scores, or logits, without bias.
        expert_bias_E: (E,) the bias with which the tokens chose.
        router: what they chose by.
    """
    if router.selector == "threshold":
        return router.threshold - ranked_TE
    cutoff_T1 = (ranked_TE + expert_bias_E).topk(router.top_k + 1, dim=-1).values[:, -1:]
    return cutoff_T1 - ranked_TE


def ranked(logits_TE: Tensor, router: RouterSpec) -> Tensor:
    """(T, E) what expert_bias is added to."""
    scaled_TE = scale_logits(logits_TE, router)[:, : router.num_choices]
    return scaled_TE if router.select_by == "logit" else score(scaled_TE, router)


def total_of(
    needs_TE: Tensor, update: QuantileSpec, expert_bias_E: Tensor, top_k: int, token_mask_T: Tensor | None = None
) -> Tensor:
    """What a micro-batch adds to the total of a step, by which the bias is set: counts of bins, or a sum of quantiles.

    Returns:
        (E, B) int64, the needs of valid tokens in each bin; with over 'batches' (E + 1,), the exact quantile of each
        expert and 1, or zeros without a valid token.

    Raises:
        ValueError: neither bins nor over 'batches': an exact quantile of a pool needs all scores of the step at once.
    """
    T, E = needs_TE.shape
    valid_T = needs_TE.new_ones(T, dtype=torch.bool) if token_mask_T is None else token_mask_T
    if update.bins is not None:
        low, width = _bins(expert_bias_E, update.bins)
        bin_TE = ((needs_TE - low) / width).floor().clamp(0, update.bins - 1).long()
        counts_EB = torch.zeros(E, update.bins, dtype=torch.int64, device=needs_TE.device)
        return counts_EB.scatter_add_(1, bin_TE.T, valid_T.long().expand(E, T))
    if update.over == "pool":
        raise ValueError(
            "bins is None and over is 'pool'; a total of micro-batches is of bins (QuantileSpec.of('kimi_k3')), and an "
            "exact quantile of all scores of a step is quantile_bias"
        )
    number = valid_T.sum()
    has_tokens = (number > 0).to(needs_TE.dtype)[None]
    found_E = torch.where(has_tokens > 0, _smallest(needs_TE, valid_T, number * top_k // E), 0)
    return torch.cat([found_E, has_tokens])


def bias_of_total(total: Tensor, update: QuantileSpec, expert_bias_E: Tensor, top_k: int) -> Tensor:
    """The biases after a step; without a token they stay. [LOD-40 .. LOD-45]

    Args:
        total: the sum of what `total_of` returned, over micro-batches and ranks.
        update: the rule.
        expert_bias_E: (E,) the bias before, with which all of them chose.
        top_k: K: `QuantileSpec.wins`.
    """
    E, before_E = len(expert_bias_E), expert_bias_E.to(torch.promote_types(expert_bias_E.dtype, torch.float32))
    if update.bins is None:
        number, found_E = total[-1], total[:-1] / total[-1].clamp(min=1)
    else:
        low, width = _bins(before_E, update.bins)
        reached_EB, number = total.cumsum(-1), total[0].sum()
        bin_E1 = (reached_EB * E < number * top_k).sum(-1, keepdim=True).clamp(max=update.bins - 1)
        in_bin_E1 = total.gather(-1, bin_E1)
        # In whole numbers up to the division: a float32 count of many tokens is none.
        rest_E1 = number * top_k - (reached_EB.gather(-1, bin_E1) - in_bin_E1) * E
        place_E1 = bin_E1 + rest_E1.to(before_E.dtype) / (in_bin_E1 * E).clamp(min=1)
        found_E = (low + width * place_E1).squeeze(-1)
    return torch.where(number > 0, _mixed(found_E, update, before_E), before_E).to(expert_bias_E.dtype)


def quantile_bias(needs_by_batch: Sequence[Tensor], update: QuantileSpec, expert_bias_E: Tensor, top_k: int) -> Tensor:
    """The biases after a step of which every need is at hand, (N, E) of each batch. [LOD-40 .. LOD-45]"""
    if update.bins is None and update.over == "pool":
        needs_NE = torch.cat(list(needs_by_batch))
        if not len(needs_NE):
            return expert_bias_E
        found_E = needs_NE.sort(0).values[len(needs_NE) * top_k // len(expert_bias_E)]
        return _mixed(found_E, update, expert_bias_E.to(found_E.dtype)).to(expert_bias_E.dtype)
    total = sum(total_of(each_NE, update, expert_bias_E, top_k) for each_NE in needs_by_batch)
    assert isinstance(total, Tensor)
    return bias_of_total(total, update, expert_bias_E, top_k)


def _mixed(found_E: Tensor, update: QuantileSpec, before_E: Tensor) -> Tensor:
    mixed_E = update.keep * before_E + (1 - update.keep) * found_E
    return mixed_E - mixed_E.mean() if update.centred else mixed_E


def _smallest(needs_TE: Tensor, valid_T: Tensor, place: Tensor) -> Tensor:
    """(E,) the smallest need of each expert but for `place` ones, among the valid tokens."""
    if not len(needs_TE):
        return needs_TE.new_zeros(needs_TE.shape[1])
    sorted_TE = needs_TE.masked_fill(~valid_T[:, None], float("inf")).sort(0).values
    return sorted_TE.index_select(0, place[None]).squeeze(0)


def _bins(expert_bias_E: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    low, high = expert_bias_E.min() - 1, expert_bias_E.max() + 1
    return low, (high - low) / bins


class NeedCounts(nn.Module):
    """What the training passes of a layer needed since the last step; `BiasHook` gives a layer one and reads it.

    A pass that activation checkpointing repeats adds once; evaluation, and a pass whose choice is given, add nothing.
    No state dict has it.

    Raises:
        ValueError: the rule does not go with the router, or keeps no total (`total_of`).
    """

    total: Tensor

    def __init__(self, update: QuantileSpec, router: RouterSpec, device: torch.device):
        super().__init__()
        update.check(router)
        self.update, self.router = update, router
        none_TE = torch.zeros(0, router.num_choices, device=device)
        zero_E = torch.zeros(router.num_choices, device=device)
        self.register_buffer("total", total_of(none_TE, update, zero_E, update.wins(router)), persistent=False)

    def _apply(self, fn, recurse=True):
        dtype, was_meta = self.total.dtype, self.total.is_meta
        super()._apply(fn, recurse)
        self.total = self.total.to(dtype)  # a sum of quantiles stays float32 under .to(bfloat16)
        if was_meta and not self.total.is_meta:
            self.total.zero_()  # to_empty leaves what the memory held
        return self

    @torch.no_grad()
    def observe(self, routing: Routing, expert_bias_E: Tensor, token_mask_T: Tensor | None) -> None:
        """Adds a pass to the total."""
        assert routing.logits_TE is not None
        ranked_TE = ranked(routing.logits_TE.detach(), self.router).to(expert_bias_E.dtype)
        needs_TE = needs(ranked_TE, expert_bias_E, self.router)
        wins = self.update.wins(self.router)
        add_counts(self.total, total_of(needs_TE, self.update, expert_bias_E, wins, token_mask_T))
