"""conformance, the register of layouts: the requirements of the stages dispatch and layout, as plain rows.

Each row: id, level, sentence, links. `conformance.requirements` makes requirements of them.
"""

M, S = "MUST", "SHOULD"

DISPATCH = (
    ("DSP-1", M, "Dispatch runs every layout that it supports, and returns for every rank the sizes it sends and "
                 "receives, the rows of each local expert and where each row is from, as integers.",
                 "huggingface/transformers#48653"),
    ("DSP-2", M, "The slot of an expert is a row of the rank that owns the expert, exactly once, and of no other "
                 "rank.", "PaddlePaddle/PaddleFleet#360", "sgl-project/sglang#32962", "sgl-project/sglang#40672",
                 "sgl-project/sglang#12866"),
    ("DSP-3", M, "What rank a sends to rank b is what rank b receives from rank a.", "lightseekorg/tokenspeed#419"),
    ("DSP-4", M, "A rank sends to another exactly the rows that the strategy has travel between them.",
                 "lightseekorg/tokenspeed#419"),
    ("DSP-5", M, "Each local expert has the rows of its own global id, 0 included.", "vllm-project/vllm-ascend#4793",
                 "AI-Hypercomputer/maxtext#3678"),
    ("DSP-6", M, "A rank's rows are sorted by local expert.", "cusp-ai-oss/kUPS#186"),
    ("DSP-7", S, "The rows of one expert are in the order in which they arrive: by sender, and of one sender by token.",
                 "vllm-project/vllm#45683"),
    ("DSP-8", M, "A rank without tokens takes part: it sends nothing, and receives what is its own.",
                 "vllm-project/vllm#57471", "sgl-project/sglang#40672"),
    ("DSP-9", M, "Unused slots (-1) and null experts are no row of any rank, also where no slot is used.",
                 "huggingface/transformers#48653", "deepseek-ai/DeepEP#739", "vllm-project/vllm#57471"),
    ("DSP-10", M, "Without a buffer factor no load loses a row, also where one expert or one rank gets everything.",
                  "AI-Hypercomputer/maxtext#1767", "deepseek-ai/DeepEP#427"),
    ("DSP-11", M, "A receive buffer that is too small admits the sources in rank order, each source's rows in "
                  "(expert, token) order.", "AI-Hypercomputer/maxtext#3678"),
    ("DSP-12", M, "Rows that a buffer does not admit are reported.", "AI-Hypercomputer/maxtext#3678"),
    ("DSP-13", M, "The plan of a group of expert ranks depends on its own tokens alone.",
                  "marin-community/marin#8578", "vllm-project/vllm#23619"),
    ("DSP-14", M, "With a permuted placement each rank owns the experts of its own places.",
                  "vllm-project/vllm-ascend#4793", "sgl-project/sglang#12866"),
    ("DSP-15", M, "Nothing of an earlier plan is left in a later one.", "deepseek-ai/DeepEP#739"),
    ("DSP-16", M, "A layout that does not divide the experts is refused.", "vllm-project/vllm-ascend#16384"),
)  # fmt: skip

LAYOUT = (
    ("LYT-1", M, "A sharded layer runs every layout that it supports, and returns for every rank one output for each "
                 "of its tokens.", "vllm-project/vllm#27316"),
    ("LYT-2", M, "Every rank's output is that of the one-rank layer for its tokens.", "marin-community/marin#8578",
                 "vllm-project/tpu-inference#2248", "PaddlePaddle/PaddleFleet#360", "sgl-project/sglang#32962",
                 "vllm-project/tpu-inference#2328", "AI-Hypercomputer/maxtext#1767"),
    ("LYT-3", M, "The partial sums of tensor ranks are added once, each in its own place.",
                 "vllm-project/vllm-ascend#971", "Avarok-Cybersecurity/atlas#240", "deepspeedai/DeepSpeed#8195",
                 "vllm-project/vllm#23619"),
    ("LYT-4", M, "The bias of a down projection is added once, however many tensor ranks share it."),
    ("LYT-5", M, "Ranks that hold the same tokens return the same output, bit for bit."),
    ("LYT-6", M, "Shared experts add their output once, to the token's own row, however many ranks there are.",
                 "vllm-project/vllm#49366", "vllm-project/vllm#37856", "vllm-project/vllm#29687"),
    ("LYT-7", M, "A rank without tokens takes part, and changes no other rank's output.", "vllm-project/vllm#57471",
                 "sgl-project/sglang#40672"),
    ("LYT-8", M, "Without tokens on any rank every output is empty.", "vllm-project/vllm#57471"),
    ("LYT-9", M, "A token on one rank changes no other token's output, on any rank.",
                 "vllm-project/tpu-inference#2248", "deepseek-ai/DeepEP#700"),
    ("LYT-10", M, "A NaN in one token stays in that token, on every rank."),
    ("LYT-11", M, "What earlier calls left in buffer rows that nobody sent reaches no output.",
                  "huggingface/transformers#48205", "deepseek-ai/DeepEP#739", "sgl-project/sglang#40187"),
    ("LYT-12", M, "The output of padding is 0 on every rank, and padding changes no other token, wherever it stands.",
                  "sgl-project/sglang#40672", "vllm-project/vllm#57471"),
    ("LYT-13", M, "A slot that a receive buffer did not admit adds exactly 0, and the other weights stay as they are.",
                  "AI-Hypercomputer/maxtext#3678"),
    ("LYT-14", M, "Chunks of tokens or of features change an output by rounding alone."),
    ("LYT-15", M, "The placement of the experts changes an output by rounding alone.",
                  "vllm-project/vllm-ascend#4793", "sgl-project/sglang#12866"),
    ("LYT-16", M, "Another layout of the same tokens changes an output by rounding alone.",
                  "vllm-project/vllm-ascend#971", "marin-community/marin#8578"),
    ("LYT-17", S, "The same input on the same layout gives the same output, bit for bit.", "vllm-project/vllm#45683"),
    ("LYT-18", M, "The sharded backward pass runs every layout that it supports, and returns on every rank a gradient "
                  "for its tokens and for each parameter, in full.", "jax-ml/jax#26915"),
    ("LYT-19", M, "The gradient of a rank's tokens comes through the experts of every rank.",
                  "NVIDIA-NeMo/Automodel#1260", "jax-ml/jax#26915", "NVIDIA/Megatron-LM#7452"),
    ("LYT-20", M, "An expert's matrices get the gradients of the rows of every shard, each once.",
                  "NVIDIA/Megatron-LM#1628", "NVIDIA/Megatron-LM#7452", "NVIDIA/Megatron-LM#5916"),
    ("LYT-21", M, "An expert's biases get the gradients of its own rows, each once.", "AI-Hypercomputer/maxtext#3699"),
    ("LYT-22", M, "The gate, its bias and the learned scale get the gradients of every shard, each once.",
                  "huggingface/kernels-community#1056", "NVIDIA/Megatron-LM#7452"),
    ("LYT-23", M, "The shared experts and their gate get the gradients of every shard, each once.",
                  "vllm-project/vllm#49366"),
    ("LYT-24", M, "Every rank has the same gradient of a parameter, bit for bit.", "NVIDIA/Megatron-LM#7452"),
    ("LYT-25", M, "An expert without a token on any rank gets gradients of exactly 0, also after a call in which it "
                  "had some.", "openxla/tokamax#887", "openxla/tokamax#1016", "meta-pytorch/MSLK#158"),
    ("LYT-26", M, "What earlier calls left in buffer rows that nobody sent reaches no gradient.",
                  "huggingface/transformers#48205", "pytorch/pytorch#193633", "AI-Hypercomputer/maxtext#3699"),
    ("LYT-27", M, "A rank without tokens takes part in the backward pass, and has the gradients of the others.",
                  "meta-pytorch/MSLK#158"),
    ("LYT-28", M, "Padding adds nothing to any gradient, wherever it stands.", "huggingface/transformers#45621"),
    ("LYT-29", M, "A slot that a receive buffer did not admit sends no gradient and gets none.",
                  "AI-Hypercomputer/maxtext#3678"),
    ("LYT-30", M, "Chunks of tokens or of features change a gradient by rounding alone."),
    ("LYT-31", M, "Where all tokens choose the experts of one rank, and fill it, every output is still that of the "
                  "one-rank layer.", "AI-Hypercomputer/maxtext#1767", "deepseek-ai/DeepEP#427"),
)  # fmt: skip
