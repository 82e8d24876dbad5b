"""moe_ref, configs of huggingface: keys that say nothing of what an MoE layer computes, as a list."""

from moe_ref.specs.readers.config import Irrelevant

ROUTING_WORDS = (
    "moe", "expert", "router", "routing", "routed", "route", "topk", "top_k", "gating", "score", "scoring", "renorm",
    "shared", "sparse", "dense", "group", "n_activated", "zero_", "hash",
)  # fmt: skip
"""A key with one of these words is never irrelevant by a pattern, only by its name."""

PATTERNS = (
    # tokens, tokenizer, generation
    "*_token_id", "*_token_ids", "*_token_index", "*_token", "*_tokens", "pad_*", "bos_*", "eos_*", "*vocab*", "max_*",
    "min_*", "num_beam*", "*_penalty", "return_*", "output_*", "*_ngram*", "ngram_*", "*_words_ids", "forced_*",
    "suppress_*", "*_suppress_*", "tokenizer*", "chat_template*", "generation_*", "id2label", "label2id", "tts_*",
    # attention, positions, recurrence
    "attn_*", "*attention*", "*_attn_*", "*_attn", "rope*", "*rope*", "*rotary*", "*yarn*", "*head_dim*", "*_heads",
    "*_heads_per_layer", "num_heads*", "*_lora_rank", "*window*", "swa_*", "*_swa_*", "qk_*", "*_qk_*", "qkv_*", "*_qkv*",
    "q_*", "kv_*", "k_*", "v_*", "o_*", "rel_*", "index_*", "indexer_*", "mla_*", "kda_*", "mamba_*", "ssm_*", "conv_*",
    "*_conv_*", "*_conv", "time_step*", "linear_*", "cca_*", "state_size", "chunk_size*", "alibi*", "local_*", "global_*",
    "position_*", "*_positions", "*_position_*", "compress_*", "hc_*", "log_scaling_*", "sconv_*", "use_nope*", "no_rope*",
    "lightning_*", "nope_*",
    # norms, dropouts, starting values, embeddings
    "*_eps", "*epsilon*", "*_norm", "*_norms", "norm_type", "*_norm_type", "layernorm_*", "layer_norm*", "*dropout*",
    "*_drop", "*_pdrop", "initializer_*", "init_*", "*_init", "tie_*", "*embedding_multiplier", "embed_*", "*_embed_*",
    "*embeddings*", "lm_head_*", "*_lm_head", "logits_*", "final_logit_*", "residual_*", "ple_*", "*layer_scale*",
    # further parts: prediction of further tokens, vision, audio
    "mtp_*", "*_mtp", "*_mtp_*", "*nextn*", "vision_*", "visual_*", "*_vision_*", "image_*", "img_*", "video_*", "mm_*",
    "audio_*", "speech_*", "codec_*", "talker_*", "projector_*", "*_projector*", "spatial_*", "temporal_*",
    # dtype, speed, files
    "*dtype*", "torch_*", "torchscript", "quant*", "*_quant*", "transformers_version", "*_version", "cache_*", "*_cache",
    "use_cache*", "_*", "auto_map", "compression_config", "unsloth_*", "kernel_*", "tensor_parallel*", "*_parallel_*",
)  # fmt: skip

NAMES = (
    # what every config of transformers may have
    "model_type", "architectures", "name_or_path", "task_specific_params", "problem_type", "pruned_heads", "prefix",
    "finetuning_task", "is_decoder", "is_encoder_decoder", "add_cross_attention", "tf_legacy_loss", "use_bfloat16",
    "do_sample", "early_stopping", "bad_words_ids", "temperature", "num_beam_groups", "typical_p", "top_p", "diversity_penalty",
    "exponential_decay_length_penalty", "remove_invalid_values", "length_penalty", "chunk_size_feed_forward",
    "num_return_sequences", "num_labels", "pretraining_tp", "per_layer_config", "experts_implementation", "is_causal",
    "encoder_no_repeat_ngram_size", "custom_pipelines", "license", "use_return_dict",
    # widths of dense layers, other parts of the block
    "intermediate_size", "ffn_hidden_size", "dense_intermediate_size", "intermediate_size_mlp", "mlp_bias", "bias",
    "use_bias", "hidden_size", "layer_types", "layer_group_size", "layers_block_type", "num_layers", "num_hidden_layers",
    "expand", "n_groups", "o_groups", "mamba_n_groups", "group_norm_size", "rms_norm_eps", "use_rmsnorm", "use_gemma_norm", "norm_head", "norm_softmax",
    "norm_before_gate", "num_logits_to_keep", "logit_scale", "mup_enabled", "embedding_scale", "scale_embedding",
    "scale_depth", "floor_scale", "postnorm", "use_mamba_kernels", "use_mambapy", "use_associative_scan", "act_fn",
    "attn_layer_offset", "attn_layer_period", "hybrid_layer_pattern", "full_attention_interval", "rescale_prenorm_residual",
    "clip_qkv", "d_rel", "model_max_length", "seq_length", "initial_context_length", "original_max_position_embeddings",
    "use_mla", "use_qk_norm", "use_cla", "cla_share_factor", "block_size", "num_kv_shared_layers", "hidden_size_per_layer_input",
    "use_double_wide_mlp", "gated_norm_rank", "kv_source_layers", "number_of_conv_states", "canvas_length", "n_head",
    "n_heads", "n_layer", "n_layers", "resid_pdrop", "emb_pdrop", "attn_config", "attn_type_list", "kv_channels",
    "output_gate_type", "learnable_sink_init", "d_conv", "d_state", "ep_size", "n_layers_per_attn_res_block",
    "full_attn_alpha_factor", "full_attn_beta_factor", "linear_silu", "mlp_alpha_factor", "mlp_beta_factor", "share_q_dim",
    "sliding_window_pattern", "heads_per_ngram", "split_ngram_parts", "seed", "number_of_mtp_layers", "num_mtp_layers",
    "num_mtp_modules", "use_mtp", "query_pre_attn_scalar", "qk_scale_factor", "chain_hidden_post_norm", "freq_allocation",
    "classifier_dropout", "default_mlp_activation", "use_fused_rope", "use_logn_attn", "use_dynamic_ntk", "add_classification_head",
    "class_num", "pool_type", "kv_lora_rank", "use_rotary_pos_emb", "dense_list", "tokenizer_class", "use_cuda_graph",
    "use_llm_loss", "use_sandwich_norm", "use_grouped_mm", "stop_words", "hidden_act_param", "sparse_attention_config",
    "enable_audio_output", "user_token_id", "ignore_index", "tile_tag", "candidate_resolutions", "attn_other_setting",
    # training, or speed alone
    "aux_loss_alpha", "seq_aux", "router_aux_loss_coef", "moe_aux_loss_coeff", "router_z_loss_coef", "moe_z_loss_coeff",
    "moe_loss_weight", "output_router_logits", "router_jitter_noise", "input_jitter_noise", "load_balance_coeff",
    "moe_load_balance_coeff", "router_dtype", "moe_router_dtype", "moe_router_dtype", "moe_dtype", "moe_implementation",
    "moe_group_experts", "moe_ep_size", "bias_update_coeff", "routing_bias_update_rate", "moe_grouped_gemm",
    "use_grouped_gemm", "moe_backend", "moe_shared_expert_overlap", "expert_parallel_size", "moe_token_drop_policy",
    "moe_aux_loss_weight", "moe_router_force_load_balancing", "need_fp32_gate", "moe_router_need_fp32_gate",
    # whether there is a balancing bias, which is a weight
    "use_routing_bias", "use_expert_bias", "use_moe_router_bias", "moe_router_enable_expert_bias", "moe_use_router_bias",
    "enable_expert_bias",
    # sampling parameters, under names that the routing has elsewhere
    "top_k", "norm_eps", "num_groups", "output_scores", "index_topk", "index_topk_freq", "index_topk_pattern",
    "index_skip_topk_offset", "index_topk_blocks", "index_share_for_mtp_iteration", "use_sparse_attention",
    "indexer_budget", "router_bias_update_rate",
)  # fmt: skip

SAMPLING = frozenset(("top_k",))
"""Sampling parameters of old files whose names speak of the routing elsewhere."""

IRRELEVANT = Irrelevant(NAMES, PATTERNS, ROUTING_WORDS)
