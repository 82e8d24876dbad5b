"""conformance, router: the requirements of score."""

from conformance.core.register import MUST, SHOULD, chapter

chapter(
    "score",
    ("SCR-1", MUST, "A softmax score is exp(logit), up to the factor that makes the scores of all experts sum to 1.",
                 "ggml-org/llama.cpp#16711"),
    ("SCR-2", MUST, "A sigmoid score is 1 / (1 + exp(-logit)), of its own logit alone.",
                 "ggml-org/llama.cpp#18980", "MetaX-MACA/vLLM-metax#270"),
    ("SCR-3", MUST, "A sqrtsoftplus score is sqrt(log(1 + exp(logit))).", "flashinfer-ai/flashinfer#5190"),
    ("SCR-4", MUST, "With score_over 'selected' the softmax runs over the selected logits alone.",
                 "Lightning-AI/litgpt#2014", "ml-explore/mlx-swift-lm#228"),
    ("SCR-5", MUST, "Logits are scaled, then soft-capped, before they are scored."),
    ("SCR-6", MUST, "One constant added to all logits of a token changes no softmax routing.",
                 "vllm-project/vllm#37605"),
    ("SCR-7", MUST, "Logits of any finite size are scored right.", "NVIDIA/Megatron-LM#1545"),
    ("SCR-8", SHOULD, "Low-precision logits are scored and ranked in float32 or wider.", "vllm-project/vllm#14027",
                 "NVIDIA-NeMo/Automodel#3650"),
    ("SCR-9", MUST, "A logit of -inf adds nothing to any score.", "onnx/onnx#7754"),
    ("SCR-10", MUST, "Low-precision logits are taken as they are given: a selection that no rounding of scores and "
                  "bias to their dtype explains is none of theirs.", "vllm-project/vllm#14027"),
    ("SCR-11", MUST, "With router_dtype bfloat16 or float16 logits, scores and weights are each the nearest number "
                  "of that dtype.", "NVIDIA-NeMo/Automodel#3650"),
    ("SCR-13", MUST, "Noise on the logits is what is given, factors and then a summand, before all else; choice and "
                  "weights are those of the noisy logits."),
    ("SCR-12", MUST, "With router_dtype float64 scores and weights have the accuracy of float64."),
    ("SCR-14", MUST, "A relu score is max(logit, 0), of its own logit alone, and no share of a sum."),
)  # fmt: skip
