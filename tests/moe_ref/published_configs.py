"""Tests: configs of published models, as far as they matter here, and what their layers are.

Each is (name, config, expected router, expected width, expected shared width, sparse layers); the routers are written
by hand from the models' own code, not from our readers.
"""

from typing import Any

BASE: dict[str, Any] = {
    "_name_or_path": "x", "architectures": ["X"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 1, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 4096,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1e4,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.5", "use_cache": True,
    "vocab_size": 129280,
}  # fmt: skip
MLA = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
AUTO = {"auto_map": {"AutoConfig": "configuration_x.X"}}
QUANT = {"quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}}
OLD = {"top_k": 50, "top_p": 1.0, "temperature": 1.0, "output_scores": False, "num_beams": 1, "torchscript": False,
       "num_beam_groups": 1, "diversity_penalty": 0.0, "id2label": {"0": "LABEL_0"}}  # fmt: skip
DEEPSEEK = BASE | MLA | AUTO | {
    "aux_loss_alpha": 0.001, "ep_size": 1, "moe_layer_freq": 1, "pretraining_tp": 1, "seq_aux": True,
}  # fmt: skip
V3_FILE = DEEPSEEK | QUANT | {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "topk_group": 4, "topk_method": "noaux_tc", "first_k_dense_replace": 3,
}  # fmt: skip
V3 = {"score_func": "sigmoid", "route_norm": True, "norm_eps": 1e-20}
GROUP_1 = {"num_expert_groups": 1, "num_limited_groups": 1}
GROUP_8 = {"num_expert_groups": 8, "num_limited_groups": 4}
SIGMOID = {"score_func": "sigmoid", "route_norm": True}
NORM = {"route_norm": True}
SELECTED = {"score_over": "selected", "select_by": "logit"}
QWEN3 = BASE | {"head_dim": 128, "max_window_layers": 48, "mlp_only_layers": [], "decoder_sparse_step": 1,
                "norm_topk_prob": True, "output_router_logits": False, "router_aux_loss_coef": 0.001,
                "sliding_window": None,
                "use_sliding_window": False, "intermediate_size": 6144}  # fmt: skip
LINEAR = {"linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
    "full_attention_interval": 4,
          "linear_num_value_heads": 32, "linear_value_head_dim": 128, "partial_rotary_factor": 0.25}  # fmt: skip
GLM = BASE | {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "n_shared_experts": 1,
    "num_nextn_predict_layers": 1,
              "partial_rotary_factor": 0.5, "head_dim": 128, "num_experts_per_tok": 8,
              "routed_scaling_factor": 2.5}  # fmt: skip
BAILING = BASE | AUTO | {
    "embedding_dropout": 0.0, "first_k_dense_replace": 1, "group_norm_size": 4, "head_dim": 128,
    "max_window_layers": 20,
    "moe_router_enable_expert_bias": True, "n_group": 8, "norm_head": False, "norm_softmax": False,
    "norm_topk_prob": True,
    "num_experts": 256, "num_experts_per_tok": 8, "num_nextn_predict_layers": 0, "num_shared_experts": 1,
    "output_dropout": 0.0, "output_router_logits": False, "partial_rotary_factor": 0.5, "routed_scaling_factor": 2.5,
    "router_dtype": "fp32", "score_function": "sigmoid", "topk_group": 4, "use_bias": False, "use_qk_norm": True,
    "use_qkv_bias": False, "use_rmsnorm": True, "use_sliding_window": False, "mtp_loss_scaling_factor": 0,
    "architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe",
}  # fmt: skip
MINIMAX_1 = BASE | AUTO | {
    "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10, "head_dim": 128, "hidden_size": 6144, "intermediate_size": 9216,
    "layernorm_full_attention_alpha": 3.55, "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": 3.55,
    "layernorm_linear_attention_beta": 1.0, "layernorm_mlp_alpha": 3.55, "layernorm_mlp_beta": 1.0, "postnorm": True,
    "num_experts_per_tok": 2, "num_hidden_layers": 80, "num_local_experts": 32, "output_router_logits": False,
    "rotary_dim": 64, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid", "sliding_window": None,
}  # fmt: skip
GRANITE = BASE | {"attention_multiplier": 0.01, "embedding_multiplier": 12.0, "logits_scaling": 6.0,
    "residual_multiplier":
                  0.22, "output_router_logits": False, "router_aux_loss_coef": 0.001}  # fmt: skip
AFMOE = BASE | AUTO | {
    "global_attn_every_n_layers": 4, "head_dim": 128, "load_balance_coeff": 0.0005, "model_type": "afmoe",
    "mup_enabled": True, "n_group": 1, "num_dense_layers": 2, "num_expert_groups": 1, "num_experts": 128,
    "num_experts_per_tok": 8, "num_limited_groups": 1, "num_shared_experts": 1, "route_norm": True,
    "route_scale": 2.826,
    "score_func": "sigmoid", "sliding_window": 2048, "topk_group": 1, "use_grouped_mm": True,
}  # fmt: skip
NEMOTRON = BASE | AUTO | {
    "chunk_size": 128, "conv_kernel": 4, "expand": 2, "head_dim": 128, "hidden_dropout": 0.0,
    "layer_norm_epsilon": 1e-5,
    "mamba_head_dim": 64, "mamba_hidden_act": "silu", "mamba_num_heads": 64, "mamba_proj_bias": False,
    "mlp_bias": False,
    "mamba_ssm_cache_dtype": "float32", "mlp_hidden_act": "relu2", "model_type": "nemotron_h", "n_group": 1,
    "n_groups": 8,
    "norm_eps": 1e-5, "norm_topk_prob": True, "num_logits_to_keep": 1, "partial_rotary_factor": 1.0,
    "n_shared_experts": 1,
    "rescale_prenorm_residual": True, "residual_in_fp32": False, "sliding_window": None, "ssm_state_size": 128,
    "time_step_floor": 1e-4, "time_step_limit": [0.0, float("inf")], "time_step_max": 0.1, "time_step_min": 0.001,
    "topk_group": 1, "use_bias": False, "use_conv_bias": True, "use_mamba_kernels": True,
}  # fmt: skip


def without_act(config: dict) -> dict[str, Any]:
    """The config of a model type whose files name no activation."""
    return {key: value for key, value in config.items() if key != "hidden_act"}


def sizes(num_experts: int, top_k: int, **fields) -> dict[str, Any]:
    return {"num_experts": num_experts, "top_k": top_k, **fields}


PUBLISHED: list[tuple[str, dict, dict, int, int | None, int]] = [
    ("DeepSeek-V2", DEEPSEEK | {"model_type": "deepseek_v2", "hidden_size": 5120, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "n_group": 8, "n_routed_experts": 160, "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_experts_per_tok": 6, "num_hidden_layers": 60, "routed_scaling_factor": 16.0, "scoring_func": "softmax",
        "topk_group": 3, "topk_method": "group_limited_greedy", "first_k_dense_replace": 1},
     sizes(160, 6, num_expert_groups=8, num_limited_groups=3, group_score_k=1, mask_fill=0.0,
           weights_from="masked_scores", route_scale=16.0), 1536, 3072, 59),
    ("DeepSeek-V2-Lite", DEEPSEEK | {"model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_experts_per_tok": 6, "num_hidden_layers": 27, "q_lora_rank": None, "routed_scaling_factor": 1.0,
        "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy", "first_k_dense_replace": 1},
     sizes(64, 6), 1408, 2816, 26),
    ("DeepSeek-V3", V3_FILE, sizes(256, 8, **V3, **GROUP_8, route_scale=2.5), 2048, 2048, 58),
    ("DeepSeek-V3.2-Exp", V3_FILE | {"model_type": "deepseek_v32", "index_head_dim": 128, "index_n_heads": 64,
        "index_topk": 2048}, sizes(256, 8, **V3, **GROUP_8, route_scale=2.5), 2048, 2048, 58),
    ("Kimi-K2-Instruct", V3_FILE | {"model_type": "kimi_k2", "n_routed_experts": 384, "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 2.827, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
     sizes(384, 8, **V3, **GROUP_1, route_scale=2.827), 2048, 2048, 60),
    ("Kimi-VL-A3B", {"architectures": ["KimiVLForConditionalGeneration"], "model_type": "kimi_vl", "vision_config": {
        "model_type": "moonvit", "patch_size": 14}, "media_placeholder_token_id": 163605,
        "text_config": V3_FILE | OLD | {
        "hidden_size": 2048, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2, "n_group": 1,
        "topk_group": 1, "num_experts_per_tok": 6, "num_hidden_layers": 27, "routed_scaling_factor": 2.446,
        "first_k_dense_replace": 1}}, sizes(64, 6, **V3, **GROUP_1, route_scale=2.446), 1408, 2816, 26),
    ("Qwen1.5-MoE-A2.7B", QWEN3 | {"model_type": "qwen2_moe", "hidden_size": 2048, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60, "num_hidden_layers": 24,
        "norm_topk_prob": False}, sizes(60, 4), 1408, 5632, 24),
    ("Qwen3-235B-A22B", QWEN3 | {"model_type": "qwen3_moe", "hidden_size": 4096, "moe_intermediate_size": 1536,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 94}, sizes(128, 8, **NORM), 1536, None, 94),
    ("Qwen3-Next-80B-A3B", QWEN3 | LINEAR | {"model_type": "qwen3_next", "hidden_size": 2048,
    "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "num_experts": 512, "num_experts_per_tok": 10, "num_hidden_layers": 48},
     sizes(512, 10, **NORM), 512, 512, 48),
    ("Qwen3-VL-30B-A3B", {"architectures": ["X"], "image_token_id": 151655, "model_type": "qwen3_vl_moe",
        "vision_config": {"depth": 27}, "tie_word_embeddings": False, "text_config": QWEN3 | {
        "model_type": "qwen3_vl_moe_text", "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48}}, sizes(128, 8, **NORM), 768, None, 48),
    ("Qwen3-Omni-30B-A3B", {"model_type": "qwen3_omni_moe", "enable_audio_output": True, "talker_config": {"x": 1},
        "code2wav_config": {"x": 1}, "thinker_config": {"model_type": "qwen3_omni_moe_thinker", "audio_config": {},
        "text_config": QWEN3 | {"model_type": "qwen3_omni_moe_text", "hidden_size": 2048, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48}}}, sizes(128, 8, **NORM), 768, None, 48),
    ("InternVL3_5-30B-A3B", {"model_type": "internvl_chat", "architectures": ["InternVLChatModel"],
    "llm_config": QWEN3 | {
        "model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48}, "downsample_ratio": 0.5, "vision_config": {}},
     sizes(128, 8, **NORM), 768, None, 48),
    ("GLM-4.5", GLM | {"model_type": "glm4_moe", "hidden_size": 5120, "intermediate_size": 12288, "use_qk_norm": True,
        "moe_intermediate_size": 1536, "n_routed_experts": 160, "num_hidden_layers": 92, "first_k_dense_replace": 3},
     sizes(160, 8, **V3, **GROUP_1, route_scale=2.5), 1536, 1536, 89),
    ("GLM-4.5V", {"model_type": "glm4v_moe", "image_start_token_id": 1, "vision_config": {}, "text_config": GLM | {
        "model_type": "glm4v_moe_text", "hidden_size": 4096, "moe_intermediate_size": 1408, "n_routed_experts": 128,
        "num_hidden_layers": 46, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0, "image_token_id": 3}},
     sizes(128, 8, **V3, **GROUP_1), 1408, 1408, 45),
    ("GLM-4.7-Flash", GLM | MLA | {"model_type": "glm4_moe_lite", "hidden_size": 2048, "moe_intermediate_size": 1536,
        "n_routed_experts": 64, "num_experts_per_tok": 4, "num_hidden_layers": 47, "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.8, "topk_method": "noaux_tc", "intermediate_size": 10240},
     sizes(64, 4, **V3, **GROUP_1, route_scale=1.8), 1536, 1536, 46),
    ("gpt-oss-20b", BASE | {"model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4,
    "num_experts_per_tok":
        4, "hidden_size": 2880, "intermediate_size": 2880, "initial_context_length": 4096, "num_hidden_layers": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "num_local_experts": 32,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0, "quantization_config": {
        "quant_method": "mxfp4"}}, sizes(32, 4, **SELECTED), 2880, None, 24),
    ("Mixtral-8x7B", BASE | OLD | {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_local_experts": 8, "output_router_logits": False,
        "router_aux_loss_coef": 0.02, "sliding_window": None}, sizes(8, 2, **NORM), 14336, None, 32),
    ("Llama-4-Maverick", {"model_type": "llama4", "boi_token_index": 200080, "vision_config": {},
    "text_config": BASE | {
        "attention_chunk_size": 8192, "attn_scale": 0.1, "floor_scale": 8192, "for_llm_compressor": False,
        "hidden_size":
        5120, "interleave_moe_layer_step": 2, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
        "moe_layers": list(
        range(1, 48, 2)), "model_type": "llama4_text", "num_experts_per_tok": 1, "num_hidden_layers": 48,
        "num_local_experts": 128, "output_router_logits": False, "router_aux_loss_coef": 0.001, "use_qk_norm": False,
        "router_jitter_noise": 0.0, "no_rope_layers": [1, 1, 1, 0] * 12}},
     sizes(128, 1, score_func="sigmoid", select_by="logit", weight_on="input"), 8192, 8192, 24),
    ("MiniMax-M1-80k", MINIMAX_1 | {"model_type": "minimax_m1"}, sizes(32, 2, **NORM), 9216, None, 80),
    ("MiniMax-Text-01", MINIMAX_1 | {"model_type": "minimax_text_01"}, sizes(32, 2, **NORM), 9216, None, 80),
    ("MiniMax-M2", BASE | AUTO | QUANT | {"model_type": "minimax_m2", "attn_type_list": [1] * 62, "hidden_size": 3072,
        "intermediate_size": 1536, "layernorm_mlp_beta": 1.0, "max_model_len": 196608, "mlp_intermediate_size": 8192,
        "mtp_transformer_layers": 1, "num_expert_groups": None, "num_experts_per_tok": 8, "num_hidden_layers": 62,
        "num_local_experts": 256, "num_mtp_modules": 3, "qk_norm_type": "per_layer", "rotary_dim": 64,
        "use_qk_norm": True,
        "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid", "use_mtp": True, "use_routing_bias": True, "swa_rope_theta": -1.0},
     sizes(256, 8, **SIGMOID), 1536, None, 62),
    ("OLMoE-1B-7B", BASE | {"model_type": "olmoe", "clip_qkv": None, "hidden_size": 2048, "intermediate_size": 1024,
        "norm_topk_prob": False, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
        "output_router_logits": False, "router_aux_loss_coef": 0.01}, sizes(64, 8), 1024, None, 16),
    ("Phi-3.5-MoE", BASE | AUTO | {"model_type": "phimoe", "attention_bias": True, "hidden_dropout": 0.0, "hidden_size":
        4096, "input_jitter_noise": 0.01, "intermediate_size": 6400, "lm_head_bias": True, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_local_experts": 16, "original_max_position_embeddings": 4096,
        "output_router_logits":
        False, "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.01, "sliding_window": 131072},
     sizes(16, 2, selector="sparsemixer", select_by="logit"), 6400, None, 32),
    ("Hunyuan-A13B", BASE | AUTO | {"model_type": "hunyuan_v1_moe", "add_classification_head": False,
    "anyres_pooling_size":
        2, "attention_head_dim": 128, "cla_share_factor": 2, "class_num": 0, "dense_list": [4096, 0], "eod_token_id": 3,
        "hidden_size": 4096, "intermediate_size": 3072, "kv_lora_rank": None, "mask_init_id": 12, "mlp_bias": False,
        "moe_drop_tokens": False, "moe_intermediate_size": [3072] * 32, "moe_layer_num_skipped": 0,
        "moe_random_routing_dropped_token": False, "moe_topk": [8] * 32, "norm_type": "rms", "num_experts": 64,
        "num_hidden_layers": 32, "num_shared_expert": [1] * 32, "org_vocab_size": 128167, "pool_type": "last",
        "pretraining_tp": 1, "qk_nope_head_dim": None, "use_cla": False, "use_mixed_mlp_moe": True, "use_mla": False,
        "use_qk_norm": True, "use_rotary_pos_emb": True, "num_media_embeds": 257}, sizes(64, 8, **NORM), 3072, 3072,
        32),
    ("ERNIE-4.5-21B-A3B", BASE | {"model_type": "ernie4_5_moe", "hidden_size": 2560, "intermediate_size": 12288,
        "moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_intermediate_size": 1536, "moe_k": 6,
        "moe_layer_interval": 1,
        "moe_layer_end_index": 27, "moe_layer_start_index": 1, "moe_num_experts": 64, "moe_num_shared_experts": 2,
        "moe_use_aux_free": True, "num_hidden_layers": 28, "num_nextn_predict_layers": 1, "use_bias": False,
        "use_rmsnorm": True}, sizes(64, 6, route_norm=True, norm_form="clamp", norm_eps=1e-12), 1536, 3072, 27),
    ("Nemotron-3-Nano", NEMOTRON | {"hidden_size": 2688, "hybrid_override_pattern": "MEME*ME",
    "moe_intermediate_size": 1856,
        "intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712, "n_routed_experts": 128,
        "num_experts_per_tok": 6, "num_hidden_layers": 7, "routed_scaling_factor": 2.5},
     sizes(128, 6, **V3, **GROUP_1, route_scale=2.5), 1856, 3712, 3),
    ("granite-3.0-3b-a800m", GRANITE | {"model_type": "granitemoe", "hidden_size": 1536, "intermediate_size": 512,
        "num_experts_per_tok": 8, "num_hidden_layers": 32, "num_local_experts": 40}, sizes(40, 8, **SELECTED), 512,
        None, 32),
    ("granite-4.0-h-tiny", GRANITE | {"model_type": "granitemoehybrid", "hidden_size": 1536, "intermediate_size": 512,
        "init_method": "mup", "layer_types": ["mamba"] * 40, "logits_scaling": 6, "mamba_chunk_size": 256,
        "mamba_conv_bias":
        True, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1,
        "mamba_n_heads": 48, "mamba_proj_bias": False, "normalization_function": "rmsnorm", "num_experts_per_tok": 6,
        "num_hidden_layers": 40, "num_local_experts": 64, "position_embedding_type": "nope", "shared_intermediate_size":
        1024}, sizes(64, 6, **SELECTED), 512, 1024, 40),
    ("Jamba-v0.1", BASE | AUTO | {"model_type": "jamba", "attn_layer_offset": 4, "attn_layer_period": 8,
        "calc_logits_for_entire_prompt": False, "expert_layer_offset": 1, "expert_layer_period": 2, "hidden_size": 4096,
        "intermediate_size": 14336, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_state": 16,
        "mamba_dt_rank": 256,
        "mamba_expand": 2, "mamba_inner_layernorms": True, "mamba_proj_bias": False, "n_ctx": 262144, "num_experts": 16,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_logits_to_keep": 1, "output_router_logits": False,
        "router_aux_loss_coef": 0.001, "sliding_window": None, "use_mamba_kernels": True}, sizes(16, 2), 14336, None,
        16),
    ("dbrx-instruct", {"model_type": "dbrx", "architectures": ["DbrxForCausalLM"], "attn_config": OLD | {"clip_qkv": 8},
        "d_model": 6144, "emb_pdrop": 0.0, "ffn_config": OLD | {"ffn_hidden_size": 10752, "moe_jitter_eps": 0,
        "model_type":
        "", "moe_loss_weight": 0.05, "moe_num_experts": 16, "moe_top_k": 4, "ffn_act_fn": {"name": "silu"},
        "moe_normalize_expert_weights": 1, "uniform_expert_assignment": False}, "initializer_range": 0.02,
        "max_seq_len":
        32768, "n_heads": 48, "n_layers": 40, "output_router_logits": False, "resid_pdrop": 0.0,
        "router_aux_loss_coef": 0.05,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 100352},
     sizes(16, 4, **NORM), 10752, None, 40),
    ("dots.llm1.inst", BASE | AUTO | {"model_type": "dots1", "first_k_dense_replace": 1, "hidden_size": 4096,
    "intermediate_size":
        10944, "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_routed_experts": 128, "n_shared_experts": 2,
        "norm_topk_prob": True, "num_experts_per_tok": 6, "num_hidden_layers": 62, "pretraining_tp": 1,
        "routed_scaling_factor": 2.5, "scoring_func": "noaux_tc", "sliding_window": None, "use_qk_norm": True,
        "n_group": 1,
        "topk_group": 1}, sizes(128, 6, **V3, **GROUP_1, route_scale=2.5), 1408, 2816, 61),
    ("LongCat-Flash-Chat", MLA | AUTO | {"model_type": "longcat_flash", "attention_bias": False,
    "attention_method": "MLA",
        "expert_ffn_hidden_size": 2048, "ffn_hidden_size": 12288, "hidden_size": 6144, "mla_scale_kv_lora": True,
        "mla_scale_q_lora": True, "moe_topk": 12, "n_routed_experts": 512, "norm_topk_prob": False, "num_layers": 28,
        "num_attention_heads": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e7, "routed_scaling_factor": 6.0,
        "router_bias": False,
        "use_cache": True, "vocab_size": 131072, "zero_expert_num": 256, "zero_expert_type": "identity"},
     sizes(512, 12, num_null_experts=256, route_scale=6.0), 2048, None, 28),
    ("Ling-mini-2.0", BAILING | {"hidden_size": 2048, "intermediate_size": 5120, "moe_intermediate_size": 512,
        "moe_shared_expert_intermediate_size": 512, "num_hidden_layers": 20},
     sizes(256, 8, **V3, **GROUP_8, route_scale=2.5), 512, 512, 19),
    ("Ring-1T", BAILING | {"model_type": "bailing_moe_v2", "hidden_size": 8192, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 80, "first_k_dense_replace": 4},
     sizes(256, 8, **V3, **GROUP_8, route_scale=2.5), 2048, 2048, 76),
    ("Trinity-Mini", AFMOE | {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 1024,
        "num_hidden_layers": 32, "layer_types": ["sliding_attention"] * 32}, sizes(128, 8, **V3, route_scale=2.826),
        1024,
     1024, 30),
    ("Trinity-Large", AFMOE | {"hidden_size": 3072, "intermediate_size": 12288, "moe_intermediate_size": 3072,
    "num_experts":
        256, "num_experts_per_tok": 4, "num_hidden_layers": 60, "num_dense_layers": 6, "route_scale": 2.448},
     sizes(256, 4, **V3, route_scale=2.448), 3072, 3072, 54),
    ("step3", {"model_type": "step3_vl", "architectures": ["Step3VLForConditionalGeneration"], "vision_config": {},
        "text_config": {"architectures": ["Step3TextForCausalLM"], "model_type": "step3_text", "hidden_size": 7168,
        "intermediate_size": 18432, "num_attention_heads": 64, "num_attention_groups": 1, "num_hidden_layers": 61,
        "max_seq_len": 65536, "vocab_size": 128815, "rms_norm_eps": 1e-5, "moe_intermediate_size": 5120,
        "moe_num_experts":
        48, "moe_top_k": 3, "rope_theta": 500000, "share_expert_dim": 5120, "share_q_dim": 2048, "head_dim": 256,
        "norm_expert_weight": False, "moe_layers_enum": ",".join(map(str, range(4, 60)))}}, sizes(48, 3), 5120, 5120,
        56),
    ("Step-3.5-Flash", AUTO | {"model_type": "step3p5", "hidden_size": 4096, "intermediate_size": 11264,
    "num_hidden_layers":
        45, "max_seq_len": 262144, "max_position_embeddings": 262144, "vocab_size": 128896, "rms_norm_eps": 1e-5,
        "moe_intermediate_size": 1280, "moe_num_experts": 288, "moe_top_k": 8, "rope_theta": [5e6] * 48,
        "share_expert_dim":
        1280, "head_dim": 128, "norm_expert_weight": True, "num_attention_heads": 64, "num_attention_groups": 8,
        "moe_layers_enum": ",".join(map(str, range(3, 45))), "use_moe": True, "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0, "use_moe_router_bias": True, "need_fp32_gate": True, "sliding_window": 512,
        "num_nextn_predict_layers": 3, "moe_every_n_layer": 1, "moe_layer_offset": 0, "use_head_wise_attn_gate": True,
        "partial_rotary_factors": [0.5] * 48, "zero_centered": True, "sink": False,
        "yarn_only_types": ["full_attention"],
        "att_impl_type": "GQA", "use_rope_layers": [], "torch_dtype": "bfloat16",
        "layer_types": ["full_attention"] * 48},
     sizes(288, 8, **SIGMOID, output_scale=3.0), 1280, 1280, 42),
    ("LFM2-8B-A1B", BASE | {"model_type": "lfm2_moe", "conv_L_cache": 3, "conv_bias": False, "hidden_size": 2048,
        "intermediate_size": 7168, "layer_types": ["conv"] * 24, "moe_intermediate_size": 1792, "norm_eps": 1e-5,
        "norm_topk_prob": True, "num_dense_layers": 2, "num_experts": 32, "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "routed_scaling_factor": 1.0, "use_expert_bias": True}, sizes(32, 4, score_func="sigmoid", route_norm=True,
        norm_eps=1e-6), 1792, None, 22),
    ("K-EXAONE-236B-A23B", BASE | {"model_type": "exaone_moe", "first_last_k_dense_replace": 1, "head_dim": 128,
    "hidden_size":
        6144, "intermediate_size": 18432, "is_moe_layer": [False] + [True] * 47, "layer_types": ["full_attention"] * 48,
        "moe_intermediate_size": 2048, "n_group": 1, "norm_topk_prob": True, "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_nextn_predict_layers": 1, "num_shared_experts": 1, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "sliding_window": 128, "sliding_window_pattern": "LLLG", "topk_group": 1,
        "topk_method":
        "noaux_tc", "tokenizer_class": "GPT2Tokenizer"}, sizes(128, 8, **V3, **GROUP_1, route_scale=2.5), 2048, 2048,
        47),
    ("Kimi-Linear-48B-A3B", MLA | AUTO | BASE | {"model_type": "kimi_linear", "first_k_dense_replace": 1,
    "head_dim": 72,
        "hidden_size": 2304, "intermediate_size": 9216, "linear_attn_config": {"head_dim": 128}, "mla_use_nope": True,
        "model_max_length": 1048576, "moe_intermediate_size": 1024, "moe_layer_freq": 1, "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid", "num_expert_group": 1, "num_experts": 256, "num_experts_per_token": 8,
        "num_hidden_layers": 27, "num_nextn_predict_layers": 0, "num_shared_experts": 1, "routed_scaling_factor": 2.446,
        "topk_group": 1, "use_grouped_topk": True}, sizes(256, 8, **V3, **GROUP_1, route_scale=2.446), 1024, 1024, 26),
    ("Hy3", BASE | {"model_type": "hy_v3", "qk_norm": True, "hidden_size": 4096, "intermediate_size": 13312,
    "num_hidden_layers":
        80, "num_nextn_predict_layers": 1, "first_k_dense_replace": 1, "num_experts": 192, "num_experts_per_tok": 8,
        "num_shared_experts": 1, "expert_hidden_dim": 1536, "moe_intermediate_size": 1536,
        "router_scaling_factor": 2.826,
        "route_norm": True, "moe_router_use_sigmoid": True, "moe_router_enable_expert_bias": True,
        "enable_moe_fp32_combine": False}, sizes(192, 8, **V3, route_scale=2.826), 1536, 1536, 79),
    ("deepseek-moe-16b", DEEPSEEK | {"model_type": "deepseek", "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
        "num_experts_per_tok": 6, "num_hidden_layers": 28, "scoring_func": "softmax", "first_k_dense_replace": 1,
        "topk_method": "greedy"}, sizes(64, 6, norm_eps=1e-20), 1408, 2816, 27),
    ("DeepSeek-OCR", {"model_type": "deepseek_vl_v2", "language_config": DEEPSEEK | {"architectures": [
        "DeepseekV2ForCausalLM"], "hidden_size": 1280, "intermediate_size": 6848, "moe_intermediate_size": 896,
        "n_group": 1,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "num_hidden_layers": 12,
        "topk_group": 1,
        "topk_method": "greedy", "first_k_dense_replace": 1, "use_mla": False, "lm_head": True, "rm_head": False},
        "projector_config": {}, "vision_config": {}, "tile_tag": "2D", "global_view_pos": "head"}, sizes(64, 6), 896,
        1792, 11),
    ("aria", {"model_type": "aria", "text_config": BASE | {"model_type": "aria_moe_lm", "hidden_size": 2560,
        "architectures": ["AriaTextForCausalLM"],
        "intermediate_size": 1664, "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_topk": 6,
        "num_hidden_layers": 28,
        "moe_z_loss_coeff": 1e-5, "moe_aux_loss_coeff": 1e-3, "moe_intermediate_size": 1664}, "vision_config": {},
        "image_token_index": 9}, sizes(64, 6, **SELECTED), 1664, 3328, 28),
    ("Intern-S1-Pro", {"model_type": "interns1_pro", "vision_config": {}, "text_config": QWEN3 | {
        "model_type": "interns1_pro_text", "hidden_size": 4096, "intermediate_size": 12288, "num_experts": 512,
        "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "num_hidden_layers": 94, "router_n_groups": 8,
        "fope_init_factor": 0.5, "fope_sep_head": True}},
     sizes(512, 8, selector="group_top_k", quota_groups=8, **NORM), 1536, None, 94),
    ("Grok-1", without_act(BASE) | AUTO | {"model_type": "grok-1", "attn_output_multiplier": 0.0884,
        "hidden_size": 6144, "embedding_multiplier_scale": 78.38, "intermediate_size": 32768, "max_attn_value": 30.0,
        "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 64, "output_multiplier_scale": 0.577,
        "output_router_logits": False, "router_aux_loss_coef": 0.001}, sizes(8, 2), 32768, None, 64),
    ("Arctic", BASE | AUTO | {"model_type": "arctic", "enable_expert_tensor_parallelism": False, "enc_index": [0],
        "hidden_size": 7168, "intermediate_size": 4864, "max_sequence_length": 4096, "moe_eval_capacity_factor": 1,
        "moe_layer_frequency": 1, "moe_min_capacity": 0, "moe_token_dropping": True, "moe_train_capacity_factor": 1,
        "num_experts_per_tok": 2, "num_hidden_layers": 35, "num_local_experts": 128, "parallel_attn_mlp_res": True,
        "quantization": None, "router_aux_loss_coef": 0.001, "use_residual": True}, sizes(128, 2, **NORM),
        4864, None, 35),
    ("Hunyuan-Large", BASE | AUTO | {"model_type": "hunyuan", "cla_share_factor": 2, "hidden_size": 6400,
        "im_end_id": 6, "intermediate_size": 18304, "moe_topk": 1, "num_experts": 16, "num_hidden_layers": 64,
        "num_shared_expert": 1, "pretraining_tp": 1, "use_cla": True, "use_mixed_mlp_moe": True,
        "use_qk_norm": True}, sizes(16, 1), 18304,
        18304, 64),
    ("Qwen2-57B-A14B", QWEN3 | {"model_type": "qwen2_moe", "hidden_size": 3584, "moe_intermediate_size": 2560,
        "norm_topk_prob": False, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 28,
        "shared_expert_intermediate_size": 20480}, sizes(64, 8), 2560, 20480, 28),
    ("Ling-lite", BASE | AUTO | {"model_type": "bailing_moe", "embedding_dropout": 0.1, "first_k_dense_replace": 0,
        "hidden_size": 2048, "intermediate_size": 5632, "moe_intermediate_size": 1408, "multi_gate": False,
        "norm_head": True, "norm_softmax": False, "norm_topk_prob": True, "num_experts": 64, "num_experts_per_tok": 6,
        "num_hidden_layers": 28, "num_shared_experts": 2, "use_bias": False, "use_qkv_bias": False},
     sizes(64, 6, **NORM), 1408, 2816, 28),
    ("cohere2-moe", BASE | {"model_type": "cohere2_moe", "hidden_size": 8192, "intermediate_size": 4096,
    "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625, "num_experts": 128, "num_experts_per_tok": 8, "num_shared_experts": 2,
        "num_hidden_layers": 40,
        "expert_selection_fn": "sigmoid", "norm_topk_prob": True, "shared_expert_combination_strategy": "average",
        "first_k_dense_replace": 1}, sizes(128, 8, score_func="sigmoid", select_by="logit", route_norm=True), 4096,
        8192, 39),
]  # fmt: skip
