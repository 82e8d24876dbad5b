"""conformance, layer: the requirements of combine."""

from conformance.core.register import MUST, chapter

chapter(
    "combine",
    ("CMB-1", MUST, "Combine runs every case that it supports, and returns one sum for each token."),
    ("CMB-2", MUST, "A token's routed output is the sum of its slots' rows, each times its slot's weight, times "
                 "output_scale.", "tjake/Jlama#201", "deepseek-ai/DeepEP#700"),
    ("CMB-3", MUST, "A slot that is no row adds nothing, whatever its weight.", "huggingface/transformers#45621"),
    ("CMB-4", MUST, "The sum is linear in the weights.", "tjake/Jlama#201"),
    ("CMB-5", MUST, "A weight that is on the input is not applied again.", "vllm-project/vllm#43694",
                 "NVIDIA/TensorRT-LLM#3492", "areal-project/AReaL#940"),
    ("CMB-6", MUST, "The order of the rows of one expert changes no sum by more than rounding.",
                 "vllm-project/vllm#45683"),
    ("CMB-7", MUST, "With top_k 1 and an output_scale the sum is the scaled row.", "sgl-project/sglang#40187"),
    ("CMB-8", MUST, "Without any row the sums are 0."),
)  # fmt: skip
