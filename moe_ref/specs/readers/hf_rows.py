"""moe_ref, configs of huggingface: one row for each model type, as data. Checked against transformers 5.24.

Defaults of keys that a file does not have are in `hf_defaults.py`, from the config classes themselves.
"""

from typing import Any

from moe_ref.specs.checks import require
from moe_ref.specs.readers.config import Config
from moe_ref.specs.readers.hf_row import (
    Fields,
    Row,
    Shared,
    everywhere,
    flagged,
    listed,
    prefix,
    steps,
    types,
)
from moe_ref.specs.semantics import (
    BY_LOGIT,
    DEEPSEEK_V2,
    EPS_20,
    FILL_0,
    LLAMA4,
    MINIMAX_M2,
    NORMED,
    PHIMOE,
    SELECTED,
    SIGMOID,
)

SIZES = {"num_experts": "num_experts", "top_k": "num_experts_per_tok"}
ROUTED = {"num_experts": "n_routed_experts", "top_k": "num_experts_per_tok"}
LOCAL = {"num_experts": "num_local_experts", "top_k": "num_experts_per_tok"}
GROUPS = {"num_expert_groups": "n_group", "num_limited_groups": "topk_group"}
NORM = {"route_norm": "norm_topk_prob"}
SCALE = {"route_scale": "routed_scaling_factor"}
DEEPSEEK = ROUTED | GROUPS | NORM | SCALE
KIMI = {
    "num_experts": "num_experts", "top_k": "num_experts_per_token", "num_expert_groups": "num_expert_group",
    "num_limited_groups": "topk_group", "route_norm": "moe_renormalize", "route_scale": "routed_scaling_factor",
}  # fmt: skip
INKLING2 = ROUTED | {"route_scale": "route_scale"}
GEMMA = {"num_experts": "num_experts", "top_k": "top_k_experts"}
ERNIE = {"num_experts": "moe_num_experts", "top_k": "moe_k", "norm_eps": "moe_norm_min"}
STEP = {"num_experts": "moe_num_experts", "top_k": "moe_top_k"}

COUNTED = Shared(count="n_shared_experts")
COUNTED_2 = Shared(count="num_shared_experts")
OWN_WIDTH = Shared(width="shared_expert_intermediate_size")
GATED = Shared(width="shared_expert_intermediate_size", gate="sigmoid")
NARROW: dict[str, Any] = {"width": "intermediate_size"}
NO_MLP_BIAS = {"mlp_bias": (False,)}
FIRST_DENSE = types(prefix("first_k_dense_replace", 1))
EACH_FREQ = types(prefix("first_k_dense_replace", 1, every="moe_layer_freq"))
FLAGGED = types(prefix("first_k_dense_replace", 1), flags="moe_layer_freq")


def row(names: str, router: dict[str, str], *fixed: Fields, family: str = "", **others) -> Row:
    """A row; `names` are the model types, with spaces between them, of which the first is the family."""
    model_types = tuple(names.split())
    merged = {key: value for each in fixed for key, value in each.items()}
    usual: dict[str, Any] = {"layers": everywhere}
    return Row(model_types=model_types, family=family or model_types[0].removesuffix("_text"), router=router,
               fixed=merged, **usual | others)  # fmt: skip


def deepseek_v3(names: str, router: dict[str, str] = DEEPSEEK, *fixed: Fields, **others) -> Row:
    """The line of DeepSeek-V3: sigmoid, balancing bias, groups by their two best, eps 1e-20."""
    usual: dict[str, Any] = {"shared": COUNTED, "layers": FIRST_DENSE}
    return row(names, router, SIGMOID, EPS_20, *fixed, **usual | others)


def deepseek_v2(names: str, **others) -> Row:
    """The line of DeepSeek-V2: softmax, groups by their best, filled with 0, weights read after the fill."""
    usual: dict[str, Any] = {"shared": COUNTED, "layers": FIRST_DENSE, "adjust": _deepseek_v2}
    return row(names, ROUTED | GROUPS | SCALE, **usual | others)


def biased(names: str, router: dict[str, str], *fixed: Fields, **others) -> Row:
    """Sigmoid and balancing bias without groups, always normalised."""
    return row(names, router, MINIMAX_M2, *fixed, **others)


# what a row cannot say


def _deepseek_v2(config: Config, router: Fields, kind: str) -> None:
    """topk_method decides whether there are groups; the scale is of the weights, which no flag norms.

    DeepSeek-VL2 routes as DeepSeek-V3, and its files name this model type.
    """
    method = config.get("topk_method", config.defaults.get("topk_method", "greedy"))
    if method == "noaux_tc" and config.get("scoring_func", "softmax") == "sigmoid":
        router |= SIGMOID | EPS_20 | {"route_norm": bool(config.get("norm_topk_prob", False, field="route_norm"))}
        return
    config.only("norm_topk_prob", (False,), "the code that norms leaves the scale out, and transformers never norms")
    valid = ("greedy", "gready", "group_limited_greedy")  # the second is the default of its own config class
    config.only("topk_method", valid)
    if method == "group_limited_greedy":
        router |= DEEPSEEK_V2
        return
    for field in ("num_expert_groups", "num_limited_groups"):
        said = router[field]
        require(said in (None, 0, 1), f"{config.names[field]} is {said!r}, but topk_method {method!r} has no groups")
    router |= {"num_expert_groups": None, "num_limited_groups": None}


def _deepseek_v4(config: Config, router: Fields, kind: str) -> None:
    if kind == "hash":
        router["selector"] = "table"


def _deepseek_v4_layers(config: Config, depth: int) -> list[str | None]:
    hashed = config.whole("num_hash_layers", 3, none=0)
    first: list[str | None] = ["hash" if i < hashed else "moe" for i in range(depth)]
    return types(lambda *_: first)(config, depth)


def _dbrx_file(values: Fields) -> Fields:
    inner = values.get("ffn_config") or {}
    act = inner.get("ffn_act_fn") or {}
    flat = {f"ffn_config.{key}": value for key, value in inner.items() if key != "ffn_act_fn"}
    return (
        {key: value for key, value in values.items() if key != "ffn_config"}
        | flat
        | {f"ffn_config.ffn_act_fn.{key}": value for key, value in act.items()}
    )


def _dbrx(config: Config, router: Fields, kind: str) -> None:
    norm_p = config.get("ffn_config.moe_normalize_expert_weights", 1.0, field="norm_p")
    router |= {"route_norm": norm_p is not None, "norm_p": 1.0 if norm_p is None else norm_p}


def _cohere2_moe(config: Config, router: Fields, kind: str) -> None:
    config.only("expert_selection_fn", ("softmax", "sigmoid"))
    if config.get("expert_selection_fn", "softmax") == "sigmoid":
        router |= SIGMOID | BY_LOGIT
    else:
        router |= SELECTED | {"route_norm": False}  # which a softmax over the selected has anyway


def _quotas(config: Config, router: Fields, kind: str) -> None:
    """router_n_groups says how many groups each give their share; -1, 0 and null: there are none."""
    groups = router.pop("quota_groups")
    if groups not in (None, -1, 0):
        router |= {"selector": "group_top_k", "quota_groups": groups}


def _capped(config: Config, router: Fields, kind: str) -> None:
    """A cap of 0 is none."""
    key = "router_logit_softcapping"
    router["logit_softcap"] = config.get(key, config.defaults.get(key, 0.0), field="logit_softcap") or None


def _normed_if_several(config: Config, router: Fields, kind: str) -> None:
    """Weights are normed where there is more than one; a single one is its score."""
    router["route_norm"] = router["top_k"] > 1


def _if_experts(config: Config, depth: int) -> list[str | None]:
    """All layers, or none where no key speaks of experts: of a model type that dense models have too."""
    named = any("expert" in key for key in config.values)
    return ["moe" if named and config.whole("num_experts", none=0) else None] * depth


def _arctic(config: Config, depth: int) -> list[str | None]:
    step = config.whole("moe_layer_frequency", 2, low=1, none=2)
    return ["moe" if (i + 1) % step == 0 else None for i in range(depth)]


def _grok_2(config: Config) -> str:
    dense = config.get("residual_moe", False)
    return "a dense branch is added, and the sum divided by the square root of 2 (residual_moe)" if dense else ""


def _laguna(config: Config, router: Fields, kind: str) -> None:
    router["logit_softcap"] = config.get("moe_router_logit_softcapping", 0.0, field="logit_softcap") or None


def _privacy_filter(config: Config, router: Fields, kind: str) -> None:
    router |= {"route_scale": 1 / router["top_k"], "output_scale": float(router["top_k"])}


def _inkling_file(values: Fields) -> Fields:
    if values.get("dense_intermediate_size") is None:
        return values
    # Then intermediate_size is the width of the experts.
    return values | {"moe_intermediate_size": values.get("moe_intermediate_size", values.get("intermediate_size"))}


def _phimoe(config: Config, router: Fields, kind: str) -> None:
    config.only("num_experts_per_tok", (2,), "sparsemixer chooses two, whatever the file says")


def _jamba(config: Config, depth: int) -> list[str | None]:
    period, offset = config.whole("expert_layer_period", 2, low=1), config.whole("expert_layer_offset", 1)
    if config.get("num_experts") == 1:  # which its code takes for a dense layer
        return [None] * depth
    return ["moe" if i % period == offset else None for i in range(depth)]


def _ernie(config: Config, depth: int) -> list[str | None]:
    start, step = config.whole("moe_layer_start_index"), config.whole("moe_layer_interval", 1, low=1)
    end = config.whole("moe_layer_end_index", -1, low=-1, none=-1)
    end = depth - 1 if end == -1 else end
    return ["moe" if (i + 1) % step == 0 and start <= i <= end else None for i in range(depth)]


def _ernie_vl_file(values: Fields) -> Fields:
    """Pairs are of text and of vision tokens; the router and the experts of text come first."""
    pairs = ("moe_num_experts", "moe_layer_start_index", "moe_layer_end_index", "moe_intermediate_size")
    first = {key: value[0] for key in pairs if isinstance(value := values.get(key), list) and value}
    return values | first


def _ernie_vl(config: Config, depth: int) -> list[str | None]:
    otherwise = _ernie if config.has("moe_layer_start_index") else prefix("first_k_dense_replace", 1)
    return types(otherwise)(config, depth)


def _nemotron_h(config: Config, depth: int) -> list[str | None]:
    pattern = config.get("hybrid_override_pattern", None)
    names = config.get("layers_block_type", None)
    if names is None:
        names = ["moe" if letter == "E" else "other" for letter in pattern or ""]
    return ["moe" if name == "moe" else None for name in names]


def _llama4(config: Config, depth: int) -> list[str | None]:
    step = config.whole("interleave_moe_layer_step", 1, none=0)
    every: list[str | None] = ["moe" if step and (i + 1) % step == 0 else None for i in range(depth)]
    return listed("moe_layers", lambda *_: every)(config, depth)


def _gemma4(config: Config, depth: int) -> list[str | None]:
    return ["moe" if config.get("enable_moe_block", False) else None] * depth


GEMMA_REASON = "the router reads the residual through a norm of its own, and the experts another norm of it"
SOFT_CAP_KEYS = ("mlp_gate_softcap", "mlp_up_softcap")
SOFT_CAPS = f"its activation is capped softly ({', '.join(SOFT_CAP_KEYS)})"
ERNIE_VL = "its block mixes two kinds of tokens, each with a router and experts of its own"

ROWS = (
    # The line of DeepSeek-V3.
    deepseek_v3("deepseek_v3 kimi_k2 dots_vlm", layers=FIRST_DENSE),
    deepseek_v3("deepseek_v32", also={"num_experts": "n_routed_experts"}, only=NO_MLP_BIAS),
    deepseek_v3("glm4_moe"),
    deepseek_v3("glm4_moe_lite"),
    deepseek_v3("glm4v_moe_text glm4v_moe"),
    deepseek_v3("glm_moe_dsa", also={"num_experts": "n_routed_experts"}, only=NO_MLP_BIAS),
    deepseek_v3("glm5_next_text glm5_next", clamp="swiglu_limit", layers=types(prefix("first_k_dense_replace", 3)),
                shared=Shared(count="n_shared_experts", clamp="same"), activation=""),
    deepseek_v3("dots1", layers=prefix("first_k_dense_replace"),
                only={"scoring_func": ("sigmoid", "noaux_tc")}),
    deepseek_v3("dots3_note_text dots3_note", only=NO_MLP_BIAS,
                shared=Shared(count="n_shared_experts", each="shared_experts_intermediate_size")),
    deepseek_v3("solar_open", layers=prefix("first_k_dense_replace", 0)),
    deepseek_v3("axk1", layers=EACH_FREQ, cannot="a norm follows the sum of routed and shared output"),
    deepseek_v3("axk2", DEEPSEEK, FILL_0, layers=EACH_FREQ),
    deepseek_v3("hy_v4", clamp="swiglu_limit", activation="", layers=types(prefix("first_k_dense_replace", 1))),
    deepseek_v3("hy_v4_vl_text hy_v4_vl", clamp="swiglu_limit", activation="",
                layers=types(prefix("first_k_dense_replace", 1))),
    deepseek_v3("mimo_v2_flash", shared=None, layers=FLAGGED),
    deepseek_v3("exaone_moe", SIZES | GROUPS | NORM | SCALE, shared=COUNTED_2, layers=types(
        flagged("is_moe_layer", prefix("first_k_dense_replace", 1))), also={
            "first_last_k_dense_replace": "first_k_dense_replace"}),
    deepseek_v3("kimi_linear", KIMI, shared=COUNTED_2, latent="routed_expert_hidden_size",
                latent_norm="latent_moe_use_norm", beta="activation_situ_beta",
                linear_beta="activation_situ_linear_beta", also={"n_shared_experts": "num_shared_experts"}),
    deepseek_v3("bailing_hybrid", KIMI, shared=COUNTED_2, also={"num_experts_per_tok": "num_experts_per_token"}),
    # Models of GLM-4.5's classes, with the weights' names of Ling; and of DeepSeek-V3's.
    deepseek_v3("sarvam_moe", family="bailing_hybrid"),
    deepseek_v3("sarvam_mla", family="deepseek_v3"),
    deepseek_v3("nemotron_h", latent="moe_latent_size", layers=_nemotron_h, activation="mlp_hidden_act",
                experts={"gated": False}, only=NO_MLP_BIAS, irrelevant=("moe_shared_expert_overlap",),
                shared=Shared(count="n_shared_experts", width="moe_shared_expert_intermediate_size")),
    deepseek_v3("beam", SIZES | GROUPS | NORM | {"output_scale": "routed_scaling_factor"}, shared=None,
                layers=types(prefix("first_k_dense_replace", 3))),
    # Softmax with groups.
    deepseek_v2("deepseek_v2", only=NO_MLP_BIAS, layers=prefix("first_k_dense_replace", 0)),
    deepseek_v2("deepseek_ocr2_text deepseek_ocr2", only=NO_MLP_BIAS),
    deepseek_v2("unlimited_ocr_text unlimited_ocr", only=NO_MLP_BIAS),
    row("mistral4", DEEPSEEK, EPS_20, FILL_0, shared=COUNTED,
        layers=prefix("first_k_dense_replace", 0)),
    row("mistral_large4_text mistral_large4", ROUTED | GROUPS | SCALE, NORMED, EPS_20, FILL_0, shared=COUNTED,
        layers=FIRST_DENSE, also={"num_experts": "n_routed_experts"}),
    # Sigmoid or sqrtsoftplus without groups.
    row("flint", SIZES | NORM, SIGMOID, shared=OWN_WIDTH, layers=steps),
    biased("minimax_m2", LOCAL, **NARROW),
    biased("hy_v3", SIZES | {"route_scale": "router_scaling_factor"}, EPS_20, shared=COUNTED_2, layers=types(
        prefix("first_k_dense_replace", 1)), only=NO_MLP_BIAS | {"moe_router_use_sigmoid": (True,)},
        irrelevant=("enable_moe_fp32_combine",)),
    biased("afmoe", SIZES | {"route_scale": "route_scale"}, EPS_20, shared=COUNTED_2,
    layers=prefix("num_dense_layers")),
    biased("inkling2_text inkling2", INKLING2, EPS_20, cannot=SOFT_CAPS, irrelevant=SOFT_CAP_KEYS),
    biased("inkling2_loop_text inkling2_loop", INKLING2, EPS_20, cannot=SOFT_CAPS, irrelevant=(
        *SOFT_CAP_KEYS, "loop_config", "loop_gate_rank", "loop_layer_index_start", "loop_layer_index_end",
        "loop_num_passes")),
    biased("muse_spark_text muse_spark", LOCAL | SCALE | {"logit_scale": "output_multiplier"}, {"norm_eps": 1e-15},
           cannot="its experts work in a width of their own (moe_hidden_size), between projections and norms",
           layers=types(everywhere), irrelevant=("moe_hidden_size", "residual_gate_temperature")),
    biased("minimax_m3_vl_text minimax_m3_vl minimax_m3", LOCAL | {"output_scale": "routed_scaling_factor"}, **NARROW,
           activation="", alpha="swiglu_alpha", clamp="swiglu_limit", experts={"up_offset": 1.0},
           shared=Shared(width="shared_intermediate_size", clamp="same"), layers=types(
        prefix("first_k_dense_replace", 0), flags="moe_layer_freq"), only={"hidden_act": ("silu", "swigluoai")}),
    biased("step3p5 step3p7_text step3p7", ROUTED | {"output_scale": "moe_router_scaling_factor"}, family="step3p7",
           also={"num_experts": "n_routed_experts", "share_expert_dims": "share_expert_dim"},
           activation="", clamp="swiglu_limits", experts={"clamp_at": "after"},
           shared=Shared(width="share_expert_dim", clamp="swiglu_limits_shared"),
           layers=types(listed("moe_layers_enum", prefix("first_k_dense_replace", 3))),
           per_layer=("swiglu_limits", "swiglu_limits_shared"), only=NO_MLP_BIAS | {
               "moe_router_activation": ("sigmoid",), "norm_expert_weight": (True,)}),
    biased("laguna", SIZES | {"output_scale": "moe_routed_scaling_factor"}, shared=OWN_WIDTH, adjust=_laguna,
           layers=types(prefix("first_k_dense_replace", 1)), irrelevant=("gating",)),
    row("lfm2_moe", SIZES | NORM | SCALE, SIGMOID, {"norm_eps": 1e-6}, activation="",
    layers=prefix("num_dense_layers")),
    row("kolibri1", LOCAL | NORM, SIGMOID, BY_LOGIT, shared=OWN_WIDTH),
    biased("inkling_text inkling_mm_model", ROUTED | {"route_scale": "route_scale",
        "num_scored_shared_experts": "n_shared_experts"}, {"norm_with_shared": True, "learned_scale": "global"},
        family="inkling", shared=Shared(), layers=types(prefix("dense_mlp_idx", 0)), prepare=_inkling_file,
        irrelevant=("shared_expert_sink", "rms_norm_eps_moe_gate")),
    row("deepseek_v4", ROUTED | SCALE | {"score_func": "scoring_func"}, NORMED, EPS_20, adjust=_deepseek_v4,
        clamp="swiglu_limit", shared=Shared(clamp="same"), layers=_deepseek_v4_layers, only=NO_MLP_BIAS | {
            "scoring_func": ("sqrtsoftplus", "sigmoid")}, irrelevant=("expert_dtype",)),
    row("llama4_text llama4", LOCAL, LLAMA4, shared=Shared(), layers=_llama4, **NARROW),
    row("cohere2_moe", SIZES | NORM, adjust=_cohere2_moe, **NARROW, shared=Shared(
        count="num_shared_experts", combine="shared_expert_combination_strategy"),
        layers=types(prefix("first_k_dense_replace", 0)), irrelevant=(
            "prefix_dense_sliding_window_pattern", "prefix_dense_intermediate_size")),
    # Softmax over all.
    row("mixtral", LOCAL, NORMED, **NARROW),
    row("minimax minimax_m1 minimax_text_01", LOCAL, NORMED, **NARROW, irrelevant=("shared_moe_mode",)),
    row("olmoe", SIZES | NORM, **NARROW),
    row("flex_olmo", SIZES | NORM, **NARROW),
    row("qwen2_moe", SIZES | NORM, shared=GATED, layers=steps),
    row("qwen3_moe", LOCAL | NORM, layers=steps),
    row("qwen3_next", SIZES | NORM, shared=GATED, layers=steps),
    row("qwen3_vl_moe_text qwen3_vl_moe", LOCAL, NORMED, layers=steps),
    row("qwen3_omni_moe_text qwen3_omni_moe_thinker qwen3_omni_moe", SIZES | NORM, layers=steps),
    row("qwen3_omni_moe_talker_text qwen3_omni_moe_talker", LOCAL | NORM, layers=steps, shared=GATED,
        family="qwen3_omni_moe_talker"),
    row("qwen3_5_moe_text qwen3_5_moe", SIZES, NORMED, shared=GATED),
    row("qwen4_exp_text qwen4_exp", SIZES | NORM, shared=GATED, activation=""),
    row("lara_mini", SIZES | NORM, shared=OWN_WIDTH),
    row("mellum", LOCAL | NORM, layers=types(everywhere)),
    row("jamba", SIZES, layers=_jamba, **NARROW),
    row("hunyuan_v1_moe", {"num_experts": "num_experts", "top_k": "moe_topk"}, NORMED, shared=Shared(), **NARROW,
        also={"num_experts_per_tok": "moe_topk"}, only={"num_shared_expert": (1,), "use_mixed_mlp_moe": (True,),
              "moe_layer_num_skipped": (0,), "moe_drop_tokens": (False,), "group_limited_greedy": (False,)},
        per_layer=("num_experts", "moe_topk", "intermediate_size", "moe_intermediate_size", "num_shared_expert"),
        irrelevant=("moe_random_routing_dropped_token",)),
    row("dbrx", {"num_experts": "ffn_config.moe_num_experts", "top_k": "ffn_config.moe_top_k"}, adjust=_dbrx,
        prepare=_dbrx_file, width="ffn_config.ffn_hidden_size", dim="d_model", depth="n_layers",
        activation="ffn_config.ffn_act_fn.name", irrelevant=(
            "ffn_config.moe_jitter_eps", "ffn_config.moe_loss_weight", "ffn_config.hidden_size",
            "ffn_config.uniform_expert_assignment")),
    row("gemma4_text gemma4", GEMMA, NORMED, {"learned_scale": "per_expert"}, layers=_gemma4, cannot=GEMMA_REASON,
        activation="hidden_activation", also={"expert_intermediate_size": "moe_intermediate_size"}),
    row("diffusion_gemma_text diffusion_gemma", GEMMA, NORMED, {"learned_scale": "per_expert"}, cannot=GEMMA_REASON,
        activation="hidden_activation"),
    row("ernie4_5_moe", ERNIE, NORMED, {"norm_form": "clamp"}, shared=Shared(count="moe_num_shared_experts"),
        layers=_ernie, only={"use_bias": (False,), "moe_gate": ("topk",), "moe_gate_act": ("softmax",),
                             "moe_use_hard_gate": (True, False)}, irrelevant=("moe_capacity", "moe_use_aux_free")),
    row("ernie4_5_vl_moe_text ernie4_5_vl_moe ernie4_5_moe_vl", ERNIE, NORMED, {"norm_form": "clamp"},
        shared=Shared(count="moe_num_shared_experts"), cannot=ERNIE_VL, prepare=_ernie_vl_file,
        only={"use_bias": (False,)},
        layers=_ernie_vl, irrelevant=("moe_use_aux_free", "moe_use_hard_gate", "moe_capacity", "moe_gate",
            "moe_multimodal_dispatch_use_allgather")),
    row("longcat_flash longcat_flash_ngram", {"num_experts": "n_routed_experts", "top_k": "moe_topk",
    "num_null_experts": "zero_expert_num"}
        | SCALE, width="expert_ffn_hidden_size", depth="num_layers", only={
            "router_bias": (False,), "zero_expert_type": ("identity",)}),
    row("zaya", SIZES, {"num_null_experts": 1, "null_kind": "skip"}, cannot="its gate is a network",
        irrelevant=("router_hidden_size",)),
    # Logits are ranked first.
    row("gpt_oss", LOCAL, SELECTED, gate_bias=True, alpha="swiglu_alpha", clamp="swiglu_limit", activation="",
        experts={"up_offset": 1.0, "bias": True}, also={"experts_per_token": "num_experts_per_tok"}, **NARROW),
    row("openai_privacy_filter", LOCAL, SELECTED, gate_bias=True, alpha="swiglu_alpha", clamp="swiglu_limit",
        activation="", experts={"up_offset": 1.0, "bias": True}, adjust=_privacy_filter, **NARROW),
    row("granitemoe", LOCAL, SELECTED, **NARROW),
    *(row(name, LOCAL, SELECTED, **NARROW, shared=Shared(width="shared_intermediate_size"))
      for name in ("granitemoeshared", "granitemoe_swa", "granitemoehybrid")),
    row("aria_text aria aria_moe_lm", {"num_experts": "moe_num_experts", "top_k": "moe_topk"}, SELECTED, activation="",
    **NARROW,
        shared=Shared(count="moe_num_shared_experts"), only=NO_MLP_BIAS),
    row("jetmoe", LOCAL, SELECTED, activation="activation_function", cannot="it adds a bias to the summed output",
        irrelevant=("aux_loss_coef",), **NARROW, only={"glu": (True,)}, also={
            "moe_num_experts": "num_local_experts", "moe_top_k": "num_experts_per_tok",
            "ffn_hidden_size": "intermediate_size", "num_layers": "num_hidden_layers",
            "n_layer": "num_hidden_layers"}),
    row("phimoe grinmoe", LOCAL | {"mixer_eps": "router_jitter_noise"}, PHIMOE, adjust=_phimoe, **NARROW),
    # Not in transformers 5.24.
    deepseek_v3("bailing_moe_v2 bailing_moe_linear llada2_moe", SIZES | GROUPS | SCALE, NORMED, shared=COUNTED_2,
                family="bailing_hybrid", only={"use_bias": (False,), "multi_gate": (False,)},
                source="https://huggingface.co/inclusionAI/Ling-mini-2.0"),
    row("bailing_moe", SIZES | NORM, shared=COUNTED_2, family="qwen3_moe", layers=prefix("first_k_dense_replace", 0),
        only={"use_bias": (False,), "multi_gate": (False,)}, source="https://huggingface.co/inclusionAI/Ling-lite"),
    row("minicpm", SIZES, NORMED, **NARROW, layers=_if_experts, family="mixtral", irrelevant=("scale_depth",),
        source="https://huggingface.co/openbmb/MiniCPM-MoE-8x2B"),
    row("Klear", SIZES | NORM, SIGMOID, shared=COUNTED, layers=steps, family="flint",
        cannot="a learned pair of factors weighs routed and shared output",
        source="https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/models/Klear.py"),
    row("deepseek", ROUTED | NORM, EPS_20, shared=COUNTED, layers=prefix("first_k_dense_replace", 0,
        every="moe_layer_freq"), family="qwen3_moe", source="https://huggingface.co/deepseek-ai/deepseek-moe-16b-base"),
    row("step3_text step3_vl", STEP | {"route_norm": "norm_expert_weight"}, shared=Shared(width="share_expert_dim"),
        layers=listed("moe_layers_enum", lambda config, depth: [None, *["moe"] * (depth - 1)]), activation="",
        defaults={"norm_expert_weight": True}, family="qwen3_moe", source="https://huggingface.co/stepfun-ai/step3"),
    # Its class norms and takes the share of each of router_n_groups groups; so do vLLM and SGLang.
    row("interns1_pro_text interns1_pro", SIZES | NORM | {"quota_groups": "router_n_groups"}, adjust=_quotas,
        layers=steps, family="qwen3_moe", defaults={"router_n_groups": -1, "norm_topk_prob": True},
        source="https://huggingface.co/internlm/Intern-S1-Pro"),
    # As xai-org/grok-1 computes it: no norm and no cap, which ports of it have.
    row("grok-1 grok_1", SIZES, adjust=_capped, activation="", experts={"activation": "gelu_tanh"}, **NARROW,
        family="olmoe", source="https://github.com/xai-org/grok-1"),
    row("grok_2", LOCAL, adjust=_capped, activation="", experts={"activation": "gelu_tanh"}, cannot=_grok_2,
        defaults={"router_logit_softcapping": 30.0}, family="olmoe", irrelevant=("residual_moe",),
        source="https://huggingface.co/xai-org/grok-2"),
    # Beside it a dense branch works on another input, which is no part of the layer.
    row("arctic", LOCAL, adjust=_normed_if_several, layers=_arctic, **NARROW, family="mixtral", irrelevant=(
            "moe_train_capacity_factor", "moe_eval_capacity_factor", "moe_min_capacity", "moe_token_dropping",
            "enable_expert_tensor_parallelism", "use_residual", "parallel_attn_mlp_res", "enc_index"),
        source="https://huggingface.co/Snowflake/snowflake-arctic-instruct"),
    row("hunyuan", {"num_experts": "num_experts", "top_k": "moe_topk"}, adjust=_normed_if_several, shared=Shared(),
        **NARROW, also={"num_experts_per_tok": "moe_topk"}, only={
            "num_shared_expert": (1,), "use_mixed_mlp_moe": (True,), "moe_layer_num_skipped": (0,),
            "moe_drop_tokens": (False,)}, family="hunyuan_v1_moe", irrelevant=("moe_random_routing_dropped_token",),
        source="https://huggingface.co/tencent/Tencent-Hunyuan-Large"),
)  # fmt: skip

BY_MODEL_TYPE: dict[str, Row] = {name: each for each in ROWS for name in each.model_types}
"""Row by the name that a file gives."""

NO_ROUTER = {
    "doge": "product keys choose its experts",
    "nllb-moe": "its routing drops tokens over a capacity",
    "switch_transformers": "its routing drops tokens over a capacity",
    "vitpose_backbone": "a dataset index chooses its expert",
}
"""Model types with experts that no RouterSpec describes, and why."""
