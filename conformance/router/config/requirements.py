"""conformance, router: the requirements of config."""

from conformance.core.register import MUST, chapter

chapter(
    "config",
    ("CFG-1", MUST, "A top_k that the kept groups cannot fill is refused.", "huggingface/transformers#48647"),
    ("CFG-2", MUST, "Groups that do not divide the experts, more kept groups than groups, and groups smaller than "
                 "group_score_k are refused.", "huggingface/transformers#48647"),
    ("CFG-3", MUST, "An unknown score function is refused, not replaced.", "flashinfer-ai/flashinfer#5190",
                 "vllm-project/vllm#34673"),
    ("CFG-4", MUST, "A top_k larger than the number of experts is refused.", "flashinfer-ai/flashinfer#3840"),
)  # fmt: skip
