"""conformance, subject transformers: which router class computes which spec, one row for each, as data.

A row says which fields of RouterSpec the class has under which config name (`free`), and which it fixes (`fixed`);
all others are the identity. The same row therefore matches a spec, builds the config, and says what does not fit.
Checked against transformers 5.24.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from conformance.subjects.fitting import inert_fields
from moe_ref import RouterSpec
from moe_ref.specs.readers.hf_rows import DEEPSEEK, ERNIE, GEMMA, GROUPS, KIMI, LOCAL, NORM, ROUTED, SCALE, SIZES

TINY = {"num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}
"""Config entries that no router reads, but that some config classes check (heads divide the width, RoPE is even)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RealRouter:
    """A router class of transformers, and the specs that it computes."""

    name: str
    module: str
    config: str
    router: str
    free: dict[str, str]
    """Field of RouterSpec -> config name; '' where `extra` writes it."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Field of RouterSpec -> the value it always has; a tuple lists several; a function takes the spec."""
    ungrouped: dict[str, Any] | None = None
    """Config entries that mean 'no groups', for a class that has groups."""
    least_per_group: int = 1
    """Experts a group needs: 2 where a group is scored by its two best."""
    extra: Callable[[dict], dict] | None = None
    """Further config entries, from all fields of the spec."""
    bias: str = ""
    """Path of the balancing bias; 'argument': passed to forward; '': the class has none."""
    bias_is_float32: bool = True
    """Whether a bias that is an argument stays float32 in a bfloat16 model, also where the keep-list has none."""
    gate: str = "weight"
    """Path of the gate's weight."""
    gate_bias: str = ""
    """Path of the gate's learned bias."""
    plain_gate: bool = True
    """Whether the logits are the product of tokens and gate alone."""
    hidden: str = "hidden_size"
    """Config name of the token width."""
    width_is_even: bool = False
    """Whether its config takes even token widths alone: it makes them the rotary dimension."""
    call: str = "usual"
    """How it is called and read; a method of `router.TransformersRouter`."""

    def has(self, name: str, default, spec: RouterSpec | None = None) -> tuple:
        """The values of a field that the class always has; the identity where the row does not name it."""
        value = self.fixed.get(name, default)
        if callable(value):
            return (value(spec),) if spec else ()
        return value if isinstance(value, tuple) else (value,)

    def mismatches(self, spec: RouterSpec) -> list[str]:
        """What the class cannot do of this spec, as 'field (its value, not the wanted one)'; empty: it fits."""
        inert = inert_fields(spec)
        found = []
        for name, default in DEFAULTS.items():
            if name in inert or (name in self.free and name not in self.fixed):
                continue
            wanted, values = getattr(spec, name), self.has(name, default, spec)
            if wanted not in values:
                found.append(f"{name} ({' or '.join(map(str, values))}, not {wanted})")
        if self.width_is_even and spec.num_logits % 2:
            found.append(f"num_experts (an even width of logits, not {spec.num_logits})")
        if spec.experts_per_group < self.least_per_group:
            found.append(f"experts per group (at least {self.least_per_group}, not {spec.experts_per_group})")
        return found

    def config_entries(self, values: dict, hidden_size: int) -> dict:
        """Keyword arguments of the config class, from the fields of a spec (valid or not)."""
        entries = TINY | {self.hidden: hidden_size}
        entries |= {config: values[name] for name, config in self.free.items() if config}
        if values["num_expert_groups"] is None and values["num_limited_groups"] is None:
            entries |= self.ungrouped or {}
        return entries | (self.extra(values) if self.extra else {})

    def example(self, num_experts: int) -> RouterSpec:
        """Some valid spec that the class computes, without groups."""
        if_grouped = ("group_score_k", "mask_fill", "weights_from")
        usable = {name: self.has(name, None)[:1] for name in self.fixed if name not in if_grouped}
        spec: dict[str, Any] = {"top_k": 1} | {name: value for name, values in usable.items() for value in values}
        return RouterSpec(num_experts=num_experts, **spec)


DEFAULTS = {each.name: each.default for each in fields(RouterSpec)}


def row(name: str, prefix: str, free: dict, *fixed: dict, router: str = "TopKRouter", module: str = "",
        config: str = "", **others) -> RealRouter:  # fmt: skip
    """A row: class names are prefix + 'Config' and prefix + router; the fixed fields may come in several parts."""
    merged = {key: value for each in fixed for key, value in each.items()}
    return RealRouter(name=name, module=module or name, config=config or prefix + "Config", router=prefix + router,
                      free=free, fixed=merged, **others)  # fmt: skip


def deepseek_v3(name: str, prefix: str, free: dict, *fixed: dict, router: str = "TopkRouter", **others) -> RealRouter:
    """The line of DeepSeek-V3: sigmoid, balancing bias, groups by their two best, eps 1e-20."""
    one_group = {free["num_expert_groups"]: 1, free["num_limited_groups"]: 1}
    usual = {"ungrouped": one_group, "least_per_group": 2, "bias": CORRECTION}
    return row(name, prefix, free, SIGMOID, EPS_20, *fixed, router=router, **usual | others)


def deepseek_v2(name: str, prefix: str, **others) -> RealRouter:
    """The line of DeepSeek-V2: softmax, groups by their best, filled with 0, weights read after the fill."""

    def method(values: dict) -> dict:
        return {"topk_method": "greedy" if values["num_expert_groups"] is None else "group_limited_greedy"}

    fixed = {"group_score_k": 1, "mask_fill": 0.0, "weights_from": "masked_scores"}
    return row(name, prefix, ROUTED | GROUPS | SCALE, fixed, router="TopkRouter", ungrouped={}, extra=method,
               **others)  # fmt: skip


def biased(name: str, prefix: str, free: dict, *fixed: dict, **others) -> RealRouter:
    """Sigmoid and balancing bias without groups, always normalised."""
    return row(name, prefix, free, SIGMOID, NORMED, *fixed, **{"bias": CORRECTION} | others)


def _ffn_config(values: dict) -> dict:
    sizes = {"moe_num_experts": values["num_experts"], "moe_top_k": values["top_k"], "ffn_hidden_size": 1}
    norm_p = float(values["norm_p"]) if values["route_norm"] else None
    return {"ffn_config": sizes | {"moe_normalize_expert_weights": norm_p}}


def _soft_cap(values: dict) -> dict:
    return {"moe_router_logit_softcapping": values["logit_softcap"] or 0.0}


def _full_attention(values: dict) -> dict:
    return {"layer_types": ["full_attention"] * TINY["num_hidden_layers"]}


ONE_GROUP = {"n_group": 1, "topk_group": 1}
CORRECTION = "e_score_correction_bias"

SIGMOID = {"score_func": "sigmoid"}
BY_LOGIT = {"select_by": "logit"}
SELECTED = {"score_over": "selected", "select_by": "logit"}
NORMED = {"route_norm": True}
EPS_20 = {"norm_eps": 1e-20}
FILL_0 = {"mask_fill": 0.0}
EXPERT_SCALE = {"learned_scale": ("none", "per_expert")}
ANY_SCORE = {"score_func": ("sqrtsoftplus", "sigmoid")}
ONE_OVER_K = {"route_scale": lambda spec: 1 / spec.top_k, "output_scale": lambda spec: spec.top_k}

ROWS = (
    # The plain ones first: softmax without groups.
    row("mixtral", "Mixtral", LOCAL, NORMED),
    row("olmoe", "Olmoe", SIZES | NORM),
    # Groups.
    deepseek_v3("deepseek_v3", "DeepseekV3", DEEPSEEK),
    deepseek_v2("deepseek_v2", "DeepseekV2"),
    deepseek_v3("axk2", "AXK2", DEEPSEEK, FILL_0, ungrouped={"n_group": None, "topk_group": None}, least_per_group=1),
    row("mistral4", "Mistral4", DEEPSEEK, EPS_20, FILL_0, router="TopkRouter", ungrouped=ONE_GROUP, least_per_group=2),
    row("mistral_large4", "MistralLarge4Text", ROUTED | GROUPS | SCALE, NORMED, EPS_20, FILL_0, router="TopkRouter",
        ungrouped=ONE_GROUP, least_per_group=2),
    # The scale is applied by the block, to the sum.
    deepseek_v3("beam", "Beam", SIZES | GROUPS | NORM | {"output_scale": "routed_scaling_factor"}, router="TopKRouter"),
    # Sigmoid or sqrtsoftplus without groups.
    row("flint", "Flint", SIZES | NORM, SIGMOID),
    row("cohere2_moe_sigmoid", "Cohere2Moe", SIZES | NORM, SIGMOID, BY_LOGIT, module="cohere2_moe",
        extra=lambda values: {"expert_selection_fn": "sigmoid"}),
    biased("minimax_m2", "MiniMaxM2", LOCAL, bias="argument", bias_is_float32=False),
    biased("hy_v3", "HYV3", SIZES | {"route_scale": "router_scaling_factor"}, EPS_20, bias="argument"),
    biased("afmoe", "Afmoe", SIZES | {"route_scale": "route_scale"}, EPS_20, router="TokenChoiceRouter",
           bias="argument", bias_is_float32=False, gate="gate.weight", call="rank_3"),
    biased("inkling2", "Inkling2", ROUTED | {"route_scale": "route_scale"}, EPS_20, config="Inkling2TextConfig"),
    biased("muse_spark", "MuseSpark", LOCAL | SCALE | {"logit_scale": "output_multiplier"}, {"norm_eps": 1e-15},
           router="TopkRouter", config="MuseSparkTextConfig"),
    biased("minimax_m3_vl", "MiniMaxM3VL", LOCAL | {"output_scale": "routed_scaling_factor"},
           config="MiniMaxM3VLTextConfig"),
    biased("step3p7", "Step3p7", ROUTED | {"output_scale": "moe_router_scaling_factor"}, config="Step3p7TextConfig"),
    biased("laguna", "Laguna", SIZES | {"output_scale": "moe_routed_scaling_factor", "logit_softcap": ""},
           extra=_soft_cap),
    row("lfm2_moe", "Lfm2Moe", SIZES | NORM | SCALE, SIGMOID, {"norm_eps": 1e-6}, bias="argument"),
    row("kolibri1", "Kolibri1", LOCAL | NORM, SIGMOID, BY_LOGIT, bias=CORRECTION),
    row("inkling", "Inkling", ROUTED | {"route_scale": "route_scale", "num_scored_shared_experts": "n_shared_experts"},
        SIGMOID, NORMED, {"norm_with_shared": True, "learned_scale": ("none", "global")}, router="TopkRouter",
        config="InklingTextConfig", bias=CORRECTION, plain_gate=False, call="inkling"),
    row("deepseek_v4", "DeepseekV4", ROUTED | SCALE | {"score_func": "scoring_func"}, NORMED, EPS_20, ANY_SCORE,
        bias=CORRECTION),
    row("deepseek_v4_hash", "DeepseekV4", ROUTED | SCALE | {"score_func": "scoring_func"}, NORMED, EPS_20, ANY_SCORE,
        {"selector": "table"}, router="HashRouter", module="deepseek_v4", call="deepseek_v4_hash"),
    # Softmax over all, with more to it.
    row("dbrx", "Dbrx", {"num_experts": "", "top_k": "", "route_norm": "", "norm_p": ""}, router="FFN",
        extra=_ffn_config, hidden="d_model", gate="router.layer.weight", call="dbrx"),
    row("gemma4", "Gemma4Text", GEMMA, NORMED, EXPERT_SCALE, router="Router", gate="proj.weight", plain_gate=False,
        extra=_full_attention, call="gemma4"),
    row("ernie4_5_moe", "Ernie4_5_Moe", ERNIE, NORMED, {"norm_form": "clamp"}, bias=f"moe_statics.{CORRECTION}"),
    row("longcat_flash", "LongcatFlash", SCALE | {"num_experts": "n_routed_experts", "top_k": "moe_topk",
        "num_null_experts": "zero_expert_num"}, router="TopkRouter", bias=CORRECTION, gate="classifier.weight"),
    row("zaya", "Zaya", SIZES, {"top_k": 1, "num_null_experts": 1, "null_kind": "skip"}, router="Router",
        bias="balancing_biases", gate="", plain_gate=False, call="zaya"),
    # Logits are ranked first.
    row("gpt_oss", "GptOss", LOCAL, SELECTED, gate_bias="bias"),
    row("openai_privacy_filter", "OpenAIPrivacyFilter", LOCAL, SELECTED, ONE_OVER_K, gate_bias="bias"),
    row("llama4", "Llama4", LOCAL, SIGMOID, BY_LOGIT, {"weight_on": "input"}, router="Router",
        config="Llama4TextConfig", call="llama4"),
    row("phimoe", "Phimoe", LOCAL | {"mixer_eps": "router_jitter_noise"}, BY_LOGIT,
        {"selector": "sparsemixer", "top_k": 2}),
    # The other families of these semantics: found by name, or where one above does not fit.
    *(deepseek_v3(name, prefix, DEEPSEEK) for name, prefix in (
        ("deepseek_v32", "DeepseekV32"), ("glm4_moe", "Glm4Moe"), ("glm4_moe_lite", "Glm4MoeLite"),
        ("glm_moe_dsa", "GlmMoeDsa"), ("dots1", "Dots1"), ("axk1", "AXK1"), ("hy_v4", "HYV4"),
        ("mimo_v2_flash", "MiMoV2Flash"), ("nemotron_h", "NemotronH"), ("solar_open", "SolarOpen"),
        ("glm4v_moe", "Glm4vMoeText"), ("glm5_next", "Glm5NextText"), ("dots3_note", "Dots3NoteText"))),
    deepseek_v3("hy_v4_vl", "HYV4VL", DEEPSEEK, config="HYV4VLTextConfig"),
    biased("inkling2_loop", "Inkling2Loop", ROUTED | {"route_scale": "route_scale"}, EPS_20,
           config="Inkling2LoopTextConfig"),
    deepseek_v3("exaone_moe", "ExaoneMoe", SIZES | GROUPS | NORM | SCALE),
    deepseek_v3("kimi_linear", "KimiLinear", KIMI),
    deepseek_v3("bailing_hybrid", "BailingHybrid", KIMI),
    deepseek_v2("deepseek_ocr2", "DeepseekOcr2Text", width_is_even=True),
    deepseek_v2("unlimited_ocr", "UnlimitedOcrText", width_is_even=True),
    *(row(name, prefix, sizes | NORM) for name, prefix, sizes in (
        ("qwen3_moe", "Qwen3Moe", LOCAL), ("qwen2_moe", "Qwen2Moe", SIZES), ("qwen3_next", "Qwen3Next", SIZES),
        ("mellum", "Mellum", LOCAL), ("flex_olmo", "FlexOlmo", SIZES), ("qwen4_exp", "Qwen4ExpText", SIZES),
        ("lara_mini", "LaraMini", SIZES))),
    row("qwen3_omni_moe", "Qwen3OmniMoeThinkerText", SIZES | NORM, config="Qwen3OmniMoeTextConfig"),
    row("qwen3_omni_moe_talker", "Qwen3OmniMoeTalkerText", LOCAL | NORM, module="qwen3_omni_moe"),
    row("minimax", "MiniMax", LOCAL, NORMED),
    row("qwen3_5_moe", "Qwen3_5Moe", SIZES, NORMED, config="Qwen3_5MoeTextConfig"),
    row("qwen3_vl_moe", "Qwen3VLMoeText", LOCAL, NORMED),
    row("hunyuan_v1_moe", "HunYuanMoEV1", SIZES, NORMED, router="Gate", gate="wg.weight"),
    row("jamba", "Jamba", SIZES),
    row("diffusion_gemma", "DiffusionGemmaText", GEMMA, NORMED, EXPERT_SCALE, router="Router", gate="proj.weight",
        plain_gate=False, extra=_full_attention, call="gemma4"),
    row("ernie4_5_vl_moe", "Ernie4_5_VLMoe", ERNIE, NORMED, {"norm_form": "clamp"}, router="MoeTopKRouter",
        config="Ernie4_5_VLMoeTextConfig", bias=f"moe_statics.{CORRECTION}"),
    *(row(name, prefix, LOCAL, SELECTED) for name, prefix in (
        ("granitemoe", "GraniteMoe"), ("granitemoeshared", "GraniteMoeShared"), ("granitemoe_swa", "GraniteMoeSWA"))),
    row("granitemoehybrid", "GraniteMoeHybrid", LOCAL, SELECTED, extra=lambda values: {"mamba_n_heads": 1}),
    row("aria", "AriaText", {"num_experts": "moe_num_experts", "top_k": "moe_topk"}, SELECTED),
    row("jetmoe", "JetMoe", LOCAL, SELECTED, router="TopKGating", gate="layer.weight", call="jetmoe"),
    row("cohere2_moe", "Cohere2Moe", SIZES, SELECTED),
)  # fmt: skip

ROUTERS: dict[str, RealRouter] = {each.name: each for each in ROWS}
"""Every router by name, in the order in which a spec looks for one."""

_FINDINGS = {
    "transformers-axk2-chooses-of-dropped-groups": ("axk2",),
    "transformers-eager-experts-of-other-ranks": ("gpt_oss", "openai_privacy_filter", "nemotron_h"),
    "transformers-longcat-flash-one-expert": ("longcat_flash",),
    "transformers-router-jitter-reaches-the-experts": ("mixtral", "minimax", "phimoe"),
    "transformers-sparsemixer-takes-an-expert-twice": ("phimoe",),
    "transformers-top-k-larger-than-kept-groups": tuple(row.name for row in ROWS if "num_limited_groups" in row.free),
    "transformers-zaya-skips-count-for-expert-0": ("zaya",),
}
"""Page of docs/findings/ -> the families that it is about; pages about all of them are left out."""


def findings(name: str) -> list[str]:
    """The pages that say where the classes of a family deviate from their configuration."""
    return [page for page, names in _FINDINGS.items() if name in names]
