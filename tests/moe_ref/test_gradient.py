"""moe_ref, tests of the gradients of experts, combine and the whole layer, against the forward pass in float64."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from derivatives import (
    BOUND,
    COMPLEX_BOUND,
    ROUTERS,
    D,
    E,
    F,
    T,
    assert_close,
    complex_gradient,
    difference,
    router,
    router_inputs,
    slope_along,
)

from moe_ref.backward.layer import (
    combine_backward,
    feed_forward_backward,
    fill_slots_backward,
    layer_backward,
    weigh_inputs_backward,
)
from moe_ref.experts import combine, feed_forward, fill_slots, weigh_inputs
from moe_ref.layer import moe_layer
from moe_ref.permute import permute
from moe_ref.specs.layer import ExpertSpec, LatentSpec, LayerSpec, SharedSpec
from moe_ref.specs.params import FeedForward, LayerParams
from moe_ref.specs.router import RouterSpec

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
EXPERTS: dict[str, dict[str, Any]] = {name: {"activation": name} for name in ACTIVATIONS}
EXPERTS |= {f"{name}_not_gated": {"activation": name, "gated": False, "bias": True} for name in ACTIVATIONS}
for name in ACTIVATIONS:
    EXPERTS[f"{name}_clamp_before"] = {"activation": name, "clamp": 0.6, "up_offset": 1.0, "bias": True}
    EXPERTS[f"{name}_clamp_after"] = {"activation": name, "clamp": 0.6, "clamp_at": "after"}
EXPERTS |= {
    "gpt_oss": {"alpha": 1.702, "up_offset": 1.0, "clamp": 0.7, "bias": True},
    "alpha_not_gated": {"alpha": 1.702, "gated": False, "clamp": 0.4, "clamp_at": "after"},
}


@pytest.mark.parametrize("name", EXPERTS)
def test_the_gradient_of_an_expert_is_its_derivative(name):
    spec = ExpertSpec(dim=D, hidden_dim=F, **EXPERTS[name])
    rng = np.random.default_rng(4)
    x_RD, d_output_RD = rng.standard_normal((2, 3, D))
    shapes = {"w_up_DF": (D, F), "w_down_FD": (F, D)} | ({"w_gate_DF": (D, F)} if spec.gated else {})
    if spec.bias:
        shapes |= {"b_up_F": (F,), "b_down_D": (D,)} | ({"b_gate_F": (F,)} if spec.gated else {})
    weights = FeedForward(**{name: rng.standard_normal(shape) for name, shape in shapes.items()})

    def value(rows_RD, moved_weights):
        return (feed_forward(rows_RD, moved_weights, spec).output_RD * d_output_RD).sum()

    # sigmoid and erf run on real numbers alone.
    on_complex = spec.activation not in ("silu", "gelu")
    derivative, bound = (complex_gradient, COMPLEX_BOUND) if on_complex else (difference, BOUND)
    d_x_RD, grads = feed_forward_backward(d_output_RD, feed_forward(x_RD, weights, spec), weights, spec)
    assert_close(d_x_RD, derivative(lambda rows: value(rows, weights), x_RD), bound)
    for field in fields(FeedForward):
        grad = getattr(grads, field.name)
        if field.name not in shapes:
            assert grad is None
            continue
        at = lambda moved, name=field.name: value(x_RD, replace(weights, **{name: moved}))  # noqa: E731
        assert_close(grad, derivative(at, getattr(weights, field.name)), bound)


def test_relu_has_slope_0_at_0_and_a_clamp_passes_the_gradient_at_its_limit():
    one = np.ones((1, 1))

    def slopes(gate_value, up_value, **changes):
        spec = ExpertSpec(dim=1, hidden_dim=1, **changes)
        weights = FeedForward(w_gate_DF=gate_value * one, w_up_DF=up_value * one, w_down_FD=one)
        _, grads = feed_forward_backward(one, feed_forward(one, weights, spec), weights, spec)
        assert grads.w_gate_DF is not None
        return grads.w_gate_DF.item(), grads.w_up_DF.item()

    assert slopes(0.0, 3.0, activation="relu") == (0, 0)
    assert slopes(2.0, 2.0, activation="relu", clamp=2.0) == (2, 2)
    assert slopes(2.0, -2.0, activation="relu", clamp=2.0) == (-2, 2)
    assert slopes(np.nextafter(2.0, 3), np.nextafter(-2.0, -3), activation="relu", clamp=2.0) == (0, 0)
    assert slopes(2.0, 1.0, activation="relu", clamp=2.0, clamp_at="after") == (1, 2)
    assert slopes(np.nextafter(2.0, 3), 1.0, activation="relu", clamp=2.0, clamp_at="after") == (0, 2)


# the stages between

SLOT_ROUTERS = {
    "output": RouterSpec(num_experts=3, top_k=2, num_null_experts=2, output_scale=1.5),
    "input": RouterSpec(num_experts=3, top_k=2, num_null_experts=2, weight_on="input"),
    "skip": RouterSpec(num_experts=3, top_k=2, num_null_experts=2, null_kind="skip"),
}


@pytest.mark.parametrize("name", SLOT_ROUTERS)
def test_the_stages_around_the_experts_have_their_complex_derivatives(name):
    spec = SLOT_ROUTERS[name]
    rng = np.random.default_rng(2)
    ids_TK = np.array([[0, 4], [2, -1], [3, 1], [0, 2]])
    order_N = permute(ids_TK, 3).order_N
    x_TD, d_TD = rng.standard_normal((2, 4, D))
    weights_TK = rng.uniform(0.1, 1, (4, 2))
    slots_TKD, d_TKD = rng.standard_normal((2, 4, 2, D))
    rows_ND = rng.standard_normal((len(order_N), D))

    d_slots_TKD, d_weights_TK = combine_backward(d_TD, slots_TKD, weights_TK, spec)
    assert_close(
        d_slots_TKD, complex_gradient(lambda s: (combine(s, weights_TK, spec) * d_TD).sum(), slots_TKD), COMPLEX_BOUND
    )
    assert_close(d_weights_TK, complex_gradient(
        lambda w: (combine(slots_TKD.astype(complex), w, spec) * d_TD).sum(), weights_TK), COMPLEX_BOUND)  # fmt: skip

    d_rows_ND, d_passed_TKD = fill_slots_backward(d_TKD, order_N, ids_TK, spec)
    filled = lambda rows, inputs: (fill_slots(rows, order_N, inputs, ids_TK, spec) * d_TKD).sum()  # noqa: E731
    assert_close(d_rows_ND, complex_gradient(lambda rows: filled(rows, slots_TKD), rows_ND), COMPLEX_BOUND)
    assert_close(d_passed_TKD, complex_gradient(lambda inputs: filled(rows_ND, inputs), slots_TKD), COMPLEX_BOUND)

    d_x_TD, d_weights_TK = weigh_inputs_backward(d_TKD, x_TD, weights_TK, spec)
    weighed = lambda x, w: (weigh_inputs(x, w, spec) * d_TKD).sum()  # noqa: E731
    assert_close(d_x_TD, complex_gradient(lambda x: weighed(x, weights_TK), x_TD), COMPLEX_BOUND)
    assert_close(d_weights_TK, complex_gradient(lambda w: weighed(x_TD.astype(complex), w), weights_TK), COMPLEX_BOUND)


# the layer

SHARED = SharedSpec(hidden_dim=3)
LAYERS = {name: (name, {}, None) for name in ROUTERS if "shared" not in name and name != "inkling"}
LAYERS |= {
    "scored_shared": ("scored_shared", {}, SHARED),
    "inkling": ("inkling", {}, SHARED),
    "inkling_average": ("inkling", {}, SharedSpec(hidden_dim=3, combine="average")),
    "gpt_oss": ("selected", {"alpha": 1.702, "up_offset": 1.0, "clamp": 0.7, "bias": True}, None),
    "deepseek_v3": ("groups", {}, SHARED),
    "step3p7": ("sigmoid_norm", {"clamp": 0.2, "clamp_at": "after"}, SharedSpec(hidden_dim=3, clamp=0.1)),
    "qwen2_moe": ("softmax", {}, SharedSpec(hidden_dim=6, gate="sigmoid")),
    "cohere2_moe": ("selected", {}, SharedSpec(hidden_dim=6, gate="sigmoid", combine="average")),
    "llama4": ("by_logit", {"bias": True}, SHARED),
    "nemotron_h": ("sigmoid_norm", {"gated": False, "activation": "relu2"}, SHARED),
    "latent": ("sigmoid_norm", {"bias": True}, SHARED),
    "latent_normed": ("softmax", {}, SharedSpec(hidden_dim=6, gate="sigmoid")),
    "latent_normed_null": ("null_kinds", {}, None),
    "latent_normed_on_input": ("by_logit", {"bias": True}, None),
}


def layer_case(name):
    router_name, experts, shared = LAYERS[name]
    latent = LatentSpec(dim=3, norm_eps=0.3 if "normed" in name else None) if "latent" in name else None
    spec = LayerSpec(
        router=router(router_name),
        experts=ExpertSpec(dim=D, hidden_dim=F, **experts),
        shared=shared,
        gate_bias=True,
        latent=latent,
    )
    inputs = router_inputs(spec.router)
    params = replace(LayerParams.init(spec, seed=7), expert_bias_E=inputs.pop("expert_bias_E", None))
    inputs.pop("learned_scale", None)
    x_TD, d_output_TD = np.random.default_rng(1).standard_normal((2, T, D))
    return spec, params, x_TD, d_output_TD, inputs


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_of_a_layer_is_its_difference_quotient(name, masked):
    spec, params, x_TD, d_output_TD, inputs = layer_case(name)
    inputs["token_mask_T"] = np.arange(T) % 3 != 1 if masked else None
    trace = moe_layer(x_TD, params, spec, **inputs)
    grads = layer_backward(trace, params, spec, d_output_TD)

    def value(moved_x_TD, moved_params):
        moved = moe_layer(moved_x_TD, moved_params, spec, **inputs)
        np.testing.assert_array_equal(moved.routing.expert_ids_TK, trace.routing.expert_ids_TK)
        return (moved.output_TD * d_output_TD).sum()

    assert_close(grads.x_TD, difference(lambda moved: value(moved, params), x_TD))
    rng = np.random.default_rng(9)
    for field in fields(LayerParams):
        param, grad = getattr(params, field.name), getattr(grads.params, field.name)
        assert (grad is None) == (param is None)
        if param is None:
            continue
        assert grad.shape == param.shape
        for _ in range(2):
            direction = rng.standard_normal(param.shape)
            along = lambda moved, name=field.name: value(x_TD, replace(params, **{name: moved}))  # noqa: E731
            expected = slope_along(along, param, direction)
            assert (grad * direction).sum() == pytest.approx(expected, abs=BOUND * max(1, np.abs(grad).max()))


@pytest.mark.parametrize("name", ["softmax", "deepseek_v3", "inkling"])
def test_the_gradient_of_expert_bias_is_exactly_0(name):
    spec, params, x_TD, d_output_TD, inputs = layer_case(name)
    grads = layer_backward(moe_layer(x_TD, params, spec, **inputs), params, spec, d_output_TD)
    assert params.expert_bias_E is not None
    np.testing.assert_array_equal(grads.params.expert_bias_E, np.zeros_like(params.expert_bias_E))


def test_an_expert_without_tokens_gets_gradients_of_exactly_0():
    spec, params, x_TD, d_output_TD, _ = layer_case("gpt_oss")
    trace = moe_layer(x_TD, replace(params, expert_bias_E=np.array([9.0, 9, 9, 0, 0, 0, 0, 0])), spec)
    grads = layer_backward(trace, params, spec, d_output_TD).params
    assert trace.permutation.tokens_per_expert_E.tolist() == [T, T, T, 0, 0, 0, 0, 0]
    for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD", "b_gate_EF", "b_up_EF", "b_down_ED"):
        grad = getattr(grads, name)
        assert (grad[3:] == 0).all()
        assert (np.abs(grad[:3]).reshape(3, -1).max(axis=1) > 0).all()


@pytest.mark.parametrize("name", LAYERS)
def test_no_tokens_give_gradients_of_0(name):
    spec, params, _, _, inputs = layer_case(name)
    inputs["inputs"] = inputs["inputs"].tokens(slice(0))
    grads = layer_backward(moe_layer(np.zeros((0, D)), params, spec, **inputs), params, spec, np.zeros((0, D)))
    assert grads.x_TD.shape == (0, D)
    for field in fields(LayerParams):
        param, grad = getattr(params, field.name), getattr(grads.params, field.name)
        assert (grad is None) == (param is None)
        assert param is None or (grad == np.zeros_like(param)).all()


@pytest.mark.parametrize("name", ["softmax", "gpt_oss", "qwen2_moe", "inkling", "llama4", "null"])
def test_a_padding_token_takes_no_part_in_any_gradient(name):
    spec, params, x_TD, d_output_TD, _ = layer_case(name)
    mask_T = np.array([True, False, True, True, False, True])
    poisoned_x_TD, poisoned_d_TD = x_TD.copy(), d_output_TD.copy()
    poisoned_x_TD[~mask_T] = poisoned_d_TD[~mask_T] = np.nan
    found = layer_backward(moe_layer(poisoned_x_TD, params, spec, token_mask_T=mask_T), params, spec, poisoned_d_TD)
    alone = layer_backward(moe_layer(x_TD[mask_T], params, spec), params, spec, d_output_TD[mask_T])
    assert (found.x_TD[~mask_T] == 0).all()
    assert_close(found.x_TD[mask_T], alone.x_TD, COMPLEX_BOUND)
    for field in fields(LayerParams):
        if getattr(params, field.name) is not None:
            assert_close(getattr(found.params, field.name), getattr(alone.params, field.name), COMPLEX_BOUND)


def test_a_gate_bias_of_minus_inf_leaves_every_gradient_finite():
    spec, params, x_TD, d_output_TD, _ = layer_case("softmax")
    assert params.gate_bias_E is not None
    never = replace(params, gate_bias_E=np.where(np.arange(E) == 2, -np.inf, params.gate_bias_E))
    grads = layer_backward(moe_layer(x_TD, never, spec), never, spec, d_output_TD)
    assert (grads.logits_TE[:, 2] == 0).all()
    assert (grads.params.gate_ED[2] == 0).all()
    assert np.isfinite(grads.x_TD).all()


def test_the_gradient_keeps_the_dtype_of_the_trace():
    spec, params, x_TD, d_output_TD, _ = layer_case("gpt_oss")
    grads = layer_backward(moe_layer(x_TD, params, spec, dtype=np.float32), params, spec, d_output_TD)
    exact = layer_backward(moe_layer(x_TD, params, spec), params, spec, d_output_TD)
    assert grads.x_TD.dtype == grads.params.w_up_EDF.dtype == grads.params.gate_ED.dtype == np.float32
    # float32 holds 24 bits; some tens of products and a softmax stay within 1e-5 of the largest entry.
    assert_close(grads.x_TD, exact.x_TD, 1e-5)
