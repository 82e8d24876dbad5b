"""conformance, balance, faults of load: wrong counts, losses and bias updates."""

import numpy as np

from conformance.core.fault import replaces, rounded, surrounds
from moe_ref import z_loss, z_loss_backward
from moe_ref.balance import log_sum_exp
from moe_ref.routing import limit_groups, score


@surrounds(breaks="LOD-1")
def counts_are_fractions(run, memory, ids_TK, E, **inputs):
    """Counts are returned in floating point."""
    return run(ids_TK, E, **inputs).astype(np.float32)


@surrounds(breaks="LOD-2", links=("deepspeedai/DeepSpeed#2559",))
def only_the_first_choice_is_counted(run, memory, ids_TK, E, **inputs):
    """Later slots are not counted."""
    return run(ids_TK[:, :1], E, **inputs)


@surrounds(breaks="LOD-3", links=("deepseek-ai/DeepEP#739",))
def an_unused_slot_counts_for_expert_0(run, memory, ids_TK, E, **inputs):
    """An id of -1 is read as 0."""
    return run(np.where(ids_TK < 0, 0, ids_TK), E, **inputs)


@surrounds(breaks="LOD-4", links=("pytorch/torchtitan#1593",))
def recomputation_counts_again(run, memory, ids_TK, E, **inputs):
    """The second forward pass over the same tokens adds to the counts of the first."""
    before = memory.get(ids_TK.tobytes(), 0)
    memory[ids_TK.tobytes()] = found = run(ids_TK, E, **inputs)
    return found + before


@surrounds(breaks="LOD-5", links=("unslothai/unsloth#4812",))
def no_loss_is_collected(run, memory, *arguments, **inputs):
    """The list of collected logits is empty, and so is the loss."""
    return {}


@surrounds(breaks="LOD-6", links=("mlfoundations/open_lm#255",))
def the_main_loss_is_in_it(run, memory, *arguments, **inputs):
    """The loss of the model is added."""
    found = run(*arguments, **inputs)
    return found | {"loss": found["loss"] + 1}


@surrounds(breaks="LOD-6", links=("mindspore-ai/hyper-parallel#752",))
def the_loss_ignores_the_balance(run, memory, logits_TE, ids_TK, balance, router, **inputs):
    """The counts are summed before they meet the scores: the loss is coeff, however uneven they are."""
    return run(logits_TE, ids_TK, balance, router, **inputs) | {"loss": balance.coeff}


@surrounds(breaks="LOD-7", links=("NVIDIA/TransformerEngine#2720",))
def one_slot_is_not_normed(run, memory, logits_TE, ids_TK, balance, router, **inputs):
    """Scores are divided by their sum only where there are several slots."""
    raw = ids_TK.shape[1] == 1 and balance.norm_scores
    return run(logits_TE, ids_TK, balance.replace(norm_scores=False, score_eps=0.0) if raw else balance, router,
               **inputs)  # fmt: skip


@surrounds(breaks="LOD-6")
def scores_are_scored_again(run, memory, logits_TE, ids_TK, balance, router, **inputs):
    """The scores are taken for logits and scored again."""
    return run(np.exp(logits_TE - log_sum_exp(logits_TE)), ids_TK, balance, router, **inputs)


@surrounds(breaks="LOD-8", links=("huggingface/transformers#43775",))
def f_is_not_divided_by_k(run, memory, logits_TE, ids_TK, balance, router, **inputs):
    """The share is one of the tokens, so that it sums to K."""
    return run(logits_TE, ids_TK, balance.replace(counts_over="tokens"), router, **inputs)


@surrounds(breaks="LOD-9")
def routed_slots_are_counted(run, memory, logits_TE, ids_TK, balance, router, **inputs):
    """The given choice, made with bias, is counted where the unbiased one is asked for."""
    return run(logits_TE, ids_TK, balance.replace(counts="routed"), router, **inputs)


@surrounds(breaks="LOD-10", links=("AI-Hypercomputer/maxtext#1492",))
def biased_scores_enter(run, memory, logits_TE, ids_TK, balance, router, *, expert_bias_E=None, **inputs):
    """expert_bias is added to what the loss scores."""
    return run(logits_TE if expert_bias_E is None else logits_TE + expert_bias_E, ids_TK, balance, router, **inputs)


@surrounds(breaks="LOD-11", links=("NVIDIA/Megatron-LM#5798",))
def sequences_are_one_batch(run, memory, logits_TE, ids_TK, balance, router, *, sequence_lengths=None, **inputs):
    """The sequences of a micro-batch are folded into one."""
    return run(logits_TE, ids_TK, balance, router, **inputs)


@surrounds(breaks="LOD-12", links=("NVIDIA/Megatron-LM#5798",))
def the_gradient_is_scaled(run, memory, logits_TE, ids_TK, balance, router, **inputs):
    """The gradient is divided by the number of slots of a token once more; the loss that is logged is right."""
    found = run(logits_TE, ids_TK, balance, router, **inputs)
    return found | {"d_logits_TE": found["d_logits_TE"] / ids_TK.shape[1]}


@surrounds(breaks="LOD-13", links=("NVIDIA/Megatron-LM#5047", "ruimalheiro/gradient-garden#113"))
def a_global_loss_per_shard(run, memory, logits_TE, ids_TK, balance, router, **inputs):
    """Each shard takes its own counts, and the losses are averaged."""
    local = balance.scope == "global" and len(inputs.get("tokens_per_shard", ())) > 1
    return run(logits_TE, ids_TK, balance.replace(scope="local") if local else balance, router, **inputs)


@surrounds(breaks="LOD-14")
def a_local_loss_over_all_shards(run, memory, logits_TE, ids_TK, balance, router, **inputs):
    """The counts of all shards enter where each has its own."""
    return run(logits_TE, ids_TK, balance.replace(scope="global"), router, **inputs)


@surrounds(breaks="LOD-15", links=("NVIDIA/Megatron-LM#6967",))
def the_sum_has_no_order(run, memory, *arguments, **inputs):
    """Terms are summed as they come, and the last bits with them."""
    memory["calls"] = memory.get("calls", 0) + 1
    found, towards = run(*arguments, **inputs), np.float32(np.inf if memory["calls"] % 2 else 0)
    return found | {"loss": np.nextafter(np.float32(found["loss"]), towards)}


@surrounds(breaks="LOD-16", links=("huggingface/transformers#48421",))
def z_loss_of_scores(run, memory, logits_TE, coeff, **inputs):
    """The variable of the logits holds their softmax by then."""
    return run(np.exp(logits_TE - log_sum_exp(logits_TE)), coeff, **inputs)


@surrounds(breaks="LOD-16", links=("allenai/OLMo-core#60",))
def z_loss_over_experts_too(run, memory, logits_TE, coeff, **inputs):
    """The mean is over tokens and experts."""
    return run(logits_TE, coeff / logits_TE.shape[1], **inputs)


@surrounds(breaks="LOD-17", links=("NVIDIA/Megatron-LM#5047",))
def z_gradient_of_a_sum(run, memory, logits_TE, coeff, **inputs):
    """The gradient is that of the sum over tokens."""
    found = run(logits_TE, coeff, **inputs)
    return found | {"d_logits_TE": found["d_logits_TE"] * len(logits_TE)}


@replaces("log_sum_exp", breaks="LOD-18", links=("NVIDIA/Megatron-LM#1545",))
def exp_overflows(values_TE):
    """Logits are not shifted before exp."""
    return np.log(np.exp(values_TE).sum(axis=-1, keepdims=True))


@surrounds(breaks="LOD-19", links=("AI-Hypercomputer/maxtext#2494",))
def the_bias_never_moves(run, memory, counts_SE, update, expert_bias_E):
    """It gets no gradient, and no update either."""
    return expert_bias_E


@surrounds(breaks="LOD-19", links=("ScienceOne-AI/DeepSeek-671B-SFT-Guide#9",))
def the_bias_moves_towards_the_load(run, memory, counts_SE, update, expert_bias_E):
    """The sign is turned."""
    return 2 * expert_bias_E - run(counts_SE, update, expert_bias_E)


@surrounds(breaks="LOD-20", links=("ScienceOne-AI/DeepSeek-671B-SFT-Guide#9",))
def each_rank_takes_its_sign(run, memory, counts_SE, update, expert_bias_E):
    """Signs of local counts are averaged."""
    return np.mean([run(own_1E, update, expert_bias_E) for own_1E in counts_SE[:, None]], axis=0)


@surrounds(breaks="LOD-21")
def the_mean_is_overloaded(run, memory, counts_SE, update, expert_bias_E):
    """An expert with the mean count is stepped down."""
    total_E = counts_SE.sum(axis=0)
    step = update.rate * (total_E * len(total_E) == total_E.sum())
    return run(counts_SE, update, expert_bias_E) - step


@surrounds(breaks="LOD-22")
def every_step_is_a_sign(run, memory, counts_SE, update, expert_bias_E):
    """The rule is not read."""
    return run(counts_SE, update.replace(rule="sign"), expert_bias_E)


@surrounds(breaks="LOD-23")
def steps_are_not_centred(run, memory, counts_SE, update, expert_bias_E):
    """The mean of the steps stays in them."""
    return run(counts_SE, update.replace(centred=False), expert_bias_E)


@surrounds(breaks="LOD-24", links=("pytorch/torchtitan#3686",))
def frozen_experts_move(run, memory, counts_SE, update, expert_bias_E):
    """What is not to be balanced is updated with the rest."""
    return run(counts_SE, update.replace(frozen_E=None), expert_bias_E)


@surrounds(breaks="LOD-25")
def counts_are_float32(run, memory, counts_SE, update, expert_bias_E):
    """Counts are kept in a float32 buffer."""
    return run(counts_SE.astype(np.float32).astype(np.int64), update, expert_bias_E)


@surrounds(breaks="LOD-26", links=("NVIDIA/Megatron-LM#7213",))
def all_counts_so_far_over_the_last_slots(run, memory, logits_TE, ids_TK, balance, router, **inputs):
    """The mean count so far is divided by the slots of the micro-batch that comes last."""
    scope = "running_mean" if balance.scope == "running" else balance.scope
    return run(logits_TE, ids_TK, balance.replace(scope=scope), router, **inputs)


@surrounds(breaks="LOD-27")
def the_loss_scores_as_its_router(run, memory, logits_TE, ids_TK, balance, router, **inputs):
    """The score function of the router takes the place of the loss's own."""
    raw = {"norm_scores": False, "score_eps": 0.0} if router.score_func == "softmax" else {}
    return run(logits_TE, ids_TK, balance.replace(score_func=router.score_func, **raw), router, **inputs)


@surrounds(breaks="LOD-27")
def the_loss_forgets_scale_and_cap(run, memory, logits_TE, ids_TK, balance, router, **inputs):
    """The logits of the gate are scored as they are, before the router scales and caps them."""
    return run(logits_TE, ids_TK, balance, router.replace(logit_scale=1.0, logit_softcap=None), **inputs)


@surrounds(breaks="LOD-27", links=("ISEEKYAN/Megatron-LM#223",))
def dropped_groups_have_no_score_in_a_loss(run, memory, logits_TE, ids_TK, balance, router, **inputs):
    """The loss scores what the groups leave."""
    if router.num_expert_groups is None:
        return run(logits_TE, ids_TK, balance, router, **inputs)
    scores_for_choice_TE = limit_groups(score(logits_TE, router), router)[0]
    return run(np.where(np.isneginf(scores_for_choice_TE), -np.inf, logits_TE), ids_TK, balance, router, **inputs)


@surrounds(breaks="LOD-28", links=("PaddlePaddle/PaddleFleet#1369",))
def the_z_loss_is_a_mean_of_ranks(run, memory, logits_TE, coeff, *, tokens_per_shard=None, **inputs):
    """Each rank takes the mean over its own tokens, and the means are averaged."""
    how = {"coeff": coeff, "tokens_per_shard": tokens_per_shard, "scope": "local", **inputs}
    return {"loss": z_loss(logits_TE, **how), "d_logits_TE": z_loss_backward(logits_TE, **how)}


@surrounds(breaks="LOD-29", links=("NVIDIA/Megatron-LM#7081",))
def counts_are_bfloat16(run, memory, ids_TK, E, **inputs):
    """Counts are kept in bfloat16, which is exact to 256."""
    return rounded(run(ids_TK, E, **inputs).astype(np.float32), 8).astype(np.int64)


@surrounds(breaks="LOD-29")
def counts_have_16_bits(run, memory, ids_TK, E, **inputs):
    """Counts wrap at 65,536."""
    return run(ids_TK, E, **inputs).astype(np.uint16)


@surrounds(breaks="LOD-29")
def tokens_are_counted_in_float32(run, memory, ids_TK, E, **inputs):
    """One is added to a float32 count, which stays at 2 ** 24."""
    return np.minimum(run(ids_TK, E, **inputs), 2**24)


@surrounds(breaks="LOD-30", links=("NVIDIA/Megatron-LM#7081",))
def counts_are_summed_in_bfloat16(run, memory, counts_SE, update, expert_bias_E):
    """The counts of the ranks are added in bfloat16."""
    sum_E = np.zeros(counts_SE.shape[1], np.float32)
    for counts_E in counts_SE:
        sum_E = rounded(sum_E + counts_E.astype(np.float32), 8)
    return run(sum_E.astype(np.int64)[None], update, expert_bias_E)


@surrounds(breaks="LOD-31")
def a_barred_expert_makes_the_loss_nan(run, memory, logits_TE, ids_TK, balance, router, **inputs):
    """0 times -inf is NaN."""
    found = run(logits_TE, ids_TK, balance, router, **inputs)
    return found | {"d_logits_TE": found["d_logits_TE"] + 0 * logits_TE}


@surrounds(breaks="LOD-31")
def a_barred_expert_has_a_score(run, memory, logits_TE, ids_TK, balance, router, **inputs):
    """-inf becomes 0, which is a logit like any other."""
    return run(np.where(np.isneginf(logits_TE), 0, logits_TE), ids_TK, balance, router, **inputs)


@replaces("log_sum_exp", breaks="LOD-32")
def exp_overflows_in_the_z_loss(values_TE):
    """Logits are not shifted before exp."""
    return np.log(np.exp(values_TE).sum(axis=-1, keepdims=True))


@surrounds(breaks="LOD-33")
def an_unused_slot_is_the_first_expert_of_a_loss(run, memory, logits_TE, ids_TK, balance, router, **inputs):
    """An id of -1 is read as 0."""
    return run(logits_TE, np.where(ids_TK < 0, 0, ids_TK), balance, router, **inputs)


@surrounds(breaks="LOD-33")
def f_is_a_share_of_used_slots(run, memory, logits_TE, ids_TK, balance, router, **inputs):
    """Unused slots are left out of what f is a share of."""
    found = run(logits_TE, ids_TK, balance, router, **inputs)
    used = (ids_TK >= 0).mean() if ids_TK.size and (ids_TK >= 0).any() else 1
    return {name: value / used for name, value in found.items()}


@surrounds(breaks="LOD-34")
def an_empty_batch_divides_by_0(run, memory, logits_TE, ids_TK, balance, router, **inputs):
    """The mean over no token is 0 / 0."""
    found = run(logits_TE, ids_TK, balance, router, **inputs)
    return found if len(logits_TE) else found | {"loss": np.nan}


@surrounds(breaks="LOD-35")
def an_empty_z_loss_divides_by_0(run, memory, logits_TE, coeff, **inputs):
    """The mean over no token is 0 / 0."""
    found = run(logits_TE, coeff, **inputs)
    return found if len(logits_TE) else found | {"loss": np.nan}


@surrounds(breaks="LOD-36")
def unused_ids_are_overwritten(run, memory, ids_TK, E, *, token_mask_T=None):
    """The ids of padding are set to -1 in place, and those of unused slots to E."""
    if token_mask_T is not None:
        ids_TK[~token_mask_T] = -1
    ids_TK[ids_TK < 0] = E
    return run(ids_TK, E)


@surrounds(breaks="LOD-37")
def logits_are_shifted_in_place(run, memory, logits_TE, ids_TK, balance, router, **inputs):
    """The largest logit of a token is subtracted from the array itself."""
    found = run(logits_TE, ids_TK, balance, router, **inputs)
    logits_TE -= logits_TE.max(axis=-1, keepdims=True, initial=-np.inf)
    return found


@surrounds(breaks="LOD-38")
def logits_of_padding_are_cleared_in_place(run, memory, logits_TE, coeff, *, token_mask_T=None, **inputs):
    """Padding is filled with 0 in the array itself."""
    found = run(logits_TE, coeff, token_mask_T=token_mask_T, **inputs)
    if token_mask_T is not None:
        logits_TE[~token_mask_T] = 0
    return found


@surrounds(breaks="LOD-39")
def counts_are_cleared_by_the_update(run, memory, counts_SE, update, expert_bias_E):
    """The counts of the caller are set to 0 for the next step."""
    found = run(counts_SE, update, expert_bias_E)
    counts_SE[:] = 0
    return found


@surrounds(breaks="LOD-51", links=("huggingface/transformers#28255",))
def layers_are_one_batch(run, memory, logits_TE, ids_TK, balance, router, *, num_layers=1, **inputs):
    """The logits of all layers are concatenated, so that what one layer has too much another makes up for."""
    pooled = balance.replace(over_layers="pooled")
    return run(logits_TE, ids_TK, pooled if num_layers > 1 else balance, router, num_layers=num_layers, **inputs)


@surrounds(breaks="LOD-51")
def layers_are_averaged(run, memory, logits_TE, ids_TK, balance, router, *, num_layers=1, **inputs):
    """The loss is divided by the number of layers."""
    found = run(logits_TE, ids_TK, balance, router, num_layers=num_layers, **inputs)
    return {name: value / num_layers for name, value in found.items()}
