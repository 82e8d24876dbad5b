"""moe_ref, configs of huggingface: what a key is where a file does not have it, and its other names.

Generated from the config classes of transformers 5.24 by `python -m tools.hf_defaults`; do not edit.
"""

from typing import Any

DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "moe_intermediate_size": 2048, "n_group":
        8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "routed_scaling_factor": 2.5, "topk_group": 4
    },
    "deepseek_v32": {
        "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "mlp_bias": False,
        "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob":
        True, "num_experts_per_tok": 8, "num_hidden_layers": 61, "routed_scaling_factor": 2.5, "topk_group": 4
    },
    "glm4_moe": {
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 4096, "moe_intermediate_size": 1408, "n_group":
        1, "n_routed_experts": 128, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8,
        "num_hidden_layers": 46, "routed_scaling_factor": 1.0, "topk_group": 1
    },
    "glm4_moe_lite": {
        "hidden_act": "silu", "hidden_size": 2048, "moe_intermediate_size": 1536, "n_group": 1, "n_routed_experts": 64,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 4, "num_hidden_layers": 47,
        "routed_scaling_factor": 1.8, "topk_group": 1
    },
    "glm4v_moe_text": {
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 4096, "moe_intermediate_size": 1408, "n_group":
        1, "n_routed_experts": 128, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8,
        "num_hidden_layers": 46, "routed_scaling_factor": 1.0, "topk_group": 1
    },
    "glm_moe_dsa": {
        "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 6144, "mlp_bias": False,
        "moe_intermediate_size": 2048, "n_group": 1, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob":
        True, "num_experts_per_tok": 8, "num_hidden_layers": 78, "routed_scaling_factor": 2.5, "topk_group": 1
    },
    "glm5_next_text": {
        "hidden_size": 4096, "moe_intermediate_size": 2048, "n_group": 1, "n_routed_experts": 288, "n_shared_experts":
        1, "norm_topk_prob": True, "num_experts_per_tok": 8, "num_hidden_layers": 45, "routed_scaling_factor": 2.5,
        "swiglu_limit": 10.0, "topk_group": 1
    },
    "dots1": {
        "first_k_dense_replace": 0, "hidden_act": "silu", "hidden_size": 4608, "moe_intermediate_size": 1408, "n_group":
        1, "n_routed_experts": None, "n_shared_experts": None, "norm_topk_prob": False, "num_experts_per_tok": None,
        "num_hidden_layers": 62, "routed_scaling_factor": 1.0, "topk_group": 1
    },
    "dots3_note_text": {
        "hidden_act": "silu", "hidden_size": 5120, "mlp_bias": False, "moe_intermediate_size": 1536, "n_group": 1,
        "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8,
        "num_hidden_layers": 46, "routed_scaling_factor": 1.0, "shared_experts_intermediate_size": 1536, "topk_group": 1
    },
    "solar_open": {
        "hidden_act": "silu", "hidden_size": 4096, "moe_intermediate_size": 1280, "n_group": 1, "n_routed_experts": 128,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "routed_scaling_factor": 1.0, "topk_group": 1
    },
    "axk1": {
        "hidden_act": "silu", "hidden_size": 7168, "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 192,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8, "num_hidden_layers": 61,
        "routed_scaling_factor": 2.5, "topk_group": 4
    },
    "axk2": {
        "hidden_act": "silu", "hidden_size": 2048, "moe_intermediate_size": 512, "n_group": None, "n_routed_experts":
        128, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "routed_scaling_factor": 2.5, "topk_group": None
    },
    "hy_v4": {
        "hidden_size": 2816, "moe_intermediate_size": 768, "n_group": 1, "n_routed_experts": 256, "n_shared_experts": 1,
        "norm_topk_prob": True, "num_experts_per_tok": 8, "num_hidden_layers": 34, "routed_scaling_factor": 2.827,
        "swiglu_limit": 10.0, "topk_group": 1
    },
    "hy_v4_vl_text": {
        "hidden_size": 6144, "moe_intermediate_size": 2048, "n_group": 1, "n_routed_experts": 256, "n_shared_experts":
        1, "norm_topk_prob": True, "num_experts_per_tok": 8, "num_hidden_layers": 78, "routed_scaling_factor": 2.827,
        "swiglu_limit": 10.0, "topk_group": 1
    },
    "mimo_v2_flash": {
        "hidden_act": "silu", "hidden_size": 4096, "moe_intermediate_size": 2048, "n_group": 1, "n_routed_experts": 256,
        "norm_topk_prob": True, "num_experts_per_tok": 8, "num_hidden_layers": 48, "routed_scaling_factor": 1.0,
        "topk_group": 1
    },
    "exaone_moe": {
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 4096, "moe_intermediate_size": 1024, "n_group":
        1, "norm_topk_prob": True, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 32,
        "num_shared_experts": 1, "routed_scaling_factor": 2.5, "topk_group": 1
    },
    "kimi_linear": {
        "hidden_act": "silu", "hidden_size": 2304, "moe_intermediate_size": 1024, "moe_renormalize": True,
        "num_expert_group": 1, "num_experts": 256, "num_experts_per_token": 8, "num_hidden_layers": 27,
        "num_shared_experts": 1, "routed_scaling_factor": 2.446, "topk_group": 1
    },
    "bailing_hybrid": {
        "first_k_dense_replace": 2, "hidden_act": "silu", "hidden_size": 2560, "moe_intermediate_size": 768,
        "moe_renormalize": True, "num_expert_group": 8, "num_experts": 512, "num_experts_per_token": 8,
        "num_hidden_layers": 42, "num_shared_experts": 1, "routed_scaling_factor": 2.5, "topk_group": 4
    },
    "sarvam_moe": {
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 4096, "moe_intermediate_size": 1024, "n_group":
        1, "n_routed_experts": 128, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 6,
        "num_hidden_layers": 19, "routed_scaling_factor": 2.5, "topk_group": 1
    },
    "sarvam_mla": {
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 4096, "moe_intermediate_size": 2048, "n_group":
        1, "n_routed_experts": 128, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8,
        "num_hidden_layers": 32, "routed_scaling_factor": 2.5, "topk_group": 1
    },
    "nemotron_h": {
        "hidden_size": 4096, "mlp_bias": False, "mlp_hidden_act": "relu2", "moe_intermediate_size": 7688,
        "moe_latent_size": None, "moe_shared_expert_intermediate_size": 7688, "n_group": 1, "n_routed_experts": 8,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 2, "routed_scaling_factor": 1.0,
        "topk_group": 1
    },
    "beam": {
        "hidden_act": "silu", "hidden_size": 5120, "moe_intermediate_size": 2560, "n_group": 8, "norm_topk_prob": True,
        "num_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 52, "routed_scaling_factor": 2.5,
        "topk_group": 4
    },
    "deepseek_v2": {
        "first_k_dense_replace": 0, "hidden_act": "silu", "hidden_size": 4096, "mlp_bias": False,
        "moe_intermediate_size": 1407, "n_group": None, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_experts_per_tok": None, "num_hidden_layers": 32, "routed_scaling_factor": 1.0, "topk_group": None
    },
    "deepseek_ocr2_text": {
        "hidden_act": "silu", "hidden_size": 4096, "mlp_bias": False, "moe_intermediate_size": 1407, "n_group": None,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": None, "num_hidden_layers": 32,
        "routed_scaling_factor": 1.0, "topk_group": None
    },
    "unlimited_ocr_text": {
        "hidden_act": "silu", "hidden_size": 1280, "mlp_bias": False, "moe_intermediate_size": 896, "n_group": 1,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "num_hidden_layers": 12,
        "routed_scaling_factor": 1.0, "topk_group": 1
    },
    "mistral4": {
        "first_k_dense_replace": 0, "hidden_act": "silu", "hidden_size": 4096, "moe_intermediate_size": 2048, "n_group":
        1, "n_routed_experts": 128, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 4,
        "num_hidden_layers": 36, "routed_scaling_factor": 1.0, "topk_group": 1
    },
    "mistral_large4_text": {
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 6144, "moe_intermediate_size": 6144, "n_group":
        1, "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 4, "num_hidden_layers": 72,
        "routed_scaling_factor": 1.0, "topk_group": 1
    },
    "flint": {
        "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048, "mlp_only_layers": [0, 1],
        "moe_intermediate_size": 512, "norm_topk_prob": True, "num_experts": 256, "num_experts_per_tok": 6,
        "num_hidden_layers": 49, "shared_expert_intermediate_size": 1024
    },
    "minimax_m2": {
        "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 1536, "num_experts_per_tok": 8,
        "num_hidden_layers": 62, "num_local_experts": 256
    },
    "hy_v3": {
        "hidden_act": "silu", "hidden_size": 4096, "mlp_bias": False, "moe_intermediate_size": 1536, "num_experts": 192,
        "num_experts_per_tok": 8, "num_hidden_layers": 80, "num_shared_experts": 1, "router_scaling_factor": 2.826
    },
    "afmoe": {
        "hidden_act": "silu", "hidden_size": 2048, "moe_intermediate_size": 1408, "num_dense_layers": 1, "num_experts":
        64, "num_experts_per_tok": 6, "num_hidden_layers": 32, "num_shared_experts": 2, "route_scale": 1.0
    },
    "inkling2_text": {
        "hidden_act": "silu", "hidden_size": 4608, "moe_intermediate_size": 2304, "n_routed_experts": 384,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "route_scale": 8.0
    },
    "inkling2_loop_text": {
        "hidden_act": "silu", "hidden_size": 2304, "moe_intermediate_size": 1152, "n_routed_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 24, "route_scale": 8.0
    },
    "muse_spark_text": {
        "hidden_act": "silu", "hidden_size": 8192, "moe_intermediate_size": 4096, "num_experts_per_tok": 8,
        "num_hidden_layers": 62, "num_local_experts": 256, "output_multiplier": 0.1767766952966369,
        "routed_scaling_factor": 1.0
    },
    "minimax_m3_vl_text": {
        "hidden_act": "silu", "hidden_size": 6144, "intermediate_size": 3072, "num_experts_per_tok": 4,
        "num_hidden_layers": 60, "num_local_experts": 128, "routed_scaling_factor": 2.0, "shared_intermediate_size":
        3072, "swiglu_alpha": 1.702, "swiglu_limit": 7.0
    },
    "step3p5": {
        "hidden_size": 4096, "mlp_bias": False, "moe_intermediate_size": 1280, "moe_router_scaling_factor": 1.0,
        "n_routed_experts": 288, "num_experts_per_tok": 8, "num_hidden_layers": 45, "share_expert_dim": 1280,
        "swiglu_limits": None, "swiglu_limits_shared": None
    },
    "laguna": {
        "hidden_act": "silu", "hidden_size": 2048, "moe_intermediate_size": 512, "moe_routed_scaling_factor": 1.0,
        "num_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 40, "shared_expert_intermediate_size": 512
    },
    "lfm2_moe": {
        "hidden_size": 2048, "moe_intermediate_size": 1792, "norm_topk_prob": True, "num_dense_layers": 2,
        "num_experts": 32, "num_experts_per_tok": 4, "num_hidden_layers": 32, "routed_scaling_factor": 1.0
    },
    "kolibri1": {
        "hidden_act": "silu", "hidden_size": 2560, "moe_intermediate_size": 512, "norm_topk_prob": False,
        "num_experts_per_tok": 6, "num_hidden_layers": 50, "num_local_experts": 384, "shared_expert_intermediate_size":
        512
    },
    "inkling_text": {
        "hidden_act": "silu", "hidden_size": 6144, "moe_intermediate_size": 3072, "n_routed_experts": 256,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "num_hidden_layers": 66, "route_scale": 8.0
    },
    "deepseek_v4": {
        "hidden_act": "silu", "hidden_size": 4096, "mlp_bias": False, "moe_intermediate_size": 2048, "n_routed_experts":
        256, "num_experts_per_tok": 6, "num_hidden_layers": 43, "routed_scaling_factor": 1.5, "scoring_func":
        "sqrtsoftplus", "swiglu_limit": 10.0
    },
    "llama4_text": {
        "hidden_act": "silu", "hidden_size": 5120, "interleave_moe_layer_step": 1, "intermediate_size": 8192,
        "num_experts_per_tok": 1, "num_hidden_layers": 48, "num_local_experts": 16
    },
    "cohere2_moe": {
        "hidden_act": "silu", "hidden_size": 8192, "intermediate_size": 22528, "norm_topk_prob": True, "num_experts": 8,
        "num_experts_per_tok": 2, "num_hidden_layers": 40, "num_shared_experts": 0,
        "shared_expert_combination_strategy": "average"
    },
    "mixtral": {
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_local_experts": 8
    },
    "minimax": {
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_local_experts": 8
    },
    "olmoe": {
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 2048, "norm_topk_prob": False, "num_experts":
        64, "num_experts_per_tok": 8, "num_hidden_layers": 16
    },
    "flex_olmo": {
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008, "norm_topk_prob": False, "num_experts":
        7, "num_experts_per_tok": 5, "num_hidden_layers": 32
    },
    "qwen2_moe": {
        "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048, "mlp_only_layers": [],
        "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_experts": 60, "num_experts_per_tok": 4,
        "num_hidden_layers": 24, "shared_expert_intermediate_size": 5632
    },
    "qwen3_moe": {
        "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": False, "num_experts_per_tok": 8, "num_hidden_layers": 24,
        "num_local_experts": 128
    },
    "qwen3_next": {
        "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048, "mlp_only_layers": [],
        "moe_intermediate_size": 512, "norm_topk_prob": True, "num_experts": 512, "num_experts_per_tok": 10,
        "num_hidden_layers": 48, "shared_expert_intermediate_size": 512
    },
    "qwen3_vl_moe_text": {
        "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048, "mlp_only_layers": [],
        "moe_intermediate_size": 1408, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_local_experts": 60
    },
    "qwen3_omni_moe_text": {
        "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 28
    },
    "qwen3_omni_moe_talker_text": {
        "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 1024, "mlp_only_layers": [],
        "moe_intermediate_size": 384, "norm_topk_prob": False, "num_experts_per_tok": 8, "num_hidden_layers": 20,
        "num_local_experts": 128
    },
    "qwen3_5_moe_text": {
        "hidden_act": "silu", "hidden_size": 2048, "moe_intermediate_size": 512, "num_experts": 256,
        "num_experts_per_tok": 8, "num_hidden_layers": 40, "shared_expert_intermediate_size": 512
    },
    "qwen4_exp_text": {
        "hidden_size": 2048, "moe_intermediate_size": 512, "norm_topk_prob": True, "num_experts": 512,
        "num_experts_per_tok": 10, "num_hidden_layers": 40, "shared_expert_intermediate_size": 512
    },
    "lara_mini": {
        "hidden_act": "silu", "hidden_size": 1024, "moe_intermediate_size": 512, "norm_topk_prob": True, "num_experts":
        128, "num_experts_per_tok": 4, "num_hidden_layers": 34, "shared_expert_intermediate_size": 512
    },
    "mellum": {
        "hidden_act": "silu", "hidden_size": 2304, "moe_intermediate_size": 896, "norm_topk_prob": True,
        "num_experts_per_tok": 8, "num_hidden_layers": 28, "num_local_experts": 64
    },
    "jamba": {
        "expert_layer_offset": 1, "expert_layer_period": 2, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "num_experts": 16, "num_experts_per_tok": 2, "num_hidden_layers": 32
    },
    "hunyuan_v1_moe": {
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008, "moe_topk": 1, "num_experts": 1,
        "num_hidden_layers": 32
    },
    "dbrx": {
        "d_model": 2048, "ffn_config.ffn_act_fn.name": "silu", "ffn_config.ffn_hidden_size": 3584,
        "ffn_config.moe_num_experts": 4, "ffn_config.moe_top_k": 1, "n_layers": 24
    },
    "gemma4_text": {
        "enable_moe_block": False, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
        "moe_intermediate_size": None, "num_experts": None, "num_hidden_layers": 30, "top_k_experts": None
    },
    "diffusion_gemma_text": {
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "moe_intermediate_size": None, "num_experts":
        None, "num_hidden_layers": 30, "top_k_experts": None
    },
    "ernie4_5_moe": {
        "hidden_act": "silu", "hidden_size": 2560, "moe_intermediate_size": 1536, "moe_k": 6, "moe_layer_end_index": 27,
        "moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_norm_min": 1e-12, "moe_num_experts": 64,
        "moe_num_shared_experts": 2, "num_hidden_layers": 28, "use_bias": False
    },
    "ernie4_5_vl_moe_text": {
        "hidden_act": "silu", "hidden_size": 2560, "moe_intermediate_size": 1536, "moe_k": 6, "moe_norm_min": 1e-12,
        "moe_num_experts": 64, "moe_num_shared_experts": 2, "num_hidden_layers": 28, "use_bias": False
    },
    "longcat_flash": {
        "expert_ffn_hidden_size": 2048, "hidden_act": "silu", "hidden_size": 6144, "moe_topk": 12, "n_routed_experts":
        512, "num_layers": 28, "routed_scaling_factor": 6.0, "zero_expert_num": 256
    },
    "zaya": {
        "hidden_act": "silu", "hidden_size": 2048, "moe_intermediate_size": 2048, "num_experts": 16,
        "num_experts_per_tok": 1, "num_hidden_layers": 40
    },
    "gpt_oss": {
        "hidden_size": 2880, "intermediate_size": 2880, "num_experts_per_tok": 4, "num_hidden_layers": 36,
        "num_local_experts": 128, "swiglu_alpha": 1.702, "swiglu_limit": 7.0
    },
    "openai_privacy_filter": {
        "hidden_size": 640, "intermediate_size": 640, "num_experts_per_tok": 4, "num_hidden_layers": 8,
        "num_local_experts": 128, "swiglu_alpha": 1.702, "swiglu_limit": 7.0
    },
    "granitemoe": {
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_local_experts": 8
    },
    "granitemoeshared": {
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_local_experts": 8, "shared_intermediate_size": 0
    },
    "granitemoe_swa": {
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_local_experts": 8, "shared_intermediate_size": 0
    },
    "granitemoehybrid": {
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_local_experts": 8, "shared_intermediate_size": 1024
    },
    "aria_text": {
        "hidden_size": 4096, "intermediate_size": 4096, "mlp_bias": False, "moe_num_experts": 8,
        "moe_num_shared_experts": 2, "moe_topk": 2, "num_hidden_layers": 32
    },
    "jetmoe": {
        "activation_function": "silu", "hidden_size": 2048, "intermediate_size": 5632, "num_experts_per_tok": 2,
        "num_hidden_layers": 12, "num_local_experts": 8
    },
    "phimoe": {
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 6400, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_local_experts": 16, "router_jitter_noise": 0.01
    },
}  # fmt: skip

SYNONYMS: dict[str, dict[str, str]] = {
    "deepseek_v3": {"num_local_experts": "n_routed_experts"},
    "deepseek_v32": {"num_local_experts": "n_routed_experts"},
    "glm4_moe": {"num_local_experts": "n_routed_experts"},
    "glm4_moe_lite": {"num_local_experts": "n_routed_experts"},
    "glm4v_moe_text": {"num_local_experts": "n_routed_experts"},
    "glm_moe_dsa": {"num_local_experts": "n_routed_experts"},
    "glm5_next_text": {"num_local_experts": "n_routed_experts"},
    "dots1": {"num_local_experts": "n_routed_experts"},
    "dots3_note_text": {"num_local_experts": "n_routed_experts"},
    "solar_open": {"num_local_experts": "n_routed_experts"},
    "axk1": {"num_local_experts": "n_routed_experts"},
    "axk2": {"num_local_experts": "n_routed_experts"},
    "hy_v4": {"num_local_experts": "n_routed_experts"},
    "hy_v4_vl_text": {"num_local_experts": "n_routed_experts"},
    "mimo_v2_flash": {"num_local_experts": "n_routed_experts"},
    "kimi_linear": {
        "n_group": "num_expert_group", "n_shared_experts": "num_shared_experts", "norm_topk_prob": "moe_renormalize",
        "num_experts_per_tok": "num_experts_per_token", "num_local_experts": "num_experts"
    },
    "bailing_hybrid": {
        "n_group": "num_expert_group", "n_shared_experts": "num_shared_experts", "norm_topk_prob": "moe_renormalize",
        "num_experts_per_tok": "num_experts_per_token", "num_local_experts": "num_experts"
    },
    "sarvam_moe": {
        "num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts", "num_shared_experts":
        "n_shared_experts"
    },
    "sarvam_mla": {
        "num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts", "num_shared_experts":
        "n_shared_experts"
    },
    "nemotron_h": {"num_local_experts": "n_routed_experts"},
    "deepseek_v2": {"num_experts": "n_routed_experts"},
    "deepseek_ocr2_text": {"num_experts": "n_routed_experts"},
    "unlimited_ocr_text": {"num_experts": "n_routed_experts"},
    "mistral4": {"num_local_experts": "n_routed_experts"},
    "mistral_large4_text": {"num_local_experts": "n_routed_experts"},
    "minimax_m2": {"num_experts": "num_local_experts"},
    "hy_v3": {"num_local_experts": "num_experts"},
    "inkling2_text": {
        "intermediate_size": "moe_intermediate_size", "num_local_experts": "n_routed_experts", "routed_scaling_factor":
        "route_scale"
    },
    "inkling2_loop_text": {
        "intermediate_size": "moe_intermediate_size", "num_local_experts": "n_routed_experts", "routed_scaling_factor":
        "route_scale"
    },
    "minimax_m3_vl_text": {"num_experts": "num_local_experts"},
    "step3p5": {
        "moe_num_experts": "n_routed_experts", "moe_top_k": "num_experts_per_tok", "num_local_experts":
        "n_routed_experts", "share_expert_dims": "share_expert_dim"
    },
    "kolibri1": {"num_experts": "num_local_experts"},
    "inkling_text": {"num_local_experts": "n_routed_experts"},
    "deepseek_v4": {"intermediate_size": "moe_intermediate_size", "num_local_experts": "n_routed_experts"},
    "mixtral": {"num_experts": "num_local_experts"},
    "minimax": {"num_experts": "num_local_experts"},
    "olmoe": {"num_local_experts": "num_experts"},
    "flex_olmo": {"num_local_experts": "num_experts"},
    "qwen3_moe": {"num_experts": "num_local_experts"},
    "qwen3_vl_moe_text": {"num_experts": "num_local_experts"},
    "qwen3_omni_moe_talker_text": {"num_experts": "num_local_experts"},
    "mellum": {"num_experts": "num_local_experts"},
    "jamba": {"num_local_experts": "num_experts"},
    "hunyuan_v1_moe": {"num_experts_per_tok": "moe_topk", "num_local_experts": "num_experts"},
    "dbrx": {"hidden_size": "d_model", "num_hidden_layers": "n_layers"},
    "ernie4_5_moe": {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
    "ernie4_5_vl_moe_text": {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
    "longcat_flash": {
        "moe_intermediate_size": "expert_ffn_hidden_size", "num_experts_per_tok": "moe_topk", "num_local_experts":
        "n_routed_experts"
    },
    "gpt_oss": {"num_experts": "num_local_experts"},
    "openai_privacy_filter": {"num_experts": "num_local_experts"},
}  # fmt: skip
