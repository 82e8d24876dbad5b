"""moe_torch, selection: the best groups and the best choices of each token, in the canonical order.

Legend: T tokens, E choices, K top_k, G groups, P experts per group, L groups kept, J choices in kept groups.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_ref.specs.ids import UNUSED
from moe_ref.specs.router import RouterSpec
from moe_torch.modes import host_reads_are_free

NEG_INF = -float("inf")


def limit_groups(biased_scores_TE: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """The L best groups of each token, best first; a group's score sums its best k choice scores. [GRP-1]

    Returns:
        group_scores_TG, and group_ids_TL; ties go to the lower group id.
    """
    assert spec.num_expert_groups is not None
    assert spec.num_limited_groups is not None
    grouped_TGP = biased_scores_TE.unflatten(-1, (spec.num_expert_groups, spec.experts_per_group))
    if spec.group_score_k == 1:
        group_scores_TG = grouped_TGP.amax(-1)
    elif spec.group_score_k == 2:
        group_scores_TG = sum_of_best_two(grouped_TGP)
    else:
        group_scores_TG = grouped_TGP.topk(spec.group_score_k, dim=-1).values.sum(-1)
    return group_scores_TG, top_k(group_scores_TG, spec.num_limited_groups)


def sum_of_best_two(grouped_TGP: Tensor) -> Tensor:
    """The sum of the two largest of each group, in two passes of max: a third of the time of topk(2)."""
    best_TG1, where_TG1 = grouped_TGP.max(-1, keepdim=True)
    if host_reads_are_free(grouped_TGP):
        # Taken out and put back: no copy of (T, E).
        second_TG = grouped_TGP.scatter_(-1, where_TG1, NEG_INF).amax(-1)
        grouped_TGP.scatter_(-1, where_TG1, best_TG1)
    else:
        # A compiler makes no array of this.
        columns_P = torch.arange(grouped_TGP.shape[-1], device=grouped_TGP.device)
        second_TG = torch.where(columns_P == where_TG1, NEG_INF, grouped_TGP).amax(-1)
    return best_TG1.squeeze(-1) + second_TG


def kept_experts(group_ids_TL: Tensor, group_scores_TG: Tensor, biased_scores_TE: Tensor) -> Tensor:
    """Whether each expert belongs to a kept group. Expert i belongs to group i // P. [GRP-2]"""
    kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool).scatter(-1, group_ids_TL, True)
    return kept_TG.repeat_interleave(biased_scores_TE.shape[-1] // group_scores_TG.shape[-1], dim=-1)


def select(
    biased_scores_TE: Tensor, group_scores_TG: Tensor | None, group_ids_TL: Tensor | None, spec: RouterSpec
) -> Tensor:
    """Each token selects the top_k choices with the best choice scores, none of them -inf. [SEL-1, SEL-2, SEL-3]"""
    if group_ids_TL is None or group_scores_TG is None:
        return _fillable(top_k(biased_scores_TE, spec.top_k), biased_scores_TE)
    if spec.mask_fill != NEG_INF:
        kept_TE = kept_experts(group_ids_TL, group_scores_TG, biased_scores_TE)
        scores_for_choice_TE = biased_scores_TE.masked_fill(~kept_TE, spec.mask_fill)
        return _fillable(top_k(scores_for_choice_TE, spec.top_k), scores_for_choice_TE)
    if host_reads_are_free(biased_scores_TE):
        return _select_in_groups_on_host(biased_scores_TE, group_ids_TL, spec)
    # In ascending order the lower column is the lower expert id.
    ascending_TL = group_ids_TL.sort(-1).values
    kept_scores_TJ = _scores_in_groups(biased_scores_TE, ascending_TL, spec)
    columns_TK = _fillable(top_k(kept_scores_TJ, spec.top_k), kept_scores_TJ)
    ids_TK = _ids_of_columns(columns_TK.clamp(min=0), ascending_TL, spec)
    return torch.where(columns_TK == UNUSED, UNUSED, ids_TK)


def _select_in_groups_on_host(biased_scores_TE: Tensor, group_ids_TL: Tensor, spec: RouterSpec) -> Tensor:
    """The same in fewer passes: each waits for all cores, and on a busy machine that is what takes long.

    Without a tie the order of groups is of no account, and where the last choice is not -inf every slot is used.
    """
    values_TK, columns_TK, tied_R = _largest(_scores_in_groups(biased_scores_TE, group_ids_TL, spec), spec.top_k)
    ids_TK = _ids_of_columns(columns_TK, group_ids_TL, spec)
    if tied_R is not None:
        ascending_RL = group_ids_TL[tied_R].sort(-1).values
        kept_scores_RJ = _scores_in_groups(biased_scores_TE[tied_R], ascending_RL, spec)
        ids_TK[tied_R] = _ids_of_columns(_top_k_of_keys(kept_scores_RJ, spec.top_k), ascending_RL, spec)
    if values_TK.numel() and not values_TK[:, -1].amin() > NEG_INF:
        return _fillable(ids_TK, biased_scores_TE)
    return ids_TK


def _scores_in_groups(biased_scores_TE: Tensor, group_ids_TL: Tensor, spec: RouterSpec) -> Tensor:
    """The scores of the experts of these groups alone: L * P columns instead of E."""
    (T, E), P = biased_scores_TE.shape, spec.experts_per_group
    first_group_T1 = torch.arange(0, T * (E // P), E // P, device=group_ids_TL.device)[:, None]
    rows_N = (first_group_T1 + group_ids_TL).flatten()
    return biased_scores_TE.reshape(-1, P).index_select(0, rows_N).view(T, group_ids_TL.shape[-1] * P)


def _ids_of_columns(columns_TK: Tensor, group_ids_TL: Tensor, spec: RouterSpec) -> Tensor:
    """The expert ids of columns of `_scores_in_groups`."""
    P, L = spec.experts_per_group, group_ids_TL.shape[-1]
    # What a group's first column is away from its first expert.
    shifts_TL = torch.add(torch.arange(0, -L * P, -P, device=group_ids_TL.device), group_ids_TL, alpha=P)
    return columns_TK + shifts_TL.gather(-1, columns_TK // P)


def select_by_quota(ranked_TE: Tensor, spec: RouterSpec) -> Tensor:
    """The top_k / quota_groups best of each group, in descending order of them all, ties to the lower id. [SEL-18]"""
    assert spec.quota_groups is not None
    G, P = spec.quota_groups, spec.num_experts // spec.quota_groups
    columns_TGQ = top_k(ranked_TE.reshape(-1, P), spec.top_k // G).view(-1, G, spec.top_k // G)
    first_G1 = torch.arange(G, device=ranked_TE.device)[:, None] * P
    # Ascending ids first, so that a stable sort leaves the lower one of equals in front.
    ids_TK = (columns_TGQ + first_G1).flatten(1).sort(-1).values
    order_TK = torch.sort(ranked_TE.gather(-1, ids_TK), dim=-1, descending=True, stable=True).indices
    return _fillable(ids_TK.gather(-1, order_TK), ranked_TE)


def take_tokens(ranked_TE: Tensor, token_mask_T: Tensor | None, spec: RouterSpec) -> Tensor:
    """Each expert takes the C valid tokens that rank best for it, ties to the lower token. [SEL-30 .. SEL-34]

    Returns:
        scores_for_choice_TE: -inf where the expert did not take the token.
    """
    T = ranked_TE.shape[0]
    number: Tensor | int = T if token_mask_T is None else token_mask_T.sum()
    if token_mask_T is None and (spec.take_least or spec.take_factor > spec.num_experts):
        number = torch.full((), T, device=ranked_TE.device)  # what is compared is no number of a graph for any T
    most = spec.takes(number)
    if token_mask_T is not None:
        ranked_TE = ranked_TE.masked_fill(~token_mask_T[:, None], NEG_INF)
    # Signed zeros tie in a sort of torch.
    order_TE = torch.sort(ranked_TE, dim=0, descending=True, stable=True).indices
    places_TE = torch.arange(T, device=ranked_TE.device)[:, None].expand_as(order_TE)
    rank_TE = torch.empty_like(order_TE).scatter_(0, order_TE, places_TE)
    return ranked_TE.masked_fill(rank_TE >= most, NEG_INF)


def select_varying(biased_scores_TE: Tensor, spec: RouterSpec) -> Tensor:
    """Of the top_k best choices those above the threshold, or before which at most top_p is taken, are selected; the
    slots after them are unused. [SEL-21, SEL-22]"""
    ids_TK = top_k(biased_scores_TE, spec.top_k)
    chosen_TK = biased_scores_TE.gather(-1, ids_TK)
    if spec.selector == "threshold":
        return torch.where(chosen_TK > spec.threshold, ids_TK, UNUSED)
    assert spec.top_p is not None
    share_TK = chosen_TK.clamp(min=0)  # scores of a softmax; -inf takes nothing
    before_TK = F.pad(share_TK[:, :-1].cumsum(-1), (1, 0))
    return torch.where((before_TK > spec.top_p) | (chosen_TK == NEG_INF), UNUSED, ids_TK)


def _fillable(expert_ids_TK: Tensor, scores_for_choice_TE: Tensor) -> Tensor:
    # moe_ref refuses a token with fewer than K choices; to refuse here would read the device. The slot stays unused.
    chosen_TK = scores_for_choice_TE.gather(-1, expert_ids_TK)
    if host_reads_are_free(chosen_TK) and chosen_TK.numel() and chosen_TK.amin() > NEG_INF:
        return expert_ids_TK
    return torch.where(chosen_TK == NEG_INF, UNUSED, expert_ids_TK)


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """Ids of the k largest entries of each row, descending; ties go to the lower id. [SEL-5, SEL-6]"""
    if not host_reads_are_free(scores_TE):
        return _top_k_of_keys(scores_TE, k)
    _, ids_TK, tied_R = _largest(scores_TE, k)
    if tied_R is not None:
        ids_TK[tied_R] = _top_k_of_keys(scores_TE[tied_R], k)
    return ids_TK


def _largest(scores_TE: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The k largest entries of each row and their ids, descending; and the rows with equal ones, None where there are
    none, whose ids torch promises no order of (pytorch/pytorch#27542)."""
    # One entry more than asked for shows a tie at the boundary as well.
    values_TK, ids_TK = scores_TE.topk(min(k + 1, scores_TE.shape[-1]), dim=-1)
    tied_T = (values_TK[:, 1:] == values_TK[:, :-1]).any(-1)
    return values_TK[:, :k], ids_TK[:, :k], tied_T.nonzero().squeeze(-1) if tied_T.any() else None


def _top_k_of_keys(scores_TE: Tensor, k: int) -> Tensor:
    """`top_k` with no look at the data: of distinct integer keys, the score above and the id, reversed, below."""
    unsigned_zero_TE = torch.where(scores_TE == 0, 0.0, scores_TE)  # -0.0 ties with 0.0
    if scores_TE.dtype != torch.float32:
        return torch.sort(unsigned_zero_TE, dim=-1, descending=True, stable=True).indices[:, :k]
    bits_TE = unsigned_zero_TE.view(torch.int32)
    # The bits of a negative float sort in reverse, all but the sign flipped they do not.
    ordered_TE = torch.where(bits_TE < 0, bits_TE ^ 0x7FFFFFFF, bits_TE).to(torch.int64)
    last = scores_TE.shape[-1] - 1
    reversed_E = torch.arange(last, -1, -1, device=scores_TE.device)
    keys_TK = ((ordered_TE << 32) | reversed_E).topk(k, dim=-1).values
    return last - (keys_TK & 0xFFFFFFFF)
