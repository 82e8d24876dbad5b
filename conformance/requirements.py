"""conformance, the register: every requirement, with a permanent id. SPEC.md is generated from it.

Ids are never reused. MUST fails a run; SHOULD is reported and leaves the exit status alone.
"""

from dataclasses import dataclass

SPEC_VERSION = "2026.11"

STAGES = ("config", "run", "gate", "score", "groups", "select", "weights")
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
        ("GRP-5", M, "Renaming the groups renames the selection and changes nothing else."),
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
        ("SEL-7", M, "One constant added to every entry of expert_bias changes nothing.",
                     "deepseek-ai/DeepSeek-V3#741"),
        ("SEL-8", M, "Renaming ungrouped experts renames the selection and changes nothing else.",
                     "tensorflow/tensorflow#117287"),
        ("SEL-9", M, "An expert whose logit is -inf is never selected while top_k others remain."),
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
        ("WGT-10", M, "Weights are finite for finite logits; a token whose scores are all 0 has weights 0."),
        ("WGT-11", M, "An unused slot weighs 0 and takes no part in a norm.", "radixark/miles#645"),
        ("WGT-12", M, "A skipped choice weighs 0; an identity choice weighs its score."),
        ("WGT-13", M, "Router-scored shared experts weigh their own scores, and join the norm where the spec says."),
        ("WGT-14", M, "With weights_from 'masked_scores' an expert of a dropped group weighs 0."),
        ("WGT-15", M, "sparsemixer weighs slot j by a softmax over the band below the j-th best logit."),
    ),
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
