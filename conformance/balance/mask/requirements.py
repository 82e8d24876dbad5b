"""conformance, balance: the requirements of mask."""

from conformance.core.register import MUST, chapter

chapter(
    "mask",
    ("MSK-1", MUST, "A padding token is counted for no expert, whatever its ids, and wherever it stands.",
                 "vllm-project/vllm#38128", "sgl-project/sglang#40672"),
    ("MSK-2", MUST, "A padding token is in no sum and no mean of a balance loss: the loss is that of the others alone.",
                 "huggingface/transformers#28517", "NVIDIA/Megatron-LM#2121", "ruimalheiro/gradient-garden#113"),
    ("MSK-3", MUST, "The gradient of a balance loss is 0 for a padding token, and for others what it is without it.",
                 "NVIDIA/Megatron-LM#2121"),
    ("MSK-4", MUST, "A sequence or a shard of padding alone is in no mean."),
    ("MSK-5", MUST, "A padding token is in no mean of the z-loss, and its gradient is 0.", "NVIDIA/Megatron-LM#2121"),
    ("MSK-6", MUST, "What the logits of padding hold reaches no loss and no gradient: NaN, inf, -inf, 1e30.",
                 "huggingface/transformers#45621"),
    ("MSK-7", MUST, "Padding takes no place of an expert and makes no capacity larger; its ids are -1, its weights 0.",
                 "vllm-project/vllm#50759"),
    ("MSK-8", MUST, "Where all is padding, loss and gradient are 0.", "vllm-project/vllm#57471"),
    ("MSK-9", MUST, "The z-loss of ranks with unequal numbers of valid tokens is the mean over all valid tokens.",
                 "PaddlePaddle/PaddleFleet#1369", "NVIDIA/Megatron-LM#3768"),
    ("MSK-10", MUST, "What the logits of padding hold reaches no z-loss and no gradient of it: NaN, inf, -inf, 1e30."),
    ("MSK-11", MUST, "What the ids and weights of padding hold reaches no place and no weight: ids of no expert, "
                  "NaN, inf."),
    ("MSK-12", MUST, "The ids of padding reach no count, even ones that no expert has.", "vllm-project/vllm#38128"),
)  # fmt: skip
