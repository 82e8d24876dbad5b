"""conformance, balance: the requirements of capacity."""

from conformance.core.register import MUST, SHOULD, chapter

chapter(
    "capacity",
    ("CAP-1", MUST, "A capacity runs every case that it supports; a slot keeps its expert, or has id -1."),
    ("CAP-2", MUST, "No expert keeps more slots than its capacity, however skewed the choice.",
                 "huggingface/transformers#48421", "laekov/fastmoe#199"),
    ("CAP-3", MUST, "The capacity is factor * T * K / E rounded as the spec says, at least min_slots, or the given "
                 "slots; an expert drops nothing before it is full.", "laekov/fastmoe#199",
                 "vllm-project/vllm-ascend#16384"),
    ("CAP-4", MUST, "A capacity beyond the number of tokens drops nothing, and is no error.",
                 "deepspeedai/DeepSpeed#8155", "marin-community/marin#8578"),
    ("CAP-5", MUST, "The capacity holds for each sequence, for each rank or for the whole batch, as scope says."),
    ("CAP-6", MUST, "'first_come' keeps the earlier tokens; 'slot_major' keeps all first slots before any second one, "
                 "and all of these before a third.", "lucidrains/st-moe-pytorch#13"),
    ("CAP-7", MUST, "'by_weight' keeps the largest weights of each expert."),
    ("CAP-8", MUST, "A dropped slot weighs 0; without renormalise the others weigh what they did."),
    ("CAP-9", MUST, "Renormalised weights are divided by the sum of the token's weights, before or after the drop, and "
                 "a token without any slot left weighs 0."),
    ("CAP-10", MUST, "A dropped slot sends no gradient to its weight; the others get that of the weights returned."),
    ("CAP-11", MUST, "A hot expert costs no other expert a slot.", "vllm-project/vllm-ascend#14926"),
    ("CAP-12", MUST, "The same input drops the same slots.", "microsoft/Tutel#26"),
    ("CAP-13", MUST, "With pad_to_capacity each kept slot has one place of its expert, in drop order and without gaps; "
                  "every other place is -1.", "microsoft/Tutel#26", "lucidrains/st-moe-pytorch#13"),
    ("CAP-14", MUST, "A second limit holds for what the first one keeps."),
    ("CAP-15", MUST, "An unused slot and a null choice take no place and are not dropped."),
    ("CAP-16", SHOULD, "Of equal weights 'by_weight' keeps the earlier one."),
    ("CAP-17", MUST, "A capacity changes no array that it is given."),
    ("CAP-18", MUST, "'by_best_weight' keeps all first slots before any second one, and among them those of the tokens "
                  "whose largest weight is larger."),
)  # fmt: skip
