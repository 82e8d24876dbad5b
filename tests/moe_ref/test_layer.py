"""moe_ref, tests of the layer: every stage against arithmetic written out here, one token and one slot at a time."""

import json
import math
from typing import Any

import numpy as np
import pytest

from moe_ref.experts import activation, feed_forward, hide, run_experts
from moe_ref.layer import moe_layer
from moe_ref.permute import dispatch, permute, unpermute
from moe_ref.routing import gate, route
from moe_ref.specs.inputs import RouterInputs
from moe_ref.specs.layer import ExpertSpec, LayerSpec, SharedSpec
from moe_ref.specs.params import LayerParams
from moe_ref.specs.router import RouterSpec

T, D, F = 7, 5, 4
# Sums of some tens of float64 products, in another order than the reference's.
SAME: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-13}

GPT_OSS: dict[str, Any] = {"alpha": 1.702, "up_offset": 1.0, "clamp": 0.7, "bias": True}

LAYERS = {
    "plain": LayerSpec(router=RouterSpec(num_experts=6, top_k=2), experts=ExpertSpec(dim=D, hidden_dim=F)),
    "gpt_oss": LayerSpec(
        router=RouterSpec(num_experts=6, top_k=3, score_over="selected", select_by="logit"),
        experts=ExpertSpec(dim=D, hidden_dim=F, **GPT_OSS),
        gate_bias=True,
    ),
    "deepseek_v3": LayerSpec(
        router=RouterSpec(
            num_experts=8, top_k=3, score_func="sigmoid", num_expert_groups=4, num_limited_groups=2,
            route_norm=True, norm_eps=1e-20, route_scale=2.5,
        ),
        experts=ExpertSpec(dim=D, hidden_dim=F),
        shared=SharedSpec(hidden_dim=3),
    ),
    "llama4": LayerSpec(
        router=RouterSpec(num_experts=4, top_k=2, score_func="sigmoid", select_by="logit", weight_on="input"),
        experts=ExpertSpec(dim=D, hidden_dim=F),
        shared=SharedSpec(hidden_dim=F),
    ),
    "qwen2_moe": LayerSpec(
        router=RouterSpec(num_experts=4, top_k=2),
        experts=ExpertSpec(dim=D, hidden_dim=F),
        shared=SharedSpec(hidden_dim=6, gate="sigmoid"),
    ),
    "cohere2_moe": LayerSpec(
        router=RouterSpec(num_experts=4, top_k=2, score_over="selected", select_by="logit"),
        experts=ExpertSpec(dim=D, hidden_dim=F),
        shared=SharedSpec(hidden_dim=6, combine="average"),
    ),
    "step3p7": LayerSpec(
        router=RouterSpec(num_experts=4, top_k=2, score_func="sigmoid", route_norm=True, output_scale=3.0),
        experts=ExpertSpec(dim=D, hidden_dim=F, clamp=0.2, clamp_at="after"),
        shared=SharedSpec(hidden_dim=F, clamp=0.1),
    ),
    "inkling": LayerSpec(
        router=RouterSpec(
            num_experts=4, top_k=2, score_func="sigmoid", route_norm=True, norm_with_shared=True,
            num_scored_shared_experts=2, learned_scale="global", route_scale=8.0,
        ),
        experts=ExpertSpec(dim=D, hidden_dim=F),
        shared=SharedSpec(hidden_dim=3),
    ),
    "longcat_flash": LayerSpec(
        router=RouterSpec(num_experts=3, top_k=3, num_null_experts=3), experts=ExpertSpec(dim=D, hidden_dim=F)
    ),
    "null_input": LayerSpec(
        router=RouterSpec(num_experts=3, top_k=3, num_null_experts=3, weight_on="input"),
        experts=ExpertSpec(dim=D, hidden_dim=F),
    ),
    "moe_plus_plus": LayerSpec(
        router=RouterSpec(
            num_experts=3, top_k=3, route_norm=True, num_null_experts=4, num_constant_experts=2, num_zero_experts=1
        ),
        experts=ExpertSpec(dim=D, hidden_dim=F),
    ),
    "constants_on_input": LayerSpec(
        router=RouterSpec(num_experts=3, top_k=3, num_null_experts=2, num_constant_experts=2, weight_on="input"),
        experts=ExpertSpec(dim=D, hidden_dim=F),
    ),
    "zaya": LayerSpec(
        router=RouterSpec(num_experts=3, top_k=3, num_null_experts=3, null_kind="skip"),
        experts=ExpertSpec(dim=D, hidden_dim=F),
    ),
    "nemotron_h": LayerSpec(
        router=RouterSpec(num_experts=6, top_k=2),
        experts=ExpertSpec(dim=D, hidden_dim=F, gated=False, activation="relu2", bias=True, clamp=1.0),
        shared=SharedSpec(hidden_dim=6),
    ),
    "gelu": LayerSpec(
        router=RouterSpec(num_experts=6, top_k=2, learned_scale="per_expert"),
        experts=ExpertSpec(dim=D, hidden_dim=F, activation="gelu"),
    ),
    "gelu_tanh": LayerSpec(
        router=RouterSpec(num_experts=6, top_k=2), experts=ExpertSpec(dim=D, hidden_dim=F, activation="gelu_tanh")
    ),
    "relu": LayerSpec(
        router=RouterSpec(num_experts=6, top_k=2), experts=ExpertSpec(dim=D, hidden_dim=F, activation="relu")
    ),
}  # fmt: skip


def tokens(seed=1, num_tokens=T):
    return np.random.default_rng(seed).standard_normal((num_tokens, D))


def logistic(z):
    return 1 / (1 + math.exp(-z))


ACTIVATIONS = {
    "silu": lambda z, alpha: z * logistic(alpha * z),
    "gelu": lambda z, _: z * (1 + math.erf(z / math.sqrt(2))) / 2,
    "gelu_tanh": lambda z, _: z / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "relu": lambda z, _: z if z > 0 else 0.0,
    "relu2": lambda z, _: z * z if z > 0 else 0.0,
}


def plain_expert(x_D, w, spec):
    """One expert on one token, number by number."""
    limit = math.inf if spec.clamp is None else spec.clamp
    hidden = []
    for f in range(w.w_up_DF.shape[1]):
        up = sum(x_D[d] * w.w_up_DF[d, f] for d in range(D)) + (0 if w.b_up_F is None else w.b_up_F[f])
        z = up
        if spec.gated:
            z = sum(x_D[d] * w.w_gate_DF[d, f] for d in range(D)) + (0 if w.b_gate_F is None else w.b_gate_F[f])
        if spec.clamp_at == "before":
            act = ACTIVATIONS[spec.activation](min(z, limit), spec.alpha)
        else:
            act = min(ACTIVATIONS[spec.activation](z, spec.alpha), limit)
        hidden.append(act * (max(min(up, limit), -limit) + spec.up_offset) if spec.gated else act)
    bias_D = np.zeros(D) if w.b_down_D is None else w.b_down_D
    return bias_D + sum(hidden[f] * w.w_down_FD[f] for f in range(len(hidden)))


def plain_layer(x_TD, params, spec):
    """The layer, token by token and slot by slot, without permuting anything."""
    routing = route(
        gate(x_TD, params.gate_ED, params.gate_bias_E), spec.router,
        expert_bias_E=params.expert_bias_E, learned_scale=params.learned_scale,
    )  # fmt: skip
    output_TD = np.zeros_like(x_TD)
    for t, x_D in enumerate(x_TD):
        routed_D = np.zeros(D)
        for expert_id, weight in zip(routing.expert_ids_TK[t], routing.weights_TK[t], strict=True):
            z = expert_id - spec.router.num_experts
            if 0 <= z < spec.router.num_constant_experts:
                on_input = spec.router.weight_on == "input"
                seen_D = weight * x_D if on_input else x_D
                a1, a2 = (math.exp(seen_D @ params.constant_w_ZD2[z, :, i]) for i in range(2))
                mixed_D = (a1 * seen_D + a2 * params.constant_ZD[z]) / (a1 + a2)
                routed_D += mixed_D if on_input else weight * mixed_D
            elif z >= spec.router.num_null_experts - spec.router.num_zero_experts:
                assert weight == 0
            elif z >= 0:
                routed_D += weight * x_D if spec.router.null_kind == "identity" else 0
            elif spec.router.weight_on == "input":
                routed_D += plain_expert(weight * x_D, params.expert(expert_id), spec.experts)
            else:
                routed_D += weight * plain_expert(x_D, params.expert(expert_id), spec.experts)
        output_TD[t] = routed_D * spec.router.output_scale
        if spec.shared is None:
            continue
        for s in range(spec.num_shared_experts):
            factor = 1.0
            if routing.shared_weights_TS is not None:
                factor = routing.shared_weights_TS[t, s]
            if spec.shared.gate == "sigmoid":
                factor = logistic(x_D @ params.shared_token_gate_D)
            output_TD[t] += factor * plain_expert(x_D, params.shared_expert(s), spec.shared_experts)
        if spec.shared.combine == "average":
            output_TD[t] /= 2
    return output_TD


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_is_the_weighted_sum_of_each_tokens_experts(name):
    spec = LAYERS[name]
    params = LayerParams.init(spec, seed=3)
    trace = moe_layer(tokens(), params, spec)
    np.testing.assert_allclose(trace.output_TD, plain_layer(tokens(), params, spec), **SAME)


@pytest.mark.parametrize("name", LAYERS)
def test_a_padding_token_gets_0_and_changes_no_other_token(name):
    spec = LAYERS[name]
    params = LayerParams.init(spec, seed=3)
    mask_T = np.array([True, False, True, True, False, True, False])
    x_TD = tokens()
    x_TD[~mask_T] = np.nan
    x_TD[4] = np.inf
    trace = moe_layer(x_TD, params, spec, token_mask_T=mask_T)
    assert (trace.output_TD[~mask_T] == 0).all()
    assert (trace.shared_TD[~mask_T] == 0).all()
    assert (trace.shared_factors_TS[~mask_T] == 0).all()
    np.testing.assert_allclose(trace.output_TD[mask_T], moe_layer(x_TD[mask_T], params, spec).output_TD, **SAME)


@pytest.mark.parametrize("name", LAYERS)
def test_no_tokens_give_an_empty_output(name):
    spec = LAYERS[name]
    trace = moe_layer(np.zeros((0, D)), LayerParams.init(spec), spec)
    assert trace.output_TD.shape == (0, D)
    assert trace.slot_outputs_TKD.shape == (0, spec.router.top_k, D)
    assert trace.permutation.tokens_per_expert_E.tolist() == [0] * spec.router.num_experts


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_computes_in_the_dtype_that_is_asked_for(name):
    spec = LAYERS[name]
    trace = moe_layer(tokens(), LayerParams.init(spec), spec, dtype=np.float32)
    for value in (trace.experts.hidden_RF, trace.slot_outputs_TKD, trace.shared_TD, trace.output_TD):
        assert value.dtype == np.float32


def test_an_unused_slot_adds_nothing_and_takes_no_row():
    spec = LayerSpec(
        router=RouterSpec(num_experts=4, top_k=2, selector="given"), experts=ExpertSpec(dim=D, hidden_dim=F, bias=True)
    )
    params = LayerParams.init(spec)
    ids_TK = np.array([[2, -1], [-1, -1], [-1, 0]])
    trace = moe_layer(tokens(num_tokens=3), params, spec, inputs=RouterInputs(given_ids_TK=ids_TK))
    assert trace.permutation.order_N.tolist() == [5, 0]
    assert (trace.output_TD[1] == 0).all()
    expected_D = trace.routing.weights_TK[0, 0] * plain_expert(tokens(num_tokens=3)[0], params.expert(2), spec.experts)
    np.testing.assert_allclose(trace.output_TD[0], expected_D, **SAME)


def test_an_expert_whose_gate_bias_is_minus_inf_gets_no_row():
    spec = LAYERS["plain"].replace(gate_bias=True)
    params = LayerParams.init(spec)
    assert params.gate_bias_E is not None
    params.gate_bias_E[1] = -np.inf
    trace = moe_layer(tokens(), params, spec)
    assert trace.permutation.tokens_per_expert_E[1] == 0
    assert np.isfinite(trace.output_TD).all()


def test_a_table_routes_by_token_id():
    spec = LayerSpec(
        router=RouterSpec(num_experts=4, top_k=2, selector="table"), experts=ExpertSpec(dim=D, hidden_dim=F)
    )
    table_VK = np.array([[0, 1], [3, 2]])
    token_ids_T = np.array([1, 0, 1, 1, 0, 0, 1])
    inputs = RouterInputs(token_ids_T=token_ids_T, table_VK=table_VK)
    trace = moe_layer(tokens(), LayerParams.init(spec), spec, inputs=inputs)
    np.testing.assert_array_equal(trace.routing.expert_ids_TK, table_VK[token_ids_T])


def test_a_skipped_choice_has_an_output_of_0_and_an_identity_choice_its_input():
    for name in ("zaya", "longcat_flash", "null_input"):
        spec = LAYERS[name]
        trace = moe_layer(tokens(), LayerParams.init(spec, seed=3), spec)
        null_TK = trace.routing.expert_ids_TK >= spec.router.num_experts
        assert null_TK.any()
        expected_TKD = trace.slot_inputs_TKD if spec.router.null_kind == "identity" else 0 * trace.slot_inputs_TKD
        np.testing.assert_array_equal(trace.slot_outputs_TKD[null_TK], expected_TKD[null_TK])


# permute


def test_rows_are_sorted_by_expert_and_then_by_token():
    permutation = permute(np.array([[2, 0], [0, 2], [5, -1], [1, 0]]), 4)
    assert permutation.order_N.tolist() == [1, 2, 7, 6, 0, 3]
    assert permutation.token_of_row_N.tolist() == [0, 1, 3, 3, 0, 1]
    assert permutation.slot_of_row_N.tolist() == [1, 0, 1, 0, 0, 1]
    assert permutation.expert_of_row_N.tolist() == [0, 0, 0, 1, 2, 2]
    assert permutation.tokens_per_expert_E.tolist() == [3, 1, 2, 0]


def test_unpermute_undoes_dispatch_and_leaves_0_elsewhere():
    ids_TK = np.array([[2, 0], [0, 2], [5, -1], [1, 0]])
    slots_TKD = np.random.default_rng(0).standard_normal((4, 2, 3))
    order_N = permute(ids_TK, 4).order_N
    back_TKD = unpermute(dispatch(slots_TKD, order_N), order_N, 2, 4)
    is_row_TK1 = ((ids_TK >= 0) & (ids_TK < 4))[:, :, None]
    np.testing.assert_array_equal(back_TKD, np.where(is_row_TK1, slots_TKD, 0))


# experts


def one_number(spec, gate_value, up_value):
    return float(hide(np.array([[gate_value]]), np.array([[up_value]]), spec)[0, 0])


def test_gpt_oss_clamps_before_the_activation_and_adds_1_to_up():
    spec = ExpertSpec(dim=D, hidden_dim=F, alpha=1.702, up_offset=1.0, clamp=7.0)
    assert one_number(spec, 9.0, 11.0) == pytest.approx(7 * logistic(1.702 * 7) * 8, rel=1e-15)
    assert one_number(spec, -9.0, -11.0) == pytest.approx(-9 * logistic(1.702 * -9) * -6, rel=1e-15)


def test_step3p7_clamps_after_the_activation():
    spec = ExpertSpec(dim=D, hidden_dim=F, clamp=7.0, clamp_at="after")
    assert one_number(spec, 7.003, 1.0) == pytest.approx(7.003 * logistic(7.003), rel=1e-15)
    assert one_number(spec, 9.0, -11.0) == pytest.approx(7 * -7, rel=1e-15)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_has_its_textbook_values(name):
    spec = ExpertSpec(dim=D, hidden_dim=F, activation=name)
    z = np.array([-30.0, -3.0, -0.5, 0.0, 0.5, 3.0, 30.0])
    expected = [ACTIVATIONS[name](float(value), 1.0) for value in z]
    np.testing.assert_allclose(activation(z, spec), expected, rtol=1e-13, atol=1e-16)
    # No overflow on the way to 0, which the strict warnings of the tests would report.
    assert activation(np.array([-1e4]), spec)[0] == 0


def test_gelu_keeps_its_digits_in_the_tail():
    spec = ExpertSpec(dim=D, hidden_dim=F, activation="gelu")
    # The standard normal distribution has 6.220960574271785e-16 below -8.
    assert activation(np.array([-8.0]), spec)[0] == pytest.approx(-8 * 6.220960574271785e-16, rel=1e-12, abs=0)


def test_an_expert_without_rows_computes_nothing_and_disturbs_no_other():
    spec = LAYERS["plain"]
    params = LayerParams.init(spec)
    rows_ND = tokens(num_tokens=3)
    trace = run_experts(rows_ND, np.array([0, 2, 0, 0, 1, 0]), params, spec.experts)
    for row, expert_id in enumerate((1, 1, 4)):
        np.testing.assert_allclose(
            trace.output_RD[row], plain_expert(rows_ND[row], params.expert(expert_id), spec.experts), **SAME
        )


@pytest.mark.parametrize("name", LAYERS)
def test_every_expert_of_fresh_parameters_is_its_own(name):
    spec = LAYERS[name]
    params = LayerParams.init(spec)
    first = feed_forward(tokens(), params.expert(0), spec.experts).output_RD
    second = feed_forward(tokens(), params.expert(1), spec.experts).output_RD
    assert np.abs(first - second).max() > 0.01


@pytest.mark.parametrize("name", LAYERS)
def test_a_spec_survives_json(name):
    spec = LAYERS[name]
    assert LayerSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
