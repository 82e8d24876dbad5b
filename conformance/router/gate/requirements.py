"""conformance, router: the requirements of gate."""

from conformance.core.register import MUST, chapter

chapter(
    "gate",
    ("GAT-1", MUST, "The logits are x @ gate.T.", "vllm-project/vllm#23031", "NVIDIA-NeMo/Automodel#1852"),
    ("GAT-2", MUST, "The learned gate bias is part of the logits.", "vllm-project/vllm#29237",
                 "NVIDIA/Megatron-LM#1971"),
)  # fmt: skip
