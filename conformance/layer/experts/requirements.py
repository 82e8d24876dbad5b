"""conformance, layer: the requirements of experts."""

from conformance.core.register import MUST, chapter

chapter(
    "experts",
    ("EXP-1", MUST, "The experts run every case that they support, and return one output for each row.",
                 "ml-explore/mlx-examples#671"),
    ("EXP-2", MUST, "A row's output is down(act(gate(x)) * up(x)) of its own expert, or down(act(up(x))) without "
                 "a gate.", "NVIDIA/cutlass#3497", "axolotl-ai-cloud/axolotl#3410", "Dao-AILab/sonic-moe#63"),
    ("EXP-3", MUST, "alpha, up_offset and clamp apply to every row as the spec says, to a single row too.",
                 "deepseek-ai/DeepGEMM#87", "sgl-project/sglang#16972", "sgl-project/sglang#39939"),
    ("EXP-4", MUST, "Each row gets the biases of its own expert, once."),
    ("EXP-5", MUST, "Matrices are read in their own layout at sizes where another one would fit: F == D, 2F == D.",
                 "huggingface/transformers#47031", "vllm-project/vllm#29273", "vllm-project/tpu-inference#2683",
                 "vllm-project/vllm#47874"),
    ("EXP-6", MUST, "An expert without rows changes nothing: first, last, between others, or all but one.",
                 "openxla/tokamax#1016", "NVIDIA/cutlass#3497"),
    ("EXP-7", MUST, "Rows past the counts belong to nobody: NaN and 1e30 there reach no other row, on any call.",
                 "pytorch/torchtitan#1237", "huggingface/transformers#48205", "huggingface/transformers#45621"),
    ("EXP-8", MUST, "A row's output depends on that row alone: a NaN, or other numbers, in other rows change "
                 "nothing.", "vllm-project/tpu-inference#2248"),
    ("EXP-9", MUST, "Zero rows give zero outputs, of shape (0, D).", "vllm-project/vllm#57471"),
    ("EXP-10", MUST, "Experts a hundred times larger or smaller than others are as exact as these.",
                  "aws-neuron/neuronx-distributed-inference#35", "vllm-project/vllm-ascend#16806"),
    ("EXP-11", MUST, "situ is beta * tanh(gate / beta) * sigmoid(gate), and its up half is linear_beta * tanh(up / "
                  "linear_beta) where it has one.", "ai-dynamo/aiconfigurator#1435"),
    ("EXP-12", MUST, "Rows of zeros that pad every expert up to a multiple change no other row."),
)  # fmt: skip
