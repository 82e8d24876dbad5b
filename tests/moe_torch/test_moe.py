"""moe_torch, tests of dispatcher, experts and layer: each against moe_ref in float64, forward and backward."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from moe_ref.experts import feed_forward
from moe_ref.gradient import layer_backward
from moe_ref.layer import moe_layer
from moe_ref.permute import permute
from moe_ref.spec import ExpertSpec, LayerSpec, RouterSpec, SharedSpec
from moe_ref.weights import LayerParams
from moe_torch import experts as experts_module
from moe_torch import moe as moe_module
from moe_torch.dispatcher import LocalTokenDispatcher
from moe_torch.experts import Activation, GroupedExperts, expert_loop
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
    "relu": LayerSpec(router=PLAIN, experts=experts(activation="relu", gated=False)),
    "every_expert": LayerSpec(router=RouterSpec(num_experts=4, top_k=4), experts=experts()),
    "one_of_many": LayerSpec(router=RouterSpec(num_experts=40, top_k=1), experts=experts()),
}


def tokens(num_tokens: int = T, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_tokens, D))


def rounded(values, dtype: torch.dtype):
    """What is left of the numbers in a dtype, as float64."""
    return None if values is None else torch.tensor(values).to(dtype).double().numpy()


def layer(spec: LayerSpec, params: LayerParams, dtype: torch.dtype = torch.float64) -> MoE:
    moe = MoE(spec, dtype=dtype)
    moe.load(params)
    return moe


def gradients(moe: MoE) -> dict[str, np.ndarray]:
    """The gradients of a layer's parameters, under moe_ref's names and in its layout."""
    spec, S = moe.spec, moe.spec.num_shared_experts
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
    numbers = {name: p.grad.double().numpy() for name, p in found.items() if p is not None and p.grad is not None}
    for name, value in numbers.items():
        if name == "shared_w_down_SFD":
            numbers[name] = value.T.reshape(S, -1, D)
        elif name.startswith("shared_w"):
            numbers[name] = np.swapaxes(value.reshape(S, -1, D), 1, 2)
        elif name.startswith("w_"):
            numbers[name] = np.swapaxes(value, 1, 2)
        elif name == "learned_scale" and spec.router.learned_scale == "global":
            numbers[name] = value[0]
        elif name == "shared_token_gate_D":
            numbers[name] = value[0]
    return numbers


def run(moe: MoE, x_TD, d_output_TD, dtype=torch.float64, **inputs):
    """Output, gradient of the tokens, and gradients of the parameters, as NumPy."""
    x = torch.tensor(x_TD, dtype=dtype, requires_grad=True)
    output = moe(x, **inputs)
    output.backward(torch.tensor(d_output_TD, dtype=dtype))
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
    monkeypatch.setattr(moe_module, "uses_grouped_mm", lambda rows: True)
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
    for module in (moe_module, experts_module) if grouped else ():
        monkeypatch.setattr(module, "uses_grouped_mm", lambda rows: True)
    # A stride of 16 bytes is what a grouped matmul asks for.
    spec = LAYERS[name].replace(experts=LAYERS[name].experts.replace(dim=16, hidden_dim=24))
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
    assert row_errors(output.detach().double().numpy(), trace.output_TD).max() < ROW_BOUND[dtype]
    np.testing.assert_array_less(
        row_errors(x.grad.double().numpy().reshape(1, -1), expected.x_TD.reshape(1, -1)), GRADIENT_BOUND[dtype]
    )
    for parameter in moe.experts.parameters():
        assert parameter.grad is not None
    w2_grad = moe.experts.w2_EDF.grad
    assert w2_grad is not None
    w_down = np.swapaxes(expected.params.w_down_EFD, 1, 2).reshape(1, -1)
    assert row_errors(w2_grad.double().numpy().reshape(1, -1), w_down).max() < GRADIENT_BOUND[dtype]


def grouped_experts(num_experts: int, dtype=torch.float64, **changes) -> GroupedExperts:
    torch.manual_seed(0)
    return GroupedExperts(num_experts, experts(**changes), dtype=dtype)


@pytest.mark.parametrize("chosen", [0, 3, 4])
def test_all_tokens_to_one_expert_leave_the_others_a_gradient_of_exactly_zero(chosen):
    own, x = grouped_experts(5, bias=True), torch.tensor(tokens(700))
    ids = torch.full((700, 1), chosen)
    weights = torch.rand(700, 1, dtype=torch.float64, generator=torch.manual_seed(1))
    output = own.sum_of_slots(x, LocalTokenDispatcher(5).permute(ids), weights)
    output.sum().backward()
    params = LayerParams.init(LayerSpec(router=RouterSpec(num_experts=5, top_k=1), experts=experts(bias=True)))
    one = feed_forward(
        x.numpy(), params_of(own, params).expert(chosen), own.spec
    )
    np.testing.assert_allclose(output.detach().numpy(), one.output_RD * weights.numpy(), **SAME)
    for parameter in own.parameters():
        assert parameter.grad is not None
        by_expert = parameter.grad.flatten(1).abs().sum(1)
        assert by_expert[chosen] > 0
        assert by_expert.sum() == by_expert[chosen]


def params_of(own: GroupedExperts, params: LayerParams) -> LayerParams:
    """Parameters with the experts of a module."""
    numbers = {name: p.detach().numpy() for name, p in own.named_parameters()}
    changed = {f.name: getattr(params, f.name) for f in fields(params)} | {
        "w_gate_EDF": np.swapaxes(numbers["w1_EFD"], 1, 2),
        "w_up_EDF": np.swapaxes(numbers["w3_EFD"], 1, 2),
        "w_down_EFD": np.swapaxes(numbers["w2_EDF"], 1, 2),
        "b_gate_EF": numbers["b1_EF"],
        "b_up_EF": numbers["b3_EF"],
        "b_down_ED": numbers["b2_ED"],
    }
    return LayerParams(**changed)


def test_without_any_used_slot_output_and_gradients_are_zero():
    own, x = grouped_experts(3), torch.tensor(tokens(), requires_grad=True)
    weights = torch.ones(T, 2, dtype=torch.float64, requires_grad=True)
    permutation = LocalTokenDispatcher(3).permute(torch.full((T, 2), -1))
    output = own.sum_of_slots(x, permutation, weights)
    output.sum().backward()
    assert not output.any()
    for tensor in (x, weights, *own.parameters()):
        assert tensor.grad is not None
        assert not tensor.grad.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("way", ["loop", "rows"])
def test_a_token_that_is_not_finite_reaches_no_other(bad, way, monkeypatch):
    monkeypatch.setattr(moe_module, "uses_grouped_mm", lambda rows: way == "rows")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["loop", "rows"])
def test_the_number_of_an_expert_does_not_change_a_bit(way, dtype):
    # Slots are added in slot order; ascending expert ids would give other last bits.
    own = grouped_experts(8, dtype)
    x = torch.tensor(tokens(), dtype=dtype)
    generator = torch.manual_seed(3)
    ids, weights = torch.rand(T, 8, generator=generator).topk(5).indices, torch.rand(T, 5, generator=generator)
    new_id = torch.randperm(8, generator=generator)
    renumbered = grouped_experts(8, dtype)
    with torch.no_grad():
        for name, parameter in renumbered.named_parameters():
            parameter[new_id] = getattr(own, name)

    def output(which: GroupedExperts, expert_ids):
        dispatcher = LocalTokenDispatcher(8)
        permutation = dispatcher.permute(expert_ids)
        if way == "loop":
            return which.sum_of_slots(x, permutation, weights)
        rows = which(dispatcher.dispatch(x, permutation), permutation.tokens_per_expert_E)
        return dispatcher.combine(rows, permutation, weights)

    assert torch.equal(output(own, ids), output(renumbered, new_id[ids]))


class _Poison(torch.autograd.Function):
    """Rows past the last group are NaN, in the output and in the gradient: what a grouped matmul may leave there."""

    @staticmethod
    def forward(rows_ND, used: int):
        return torch.cat([rows_ND[:used], torch.full_like(rows_ND[used:], float("nan"))])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.used = inputs[1]

    @staticmethod
    def backward(ctx, *grads):
        return torch.cat([grads[0][: ctx.used], torch.full_like(grads[0][ctx.used :], float("nan"))]), None


@pytest.mark.parametrize("on_input", [False, True], ids=["weight_on_output", "weight_on_input"])
def test_rows_past_the_last_group_are_never_read(on_input):
    dispatcher = LocalTokenDispatcher(4, 6)
    ids = torch.tensor([[0, 5], [-1, -1], [3, 0], [4, 5], [2, -1]])
    x = torch.tensor(tokens(5), requires_grad=True)
    weights = torch.rand(5, 2, dtype=torch.float64, generator=torch.manual_seed(0)).requires_grad_()
    permutation = dispatcher.permute(ids)
    used = int(permutation.tokens_per_expert_E[:4].sum())
    assert used == 4
    rows = _Poison.apply(dispatcher.dispatch(x, permutation, weights if on_input else None), used)
    output = dispatcher.combine(rows, permutation, None if on_input else weights)
    output.sum().backward()
    factor = torch.where((ids >= 0) & (ids < 4), weights, 0)
    torch.testing.assert_close(output, factor.sum(1, keepdim=True) * x)
    assert x.grad is not None
    assert weights.grad is not None
    torch.testing.assert_close(x.grad, factor.sum(1, keepdim=True).expand(5, D))
    torch.testing.assert_close(weights.grad, torch.where((ids >= 0) & (ids < 4), x.sum(1, keepdim=True), 0))


def test_rows_are_sorted_by_expert_and_stay_in_token_order():
    ids = np.array([[2, 0], [-1, 1], [0, 4], [3, 2], [1, 0]])
    found, expected = LocalTokenDispatcher(4, 5).permute(torch.tensor(ids)), permute(ids, 4)
    used = len(expected.order_N)
    assert found.order_N[:used].tolist() == expected.order_N.tolist()
    assert found.tokens_per_expert_E.tolist() == [*expected.tokens_per_expert_E, 1]
    assert found.row_of_slot_N[found.order_N].tolist() == list(range(10))


@pytest.mark.parametrize(("experts_", "choices", "field"), [(0, None, "num_experts"), (4, 3, "num_choices")])
def test_a_dispatcher_names_the_field_that_is_wrong(experts_, choices, field):
    with pytest.raises(ValueError, match=field):
        LocalTokenDispatcher(experts_, choices)


def test_experts_name_the_field_that_is_wrong():
    with pytest.raises(ValueError, match="num_experts is 0"):
        GroupedExperts(0, experts())


def test_the_operator_keeps_the_contract_of_its_registration():
    own = grouped_experts(3, bias=True)
    permutation = LocalTokenDispatcher(3).permute(torch.tensor([[0, 2], [2, -1], [0, 1]]))
    x = torch.tensor(tokens(3), requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64).requires_grad_()
    parameters = (own.w1_EFD, own.w2_EDF, own.w3_EFD, own.b1_EF, own.b2_ED, own.b3_EF)
    counts = permutation.tokens_per_expert_E
    args = (x, permutation.order_N, counts, weights, 2, *parameters, *Activation.of(own.spec), True)
    torch.library.opcheck(expert_loop, args)


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
        moe.load(LayerParams.init(LAYERS["plain"].replace(gate_bias=True, router=LAYERS["gpt_oss"].router)))


def test_given_ids_are_replayed():
    spec = LayerSpec(router=RouterSpec(num_experts=4, top_k=2, selector="given"), experts=experts())
    params, given = LayerParams.init(spec, seed=2), np.array([[3, 1], [0, -1], [2, 3]])
    expected = moe_layer(tokens(3), params, spec, given_ids_TK=given).output_TD
    found = layer(spec, params)(torch.tensor(tokens(3)), given_ids_TK=torch.tensor(given))
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
