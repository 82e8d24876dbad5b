"""moe_torch, tests of dispatcher, experts and layer: each against moe_ref in float64, forward and backward."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from moe_ref.backward.layer import layer_backward
from moe_ref.layer import moe_layer
from moe_ref.specs.balance import CapacitySpec
from moe_ref.specs.inputs import RouterInputs
from moe_ref.specs.layer import ExpertSpec, LatentSpec, LayerSpec, SharedSpec
from moe_ref.specs.params import LayerParams
from moe_ref.specs.router import RouterSpec
from moe_torch import experts as experts_module
from moe_torch.moe import MoE

T, D, F = 23, 10, 6
# Sums of some tens of products, in another order than the reference's.
SAME: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
# Row errors relative to the row's norm: six roundings of at most half a unit, 2**-9 in bfloat16 and 2**-24 in float32,
# plus, in float32, sums of some tens of products (bfloat16 products are summed in float32).
ROW_BOUND = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-6}
# A gradient passes about as many roundings again; the error is relative to the whole tensor, where they average out.
GRADIENT_BOUND = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-6}

PLAIN = RouterSpec(num_experts=6, top_k=2)
SIGMOID = RouterSpec(num_experts=4, top_k=2, score_func="sigmoid", route_norm=True, route_scale=2.5)
NULL = RouterSpec(num_experts=3, top_k=3, num_null_experts=3)


def experts(**changes) -> ExpertSpec:
    return ExpertSpec(dim=D, hidden_dim=F, **changes)


LAYERS = {
    "plain": LayerSpec(router=PLAIN, experts=experts()),
    "gpt_oss": LayerSpec(
        router=RouterSpec(num_experts=6, top_k=3, score_over="selected", select_by="logit"),
        experts=experts(alpha=1.702, up_offset=1.0, clamp=0.7, bias=True),
        gate_bias=True,
    ),
    "deepseek_v3": LayerSpec(
        router=RouterSpec(
            num_experts=8, top_k=3, score_func="sigmoid", num_expert_groups=4, num_limited_groups=2, route_norm=True
        ),
        experts=experts(),
        shared=SharedSpec(hidden_dim=3),
    ),
    "llama4": LayerSpec(
        router=RouterSpec(num_experts=4, top_k=2, score_func="sigmoid", select_by="logit", weight_on="input"),
        experts=experts(bias=True),
        shared=SharedSpec(hidden_dim=F),
    ),
    "qwen2_moe": LayerSpec(router=SIGMOID, experts=experts(), shared=SharedSpec(hidden_dim=7, gate="sigmoid")),
    "cohere2_moe": LayerSpec(router=SIGMOID, experts=experts(), shared=SharedSpec(hidden_dim=7, combine="average")),
    "step3p7": LayerSpec(
        router=SIGMOID.replace(output_scale=3.0),
        experts=experts(clamp=0.2, clamp_at="after"),
        shared=SharedSpec(hidden_dim=F, clamp=0.1),
    ),
    "inkling": LayerSpec(
        router=SIGMOID.replace(num_scored_shared_experts=2, norm_with_shared=True, learned_scale="global"),
        experts=experts(),
        shared=SharedSpec(hidden_dim=3),
    ),
    "longcat_flash": LayerSpec(router=NULL, experts=experts()),
    "null_on_input": LayerSpec(router=NULL.replace(weight_on="input", output_scale=0.5), experts=experts()),
    "zaya": LayerSpec(router=NULL.replace(null_kind="skip", learned_scale="per_expert"), experts=experts()),
    "nemotron_h": LayerSpec(
        router=PLAIN,
        experts=experts(gated=False, activation="relu2", bias=True, clamp=0.5),
        shared=SharedSpec(hidden_dim=7),
    ),
    "gelu": LayerSpec(router=PLAIN, experts=experts(activation="gelu", clamp=0.3, clamp_at="after")),
    "gelu_tanh": LayerSpec(router=PLAIN, experts=experts(activation="gelu_tanh", bias=True)),
    "kimi_k3": LayerSpec(
        router=SIGMOID,
        experts=experts(activation="situ", beta=0.7, linear_beta=0.5),
        shared=SharedSpec(hidden_dim=7),
    ),
    "relu": LayerSpec(router=PLAIN, experts=experts(activation="relu", gated=False)),
    "moe_plus_plus": LayerSpec(
        router=SIGMOID.replace(num_null_experts=4, num_constant_experts=2, num_zero_experts=1), experts=experts()
    ),
    "constants_on_input": LayerSpec(
        router=NULL.replace(weight_on="input", num_constant_experts=NULL.num_null_experts), experts=experts()
    ),
    "latent": LayerSpec(router=PLAIN, experts=experts(bias=True), latent=LatentSpec(dim=3)),
    "latent_normed": LayerSpec(
        router=NULL.replace(weight_on="input"),
        experts=experts(),
        latent=LatentSpec(dim=7, norm_eps=0.1),
        shared=SharedSpec(hidden_dim=7),
    ),
    "every_expert": LayerSpec(router=RouterSpec(num_experts=4, top_k=4), experts=experts()),
    "one_of_many": LayerSpec(router=RouterSpec(num_experts=40, top_k=1), experts=experts()),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(num_tokens: int = T, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_tokens, D))


def rounded(values, dtype: torch.dtype) -> Any:
    """What is left of the numbers in a dtype, as float64."""
    return None if values is None else torch.tensor(values).to(dtype).double().numpy()


def layer(spec: LayerSpec, params: LayerParams, dtype: torch.dtype = torch.float64) -> MoE:
    moe = MoE(spec, dtype=dtype)
    moe.load_params(params)
    return moe


def gradients(moe: MoE) -> dict[str, np.ndarray]:
    """The gradients of a layer's parameters, under moe_ref's names and in its layout."""
    spec, S, dim = moe.spec, moe.spec.num_shared_experts, moe.spec.experts.dim
    up, gate = ("w3_EFD", "w1_EFD") if spec.experts.gated else ("w1_EFD", "")
    b_up, b_gate = ("b3_EF", "b1_EF") if spec.experts.gated else ("b1_EF", "")
    found = {
        "gate_ED": moe.router.gate.weight,
        "gate_bias_E": moe.router.gate.bias,
        "learned_scale": moe.router.learned_scale,
        "w_up_EDF": getattr(moe.experts, up),
        "w_gate_EDF": getattr(moe.experts, gate, None),
        "w_down_EFD": moe.experts.w2_EDF,
        "b_up_EF": getattr(moe.experts, b_up),
        "b_gate_EF": getattr(moe.experts, b_gate, None),
        "b_down_ED": moe.experts.b2_ED,
    }
    if moe.shared_experts is not None:
        shared = moe.shared_experts
        up_SFD, gate_SFD = (shared.w3, shared.w1) if shared.w3 is not None else (shared.w1, None)
        found["shared_w_up_SDF"] = up_SFD.weight
        found["shared_w_gate_SDF"] = None if gate_SFD is None else gate_SFD.weight
        found["shared_w_down_SFD"] = shared.w2.weight
        found["shared_token_gate_D"] = None if shared.token_gate is None else shared.token_gate.weight
    if moe.constant_experts is not None:
        found["constant_w_ZD2"], found["constant_ZD"] = moe.constant_experts.w_Z2D, moe.constant_experts.v_ZD
    if moe.latent is not None:
        found["latent_w_down_DH"], found["latent_w_up_HD"] = moe.latent.down.weight, moe.latent.up.weight
        found["latent_norm_H"] = None if moe.latent.norm is None else moe.latent.norm.weight
    numbers = {name: p.grad.double().numpy() for name, p in found.items() if p is not None and p.grad is not None}
    for name, value in numbers.items():
        if name == "shared_w_down_SFD":
            numbers[name] = value.T.reshape(S, -1, dim)
        elif name.startswith("shared_w"):
            numbers[name] = np.swapaxes(value.reshape(S, -1, dim), 1, 2)
        elif name.startswith(("w_", "latent_w", "constant_w")):
            numbers[name] = np.swapaxes(value, -1, -2)
        elif name == "shared_token_gate_D" or (name, spec.router.learned_scale) == ("learned_scale", "global"):
            numbers[name] = value[0]
    return numbers


def run(moe: MoE, x_TD, d_output_TD, **inputs):
    """Output, gradient of the tokens, and gradients of the parameters, as NumPy."""
    x = torch.tensor(x_TD, requires_grad=True)
    output = moe(x, **inputs)
    output.backward(torch.tensor(d_output_TD))
    assert x.grad is not None
    return output.detach().double().numpy(), x.grad.double().numpy(), gradients(moe)


def expect_same(found, expected, params_grad: LayerParams, **tolerance):
    """Output, token gradient and every parameter gradient agree, number by number."""
    output_TD, d_x_TD, grads = found
    np.testing.assert_allclose(output_TD, expected[0], **tolerance)
    np.testing.assert_allclose(d_x_TD, expected[1], **tolerance)
    names = {f.name for f in fields(LayerParams) if getattr(params_grad, f.name) is not None} - {"expert_bias_E"}
    assert grads.keys() == names
    for name in names:
        np.testing.assert_allclose(grads[name], getattr(params_grad, name), err_msg=name, **tolerance)


def judge(spec: LayerSpec, x_TD=None, **inputs) -> MoE:
    """The layer and its gradients are those of the reference."""
    x_TD = tokens() if x_TD is None else x_TD
    params, d_output_TD = LayerParams.init(spec, seed=2), tokens(len(x_TD), seed=3)
    if "token_mask" in inputs:
        d_output_TD[~inputs["token_mask"]] = np.nan  # nor is the gradient of a padding row read
    trace = moe_layer(x_TD, params, spec, **{f"{name}_T": value for name, value in inputs.items()})
    expected = layer_backward(trace, params, spec, d_output_TD)
    moe = layer(spec, params)
    found = run(moe, x_TD, d_output_TD, **{name: torch.tensor(value) for name, value in inputs.items()})
    expect_same(found, (trace.output_TD, expected.x_TD), expected.params, **SAME)
    return moe


def row_errors(found, expected) -> np.ndarray:
    """Each row's error relative to the row."""
    return np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_and_its_gradients_are_the_reference(name):
    judge(LAYERS[name])


@pytest.mark.parametrize("name", LAYERS)
def test_rows_that_are_dispatched_and_combined_give_the_same(name, monkeypatch):
    # The way of an accelerator and of expert parallelism; only the matmul behind it stays a loop.
    monkeypatch.setattr(experts_module, "moves_rows", lambda *_: True)
    judge(LAYERS[name])


@pytest.mark.parametrize("name", ["plain", "gpt_oss", "llama4", "longcat_flash"])
def test_work_in_small_pieces_gives_the_same(name, monkeypatch):
    monkeypatch.setattr(experts_module, "CHUNK_ROWS", 2)
    monkeypatch.setattr(experts_module, "CHUNK_TOKENS", 3)
    judge(LAYERS[name])


@pytest.mark.parametrize("num_tokens", [0, 1, 2])
@pytest.mark.parametrize("name", ["gpt_oss", "llama4", "inkling", "longcat_flash"])
def test_a_few_tokens_or_none_are_a_layer_too(name, num_tokens):
    judge(LAYERS[name], tokens(num_tokens))


@pytest.mark.parametrize("name", LAYERS)
def test_padding_tokens_are_not_read_whatever_they_hold(name):
    x_TD = tokens()
    mask_T = np.arange(T) % 3 != 1
    x_TD[~mask_T] = np.nan
    moe = judge(LAYERS[name], x_TD, token_mask=mask_T)
    assert moe.tokens_per_expert.sum() == mask_T.sum() * moe.spec.router.top_k


@pytest.mark.parametrize("dtype", ROW_BOUND, ids=str)
@pytest.mark.parametrize("grouped", [False, True], ids=["loop", "grouped_mm"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_row_is_within_the_bound_of_its_dtype(name, grouped, dtype, monkeypatch):
    if grouped:
        monkeypatch.setattr(experts_module, "way_of", lambda *_: "grouped_mm")
    # A stride of 16 bytes is what a grouped matmul asks for.
    spec = LAYERS[name].replace(experts=LAYERS[name].experts.replace(dim=16, hidden_dim=24))
    if spec.latent is not None:
        spec = spec.replace(latent=spec.latent.replace(dim=8))
    params = LayerParams.init(spec, seed=4)
    params = LayerParams(**{f.name: rounded(getattr(params, f.name), dtype) for f in fields(params)})
    rng = np.random.default_rng(5)
    x_TD, d_output_TD = (rounded(rng.standard_normal((T, 16)), dtype) for _ in range(2))
    trace = moe_layer(x_TD, params, spec)
    expected = layer_backward(trace, params, spec, d_output_TD)
    moe = layer(spec, params, dtype)
    x = torch.tensor(x_TD, dtype=dtype, requires_grad=True)
    output = moe(x)
    output.backward(torch.tensor(d_output_TD, dtype=dtype))
    assert x.grad is not None
    assert output.dtype == x.grad.dtype == dtype
    # A latent is rounded three times more: before the experts, as their sum, and after its norm.
    times = 1 if spec.latent is None else 1.5
    assert row_errors(output.detach().double().numpy(), trace.output_TD).max() < times * ROW_BOUND[dtype]
    # A clamp has a kink: a value that bfloat16 rounds to its other side has another slope, and rightly so.
    if dtype == torch.bfloat16 and spec.experts.clamp is not None:
        return
    found = {"x_TD": x.grad.double().numpy(), **gradients(moe)}
    for key, value in found.items():
        right = expected.x_TD if key == "x_TD" else getattr(expected.params, key)
        assert row_errors(value.ravel(), right.ravel()) < times * GRADIENT_BOUND[dtype], key


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("way", ["loop", "rows"])
def test_a_token_that_is_not_finite_reaches_no_other(bad, way, monkeypatch):
    monkeypatch.setattr(experts_module, "moves_rows", lambda *_: way == "rows")
    spec = LAYERS["deepseek_v3"]
    moe = layer(spec, LayerParams.init(spec, seed=2))
    clean = tokens()
    poisoned = clean.copy()
    poisoned[5] = bad
    others = np.arange(T) != 5
    d_output = tokens(seed=3)
    clean_output, clean_gradient, _ = run(moe, clean, d_output)
    output, gradient, _ = run(moe, poisoned, d_output)
    assert not np.isfinite(output[5]).all()
    np.testing.assert_allclose(output[others], clean_output[others], **SAME)
    np.testing.assert_allclose(gradient[others], clean_gradient[others], **SAME)


def test_frozen_experts_pass_gradients_and_take_none():
    spec = LAYERS["gpt_oss"]
    params = LayerParams.init(spec, seed=2)
    _, expected, _ = run(layer(spec, params), tokens(), tokens(seed=3))
    frozen = layer(spec, params)
    frozen.experts.requires_grad_(False)
    _, d_x_TD, grads = run(frozen, tokens(), tokens(seed=3))
    np.testing.assert_allclose(d_x_TD, expected, **SAME)
    assert all(parameter.grad is None for parameter in frozen.experts.parameters())
    assert "gate_ED" in grads


@pytest.mark.parametrize("name", ["gpt_oss", "llama4", "inkling", "longcat_flash"])
def test_a_compiled_layer_is_one_graph_and_gives_the_same(name):
    spec = LAYERS[name]
    params, d_output_TD = LayerParams.init(spec, seed=2), tokens(seed=3)
    eager, compiled = layer(spec, params), layer(spec, params)
    mask = torch.arange(T) % 5 != 0
    expected = run(eager, tokens(), d_output_TD, token_mask=mask)
    call = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    x = torch.tensor(tokens(), requires_grad=True)
    output = call(x, mask)
    output.backward(torch.tensor(d_output_TD))
    assert x.grad is not None
    np.testing.assert_allclose(output.detach().numpy(), expected[0], **SAME)
    np.testing.assert_allclose(x.grad.numpy(), expected[1], **SAME)
    for name_, value in gradients(compiled).items():
        np.testing.assert_allclose(value, expected[2][name_], err_msg=name_, **SAME)
    assert torch.equal(compiled.tokens_per_expert, eager.tokens_per_expert)


def test_only_training_counts_tokens():
    moe = layer(LAYERS["longcat_flash"], LayerParams.init(LAYERS["longcat_flash"]))
    x = torch.tensor(tokens())
    expected = torch.bincount(moe.router.route(x).expert_ids_TK.flatten(), minlength=6)
    moe(x)
    moe(x)
    moe.eval()(x)
    assert moe.tokens_per_expert.tolist() == (2 * expected).tolist()
    assert moe.to(torch.bfloat16).tokens_per_expert.dtype == torch.int64
    assert "tokens_per_expert" not in moe.state_dict()


@pytest.mark.parametrize("name", LAYERS)
def test_a_state_dict_carries_the_whole_layer(name):
    spec = LAYERS[name]
    first, second = layer(spec, LayerParams.init(spec, seed=2)), MoE(spec, dtype=torch.float64)
    second.load_state_dict(first.state_dict())
    x = torch.tensor(tokens()).view(T, 1, D)
    assert torch.equal(first(x), second(x))
    assert first(x).shape == (T, 1, D)


def test_loading_names_the_parameter_that_does_not_fit():
    moe = MoE(LAYERS["gpt_oss"])
    with pytest.raises(ValueError, match="b_up_EF"):
        moe.load_params(LayerParams.init(LAYERS["plain"].replace(gate_bias=True, router=LAYERS["gpt_oss"].router)))


def test_given_ids_are_replayed():
    spec = LayerSpec(router=RouterSpec(num_experts=4, top_k=2, selector="given"), experts=experts())
    params, given = LayerParams.init(spec, seed=2), np.array([[3, 1], [0, -1], [2, 3]])
    expected = moe_layer(tokens(3), params, spec, inputs=RouterInputs(given_ids_TK=given)).output_TD
    found = layer(spec, params)(torch.tensor(tokens(3)), inputs=RouterInputs(given_ids_TK=torch.tensor(given)))
    np.testing.assert_allclose(found.detach().numpy(), expected, **SAME)


def test_under_autocast_experts_compute_in_its_dtype():
    spec = LAYERS["deepseek_v3"]
    params, x_TD = LayerParams.init(spec, seed=2), tokens()
    moe = layer(spec, params, torch.float32)
    expected = moe_layer(x_TD, params, spec).output_TD
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = moe(torch.tensor(x_TD, dtype=torch.float32))
    errors = row_errors(output.detach().double().numpy(), expected)
    # Parameters and tokens are rounded as well: twice the bound of a layer that has them rounded.
    assert ROW_BOUND[torch.float32] < errors.max() < 2 * ROW_BOUND[torch.bfloat16]


@pytest.mark.parametrize(
    "fields", [{"top_k": 3, "num_null_experts": 2}, {"top_k": 4, "selector": "group_top_k", "quota_groups": 2}]
)
def test_batch_invariant_tokens_have_their_own_bits_and_the_layers_gradients(fields):
    router = RouterSpec(num_experts=8, score_func="sigmoid", route_norm=True, **fields)
    spec = LayerSpec(router=router, experts=ExpertSpec(dim=96, hidden_dim=130, bias=True))
    torch.manual_seed(0)
    moe, x = MoE(spec, batch_invariant=True), torch.randn(33, 96, requires_grad=True)
    output = moe(x)
    for rows in ([5], [32, 0, 7], range(32, -1, -1)):
        torch.testing.assert_close(moe(x[list(rows)]), output[list(rows)], rtol=0, atol=0)
    moe.tokens_per_expert.zero_()
    found = torch.autograd.grad(moe(x).square().sum(), [x, *moe.parameters()])
    counts_E, moe.batch_invariant = moe.tokens_per_expert.clone(), False
    moe.tokens_per_expert.zero_()
    wanted = torch.autograd.grad(moe(x).square().sum(), [x, *moe.parameters()])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(counts_E, moe.tokens_per_expert, rtol=0, atol=0)
    assert MoE(spec, batch_invariant=True)(x[:0]).shape == (0, 96)


@pytest.mark.parametrize(("router", "capacity"), [({"selector": "random"}, None), ({}, CapacitySpec(slots=1))])
def test_a_choice_that_depends_on_the_batch_is_not_batch_invariant(router, capacity):
    spec = LayerSpec(router=RouterSpec(num_experts=4, top_k=1, **router), experts=ExpertSpec(dim=8, hidden_dim=8))
    with pytest.raises(ValueError, match="batch_invariant"):
        MoE(spec, capacity=capacity, batch_invariant=True)(torch.zeros(2, 8))


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (torch.zeros(3, 7), None, r"x is torch\.float32\[3, 7\]; it is floats of shape \(\.\.\., 8\)"),
        (torch.zeros(3, 8, dtype=torch.int64), None, r"x is torch\.int64\[3, 8\]"),
        (torch.zeros(2, 3, 8), torch.ones(1, dtype=torch.bool), r"token_mask is torch\.bool\[1\]; .* of \[2, 3\]"),
        (torch.zeros(3, 8), torch.ones(3), r"token_mask is torch\.float32\[3\]"),
    ],
)
def test_tokens_and_masks_that_do_not_fit_are_errors_that_say_so(x, mask, message):
    spec = LayerSpec(router=RouterSpec(num_experts=4, top_k=1), experts=ExpertSpec(dim=8, hidden_dim=8))
    with pytest.raises(ValueError, match=message):
        MoE(spec)(x, mask)
