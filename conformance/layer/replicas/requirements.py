"""conformance, layer: the requirements of replicas."""

from conformance.core.register import MUST, chapter

chapter(
    "replicas",
    ("REP-1", MUST, "The slot of an expert goes to one of its own places; unused slots stay -1, and null experts are "
                 "numbered on past the places.", "NVIDIA/TensorRT-LLM#18397"),
    ("REP-2", MUST, "choice 'by_slot' takes replica (t * K + k) mod R of the expert; 'in_turn' deals out an expert's "
                 "slots in their order, so that its replicas have as many, up to one."),
    ("REP-3", MUST, "The count of an expert is the sum of those of its places, exact."),
    ("REP-4", MUST, "The gradient of an expert is the sum of those of its places.", "NVIDIA/Megatron-LM#6274"),
)  # fmt: skip
