"""conformance, the register of load: the requirements of the stages load, capacity, mask and replay, as plain rows.

Each row: id, level, sentence, links. `conformance.requirements` makes requirements of them.
"""

M, S = "MUST", "SHOULD"

LOAD = (
    ("LOD-1", M, "Counting runs every case that it supports, and returns one integer for each expert."),
    ("LOD-2", M, "The count of an expert is the number of slots that chose it, in whatever slot.",
                 "deepspeedai/DeepSpeed#2559"),
    ("LOD-3", M, "An unused slot (-1) and a null choice are counted for no expert.",
                 "vllm-project/vllm-xpu-kernels#571", "deepseek-ai/DeepEP#739"),
    ("LOD-4", M, "The same choice has the same counts, however often it was counted before.",
                 "pytorch/torchtitan#1593"),
    ("LOD-5", M, "A balance loss runs every case that it supports, and returns by itself a number, and a gradient of "
                 "each logit.", "unslothai/unsloth#4812", "mlfoundations/open_lm#255"),
    ("LOD-6", M, "The loss of a batch is coeff * E ** expert_power * the sum over experts of f * P, where P is the "
                 "mean score of an expert.", "mindspore-ai/hyper-parallel#752"),
    ("LOD-7", M, "The scores are made of the logits, once; they are shares of 1 where the spec says so, with one slot "
                 "too.", "NVIDIA/TransformerEngine#2720"),
    ("LOD-8", M, "f is a share of the counted slots, or of the tokens, as counts_over says.",
                 "huggingface/transformers#43775"),
    ("LOD-9", M, "The counts are of the given choice, or of the best scores without bias and groups, as counts says; "
                 "of the first counted_slots where the spec has them.", "deepspeedai/DeepSpeed#2559"),
    ("LOD-10", M, "expert_bias enters no score of a loss.", "AI-Hypercomputer/maxtext#1492"),
    ("LOD-11", M, "A loss of sequences is the mean of the losses of each, long or short.", "NVIDIA/Megatron-LM#5798"),
    ("LOD-12", M, "The gradient is that of the loss that is returned, through the scores alone: counts are constants.",
                  "NVIDIA/Megatron-LM#5798", "huggingface/transformers#43775"),
    ("LOD-13", M, "With scope 'global' it makes no difference to loss and gradient how the batch is cut into ranks, "
                  "micro-batches or chunks.", "NVIDIA/Megatron-LM#5047", "ruimalheiro/gradient-garden#113",
                  "mlfoundations/open_lm#255"),
    ("LOD-14", M, "With scope 'local' the loss is the mean of the losses of the shards; with 'running' each takes the "
                  "mean count of itself and those before it."),
    ("LOD-15", S, "The same input gives the same loss and the same gradient, bit for bit.", "NVIDIA/Megatron-LM#6967"),
    ("LOD-16", M, "The z-loss is coeff * the mean over tokens of log(sum(exp(logits))) ** 2, of the logits themselves.",
                  "huggingface/transformers#48421", "allenai/OLMo-core#60"),
    ("LOD-17", M, "The gradient of the z-loss is 2 * coeff / T * log(sum(exp(logits))) * softmax(logits).",
                  "NVIDIA/Megatron-LM#5047"),
    ("LOD-18", M, "Losses and gradients of large logits are finite and right.", "NVIDIA/Megatron-LM#1545"),
    ("LOD-19", M, "After a step, an expert with less than the mean count has rate more bias, and one with more has "
                  "rate less.", "AI-Hypercomputer/maxtext#2494", "ScienceOne-AI/DeepSeek-671B-SFT-Guide#9"),
    ("LOD-20", M, "The counts of ranks and micro-batches are summed first, and the sign is taken once, of the sum.",
                  "ScienceOne-AI/DeepSeek-671B-SFT-Guide#9"),
    ("LOD-21", M, "An expert with exactly the mean count keeps its bias; equal counts, or none, move nothing."),
    ("LOD-22", M, "A proportional step is rate * (mean - count), and a relative one is that over the mean."),
    ("LOD-23", M, "Centred steps have the mean 0: the biases keep their sum."),
    ("LOD-24", M, "The bias of a frozen expert stays, and its count is in no mean.", "pytorch/torchtitan#3686"),
    ("LOD-25", S, "Counts past 2 ** 24, which float32 does not tell apart, move the bias all the same."),
)  # fmt: skip

CAPACITY = (
    ("CAP-1", M, "A capacity runs every case that it supports; a slot keeps its expert, or has id -1."),
    ("CAP-2", M, "No expert keeps more slots than its capacity, however skewed the choice.",
                 "huggingface/transformers#48421", "laekov/fastmoe#199"),
    ("CAP-3", M, "The capacity is factor * T * K / E rounded as the spec says, at least min_slots, or the given slots; "
                 "an expert drops nothing before it is full.", "laekov/fastmoe#199", "vllm-project/vllm-ascend#16384"),
    ("CAP-4", M, "A capacity beyond the number of tokens drops nothing, and is no error.",
                 "deepspeedai/DeepSpeed#8155", "marin-community/marin#8578"),
    ("CAP-5", M, "The capacity holds for each sequence, for each rank or for the whole batch, as scope says."),
    ("CAP-6", M, "'first_come' keeps the earlier tokens; 'slot_major' keeps all first slots before any second one, and "
                 "all of these before a third.", "lucidrains/st-moe-pytorch#13"),
    ("CAP-7", M, "'by_weight' keeps the largest weights of each expert."),
    ("CAP-8", M, "A dropped slot weighs 0; without renormalise the others weigh what they did."),
    ("CAP-9", M, "Renormalised weights are divided by the sum of the token's weights, before or after the drop, and a "
                 "token without any slot left weighs 0."),
    ("CAP-10", M, "A dropped slot sends no gradient to its weight; the others get that of the weights returned."),
    ("CAP-11", M, "A hot expert costs no other expert a slot.", "vllm-project/vllm-ascend#14926"),
    ("CAP-12", M, "The same input drops the same slots.", "microsoft/Tutel#26"),
    ("CAP-13", M, "With pad_to_capacity each kept slot has one place of its expert, in drop order and without gaps; "
                  "every other place is -1.", "microsoft/Tutel#26", "lucidrains/st-moe-pytorch#13"),
    ("CAP-14", M, "A second limit holds for what the first one keeps."),
    ("CAP-15", M, "An unused slot and a null choice take no place and are not dropped."),
    ("CAP-16", S, "Of equal weights 'by_weight' keeps the earlier one."),
)  # fmt: skip

MASK = (
    ("MSK-1", M, "A padding token is counted for no expert, whatever its ids, and wherever it stands.",
                 "vllm-project/vllm#38128", "sgl-project/sglang#40672"),
    ("MSK-2", M, "A padding token is in no sum and no mean of a balance loss: the loss is that of the others alone.",
                 "huggingface/transformers#28517", "NVIDIA/Megatron-LM#2121", "ruimalheiro/gradient-garden#113"),
    ("MSK-3", M, "The gradient of a balance loss is 0 for a padding token, and for others what it is without it.",
                 "NVIDIA/Megatron-LM#2121"),
    ("MSK-4", M, "A sequence or a shard of padding alone is in no mean."),
    ("MSK-5", M, "A padding token is in no mean of the z-loss, and its gradient is 0.", "NVIDIA/Megatron-LM#2121"),
    ("MSK-6", M, "What the logits of padding hold reaches no loss and no gradient: NaN, inf, 1e30.",
                 "huggingface/transformers#45621"),
    ("MSK-7", M, "Padding takes no place of an expert and makes no capacity larger; its ids are -1, its weights 0.",
                 "vllm-project/vllm#50759"),
    ("MSK-8", M, "Where all is padding, loss and gradient are 0.", "vllm-project/vllm#57471"),
)  # fmt: skip

REPLAY = (
    ("RPL-1", M, "A replay runs every case that it supports, and returns one output for each token."),
    ("RPL-2", M, "A record without weights is replayed with this router's weights for the recorded experts.",
                 "radixark/miles#2722"),
    ("RPL-3", M, "A record with weights is replayed with these, which are neither normed nor scaled again.",
                 "radixark/miles#2722"),
    ("RPL-4", M, "The experts of a replay are the recorded ones, whatever the logits and expert_bias.",
                 "radixark/miles#3146"),
    ("RPL-5", M, "An unused slot of a record adds nothing, and changes no other slot's choice.", "radixark/miles#645",
                 "PrimeIntellect-ai/prime-rl#1807"),
    ("RPL-6", M, "Padding of a record has the output 0, and the tokens beside it, also after it, are replayed as "
                 "recorded.", "radixark/miles#645", "AI-Hypercomputer/maxtext#5266"),
    ("RPL-7", M, "Each token takes its own row of the record: tokens and rows in another order give the outputs in "
                 "that order.", "radixark/miles#3146", "AI-Hypercomputer/maxtext#5266"),
    ("RPL-8", M, "A record holds the experts and the final weights of the run, slot by slot; padding has none.",
                 "sgl-project/sglang#36404"),
    ("RPL-9", M, "A run that is recorded, carried over as plain arrays and replayed gives its own output again.",
                 "radixark/miles#2722"),
)  # fmt: skip
