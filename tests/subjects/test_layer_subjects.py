"""Tests: the layers of JAX, PyTorch and torchtitan are called rightly, so that what they return is theirs."""

from dataclasses import replace

import numpy as np
import pytest
from layer_agreement import (
    BFLOAT16,
    FLOAT32,
    LAYERS,
    SHARED,
    T,
    assert_combine_agrees,
    assert_experts_agree,
    assert_layer_agrees,
    assert_near,
    assert_no_token_is_no_crash,
    error,
    params_of,
    tokens,
)

from conformance.core.capabilities import capabilities
from conformance.core.subject import Unsupported
from moe_ref import LayerSpec, RouterInputs, RouterSpec, moe_layer
from moe_ref.permute import dispatch, permute
from moe_ref.specs.families import tiny

torch = pytest.importorskip("torch")

# ours: PyTorch and JAX


@pytest.fixture(scope="module", params=["torch", "jax"])
def own(request):
    if request.param == "jax":
        pytest.importorskip("jax")
        from conformance.subjects.jax.subject import Jax

        return Jax()
    from conformance.subjects.torch.subject import Torch

    return Torch()


# With JAX each layer costs seconds of compilation: few of them, which have every parameter between them.
@pytest.mark.parametrize(
    ("own", "name"),
    [*(("torch", name) for name in LAYERS), ("jax", "biases, clamp and offset"), ("jax", "scored shared experts")],
    indirect=["own"],
)
def test_our_layers_and_their_gradients_agree_with_the_reference(own, name):
    assert own.supports_layer(LAYERS[name]) is None
    assert_layer_agrees(own, LAYERS[name], params_of(LAYERS[name]), FLOAT32)


@pytest.mark.parametrize("name", ["biases, clamp and offset", "weight on the input", "null experts"])
def test_our_experts_and_sums_agree_with_the_reference(own, name):
    spec = LAYERS[name]
    assert_experts_agree(own, spec, params_of(spec), FLOAT32)
    assert_combine_agrees(own, spec, params_of(spec))


def test_inputs_of_a_layer_reach_it(own):
    spec = LAYERS["null experts"]
    mask_T = np.random.default_rng(2).random(T) < 0.7
    assert_layer_agrees(own, spec, params_of(spec, biased=False), FLOAT32, token_mask_T=mask_T)
    table = LayerSpec(router=tiny("deepseek_v4_hash"), experts=spec.experts)
    more = {"table_VK": np.arange(9 * table.router.top_k).reshape(9, -1) % 8, "token_ids_T": np.arange(T) % 9}
    x_TD = tokens()[0]
    wanted = moe_layer(x_TD, params_of(table), table, **RouterInputs.keywords(more)).output_TD
    assert_near(own.layer(x_TD, params_of(table), table, **more), wanted, FLOAT32)
    with pytest.raises(TypeError, match="no_such_input"):
        own.layer(tokens()[0], params_of(table), table, no_such_input=1)


def test_our_rows_are_sorted_by_expert(own):
    ids_TK = np.random.default_rng(3).integers(-1, 7, size=(T, 3))
    wanted = permute(ids_TK, 5)
    order_N, counts_E = own.permute(ids_TK, 5)
    np.testing.assert_array_equal(order_N, wanted.order_N)
    np.testing.assert_array_equal(counts_E, wanted.tokens_per_expert_E)
    rows_ND = dispatch(np.repeat(ids_TK[:, :, None], 2, axis=2), order_N)
    assert (np.diff(rows_ND[:, 0]) >= 0).all()


def test_our_layers_take_no_token(own):
    spec = LAYERS["biases, clamp and offset"]
    assert_no_token_is_no_crash(own, spec, params_of(spec))


def test_a_layer_keeps_nothing_of_the_last_parameters(own):
    spec = LAYERS["biases, clamp and offset"]
    for params in (params_of(spec), params_of(spec, biased=False)):
        assert_layer_agrees(own, spec, params, FLOAT32)


# torchtitan


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def torchtitan(request):
    pytest.importorskip("torchtitan")
    from conformance.subjects.torchtitan.subject import Torchtitan, TorchtitanFloat32

    subject = {"bfloat16": Torchtitan, "float32": TorchtitanFloat32}[request.param]()
    assert subject.expert_dtype == request.param
    return subject


def bound_of(subject) -> float:
    return {"bfloat16": BFLOAT16, "float32": FLOAT32}[subject.expert_dtype]


TITAN = LAYERS["groups and a shared expert"]


@pytest.mark.parametrize(
    "spec",
    [
        TITAN,
        TITAN.replace(shared=SHARED.replace(gate="sigmoid")),
        TITAN.replace(shared=None, gate_bias=True),
        TITAN.replace(router=RouterSpec(num_experts=8, top_k=1)),
        TITAN.replace(router=RouterSpec(num_experts=8, top_k=3, selector="round_robin")),
    ],
    ids=["groups", "shared_gate", "gate_bias", "top_1", "round_robin"],
)
def test_the_torchtitan_layer_agrees_with_the_reference(torchtitan, spec):
    assert torchtitan.supports_layer(spec) is None
    assert_layer_agrees(torchtitan, spec, params_of(spec), bound_of(torchtitan))


def test_torchtitans_experts_and_sums_agree_with_the_reference(torchtitan):
    assert_experts_agree(torchtitan, TITAN, params_of(TITAN), bound_of(torchtitan))
    assert_combine_agrees(torchtitan, TITAN, params_of(TITAN))
    assert_no_token_is_no_crash(torchtitan, TITAN, params_of(TITAN))


def test_torchtitans_experts_compute_in_the_dtype_that_is_said(torchtitan):
    spec, x_TD = TITAN.replace(shared=None), tokens()[0]
    params = params_of(spec)
    size = error(torchtitan.layer(x_TD, params, spec), moe_layer(x_TD, params, spec).output_TD)
    assert (size > 1e-4) == (torchtitan.expert_dtype == "bfloat16")


def test_a_layer_that_torchtitan_cannot_express_gets_a_sentence(torchtitan):
    def why(**changes) -> str:
        return str(torchtitan.supports_layer(TITAN.replace(**changes)))

    assert why(experts=TITAN.experts.replace(bias=True)) == "torchtitan's experts have bias False, not True"
    assert why(experts=TITAN.experts.replace(hidden_dim=6)).startswith("experts.hidden_dim is 6; torchtitan's grouped")
    assert "is summed" in why(shared=SHARED.replace(combine="average"))
    assert why(router=tiny("gpt_oss")) == "torchtitan's router has score_over all, not selected"


def test_torchtitans_gpt_oss_computes_in_float32_and_in_bfloat16_refuses_float32_tokens(torchtitan):
    form = {"alpha": 1.702, "up_offset": 1.0, "clamp": 0.75, "bias": True}
    spec = LayerSpec(router=tiny("gpt_oss"), experts=TITAN.experts.replace(**form), gate_bias=True)
    if torchtitan.expert_dtype == "bfloat16":
        assert "experts of gpt-oss return bfloat16" in torchtitan.supports_layer(spec)
        return
    assert torchtitan.supports_layer(spec) is None
    assert_layer_agrees(torchtitan, spec, replace(params_of(spec), expert_bias_E=None), FLOAT32)
    with pytest.raises(Unsupported, match="balancing bias to scores, not to logits"):
        torchtitan.layer(tokens()[0], params_of(spec), spec)


def test_what_each_subject_can_do(own, torchtitan):
    stages = {"experts", "layer", "layer_gradients"}
    assert capabilities(own) >= stages | {"permute", "combine"}
    assert capabilities(torchtitan) >= stages | {"combine"}
