"""moe_ref, tests: the families are valid specs with the published sizes."""

import numpy as np
import pytest

from moe_ref import RouterInputs, route
from moe_ref.specs.families import FAMILIES, preset, tiny

# num_experts, top_k, num_expert_groups, num_limited_groups, score_func, route_norm, route_scale, expert_bias, gate_bias
PUBLISHED = {
    "deepseek_v3": (256, 8, 8, 4, "sigmoid", True, 2.5, True, False),
    "deepseek_v2": (160, 6, 8, 3, "softmax", False, 16.0, False, False),
    "mixtral": (8, 2, None, None, "softmax", True, 1.0, False, False),
    "qwen3_moe": (128, 8, None, None, "softmax", True, 1.0, False, False),
    "olmoe": (64, 8, None, None, "softmax", False, 1.0, False, False),
    "gpt_oss": (128, 4, None, None, "softmax", False, 1.0, False, True),
    "llama4": (16, 1, None, None, "sigmoid", False, 1.0, False, False),
    "glm4_moe": (160, 8, 1, 1, "sigmoid", True, 2.5, True, False),
    "minimax_m2": (256, 8, None, None, "sigmoid", True, 1.0, True, False),
    "ernie4_5_moe": (64, 6, None, None, "softmax", True, 1.0, True, False),
    "dbrx": (16, 4, None, None, "softmax", True, 1.0, False, False),
    "granitemoe": (40, 8, None, None, "softmax", False, 1.0, False, False),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_families_have_their_published_sizes(name):
    family = FAMILIES[name]
    spec = family.router
    found = (spec.num_experts, spec.top_k, spec.num_expert_groups, spec.num_limited_groups, spec.score_func,
             spec.route_norm, spec.route_scale, family.expert_bias, family.gate_bias)  # fmt: skip
    assert found == PUBLISHED[name]
    assert "/" in family.checkpoint


def test_the_differences_between_families_are_fields():
    assert preset("deepseek_v2").group_score_k == 1
    assert preset("deepseek_v2").weights_from == "masked_scores"
    assert preset("mistral4").mask_fill == 0.0
    assert preset("deepseek_v3").mask_fill == -np.inf
    assert tiny("axk2").mask_fill == 0.0
    assert preset("gpt_oss").score_over == "selected"
    assert preset("llama4").weight_on == "input"
    assert preset("ernie4_5_moe").norm_form == "clamp"
    assert preset("deepseek_v4").score_func == "sqrtsoftplus"
    assert preset("deepseek_v4_hash").selector == "table"
    assert preset("phimoe").selector == "sparsemixer"
    assert preset("gemma4").learned_scale == "per_expert"
    assert preset("inkling").num_scored_shared_experts == 2
    assert (preset("longcat_flash").num_null_experts, preset("longcat_flash").null_kind) == (256, "identity")
    assert (preset("zaya").num_null_experts, preset("zaya").null_kind) == (1, "skip")
    assert (preset("beam").route_scale, preset("beam").output_scale) == (1.0, 2.5)


@pytest.mark.parametrize("name", FAMILIES)
def test_tiny_routers_keep_the_semantics(name):
    family = FAMILIES[name]
    small, large = family.tiny.to_dict(), family.router.to_dict()
    sizes = {"num_experts", "top_k", "num_null_experts", "num_expert_groups", "num_limited_groups"}
    groups_of_v2 = {"group_score_k", "mask_fill", "weights_from"}
    added = {"axk2": {"mask_fill"}, "laguna": {"logit_softcap"},
             "deepseek_ocr2": groups_of_v2, "unlimited_ocr": groups_of_v2}  # fmt: skip
    differ = {field for field in small.keys() | large.keys() if small.get(field) != large.get(field)}
    assert differ <= sizes | added.get(name, set())
    assert family.tiny.num_experts in (8, 16)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_routes(name):
    spec = tiny(name)
    rng = np.random.default_rng(0)
    inputs: dict = {}
    if spec.learned_scale != "none":
        inputs["learned_scale"] = np.ones(spec.num_choices if spec.learned_scale == "per_expert" else ())
    if spec.selector == "table":
        inputs["inputs"] = RouterInputs(token_ids_T=np.zeros(5, int), table_VK=np.arange(spec.top_k)[None])
    trace = route(rng.normal(size=(5, spec.num_logits)), spec, **inputs)
    assert trace.expert_ids_TK.shape == trace.weights_TK.shape == (5, spec.top_k)


def test_sources_are_public_links():
    assert all(family.source.startswith("https://") for family in FAMILIES.values())
    assert len({family.name for family in FAMILIES.values()}) == len(FAMILIES)


def test_changes_to_a_preset_are_validated():
    assert preset("deepseek_v3", num_experts=128).num_experts == 128
    with pytest.raises(ValueError, match="num_expert_groups is 7"):
        preset("deepseek_v3", num_expert_groups=7)


def test_an_unknown_family_names_the_nearest():
    with pytest.raises(ValueError, match=r"deepseekv3.*did you mean deepseek_v3"):
        preset("deepseekv3")
    with pytest.raises(ValueError, match="unknown family"):
        tiny("no such thing")
