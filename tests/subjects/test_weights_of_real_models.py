"""Tests: the weights of the real models of transformers are read and written exactly, under both of their namings."""

import importlib
import re
import warnings
from dataclasses import fields

import numpy as np
import pytest
from layer_agreement import FLOAT32, assert_near
from test_transformers_layers import block_spec

from moe_ref import LayerParams, LayerSpec, RouterSpec, moe_layer, params_from_hf, params_to_hf
from moe_ref.specs.params import param_shapes
from moe_ref.specs.readers.hf_forms import FORMS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from conformance.subjects.transformers.arrays import to_canonical  # noqa: E402
from conformance.subjects.transformers.blocks import BLOCKS, NO_BLOCK  # noqa: E402
from conformance.subjects.transformers.families import TINY  # noqa: E402

TOKENS = {"vocab_size": 8, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
LAYERS = 4
MORE: dict[str, dict] = {
    "step3p7": {
        "mlp_layer_types": ["sparse"] * LAYERS,
        "swiglu_limits": [0.7] * LAYERS,
        "swiglu_limits_shared": [0.4] * LAYERS,
    },
    "lfm2_moe": {"layer_types": ["full_attention"] * LAYERS},
    "longcat_flash": {"num_hidden_layers": 2, "ffn_hidden_size": 8},
    "granitemoehybrid": {"shared_intermediate_size": 12},
    "granitemoeshared": {"shared_intermediate_size": 12},
    "granitemoe_swa": {"shared_intermediate_size": 12},
    "dbrx": {"n_layers": 1, "n_heads": 1},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe", "moe"]},
}
NO_MODEL = {
    "dbrx": "its attention config has no rope_theta in this release",
    "qwen4_exp": "its model needs an n-gram embedding",
    "deepseek_ocr2": "its text model needs a vision part",
}
"""Families of which no tiny text model can be built from their config alone."""


def config_of(name: str):
    """A tiny config of a family, with all that its block has."""
    block = BLOCKS[name]
    module = importlib.import_module(f"transformers.models.{block.row.module}.configuration_{block.row.module}")
    spec = block_spec(name)
    values = {each.name: getattr(spec.router, each.name) for each in fields(RouterSpec)}
    entries = {key: value for key, value in block.config_entries(values, spec).items() if key}
    depth = {} if name in ("nemotron_h", "dbrx") else {"num_hidden_layers": LAYERS}
    return getattr(module, block.row.config)(**entries | TOKENS | depth | MORE.get(name, {}))


def model_of(name: str):
    """The real model of a tiny config, with every parameter at random."""
    config = config_of(name)
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element")  # of attention, in tiny sizes
            model = transformers.AutoModelForCausalLM.from_config(config)
    except ValueError:  # a part of a larger model
        row = BLOCKS[name].row
        module = importlib.import_module(f"transformers.models.{row.module}.modeling_{row.module}")
        classes = [each for key, each in vars(module).items() if key.endswith("Model") and isinstance(each, type)]
        made = (each(config) for each in classes if getattr(each, "config_class", None) is type(config))
        model = next(each for each in made if any("experts" in key for key in each.state_dict()))
    for each in [*model.parameters(), *model.buffers()]:
        if each.is_floating_point() and each.numel():
            torch.nn.init.normal_(each)
    return model, config


def of_layer(state_dict, layer: int) -> dict:
    """The tensors of one decoder layer."""
    return {name: value for name, value in state_dict.items() if re.search(rf"(layers|blocks)\.{layer}\.", name)}


MODELS = [name for name in BLOCKS if name not in NO_MODEL]


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_of_a_real_model_is_read_and_written_exactly(name, tmp_path):
    model, config = model_of(name)
    layers = LayerSpec.layers_from_hf(config)
    layer = max(i for i, each in enumerate(layers) if each is not None)
    spec = layers[layer]
    routers = re.compile(r"(?:layers|blocks)\.(\d+)\..*(?:gate|router|classifier|wg)\.weight$")
    sparse = {int(found[1]) for key in model.state_dict() if (found := routers.search(key)) and "shared" not in key}
    assert sparse == {i for i, each in enumerate(layers) if each is not None}
    modules = {key: value.numpy() for key, value in model.state_dict().items()}
    params = params_from_hf(modules, config, layer=layer)
    assert {key for key, shape in param_shapes(spec).items() if shape is not None} - {"expert_bias_E"} == {
        each.name for each in fields(params) if getattr(params, each.name) is not None
    } - {"expert_bias_E"}

    root = "model.layers" if any(key.startswith("model.layers") for key in modules) else "layers"
    written = params_to_hf(params, config, layer=layer, root=f"{root}.{layer}.")
    assert written.keys() <= modules.keys()
    for key, value in written.items():
        if name == "longcat_flash" and key.endswith("gate_up_proj"):  # with rows that nothing reads
            value, modules[key] = value[: spec.router.num_experts], modules[key][: spec.router.num_experts]
        np.testing.assert_array_equal(value, modules[key], err_msg=key)

    # Published files have other names; they are read from the folder, without the other layers.
    model.save_pretrained(tmp_path)
    again = params_from_hf(tmp_path, config, layer=layer)
    for each in fields(params):
        np.testing.assert_array_equal(getattr(again, each.name), getattr(params, each.name), err_msg=each.name)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_block_alone_is_read_as_the_subject_reads_it(name):
    block, spec = BLOCKS[name], block_spec(name)
    if name.startswith("granitemoe"):
        spec = spec.replace(shared=None)
    config = config_of(name).to_dict() | ({"shared_intermediate_size": 0} if name.startswith("granitemoe") else {})
    layers = LayerSpec.layers_from_hf(config)
    layer = max(i for i, each in enumerate(layers) if each is not None)
    params = LayerParams.init(layers[layer]).astype(np.float32)
    written = params_to_hf(params, config, layer=layer, root="")
    alone = {key.partition(".")[2]: value for key, value in written.items()}
    again = params_from_hf(alone, config, layer=layer)
    for each in fields(params):
        expected = getattr(params, each.name)
        if each.name == "expert_bias_E" and not block.row.bias:
            expected = None
        np.testing.assert_array_equal(getattr(again, each.name), expected, err_msg=each.name)
    if name in ("dbrx", "longcat_flash"):  # the subject pads or flattens on its own
        return
    found = to_canonical(block, {key: torch.from_numpy(value) for key, value in alone.items()}, params)
    for key, value in found.items():
        expected = getattr(params, key)  # in a block, one shared expert has no axis of its own
        np.testing.assert_array_equal(np.asarray(value).reshape(expected.shape), expected, err_msg=key)


@pytest.mark.parametrize("name", ["SarvamMoEConfig", "SarvamMLAConfig"])
def test_a_config_for_the_classes_of_another_family_is_read_as_they_compute(name):
    """Its model has the blocks of glm4_moe or deepseek_v3; the layer is what its own config says."""
    sizes = {"hidden_size": 16, "moe_intermediate_size": 8, "num_experts_per_tok": 3, "intermediate_size": 8}
    groups = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2}
    config = getattr(transformers, name)(**TINY | TOKENS | sizes | groups)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for each in model.state_dict().values():
        torch.nn.init.normal_(each)
    spec = LayerSpec.from_hf(config)
    params = params_from_hf({key: value.numpy() for key, value in model.state_dict().items()}, config, layer=1)
    x_TD = np.random.default_rng(0).normal(size=(17, 16)).astype(np.float32)
    with torch.no_grad():
        found_TD = model.model.layers[1].mlp(torch.from_numpy(x_TD)[None])[0].numpy()
    assert_near(found_TD, moe_layer(x_TD, params, spec).output_TD, FLOAT32)


def test_a_family_with_forms_has_a_block_here_or_it_is_said_why_not():
    assert FORMS.keys() - BLOCKS.keys() <= NO_BLOCK.keys()


@pytest.mark.parametrize("name", [name for name in FORMS if name in BLOCKS])
def test_every_form_of_a_family_is_written_and_read(name):
    config = config_of(name)
    layers = LayerSpec.layers_from_hf(config)
    layer = max(i for i, each in enumerate(layers) if each is not None)
    params = LayerParams.init(layers[layer])
    for names in ("modules", "file"):
        written = params_to_hf(params, config, layer=layer, names=names)
        again = params_from_hf(written, config, layer=layer)
        for each in fields(params):
            if each.name != "expert_bias_E" or BLOCKS[name].row.bias:
                np.testing.assert_array_equal(getattr(again, each.name), getattr(params, each.name), err_msg=each.name)
