"""Tests: the layers of JAX, PyTorch, transformers and torchtitan are called rightly; what they return is theirs.

Every comparison is with moe_ref in float64, on numbers that float32 holds.
"""

from dataclasses import fields, replace

import numpy as np
import pytest

from conformance.subject import Unsupported, capabilities
from moe_ref import ExpertSpec, LayerParams, LayerSpec, RouterSpec, SharedSpec, layer_backward, moe_layer
from moe_ref.families import FAMILIES, tiny
from moe_ref.permute import dispatch, permute

torch = pytest.importorskip("torch")

T, D, F = 17, 16, 8
FLOAT32 = 2e-6
"""Largest error over largest number of an array: some roundings of sums of up to 24 products; 7e-7 is seen."""
BFLOAT16 = 3e-2
"""The same where experts compute in bfloat16, whose rounding is 4e-3; 1.4e-2 is seen."""

SHARED = SharedSpec(hidden_dim=24)
LAYERS = {
    "groups and a shared expert": LayerSpec(
        router=tiny("deepseek_v3"), experts=ExpertSpec(dim=D, hidden_dim=F), shared=SHARED
    ),
    "biases, clamp and offset": LayerSpec(
        router=tiny("gpt_oss"),
        experts=ExpertSpec(dim=D, hidden_dim=F, bias=True, alpha=1.702, up_offset=1.0, clamp=0.7),
        gate_bias=True,
    ),
    "weight on the input": LayerSpec(
        router=tiny("llama4").replace(top_k=3, output_scale=1.5),
        experts=ExpertSpec(dim=D, hidden_dim=F, gated=False, activation="relu2", bias=True),
        shared=SHARED.replace(combine="average"),
    ),
    "null experts": LayerSpec(
        router=tiny("longcat_flash"),
        experts=ExpertSpec(dim=D, hidden_dim=F, activation="gelu", clamp=0.7, clamp_at="after"),
        shared=SHARED.replace(gate="sigmoid"),
    ),
    "scored shared experts": LayerSpec(
        router=tiny("inkling"), experts=ExpertSpec(dim=D, hidden_dim=F, activation="gelu_tanh"), shared=SHARED
    ),
    "per-expert scale": LayerSpec(
        router=tiny("gemma4"),
        experts=ExpertSpec(dim=D, hidden_dim=F, gated=False, activation="relu"),
        shared=SHARED.replace(clamp=0.7),
    ),
}


def params_of(spec: LayerSpec, *, biased: bool = True) -> LayerParams:
    """Parameters that float32 holds."""
    params = LayerParams.init(spec, seed=1).astype(np.float32)
    return params if biased else replace(params, expert_bias_E=None)


def tokens(num_tokens: int = T, dim: int = D):
    """Tokens, and the gradient of an output of their shape."""
    return np.random.default_rng(0).normal(size=(2, num_tokens, dim)).astype(np.float32)


def error(found, wanted) -> float:
    """The largest difference, relative to the largest number; infinite for another shape."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted)
    if found.shape != wanted.shape:
        return np.inf
    scale = np.abs(wanted).max(initial=0)
    return np.abs(found - wanted).max(initial=0) / (scale or 1)


def assert_near(found, wanted, bound: float, what: str = ""):
    assert error(found, wanted) <= bound, what


def assert_layer_agrees(subject, spec: LayerSpec, params: LayerParams, bound: float, **inputs):
    """Output and every gradient."""
    x_TD, d_output_TD = tokens(dim=spec.experts.dim)
    if "token_mask_T" in inputs:
        x_TD[~inputs["token_mask_T"]] = np.nan  # not read
    trace = moe_layer(x_TD, params, spec, **inputs)
    assert_near(subject.layer(x_TD, params, spec, **inputs), trace.output_TD, bound, "output")
    wanted = layer_backward(trace, params, spec, d_output_TD)
    found = subject.layer_gradients(x_TD, params, spec, d_output_TD, **inputs)
    names = {field.name for field in fields(params) if getattr(params, field.name) is not None}
    # The balancing bias is a buffer for most: without a gradient, which would be 0.
    assert found.keys() | {"expert_bias_E"} == names | {"x_TD", "expert_bias_E"}
    for name, gradient in found.items():
        assert_near(gradient, wanted.x_TD if name == "x_TD" else getattr(wanted.params, name), bound, name)


def assert_experts_agree(subject, spec: LayerSpec, params: LayerParams, bound: float):
    """The experts alone, with rows that belong to nobody at the end."""
    trace = moe_layer(tokens()[0], params, spec)
    rows_ND = trace.experts.input_RD
    rows_RD = np.concatenate([rows_ND, np.full((3, D), np.nan)]).astype(np.float32)
    found = subject.experts(rows_RD, trace.permutation.tokens_per_expert_E, params, spec)
    assert found.shape == rows_RD.shape
    assert_near(found[: len(rows_ND)], trace.experts.output_RD, bound)
    no_counts_E = np.zeros(spec.router.num_experts, dtype=np.int64)
    assert subject.experts(rows_RD[:0], no_counts_E, params, spec).shape == (0, D)


def assert_combine_agrees(subject, spec: LayerSpec, params: LayerParams):
    """The weighted sum of the reference's rows; slots of null experts are no rows."""
    trace = moe_layer(tokens()[0], params, spec)
    order_N, weights_TK = trace.permutation.order_N, trace.routing.weights_TK
    slots_TKD = np.zeros(trace.slot_outputs_TKD.shape)
    slots_TKD.reshape(-1, D)[order_N] = trace.experts.output_RD
    weighted_TKD = slots_TKD if spec.router.weight_on == "input" else slots_TKD * weights_TK[:, :, None]
    found = subject.combine(trace.experts.output_RD, order_N, weights_TK, spec)
    assert_near(found, weighted_TKD.sum(axis=1) * spec.router.output_scale, FLOAT32)


def assert_no_token_is_no_crash(subject, spec: LayerSpec, params: LayerParams):
    """Without tokens the output is empty, and every gradient is 0."""
    x_TD, d_output_TD = tokens(0)
    assert subject.layer(x_TD, params, spec).shape == (0, D)
    for name, gradient in subject.layer_gradients(x_TD, params, spec, d_output_TD).items():
        wanted = x_TD if name == "x_TD" else getattr(params, name)
        assert np.shape(gradient) == np.shape(wanted), name
        assert not np.any(gradient), name


# ours: PyTorch and JAX


@pytest.fixture(scope="module", params=["torch", "jax"])
def own(request):
    if request.param == "jax":
        pytest.importorskip("jax")
        from conformance.subjects.jax import Jax

        return Jax()
    from conformance.subjects.torch import Torch

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
    wanted = moe_layer(x_TD, params_of(table), table, **more).output_TD
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


# transformers


def transformers_subject(family: str = "", implementation: str = "eager"):
    pytest.importorskip("transformers")
    from conformance.subjects.transformers import Transformers

    return Transformers(family=family, experts_implementation=implementation)


def blocks() -> dict:
    pytest.importorskip("transformers")
    from conformance.subjects.transformers_blocks import BLOCKS

    return BLOCKS


def block_spec(name: str, **sizes) -> LayerSpec:
    """A layer that the block of a family computes, with everything that the block has."""
    block = blocks()[name]
    activation = "silu"
    if block.activation:
        activation = "gelu_tanh" if block.is_gated else "relu2"
    experts = ExpertSpec(
        dim=D,
        hidden_dim=F,
        gated=block.is_gated,
        activation=activation,
        alpha=1.702 if block.alpha else 1.0,
        up_offset=block.up_offset,
        clamp=0.7 if block.clamp else None,
        clamp_at=block.clamp_at,
        bias=bool(block.experts.biases),
    )
    shared = None
    if block.shared is not None:
        shared = SharedSpec(
            hidden_dim=20 if block.shared.width else 2 * F if block.shared.count else F,
            gate="sigmoid" if block.shared.gate else "none",
            combine="average" if block.shared.combine else "sum",
            clamp={"none": None, "same": 0.7}.get(block.shared.clamp, 0.4),
        )
    return LayerSpec(router=tiny(name), experts=experts, shared=shared, gate_bias=bool(block.row.gate_bias))


def block_cases() -> list:
    try:
        return [(name, each) for name, block in blocks().items() for each in block.implementations]
    except pytest.skip.Exception:
        return []


@pytest.mark.parametrize(("name", "implementation"), block_cases())
def test_the_real_block_of_a_family_agrees_with_the_reference(name, implementation):
    spec, subject = block_spec(name), transformers_subject(name, implementation)
    params = params_of(spec, biased=FAMILIES[name].expert_bias)
    assert subject.supports_layer(spec) is None
    assert_layer_agrees(subject, spec, params, FLOAT32)
    if name != "longcat_flash":
        assert_experts_agree(subject, spec, params, FLOAT32)
    assert_no_token_is_no_crash(subject, spec, params)
    assert subject.last_family == name


def test_every_family_has_a_block_or_a_reason():
    from conformance.subjects.transformers_blocks import NO_BLOCK

    assert blocks().keys() | NO_BLOCK.keys() == FAMILIES.keys()
    assert not blocks().keys() & NO_BLOCK.keys()


@pytest.mark.parametrize("name", block_cases() and blocks())
def test_a_layout_and_back_is_the_identity(name):
    from conformance.subjects.transformers_layers import to_canonical, to_native

    params = params_of(block_spec(name))
    found = to_canonical(blocks()[name], to_native(blocks()[name], params), params)
    names = {field.name for field in fields(params) if getattr(params, field.name) is not None}
    assert found.keys() == names - {"expert_bias_E"}
    for field, value in found.items():
        np.testing.assert_array_equal(value, getattr(params, field))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixtral", {"dim": 5, "hidden_dim": 7}),
        ("mixtral", {"dim": 6, "hidden_dim": 3}),
        ("gpt_oss", {"dim": 4, "hidden_dim": 2}),
        ("llama4", {"dim": 6, "hidden_dim": 6}),
        ("dbrx", {"dim": 3, "hidden_dim": 5}),
        ("deepseek_v3", {"dim": 7, "hidden_dim": 4}),
    ],
)
def test_the_loop_takes_any_size(name, changes):
    spec = block_spec(name)
    spec = spec.replace(experts=spec.experts.replace(**changes))
    if spec.shared is not None:
        spec = spec.replace(shared=spec.shared.replace(hidden_dim=changes["hidden_dim"]))
    params = params_of(spec, biased=FAMILIES[name].expert_bias)
    assert_layer_agrees(transformers_subject(name), spec, params, FLOAT32)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("mixtral", LayerSpec(router=tiny("mixtral").replace(top_k=1), experts=ExpertSpec(dim=D, hidden_dim=F))),
        ("qwen3_moe", LayerSpec(router=tiny("qwen3_moe").replace(top_k=8), experts=ExpertSpec(dim=D, hidden_dim=F))),
        ("gpt_oss", block_spec("gpt_oss").replace(experts=block_spec("gpt_oss").experts.replace(clamp=None))),
        ("cohere2_moe", block_spec("cohere2_moe").replace(shared=None)),
        ("ernie4_5_moe", block_spec("ernie4_5_moe").replace(shared=None)),
        ("step3p7", block_spec("step3p7").replace(shared=SharedSpec(hidden_dim=20))),
    ]
    if block_cases()
    else [],
)
def test_further_fields_reach_the_block(name, spec):
    params = params_of(spec, biased=FAMILIES[name].expert_bias)
    assert_layer_agrees(transformers_subject(name), spec, params, FLOAT32)


def test_a_block_is_found_for_a_layer():
    subject = transformers_subject()
    spec = block_spec("qwen2_moe")
    assert_layer_agrees(subject, spec, params_of(spec, biased=False), FLOAT32)
    assert subject.last_family == "qwen2_moe"


def test_a_layer_that_no_block_computes_gets_a_sentence():
    spec = block_spec("mixtral")
    subject = transformers_subject("mixtral")
    assert "experts.bias (False, not True)" in str(
        subject.supports_layer(spec.replace(experts=spec.experts.replace(bias=True)))
    )
    assert "shared (none, not one)" in str(subject.supports_layer(spec.replace(shared=SHARED)))
    assert "gate_bias (False, not True)" in str(subject.supports_layer(spec.replace(gate_bias=True)))
    assert "router.route_scale (1.0, not 2.0)" in str(
        subject.supports_layer(spec.replace(router=spec.router.replace(route_scale=2.0)))
    )
    assert "layout" not in str(subject.supports_layer(spec))
    wide = block_spec("deepseek_v3")
    assert "shared.hidden_dim (a multiple of 8, not 9)" in str(
        transformers_subject("deepseek_v3").supports_layer(wide.replace(shared=SharedSpec(hidden_dim=9)))
    )
    assert "shared (always one, not none)" in str(
        transformers_subject("deepseek_v3").supports_layer(wide.replace(shared=None))
    )
    assert "no transformers block computes this" in str(
        transformers_subject().supports_layer(spec.replace(gate_bias=True))
    )
    odd = block_spec("deepseek_ocr2")
    assert "experts.dim (even, not 7)" in str(
        transformers_subject("deepseek_ocr2").supports_layer(odd.replace(experts=odd.experts.replace(dim=7)))
    )
    assert "ends in a norm" in str(transformers_subject("axk1").supports_layer(wide))


def test_what_grouped_mm_does_not_take_gets_a_sentence():
    from conformance.subjects.transformers import TransformersGroupedMm

    subject, spec = TransformersGroupedMm(), block_spec("mixtral")
    assert subject.supports_layer(spec) is None
    narrow = spec.replace(experts=spec.experts.replace(hidden_dim=6))
    assert "experts.hidden_dim is 6; grouped_mm takes" in str(subject.supports_layer(narrow))
    assert "dbrx computes this layer, but its experts have no grouped_mm" in str(
        transformers_subject("dbrx", "grouped_mm").supports_layer(block_spec("dbrx"))
    )
    # The kernel's own limit, not ours.
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        torch.nn.functional.grouped_mm(torch.ones(4, 6), torch.ones(1, 6, 4), offs=torch.tensor([4], dtype=torch.int32))
    with pytest.raises(ValueError, match="experts_implementation is 'fast'; it is one of eager, grouped_mm"):
        transformers_subject("mixtral", "fast")


def test_a_bias_without_a_place_in_the_block_is_unsupported():
    spec, subject = block_spec("olmoe"), transformers_subject("olmoe")
    with pytest.raises(Unsupported, match="olmoe computes this layer, but without an expert bias"):
        subject.layer(tokens()[0], params_of(spec), spec)


def test_longcat_flash_fails_where_a_token_has_one_expert():
    spec = block_spec("longcat_flash")
    single = spec.replace(router=spec.router.replace(top_k=1))
    subject = transformers_subject("longcat_flash")
    with pytest.raises(ValueError, match="unpack"):
        subject.layer(tokens()[0], params_of(single), single)
    with pytest.raises(Unsupported, match="single expert"):
        subject.experts(tokens()[0], np.zeros(8, int), params_of(spec), spec)


# torchtitan


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def torchtitan(request):
    pytest.importorskip("torchtitan")
    from conformance.subjects.torchtitan import Torchtitan, TorchtitanFloat32

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


def test_what_each_subject_can_do(own, torchtitan):
    stages = {"experts", "layer", "layer_gradients"}
    assert capabilities(own) >= stages | {"permute", "combine"}
    assert capabilities(torchtitan) >= stages | {"combine"}
    assert capabilities(transformers_subject()) >= stages
