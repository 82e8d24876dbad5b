"""conformance, router: the requirements of select."""

from conformance.core.register import MUST, SHOULD, chapter

chapter(
    "select",
    ("SEL-1", MUST, "Each token selects top_k distinct experts, as integer ids in range.",
                 "vllm-project/vllm#39391", "sgl-project/sglang#30079"),
    ("SEL-2", MUST, "The selected experts are those with the best choice scores.", "pytorch/pytorch#196177"),
    ("SEL-3", MUST, "An expert of a dropped group is never selected, whatever the sign of the bias.",
                 "huggingface/transformers#45440", "huggingface/transformers#45441",
                 "deepseek-ai/DeepSeek-V3#741"),
    ("SEL-4", MUST, "expert_bias is added to what is ranked.", "AI-Hypercomputer/maxtext#1492"),
    ("SEL-5", SHOULD, "Experts with equal choice scores: the lower id is selected.", "vllm-project/vllm#54403",
                 "vllm-project/vllm#52679"),
    ("SEL-6", SHOULD, "Slots are in descending choice score, equal ones by lower id.", "vllm-project/vllm#55514"),
    ("SEL-7", MUST, "One constant added to every entry of expert_bias changes no selection.",
                 "deepseek-ai/DeepSeek-V3#741"),
    ("SEL-8", MUST, "Renaming ungrouped experts renames the selection alike.",
                 "tensorflow/tensorflow#117287"),
    ("SEL-9", MUST, "An expert whose logit is -inf is never selected while top_k others remain."),
    ("SEL-10", SHOULD, "Nor is it where expert_bias would lift its score above theirs."),
    ("SEL-11", MUST, "A null choice is returned under its own id, num_experts or above, so that counts stay true."),
    ("SEL-13", MUST, "sparsemixer selects by repeated argmax of the remaining logits."),
    ("SEL-14", MUST, "A table selects the row of the token's id."),
    ("SEL-15", MUST, "Given ids are taken as they are, slot by slot, unused slots (-1) included.",
                  "radixark/miles#3146", "PrimeIntellect-ai/prime-rl#1807", "radixark/miles#645"),
    ("SEL-16", MUST, "Round-robin gives slot k of token t the expert (t * K + k) mod num_experts."),
    ("SEL-17", MUST, "Random selection depends on the seed alone, not on the logits."),
    ("SEL-18", MUST, "Under group_top_k each of the quota_groups groups of consecutive experts gives its top_k / "
                 "quota_groups best choices, and the slots are in descending order of all of them."),
    ("SEL-19", MUST, "sinkhorn selects the largest entries of each row of exp(logits), whose rows and columns are "
                  "scaled until experts share the whole batch evenly."),
    ("SEL-20", MUST, "Padding tokens take no part in the batch that sinkhorn evens."),
    ("SEL-21", MUST, "threshold selects, of the top_k best choices, each whose choice score, expert_bias included, is "
                  "above the threshold, and none that is equal to it or below: a token may have no expert.",
                  "thu-ml/ReMoE"),
    ("SEL-22", MUST, "top_p selects the best choices in turn, each while the scores of those before it sum to at most "
                  "top_p: at least one, at most top_k."),
    ("SEL-23", MUST, "A slot that threshold or top_p leave unused has the id -1 and the weight 0."),
    ("SEL-24", SHOULD, "The slots that threshold and top_p use are in descending choice score, equal ones by lower "
                    "id, and the unused ones come after them."),
    ("SEL-30", MUST, "Under expert_choice each expert takes the tokens of the whole batch that rank best for it, by "
                  "scores of each token over the experts.", "deepspeedai/DeepSpeed#7986"),
    ("SEL-31", MUST, "Under expert_choice each expert takes take_factor * tokens / num_experts tokens, rounded as "
                  "take_rounding says, take_least of them at least and all at most.", "google-deepmind/simply#8"),
    ("SEL-32", MUST, "Under expert_choice padding is never taken, and is not among the tokens whose number decides how "
                  "many are."),
    ("SEL-33", SHOULD, "Under expert_choice the lower of two tokens with equal choice scores is taken."),
    ("SEL-34", MUST, "Under expert_choice an expert never takes a token whose logit for it is -inf; it rather takes "
                  "fewer."),
    ("SEL-35", SHOULD, "Under expert_choice the experts that took a token are in descending choice score, equal ones "
                  "by lower id, and unused slots (-1) follow.", "deepseek-ai/DeepEP#595"),
)  # fmt: skip
