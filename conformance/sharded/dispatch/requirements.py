"""conformance, sharded: the requirements of dispatch."""

from conformance.core.register import MUST, SHOULD, chapter

chapter(
    "dispatch",
    ("DSP-1", MUST, "Dispatch runs every layout that it supports, and returns for every rank the sizes it sends and "
                 "receives, the rows of each local expert and where each row is from, as integers.",
                 "huggingface/transformers#48653"),
    ("DSP-2", MUST, "The slot of an expert is a row of the rank that owns the expert, exactly once, and of no other "
                 "rank.", "PaddlePaddle/PaddleFleet#360", "sgl-project/sglang#32962", "sgl-project/sglang#40672",
                 "sgl-project/sglang#12866"),
    ("DSP-3", MUST, "What rank a sends to rank b is what rank b receives from rank a.", "lightseekorg/tokenspeed#419"),
    ("DSP-4", MUST, "A rank sends to another exactly the rows that the strategy has travel between them.",
                 "lightseekorg/tokenspeed#419"),
    ("DSP-5", MUST, "Each local expert has the rows of its own global id, 0 included.", "vllm-project/vllm-ascend#4793",
                 "AI-Hypercomputer/maxtext#3678"),
    ("DSP-6", MUST, "A rank's rows are sorted by local expert.", "cusp-ai-oss/kUPS#186"),
    ("DSP-7", SHOULD, "The rows of one expert are in the order in which they arrive: by sender, and of one sender by "
                 "token.", "vllm-project/vllm#45683"),
    ("DSP-8", MUST, "A rank without tokens takes part: it sends nothing, and receives what is its own.",
                 "vllm-project/vllm#57471", "sgl-project/sglang#40672"),
    ("DSP-9", MUST, "Unused slots (-1) and null experts are no row of any rank, also where no slot is used.",
                 "huggingface/transformers#48653", "deepseek-ai/DeepEP#739", "vllm-project/vllm#57471"),
    ("DSP-10", MUST, "Without a buffer factor no load loses a row, also where one expert or one rank gets everything.",
                  "AI-Hypercomputer/maxtext#1767", "deepseek-ai/DeepEP#427"),
    ("DSP-11", MUST, "A receive buffer that is too small admits the sources in rank order, each source's rows in "
                  "(expert, token) order.", "AI-Hypercomputer/maxtext#3678"),
    ("DSP-12", MUST, "Rows that a buffer does not admit are reported.", "AI-Hypercomputer/maxtext#3678"),
    ("DSP-13", MUST, "The plan of a group of expert ranks depends on its own tokens alone.",
                  "marin-community/marin#8578", "vllm-project/vllm#23619"),
    ("DSP-14", MUST, "With a permuted placement each rank owns the experts of its own places.",
                  "vllm-project/vllm-ascend#4793", "sgl-project/sglang#12866"),
    ("DSP-15", MUST, "Nothing of an earlier plan is left in a later one.", "deepseek-ai/DeepEP#739"),
    ("DSP-16", MUST, "A layout that does not divide the experts is refused.", "vllm-project/vllm-ascend#16384"),
    ("DSP-17", MUST, "ring_of_experts with a buffer that is too small keeps the first rows of a rank in (expert, rank, "
                  "token) order, experts by place."),
    ("DSP-18", MUST, "replicated_ragged sends nothing to the experts; all that a rank's own experts return it sends to "
                  "every rank, itself included."),
)  # fmt: skip
