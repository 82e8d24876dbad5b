"""conformance, the register: every requirement, with a permanent id. SPEC.md is generated from it.

Ids are never reused. MUST fails a run; SHOULD is reported and leaves the exit status alone.
"""

from dataclasses import dataclass

from conformance.balance import requirements as load
from conformance.sharded import requirements as layouts

SPEC_VERSION = "2026.11"

STAGES = (
    "config", "run", "gate", "score", "groups", "select", "weights",
    "permute", "experts", "combine", "layer", "backward", "dispatch", "layout",
    "load", "capacity", "mask", "replay",
)  # fmt: skip
"""In the order of the data; an earlier stage is accused first."""


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """One sentence that states a fact about every correct implementation."""

    id: str
    level: str
    stage: str
    sentence: str
    links: tuple[str, ...] = ()
    """Where it went wrong in public."""
    since: str = SPEC_VERSION


def _stage(stage: str, *rows: tuple) -> dict[str, Requirement]:
    return {
        id: Requirement(id=id, level=level, stage=stage, sentence=sentence, links=tuple(links))
        for id, level, sentence, *links in rows
    }


M, S = "MUST", "SHOULD"

REQUIREMENTS: dict[str, Requirement] = {
    **_stage("config",
        ("CFG-1", M, "A top_k that the kept groups cannot fill is refused.", "huggingface/transformers#48647"),
        ("CFG-2", M, "Groups that do not divide the experts, more kept groups than groups, and groups smaller than "
                     "group_score_k are refused.", "huggingface/transformers#48647"),
        ("CFG-3", M, "An unknown score function is refused, not replaced.", "flashinfer-ai/flashinfer#5190",
                     "vllm-project/vllm#34673"),
        ("CFG-4", M, "A top_k larger than the number of experts is refused.", "flashinfer-ai/flashinfer#3840"),
    ),
    **_stage("run",
        ("RUN-1", M, "A router runs every case that it says it supports.", "ml-explore/mlx-examples#671"),
        ("RUN-2", M, "Zero tokens give empty results of shape (0, K)."),
        ("RUN-3", M, "One token's routing depends on that token alone, not on its batch.",
                     "databricks/megablocks#87"),
        ("RUN-4", M, "The same input gives the same output, bit for bit.", "vllm-project/vllm#55514",
                     "flagos-ai/FlagGems#5123", "pytorch/pytorch#196177"),
        ("RUN-5", M, "A NaN in one token's logits is refused, or leaves every other token as it is and every id "
                     "distinct and in range.", "sgl-project/sglang#30079", "vllm-project/vllm#39391",
                     "intel/torch-xpu-ops#4839", "jax-ml/jax#21397"),
        ("RUN-6", M, "A padding token has ids -1 and weights 0, whatever its row holds, and changes no other token.",
                     "vllm-project/vllm#50759", "sgl-project/sglang#36404", "radixark/miles#645"),
    ),
    **_stage("gate",
        ("GAT-1", M, "The logits are x @ gate.T.", "vllm-project/vllm#23031", "NVIDIA-NeMo/Automodel#1852"),
        ("GAT-2", M, "The learned gate bias is part of the logits.", "vllm-project/vllm#29237",
                     "NVIDIA/Megatron-LM#1971"),
    ),
    **_stage("score",
        ("SCR-1", M, "A softmax score is exp(logit), up to the factor that makes the scores of all experts sum to 1.",
                     "ggml-org/llama.cpp#16711"),
        ("SCR-2", M, "A sigmoid score is 1 / (1 + exp(-logit)), of its own logit alone.",
                     "ggml-org/llama.cpp#18980", "MetaX-MACA/vLLM-metax#270"),
        ("SCR-3", M, "A sqrtsoftplus score is sqrt(log(1 + exp(logit))).", "flashinfer-ai/flashinfer#5190"),
        ("SCR-4", M, "With score_over 'selected' the softmax runs over the selected logits alone.",
                     "Lightning-AI/litgpt#2014", "ml-explore/mlx-swift-lm#228"),
        ("SCR-5", M, "Logits are scaled, then soft-capped, before they are scored."),
        ("SCR-6", M, "One constant added to all logits of a token changes no softmax routing.",
                     "vllm-project/vllm#37605"),
        ("SCR-7", M, "Logits of any finite size are scored right.", "NVIDIA/Megatron-LM#1545"),
        ("SCR-8", S, "Low-precision logits are scored and ranked in float32 or wider.", "vllm-project/vllm#14027",
                     "NVIDIA-NeMo/Automodel#3650"),
        ("SCR-9", M, "A logit of -inf adds nothing to any score.", "onnx/onnx#7754"),
    ),
    **_stage("groups",
        ("GRP-1", M, "The kept groups are those with the best scores, each the sum of its group_score_k best choice "
                     "scores.", "NVIDIA/Megatron-LM#1441", "EricLBuehler/mistral.rs#1278"),
        ("GRP-2", M, "A token's experts come from at most num_limited_groups groups of consecutive experts.",
                     "EricLBuehler/mistral.rs#1278", "vllm-project/vllm#34673"),
        ("GRP-3", M, "Group scores are made of choice scores, expert_bias included.", "deepseek-ai/DeepSeek-V3#741"),
        ("GRP-4", S, "Groups with equal scores: the lower group id is kept.", "vllm-project/vllm#55514"),
        ("GRP-5", M, "Renaming the groups renames the selection alike."),
        ("GRP-6", M, "With mask_fill 0 an expert of a dropped group ranks as choice score 0."),
    ),
    **_stage("select",
        ("SEL-1", M, "Each token selects top_k distinct experts, as integer ids in range.",
                     "vllm-project/vllm#39391", "sgl-project/sglang#30079"),
        ("SEL-2", M, "The selected experts are those with the best choice scores.", "pytorch/pytorch#196177"),
        ("SEL-3", M, "An expert of a dropped group is never selected, whatever the sign of the bias.",
                     "huggingface/transformers#45440", "huggingface/transformers#45441",
                     "deepseek-ai/DeepSeek-V3#741"),
        ("SEL-4", M, "expert_bias is added to what is ranked.", "AI-Hypercomputer/maxtext#1492"),
        ("SEL-5", S, "Experts with equal choice scores: the lower id is selected.", "vllm-project/vllm#54403",
                     "vllm-project/vllm#52679"),
        ("SEL-6", S, "Slots are in descending choice score, equal ones by lower id.", "vllm-project/vllm#55514"),
        ("SEL-7", M, "One constant added to every entry of expert_bias changes no selection.",
                     "deepseek-ai/DeepSeek-V3#741"),
        ("SEL-8", M, "Renaming ungrouped experts renames the selection alike.",
                     "tensorflow/tensorflow#117287"),
        ("SEL-9", M, "An expert whose logit is -inf is never selected while top_k others remain."),
        ("SEL-10", S, "Nor is it where expert_bias would lift its score above theirs."),
        ("SEL-11", M, "A null choice is returned under its own id, num_experts or above, so that counts stay true."),
        ("SEL-13", M, "sparsemixer selects by repeated argmax of the remaining logits."),
        ("SEL-14", M, "A table selects the row of the token's id."),
        ("SEL-15", M, "Given ids are taken as they are, slot by slot, unused slots (-1) included.",
                      "radixark/miles#3146", "PrimeIntellect-ai/prime-rl#1807", "radixark/miles#645"),
        ("SEL-16", M, "Round-robin gives slot k of token t the expert (t * K + k) mod num_experts."),
        ("SEL-17", M, "Random selection depends on the seed alone, not on the logits."),
    ),
    **_stage("weights",
        ("WGT-1", M, "expert_bias never enters a weight.", "huggingface/transformers#39581",
                     "AI-Hypercomputer/maxtext#1492", "MetaX-MACA/vLLM-metax#270"),
        ("WGT-2", M, "With route_norm the weights of a token sum to 1 (before route_scale), in the ratio of "
                     "its scores.",
                     "pytorch/torchtitan#1418", "pytorch/torchtitan#1448", "flagos-ai/FlagGems#5123",
                     "huggingface/transformers#41151"),
        ("WGT-3", M, "Without route_norm the weights are the scores themselves.", "lablup/mlxcel#391",
                     "sgl-project/sglang#35160"),
        ("WGT-4", M, "Weights are multiplied by route_scale exactly once, after the norm.", "vllm-project/vllm#45037"),
        ("WGT-5", M, "The divisor is norm + norm_eps, or max(norm, norm_eps), as norm_form says.",
                     "NVIDIA/Megatron-LM#1545"),
        ("WGT-6", M, "The norm is the p-norm of order norm_p."),
        ("WGT-7", M, "With top_k 1 and route_norm every weight is route_scale.", "databricks/megablocks#87"),
        ("WGT-8", M, "A weight stands in the slot of its expert.", "radixark/miles#2722"),
        ("WGT-9", M, "The learned scale multiplies each weight once, by the id of its expert, after the norm.",
                     "onnxruntime/mobius#546"),
        ("WGT-10", M, "Weights are finite for finite logits."),
        ("WGT-11", M, "An unused slot weighs 0 and takes no part in a norm.", "radixark/miles#645"),
        ("WGT-12", M, "A skipped choice weighs 0; an identity choice weighs its score."),
        ("WGT-13", M, "Router-scored shared experts weigh their own scores, and join the norm where the spec says."),
        ("WGT-14", M, "With weights_from 'masked_scores' an expert of a dropped group weighs 0."),
        ("WGT-15", M, "sparsemixer weighs slot j by a softmax over the band below the j-th best logit."),
        ("WGT-16", S, "They are finite, too, where every selected score underflows to 0.", "NVIDIA/Megatron-LM#1545"),
    ),
    **_stage("permute",
        ("PRM-1", M, "Permute runs every case that it supports, and returns the slots of the rows and a count for each "
                     "expert, as integers.", "huggingface/transformers#43583"),
        ("PRM-2", M, "The slot of an expert is a row exactly once; the slot of a null expert never is.",
                     "vllm-project/vllm-xpu-kernels#453", "ggml-org/llama.cpp#26295", "bytedance/flux#186"),
        ("PRM-3", M, "Rows are sorted by expert id.", "cusp-ai-oss/kUPS#186", "ggml-org/llama.cpp#26310"),
        ("PRM-4", M, "The counts are exact, 0 included, and the same for the same ids.", "sgl-project/sglang#3339",
                     "ModelTC/LightLLM#1369"),
        ("PRM-5", S, "Rows of one expert are in the order of the tokens.", "vllm-project/vllm#45683"),
        ("PRM-6", M, "An unused slot (-1) is no row and is counted nowhere, also where every slot is unused.",
                     "vllm-project/vllm-xpu-kernels#571", "vllm-project/vllm#57471",
                     "huggingface/transformers#48653"),
        ("PRM-7", M, "Hundreds of experts, and hundreds of rows of one expert, are sorted and counted as few are.",
                     "bytedance/flux#186", "ModelTC/LightLLM#1369", "huggingface/transformers#43583"),
        ("PRM-8", M, "Zero tokens give no rows, and counts of 0."),
    ),
    **_stage("experts",
        ("EXP-1", M, "The experts run every case that they support, and return one output for each row.",
                     "ml-explore/mlx-examples#671"),
        ("EXP-2", M, "A row's output is down(act(gate(x)) * up(x)) of its own expert, or down(act(up(x))) without "
                     "a gate.", "NVIDIA/cutlass#3497", "axolotl-ai-cloud/axolotl#3410", "Dao-AILab/sonic-moe#63"),
        ("EXP-3", M, "alpha, up_offset and clamp apply to every row as the spec says, to a single row too.",
                     "deepseek-ai/DeepGEMM#87", "sgl-project/sglang#16972", "sgl-project/sglang#39939"),
        ("EXP-4", M, "Each row gets the biases of its own expert, once."),
        ("EXP-5", M, "Matrices are read in their own layout at sizes where another one would fit: F == D, 2F == D.",
                     "huggingface/transformers#47031", "vllm-project/vllm#29273", "vllm-project/tpu-inference#2683",
                     "vllm-project/vllm#47874"),
        ("EXP-6", M, "An expert without rows changes nothing: first, last, between others, or all but one.",
                     "openxla/tokamax#1016", "NVIDIA/cutlass#3497"),
        ("EXP-7", M, "Rows past the counts belong to nobody: NaN and 1e30 there reach no other row, on any call.",
                     "pytorch/torchtitan#1237", "huggingface/transformers#48205", "huggingface/transformers#45621"),
        ("EXP-8", M, "A row's output depends on that row alone: a NaN, or other numbers, in other rows change "
                     "nothing.", "vllm-project/tpu-inference#2248"),
        ("EXP-9", M, "Zero rows give zero outputs, of shape (0, D).", "vllm-project/vllm#57471"),
        ("EXP-10", M, "Experts a hundred times larger or smaller than others are as exact as these.",
                      "aws-neuron/neuronx-distributed-inference#35", "vllm-project/vllm-ascend#16806"),
    ),
    **_stage("combine",
        ("CMB-1", M, "Combine runs every case that it supports, and returns one sum for each token."),
        ("CMB-2", M, "A token's routed output is the sum of its slots' rows, each times its slot's weight, times "
                     "output_scale.", "tjake/Jlama#201", "deepseek-ai/DeepEP#700"),
        ("CMB-3", M, "A slot that is no row adds nothing, whatever its weight.", "huggingface/transformers#45621"),
        ("CMB-4", M, "The sum is linear in the weights.", "tjake/Jlama#201"),
        ("CMB-5", M, "A weight that is on the input is not applied again.", "vllm-project/vllm#43694",
                     "NVIDIA/TensorRT-LLM#3492", "areal-project/AReaL#940"),
        ("CMB-6", M, "The order of the rows of one expert changes no sum by more than rounding.",
                     "vllm-project/vllm#45683"),
        ("CMB-7", M, "With top_k 1 and an output_scale the sum is the scaled row.", "sgl-project/sglang#40187"),
        ("CMB-8", M, "Without any row the sums are 0."),
    ),
    **_stage("layer",
        ("LAY-1", M, "A layer runs every case that it supports, and returns one output for each token.",
                     "vllm-project/vllm#27316"),
        ("LAY-2", M, "A token's output is the weighted sum of its experts, and the shared output where there is one.",
                     "tjake/Jlama#201", "marin-community/marin#8578"),
        ("LAY-3", M, "Zero tokens give an output of shape (0, D).", "vllm-project/vllm#57471"),
        ("LAY-4", M, "A token's output depends on that token alone, whatever its batch and its place in it.",
                     "sgl-project/sglang#16972", "vllm-project/tpu-inference#2248", "deepseek-ai/DeepEP#700"),
        ("LAY-5", M, "A NaN in one token stays in that token.", "vllm-project/vllm#39391"),
        ("LAY-6", M, "The output of a padding token is 0, whatever its row holds.", "vllm-project/vllm#57471",
                     "marin-community/marin#8953"),
        ("LAY-7", M, "Padding changes no other token, whatever its rows hold.", "huggingface/transformers#45621",
                     "sgl-project/sglang#40672"),
        ("LAY-8", M, "Every shared expert adds its output exactly once, to every token.", "vllm-project/vllm#49366",
                     "sgl-project/sglang#25974"),
        ("LAY-9", M, "The shared output is not scaled by route_scale or output_scale.", "vllm-project/vllm#29687",
                     "sgl-project/sglang#28237"),
        ("LAY-10", M, "shared.gate 'sigmoid' multiplies the shared output, and nothing else, by the sigmoid of the "
                      "token's own logit."),
        ("LAY-11", M, "shared.combine 'average' halves the sum of routed and shared output."),
        ("LAY-12", M, "A weight on the input multiplies what the expert sees, and not what it returns.",
                      "NVIDIA/TensorRT-LLM#3492", "areal-project/AReaL#940", "vllm-project/vllm#43694"),
        ("LAY-13", M, "An identity null expert adds the token times its weight; a skipped one adds nothing."),
        ("LAY-14", M, "The routed output doubles where every expert's down projection and its bias double.",
                      "tjake/Jlama#201"),
        ("LAY-15", M, "Renaming ungrouped experts, gate rows and parameters alike, changes no output."),
        ("LAY-16", S, "The same input gives the same output, bit for bit.", "vllm-project/vllm#45683",
                      "sgl-project/sglang#40187"),
    ),
    **_stage("backward",
        ("BWD-1", M, "The backward pass runs every case that it supports, and returns a gradient for the tokens and "
                     "for each parameter that the layer has.", "jax-ml/jax#26915"),
        ("BWD-2", M, "The gradient of the tokens is that of every path: experts, gate, shared experts.",
                     "jax-ml/jax#26915", "NVIDIA-NeMo/Automodel#1260"),
        ("BWD-3", M, "Each expert's matrices get the gradients of its own rows.", "openxla/tokamax#887",
                     "NVIDIA/Megatron-LM#7452"),
        ("BWD-4", M, "Each expert's biases get the gradients of its own rows.", "AI-Hypercomputer/maxtext#3699"),
        ("BWD-5", M, "The gate, its bias and the learned scale get the gradients of the weights.",
                     "NVIDIA/Megatron-LM#894", "davidmrau/mixture-of-experts#27", "huggingface/kernels-community#1056"),
        ("BWD-6", M, "An expert without tokens gets gradients of exactly 0, also after a call in which it had some.",
                     "openxla/tokamax#887", "openxla/tokamax#1016", "meta-pytorch/MSLK#158"),
        ("BWD-7", M, "expert_bias gets no gradient: it takes part in the choice alone."),
        ("BWD-8", M, "With top_k 1 and route_norm the gate gets no gradient, since every weight is a constant.",
                     "jingyaogong/minimind#859"),
        ("BWD-9", M, "Padding adds nothing to any gradient, whatever its rows hold, on any call.",
                     "AI-Hypercomputer/maxtext#3699", "pytorch/pytorch#193633", "huggingface/transformers#48205"),
        ("BWD-10", M, "The shared experts and their gate get the gradients of every token."),
        ("BWD-11", M, "The gradients of a batch are the sums of those of its parts.", "NVIDIA-NeMo/Automodel#1260"),
        ("BWD-12", M, "Zero tokens give gradients of 0.", "meta-pytorch/MSLK#158"),
    ),
    **_stage("dispatch", *layouts.DISPATCH),
    **_stage("layout", *layouts.LAYOUT),
    **_stage("load", *load.LOAD),
    **_stage("capacity", *load.CAPACITY),
    **_stage("mask", *load.MASK),
    **_stage("replay", *load.REPLAY),
}  # fmt: skip


def spec_markdown() -> str:
    """SPEC.md: every requirement by stage."""
    lines = [
        f"# Specification {SPEC_VERSION}",
        "",
        "Generated by `moe-conformance spec` from `conformance/requirements.py`; do not edit.",
        "Where they disagree, a sentence here outranks `moe_ref`, and `moe_ref` outranks any test vector.",
        "MUST fails a run; SHOULD is reported and leaves the exit status alone.",
    ]
    for stage in STAGES:
        lines += ["", f"## {stage}", "", "| id | level | fact | went wrong in | since |", "|---|---|---|---|---|"]
        for r in REQUIREMENTS.values():
            if r.stage == stage:
                links = ", ".join(f"[{link}]({url(link)})" for link in r.links)
                lines.append(f"| {r.id} | {r.level} | {r.sentence} | {links} | {r.since} |")
    return "\n".join(lines) + "\n"


def url(link: str) -> str:
    """The address of an `owner/repository#number` reference; anything else is one already."""
    if "://" in link:
        return link
    repository, _, number = link.partition("#")
    return f"https://github.com/{repository}/issues/{number}"
