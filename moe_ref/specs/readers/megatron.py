"""moe_ref, configs of Megatron-Core: a TransformerConfig, its arguments, or a file of them, as fields of our specs.

Semantics after `topk_routing_with_score_function` and `TopKRouter` of NVIDIA/Megatron-LM core 0.14 and later: without
moe_router_pre_softmax a softmax is over the selected; a sigmoid's weights are divided by their sum, plus 1e-20, where
there is more than one; a group is scored by its moe_router_topk // moe_router_group_topk best experts; quantile
balancing (core 0.19) ranks logits, whatever they are scored with.
"""

import ast
from collections.abc import Iterable
from typing import Any

from moe_ref.specs.checks import integer, nearest, require
from moe_ref.specs.names import dtype_named
from moe_ref.specs.readers.config import Config, Irrelevant, load
from moe_ref.specs.readers.hf_row import Fields

SYNONYMS = {
    "num_experts": "num_moe_experts", "swiglu": "gated_linear_unit",
    "clone_scatter_output_in_embedding": "clone_scatter_output_in_embedding",
}  # fmt: skip
"""Name of an argument -> of the config."""
DEFAULTS: Fields = {
    "moe_router_topk": 2, "moe_router_score_function": "softmax", "moe_router_pre_softmax": False,
    "moe_router_dtype": None, "moe_router_num_groups": None, "moe_router_group_topk": None,
    "moe_router_topk_scaling_factor": None,
    "moe_ffn_hidden_size": None, "ffn_hidden_size": None, "gated_linear_unit": False, "activation_func": "gelu",
    "moe_shared_expert_intermediate_size": None, "moe_shared_expert_gate": False, "moe_apply_probs_on_input": False,
    "add_bias_linear": True, "activation_func_clamp_value": None, "glu_linear_offset": 0.0, "moe_layer_freq": 1,
}  # fmt: skip
"""Of TransformerConfig."""
ACTIVATIONS: dict[str, Fields] = {
    "silu": {"activation": "silu"}, "swish": {"activation": "silu"}, "gelu": {"activation": "gelu"},
    "relu": {"activation": "relu"}, "squared_relu": {"activation": "relu2"}, "fast_gelu": {"activation": "gelu_tanh"},
    "quick_gelu": {"activation": "silu", "alpha": 1.702},
}  # fmt: skip
FIXED = {
    "moe_expert_capacity_factor": (None,), "moe_router_topk_limited_devices": (None,),
    "moe_enable_routing_replay": (False,), "moe_router_force_load_balancing": (False,), "moe_n_hash_layers": (0, None),
    "moe_pad_expert_input_to_capacity": (False,), "use_te_activation_func": (False,), "openai_gelu": (False,),
    "moe_router_force_biased": (None,), "moe_expert_rank_capacity_factor": (None,),
}  # fmt: skip
"""Keys with the values that a LayerSpec can describe."""
ALONE = ("sinkhorn", "quantile_balancing")
"""They choose, and are read where they are no list alone."""
BALANCING = {"aux_loss", "seq_aux_loss", "global_aux_loss", "none", *ALONE}
IRRELEVANT = Irrelevant(
    (
        "moe_router_enable_expert_bias", "moe_router_bias_update_rate", "moe_aux_loss_coeff", "moe_z_loss_coeff",
        "moe_grouped_gemm", "moe_permute_fusion", "moe_token_dispatcher_type", "moe_router_fusion",
        "moe_token_drop_policy", "moe_token_dropping", "moe_per_layer_logging", "moe_use_legacy_grouped_gemm",
        "moe_shared_expert_overlap", "moe_input_jitter_eps", "moe_router_padding_for_fp8", "moe_extended_tp",
        "moe_router_padding_for_quantization", "moe_layer_recompute", "moe_flex_dispatcher_backend",
        "moe_enable_deepep",
        "moe_deepep_num_sms", "moe_hybridep_num_sms", "expert_model_parallel_size", "expert_tensor_parallel_size",
        "moe_upcycling_granularity", "moe_use_upcycling", "moe_use_device_initiated_grouped_gemm", "moe_ep_size",
        "use_grouped_gemm", "moe_pad_experts_for_cuda_graph_inference", "deepep_num_sms", "mlp_chunks_for_prefill",
        "overlap_moe_expert_parallel_comm", "delay_wgrad_compute", "moe_mlp_glu_interleave_size", "num_query_groups",
        "microbatch_group_size_per_vp_stage", "gradient_accumulation_fusion", "batch_p2p_comm", "tp_comm_overlap_rs",
        "moe_router_quantile_balancing_ema", "moe_single_grouped_bias", "moe_single_grouped_weight",
        "use_grouped_gemm_for_shared_expert", "moe_shared_expert_glu_interleave_size", "moe_grad_scale_func",
        "moe_flex_dispatcher_num_sms", "moe_hybridep_num_blocks_permute", "moe_hybridep_num_blocks_unpermute",
        "moe_hybridep_num_sms_preprocessing", "moe_hybridep_pad_uneven_dispatch_inputs", "moe_ncclep_static_shape",
        "moe_ncclep_zero_copy", "moe_permute_fusion_into_hybridep", "moe_paged_stash", "moe_paged_stash_page_size",
        "moe_paged_stash_buffer_size_factor_cpu", "moe_paged_stash_buffer_size_factor_cuda",
        "expert_gtp_weight_remat_size", "expert_tensor_parallel_num_weight_shards",
        "overlap_dispatch_backward_with_experts_wgrad", "inference_moe_disable_fused_quant_kernels",
        "inference_moe_token_dispatcher_type", "rl_inference_expert_model_parallel_size",
        "rl_inference_expert_tensor_model_parallel_size", "activation_func_fp8_input_store", "no_bias_swiglu_fusion",
        "dsa_indexer_topk", "dsa_indexer_topk_freq", "dsa_indexer_skip_topk_offset",
        "retriever_report_topk_accuracies",
    ),
)  # fmt: skip
ROUTING_WORDS = ("moe", "expert", "router", "topk", "glu", "activation_func")


def read(config: Any, *, ignore: Iterable[str] = ()) -> tuple[Fields, Config]:
    """The fields of the MoE layers of a Megatron config, and the config, whose names messages use.

    Raises:
        ValueError: it has no experts, does what no LayerSpec describes, or a key of its MoE layers is unknown.
    """
    values = {name.lstrip("-").replace("-", "_"): value for name, value in load(config).items()}
    found = Config(values, "a config of Megatron", defaults=DEFAULTS, synonyms=SYNONYMS)
    experts = found.get("num_moe_experts", None, field="num_experts")
    require(bool(experts), f"{found.names['num_experts']} is {experts!r}: it is a dense model, which has no MoE layers")
    balancing = found.get("moe_router_load_balancing_type", "aux_loss")
    kinds = set(balancing) if isinstance(balancing, (list, tuple)) else {balancing}
    require(
        kinds <= BALANCING,
        f"moe_router_load_balancing_type is {balancing!r}; no RouterSpec describes more than {sorted(BALANCING)}",
    )
    for key, valid in FIXED.items():
        found.only(key, valid)
    for alone in ALONE:
        require(
            kinds == {alone} or alone not in kinds,
            f"moe_router_load_balancing_type is {balancing!r}; {alone} is there alone",
        )
    router = _sinkhorn(found, experts) if "sinkhorn" in kinds else _router(found, experts)
    if "quantile_balancing" in kinds:
        require(
            "num_expert_groups" not in router,
            "moe_router_load_balancing_type is 'quantile_balancing', which Megatron refuses with moe_router_group_topk",
        )
        router["select_by"] = "logit"
    fields: Fields = {"router": router, "experts": _experts(found)}
    fields["gate_bias"] = bool(fields["experts"]["bias"])  # the router's own bias goes with add_bias_linear
    width = found.get("moe_shared_expert_intermediate_size", field="shared_hidden_dim")
    gate = found.flag("moe_shared_expert_gate")
    require(bool(width) or not gate, "moe_shared_expert_gate is True, but moe_shared_expert_intermediate_size is none")
    if width:
        fields["shared"] = {"hidden_dim": width, "gate": "sigmoid" if gate else "none"}
    latent = found.get("moe_latent_size", None)
    if latent:
        integer("moe_latent_size", latent, 1)  # here, since the `dim` of an error would be hidden_size
        has_bias = fields["experts"]["bias"]
        require(not has_bias, f"moe_latent_size is {latent} with add_bias_linear; no LatentSpec has biases")
        fields["latent"] = {"dim": latent}
    _layers(found)
    about_layers = {key for key in values if any(word in key for word in ROUTING_WORDS)}
    others = Irrelevant(values.keys() - about_layers)  # a config of Megatron is about the whole training
    found.finish(IRRELEVANT.and_also(others.names), ignore)
    return fields, found


def _router(config: Config, experts: int) -> Fields:
    top_k = config.get("moe_router_topk", field="top_k")
    score = config.get("moe_router_score_function", field="score_func")
    require(isinstance(top_k, int), f"moe_router_topk is {top_k!r}; it is an integer")
    found: Fields = {"num_experts": experts, "top_k": top_k, "score_func": score}
    dtype = config.get("moe_router_dtype", field="router_dtype")
    if dtype is not None:  # without it the router has the dtype of the run, of which a config says nothing
        found["router_dtype"] = dtype_named(dtype)
    if score == "softmax" and not config.flag("moe_router_pre_softmax"):
        require(top_k > 1, "moe_router_topk is 1 without moe_router_pre_softmax; Megatron refuses that")
        found |= {"score_over": "selected", "select_by": "logit"}
    elif score != "softmax":
        config.get("moe_router_pre_softmax")
        found |= {"route_norm": top_k > 1, "norm_eps": 1e-20} if top_k > 1 else {}
    scale = config.get("moe_router_topk_scaling_factor", field="route_scale")
    found["route_scale"] = scale if scale else 1.0  # which is `if scaling_factor:` there
    groups = config.get("moe_router_num_groups", field="num_expert_groups")
    limited = config.get("moe_router_group_topk", field="num_limited_groups")
    for key, value in (("moe_router_num_groups", groups), ("moe_router_group_topk", limited)):
        require(value is None or isinstance(value, int), f"{key} is {value!r}; it is an integer")
    if limited:
        require(bool(groups), f"moe_router_group_topk is {limited!r}, but moe_router_num_groups is {groups!r}")
        require(
            top_k // limited >= 1,
            f"moe_router_topk is {top_k}, less than moe_router_group_topk ({limited}); every group would score 0",
        )
        found |= {"num_expert_groups": groups, "num_limited_groups": limited, "group_score_k": top_k // limited}
    else:
        require(not groups, f"moe_router_num_groups is {groups!r}, but moe_router_group_topk is {limited!r}")
    if config.flag("moe_apply_probs_on_input"):
        require(top_k == 1, f"moe_apply_probs_on_input is True with moe_router_topk {top_k}; Megatron takes 1 alone")
        found["weight_on"] = "input"
    return found


def _sinkhorn(config: Config, experts: int) -> Fields:
    """Of training; at evaluation the best logits are taken (`RouterSpec.at_evaluation`). Nothing norms or scales."""
    top_k = config.get("moe_router_topk", field="top_k")
    found: Fields = {"num_experts": experts, "top_k": top_k, "selector": "sinkhorn", "select_by": "logit"}
    found["score_func"] = "sigmoid" if top_k == 1 else "softmax"
    dtype = config.get("moe_router_dtype", field="router_dtype")
    for key in ("moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor"):
        config.get(key)  # which that way does not read
    for key in ("moe_router_num_groups", "moe_router_group_topk"):
        config.only(key, (None,))
    return found if dtype is None else found | {"router_dtype": dtype_named(dtype)}


def _experts(config: Config) -> Fields:
    dim = config.get("hidden_size", field="dim")
    dense = config.get("ffn_hidden_size") or 4 * dim
    name = "moe_ffn_hidden_size" if config.has("moe_ffn_hidden_size") else "ffn_hidden_size"
    width = config.get("moe_ffn_hidden_size") or dense
    config.names["hidden_dim"] = name
    gated = config.flag("gated_linear_unit")
    act = config.get("activation_func", "silu" if config.values.get("swiglu") else DEFAULTS["activation_func"])
    if config.values.get("squared_relu") or config.values.get("quick_geglu"):
        act = "squared_relu" if config.values.get("squared_relu") else "quick_gelu"
        gated = gated or bool(config.values.get("quick_geglu"))
    if config.values.get("swiglu") and not config.has("activation_func"):
        act = "silu"
    act = act if isinstance(act, str) else getattr(act, "__name__", repr(act))
    act = act.rpartition(".")[2]
    require(
        act in ACTIVATIONS, f"activation_func is {act!r}, not one of {sorted(ACTIVATIONS)}{nearest(act, ACTIVATIONS)}"
    )
    found: Fields = {"dim": dim, "hidden_dim": width, "gated": gated} | ACTIVATIONS[act]
    if gated:
        found["up_offset"] = config.get("glu_linear_offset", field="up_offset") or 0.0
    else:
        config.get("glu_linear_offset")
    found["clamp"] = config.get("activation_func_clamp_value", field="clamp")
    bias = config.flag("add_bias_linear")
    if "disable_bias_linear" in config.values:
        bias = not config.flag("disable_bias_linear")
    found["bias"] = bias
    return found


def _layers(config: Config) -> None:
    """moe_layer_freq, which has to leave a sparse layer."""
    freq = config.get("moe_layer_freq")
    if isinstance(freq, str):
        freq = _pattern(freq)
    if isinstance(freq, int):
        require(freq >= 1, f"moe_layer_freq is {freq!r}; it is at least 1, or a list")
        return
    depth = config.get("num_layers", None)
    require(isinstance(freq, (list, tuple)) and any(freq), f"moe_layer_freq is {freq!r}: no layer is sparse")
    require(depth in (None, len(freq)), f"moe_layer_freq has {len(freq)} entries; num_layers is {depth}")


def _pattern(text: str) -> Any:
    """An expression such as ([0]*3+[1]*58), of lists, numbers, + and * alone."""

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(int()):
                return node.value
            case ast.List():
                return [value(each) for each in node.elts]
            case ast.BinOp(op=ast.Add()):
                return value(node.left) + value(node.right)
            case ast.BinOp(op=ast.Mult()):
                return value(node.left) * value(node.right)
        raise ValueError(text)

    try:
        return value(ast.parse(text.strip().strip("'\""), mode="eval").body)
    except (SyntaxError, ValueError, TypeError) as error:
        raise ValueError(f"moe_layer_freq is {text!r}; it is a number or an expression of lists") from error
