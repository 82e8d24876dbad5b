"""moe_ref, the names: one term for each concept, and what other code bases call it.

This table is the only place where names are translated. docs/glossary.md is printed from it.
"""

PROJECTS = ("DeepSeek", "transformers", "torchtitan", "MaxText", "Megatron", "vLLM", "FlashInfer")

# ours: (meaning, (one name per project, "" where it has none))
GLOSSARY: dict[str, tuple[str, tuple[str, ...]]] = {
    "num_experts": ("routed experts, E", (
        "n_routed_experts", "n_routed_experts, num_local_experts", "num_experts", "num_experts",
        "num-experts", "num_experts", "num_experts")),
    "top_k": ("experts per token, K", (
        "n_activated_experts", "num_experts_per_tok", "top_k", "num_experts_per_tok",
        "moe-router-topk", "top_k", "top_k")),
    "num_expert_groups": ("groups of experts, G", (
        "n_expert_groups", "n_group", "num_expert_groups", "n_routing_groups",
        "moe-router-num-groups", "num_expert_group", "n_group")),
    "num_limited_groups": ("groups kept per token, L", (
        "n_limited_groups", "topk_group", "num_limited_groups", "topk_routing_group",
        "moe-router-group-topk", "topk_group", "topk_group")),
    "group_score_k": ("a group's score sums this many best choice scores", (
        "2 (1 without bias)", "2 (1 in deepseek_v2)", "2", "2", "K // L", "2 (1 without bias)", "")),
    "router_dtype": ("what logits, scores and weights are held in", (
        "", "router_dtype", "float32", "float32_gate_logits", "moe-router-dtype", "router_dtype", "")),
    "score_func": ("softmax, sigmoid, sqrtsoftplus, relu", (
        "score_func", "scoring_func", "score_func", "routed_score_func",
        "moe-router-score-function", "scoring_func", "routing_method_type")),
    "score_over": ("softmax over all or over the selected", (
        "before", "before", "before", "by decoder_block", "moe-router-pre-softmax", "before",
        "routing_method_type")),
    "gate_bias": ("learned bias of the gate, part of the logits", (
        "", "", "gate bias", "routed_bias (!)", "", "gate bias", "")),
    "expert_bias": ("balancing bias, for the choice only", (
        "gate.bias", "e_score_correction_bias", "expert_bias", "routed_bias (!)",
        "moe-router-enable-expert-bias", "e_score_correction_bias", "routing_bias")),
    "route_norm": ("a token's weights are divided by their sum", (
        "implied by sigmoid", "norm_topk_prob", "route_norm", "norm_topk_prob", "implied", "renormalize",
        "renormalize")),
    "route_scale": ("factor on the weights, after the norm", (
        "route_scale", "routed_scaling_factor", "route_scale", "routed_scaling_factor",
        "moe-router-topk-scaling-factor", "routed_scaling_factor", "routed_scaling_factor")),
    "logits_TE": ("gate output, raw", (
        "(rebound to scores)", "router_logits", "(rebound to scores)", "gate_logits, at first",
        "logits", "gating_output, router_logits", "routing_logits")),
    "scores_TE": ("after score_func, without bias", (
        "original_scores", "router_logits after sigmoid (!)", "scores_TE", "pre_bias_logits (!)",
        "scores", "scores", "")),
    "scores_for_choice_TE": ("plus expert_bias, dropped groups -inf", (
        "scores", "scores_for_choice", "scores_for_choice_TE", "gate_logits, later (!)", "", "tmp_scores", "")),
    "expert_ids_TK": ("selection, global ids", (
        "indices", "topk_indices", "topk_expert_ids_TK", "top_k_indices", "routing_map (T, E)", "topk_ids",
        "topk_ids")),
    "weights_TK": ("routing weights", (
        "weights", "topk_weights", "topk_scores_TK", "top_k_weights", "probs (T, E)", "topk_weights",
        "topk_weights")),
}  # fmt: skip

TRAPS = (
    "(!) marks a word that means something else elsewhere: MaxText's routed_bias is the learned gate bias in its "
    "gpt-oss configuration and the balancing bias in its DeepSeek-V3 one.",
    "group_score_k covers every group rule found. 1, 2 and K // L agree at K = 8, L = 4, which is why nobody notices.",
    "route_norm has no effect after a softmax over the selected experts.",
    "The order of a token's slots is unspecified where topk runs with sorted=False (torchtitan, transformers): "
    "ids and weights are compared pair by pair.",
)

# Names that a configuration may use for a field of RouterSpec.
ALIASES: dict[str, str] = {
    "num_experts_per_token": "top_k", "experts_per_token": "top_k", "moe_topk": "top_k", "top_k_experts": "top_k",
    "num_moe_experts": "num_experts", "moe_router_activation_func": "score_func", "score_function": "score_func",
    "moe_router_score_function": "score_func", "moe_routed_scaling_factor": "route_scale",
    "moe_router_scaling_factor": "route_scale", "moe_router_dtype": "router_dtype",
    "n_routed_experts": "num_experts", "num_local_experts": "num_experts", "moe_num_experts": "num_experts",
    "n_activated_experts": "top_k", "num_experts_per_tok": "top_k", "moe_k": "top_k", "moe_top_k": "top_k",
    "n_group": "num_expert_groups", "n_expert_groups": "num_expert_groups", "n_routing_groups": "num_expert_groups",
    "num_expert_group": "num_expert_groups",
    "topk_group": "num_limited_groups", "n_limited_groups": "num_limited_groups",
    "topk_routing_group": "num_limited_groups",
    "scoring_func": "score_func", "routed_score_func": "score_func",
    "norm_topk_prob": "route_norm", "renormalize": "route_norm", "moe_renormalize": "route_norm",
    "routed_scaling_factor": "route_scale", "router_scaling_factor": "route_scale",
}  # fmt: skip
DTYPES: dict[str, str] = {
    "fp32": "float32", "fp64": "float64", "bf16": "bfloat16", "fp16": "float16", "float": "float32",
    "double": "float64", "half": "float16",
}  # fmt: skip
"""Names that others have for a router_dtype; a prefix `torch.` is left off."""


def dtype_named(value: object) -> object:
    """The router_dtype of another's name for it, or of a dtype of torch; anything else as it is."""
    name = str(value).removeprefix("torch.")
    return DTYPES.get(name, name if name in DTYPES.values() else value)


GROUPS = tuple(name for name, field in ALIASES.items() if field == "num_expert_groups")
LIMITED_GROUPS = tuple(name for name, field in ALIASES.items() if field == "num_limited_groups")

# How DeepSeek's configs say that experts are chosen -> what it fixes.
METHODS: dict[str, dict[str, object]] = {
    "noaux_tc": {},
    "greedy": {},
    "group_limited_greedy": {"group_score_k": 1, "mask_fill": 0.0, "weights_from": "masked_scores"},
}


def glossary_markdown() -> str:
    """The glossary as a Markdown table, with the traps below it."""
    head = ["| ours | meaning | " + " | ".join(PROJECTS) + " |", "|---" * (2 + len(PROJECTS)) + "|"]
    rows = [
        f"| `{ours}` | {meaning} | " + " | ".join(name.replace("|", "\\|") or "-" for name in others) + " |"
        for ours, (meaning, others) in GLOSSARY.items()
    ]
    return "\n".join([*head, *rows, "", *TRAPS])
