"""conformance, sharded: the requirements of layout."""

from conformance.core.register import MUST, SHOULD, chapter

chapter(
    "layout",
    ("LYT-1", MUST, "A sharded layer runs every layout that it supports, and returns for every rank one output for "
                 "each of its tokens.", "vllm-project/vllm#27316"),
    ("LYT-2", MUST, "Every rank's output is that of the one-rank layer for its tokens.", "marin-community/marin#8578",
                 "vllm-project/tpu-inference#2248", "PaddlePaddle/PaddleFleet#360", "sgl-project/sglang#32962",
                 "vllm-project/tpu-inference#2328", "AI-Hypercomputer/maxtext#1767"),
    ("LYT-3", MUST, "The partial sums of tensor ranks are added once, each in its own place.",
                 "vllm-project/vllm-ascend#971", "Avarok-Cybersecurity/atlas#240", "deepspeedai/DeepSpeed#8195",
                 "vllm-project/vllm#23619"),
    ("LYT-4", MUST, "The bias of a down projection is added once, however many tensor ranks share it."),
    ("LYT-5", MUST, "Ranks that hold the same tokens return the same output, bit for bit."),
    ("LYT-6", MUST, "Shared experts add their output once, to the token's own row, however many ranks there are.",
                 "vllm-project/vllm#49366", "vllm-project/vllm#37856", "vllm-project/vllm#29687"),
    ("LYT-7", MUST, "A rank without tokens takes part, and changes no other rank's output.", "vllm-project/vllm#57471",
                 "sgl-project/sglang#40672"),
    ("LYT-8", MUST, "Without tokens on any rank every output is empty.", "vllm-project/vllm#57471"),
    ("LYT-9", MUST, "A token on one rank changes no other token's output, on any rank.",
                 "vllm-project/tpu-inference#2248", "deepseek-ai/DeepEP#700"),
    ("LYT-10", MUST, "A NaN in one token stays in that token, on every rank."),
    ("LYT-11", MUST, "What earlier calls left in buffer rows that nobody sent reaches no output.",
                  "huggingface/transformers#48205", "deepseek-ai/DeepEP#739", "sgl-project/sglang#40187"),
    ("LYT-12", MUST, "The output of padding is 0 on every rank, and padding changes no other token, wherever it "
                  "stands.", "sgl-project/sglang#40672", "vllm-project/vllm#57471"),
    ("LYT-13", MUST, "A slot that a receive buffer did not admit adds exactly 0, and the other weights stay as they "
                  "are.", "AI-Hypercomputer/maxtext#3678"),
    ("LYT-14", MUST, "Chunks of tokens or of features change an output by rounding alone."),
    ("LYT-15", MUST, "The placement of the experts changes an output by rounding alone.",
                  "vllm-project/vllm-ascend#4793", "sgl-project/sglang#12866"),
    ("LYT-16", MUST, "Another layout of the same tokens changes an output by rounding alone.",
                  "vllm-project/vllm-ascend#971", "marin-community/marin#8578"),
    ("LYT-17", SHOULD, "The same input on the same layout gives the same output, bit for bit.",
                  "vllm-project/vllm#45683"),
    ("LYT-18", MUST, "The sharded backward pass runs every layout that it supports, and returns on every rank a "
                  "gradient for its tokens and for each parameter, in full.", "jax-ml/jax#26915"),
    ("LYT-19", MUST, "The gradient of a rank's tokens comes through the experts of every rank.",
                  "NVIDIA-NeMo/Automodel#1260", "jax-ml/jax#26915", "NVIDIA/Megatron-LM#7452"),
    ("LYT-20", MUST, "An expert's matrices get the gradients of the rows of every shard, each once.",
                  "NVIDIA/Megatron-LM#1628", "NVIDIA/Megatron-LM#7452", "NVIDIA/Megatron-LM#5916"),
    ("LYT-21", MUST, "An expert's biases get the gradients of its own rows, each once.",
                  "AI-Hypercomputer/maxtext#3699"),
    ("LYT-22", MUST, "The gate, its bias and the learned scale get the gradients of every shard, each once.",
                  "huggingface/kernels-community#1056", "NVIDIA/Megatron-LM#7452"),
    ("LYT-23", MUST, "The shared experts and their gate get the gradients of every shard, each once.",
                  "vllm-project/vllm#49366"),
    ("LYT-24", MUST, "Every rank has the same gradient of a parameter, bit for bit.", "NVIDIA/Megatron-LM#7452"),
    ("LYT-25", MUST, "An expert without a token on any rank gets gradients of exactly 0, also after a call in which it "
                  "had some.", "openxla/tokamax#887", "openxla/tokamax#1016", "meta-pytorch/MSLK#158"),
    ("LYT-26", MUST, "What earlier calls left in buffer rows that nobody sent reaches no gradient.",
                  "huggingface/transformers#48205", "pytorch/pytorch#193633", "AI-Hypercomputer/maxtext#3699"),
    ("LYT-27", MUST, "A rank without tokens takes part in the backward pass, and has the gradients of the others.",
                  "meta-pytorch/MSLK#158"),
    ("LYT-28", MUST, "Padding adds nothing to any gradient, wherever it stands.", "huggingface/transformers#45621"),
    ("LYT-29", MUST, "A slot that a receive buffer did not admit sends no gradient and gets none.",
                  "AI-Hypercomputer/maxtext#3678"),
    ("LYT-30", MUST, "Chunks of tokens or of features change a gradient by rounding alone."),
    ("LYT-31", MUST, "Where all tokens choose the experts of one rank, and fill it, every output is still that of the "
                  "one-rank layer.", "AI-Hypercomputer/maxtext#1767", "deepseek-ai/DeepEP#427"),
)  # fmt: skip
