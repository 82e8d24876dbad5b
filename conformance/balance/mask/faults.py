"""conformance, balance, faults of mask: padding that is counted, averaged, or given a place."""

import numpy as np

from conformance.core.fault import surrounds
from moe_ref import UNUSED, balance, tokens_per_expert


@surrounds(breaks="MSK-1", links=("vllm-project/vllm#38128",))
def padding_is_in_the_counts(run, memory, ids_TK, E, **inputs):
    """Statistics are taken over all rows."""
    return run(ids_TK, E)


@surrounds(breaks="MSK-1", links=("sgl-project/sglang#40672",))
def only_a_tail_is_taken_for_padding(run, memory, ids_TK, E, *, token_mask_T=None):
    """As many first rows are counted as there are valid tokens."""
    return tokens_per_expert(ids_TK if token_mask_T is None else ids_TK[: token_mask_T.sum()], E)


@surrounds(breaks="MSK-2", links=("huggingface/transformers#28517", "NVIDIA/Megatron-LM#2121"))
def padding_is_in_the_loss(run, memory, *arguments, token_mask_T=None, **inputs):
    """The mask is not passed on."""
    return run(*arguments, **inputs)


@surrounds(breaks="MSK-2", links=("ruimalheiro/gradient-garden#113",))
def the_mean_is_over_all_tokens(run, memory, *arguments, token_mask_T=None, **inputs):
    """Padding is in no sum, but in the number of tokens."""
    found = run(*arguments, token_mask_T=token_mask_T, **inputs)
    share = 1 if token_mask_T is None else token_mask_T.mean()
    return {name: value * share for name, value in found.items()}


@surrounds(breaks="MSK-3")
def padding_has_a_gradient(run, memory, *arguments, token_mask_T=None, **inputs):
    """The gradient is not masked; the loss is."""
    found = run(*arguments, token_mask_T=token_mask_T, **inputs)
    return found if token_mask_T is None else found | {"d_logits_TE": run(*arguments, **inputs)["d_logits_TE"]}


@surrounds(breaks="MSK-4")
def an_empty_sequence_is_in_the_mean(run, memory, logits_TE, ids_TK, spec, router, **inputs):
    """The mean is over as many sequences or shards as there are places for."""
    found = run(logits_TE, ids_TK, spec, router, **inputs)
    tokens_U = balance(logits_TE, ids_TK, spec, **inputs).tokens_U
    return {name: value * (tokens_U > 0).mean() for name, value in found.items()} if len(tokens_U) else found


@surrounds(breaks="MSK-5", links=("NVIDIA/Megatron-LM#2121",))
def padding_is_in_the_z_loss(run, memory, logits_TE, coeff, **inputs):
    """The mask is not passed on."""
    return run(logits_TE, coeff)


@surrounds(breaks="MSK-6", links=("huggingface/transformers#45621",))
def padding_is_multiplied_away(run, memory, logits_TE, ids_TK, balance, router, *, token_mask_T=None, **inputs):
    """Rows of padding are multiplied by 0, which keeps a NaN."""
    found = run(logits_TE, ids_TK, balance, router, token_mask_T=token_mask_T, **inputs)
    return found if token_mask_T is None else found | {"loss": found["loss"] + (0 * logits_TE).sum()}


@surrounds(breaks="MSK-7", links=("vllm-project/vllm#50759",))
def padding_takes_places(run, memory, ids_TK, weights_TK, capacity, E, *, token_mask_T=None, **inputs):
    """Padding is removed after the drop."""
    found = run(ids_TK, weights_TK, capacity, E, **inputs)
    if token_mask_T is None:
        return found
    kept_TK = np.where(token_mask_T[:, None], found["expert_ids_TK"], UNUSED)
    return found | {"expert_ids_TK": kept_TK, "weights_TK": np.where(token_mask_T[:, None], found["weights_TK"], 0)}


@surrounds(breaks="MSK-8", links=("vllm-project/vllm#57471",))
def no_token_divides_by_0(run, memory, *arguments, token_mask_T=None, **inputs):
    """The mean over no token is 0 / 0."""
    found = run(*arguments, token_mask_T=token_mask_T, **inputs)
    return found | {"loss": np.nan} if token_mask_T is not None and not token_mask_T.any() else found


@surrounds(breaks="MSK-9", links=("PaddlePaddle/PaddleFleet#1369", "NVIDIA/Megatron-LM#3768"))
def ranks_weigh_as_many_tokens_as_they_have_rows(run, memory, logits_TE, coeff, *, token_mask_T=None,
                                                 tokens_per_shard=None):  # fmt: skip
    """The mean of each rank is over its valid tokens, and weighs as much as it has tokens, padding included."""
    if tokens_per_shard is None or token_mask_T is None:
        return run(logits_TE, coeff, token_mask_T=token_mask_T)
    found = {"loss": 0.0, "d_logits_TE": np.zeros_like(logits_TE)}
    for end, length in zip(np.cumsum(tokens_per_shard), tokens_per_shard, strict=True):
        own = slice(end - length, end)
        part = run(logits_TE[own], coeff * length / len(logits_TE), token_mask_T=token_mask_T[own])
        found["loss"] += part["loss"]
        found["d_logits_TE"][own] = part["d_logits_TE"]
    return found


@surrounds(breaks="MSK-10")
def padding_is_multiplied_away_in_the_z_loss(run, memory, logits_TE, coeff, *, token_mask_T=None, **inputs):
    """Rows of padding are multiplied by 0, which keeps a NaN."""
    found = run(logits_TE, coeff, token_mask_T=token_mask_T, **inputs)
    return found if token_mask_T is None else found | {"loss": found["loss"] + (0 * logits_TE[~token_mask_T]).sum()}


@surrounds(breaks="MSK-11")
def weights_of_padding_are_multiplied_by_0(run, memory, ids_TK, weights_TK, capacity, E, *, token_mask_T=None,
                                           **inputs):  # fmt: skip
    """0 times what a weight of padding holds is its weight afterwards."""
    found = run(ids_TK, weights_TK, capacity, E, token_mask_T=token_mask_T, **inputs)
    if token_mask_T is None:
        return found
    return found | {"weights_TK": np.where(token_mask_T[:, None], found["weights_TK"], 0 * weights_TK)}


@surrounds(breaks="MSK-12")
def ids_are_read_before_the_mask(run, memory, ids_TK, E, *, token_mask_T=None):
    """Each id has to be one of an expert, or -1, that of padding too."""
    if (ids_TK < UNUSED).any() or (ids_TK > 10**4).any():
        raise IndexError("index out of range")
    return run(ids_TK, E, token_mask_T=token_mask_T)
