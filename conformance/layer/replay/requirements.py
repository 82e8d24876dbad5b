"""conformance, layer: the requirements of replay."""

from conformance.core.register import MUST, chapter

chapter(
    "replay",
    ("RPL-1", MUST, "A replay runs every case that it supports, and returns one output for each token."),
    ("RPL-2", MUST, "A record without weights is replayed with this router's weights for the recorded experts.",
                 "radixark/miles#2722"),
    ("RPL-3", MUST, "A record with weights is replayed with these, which are neither normed nor scaled again.",
                 "radixark/miles#2722"),
    ("RPL-4", MUST, "The experts of a replay are the recorded ones, whatever the logits and expert_bias.",
                 "radixark/miles#3146"),
    ("RPL-5", MUST, "An unused slot of a record adds nothing, and changes no other slot's choice.",
                 "radixark/miles#645", "PrimeIntellect-ai/prime-rl#1807"),
    ("RPL-6", MUST, "Padding of a record has the output 0, and the tokens beside it, also after it, are replayed as "
                 "recorded.", "radixark/miles#645", "AI-Hypercomputer/maxtext#5266"),
    ("RPL-7", MUST, "Each token takes its own row of the record: tokens and rows in another order give the outputs in "
                 "that order.", "radixark/miles#3146", "AI-Hypercomputer/maxtext#5266"),
    ("RPL-8", MUST, "A record holds the experts and the final weights of the run, slot by slot; padding has none.",
                 "sgl-project/sglang#36404"),
    ("RPL-9", MUST, "A run that is recorded, carried over as plain arrays and replayed gives its own output again.",
                 "radixark/miles#2722"),
)  # fmt: skip
