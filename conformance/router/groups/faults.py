"""conformance, router, faults of limit_groups: other groups are kept, or what is dropped is not dropped."""

import numpy as np

from conformance.core.fault import replaces, surrounds
from conformance.router.faulty import misreads
from moe_ref.routing import kept_experts, limit_groups, top_k
from moe_ref.specs.inputs import BY_TOKEN


def group_scores(biased_scores_TE, spec):
    """(T, G): the sum of each group's group_score_k best."""
    return limit_groups(biased_scores_TE, spec)[1]


def keep(group_scores_TG, biased_scores_TE, spec):
    """The result of limit_groups for these group scores."""
    group_ids_TL = top_k(group_scores_TG, spec.num_limited_groups)
    choice_TE = np.where(kept_experts(group_ids_TL, spec), biased_scores_TE, spec.mask_fill)
    return choice_TE, group_scores_TG, group_ids_TL


def in_groups(values_TE, spec):
    """(T, G, P)."""
    return values_TE.reshape(-1, spec.num_expert_groups, spec.experts_per_group)


@misreads(breaks="GRP-1", links=("NVIDIA/Megatron-LM#1441",))
def group_score_always_of_two(spec):
    """A group's score sums its two best, whatever group_score_k says."""
    return spec if spec.num_expert_groups is None else spec.replace(group_score_k=min(2, spec.experts_per_group))


@misreads(breaks="GRP-1")
def group_score_of_the_best(spec):
    """A group's score is its best choice score alone."""
    return spec if spec.num_expert_groups is None else spec.replace(group_score_k=1)


@misreads(breaks="GRP-1")
def group_score_of_all(spec):
    """A group's score sums all of its choice scores."""
    return spec if spec.num_expert_groups is None else spec.replace(group_score_k=spec.experts_per_group)


@misreads(breaks="GRP-1")
def group_score_of_one_more(spec):
    """A group's score sums one choice score too many."""
    if spec.num_expert_groups is None:
        return spec
    return spec.replace(group_score_k=min(spec.group_score_k + 1, spec.experts_per_group))


@replaces("limit_groups", breaks="GRP-1")
def group_score_of_the_worst(biased_scores_TE, spec):
    """A group's score sums its k worst choice scores."""
    worst_TGP = np.sort(in_groups(biased_scores_TE, spec), axis=-1)[:, :, : spec.group_score_k]
    return keep(worst_TGP.sum(axis=-1), biased_scores_TE, spec)


@replaces("limit_groups", breaks="GRP-1")
def group_score_of_the_first(biased_scores_TE, spec):
    """A group's score sums its first k choice scores; they were never sorted."""
    first_TGP = in_groups(biased_scores_TE, spec)[:, :, : spec.group_score_k]
    return keep(first_TGP.sum(axis=-1), biased_scores_TE, spec)


@replaces("limit_groups", breaks="GRP-1")
def group_score_multiplies(biased_scores_TE, spec):
    """A group's score is the product of its k best choice scores."""
    best_TGP = -np.sort(-in_groups(biased_scores_TE, spec), axis=-1)[:, :, : spec.group_score_k]
    return keep(best_TGP.prod(axis=-1), biased_scores_TE, spec)


@replaces("limit_groups", breaks="GRP-1")
def worst_groups_kept(biased_scores_TE, spec):
    """The groups with the worst scores are kept."""
    return keep(-group_scores(biased_scores_TE, spec), biased_scores_TE, spec)


@replaces("limit_groups", breaks="GRP-1")
def best_group_dropped(biased_scores_TE, spec):
    """The kept groups start at the second best."""
    scores_TG = group_scores(biased_scores_TE, spec)
    first = int(spec.num_limited_groups < spec.num_expert_groups)
    group_ids_TL = np.argsort(-scores_TG, axis=-1, kind="stable")[:, first : first + spec.num_limited_groups]
    choice_TE = np.where(kept_experts(group_ids_TL, spec), biased_scores_TE, spec.mask_fill)
    return choice_TE, scores_TG, group_ids_TL


@replaces("limit_groups", breaks="GRP-1")
def group_scores_of_interleaved_experts(biased_scores_TE, spec):
    """Group scores are made of every G-th expert; the groups that are kept are consecutive ones."""
    turned_TE = in_groups(biased_scores_TE, spec).reshape(
        -1, spec.experts_per_group, spec.num_expert_groups).swapaxes(1, 2).reshape(biased_scores_TE.shape)  # fmt: skip
    return keep(group_scores(turned_TE, spec), biased_scores_TE, spec)


@replaces("limit_groups", breaks="GRP-1", also=("run",))
def one_group_too_few(biased_scores_TE, spec):
    """One group too few is kept, where there are two or more."""
    scores_TG = group_scores(biased_scores_TE, spec)
    group_ids_TL = top_k(scores_TG, max(1, spec.num_limited_groups - 1))
    choice_TE = np.where(kept_experts(group_ids_TL, spec), biased_scores_TE, spec.mask_fill)
    # Shown as if the last one were kept as well; only the selection tells.
    return choice_TE, scores_TG, top_k(scores_TG, spec.num_limited_groups)


@replaces("limit_groups", breaks="GRP-2")
def one_group_too_many(biased_scores_TE, spec):
    """One group too many is kept."""
    scores_TG = group_scores(biased_scores_TE, spec)
    more_TL = top_k(scores_TG, min(spec.num_expert_groups, spec.num_limited_groups + 1))
    choice_TE = np.where(kept_experts(more_TL, spec), biased_scores_TE, spec.mask_fill)
    return choice_TE, scores_TG, more_TL[:, : spec.num_limited_groups]


@replaces("limit_groups", breaks="GRP-2")
def groups_ignored(biased_scores_TE, spec):
    """No group is dropped."""
    return biased_scores_TE, *limit_groups(biased_scores_TE, spec)[1:]


@replaces("kept_experts", breaks="GRP-2", links=("EricLBuehler/mistral.rs#1278",))
def group_mask_tiled(group_ids_TL, spec):
    """The mask of groups is tiled over the experts, not repeated for each: expert i is in group i mod G."""
    group_of_E = np.arange(spec.num_experts) % spec.num_expert_groups
    return (group_ids_TL[:, :, None] == group_of_E).any(axis=1)


@replaces("kept_experts", breaks="GRP-2")
def group_mask_shifted(group_ids_TL, spec):
    """The mask of groups starts one expert late."""
    return np.roll(kept_experts(group_ids_TL, spec), 1, axis=-1)


@surrounds(breaks="GRP-2")
def interleaved_groups(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Groups are made of every G-th expert, for the scores and for the mask alike."""
    if spec.num_expert_groups is None:
        return route(logits_TE, spec, expert_bias_E, **inputs)
    to_old_E = np.arange(spec.num_experts).reshape(-1, spec.num_expert_groups).T.reshape(-1)
    bias_E = None if expert_bias_E is None else expert_bias_E[to_old_E]
    trace = route(logits_TE[:, to_old_E], spec, bias_E, **inputs)
    found_TK = trace.expert_ids_TK
    scores_TE = None if trace.scores_TE is None else trace.scores_TE[:, np.argsort(to_old_E)]
    return type(trace)(**vars(trace) | {"expert_ids_TK": np.where(found_TK < 0, found_TK, to_old_E[found_TK]),
                                        "scores_TE": scores_TE})  # fmt: skip


@replaces("limit_groups", breaks="GRP-2")
def dropped_groups_lose_one(biased_scores_TE, spec):
    """The best expert of a dropped group stays."""
    choice_TE, scores_TG, group_ids_TL = limit_groups(biased_scores_TE, spec)
    best_TG1 = in_groups(biased_scores_TE, spec).max(axis=-1, keepdims=True)
    is_best_TE = (in_groups(biased_scores_TE, spec) == best_TG1).reshape(biased_scores_TE.shape)
    return np.where(is_best_TE, biased_scores_TE, choice_TE), scores_TG, group_ids_TL


@surrounds(breaks="GRP-3")
def group_scores_without_bias(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Groups are scored by the scores alone, without the bias."""
    if spec.num_expert_groups is None or expert_bias_E is None:
        return route(logits_TE, spec, expert_bias_E, **inputs)
    return with_group_scores(route, logits_TE, spec, expert_bias_E, 0.0, inputs)


@surrounds(breaks="GRP-3")
def group_scores_with_the_bias_twice(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Groups are scored with the bias added twice."""
    if spec.num_expert_groups is None or expert_bias_E is None:
        return route(logits_TE, spec, expert_bias_E, **inputs)
    return with_group_scores(route, logits_TE, spec, expert_bias_E, 2.0, inputs)


def with_group_scores(route, logits_TE, spec, expert_bias_E, share: float, inputs: dict):
    """The groups of another share of the bias, the experts of the true one: experts elsewhere have logits of -inf."""
    # What a router does that scores its groups from another array than the one it ranks.
    groups_TL = route(logits_TE, spec, expert_bias_E * np.float32(share), **inputs).group_ids_TL
    hidden_TE = np.where(kept_experts(groups_TL, spec), 0, -200).astype(expert_bias_E.dtype)
    rows, of_tokens = [], ("token_mask_T", *BY_TOKEN)
    for t in range(len(logits_TE)):
        own = {name: value[t : t + 1] if name in of_tokens else value for name, value in inputs.items()}
        rows.append(route(logits_TE[t : t + 1], spec, expert_bias_E + hidden_TE[t], **own))
    clean = route(logits_TE, spec, expert_bias_E, **inputs)
    if not rows:
        return clean
    found = {name: np.concatenate([getattr(row, name) for row in rows]) for name in ("expert_ids_TK", "weights_TK")}
    return type(clean)(**vars(clean) | found | {"group_ids_TL": groups_TL})


@replaces("limit_groups", breaks="GRP-4")
def group_ties_to_the_higher(biased_scores_TE, spec):
    """Of groups with equal scores the higher id is kept."""
    scores_TG = group_scores(biased_scores_TE, spec)
    backwards_TL = top_k(scores_TG[:, ::-1], spec.num_limited_groups)
    group_ids_TL = spec.num_expert_groups - 1 - backwards_TL
    choice_TE = np.where(kept_experts(group_ids_TL, spec), biased_scores_TE, spec.mask_fill)
    return choice_TE, scores_TG, group_ids_TL


@replaces("limit_groups", breaks="GRP-5")
def group_0_preferred(biased_scores_TE, spec):
    """Group 0 has a bonus."""
    scores_TG = group_scores(biased_scores_TE, spec).copy()
    scores_TG[:, 0] += 0.2
    return keep(scores_TG, biased_scores_TE, spec)


@replaces("limit_groups", breaks="GRP-5")
def last_group_never_kept(biased_scores_TE, spec):
    """The last group is not looked at, where the others suffice."""
    scores_TG = group_scores(biased_scores_TE, spec).copy()
    if spec.num_limited_groups < spec.num_expert_groups:
        scores_TG[:, -1] = -np.inf
    return keep(scores_TG, biased_scores_TE, spec)


@misreads(breaks="GRP-6")
def mask_fill_0_ignored(spec):
    """Experts of dropped groups are -inf though the model fills with 0."""
    return spec.replace(mask_fill=-np.inf)


@replaces("limit_groups", breaks="GRP-6")
def mask_fill_is_the_smallest(biased_scores_TE, spec):
    """With mask_fill 0 dropped experts rank as the token's smallest choice score."""
    choice_TE, scores_TG, group_ids_TL = limit_groups(biased_scores_TE, spec)
    if spec.mask_fill == 0:
        smallest_T1 = biased_scores_TE.min(axis=-1, keepdims=True)
        choice_TE = np.where(kept_experts(group_ids_TL, spec), biased_scores_TE, smallest_T1)
    return choice_TE, scores_TG, group_ids_TL


@replaces("limit_groups", breaks="GRP-1")
def one_expert_groups_read_the_next(biased_scores_TE, spec):
    """The two best of a group of one expert are read: the second is the expert of the next group."""
    scores_TG = group_scores(biased_scores_TE, spec)
    if spec.experts_per_group == 1:
        scores_TG = scores_TG + np.roll(scores_TG, -1, axis=-1)
    return keep(scores_TG, biased_scores_TE, spec)


@replaces("limit_groups", breaks="GRP-1")
def groups_of_three_hold_two(biased_scores_TE, spec):
    """Experts of a group are read two at a time; the third of three has no part in its score."""
    if spec.experts_per_group != 3:
        return limit_groups(biased_scores_TE, spec)
    read_TGP = in_groups(biased_scores_TE, spec)[:, :, :2]
    return keep(-np.sort(-read_TGP, axis=-1)[:, :, : spec.group_score_k].sum(axis=-1), biased_scores_TE, spec)
