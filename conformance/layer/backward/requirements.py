"""conformance, layer: the requirements of backward."""

from conformance.core.register import MUST, chapter

chapter(
    "backward",
    ("BWD-1", MUST, "The backward pass runs every case that it supports, and returns a gradient for the tokens and "
                 "for each parameter that the layer has.", "jax-ml/jax#26915"),
    ("BWD-2", MUST, "The gradient of the tokens is that of every path: experts, gate, shared experts.",
                 "jax-ml/jax#26915", "NVIDIA-NeMo/Automodel#1260"),
    ("BWD-3", MUST, "Each expert's matrices get the gradients of its own rows.", "openxla/tokamax#887",
                 "NVIDIA/Megatron-LM#7452"),
    ("BWD-4", MUST, "Each expert's biases get the gradients of its own rows.", "AI-Hypercomputer/maxtext#3699"),
    ("BWD-5", MUST, "The gate, its bias and the learned scale get the gradients of the weights.",
                 "NVIDIA/Megatron-LM#894", "davidmrau/mixture-of-experts#27", "huggingface/kernels-community#1056"),
    ("BWD-6", MUST, "An expert without tokens gets gradients of exactly 0, also after a call in which it had some.",
                 "openxla/tokamax#887", "openxla/tokamax#1016", "meta-pytorch/MSLK#158"),
    ("BWD-7", MUST, "expert_bias gets no gradient: it takes part in the choice alone."),
    ("BWD-8", MUST, "With top_k 1 and route_norm the gate gets no gradient, since every weight is a constant.",
                 "jingyaogong/minimind#859"),
    ("BWD-9", MUST, "Padding adds nothing to any gradient, whatever its rows hold, on any call.",
                 "AI-Hypercomputer/maxtext#3699", "pytorch/pytorch#193633", "huggingface/transformers#48205"),
    ("BWD-10", MUST, "The shared experts and their gate get the gradients of every token."),
    ("BWD-11", MUST, "The gradients of a batch are the sums of those of its parts.", "NVIDIA-NeMo/Automodel#1260"),
    ("BWD-12", MUST, "Zero tokens give gradients of 0.", "meta-pytorch/MSLK#158"),
    ("BWD-13", MUST, "A slot that a capacity dropped sends no gradient, and the slots that it kept send theirs."),
    ("BWD-14", MUST, "A capacity that nothing exceeds changes no gradient, bit for bit."),
    ("BWD-15", MUST, "Given weights are constants: they send no gradient to the gate."),
    ("BWD-16", MUST, "The backward pass changes no array that it is given."),
    ("BWD-17", MUST, "Rows aligned to a multiple change no gradient: that of a padding row is 0, and no bias gets any "
                  "of it.", "AI-Hypercomputer/maxtext#3699"),
    ("BWD-18", MUST, "Under expert_choice the choice is a constant: gradients are those of the slots that experts "
                  "took, and an unused slot sends none."),
    ("BWD-19", MUST, "Under expert_choice a token that no expert took adds nothing to the gradients of the gate and "
                  "of the routed experts."),
)  # fmt: skip
