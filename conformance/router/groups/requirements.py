"""conformance, router: the requirements of groups."""

from conformance.core.register import MUST, SHOULD, chapter

chapter(
    "groups",
    ("GRP-1", MUST, "The kept groups are those with the best scores, each the sum of its group_score_k best choice "
                 "scores.", "NVIDIA/Megatron-LM#1441", "EricLBuehler/mistral.rs#1278"),
    ("GRP-2", MUST, "A token's experts come from at most num_limited_groups groups of consecutive experts.",
                 "EricLBuehler/mistral.rs#1278", "vllm-project/vllm#34673"),
    ("GRP-3", MUST, "Group scores are made of choice scores, expert_bias included.", "deepseek-ai/DeepSeek-V3#741"),
    ("GRP-4", SHOULD, "Groups with equal scores: the lower group id is kept.", "vllm-project/vllm#55514"),
    ("GRP-5", MUST, "Renaming the groups renames the selection alike."),
    ("GRP-6", MUST, "With mask_fill 0 an expert of a dropped group ranks as choice score 0."),
)  # fmt: skip
