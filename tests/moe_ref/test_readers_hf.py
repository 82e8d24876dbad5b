"""Tests: published configs of huggingface become the layers that their models have, or an error in the user's words."""

import json
from pathlib import Path

import numpy as np
import pytest
from published_configs import BASE, PUBLISHED, QWEN3, V3_FILE

from moe_ref import (
    ExpertSpec,
    LatentSpec,
    LayerParams,
    LayerSpec,
    RouterSpec,
    SharedSpec,
    params_from_hf,
    params_to_hf,
)
from moe_ref.specs.families import CHECKPOINTS, FAMILIES, preset, tiny
from moe_ref.specs.readers import hf
from moe_ref.specs.readers.hf_defaults import DEFAULTS
from moe_ref.specs.readers.hf_forms import FORMS
from moe_ref.specs.readers.hf_irrelevant import IRRELEVANT
from moe_ref.specs.readers.hf_rows import BY_MODEL_TYPE, ROWS

MORE = json.loads(Path(__file__).with_name("published_configs.json").read_text())
"""As PUBLISHED, one a line, of further models and of further forms of a file: quantised, nested, converted; a router of
null is a dense model."""
FILES = {name: config for name, config, *_ in (*PUBLISHED, *MORE)}
SPARSE = [row for row in (*PUBLISHED, *MORE) if row[2]]
QWEN = FILES["Qwen3-235B-A22B"]


@pytest.mark.parametrize(
    ("name", "config", "router", "width", "shared", "sparse"), SPARSE, ids=lambda value: str(value)[:24]
)
def test_a_published_config_is_read_whole(name, config, router, width, shared, sparse):
    layers = LayerSpec.layers_from_hf(config)
    found = [layer for layer in layers if layer is not None]
    assert len(found) == sparse
    assert all(layer == found[0] for layer in found)
    assert LayerSpec.from_hf(config) == found[0]
    assert found[0].router == RouterSpec.from_hf(config) == RouterSpec(**router)
    assert found[0].experts.hidden_dim == width
    assert (None if found[0].shared is None else found[0].shared.hidden_dim) == shared


def test_a_config_is_a_dict_a_file_a_folder_or_an_object(tmp_path):
    expected = LayerSpec.from_hf(V3_FILE)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(V3_FILE))

    class Config:
        def to_dict(self):
            return V3_FILE

    for given in (path, str(path), tmp_path, Config(), type("Plain", (), {})()):
        if type(given).__name__ == "Plain":
            given.__dict__ |= V3_FILE
        assert LayerSpec.from_hf(given) == expected
    assert LayerSpec.from_dict(V3_FILE) == expected
    assert RouterSpec.from_dict(V3_FILE) == expected.router


def without(config: dict, *keys: str) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


BROKEN = [
    # misspelt, contradicting, missing
    (QWEN | {"norm_topk_porb": True}, "'norm_topk_porb' is no key that .* qwen3_moe .*did you mean norm_topk_prob"),
    (without(QWEN, "norm_topk_prob") | {"norm_topk_porb": True}, "'norm_topk_porb'"),
    (V3_FILE | {"hiden_act": "silu"}, "'hiden_act'"),
    (V3_FILE | {"some_key": 1}, r"'some_key' is no key .* ignore=\['some_key'\]"),
    (V3_FILE | {"num_local_experts": 64}, "n_routed_experts is 256, but num_local_experts is 64"),
    (V3_FILE | {"num_experts": 64}, "num_experts is 64; a config of deepseek_v3 does not read it, and computes 256"),
    (V3_FILE | {"num_experts_per_token": 4}, "num_experts_per_token is 4; .* computes 8"),
    (FILES["gpt-oss-20b"] | {"experts_per_token": 2}, "num_experts_per_tok is 4, but experts_per_token is 2"),
    (without(FILES["Step-3.5-Flash"], "moe_router_scaling_factor") | {"routed_scaling_factor": 3.0},
     "routed_scaling_factor is 3.0; .* computes 1.0"),
    (without(FILES["deepseek-moe-16b"], "n_routed_experts"), "n_routed_experts is missing"),
    (without(V3_FILE, "num_experts_per_tok") | {"n_routed_experts": None}, "n_routed_experts is null"),
    (without(FILES["dots.llm1.inst"], "num_experts_per_tok"), "num_experts_per_tok is missing"),
    # what the code does not do
    (V3_FILE | {"scoring_func": "softmax"}, "scoring_func is 'softmax'; .* computes 'sigmoid'"),
    (V3_FILE | {"topk_method": "greedy"}, "topk_method is 'greedy', which a config of deepseek_v3 does not compute"),
    (V3_FILE | {"topk_method": "greeedy"}, "did you mean|not one of"),
    (V3_FILE | {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    (FILES["DeepSeek-V2"] | {"norm_topk_prob": True}, "norm_topk_prob is True; .* False alone"),
    (FILES["DeepSeek-V2"] | {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
    (FILES["Trinity-Mini"] | {"n_group": 4}, "n_group is 4"),
    (FILES["Phi-3.5-MoE"] | {"num_experts_per_tok": 4}, "num_experts_per_tok is 4; .* 2 alone"),
    (FILES["MiniMax-M2"] | {"shared_intermediate_size": 8}, "shared_intermediate_size is 8"),
    (FILES["Hunyuan-A13B"] | {"moe_layer_num_skipped": 2}, "moe_layer_num_skipped is 2"),
    (FILES["ERNIE-4.5-21B-A3B"] | {"moe_group_experts": True}, "moe_group_experts is True"),
    (FILES["K-EXAONE-236B-A23B"] | {"is_moe_layer": [True] * 3}, "is_moe_layer has 3 entries; there are 48 layers"),
    # values
    (V3_FILE | {"n_group": 7},
    r"n_group is 7, which does not divide n_routed_experts \(256\), in a config of deepseek_v3"),
    (V3_FILE | {"num_experts_per_tok": 300}, "num_experts_per_tok is 300; it is an integer between 1 and 256"),
    (V3_FILE | {"num_experts_per_tok": 40, "topk_group": 1}, "num_experts_per_tok is 40, but the 1 kept groups"),
    (V3_FILE | {"num_experts_per_tok": "8"}, "num_experts_per_tok is '8'"),
    (V3_FILE | {"n_group": None}, "n_group is None, but topk_group is 4"),
    (V3_FILE | {"routed_scaling_factor": 0}, "routed_scaling_factor is 0"),
    (V3_FILE | {"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'; it is a bool"),
    (V3_FILE | {"moe_intermediate_size": 0}, "moe_intermediate_size is 0; it is an integer"),
    (V3_FILE | {"hidden_act": "siluu"}, "hidden_act is 'siluu', .*did you mean silu"),
    (V3_FILE | {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    # which model
    (V3_FILE | {"model_type": "deepseek_v5"}, "unknown model_type 'deepseek_v5' .*did you mean deepseek_v4.*by hand"),
    (without(V3_FILE, "model_type"), "model_type is missing"),
    (BASE | {"model_type": "switch_transformers"}, "no RouterSpec describes the routing of switch_transformers"),
    (FILES["Llama-4-Maverick"] | {"num_experts": 3}, "'num_experts'.* is beside text_config"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "message"), BROKEN, ids=lambda value: str(value)[:40])
def test_a_broken_config_is_an_error_that_names_the_users_key(config, message):
    with pytest.raises(ValueError, match=message):
        LayerSpec.from_hf(config)


# A number as a text, a list, a null, and a name that is none: each once failed inside, or was read as something else.
TYPES = [
    ("Moonlight-16B-A3B", "routed_scaling_factor", "2.446"),
    ("Moonlight-16B-A3B", "n_group", "1"),
    ("Moonlight-16B-A3B", "moe_intermediate_size", None),
    ("Moonlight-16B-A3B", "first_k_dense_replace", "1"),
    ("Moonlight-16B-A3B", "topk_method", ["noaux_tc"]),
    ("Qwen3-Coder-480B", "hidden_act", ["silu"]),
    ("Qwen3-Coder-480B", "model_type", ["qwen3_moe"]),
    ("Qwen3-Coder-480B", "mlp_only_layers", "0"),
    ("Ling-flash-2.0", "moe_intermediate_size", [1024]),
    ("ERNIE-4.5-300B-A47B", "moe_layer_start_index", -3),
    ("ERNIE-4.5-300B-A47B", "moe_layer_interval", 1.5),
    ("ERNIE-4.5-300B-A47B", "moe_layer_end_index", "53"),
    ("Jamba-1.5-Large", "expert_layer_period", 2.5),
    ("GigaChat-20B-A3B", "moe_layer_freq", -1),
    ("DeepSeek-Coder-V2-Lite", "scoring_func", "sigmoid"),
    ("jetmoe", "glu", False),
]
JETMOE = BASE | {
    "model_type": "jetmoe", "activation_function": "silu", "bias": True, "ffn_hidden_size": 5632, "glu": True,
    "hidden_size": 2048, "kv_channels": 128, "moe_num_experts": 8, "moe_top_k": 2, "num_layers": 24,
}  # fmt: skip


@pytest.mark.parametrize(("name", "key", "value"), TYPES, ids=str)
def test_a_value_of_another_kind_is_an_error_that_names_its_key(name, key, value):
    config = JETMOE if name == "jetmoe" else FILES[name]
    with pytest.raises(ValueError, match=rf"^{key} is "):
        RouterSpec.from_hf(config | {key: value}) if name == "jetmoe" else LayerSpec.from_hf(config | {key: value})


def test_the_first_names_of_jetmoe_are_read():
    assert RouterSpec.from_hf(JETMOE) == RouterSpec(num_experts=8, top_k=2, score_over="selected", select_by="logit")


@pytest.mark.parametrize(
    "config",
    [
        *(config for _, config, router, *_ in MORE if router is None),
        BASE | {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2},
        {"model_type": "qwen3_vl", "text_config": BASE | {"model_type": "qwen3_vl_text"}},
        V3_FILE | {"first_k_dense_replace": 61},
        FILES["granite-4.0-h-tiny"] | {"num_local_experts": 0},
        {"model_type": "gemma4", "text_config": {"model_type": "gemma4_text", "enable_moe_block": False}},
        FILES["Nemotron-3-Nano"] | {"hybrid_override_pattern": "M-M*M-M"},
    ],
)
def test_a_dense_model_is_an_error_that_says_so(config):
    for read in (LayerSpec.from_hf, RouterSpec.from_hf):
        with pytest.raises(ValueError, match="dense model"):
            read(config)


def test_nulls_and_zeros_mean_none_where_the_field_knows_a_none():
    router = RouterSpec.from_hf(V3_FILE | {"n_group": 0, "topk_group": 0})
    assert router.num_expert_groups is None
    assert RouterSpec.from_hf(V3_FILE | {"n_group": None, "topk_group": None}) == router
    assert RouterSpec.from_hf(V3_FILE | {"routed_scaling_factor": None}).route_scale == 1.0
    assert LayerSpec.from_hf(V3_FILE | {"n_shared_experts": None}).shared is None
    assert LayerSpec.from_hf(V3_FILE | {"n_shared_experts": 0}).shared is None
    assert RouterSpec.from_hf(QWEN | {"norm_topk_prob": None}).route_norm is False
    assert LayerSpec.from_hf(FILES["gpt-oss-20b"] | {"swiglu_limit": None}).experts.clamp is None
    assert RouterSpec.from_hf(V3_FILE | {"unheard_of": None}) == RouterSpec.from_hf(V3_FILE)


def test_two_names_of_one_thing_may_agree():
    assert LayerSpec.from_hf(V3_FILE | {"num_local_experts": 256, "num_experts": 256}) == LayerSpec.from_hf(V3_FILE)


def test_what_a_file_does_not_say_is_what_its_model_type_says():
    config = {"model_type": "qwen3_moe", "num_experts": 64, "norm_topk_prob": True}
    assert RouterSpec.from_hf(config) == RouterSpec(num_experts=64, top_k=8, route_norm=True)
    assert RouterSpec.from_hf({"model_type": "qwen3_moe"}).route_norm is False


def test_the_sampling_parameter_top_k_is_not_the_router_s():
    old = FILES["Mixtral-8x7B"]
    assert (old["top_k"], RouterSpec.from_hf(old).top_k) == (50, 2)
    with pytest.raises(
        ValueError, match=r"num_experts_per_tok is missing, and top_k \(50\) is the parameter of sampling"
    ):
        RouterSpec.from_hf(without(old, "num_experts_per_tok"))


def test_layers_differ_where_a_config_says_so():
    base = FILES["Hunyuan-A13B"]
    config = base | {"moe_topk": [8] * 31 + [4]}
    with pytest.raises(
        ValueError, match=r"MoE layers 0 and 31 differ \(router.top_k 8 and 4\); LayerSpec.layers_from_hf"
    ):
        LayerSpec.from_hf(config)
    assert [layer.router.top_k for layer in LayerSpec.layers_from_hf(config) if layer] == [8] * 31 + [4]
    with pytest.raises(ValueError, match="moe_topk has 3 entries; layer 3 has none"):
        LayerSpec.from_hf(base | {"moe_topk": [8] * 3})

    step = FILES["Step-3.5-Flash"] | {
        "swiglu_limits": [0.0] * 43 + [7.0] * 2,
        "swiglu_limits_shared": [0.0] * 44 + [16.0],
    }
    layers = LayerSpec.layers_from_hf(step)
    assert [layer and layer.experts.clamp for layer in layers] == [None] * 43 + [7.0] * 2
    assert layers[44].shared.clamp == 16.0
    assert RouterSpec.from_hf(step).num_experts == 288

    hashed = {"model_type": "deepseek_v4", "num_hidden_layers": 5, "num_hash_layers": 3, "n_routed_experts": 8}
    assert [layer.router.selector for layer in LayerSpec.layers_from_hf(hashed)] == ["table"] * 3 + ["top_k"] * 2
    with pytest.raises(ValueError, match=r"the routers of layers 0 and 3 differ \(selector 'table' and 'top_k'\)"):
        RouterSpec.from_hf(hashed)

    every_second = QWEN | {"decoder_sparse_step": 2, "mlp_only_layers": [3], "num_hidden_layers": 6}
    assert [layer is not None for layer in LayerSpec.layers_from_hf(every_second)] == [
        False,
        True,
        False,
        False,
        False,
        True,
    ]


KIMI_K3 = {"model_type": "kimi_k3", "text_config": BASE | {
    "model_type": "kimi_linear", "activation_situ_beta": 4.0, "activation_situ_linear_beta": 25.0,
    "hidden_act": "situ", "hidden_size": 7168, "top_k": 50,
    "latent_moe_use_norm": True, "moe_intermediate_size": 3072, "moe_renormalize": True, "num_experts": 896,
    "moe_router_activation_func": "sigmoid", "num_expert_group": 1, "num_experts_per_token": 16,
    "num_hidden_layers": 93,
    "num_shared_experts": 2, "routed_expert_hidden_size": 3584, "routed_scaling_factor": 1.0, "topk_group": 1,
    "topk_method": "noaux_tc", "use_grouped_topk": True, "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-5}}  # fmt: skip
NEMOTRON_3_SUPER = FILES["Nemotron-3-Nano"] | {
    "moe_latent_size": 1024, "n_routed_experts": 512, "num_experts_per_tok": 22, "routed_scaling_factor": 5.0,
}  # fmt: skip


def test_experts_of_a_latent_width_and_situ_are_read():
    kimi, nemotron = LayerSpec.from_hf(KIMI_K3), LayerSpec.from_hf(NEMOTRON_3_SUPER)
    assert kimi.router == CHECKPOINTS["kimi_k3"].router
    assert kimi.latent == LatentSpec(dim=3584, norm_eps=1e-5)
    assert kimi.experts == ExpertSpec(dim=7168, hidden_dim=3072, activation="situ", beta=4.0, linear_beta=25.0)
    assert kimi.shared == SharedSpec(hidden_dim=6144)
    assert nemotron.router == CHECKPOINTS["nemotron_3_super"].router
    assert nemotron.latent == LatentSpec(dim=1024)
    text = KIMI_K3["text_config"]
    assert LayerSpec.from_hf(text | {"latent_moe_use_norm": False}).latent == LatentSpec(dim=3584)
    assert LayerSpec.from_hf(text | {"routed_expert_hidden_size": None}).latent is None
    with pytest.raises(ValueError, match=r"activation_situ_beta is -1\.0; it is a finite number greater than 0"):
        LayerSpec.from_hf(text | {"activation_situ_beta": -1.0})
    with pytest.raises(ValueError, match="routed_expert_hidden_size is -4; it is an integer at least 1"):
        LayerSpec.from_hf(text | {"routed_expert_hidden_size": -4})


def test_the_weights_of_a_latent_are_read_and_written_under_published_names():
    text = KIMI_K3["text_config"] | {
        "hidden_size": 6, "moe_intermediate_size": 3, "num_experts": 4, "num_experts_per_token": 2,
        "routed_expert_hidden_size": 5, "num_hidden_layers": 2,
    }  # fmt: skip
    params = LayerParams.init(LayerSpec.from_hf(text), seed=3)
    found = params_to_hf(params, text, layer=1, names="file", root="language_model.model.layers.1.")
    block = "language_model.model.layers.1.block_sparse_moe."
    assert found[f"{block}routed_expert_down_proj.weight"].shape == (5, 6)
    assert found[f"{block}routed_expert_norm.weight"].shape == (5,)
    assert found[f"{block}experts.3.w2.weight"].shape == (5, 3)
    again = params_from_hf(found, text, layer=1)
    np.testing.assert_equal(vars(again), vars(params))
    del found[f"{block}routed_expert_norm.weight"]
    with pytest.raises(ValueError, match=r"routed_expert_norm\.weight is missing"):
        params_from_hf(found, text, layer=1)


@pytest.mark.parametrize(
    ("config", "why", "router"),
    [
        ({"model_type": "gemma4_text", "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8,
          "moe_intermediate_size": 704}, "a norm of its own", FAMILIES["gemma4"].router),
        (without(FILES["ERNIE-4.5-21B-A3B"], "moe_gate") | {
            "model_type": "ernie4_5_moe_vl", "moe_num_experts": [64, 64], "moe_intermediate_size": [1536, 512],
            "moe_layer_start_index": [1, 1], "moe_layer_end_index": [27, 27], "vision_config": {}, "im_patch_id": 7,
            "moe_norm_min": 1e-12}, "two kinds of tokens", FAMILIES["ernie4_5_vl_moe"].router),
        (QWEN3 | {"model_type": "Klear", "hidden_size": 2048, "moe_intermediate_size": 896, "num_experts": 256,
          "num_experts_per_tok": 8, "n_shared_experts": 1, "num_hidden_layers": 32}, "a learned pair of factors",
         RouterSpec(num_experts=256, top_k=8, score_func="sigmoid", route_norm=True)),
        ({"model_type": "axk1"}, "a norm follows", FAMILIES["axk1"].router),
        ({"architectures": ["Grok1ForCausalLM"], "model_type": "git", "residual_moe": True, "num_local_experts": 8,
          "num_experts_per_tok": 2, "router_logit_softcapping": 30.0, "num_hidden_layers": 64, "hidden_size": 8192,
          "moe_intermediate_size": 16384, "intermediate_size": 32768}, "square root of 2", preset("grok_2")),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_a_layer_that_no_spec_describes_says_why_and_its_router_is_read(config, why, router):
    with pytest.raises(ValueError, match=f"no LayerSpec describes .*{why}"):
        LayerSpec.from_hf(config)
    assert RouterSpec.from_hf(config) == router


@pytest.mark.parametrize("groups", [-1, 0, None])
def test_no_quotas_are_read_where_there_are_no_groups_of_the_router(groups):
    inner = FILES["Intern-S1-Pro"]["text_config"] | {"router_n_groups": groups}
    assert RouterSpec.from_hf(inner).selector == "top_k"
    with pytest.raises(ValueError, match="router_n_groups is 7, which does not divide num_experts"):
        RouterSpec.from_hf(inner | {"router_n_groups": 7})
    with pytest.raises(ValueError, match="'router_n_groups' is no key that a config of qwen3_moe"):
        RouterSpec.from_hf(inner | {"model_type": "qwen3_moe", "router_n_groups": 8}, ignore=["fope_sep_head"])


def test_unknown_keys_can_be_passed_over_by_name():
    assert LayerSpec.from_hf(V3_FILE | {"some_key": 1}, ignore=["some_key"]) == LayerSpec.from_hf(V3_FILE)
    with pytest.raises(ValueError, match=r"ignore names \['other'\], which the config does not have"):
        LayerSpec.from_hf(V3_FILE, ignore=["other"])


def test_no_key_that_a_row_reads_is_irrelevant_by_a_word():
    read = {key for row in ROWS for key in row.keys if key not in IRRELEVANT.names}
    by_word = {key for key in read if key in IRRELEVANT and "." not in key}
    # Read by the model types that have them; no other has them at all.
    assert by_word <= {"hidden_activation", "mlp_hidden_act", "output_multiplier", "zero_expert_type"}


def test_every_row_has_a_family_and_every_family_a_row():
    names = {name.removesuffix("_hash").removesuffix("_sigmoid") for name in FAMILIES}
    assert names == {row.family for row in ROWS if not row.source}
    assert FORMS.keys() <= {row.family for row in ROWS}
    assert len(BY_MODEL_TYPE) == sum(len(row.model_types) for row in ROWS)


def test_a_file_that_is_none_is_an_error(tmp_path):
    for text, message in (("[1]", "holds a list"), ("{", "cannot be read")):
        path = tmp_path / "config.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            LayerSpec.from_hf(path)
    with pytest.raises(ValueError, match="is no file"):
        LayerSpec.from_hf(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match="config is a int"):
        LayerSpec.from_hf(5)


def test_names_of_other_code_bases_in_from_dict():
    base = {"n_routed_experts": 160, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3}
    limited = RouterSpec.from_dict(base | {"topk_method": "group_limited_greedy"})
    assert (limited.group_score_k, limited.mask_fill, limited.weights_from) == (1, 0.0, "masked_scores")
    with pytest.raises(ValueError, match="topk_method is 'greedy', but there are 8 groups"):
        RouterSpec.from_dict(base | {"topk_method": "greedy"})
    none = RouterSpec.from_dict(base | {"n_group": 0, "topk_group": 0, "routed_scaling_factor": None})
    assert (none.num_expert_groups, none.route_scale) == (None, 1.0)
    with pytest.raises(
        ValueError, match="num_experts is given twice: 'n_routed_experts' is 160, and 'num_experts' is 128"
    ):
        RouterSpec.from_dict(base | {"num_experts": 128})
    with pytest.raises(ValueError, match="n_group is 7, which does not divide n_routed_experts"):
        RouterSpec.from_dict(base | {"n_group": 7})


def test_qwen_layers_that_are_dense_are_none():
    config = QWEN3 | {"model_type": "qwen3_moe", "mlp_only_layers": [0, 1], "num_hidden_layers": 4}
    assert [layer is None for layer in LayerSpec.layers_from_hf(config)] == [True, True, False, False]


PRESETS = {
    "DeepSeek-V2": "deepseek_v2", "DeepSeek-V2-Lite": "deepseek_v2_lite", "DeepSeek-V3": "deepseek_v3",
    "DeepSeek-V3.2-Exp": "deepseek_v32", "Kimi-K2-Instruct": "kimi_k2", "Qwen1.5-MoE-A2.7B": "qwen2_moe",
    "Qwen3-Next-80B-A3B": "qwen3_next", "Qwen3-VL-30B-A3B": "qwen3_vl_moe", "Qwen3-Omni-30B-A3B": "qwen3_omni_moe",
    "InternVL3_5-30B-A3B": "qwen3_moe", "GLM-4.5": "glm4_moe", "GLM-4.5V": "glm4v_moe",
    "GLM-4.7-Flash": "glm4_moe_lite",
    "gpt-oss-20b": "gpt_oss_20b", "Mixtral-8x7B": "mixtral", "Llama-4-Maverick": "llama4_maverick",
    "MiniMax-M1-80k": "minimax_m1", "MiniMax-Text-01": "minimax", "MiniMax-M2": "minimax_m2", "OLMoE-1B-7B": "olmoe",
    "Phi-3.5-MoE": "phimoe", "Hunyuan-A13B": "hunyuan_v1_moe", "ERNIE-4.5-21B-A3B": "ernie4_5_moe",
    "Nemotron-3-Nano": "nemotron_h", "granite-3.0-3b-a800m": "granitemoe", "granite-4.0-h-tiny": "granitemoehybrid",
    "Jamba-v0.1": "jamba", "dbrx-instruct": "dbrx", "dots.llm1.inst": "dots1", "LongCat-Flash-Chat": "longcat_flash",
    "Ling-mini-2.0": "ling_mini_2", "Ring-1T": "ling_1t", "Trinity-Mini": "afmoe", "Trinity-Large": "trinity_large",
    "Step-3.5-Flash": "step3p7", "LFM2-8B-A1B": "lfm2_moe", "K-EXAONE-236B-A23B": "exaone_moe",
    "Kimi-Linear-48B-A3B": "kimi_linear", "Hy3": "hy_v3", "aria": "aria", "Intern-S1-Pro": "intern_s1_pro",
    "Grok-1": "grok_1", "Arctic": "arctic", "Hunyuan-Large": "hunyuan_large",
}  # fmt: skip
"""Published config -> preset."""


@pytest.mark.parametrize(("name", "family_name"), PRESETS.items())
def test_a_preset_has_the_sizes_of_the_published_config(name, family_name):
    assert RouterSpec.from_hf(FILES[name]) == preset(family_name)


def test_a_preset_of_a_checkpoint_takes_changes_and_has_a_tiny_one():
    assert preset("kimi_k2", top_k=4).top_k == 4
    assert tiny("kimi_k3").num_experts <= 16
    assert all(each.of in FAMILIES for each in CHECKPOINTS.values())
    assert not CHECKPOINTS.keys() & FAMILIES.keys()
    with pytest.raises(ValueError, match=r"unknown family 'kimi_k22' .did you mean kimi_k2"):
        preset("kimi_k22")


def of_defaults(row) -> dict:
    """A config with every key that a row reads, as its class has them; with sizes where that has none."""
    sizes = {row.router["num_experts"]: 8, row.router["top_k"]: 2, row.width: 16, row.dim: 8, row.depth: 8}
    sizes |= {row.activation: "silu"} if row.activation else {}
    sizes |= {key: 1 for key in row.router.values() if key not in sizes}
    own = {key: value for key, value in DEFAULTS.get(row.model_types[0], {}).items() if value is not None}
    shared = {key: 4 for key in (row.shared.count, row.shared.width) if key and not own.get(key)} if row.shared else {}
    config = sizes | own | dict(row.defaults) | shared | {"model_type": row.model_types[0], row.depth: 4}
    config |= {"enable_moe_block": True} if "enable_moe_block" in config else {}
    return config | ({"layers_block_type": ["mamba", "moe"], row.depth: 2} if row.family == "nemotron_h" else {})


def said(config: dict):
    """All that is read of a config."""
    reading = hf.read(config)
    layer = reading.router if reading.row.cannot else reading.layer
    return [kind and layer(i) for i, kind in enumerate(reading.kinds)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.model_types[0])
def test_no_key_that_is_read_can_be_misspelt(row):
    config = of_defaults(row)
    said(config)
    for key in row.keys & config.keys():
        misspelt = f"{key[:-2]}{key[-1]}{key[-2]}" if key[-1] != key[-2] else f"{key[:-3]}{key[-2:]}{key[-3]}"
        with pytest.raises(ValueError, match=r"is no key|is missing"):
            said(without(config, key) | {misspelt: config[key]})


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.model_types[0])
def test_no_key_is_read_and_then_not_used(row):
    config = of_defaults(row)
    before = said(config)
    other = {"silu": "gelu", "gelu_pytorch_tanh": "silu", "relu2": "silu", "sqrtsoftplus": "sigmoid",
    "softmax": "sigmoid",
             "greedy": "group_limited_greedy", "average": "sum"}  # fmt: skip
    for key in (row.keys - ({row.dim, row.width} if row.cannot else set())) & config.keys():
        value = config[key]
        if row.cannot and key not in row.router.values():
            continue
        if (row.family, key) == ("cohere2_moe", "norm_topk_prob"):  # a softmax over the selected is normed
            continue
        changed = not value if isinstance(value, bool) else other[value] if isinstance(value, str) else value * 2
        if isinstance(value, list):
            changed = [each * 2 for each in value]
        try:
            after = said(config | {key: changed})
        except ValueError:
            continue
        assert after != before, key
