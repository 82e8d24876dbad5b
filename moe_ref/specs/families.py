"""moe_ref, the families: public models and how they route, with their published sizes, as data.

Each entry of FAMILIES is a RouterSpec and where its numbers come from. A name is that of the model family in
huggingface/transformers; a suffix tells two routers of one family apart. Where a released checkpoint is not known for
sure, `checkpoint` says whose defaults stand in for it. CHECKPOINTS has further sizes, and models that are not in its
release 5.24.
"""

from dataclasses import dataclass, replace
from typing import Any

from moe_ref.specs.checks import nearest, require
from moe_ref.specs.router import RouterSpec
from moe_ref.specs.router_rules import WITHOUT_GROUPS
from moe_ref.specs.semantics import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    ERNIE,
    LLAMA4,
    MINIMAX_M2,
    MISTRAL4,
    MIXTRAL,
    ONE_GROUP,
    PHIMOE,
    SELECTED,
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its router at published size, the same router small, and the source."""

    name: str
    router: RouterSpec
    tiny: RouterSpec
    """The same semantics with at most 16 experts; with groups wherever the family can have them."""
    expert_bias: bool
    """Whether the choice has a balancing bias."""
    gate_bias: bool
    """Whether the gate has a learned bias."""
    checkpoint: str
    source: str
    of: str = ""
    """The family that a checkpoint of another size belongs to."""
    unverified: str = ""
    """What of it could not be checked against public code or a public config."""


NO_CHANGES: dict = {}
TINY_GROUPS = {"num_expert_groups": 4, "num_limited_groups": 2}


def _tiny(router: RouterSpec, changes: dict) -> RouterSpec:
    """The router with 8 experts, or 16 in 4 groups of which 2 are kept."""
    if router.num_expert_groups:
        changes = TINY_GROUPS | changes
    sizes = {
        "num_experts": 16 if "num_expert_groups" in changes else 8,
        "top_k": min(router.top_k, 4),
        "num_null_experts": min(router.num_null_experts, 4),
    }
    return router.replace(**sizes, **changes)


def _family(name: str, checkpoint: str, num_experts: int, top_k: int, *semantics: dict, tiny: dict = NO_CHANGES,
            expert_bias: bool = False, gate_bias: bool = False, **fields) -> Family:  # fmt: skip
    """A row of the table; a checkpoint without a slash is not a released model but stands in for one."""
    merged = {key: value for each in semantics for key, value in each.items()} | fields
    router = RouterSpec(num_experts=num_experts, top_k=top_k, **merged)
    hub, code = (
        "https://huggingface.co/",
        "https://github.com/huggingface/transformers/tree/main/src/transformers/models/",
    )
    folder = name.removesuffix("_hash").removesuffix("_sigmoid").removesuffix("_talker")
    return Family(
        name=name,
        router=router,
        tiny=_tiny(router, tiny),
        expert_bias=expert_bias,
        gate_bias=gate_bias,
        checkpoint=checkpoint,
        source=hub + checkpoint if "/" in checkpoint else code + folder,
    )


def _deepseek_v3_line() -> list[Family]:
    """Sigmoid and balancing bias, groups scored by their two best, dropped groups -inf (arXiv:2412.19437)."""
    groups_8_4 = {"num_expert_groups": 8, "num_limited_groups": 4}
    rows = [
        ("deepseek_v3", "deepseek-ai/DeepSeek-V3", 256, 8, groups_8_4, 2.5),
        ("deepseek_v32", "deepseek-ai/DeepSeek-V3.2-Exp", 256, 8, groups_8_4, 2.5),
        ("glm4_moe", "zai-org/GLM-4.5", 160, 8, ONE_GROUP, 2.5),
        ("glm4_moe_lite", "zai-org/GLM-4.7-Flash", 64, 4, ONE_GROUP, 1.8),
        ("glm4v_moe", "zai-org/GLM-4.5V", 128, 8, ONE_GROUP, 1.0),
        ("glm_moe_dsa", "zai-org/GLM-5", 256, 8, ONE_GROUP, 2.5),
        ("dots1", "rednote-hilab/dots.llm1.inst", 128, 6, ONE_GROUP, 2.5),
        ("kimi_linear", "moonshotai/Kimi-Linear-48B-A3B-Instruct", 256, 8, ONE_GROUP, 2.446),
        ("mimo_v2_flash", "XiaomiMiMo/MiMo-V2-Flash", 256, 8, ONE_GROUP, 1.0),
        ("solar_open", "defaults of SolarOpenConfig", 128, 8, ONE_GROUP, 1.0),
        ("axk1", "defaults of AXK1Config", 192, 8, groups_8_4, 2.5),
        ("bailing_hybrid", "defaults of BailingHybridConfig", 512, 8, groups_8_4, 2.5),
        ("dots3_note", "defaults of Dots3NoteTextConfig", 256, 8, ONE_GROUP, 1.0),
        ("exaone_moe", "LGAI-EXAONE/K-EXAONE-236B-A23B", 128, 8, ONE_GROUP, 2.5),
        ("glm5_next", "defaults of Glm5NextTextConfig", 288, 8, ONE_GROUP, 2.5),
        ("hy_v4", "defaults of HYV4Config", 256, 8, ONE_GROUP, 2.827),
        ("hy_v4_vl", "defaults of HYV4VLTextConfig", 256, 8, ONE_GROUP, 2.827),
        ("nemotron_h", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 128, 6, ONE_GROUP, 2.5),
    ]
    return [
        _family(name, checkpoint, num_experts, top_k, DEEPSEEK_V3, groups, expert_bias=True, route_scale=scale)
        for name, checkpoint, num_experts, top_k, groups, scale in rows
    ]


def _other_groups() -> list[Family]:
    """Groups, and what differs from DeepSeek-V3: the fill, the group score, or where the scale is applied."""
    return [
        # Fills with 0, which a negative choice score loses to; its released sizes have no groups.
        _family("axk2", "defaults of AXK2Config", 128, 8, DEEPSEEK_V3, expert_bias=True, route_scale=2.5,
                tiny=TINY_GROUPS | {"mask_fill": 0.0}),
        _family("beam", "defaults of BeamConfig", 256, 8, DEEPSEEK_V3, expert_bias=True, output_scale=2.5,
                num_expert_groups=8, num_limited_groups=4),
        _family("deepseek_v2", "deepseek-ai/DeepSeek-V2", 160, 6, DEEPSEEK_V2, route_scale=16.0,
                num_expert_groups=8, num_limited_groups=3),
        _family("deepseek_ocr2", "deepseek-ai/DeepSeek-OCR-2", 64, 6, tiny=TINY_GROUPS | DEEPSEEK_V2),
        _family("unlimited_ocr", "defaults of UnlimitedOcrTextConfig", 64, 6, tiny=TINY_GROUPS | DEEPSEEK_V2),
        _family("mistral4", "defaults of Mistral4Config", 128, 4, MISTRAL4, ONE_GROUP),
        _family("mistral_large4", "defaults of MistralLarge4TextConfig", 128, 4, MISTRAL4, ONE_GROUP),
    ]  # fmt: skip


def _sigmoid_line() -> list[Family]:
    """Sigmoid (or sqrtsoftplus) scores without groups."""
    return [
        _family("afmoe", "arcee-ai/Trinity-Mini", 128, 8, DEEPSEEK_V3, expert_bias=True, route_scale=2.826),
        _family("hy_v3", "tencent/Hy3", 192, 8, DEEPSEEK_V3, expert_bias=True, route_scale=2.826),
        _family("inkling2", "defaults of Inkling2TextConfig", 384, 8, DEEPSEEK_V3, expert_bias=True, route_scale=8.0),
        _family("inkling2_loop", "defaults of Inkling2LoopTextConfig", 128, 8, DEEPSEEK_V3, expert_bias=True,
                route_scale=8.0),
        _family("muse_spark", "defaults of MuseSparkTextConfig", 256, 8, DEEPSEEK_V3, expert_bias=True,
                norm_eps=1e-15, logit_scale=0.1767766952966369),
        _family("lfm2_moe", "LiquidAI/LFM2-8B-A1B", 32, 4, DEEPSEEK_V3, expert_bias=True, norm_eps=1e-6),
        _family("minimax_m2", "MiniMaxAI/MiniMax-M2", 256, 8, MINIMAX_M2, expert_bias=True),
        _family("minimax_m3_vl", "MiniMaxAI/MiniMax-M3", 128, 4, MINIMAX_M2, expert_bias=True,
                output_scale=2.0),
        _family("step3p7", "stepfun-ai/Step-3.7-Flash", 288, 8, MINIMAX_M2, expert_bias=True, output_scale=3.0),
        # The cap is off by default; the tiny router has it.
        _family("laguna", "defaults of LagunaConfig", 256, 8, MINIMAX_M2, expert_bias=True,
                tiny={"logit_softcap": 2.0}),
        _family("kolibri1", "defaults of Kolibri1Config", 384, 6, expert_bias=True, score_func="sigmoid",
                select_by="logit"),
        _family("flint", "defaults of FlintConfig", 256, 6, MINIMAX_M2),
        _family("inkling", "defaults of InklingTextConfig", 256, 6, MINIMAX_M2, expert_bias=True, route_scale=8.0,
                num_scored_shared_experts=2, norm_with_shared=True, learned_scale="global"),
        _family("deepseek_v4", "deepseek-ai/DeepSeek-V4-Flash", 256, 6, DEEPSEEK_V3, expert_bias=True,
                score_func="sqrtsoftplus", route_scale=1.5),
        _family("deepseek_v4_hash", "deepseek-ai/DeepSeek-V4-Flash", 256, 6, DEEPSEEK_V3, selector="table",
                score_func="sqrtsoftplus", route_scale=1.5),
        _family("llama4", "meta-llama/Llama-4-Scout-17B-16E", 16, 1, **LLAMA4),
        _family("cohere2_moe_sigmoid", "defaults of Cohere2MoeConfig, sigmoid", 8, 2, MINIMAX_M2, select_by="logit"),
    ]  # fmt: skip


def _softmax_line() -> list[Family]:
    """Softmax scores over all experts, then a selection."""
    return [
        _family("mixtral", "mistralai/Mixtral-8x7B-v0.1", 8, 2, MIXTRAL),
        _family("qwen3_moe", "Qwen/Qwen3-30B-A3B", 128, 8, MIXTRAL),
        _family("olmoe", "allenai/OLMoE-1B-7B-0924", 64, 8),
        _family("qwen2_moe", "Qwen/Qwen1.5-MoE-A2.7B", 60, 4),
        _family("qwen3_next", "Qwen/Qwen3-Next-80B-A3B-Instruct", 512, 10, MIXTRAL),
        _family("qwen3_vl_moe", "Qwen/Qwen3-VL-30B-A3B-Instruct", 128, 8, MIXTRAL),
        _family("qwen3_omni_moe", "Qwen/Qwen3-Omni-30B-A3B-Instruct", 128, 8, MIXTRAL),
        _family("qwen3_omni_moe_talker", "defaults of Qwen3OmniMoeTalkerTextConfig", 128, 8),
        _family("qwen3_5_moe", "Qwen/Qwen3.5-35B-A3B", 256, 8, MIXTRAL),
        _family("qwen4_exp", "defaults of Qwen4ExpTextConfig", 512, 10, MIXTRAL),
        _family("lara_mini", "defaults of LaraMiniConfig", 128, 4, MIXTRAL),
        _family("minimax", "MiniMaxAI/MiniMax-Text-01-hf", 32, 2, MIXTRAL),
        _family("mellum", "defaults of MellumConfig", 64, 8, MIXTRAL),
        _family("flex_olmo", "allenai/FlexOlmo-7x7B-1T", 7, 5),
        _family("jamba", "ai21labs/Jamba-v0.1", 16, 2),
        _family("hunyuan_v1_moe", "tencent/Hunyuan-A13B-Instruct", 64, 8, MIXTRAL),
        _family("dbrx", "databricks/dbrx-instruct", 16, 4, MIXTRAL),
        _family("gemma4", "google/gemma-4-26B-A4B", 128, 8, MIXTRAL, learned_scale="per_expert"),
        _family("diffusion_gemma", "sizes of gemma4", 128, 8, MIXTRAL, learned_scale="per_expert"),
        _family("ernie4_5_moe", "baidu/ERNIE-4.5-21B-A3B-PT", 64, 6, ERNIE, expert_bias=True),
        _family("ernie4_5_vl_moe", "baidu/ERNIE-4.5-VL-28B-A3B-PT", 64, 6, ERNIE, expert_bias=True),
        _family("longcat_flash", "meituan-longcat/LongCat-Flash-Chat", 512, 12, expert_bias=True, route_scale=6.0,
                num_null_experts=256),
        _family("zaya", "Zyphra/ZAYA1-base", 16, 1, expert_bias=True, num_null_experts=1, null_kind="skip"),
    ]  # fmt: skip


def _logit_line() -> list[Family]:
    """Logits are ranked first; the weights are a softmax of the selected alone, or of a band."""
    return [
        _family("gpt_oss", "openai/gpt-oss-120b", 128, 4, SELECTED, gate_bias=True),
        # Weights are divided by K and the sum is multiplied by K, which cancels.
        _family("openai_privacy_filter", "defaults of OpenAIPrivacyFilterConfig", 128, 4, SELECTED, gate_bias=True,
                route_scale=1 / 4, output_scale=4.0),
        _family("granitemoe", "ibm-granite/granite-3.0-3b-a800m-base", 40, 8, SELECTED),
        _family("granitemoehybrid", "ibm-granite/granite-4.0-h-tiny", 64, 6, SELECTED),
        _family("granitemoeshared", "defaults of GraniteMoeSharedConfig", 8, 2, SELECTED),
        _family("granitemoe_swa", "defaults of GraniteMoeSWAConfig", 8, 2, SELECTED),
        _family("aria", "rhymes-ai/Aria", 64, 6, SELECTED),
        _family("jetmoe", "jetmoe/jetmoe-8b", 8, 2, SELECTED),
        _family("cohere2_moe", "defaults of Cohere2MoeConfig", 8, 2, SELECTED),
        _family("phimoe", "microsoft/Phi-3.5-MoE-instruct", 16, 2, PHIMOE),
    ]  # fmt: skip


FAMILIES: dict[str, Family] = {
    family.name: family
    for line in (_deepseek_v3_line, _other_groups, _sigmoid_line, _softmax_line, _logit_line)
    for family in line()
}
"""Every family by name."""


def _checkpoint(name: str, of: str, checkpoint: str, unverified: Any = "", **changes: Any) -> Family:
    """Another size of a family."""
    base = FAMILIES[of]
    return replace(base, name=name, router=base.router.replace(**changes), checkpoint=checkpoint, of=of,
                   source=f"https://huggingface.co/{checkpoint}", unverified=unverified)  # fmt: skip


def _checkpoints() -> list[Family]:
    """Models of which transformers 5.24 has no class, and the other published sizes of those that it has."""
    row, groups_8_4 = _checkpoint, {"num_expert_groups": 8, "num_limited_groups": 4}
    return [
        row("kimi_k2", "deepseek_v3", "moonshotai/Kimi-K2-Instruct", num_experts=384, route_scale=2.827, **ONE_GROUP),
        row(
            "kimi_k3",
            "kimi_linear",
            "moonshotai/Kimi-K3",
            "a test elsewhere has a scale of 2.827, its config 1.0",
            top_k=16,
            num_experts=896,
            route_scale=1.0,
        ),
        row(
            "nemotron_3_super",
            "nemotron_h",
            "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8",
            num_experts=512,
            top_k=22,
            route_scale=5.0,
        ),
        row(
            "nemotron_3_ultra",
            "nemotron_h",
            "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16",
            num_experts=512,
            top_k=22,
            route_scale=5.0,
        ),
        row(
            "deepseek_v2_lite",
            "deepseek_v2",
            "deepseek-ai/DeepSeek-V2-Lite",
            num_experts=64,
            route_scale=1.0,
            **WITHOUT_GROUPS,
        ),
        row("deepseek_v4_pro", "deepseek_v4", "deepseek-ai/DeepSeek-V4-Pro", num_experts=384, route_scale=2.5),
        row("glm_5_2", "glm_moe_dsa", "zai-org/GLM-5.2"),
        row("ling_mini_2", "bailing_hybrid", "inclusionAI/Ling-mini-2.0", num_experts=256, **groups_8_4),
        row(
            "ling_1t",
            "bailing_hybrid",
            "inclusionAI/Ling-1T",
            "sizes from memory of its config",
            num_experts=256,
            **groups_8_4,
        ),
        row(
            "longcat_2",
            "longcat_flash",
            "meituan-longcat/LongCat-2.0",
            "sizes from a port, not from its config",
            num_experts=256,
            num_null_experts=128,
        ),
        row("minimax_m1", "minimax", "MiniMaxAI/MiniMax-M1-80k"),
        row("mixtral_8x22b", "mixtral", "mistralai/Mixtral-8x22B-v0.1"),
        row("llama4_maverick", "llama4", "meta-llama/Llama-4-Maverick-17B-128E", num_experts=128),
        row("qwen3_5_397b", "qwen3_5_moe", "Qwen/Qwen3.5-397B-A17B", num_experts=512, top_k=10),
        row(
            "trinity_large",
            "afmoe",
            "arcee-ai/Trinity-Large-Preview",
            "sizes from memory of its config",
            num_experts=256,
            top_k=4,
            route_scale=2.448,
        ),
        row("gpt_oss_20b", "gpt_oss", "openai/gpt-oss-20b", num_experts=32),
        row(
            "intern_s1_pro",
            "qwen3_moe",
            "internlm/Intern-S1-Pro",
            "sizes from a comparison of its config; the quotas are those of vLLM and SGLang",
            num_experts=512,
            selector="group_top_k",
            quota_groups=8,
        ),
        row(
            "pangu_pro_moe",
            "qwen3_moe",
            "IntervitensInc/pangu-pro-moe-model",
            "sizes of arXiv:2505.21411; quotas, and a learned factor of each expert, as in vllm-ascend",
            num_experts=64,
            selector="group_top_k",
            quota_groups=8,
            route_norm=False,
            learned_scale="per_expert",
        ),
        row(
            "grok_1",
            "olmoe",
            "xai-org/grok-1",
            "as its released code computes it; vLLM norms the weights and caps the logits at 30",
            num_experts=8,
            top_k=2,
        ),
        row(
            "grok_2",
            "olmoe",
            "xai-org/grok-2",
            "sizes from memory of its config; cap and norm as in vLLM",
            num_experts=8,
            top_k=2,
            logit_softcap=30.0,
        ),
        row(
            "arctic",
            "mixtral",
            "Snowflake/snowflake-arctic-instruct",
            "sizes from memory of its config; semantics as in vLLM",
            num_experts=128,
        ),
        row(
            "hunyuan_large",
            "hunyuan_v1_moe",
            "tencent/Tencent-Hunyuan-Large",
            "sizes of arXiv:2411.02265; semantics as in vLLM, and a training capacity drops tokens",
            num_experts=16,
            top_k=1,
            route_norm=False,
        ),
    ]


CHECKPOINTS: dict[str, Family] = {each.name: each for each in _checkpoints()}
"""Further published sizes by name."""


def family(name: str) -> Family:
    """The family or checkpoint of that name; an unknown one is a ValueError with the nearest name."""
    known = FAMILIES | CHECKPOINTS
    require(name in known, f"unknown family {name!r}{nearest(name, known)}")
    return known[name]


def preset(name: str, **changes: Any) -> RouterSpec:
    """The router of a family at its published size, with changed fields if any, validated again."""
    return family(name).router.replace(**changes)


def tiny(name: str) -> RouterSpec:
    """The router of a family with at most 16 experts."""
    return family(name).tiny
