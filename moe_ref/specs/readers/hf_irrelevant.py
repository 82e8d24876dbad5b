"""moe_ref, configs of huggingface: keys that say nothing of what an MoE layer computes, as a list."""

from moe_ref.specs.readers.config import Irrelevant

ROUTING_WORDS = (
    "moe", "expert", "router", "routing", "routed", "route", "topk", "top_k", "gating", "score", "scoring", "renorm",
    "shared", "sparse", "dense", "group", "n_activated", "zero_expert", "hash", "capacity", "swiglu", "activation_",
    "act_fn",
)  # fmt: skip
"""A key with one of these is never irrelevant by a word, only by its name."""

WORDS = (
    # tokens, tokenizer, generation
    "token", "vocab", "beam", "penalty", "return_", "output_", "ngram", "words_ids", "suppress", "template",
    "generation", "_start_id", "_end_id", "_newline_id",
    "label", "prompt", "stop_", "sampling", "logits", "max_len", "max_model", "max_seq", "seq_len", "seq_length",
    "length",
    "context", "num_codes", "codebook", "reward", "classif",
    # attention, positions, recurrence
    "attention", "attn", "rope", "rotary", "yarn", "head", "lora", "window", "position", "compress", "mamba", "conv",
    "time_step", "linear", "chunk", "alibi", "causal", "mask", "sink", "flash", "sdpa", "indexer", "index_n",
    "index_head",
    "index_k", "index_local", "index_init", "index_block", "log_scaling", "recurr", "state_", "lightning", "_period",
    "delta", "neighbor", "split_num",
    # norms, dropouts, starting values, embeddings
    "epsilon", "norm_type", "layernorm", "layer_norm", "rmsnorm", "rms_norm", "normalization_function", "dropout",
    "drop_rate",
    "initializer", "init_", "embed", "residual", "softcapping", "layer_scale", "multiplier", "scale_factor",
    # further parts: prediction of further tokens, vision, audio
    "nextn", "vision", "visual", "image", "video", "audio", "speech", "codec", "talker", "projector", "spatial",
    "temporal",
    "patch", "pixel", "media", "anyres", "pooling", "resolution", "downsample", "fps", "multimodal", "modality",
    "language",
    # dtype, speed, files
    "dtype", "torch", "quant", "version", "cache", "auto_map", "kernel", "fused", "parallel", "compressor",
    "checkpoint",
    "precision", "_fp32", "fp32_", "bf16", "use_fp", "impl_type", "implementation", "backend", "memory", "offload",
    "jit",
)  # fmt: skip
"""A key with one of these is about another part of a model, or about how it is run."""

TOKENS = frozenset((
    "bos", "eos", "pad", "eod", "sep", "cls", "tts", "qk", "kv", "qkv", "q", "k", "v", "o", "rel", "mla", "kda", "ssm",
    "cca",
    "hc", "swa", "nope", "eps", "mtp", "mm", "img", "ctx", "tie", "lm", "vit", "ple", "cli", "oe", "lsa", "dsa", "gqa",
    "mha",
    "cla", "expand", "postnorm", "prenorm", "seed", "tp", "pp",
))  # fmt: skip
"""As `WORDS`, but between underscores."""

NAMES = (
    # what every config of transformers may have
    "model_type", "architectures", "name_or_path", "task_specific_params", "problem_type", "pruned_heads", "prefix",
    "finetuning_task", "is_decoder", "is_encoder_decoder", "add_cross_attention", "tf_legacy_loss", "use_bfloat16",
    "do_sample", "early_stopping", "bad_words_ids", "temperature", "num_beam_groups", "typical_p", "top_p",
    "diversity_penalty",
    "exponential_decay_length_penalty", "remove_invalid_values", "length_penalty", "chunk_size_feed_forward",
    "unsloth_fixed", "debug", "micro_forward", "use_deepep", "skip_checkpoint",
    "num_return_sequences", "num_labels", "pretraining_tp", "per_layer_config", "experts_implementation", "is_causal",
    "encoder_no_repeat_ngram_size", "custom_pipelines", "license", "use_return_dict",
    # widths of dense layers, other parts of the block
    "intermediate_size", "ffn_hidden_size", "dense_intermediate_size", "intermediate_size_mlp", "mlp_bias", "bias",
    "use_bias", "hidden_size", "layer_types", "layer_group_size", "layers_block_type", "num_layers",
    "num_hidden_layers",
    "expand", "n_groups", "o_groups", "mamba_n_groups", "group_norm_size", "rms_norm_eps", "use_rmsnorm",
    "use_gemma_norm", "norm_head", "norm_softmax",
    "norm_before_gate", "num_logits_to_keep", "logit_scale", "mup_enabled", "embedding_scale", "scale_embedding",
    "scale_depth", "floor_scale", "postnorm", "use_mamba_kernels", "use_mambapy", "use_associative_scan", "act_fn",
    "attn_layer_offset", "attn_layer_period", "hybrid_layer_pattern", "full_attention_interval",
    "rescale_prenorm_residual",
    "clip_qkv", "d_rel", "model_max_length", "seq_length", "initial_context_length", "original_max_position_embeddings",
    "use_mla", "use_qk_norm", "use_cla", "cla_share_factor", "block_size", "num_kv_shared_layers",
    "hidden_size_per_layer_input",
    "use_double_wide_mlp", "gated_norm_rank", "kv_source_layers", "number_of_conv_states", "canvas_length", "n_head",
    "n_heads", "n_layer", "n_layers", "resid_pdrop", "emb_pdrop", "attn_config", "attn_type_list", "kv_channels",
    "output_gate_type", "learnable_sink_init", "d_conv", "d_state", "ep_size", "n_layers_per_attn_res_block",
    "full_attn_alpha_factor", "full_attn_beta_factor", "linear_silu", "mlp_alpha_factor", "mlp_beta_factor",
    "share_q_dim",
    "sliding_window_pattern", "heads_per_ngram", "split_ngram_parts", "seed", "number_of_mtp_layers", "num_mtp_layers",
    "num_mtp_modules", "use_mtp", "query_pre_attn_scalar", "qk_scale_factor", "chain_hidden_post_norm",
    "freq_allocation",
    "classifier_dropout", "default_mlp_activation", "use_fused_rope", "use_logn_attn", "use_dynamic_ntk",
    "add_classification_head",
    "class_num", "pool_type", "kv_lora_rank", "use_rotary_pos_emb", "dense_list", "tokenizer_class", "use_cuda_graph",
    "use_llm_loss", "use_sandwich_norm", "use_grouped_mm", "stop_words", "hidden_act_param", "sparse_attention_config",
    "enable_audio_output", "user_token_id", "ignore_index", "tile_tag", "candidate_resolutions", "attn_other_setting",
    # training, or speed alone
    "aux_loss_alpha", "seq_aux", "router_aux_loss_coef", "moe_aux_loss_coeff", "router_z_loss_coef", "moe_z_loss_coeff",
    "moe_loss_weight", "output_router_logits", "router_jitter_noise", "input_jitter_noise", "load_balance_coeff",
    "moe_load_balance_coeff", "router_dtype", "moe_router_dtype", "moe_router_dtype", "moe_dtype", "moe_implementation",
    "moe_ep_size", "bias_update_coeff", "routing_bias_update_rate", "moe_grouped_gemm",
    "use_grouped_gemm", "moe_backend", "moe_shared_expert_overlap", "expert_parallel_size", "moe_token_drop_policy",
    "moe_aux_loss_weight", "moe_router_force_load_balancing", "need_fp32_gate", "moe_router_need_fp32_gate",
    # whether there is a balancing bias, which is a weight
    "use_routing_bias", "use_expert_bias", "use_moe_router_bias", "moe_router_enable_expert_bias",
    "moe_use_router_bias",
    "enable_expert_bias",
    "num_attention_groups", "normalization_function", "zero_centered", "moe_token_dispatcher_type",
    "moe_permute_fusion",
    "moe_router_fusion", "moe_router_load_balancing_type", "moe_router_bias_update_rate", "router_load_balancing_type",
    "moe_aux_loss_coef", "moe_router_padding_for_fp8", "mlp_intermediate_size", "sparse_attention_config", "rm_head",
    "activation_dropout", "n_group_norm", "group_size", "moe_layer_recompute", "moe_extended_tp", "talker_config",
    "code2wav_config", "speaker_id", "local_layer_ids", "hybrid_layer_ids", "num_query_groups", "scale_emb",
    "dim_model_base", "n_inner",
    "multi_query", "normalization_type", "norm_bias", "use_post_norm", "pre_norm", "num_decoder_layers", "depth",
    "mtp_hybrid_override_pattern", "mtp_layers_block_type", "model_file", "weight_format", "use_shared_embedding",
    "model_name", "for_llm_compressor",
    "act_dropout", "hidden_dropout", "activation_checkpointing", "sparse_attention_freq", "block_length", "mlp_type",
    # sampling parameters, under names that the routing has elsewhere
    "top_k", "norm_eps", "num_groups", "output_scores", "index_topk", "index_topk_freq", "index_topk_pattern",
    "index_skip_topk_offset", "index_topk_blocks", "index_share_for_mtp_iteration", "use_sparse_attention",
    "indexer_budget", "router_bias_update_rate",
)  # fmt: skip

SAMPLING = frozenset(("top_k",))
"""Sampling parameters of old files whose names speak of the routing elsewhere."""

IRRELEVANT = Irrelevant(NAMES, words=WORDS, tokens=TOKENS, routing_words=ROUTING_WORDS)
