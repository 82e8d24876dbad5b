"""moe_ref, tests of the specs of a layer, its parameters, and the layouts of its weights."""

from dataclasses import replace

import numpy as np
import pytest

from moe_ref.specs.layer import ExpertSpec, LayerSpec, SharedSpec
from moe_ref.specs.params import LayerParams, WeightLayout
from moe_ref.specs.router import RouterSpec

D, F = 5, 4

PLAIN = LayerSpec(router=RouterSpec(num_experts=6, top_k=2), experts=ExpertSpec(dim=D, hidden_dim=F))
GPT_OSS = PLAIN.replace(
    experts=ExpertSpec(dim=D, hidden_dim=F, alpha=1.702, up_offset=1.0, clamp=7.0, bias=True), gate_bias=True
)
INKLING = LayerSpec(
    router=RouterSpec(num_experts=4, top_k=2, score_func="sigmoid", num_scored_shared_experts=2),
    experts=ExpertSpec(dim=D, hidden_dim=F),
    shared=SharedSpec(hidden_dim=3),
)

SIZES = {"F == D": (4, 4), "2F == D": (8, 4), "plain": (5, 3)}
LAYOUTS = [(fused, order) for fused in ("separate", "halves", "interleaved") for order in ("in_out", "out_in")]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("fused", "order"), LAYOUTS)
def test_a_layout_and_back_is_the_identity(fused, order, size):
    dim, hidden_dim = SIZES[size]
    rng = np.random.default_rng(0)
    w_gate, w_up = rng.standard_normal((2, 3, dim, hidden_dim))
    w_down = rng.standard_normal((3, hidden_dim, dim))
    b_gate, b_up = rng.standard_normal((2, 3, hidden_dim))
    layout = WeightLayout(fused=fused, order=order)
    back = layout.to_canonical(*layout.from_canonical(w_gate, w_up, w_down))
    back += layout.bias_to_canonical(layout.bias_from_canonical(b_gate, b_up))
    for found, expected in zip(back, (w_gate, w_up, w_down, b_gate, b_up), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("size", SIZES)
def test_each_layout_puts_gate_and_up_where_it_says(size):
    dim, hidden_dim = SIZES[size]
    w_gate, w_up = np.random.default_rng(0).standard_normal((2, 3, dim, hidden_dim))
    w_down = np.zeros((3, hidden_dim, dim))
    halves, _ = WeightLayout(fused="halves").from_canonical(w_gate, w_up, w_down)
    np.testing.assert_array_equal(halves[:, :, :hidden_dim], w_gate)
    np.testing.assert_array_equal(halves[:, :, hidden_dim:], w_up)
    interleaved, down_in_out = WeightLayout(fused="interleaved").from_canonical(w_gate, w_up, w_down)
    np.testing.assert_array_equal(interleaved[:, :, 2], w_gate[:, :, 1])
    np.testing.assert_array_equal(interleaved[:, :, 3], w_up[:, :, 1])
    turned, down_out_in = WeightLayout(fused="halves", order="out_in").from_canonical(w_gate, w_up, w_down)
    assert turned.shape == (3, 2 * hidden_dim, dim)
    np.testing.assert_array_equal(turned[:, hidden_dim + 1, :], w_up[:, :, 1])
    assert down_in_out.shape == (3, hidden_dim, dim)
    assert down_out_in.shape == (3, dim, hidden_dim)


def test_a_separate_layout_holds_experts_without_a_gate():
    w_up, w_down = np.random.default_rng(0).standard_normal((2, 3, 4, 4))
    layout = WeightLayout(order="out_in")
    (no_gate, stored_up), stored_down = layout.from_canonical(None, w_up, w_down)
    assert no_gate is None
    np.testing.assert_array_equal(stored_up, w_up.swapaxes(1, 2))
    assert layout.to_canonical((None, stored_up), stored_down)[0] is None


def test_a_fused_layout_refuses_what_it_cannot_hold():
    w = np.zeros((3, 4, 5))
    with pytest.raises(ValueError, match="w_gate is None"):
        WeightLayout(fused="halves").from_canonical(None, w, w)
    with pytest.raises(ValueError, match="b_gate is None"):
        WeightLayout(fused="halves").bias_from_canonical(None, w)
    with pytest.raises(ValueError, match="gate_up has 5 output columns"):
        WeightLayout(fused="interleaved").to_canonical(w, w)
    with pytest.raises(ValueError, match="fused is 'half'"):
        WeightLayout(fused="half")


def test_parameters_that_do_not_fit_the_spec_are_refused_by_name():
    spec = GPT_OSS
    params = LayerParams.init(spec)
    with pytest.raises(ValueError, match=r"w_up_EDF has shape \(6, 4, 5\); it is \(6, 5, 4\)"):
        replace(params, w_up_EDF=params.w_up_EDF.swapaxes(1, 2)).check(spec)
    with pytest.raises(ValueError, match="b_down_ED is None"):
        replace(params, b_down_ED=None).check(spec)
    with pytest.raises(ValueError, match="shared_w_up_SDF is given"):
        replace(params, shared_w_up_SDF=np.zeros((1, D, 3))).check(spec)
    replace(params, expert_bias_E=None).check(spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim is 0; it is an integer at least 1"),
        ({"hidden_dim": 2.5}, "hidden_dim is 2.5"),
        ({"activation": "swish"}, "activation is 'swish'"),
        ({"gated": 1}, "gated is 1; it is a bool"),
        ({"alpha": 0.0}, "alpha is 0.0; it is a finite number greater than 0.0"),
        ({"alpha": 1.702, "activation": "gelu"}, "alpha is 1.702 with activation 'gelu'"),
        ({"up_offset": 1.0, "gated": False}, "up_offset is 1.0; without a gate it is 0.0"),
        ({"clamp": -1.0}, "clamp is -1.0"),
        ({"clamp_at": "after"}, "clamp_at is 'after', but clamp is None"),
        ({"clamp_at": "behind", "clamp": 1.0}, "clamp_at is 'behind'"),
    ],
)
def test_an_impossible_expert_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ExpertSpec(**{"dim": D, "hidden_dim": F} | changes)


def test_impossible_shared_experts_are_refused():
    with pytest.raises(ValueError, match="gate is 'softmax'"):
        SharedSpec(hidden_dim=F, gate="softmax")
    with pytest.raises(ValueError, match="clamp is 0"):
        SharedSpec(hidden_dim=F, clamp=0)
    with pytest.raises(ValueError, match=r"shared is None, but router\.num_scored_shared_experts is 2"):
        INKLING.replace(shared=None)
    with pytest.raises(ValueError, match=r"shared\.gate is 'sigmoid'"):
        INKLING.replace(shared=SharedSpec(hidden_dim=F, gate="sigmoid"))
    with pytest.raises(ValueError, match="shared is 3"):
        PLAIN.replace(shared=3)
    with pytest.raises(ValueError, match="router is None; it is a RouterSpec"):
        PLAIN.replace(router=None)


def test_unknown_and_missing_names_are_refused():
    with pytest.raises(ValueError, match=r"unknown field 'hidden' of ExpertSpec \(did you mean hidden_dim\?\)"):
        ExpertSpec.from_dict({"dim": 4, "hidden": 4})
    with pytest.raises(ValueError, match="SharedSpec needs hidden_dim"):
        SharedSpec.from_dict({})
    with pytest.raises(ValueError, match="LayerSpec needs router"):
        LayerSpec.from_dict({"experts": {"dim": 4, "hidden_dim": 4}})
    assert LayerSpec.from_dict(PLAIN.to_dict() | {"shared": None}) == PLAIN


def test_shared_experts_have_the_form_of_the_routed_ones_but_their_own_clamp_and_no_bias():
    layer = GPT_OSS.replace(shared=SharedSpec(hidden_dim=9))
    assert layer.shared_experts == ExpertSpec(dim=D, hidden_dim=9, alpha=1.702, up_offset=1.0)
    step3p7 = PLAIN.replace(
        experts=ExpertSpec(dim=D, hidden_dim=F, clamp=0.2, clamp_at="after"), shared=SharedSpec(hidden_dim=F, clamp=0.1)
    )
    assert step3p7.shared_experts == ExpertSpec(dim=D, hidden_dim=F, clamp=0.1, clamp_at="after")
    assert PLAIN.shared_experts is None
    assert INKLING.num_shared_experts == 2
