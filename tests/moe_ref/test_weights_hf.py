"""Tests: weights under the names of checkpoints, from mappings and from files of the safetensors format."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_ref import LayerParams, LayerSpec, moe_layer, params_from_hf, params_to_hf
from moe_ref.specs.readers.tensors import Tensors, numbers

QWEN = {"model_type": "qwen2_moe", "hidden_size": 6, "moe_intermediate_size": 3, "shared_expert_intermediate_size": 5,
        "num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 3, "mlp_only_layers": [0]}  # fmt: skip
SPEC = LayerSpec.from_hf(QWEN)
PARAMS = LayerParams.init(SPEC).astype(np.float32)


def write_safetensors(path: Path, tensors: dict, kinds: dict | None = None) -> None:
    """A file of the format, written by hand."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, value in tensors.items():
        kind = (kinds or {}).get(name, {"float32": "F32", "float64": "F64", "uint16": "BF16"}[value.dtype.name])
        header[name] = {
            "dtype": kind,
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + value.nbytes],
        }
        data += value.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def equal(one: LayerParams, other: LayerParams) -> None:
    for name in LayerParams.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize("names", ["modules", "file"])
def test_a_layer_goes_through_both_namings(names):
    written = params_to_hf(PARAMS, QWEN, layer=1, names=names)
    assert all(name.startswith("model.layers.1.mlp.") for name in written)
    assert ("model.layers.1.mlp.experts.3.up_proj.weight" in written) == (names == "file")
    equal(params_from_hf(written, QWEN, layer=1), replace(PARAMS, expert_bias_E=None))


def test_other_layers_and_other_parts_are_no_matter():
    written = params_to_hf(PARAMS, QWEN, layer=1)
    more = {
        "model.embed_tokens.weight": np.zeros(3), "model.layers.0.mlp.gate_proj.weight": np.zeros(3),
        "model.layers.1.self_attn.q_proj.weight": np.zeros(3), "model.layers.11.mlp.gate.weight": np.zeros(3),
        "model.layers.2.mlp.gate.weight": np.zeros(3),
    }  # fmt: skip
    assert params_from_hf(written | more, QWEN, layer=1).gate_ED.shape == (4, 6)


def test_files_an_index_and_a_folder_are_read_one_tensor_at_a_time(tmp_path):
    written = params_to_hf(PARAMS, QWEN, layer=2, names="file")
    names = sorted(written)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        write_safetensors(tmp_path / file, {name: written[name] for name in own})
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = params_from_hf(written, QWEN, layer=2)
    equal(params_from_hf(tmp_path, QWEN, layer=2), expected)
    equal(params_from_hf(tmp_path / "model.safetensors.index.json", QWEN, layer=2), expected)
    with pytest.raises(ValueError, match="is missing"):
        params_from_hf(tmp_path / "a.safetensors", QWEN, layer=2)
    tensors = Tensors(tmp_path)
    assert len(tensors) == len(written)
    # A part that nobody asks for may be broken.
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes()[:-8])
    assert Tensors(tmp_path)[names[0]].shape == written[names[0]].shape


def test_bfloat16_is_read_exactly_as_float32(tmp_path):
    exact = np.float32([1.0, -2.5, 3.140625, 0.0])
    bits = (exact.view(np.uint32) >> 16).astype(np.uint16)
    write_safetensors(tmp_path / "x.safetensors", {"a": bits})
    np.testing.assert_array_equal(Tensors(tmp_path / "x.safetensors")["a"], exact)


def test_quantised_weights_are_an_error_that_says_so(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"a": np.zeros(4, np.float32)}, {"a": "F8_E4M3"})
    with pytest.raises(ValueError, match="a has dtype F8_E4M3, a quantised one"):
        Tensors(tmp_path / "x.safetensors")["a"]
    with pytest.raises(ValueError, match="not quantised"):
        numbers("a", np.zeros(3, np.int8))
    written = params_to_hf(PARAMS, QWEN, layer=1, names="file")
    scaled = written | {"model.layers.1.mlp.experts.0.up_proj.weight_scale_inv": np.zeros((1, 1))}
    with pytest.raises(ValueError, match=r"weight_scale_inv is no weight .*dequantise"):
        params_from_hf(scaled, QWEN, layer=1)


@pytest.mark.parametrize(
    "text", [b"", b"\xff" * 8, (100).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{x"]
)
def test_a_file_of_another_format_is_an_error(tmp_path, text):
    (tmp_path / "x.safetensors").write_bytes(text)
    with pytest.raises(ValueError, match="is no safetensors file"):
        Tensors(tmp_path / "x.safetensors")


def test_missing_unknown_and_misshapen_tensors_are_errors():
    written = params_to_hf(PARAMS, QWEN, layer=1)
    name = "model.layers.1.mlp.experts.down_proj"
    with pytest.raises(ValueError, match=f"{name} is missing"):
        params_from_hf({key: value for key, value in written.items() if key != name}, QWEN, layer=1)
    with pytest.raises(ValueError, match=r"mlp.more is no weight of this layer"):
        params_from_hf(written | {"model.layers.1.mlp.more": np.zeros(1)}, QWEN, layer=1)
    with pytest.raises(ValueError, match=r"w_down_EFD has shape \(4, 6, 3\); it is \(4, 3, 6\)"):
        params_from_hf(written | {name: np.swapaxes(written[name], 1, 2)}, QWEN, layer=1)
    with pytest.raises(ValueError, match="layer 0 is dense; the first MoE layer is 1"):
        params_from_hf(written, QWEN, layer=0)
    with pytest.raises(ValueError, match="layer is 3; a config of qwen2_moe has 3 layers"):
        params_from_hf(written, QWEN, layer=3)
    with pytest.raises(ValueError, match="layer 2 is not in these weights"):
        params_from_hf(written, QWEN, layer=2)
    twice = written | {f"again.{key}": value for key, value in written.items()}
    with pytest.raises(ValueError, match="the router of layer 1 is there 2 times"):
        params_from_hf(twice, QWEN, layer=1)
    with pytest.raises(ValueError, match="is no file"):
        params_from_hf("nothing.safetensors", QWEN, layer=1)


def test_square_weights_are_turned_by_family_not_by_shape():
    square = {"hidden_size": 4, "num_hidden_layers": 1, "num_experts_per_tok": 1}
    llama = square | {"model_type": "llama4_text", "intermediate_size": 4, "num_local_experts": 2}  # [in, out]
    mixtral = square | {"model_type": "mixtral", "intermediate_size": 4, "num_local_experts": 2}  # [out, in]
    down = np.arange(32.0).reshape(2, 4, 4)
    for config, block, expected in ((llama, "feed_forward", down), (mixtral, "mlp", down.swapaxes(1, 2))):
        spec = LayerSpec.from_hf(config)
        written = params_to_hf(LayerParams.init(spec), config, layer=0)
        name = f"model.layers.0.{block}.experts.down_proj"
        params = params_from_hf(written | {name: down}, config, layer=0)
        np.testing.assert_array_equal(params.w_down_EFD, expected)


def test_a_layer_of_a_folder_runs_in_three_lines(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    write_safetensors(tmp_path / "model.safetensors", params_to_hf(PARAMS, QWEN, layer=1))

    spec = LayerSpec.layers_from_hf(tmp_path)[1]
    params = params_from_hf(tmp_path, tmp_path, layer=1)
    output_TD = moe_layer(np.ones((2, 6)), params, spec).output_TD

    without_bias = replace(PARAMS, expert_bias_E=None)
    np.testing.assert_array_equal(output_TD, moe_layer(np.ones((2, 6)), without_bias, SPEC).output_TD)


def test_a_family_without_known_names_is_an_error():
    with pytest.raises(ValueError, match="no LayerSpec describes"):
        params_from_hf({}, {"model_type": "axk1"}, layer=5)
    with pytest.raises(ValueError, match="names is 'other'"):
        params_to_hf(PARAMS, QWEN, layer=1, names="other")
