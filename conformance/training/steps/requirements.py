"""conformance, training: the requirements of steps."""

from conformance.core.register import MUST, chapter

chapter(
    "steps",
    ("STP-1", MUST, "Training runs every script that it supports, and each event returns integer counts and a bias for "
                 "every layer, and a pass its loss where there is one.", "NVIDIA/Megatron-LM#5573",
                 "NVIDIA-NeMo/RL#3523"),
    ("STP-2", MUST, "Once the layers are built, their counts are 0 and their biases those of the parameters, or 0, "
                 "whatever the memory held before.", "PrimeIntellect-ai/prime-rl#2953"),
    ("STP-3", MUST, "A training pass counts every slot of its tokens, each in the layer that chose it."),
    ("STP-4", MUST, "A padding token is counted in no layer.", "NVIDIA/Megatron-LM#6114", "NVIDIA/Megatron-LM#2121",
                 "vllm-project/vllm#38128"),
    ("STP-5", MUST, "Evaluation changes no count and no bias.", "pytorch/torchtitan#4148", "databricks/megablocks#69"),
    ("STP-6", MUST, "A micro-batch that the backward pass runs again is counted once, in every layer.",
                 "pytorch/torchtitan#1593", "pytorch/torchtitan#4772"),
    ("STP-7", MUST, "The counts of the micro-batches of a step add up, and no bias moves before the step.",
                 "pytorch/torchtitan#1304", "PrimeIntellect-ai/prime-rl#2267"),
    ("STP-8", MUST, "A step moves the bias of every layer, each by the counts of its own layer and by its own rule.",
                 "pytorch/torchtitan#4494", "radixark/Megatron-LM#55"),
    ("STP-9", MUST, "A layer without an update keeps its bias, and the layers after it move.",
                 "pytorch/torchtitan#3686"),
    ("STP-10", MUST, "A step sets the counts of every layer to 0, those of layers without an update too, and the next "
                 "step begins there.", "pytorch/torchtitan#3686", "pytorch/torchtitan#4494",
                 "PrimeIntellect-ai/prime-rl#2267"),
    ("STP-11", MUST, "A pass after a step chooses with the biases that the step has moved."),
    ("STP-12", MUST, "A layer that counted no token in a step keeps its bias, whatever the other layers counted."),
    ("STP-13", MUST, "A model without such layers runs every script too, and its states hold no layer."),
    ("STP-14", MUST, "Layers that are spread over pipeline ranks have the states that they have in one process; a rank "
                 "without a layer takes part.", "pytorch/torchtitan#1593"),
    ("STP-15", MUST, "The balance loss of a pass is the sum of those of its layers, or that of the tokens of all "
                 "layers as one batch, as over_layers says, in training and in evaluation.",
                 "huggingface/transformers#28255", "huggingface/transformers#31464"),
    ("STP-16", MUST, "A forced choice is counted as it is; neither the router's own choice nor its bias is asked.",
                 "PrimeIntellect-ai/prime-rl#2953", "verl-project/verl#7524"),
    ("STP-17", MUST, "A step after forced choices moves the biases by the counts of these choices.",
                 "PrimeIntellect-ai/prime-rl#2953"),
    ("STP-18", MUST, "Whatever a script has together, each of its states is the reference's."),
    ("STP-19", MUST, "Under quantile balancing a step sets the biases of a layer by what the tokens of its training "
                 "passes needed, all micro-batches together and each once; padding, evaluation and passes with a "
                 "forced choice add nothing, and the next step begins anew.", "pytorch/torchtitan#4412"),
    ("STP-20", MUST, "A rule with momentum goes on from the last move of its layer; a layer that is built had none."),
)  # fmt: skip
