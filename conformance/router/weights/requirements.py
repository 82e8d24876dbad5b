"""conformance, router: the requirements of weights."""

from conformance.core.register import MUST, SHOULD, chapter

chapter(
    "weights",
    ("WGT-1", MUST, "expert_bias never enters a weight.", "huggingface/transformers#39581",
                 "AI-Hypercomputer/maxtext#1492", "MetaX-MACA/vLLM-metax#270"),
    ("WGT-2", MUST, "With route_norm the weights of a token sum to 1 (before route_scale), in the ratio of "
                 "its scores.",
                 "pytorch/torchtitan#1418", "pytorch/torchtitan#1448", "flagos-ai/FlagGems#5123",
                 "huggingface/transformers#41151"),
    ("WGT-3", MUST, "Without route_norm the weights are the scores themselves.", "lablup/mlxcel#391",
                 "sgl-project/sglang#35160"),
    ("WGT-4", MUST, "Weights are multiplied by route_scale exactly once, after the norm.", "vllm-project/vllm#45037"),
    ("WGT-5", MUST, "The divisor is norm + norm_eps, or max(norm, norm_eps), as norm_form says.",
                 "NVIDIA/Megatron-LM#1545"),
    ("WGT-6", MUST, "The norm is the p-norm of order norm_p."),
    ("WGT-7", MUST, "With top_k 1 and route_norm every weight is route_scale.", "databricks/megablocks#87"),
    ("WGT-8", MUST, "A weight stands in the slot of its expert.", "radixark/miles#2722"),
    ("WGT-9", MUST, "The learned scale multiplies each weight once, by the id of its expert, after the norm.",
                 "onnxruntime/mobius#546"),
    ("WGT-10", MUST, "Weights are finite for finite logits."),
    ("WGT-11", MUST, "An unused slot weighs 0 and takes no part in a norm.", "radixark/miles#645"),
    ("WGT-12", MUST, "A skipped choice weighs 0, a zero expert before the norm; an identity choice weighs its score."),
    ("WGT-13", MUST, "Router-scored shared experts weigh their own scores, and join the norm where the spec says."),
    ("WGT-14", MUST, "With weights_from 'masked_scores' an expert of a dropped group weighs 0."),
    ("WGT-15", MUST, "sparsemixer weighs slot j by a softmax over the band below the j-th best logit."),
    ("WGT-16", SHOULD, "They are finite, too, where every selected score underflows to 0.", "NVIDIA/Megatron-LM#1545"),
    ("WGT-17", MUST, "Fields, logits, biases, dtypes and sizes combine: ids and weights are those of every stage in "
                  "order.", "MetaX-MACA/vLLM-metax#270"),
    ("WGT-18", MUST, "Weights of ids that no score chose, of a table or given, are finite where their scores all "
                  "underflow, as they do at ordinary logits.", "NVIDIA/Megatron-LM#1545"),
)  # fmt: skip
