"""moe_ref, configs of MaxText: a pyconfig object, a dict, or a flat yml, as fields of our specs.

Semantics after `RoutedMoE.get_topk` of AI-Hypercomputer/maxtext 0.2.5: what is computed depends on
decoder_block and on the beginning of model_name. A part of a config is read with the defaults of base.yml.
"""

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_ref.specs.checks import integer, nearest, require
from moe_ref.specs.readers.config import Config, Irrelevant, load
from moe_ref.specs.readers.hf_row import Fields

DEFAULTS: Fields = {
    "num_experts": 1, "num_experts_per_tok": 1, "routed_score_func": "", "routed_bias": False,
    "routed_scaling_factor": 1.0,
    "n_routing_groups": -1, "topk_routing_group": -1, "norm_topk_prob": False, "shared_experts": 1,
    "capacity_factor": -1.0,
    "sparse_matmul": True, "mlp_bias": False, "mlp_activations_limit": -1.0, "mlp_activations": ["silu", "linear"],
    "use_random_routing": False, "first_num_hash_layers": 0, "model_name": "default", "fuse_expert_scales": False,
}  # fmt: skip
"""Of base.yml."""
BLOCKS = ("mixtral", "qwen3_moe", "qwen3_next", "qwen3_5", "gpt_oss", "llama4", "deepseek", "deepseek4", "gemma4")
OF_DEEPSEEK = ("deepseek", "deepseek4")
GATED = ("qwen3_next", "qwen3_5")
"""Blocks with one shared expert, as wide as an expert, behind a sigmoid of its own."""
SHARED = (*OF_DEEPSEEK, *GATED, "llama4")
GROUPED = ("deepseek3", "deepseek4", "kimi-k2")
"""Beginnings of model_name that route by DeepSeek-V3's rule."""
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu_tanh", "relu": "relu"}
OF_GPT_OSS = {"sigmoid": "silu"}
"""It multiplies the gate half by the activation of 1.702 times that: z * sigmoid(1.702 * z)."""
SELECTED = {"score_over": "selected", "select_by": "logit"}
WORDS = ("expert", "rout", "moe", "top_k", "topk", "mlp_act", "capacity_factor", "mlp_bias", "num_hash",
    "decoder_block",
         "emb_dim", "mlp_dim")  # fmt: skip
"""What speaks of the MoE layers in a file that is about a whole training."""
IRRELEVANT = Irrelevant(
    (
        "load_balance_loss_weight", "routed_bias_update_rate", "defer_small_all_reduces",
        "moe_use_megatron_seq_aux_loss",
        "use_ring_of_experts", "use_custom_sort_vjp", "prefuse_moe_weights", "use_ragged_sort", "ragged_buffer_factor",
        "num_moe_emb_chunks", "num_moe_token_chunks", "moe_chunk_barrier", "moe_dropless_fallback",
        "moe_fsdp_use_two_stage_all_gather",
        "shard_exp_on_fsdp", "shard_embed_moe_on_fsdp", "moe_use_direct_token_gather", "moe_topk_before_ep_all_gather",
        "moe_log_max_load_ratio", "moe_quantize_token_all_gather", "moe_quantize_combine_bwd_method",
        "float32_gate_logits",
        "router_topk_matmul_vjp", "moe_mlpwi", "moe_mlpwi_0", "moe_mlpwi_1", "moe_mlpwo", "moe_x_sorted",
        "moe_routing_maps",
        "te_moe_block", "first_num_dense_layers", "interleave_moe_layer_step", "ici_expert_parallelism",
        "dcn_expert_parallelism", "expert_shard_attention_option", "moe_dispatch_no_expert_sharding", "mlp_dim",
        "base_mlp_dim", "decode_sampling_top_k", "padded_base_moe_mlp_dim", "indexer_topk",
        "moe_pin_sparse_core_all_gather",
    ),
)  # fmt: skip


def read(config: Any, *, ignore: Iterable[str] = ()) -> tuple[Fields, Config]:
    """The fields of the MoE layers of a MaxText config, and the config, whose names messages use.

    Raises:
        ValueError: it has no experts, does what no LayerSpec describes, or a key of its MoE layers is unknown.
    """
    values = load(config, parse=parse)
    if isinstance(config, (str, Path)):
        values.setdefault("model_name", Path(config).stem)  # as model_name=NAME loads configs/models/NAME.yml
    found = Config(values, "a config of MaxText", defaults=DEFAULTS)
    experts = found.get("num_experts", field="num_experts")
    require(
        isinstance(experts, int) and experts > 1, f"num_experts is {experts!r}: a dense model, which has no MoE layers"
    )
    block = found.get("decoder_block")
    block = str(getattr(block, "value", block))
    require(
        block in BLOCKS,
        f"decoder_block is {block!r}, of which moe_ref does not know how it routes{nearest(block, BLOCKS)}; write it "
        "by hand, LayerSpec(router=RouterSpec(...), experts=ExpertSpec(...))",
    )
    found.only("use_random_routing", (False,))
    found.only("first_num_hash_layers", (0,))
    if block == "gemma4":
        found.get("fuse_expert_scales")
    else:
        found.only("fuse_expert_scales", (False,))
    capacity = found.get("capacity_factor")
    require(
        found.get("sparse_matmul") or capacity is None or capacity < 0,
        f"capacity_factor is {capacity!r} without sparse_matmul, which drops tokens; no LayerSpec describes that",
    )
    router = {"num_experts": experts, "top_k": found.get("num_experts_per_tok", field="top_k")} | _router(found, block)
    fields: Fields = {"router": router, "experts": _experts(found, block)}
    fields["gate_bias"] = block == "gpt_oss" and bool(found.get("routed_bias"))
    shared = found.get("shared_experts", field="num_shared_experts") if block in SHARED else 0
    if shared and block in GATED:
        fields["shared"] = {"hidden_dim": fields["experts"]["hidden_dim"], "gate": "sigmoid"}
    elif shared:
        # Without the clamp of the routed experts: MaxText's MlpBlock has none.
        fields["shared"] = {"hidden_dim": shared * fields["experts"]["hidden_dim"]}
    about_layers = {key for key in values if any(word in key for word in WORDS)}
    others = values.keys() - about_layers
    unused = {"shared_experts"} if block not in SHARED else set()
    found.finish(IRRELEVANT.and_also(others | unused), ignore)
    return fields, found


def _router(config: Config, block: str) -> Fields:
    """The fields of RouterSpec besides its sizes."""
    score, bias, norm = (config.get(key) for key in ("routed_score_func", "routed_bias", "norm_topk_prob"))
    groups, _ = config.get("n_routing_groups"), config.get("topk_routing_group")
    scale, _ = config.get("routed_scaling_factor"), config.get("model_name")
    config.names |= {"num_expert_groups": "n_routing_groups", "num_limited_groups": "topk_routing_group",
                     "route_scale": "routed_scaling_factor", "score_func": "routed_score_func"}  # fmt: skip
    if block in OF_DEEPSEEK:
        return _router_of_deepseek(config, block)
    require(groups in (-1, None), f"n_routing_groups is {groups!r}; decoder_block {block!r} has no groups")
    require(scale == 1.0, f"routed_scaling_factor is {scale!r}; decoder_block {block!r} does not read it")
    require(
        score in ("", None),
        f"routed_score_func is {score!r}; with decoder_block {block!r} it would come on top of the softmax or the "
        "sigmoid that this has",
    )
    if block == "llama4":
        return {"score_func": "sigmoid", "select_by": "logit", "weight_on": "input"}
    if block == "gemma4":
        # norm_topk_prob, then the trained scale of each expert
        return {"select_by": "logit", "route_norm": bool(norm), "learned_scale": "per_expert"}
    require(
        not bias or block == "gpt_oss",
        f"routed_bias is True; with decoder_block {block!r} it would be part of the weights, as in no public model",
    )
    return dict(SELECTED)


def _router_of_deepseek(config: Config, block: str) -> Fields:
    """The same of a block that reads routed_score_func; the beginning of model_name says whether it knows groups."""
    score, name = config.get("routed_score_func"), str(config.get("model_name"))
    groups, limited = config.get("n_routing_groups"), config.get("topk_routing_group")
    grouped = name.startswith(GROUPED)
    require(
        score in ("softmax", "sigmoid", "sqrtsoftplus"),
        f"routed_score_func is {score!r}; decoder_block {block!r} needs softmax, sigmoid or sqrtsoftplus",
    )
    require(
        grouped or not config.get("routed_bias"),
        f"routed_bias is True; with model_name {name!r} it is part of the weights, which it is not in those that begin "
        f"with {', '.join(GROUPED)}",
    )
    found: Fields = {"score_func": score, "route_scale": config.get("routed_scaling_factor")}
    if score != "softmax":
        found |= {"route_norm": True, "norm_eps": 1e-20}
    if groups in (-1, None):
        require(limited in (-1, None), f"topk_routing_group is {limited!r}, but n_routing_groups is {groups!r}")
        return found
    require(
        grouped,
        f"n_routing_groups is {groups!r}; MaxText reads it in models {', '.join(GROUPED)} alone, and model_name is "
        f"{name!r}",
    )
    return found | {"num_expert_groups": groups, "num_limited_groups": limited}


def _experts(config: Config, block: str) -> Fields:
    dim = config.get("emb_dim" if config.has("emb_dim") else "base_emb_dim", field="dim")
    width = config.get("moe_mlp_dim" if config.has("moe_mlp_dim") else "base_moe_mlp_dim", field="hidden_dim")
    for field, value in (("dim", dim), ("hidden_dim", width)):
        integer(config.names[field], value, 1)
    acts = config.get("mlp_activations")
    require(isinstance(acts, (list, tuple)), f"mlp_activations is {acts!r}; it is a list")
    acts = list(acts)
    known = OF_GPT_OSS if block == "gpt_oss" else ACTIVATIONS
    require(
        len(acts) == 2 and acts[1] == "linear" and acts[0] in known,
        f"mlp_activations is {acts!r}; with decoder_block {block!r} it is one of {sorted(known)}, and 'linear'",
    )
    found: Fields = {"dim": dim, "hidden_dim": width, "activation": known[acts[0]]}
    limit, bias = config.get("mlp_activations_limit"), config.get("mlp_bias")
    if block == "gpt_oss":
        found |= {"alpha": 1.702, "up_offset": 1.0, "bias": bool(bias)}
    else:
        require(not bias, f"mlp_bias is True; with decoder_block {block!r} no public model has it")
    if limit and limit > 0 and block in ("gpt_oss", *OF_DEEPSEEK):
        config.names["clamp"] = "mlp_activations_limit"
        found["clamp"] = limit
    return found


def parse(text: str) -> Fields:
    """The keys of a flat yml: one `key: value` a line; lines that continue a list or a mapping belong to its key."""
    found: Fields = {}
    for line in text.splitlines():
        line = line.split(" #")[0].rstrip()
        if not line or line.startswith(("#", " ", "-", "]", "}")) or ":" not in line:
            continue
        key, _, value = line.partition(":")
        require(key not in found, f"{key} is given twice")
        found[key.strip().strip("\"'")] = _scalar(value.strip())
    if not found:
        raise ValueError("no line of the form key: value")
    return found


def _scalar(text: str) -> Any:
    named = {"true": True, "false": False, "null": None, "none": None, "": None, "~": None}
    if text.lower() in named:
        return named[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text.strip("\"'")
