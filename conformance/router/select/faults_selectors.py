"""conformance, router, faults of selectors without a choice score: sparsemixer, table, given ids, load tests."""

from dataclasses import replace

import numpy as np

from conformance.core.fault import replaces, surrounds
from moe_ref import UNUSED
from moe_ref.routing import choose, ids_array, limit_quotas, select, sparsemixer
from moe_ref.sinkhorn import sinkhorn
from moe_ref.specs.inputs import READS


def read_by(spec, inputs: dict) -> dict:
    """The inputs without those that the spec's selector does not read: the reference refuses them."""
    known = {name for names in READS.values() for name in names}
    return {name: value for name, value in inputs.items() if name in READS[spec.selector] or name not in known}


@replaces("sparsemixer", breaks="SEL-13")
def sparsemixer_second_from_the_end(scaled_logits_TE, spec):
    """sparsemixer takes its last slot from the worst logits."""
    ids_TK, weights_TK = sparsemixer(scaled_logits_TE, spec)
    ids_TK[:, -1] = np.argmin(scaled_logits_TE, axis=-1)
    return ids_TK, weights_TK


@replaces("sparsemixer", breaks="SEL-13")
def sparsemixer_slots_swapped(scaled_logits_TE, spec):
    """sparsemixer returns its slots, weights included, last one first."""
    ids_TK, weights_TK = sparsemixer(scaled_logits_TE, spec)
    return ids_TK[:, ::-1], weights_TK[:, ::-1]


@replaces("choose", breaks="SEL-14", also=("run",))
def table_by_position(scores_for_choice_TE, num_tokens, spec, inputs):
    """The table is indexed by the token's position."""
    if spec.selector == "table":
        inputs = replace(inputs, token_ids_T=np.arange(num_tokens) % len(inputs.table_VK))
    return choose(scores_for_choice_TE, num_tokens, spec, inputs)


@replaces("choose", breaks="SEL-14")
def table_one_row_off(scores_for_choice_TE, num_tokens, spec, inputs):
    """The table is read one row off."""
    if spec.selector == "table":
        inputs = replace(inputs, table_VK=np.roll(inputs.table_VK, 1, axis=0))
    return choose(scores_for_choice_TE, num_tokens, spec, inputs)


@surrounds(breaks="SEL-14")
def table_ignored(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """The table is ignored; the best scores are selected."""
    if spec.selector == "table":
        spec = spec.replace(selector="top_k")
    return route(logits_TE, spec, expert_bias_E, **read_by(spec, inputs))


@surrounds(breaks="SEL-15")
def given_ids_ignored(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Given ids are ignored; the best scores are selected."""
    if spec.selector == "given":
        spec = spec.replace(selector="top_k")
    return route(logits_TE, spec, expert_bias_E, **read_by(spec, inputs))


@surrounds(breaks="SEL-15", links=("radixark/miles#645",))
def one_unused_slot_ends_the_replay(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Given ids are ignored for the whole batch where one slot is unused."""
    if spec.selector == "given" and (inputs["given_ids_TK"] == UNUSED).any():
        spec = spec.replace(selector="top_k")
    return route(logits_TE, spec, expert_bias_E, **read_by(spec, inputs))


@replaces("choose", breaks="SEL-15", links=("PrimeIntellect-ai/prime-rl#1807",))
def unused_slots_become_experts(scores_for_choice_TE, num_tokens, spec, inputs):
    """An unused slot gets the lowest expert that its token does not have, 0 as a rule."""
    ids_TK = choose(scores_for_choice_TE, num_tokens, spec, inputs)
    if spec.selector == "given":
        for ids_K in ids_TK:
            free = (i for i in range(spec.num_choices) if i not in ids_K)
            for k in np.flatnonzero(ids_K == UNUSED):
                ids_K[k] = next(free)
    return ids_TK


@replaces("ids_array", breaks="SEL-15", also=("run",), links=("radixark/miles#3146",))
def given_ids_of_other_tokens(field, value, shape, bound, *, low=0):
    """Given ids are flattened along the other axis first, so that tokens get the ids of others."""
    ids = ids_array(field, value, shape, bound, low=low)
    if field != "given_ids_TK" or len(ids) < 2:
        return ids
    return np.concatenate([ids[0::2], ids[1::2]])


@replaces("ids_array", breaks="SEL-15", also=("run",), links=("AI-Hypercomputer/maxtext#5266",))
def given_ids_one_token_late(field, value, shape, bound, *, low=0):
    """Given ids stand one token late: an inclusive sum of lengths is taken for an exclusive one."""
    ids = ids_array(field, value, shape, bound, low=low)
    return np.roll(ids, 1, axis=0) if field == "given_ids_TK" else ids


@replaces("choose", breaks="SEL-16")
def round_robin_starts_anew(scores_for_choice_TE, num_tokens, spec, inputs):
    """Round-robin gives every token the first experts."""
    if spec.selector != "round_robin":
        return choose(scores_for_choice_TE, num_tokens, spec, inputs)
    return np.tile(np.arange(spec.top_k), (num_tokens, 1))


@replaces("choose", breaks="SEL-16")
def round_robin_steps_by_token(scores_for_choice_TE, num_tokens, spec, inputs):
    """Round-robin moves on by one expert for a token, not by K."""
    if spec.selector != "round_robin":
        return choose(scores_for_choice_TE, num_tokens, spec, inputs)
    return (np.arange(num_tokens)[:, None] + np.arange(spec.top_k)) % spec.num_experts


@surrounds(breaks="SEL-17")
def random_follows_the_logits(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Random selection draws, but the logits decide."""
    if spec.selector == "random":
        spec = spec.replace(selector="top_k")
    return route(logits_TE, spec, expert_bias_E, **read_by(spec, inputs))


@surrounds(breaks="SEL-17")
def seed_ignored(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """Random selection is the same for every seed."""
    return route(logits_TE, spec, expert_bias_E, **inputs | ({"seed": 0} if "seed" in inputs else {}))


@replaces("limit_quotas", breaks="SEL-18")
def quotas_ignored(ranked_TE, spec):
    """The best of all experts are selected, from whichever groups."""
    return ranked_TE


@replaces("limit_quotas", breaks="SEL-18")
def quota_groups_are_dealt(ranked_TE, spec):
    """Expert i belongs to quota group i % G, not to i // P."""
    G = spec.quota_groups
    dealt_TE = ranked_TE.reshape(len(ranked_TE), -1, G).swapaxes(1, 2).reshape(ranked_TE.shape)
    kept_TE = limit_quotas(dealt_TE, spec)
    return kept_TE.reshape(len(ranked_TE), G, -1).swapaxes(1, 2).reshape(ranked_TE.shape)


@replaces("select", breaks="SEL-18")
def quotas_are_listed_group_by_group(scores_for_choice_TE, spec):
    """The slots are in the order of the groups, and of the scores in each."""
    ids_TK = select(scores_for_choice_TE, spec)
    if spec.selector != "group_top_k":
        return ids_TK
    group_TK = ids_TK // (spec.num_experts // spec.quota_groups)
    return np.take_along_axis(ids_TK, np.argsort(group_TK, axis=-1, kind="stable"), axis=-1)


@replaces("sinkhorn", breaks="SEL-19")
def sinkhorn_is_not_evened(logits_TE, valid_T1):
    """The selector sinkhorn takes the best logits."""
    return np.zeros_like(logits_TE[0]) if len(logits_TE) else np.zeros(logits_TE.shape[1], logits_TE.dtype)


@replaces("sinkhorn", breaks="SEL-19")
def sinkhorn_stops_after_one_round(logits_TE, valid_T1):
    """sinkhorn scales rows and columns once."""
    return sinkhorn(logits_TE, valid_T1, tolerance=np.inf)


@surrounds(breaks="SEL-19", also=("run",))
def sinkhorn_evens_each_half(route, memory, logits_TE, spec, expert_bias_E, **inputs):
    """A batch is evened in two halves: chunks of tokens take themselves for the batch."""
    trace = route(logits_TE, spec, expert_bias_E, **inputs)
    if spec.selector != "sinkhorn" or len(logits_TE) < 2 or inputs.get("token_mask_T") is not None:
        return trace
    half = len(logits_TE) // 2
    parts = [route(part, spec, expert_bias_E, **inputs) for part in (logits_TE[:half], logits_TE[half:])]
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("expert_ids_TK", "weights_TK")}
    return replace(trace, **joined)


@replaces("sinkhorn", breaks="SEL-20")
def sinkhorn_evens_padding_too(logits_TE, valid_T1):
    """Padding tokens are evened like others."""
    return sinkhorn(logits_TE, np.ones_like(valid_T1))
