"""Tests: configs of Megatron-Core, torchtitan and MaxText become the layer that their code computes, or an error."""

import json

import pytest

from moe_ref import ExpertSpec, LatentSpec, LayerSpec, RouterSpec, SharedSpec
from moe_ref.specs.families import preset
from moe_ref.specs.readers import maxtext

V3 = LayerSpec(
    router=preset("deepseek_v3"), experts=ExpertSpec(dim=7168, hidden_dim=2048), shared=SharedSpec(hidden_dim=2048)
)
SELECTED = {"score_over": "selected", "select_by": "logit"}

MEGATRON = {
    "num_moe_experts": 256, "moe_router_topk": 8, "moe_router_score_function": "sigmoid", "moe_router_num_groups": 8,
    "moe_router_group_topk": 4, "moe_router_topk_scaling_factor": 2.5, "moe_router_enable_expert_bias": True,
    "hidden_size": 7168, "ffn_hidden_size": 18432, "moe_ffn_hidden_size": 2048, "gated_linear_unit": True,
    "activation_func": "silu", "add_bias_linear": False, "moe_shared_expert_intermediate_size": 2048, "num_layers": 61,
    "moe_layer_freq": [0] * 3 + [1] * 58, "moe_grouped_gemm": True, "moe_aux_loss_coeff": 1e-4, "bf16": True,
}  # fmt: skip
ARGUMENTS = {
    "--num-experts": 256, "--moe-router-topk": 8, "--moe-router-score-function": "sigmoid",
    "--moe-router-num-groups": 8,
    "--moe-router-group-topk": 4, "--moe-router-topk-scaling-factor": 2.5, "--hidden-size": 7168, "--swiglu": True,
    "--disable-bias-linear": True, "--moe-ffn-hidden-size": 2048, "--ffn-hidden-size": 18432, "--lr": 1e-4,
    "--moe-shared-expert-intermediate-size": 2048, "--moe-layer-freq": "([0]*3+[1]*58)", "--num-layers": 61,
}  # fmt: skip
MAXTEXT = {
    "model_name": "deepseek3-671b", "decoder_block": "deepseek", "base_emb_dim": 7168, "base_moe_mlp_dim": 2048,
    "num_experts": 256, "num_experts_per_tok": 8, "shared_experts": 1, "routed_score_func": "sigmoid",
    "routed_bias": True,
    "routed_scaling_factor": 2.5, "n_routing_groups": 8, "topk_routing_group": 4, "mlp_activations": ["silu", "linear"],
    "first_num_dense_layers": 3, "vocab_size": 129280, "megablox": True, "load_balance_loss_weight": 0.0,
}  # fmt: skip
MIXTRAL = {"decoder_block": "mixtral", "emb_dim": 16, "moe_mlp_dim": 32, "num_experts": 8, "num_experts_per_tok": 2}


def moe(**router) -> dict:
    return {
        "num_experts": 8,
        "router": {"num_experts": 8, "gate": {"in_features": 16, "out_features": 8, "bias": False}} | router,
        "routed_experts": {
            "inner_experts": {"dim": 16, "hidden_dim": 32, "num_experts": 8},
            "token_dispatcher": {"x": 1},
        },
        "load_balance_coeff": 1e-3,
    }


def test_deepseek_v3_is_the_same_layer_in_all_of_them():
    assert LayerSpec.from_megatron(MEGATRON) == V3
    assert LayerSpec.from_megatron(ARGUMENTS) == V3
    assert LayerSpec.from_maxtext(MAXTEXT) == V3


def test_megatron_as_its_own_object():
    class TransformerConfig:
        def __init__(self, values):
            self.__dict__ |= values

    def silu(x):
        return x

    assert LayerSpec.from_megatron(TransformerConfig(MEGATRON | {"activation_func": silu})) == V3


def test_the_dtype_of_a_router_is_read_by_any_of_its_names():
    for value, dtype in (("fp64", "float64"), ("fp32", "float32"), (None, "float32")):
        router = LayerSpec.from_megatron(MEGATRON | {"moe_router_dtype": value}).router
        assert router == V3.router.replace(router_dtype=dtype)
    longcat = {"num_experts": 8, "top_k": 2, "router_dtype": "torch.bfloat16"}
    assert RouterSpec.from_dict(longcat).router_dtype == "bfloat16"
    assert RouterSpec.from_dict({"num_experts": 8, "top_k": 2, "moe_router_dtype": "fp64"}).router_dtype == "float64"
    with pytest.raises(ValueError, match="moe_router_dtype is 'fp8', not one of"):
        LayerSpec.from_megatron(MEGATRON | {"moe_router_dtype": "fp8"})


def test_sinkhorn_of_megatron_is_a_selector():
    values = {key: value for key, value in MEGATRON.items() if "group" not in key}
    values |= {"moe_router_load_balancing_type": "sinkhorn"}
    router = LayerSpec.from_megatron(values).router
    assert router == RouterSpec(num_experts=256, top_k=8, selector="sinkhorn", select_by="logit")
    assert router.at_evaluation() == RouterSpec(num_experts=256, top_k=8, select_by="logit")
    assert LayerSpec.from_megatron(values | {"moe_router_topk": 1}).router.score_func == "sigmoid"
    with pytest.raises(ValueError, match="sinkhorn is there alone"):
        LayerSpec.from_megatron(values | {"moe_router_load_balancing_type": ["sinkhorn", "aux_loss"]})


def test_quantile_balancing_of_megatron_ranks_logits():
    values = {key: value for key, value in MEGATRON.items() if "group" not in key}
    router = LayerSpec.from_megatron(values | {"moe_router_load_balancing_type": ["quantile_balancing"]}).router
    assert router == LayerSpec.from_megatron(values).router.replace(select_by="logit")
    with pytest.raises(ValueError, match="refuses with moe_router_group_topk"):
        LayerSpec.from_megatron(MEGATRON | {"moe_router_load_balancing_type": "quantile_balancing"})
    with pytest.raises(ValueError, match="quantile_balancing is there alone"):
        LayerSpec.from_megatron(values | {"moe_router_load_balancing_type": ["quantile_balancing", "aux_loss"]})


def test_megatron_without_pre_softmax_is_a_softmax_over_the_selected():
    plain = {"num_moe_experts": 8, "hidden_size": 16, "moe_ffn_hidden_size": 32, "gated_linear_unit": True,
             "activation_func": "silu", "add_bias_linear": False}  # fmt: skip
    assert LayerSpec.from_megatron(plain).router == RouterSpec(num_experts=8, top_k=2, **SELECTED)
    assert LayerSpec.from_megatron(plain | {"moe_router_pre_softmax": True}).router == RouterSpec(
        num_experts=8, top_k=2
    )
    one = plain | {"moe_router_topk": 1}
    with pytest.raises(ValueError, match="moe_router_topk is 1 without moe_router_pre_softmax"):
        LayerSpec.from_megatron(one)
    # One weight is not divided by itself.
    sigmoid = LayerSpec.from_megatron(one | {"moe_router_score_function": "sigmoid", "moe_apply_probs_on_input": True})
    assert (sigmoid.router.route_norm, sigmoid.router.weight_on) == (False, "input")


def test_megatron_scores_a_group_by_k_over_l_best():
    config = MEGATRON | {"moe_router_topk": 6, "moe_router_group_topk": 2}
    assert LayerSpec.from_megatron(config).router.group_score_k == 3


def test_megatron_has_experts_of_a_latent_width():
    spec = LayerSpec.from_megatron(MEGATRON | {"moe_latent_size": 64})
    assert spec == V3.replace(latent=LatentSpec(dim=64))


def test_megatron_gpt_oss():
    config = {"num_moe_experts": 32, "moe_router_topk": 4, "hidden_size": 2880, "moe_ffn_hidden_size": 2880,
              "gated_linear_unit": True, "activation_func": "quick_gelu", "glu_linear_offset": 1.0,
              "activation_func_clamp_value": 7.0, "add_bias_linear": True}  # fmt: skip
    layer = LayerSpec.from_megatron(config)
    assert layer.gate_bias
    assert layer.experts == ExpertSpec(
        dim=2880, hidden_dim=2880, alpha=1.702, up_offset=1.0, clamp=7.0, bias=True
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_moe_experts": None}, "num_moe_experts is None: .*dense model"),
        ({"moe_ruoter_topk": 3}, "'moe_ruoter_topk' is no key .*did you mean moe_router_topk"),
        ({"num_experts": 4}, "num_moe_experts is 256, but num_experts is 4"),
        ({"moe_router_load_balancing_type": "base"}, "moe_router_load_balancing_type is 'base'"),
        ({"moe_latent_size": 64, "add_bias_linear": True}, "moe_latent_size is 64 with add_bias_linear"),
        ({"moe_latent_size": -64}, "moe_latent_size is -64; it is an integer at least 1"),
        ({"moe_expert_capacity_factor": 1.25}, "moe_expert_capacity_factor is 1.25"),
        ({"moe_router_topk": 300}, "moe_router_topk is 300; it is an integer between 1 and 256"),
        ({"moe_router_num_groups": None}, "moe_router_group_topk is 4, but moe_router_num_groups is None"),
        ({"moe_layer_freq": [0] * 61}, "no layer is sparse"),
        ({"add_bias_linear": "False"}, "add_bias_linear is 'False'; it is a bool"),
        ({"moe_router_group_topk": "4"}, "moe_router_group_topk is '4'; it is an integer"),
        ({"moe_layer_freq": "import os"}, "moe_layer_freq is 'import os'"),
        ({"activation_func": "mish"}, "activation_func is 'mish', not one of"),
        (
            {"moe_shared_expert_intermediate_size": None, "moe_shared_expert_gate": True},
            "moe_shared_expert_gate is True",
        ),
    ],
)
def test_a_broken_megatron_config_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        LayerSpec.from_megatron(MEGATRON | changes)


def test_maxtext_by_decoder_block():
    assert LayerSpec.from_maxtext(MIXTRAL).router == RouterSpec(num_experts=8, top_k=2, **SELECTED)
    llama = LayerSpec.from_maxtext(MIXTRAL | {"decoder_block": "llama4", "num_experts_per_tok": 1})
    assert llama.router == RouterSpec(
        num_experts=8, top_k=1, score_func="sigmoid", select_by="logit", weight_on="input"
    )
    assert llama.shared == SharedSpec(hidden_dim=32)
    for block in ("qwen3_next", "qwen3_5"):
        gated = LayerSpec.from_maxtext(MIXTRAL | {"decoder_block": block, "shared_experts": 1, "norm_topk_prob": True})
        assert gated.router == RouterSpec(num_experts=8, top_k=2, **SELECTED)
        assert gated.shared == SharedSpec(hidden_dim=32, gate="sigmoid")
    fourth = LayerSpec.from_maxtext(
        MAXTEXT | {"decoder_block": "deepseek4", "model_name": "deepseek4-284b", "routed_score_func": "sqrtsoftplus",
                   "n_routing_groups": -1, "topk_routing_group": -1, "mlp_activations_limit": 10}
    )  # fmt: skip
    assert fourth.router == V3.router.without_groups().replace(score_func="sqrtsoftplus")
    assert fourth.experts.clamp == 10


def test_a_flat_yml_of_maxtext_is_read(tmp_path):
    path = tmp_path / "gpt-oss-20b.yml"
    path.write_text(
        '# a comment\nmodel_name: "gpt-oss-20b"\ndecoder_block: gpt_oss\nbase_emb_dim: 2880 # width\n'
        'base_moe_mlp_dim: 2880\nnum_experts: 32\nnum_experts_per_tok: 4\nmlp_activations: ["sigmoid","linear"]\n'
        "mlp_activations_limit: 7.0\nmlp_bias: True\nrouted_bias: true\nlogical_axis_rules: [\n  ['a', 'b'],\n]\n"
    )
    layer = LayerSpec.from_maxtext(path)
    assert (layer.gate_bias, layer.experts.clamp, layer.experts.bias) == (True, 7.0, True)
    assert layer.router == RouterSpec(num_experts=32, top_k=4, **SELECTED)
    own = {"model_name", "n_routing_groups", "topk_routing_group"}
    (tmp_path / "deepseek3-671b.yml").write_text("".join(f"{k}: {v}\n" for k, v in MAXTEXT.items() if k not in own))
    found = LayerSpec.from_maxtext(tmp_path / "deepseek3-671b.yml")  # a file of a model is named as it
    assert found == V3.replace(router=V3.router.without_groups())
    with pytest.raises(ValueError, match="a is given twice"):
        maxtext.parse("a: 1\na: 2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 1}, "num_experts is 1: a dense model"),
        ({"decoder_block": "mixtrall"}, "decoder_block is 'mixtrall'.*did you mean mixtral"),
        ({"model_name": "mine"}, "routed_bias is True; with model_name 'mine'"),
        ({"model_name": "mine", "routed_bias": False}, "n_routing_groups is 8; MaxText reads it in models deepseek3"),
        ({"num_expert_per_tok": 3}, "'num_expert_per_tok' is no key .*did you mean num_experts_per_tok"),
        ({"use_random_routing": True}, "use_random_routing is True"),
        ({"first_num_hash_layers": 3}, "first_num_hash_layers is 3"),
        ({"sparse_matmul": False, "capacity_factor": 1.0}, "capacity_factor is 1.0 without sparse_matmul"),
        ({"mlp_activations": ["silu"]}, "mlp_activations is"),
        ({"mlp_activations": ["sigmoid", "linear"]}, "with decoder_block 'deepseek' it is one of"),
        ({"mlp_activations": None}, "mlp_activations is None; it is a list"),
        ({"base_moe_mlp_dim": None}, "base_moe_mlp_dim is None"),
        ({"n_routing_groups": None}, "topk_routing_group is 4, but n_routing_groups is None"),
        ({"n_routing_groups": 7}, "n_routing_groups is 7, which does not divide num_experts"),
    ],
)
def test_a_broken_maxtext_config_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        LayerSpec.from_maxtext(MAXTEXT | changes)


def test_torchtitan_as_a_dict_and_as_files(tmp_path):
    expected = LayerSpec(
        router=RouterSpec(num_experts=8, top_k=2, score_func="sigmoid", route_norm=True, norm_eps=1e-20),
        experts=ExpertSpec(dim=16, hidden_dim=32),
    )
    config = moe(top_k=2, route_norm=True)
    assert LayerSpec.from_torchtitan(config) == expected
    path = tmp_path / "moe.json"
    path.write_text(json.dumps({"layers": [{"moe": None}, {"moe": config}, {"moe": config}]}))
    assert LayerSpec.from_torchtitan(path) == expected
    shared = config | {"shared_experts": {"w1": {"in_features": 16, "out_features": 24}}}
    assert LayerSpec.from_torchtitan(shared).shared == SharedSpec(hidden_dim=24)
    toml = tmp_path / "moe.toml"
    toml.write_text("[moe.router]\nnum_experts = 8\ntop_k = 2\nroute_norm = true\n[moe.routed_experts.inner_experts]\n"
                    "dim = 16\nhidden_dim = 32\n")  # fmt: skip
    assert LayerSpec.from_torchtitan(toml) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dim": 3}, "a dense model"),
        (moe(top_k=2) | {"num_experts": 9}, "router.num_experts is 8, but num_experts is 9"),
        (moe(topk=2), "'router.topk' is no key .*did you mean router.top_k"),
        (moe(top_k=9), "router.top_k is 9; it is an integer between 1 and 8"),
        ({"a": moe(top_k=1), "b": moe(top_k=2)}, "the MoE layers of this torchtitan config differ"),
    ],
)
def test_a_broken_torchtitan_config_is_an_error(config, message):
    with pytest.raises(ValueError, match=message):
        LayerSpec.from_torchtitan(config)
