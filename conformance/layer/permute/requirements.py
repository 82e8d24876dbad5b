"""conformance, layer: the requirements of permute."""

from conformance.core.register import MUST, SHOULD, chapter

chapter(
    "permute",
    ("PRM-1", MUST, "Permute runs every case that it supports, and returns the slots of the rows and a count for each "
                 "expert, as integers.", "huggingface/transformers#43583"),
    ("PRM-2", MUST, "The slot of an expert is a row exactly once; the slot of a null expert never is.",
                 "vllm-project/vllm-xpu-kernels#453", "ggml-org/llama.cpp#26295", "bytedance/flux#186"),
    ("PRM-3", MUST, "Rows are sorted by expert id.", "cusp-ai-oss/kUPS#186", "ggml-org/llama.cpp#26310"),
    ("PRM-4", MUST, "The counts are exact, 0 included, and the same for the same ids.", "sgl-project/sglang#3339",
                 "ModelTC/LightLLM#1369"),
    ("PRM-5", SHOULD, "Rows of one expert are in the order of the tokens.", "vllm-project/vllm#45683"),
    ("PRM-6", MUST, "An unused slot (-1) is no row and is counted nowhere, also where every slot is unused.",
                 "vllm-project/vllm-xpu-kernels#571", "vllm-project/vllm#57471",
                 "huggingface/transformers#48653"),
    ("PRM-7", MUST, "Hundreds of experts, and hundreds of rows of one expert, are sorted and counted as few are.",
                 "bytedance/flux#186", "ModelTC/LightLLM#1369", "huggingface/transformers#43583"),
    ("PRM-8", MUST, "Zero tokens give no rows, and counts of 0."),
    ("PRM-9", MUST, "More than 65,535 slots are sorted and counted as few are.", "bytedance/flux#186"),
    ("PRM-10", MUST, "Aligned, each expert has its rows rounded up to the multiple; an expert without rows has as many "
                  "multiples as idle_blocks says, none or one."),
    ("PRM-11", MUST, "Aligned, the slot of an expert is exactly one row, among that expert's; every other row, also "
                  "past the last expert, holds a sentinel that is no slot."),
    ("PRM-12", SHOULD, "Of an expert's aligned rows its slots come first, in the order of the tokens, then sentinels."),
)  # fmt: skip
