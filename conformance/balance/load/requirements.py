"""conformance, balance: the requirements of load."""

from conformance.core.register import MUST, SHOULD, chapter

chapter(
    "load",
    ("LOD-1", MUST, "Counting runs every case that it supports, and returns one integer for each expert."),
    ("LOD-2", MUST, "The count of an expert is the number of slots that chose it, in whatever slot.",
                 "deepspeedai/DeepSpeed#2559"),
    ("LOD-3", MUST, "An unused slot (-1) and a null choice are counted for no expert.",
                 "vllm-project/vllm-xpu-kernels#571", "deepseek-ai/DeepEP#739"),
    ("LOD-4", MUST, "The same choice has the same counts, however often it was counted before.",
                 "pytorch/torchtitan#1593"),
    ("LOD-5", MUST, "A balance loss runs every case that it supports, and returns by itself a number, and a gradient "
                 "of each logit.", "unslothai/unsloth#4812", "mlfoundations/open_lm#255"),
    ("LOD-6", MUST, "The loss of a batch is coeff * E ** expert_power * the sum over experts of f * P, where P is the "
                 "mean score of an expert.", "mindspore-ai/hyper-parallel#752"),
    ("LOD-7", MUST, "The scores are made of the logits, once; they are shares of 1 where the spec says so, with one "
                 "slot too.", "NVIDIA/TransformerEngine#2720"),
    ("LOD-8", MUST, "f is a share of the counted slots, or of the tokens, as counts_over says.",
                 "huggingface/transformers#43775"),
    ("LOD-9", MUST, "The counts are of the given choice, or of the best scores without bias and groups, as counts "
                 "says; of the first counted_slots where the spec has them.", "deepspeedai/DeepSpeed#2559"),
    ("LOD-10", MUST, "expert_bias enters no score of a loss.", "AI-Hypercomputer/maxtext#1492"),
    ("LOD-11", MUST, "A loss of sequences is the mean of the losses of each, long or short.",
                 "NVIDIA/Megatron-LM#5798"),
    ("LOD-12", MUST, "The gradient is that of the loss that is returned, through the scores alone: counts are "
                  "constants.", "NVIDIA/Megatron-LM#5798", "huggingface/transformers#43775"),
    ("LOD-13", MUST, "With scope 'global' it makes no difference to loss and gradient how the batch is cut into ranks, "
                  "micro-batches or chunks.", "NVIDIA/Megatron-LM#5047", "ruimalheiro/gradient-garden#113",
                  "mlfoundations/open_lm#255"),
    ("LOD-14", MUST, "With scope 'local' the loss is the mean of the losses of the shards; with 'running_mean', which "
                  "is a release's and no share, each takes the mean count of itself and those before it."),
    ("LOD-15", SHOULD, "The same input gives the same loss and the same gradient, bit for bit.",
                 "NVIDIA/Megatron-LM#6967"),
    ("LOD-16", MUST, "The z-loss is coeff * the mean over tokens of log(sum(exp(logits))) ** 2, of the logits "
                  "themselves.", "huggingface/transformers#48421", "allenai/OLMo-core#60"),
    ("LOD-17", MUST, "The gradient of the z-loss is 2 * coeff / T * log(sum(exp(logits))) * softmax(logits).",
                  "NVIDIA/Megatron-LM#5047"),
    ("LOD-18", MUST, "Losses and gradients of large logits are finite and right.", "NVIDIA/Megatron-LM#1545"),
    ("LOD-19", MUST, "After a step, an expert with less than the mean count has rate more bias, and one with more has "
                  "rate less.", "AI-Hypercomputer/maxtext#2494", "ScienceOne-AI/DeepSeek-671B-SFT-Guide#9"),
    ("LOD-20", MUST, "The counts of ranks and micro-batches are summed first, and the sign is taken once, of the sum.",
                  "ScienceOne-AI/DeepSeek-671B-SFT-Guide#9"),
    ("LOD-21", MUST, "An expert with exactly the mean count keeps its bias; equal counts, or none, move nothing."),
    ("LOD-22", MUST, "A proportional step is rate * (mean - count), and a relative one is that over the mean."),
    ("LOD-23", MUST, "Centred steps have the mean 0: the biases keep their sum."),
    ("LOD-24", MUST, "The bias of a frozen expert stays, and its count is in no mean.", "pytorch/torchtitan#3686"),
    ("LOD-25", SHOULD, "Counts past 2 ** 24, which float32 does not tell apart, move the bias all the same."),
    ("LOD-26", MUST, "With scope 'running' f is the share of all counts so far in all slots so far, those of the "
                  "micro-batch included, so that it sums to 1 for any cut; the loss is the mean over micro-batches.",
                  "NVIDIA/Megatron-LM#7213"),
    ("LOD-27", MUST, "A balance loss scores the logits, as the router scales and caps them, by its own spec; nothing "
                  "else of the router reaches it: no groups, norm, scale, or scores over the selected alone.",
                  "ISEEKYAN/Megatron-LM#223"),
    ("LOD-28", MUST, "It makes no difference to the z-loss and its gradient how the batch is cut into ranks, "
                  "micro-batches or chunks: the mean is over all tokens.", "PaddlePaddle/PaddleFleet#1369"),
    ("LOD-29", MUST, "Counts are exact at any size: 255, 257, 2049, 65,537 and 2 ** 24 + 1 are themselves.",
                  "NVIDIA/Megatron-LM#7081"),
    ("LOD-30", MUST, "Counts whose total is below 2 ** 24 move the bias by the sign of their exact sum, over however "
                  "many ranks.", "NVIDIA/Megatron-LM#7081"),
    ("LOD-31", MUST, "An expert with the logit -inf has no score in a loss and no gradient, and is none of the best "
                  "scores that a loss counts, though fewer than top_k are left; the others have theirs."),
    ("LOD-32", MUST, "The z-loss and its gradient are finite and right for logits that are large, saturated, negative "
                  "throughout, or -inf for some experts."),
    ("LOD-33", MUST, "An unused slot (-1) is counted for no expert in a loss, and stays one of the slots that f is a "
                  "share of; so do all slots of a token that has none."),
    ("LOD-34", MUST, "Without any token a balance loss is 0, and no error."),
    ("LOD-35", MUST, "Without any token the z-loss is 0, and no error."),
    ("LOD-36", MUST, "Counting changes no array that it is given."),
    ("LOD-37", MUST, "A balance loss changes no array that it is given."),
    ("LOD-38", MUST, "A z-loss changes no array that it is given."),
    ("LOD-39", MUST, "An update of the bias changes no array that it is given: it returns the new bias."),
    ("LOD-40", MUST, "Quantile balancing sets the bias of each expert to the (floor(T * K / E) + 1)-th smallest, over "
                  "the T tokens of the step, of the token's (K + 1)-th largest biased score less the expert's score "
                  "without bias; centred, to that less the mean over experts.", "NVIDIA/Megatron-LM#6802"),
    ("LOD-41", MUST, "With keep, that share of the bias before stays, and the quantile makes the rest; centred, the "
                  "mean of both together is subtracted."),
    ("LOD-42", MUST, "A quantile over the pool is that of the tokens of all ranks and micro-batches, however they are "
                  "cut, and no mean of theirs; over batches it is the mean of the quantiles of those with a token.",
                  "NVIDIA/Megatron-LM#5349"),
    ("LOD-43", MUST, "A padding token is in no quantile."),
    ("LOD-44", MUST, "With bins the quantile is read from the counts of that many equal bins over [min bias - 1, max "
                  "bias + 1], inside the bin where they reach T * K / E, in proportion.", "pytorch/torchtitan#4577"),
    ("LOD-45", MUST, "Without any valid token quantile balancing moves no bias."),
    ("LOD-46", MUST, "A tanh step is rate * tanh(steepness * (mean - count) / mean); with momentum a bias moves by 1 - "
                  "momentum of its step, and by momentum of its last move."),
    ("LOD-47", MUST, "A share step is rate * (wanted_share / experts that move - count / all counts), those of frozen "
                  "experts among all; these keep their bias, and so does every expert where nothing is counted."),
    ("LOD-48", MUST, "With target_top_k f is a share of T * target_top_k slots, however many a token has, and a relu "
                  "score is max(logit, 0), no share of a sum."),
    ("LOD-49", MUST, "After a step the coefficient of an L1 loss is multiplied by factor where the slots of all layers "
                  "are more than target_top_k for each token and layer, and divided by it otherwise, where they are "
                  "as many too."),
    ("LOD-50", MUST, "Of a router of selector threshold, quantile balancing sets the bias of each expert to the "
                  "(floor(T * target_top_k / E) + 1)-th smallest, over the T tokens of the step, of the threshold less "
                  "the expert's score without bias."),
    ("LOD-51", MUST, "The balance loss of several layers is the sum of those of each, or that of the tokens of all as "
                  "one batch, as over_layers says.", "huggingface/transformers#28255"),
)  # fmt: skip
