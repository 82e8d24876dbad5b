"""Tests: what the readers say of the config objects of transformers and torchtitan is what their modules compute.

The rows of the subject say which config gives which spec; they were checked against the modules, and are written apart
from the rows of the readers.
"""

import importlib
from dataclasses import fields

import pytest
from test_transformers_layers import block_spec

from moe_ref import LayerSpec, RouterSpec
from moe_ref.specs.families import FAMILIES, preset, tiny

transformers = pytest.importorskip("transformers")

from conformance.subjects.transformers.blocks import BLOCKS  # noqa: E402
from conformance.subjects.transformers.families import ROUTERS, inert_fields  # noqa: E402
from tools import hf_defaults  # noqa: E402

NO_DEFAULT = {"dots1", "deepseek_v2", "deepseek_ocr2", "diffusion_gemma", "gemma4"}
"""Families whose config class has no number of experts, or of experts per token, by default."""
MORE = {
    "step3p7": {"mlp_layer_types": ["sparse"] * 4, "swiglu_limits": [0.7] * 4, "swiglu_limits_shared": [0.4] * 4},
    "gemma4": {"enable_moe_block": True},
    "deepseek_v4": {"mlp_layer_types": ["moe"] * 4},
}
NO_DEPTH = {"nemotron_h", "dbrx", "longcat_flash", "gemma4", "diffusion_gemma"}
"""Families whose depth goes with another entry."""
GRANITES = {"granitemoeshared", "granitemoe_swa", "granitemoehybrid"}


def config_class(name: str):
    row = ROUTERS[name]
    return getattr(importlib.import_module(f"transformers.models.{row.module}.configuration_{row.module}"), row.config)


def same(one: RouterSpec, other: RouterSpec) -> None:
    """Equal, but for what changes nothing in either."""
    inert = inert_fields(one) & inert_fields(other)
    differ = {each.name for each in fields(RouterSpec) if getattr(one, each.name) != getattr(other, each.name)}
    assert differ <= inert


def routers_of(config) -> list[RouterSpec]:
    from moe_ref.specs.readers import hf

    reading = hf.read(config)
    return [RouterSpec(**reading.router(layer)) for layer in reading.sparse]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_real_config_gives_the_router_that_its_module_has(name):
    row, spec = ROUTERS[name], tiny(name)
    entries = row.config_entries({each.name: getattr(spec, each.name) for each in fields(RouterSpec)}, 16)
    depth = {} if name in NO_DEPTH else {"num_hidden_layers": 4}
    config = config_class(name)(**entries | depth | MORE.get(name, {}))
    for given in (config, config.to_dict(), config.to_diff_dict() | {"model_type": config.model_type}):
        same(routers_of(given)[0 if name.endswith("_hash") else -1], spec)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NO_DEFAULT])
def test_the_default_config_of_a_family_is_read(name):
    changes = {"expert_selection_fn": "sigmoid"} if name == "cohere2_moe_sigmoid" else {}
    router = routers_of(config_class(name)(**changes))[0 if name.endswith("_hash") else -1]
    if FAMILIES[name].checkpoint.startswith("defaults"):
        same(router, preset(name))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_real_config_gives_the_layer_that_its_block_has(name):
    block, spec = BLOCKS[name], block_spec(name)
    values = {each.name: getattr(spec.router, each.name) for each in fields(RouterSpec)}
    entries = {key: value for key, value in block.config_entries(values, spec).items() if key}
    depth = {} if name in NO_DEPTH else {"num_hidden_layers": 4}
    more = MORE.get(name, {}) | ({"shared_intermediate_size": 0} if name in GRANITES else {})
    config = config_class(name)(**entries | depth | more)
    layers = [layer for layer in LayerSpec.layers_from_hf(config) if layer is not None]
    assert LayerSpec.from_hf(config.to_dict()) == layers[0]
    assert layers[0].replace(router=spec.router) == spec
    same(layers[0].router, spec.router)


def test_the_table_of_defaults_is_that_of_the_installed_release():
    assert hf_defaults.FILE.read_text() == hf_defaults.page(), "run python -m tools.hf_defaults"


def test_the_moe_config_of_torchtitan_is_read():
    pytest.importorskip("torchtitan")
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    experts = GroupedExperts.Config(dim=32, hidden_dim=8, num_experts=16)
    config = MoE.Config(
        num_experts=16,
        routed_experts=RoutedExperts.Config(
            inner_experts=experts, token_dispatcher=LocalTokenDispatcher.Config(num_experts=16, top_k=4)
        ),
        router=TokenChoiceTopKRouter.Config(
            num_experts=16, gate=Linear.Config(in_features=32, out_features=16, bias=False), top_k=4,
            num_expert_groups=4, num_limited_groups=2, route_norm=True, route_scale=2.5),
    )  # fmt: skip
    router = tiny("deepseek_v3").replace(score_func="sigmoid", route_scale=2.5)
    layer = LayerSpec.from_torchtitan(config)
    assert layer.router == router
    assert (layer.experts.dim, layer.experts.hidden_dim, layer.shared) == (32, 8, None)


@pytest.mark.parametrize("model", ["deepseek_v3", "gpt_oss", "qwen3"])
def test_the_model_configs_of_torchtitan_are_read(model):
    pytest.importorskip("torchtitan")
    module = importlib.import_module(f"torchtitan.models.{model}")
    registry = next(
        value for name, value in vars(module).items() if name.endswith("_configs") and isinstance(value, dict)
    )
    found = 0
    for make in registry.values():
        try:
            config = make(moe_comm_backend="standard", attn_backend="flex") if callable(make) else make
        except TypeError:
            continue
        if "MoE" in repr(config):
            found += LayerSpec.from_torchtitan(config).router.num_experts > 1
    assert found
