"""conformance, router: the requirements of run."""

from conformance.core.register import MUST, chapter

chapter(
    "run",
    ("RUN-1", MUST, "A router runs every case that it says it supports.", "ml-explore/mlx-examples#671"),
    ("RUN-2", MUST, "Zero tokens give empty results of shape (0, K)."),
    ("RUN-3", MUST, "One token's routing depends on that token alone, not on its batch.",
                 "databricks/megablocks#87"),
    ("RUN-4", MUST, "The same input gives the same output, bit for bit.", "vllm-project/vllm#55514",
                 "flagos-ai/FlagGems#5123", "pytorch/pytorch#196177"),
    ("RUN-5", MUST, "A NaN in one token's logits is refused, or leaves every other token as it is and every id "
                 "distinct and in range.", "sgl-project/sglang#30079", "vllm-project/vllm#39391",
                 "intel/torch-xpu-ops#4839", "jax-ml/jax#21397"),
    ("RUN-6", MUST, "A padding token has ids -1 and weights 0, whatever its row holds, and changes no other token.",
                 "vllm-project/vllm#50759", "sgl-project/sglang#36404", "radixark/miles#645"),
    ("RUN-7", MUST, "A router changes no array that it is given."),
    ("RUN-8", MUST, "The same token gets the same experts anywhere in any batch, exact ties included.",
                 "vllm-project/vllm#55514"),
    ("RUN-9", MUST, "A token whose logits are all -inf is refused, goes nowhere (ids -1, weights 0), or has "
                 "distinct ids in range; it leaves every other token as it is.", "vllm-project/vllm#39391"),
    ("RUN-10", MUST, "What a router returned stays as it is when other tokens are routed."),
)  # fmt: skip
