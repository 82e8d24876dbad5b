"""conformance, layer: the requirements of layer."""

from conformance.core.register import MUST, SHOULD, chapter

chapter(
    "layer",
    ("LAY-1", MUST, "A layer runs every case that it supports, and returns one output for each token.",
                 "vllm-project/vllm#27316"),
    ("LAY-2", MUST, "A token's output is the weighted sum of its experts, and the shared output where there is one.",
                 "tjake/Jlama#201", "marin-community/marin#8578"),
    ("LAY-3", MUST, "Zero tokens give an output of shape (0, D).", "vllm-project/vllm#57471"),
    ("LAY-4", MUST, "A token's output depends on that token alone, whatever its batch and its place in it.",
                 "sgl-project/sglang#16972", "vllm-project/tpu-inference#2248", "deepseek-ai/DeepEP#700"),
    ("LAY-5", MUST, "A NaN in one token stays in that token.", "vllm-project/vllm#39391"),
    ("LAY-6", MUST, "The output of a padding token is 0, whatever its row holds.", "vllm-project/vllm#57471",
                 "marin-community/marin#8953"),
    ("LAY-7", MUST, "Padding changes no other token, whatever its rows hold.", "huggingface/transformers#45621",
                 "sgl-project/sglang#40672"),
    ("LAY-8", MUST, "Every shared expert adds its output exactly once, to every token.", "vllm-project/vllm#49366",
                 "sgl-project/sglang#25974"),
    ("LAY-9", MUST, "The shared output is not scaled by route_scale or output_scale.", "vllm-project/vllm#29687",
                 "sgl-project/sglang#28237"),
    ("LAY-10", MUST, "shared.gate 'sigmoid' multiplies the shared output, and nothing else, by the sigmoid of the "
                  "token's own logit."),
    ("LAY-11", MUST, "shared.combine 'average' halves the sum of routed and shared output."),
    ("LAY-12", MUST, "A weight on the input multiplies what the expert sees, and not what it returns.",
                  "NVIDIA/TensorRT-LLM#3492", "areal-project/AReaL#940", "vllm-project/vllm#43694"),
    ("LAY-13", MUST, "An identity null expert adds the token times its weight; a skipped one adds nothing."),
    ("LAY-14", MUST, "The routed output doubles where every expert's down projection and its bias double.",
                  "tjake/Jlama#201"),
    ("LAY-15", MUST, "Renaming ungrouped experts, gate rows and parameters alike, changes no output."),
    ("LAY-16", SHOULD, "The same input gives the same output, bit for bit.", "vllm-project/vllm#45683",
                  "sgl-project/sglang#40187"),
    ("LAY-17", MUST, "A layer routes as its router says, whatever logits and expert_bias are: large, small, "
                  "close, negative.", "huggingface/transformers#45440", "vllm-project/vllm#37605"),
    ("LAY-18", MUST, "A capacity that nothing exceeds changes nothing, bit for bit."),
    ("LAY-19", MUST, "A slot that a capacity dropped adds nothing, and the slots that it kept add what they did.",
                  "sgl-project/sglang#40672"),
    ("LAY-20", MUST, "Given weights are the weights of their slots: neither normed nor scaled again, and none for an "
                  "unused slot.", "radixark/miles#2722"),
    ("LAY-21", MUST, "A layer changes no array that it is given."),
    ("LAY-22", MUST, "Rows aligned to a multiple change no output."),
    ("LAY-23", MUST, "With batch_invariant a token's output has the same bits alone and in any batch: another number "
                  "of tokens, another order, other tokens beside it.", "vllm-project/vllm#57016"),
    ("LAY-24", MUST, "With batch_invariant the output is that of the layer, within rounding."),
    ("LAY-25", MUST, "Shared experts inside the routed slots, ids num_experts and on behind each token's own, with the "
                  "weight that cancels the factor on the routed output, give the output of the layer."),
    ("LAY-26", MUST, "Counts of a layer in that form are of its routed experts alone."),
    ("LAY-27", MUST, "A layer made of a dense feed-forward, its experts copies or parts of it, returns what that does "
                  "until it is trained, where a token's weights sum to a constant and it has each part as often."),
    ("LAY-28", MUST, "What a layer returned stays as it is when it is given other tokens."),
)  # fmt: skip
