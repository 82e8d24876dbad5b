"""moe_ref, tests of the gradients of routing, against differences of the forward pass in float64."""

from dataclasses import fields

import numpy as np
import pytest
from derivatives import (
    COMPLEX_BOUND,
    ROUTERS,
    SIGMOID_NORM,
    E,
    T,
    assert_close,
    complex_gradient,
    difference,
    router,
    router_inputs,
)

from moe_ref.backward.routing import normalise_backward, route_backward, scale_logits_backward, score_backward
from moe_ref.routing import normalise, route
from moe_ref.specs.ids import UNUSED
from moe_ref.specs.inputs import RouterInputs
from moe_ref.specs.router import RouterSpec


def routing_case(name):
    spec = router(name)
    rng = np.random.default_rng(5)
    logits_TE = 2 * rng.standard_normal((T, spec.num_logits))
    d_weights_TK = rng.standard_normal((T, spec.top_k))
    d_shared_TS = rng.standard_normal((T, spec.num_scored_shared_experts))
    return spec, logits_TE, router_inputs(spec), d_weights_TK, d_shared_TS


def routed_value(routing, d_weights_TK, d_shared_TS):
    shared = 0 if routing.shared_weights_TS is None else (routing.shared_weights_TS * d_shared_TS).sum()
    return (routing.weights_TK * d_weights_TK).sum() + shared


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_the_gradient_of_routing_is_its_difference_quotient(name, masked):
    spec, logits_TE, inputs, d_weights_TK, d_shared_TS = routing_case(name)
    mask_T = np.arange(T) % 3 != 1 if masked else None
    routing = route(logits_TE, spec, token_mask_T=mask_T, **inputs)

    def value(moved_TE, **moved_inputs):
        moved = route(moved_TE, spec, token_mask_T=mask_T, **inputs | moved_inputs)
        np.testing.assert_array_equal(moved.expert_ids_TK, routing.expert_ids_TK)
        return routed_value(moved, d_weights_TK, d_shared_TS)

    learned_scale = inputs.get("learned_scale")
    d_logits_TE, d_learned_scale = route_backward(
        routing, spec, learned_scale, d_weights_TK, d_shared_TS, token_mask_T=mask_T
    )
    # norm_clamp_active is the constant 1 / norm_eps times a score: small, but not 0.
    assert_close(d_logits_TE, difference(value, logits_TE))
    assert np.abs(d_logits_TE).max() > 1e-3
    if learned_scale is not None:
        expected = difference(lambda scale: value(logits_TE, learned_scale=scale), np.asarray(learned_scale))
        assert_close(d_learned_scale, expected)
    else:
        assert d_learned_scale is None


def test_the_cases_change_every_field_of_the_router_spec():
    changed = set().union(*(router(name).to_dict() for name in ROUTERS))
    assert changed == {field.name for field in fields(RouterSpec)}


@pytest.mark.parametrize("name", ["softmax", "sigmoid_norm", "sqrtsoftplus_norm", "selected", "softcap", "inkling"])
def test_a_logit_of_minus_inf_gets_gradient_0_and_disturbs_no_other(name):
    spec, logits_TE, inputs, d_weights_TK, d_shared_TS = routing_case(name)
    never_TE = np.zeros_like(logits_TE, dtype=bool)
    never_TE[::2, 1] = never_TE[1::2, 4] = True

    def value(finite_TE):
        return routed_value(route(np.where(never_TE, -np.inf, finite_TE), spec, **inputs), d_weights_TK, d_shared_TS)

    routing = route(np.where(never_TE, -np.inf, logits_TE), spec, **inputs)
    d_logits_TE, _ = route_backward(routing, spec, inputs.get("learned_scale"), d_weights_TK, d_shared_TS)
    assert (d_logits_TE[never_TE] == 0).all()
    assert_close(d_logits_TE, difference(value, logits_TE))
    ones_TE = np.ones_like(logits_TE)
    assert (score_backward(ones_TE, routing.scaled_logits_TE, spec)[never_TE] == 0).all()
    assert (scale_logits_backward(ones_TE, routing.scaled_logits_TE, spec)[never_TE] == 0).all()


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_saturated_logits_have_finite_gradients(score_func):
    spec = RouterSpec(num_experts=4, top_k=2, score_func=score_func, route_norm=True)
    logits_TE = np.array([[1e4, -1e4, 2e4, -3e4], [-1e4, -2e4, -3e4, -4e4], [-700.0, -705.0, -1400.0, -1500.0]])
    d_logits_TE, _ = route_backward(route(logits_TE, spec), spec, None, np.ones((3, 2)))
    assert np.isfinite(d_logits_TE).all()


@pytest.mark.parametrize("changes", [{}, {"norm_p": 2.0}, {"norm_p": 0.5}, {"norm_form": "clamp"}, {"norm_eps": 0.5}])
def test_weights_that_are_all_0_have_finite_gradients(changes):
    spec = RouterSpec(num_experts=4, top_k=2, selector="given", **SIGMOID_NORM | changes)
    logits_TE = np.array([[-np.inf, -np.inf, 0.0, 1.0]])
    routing = route(logits_TE, spec, inputs=RouterInputs(given_ids_TK=np.array([[0, 1]])))
    d_logits_TE, _ = route_backward(routing, spec, None, np.ones((1, 2)))
    assert (d_logits_TE == 0).all()


@pytest.mark.parametrize("norm_p", [1.0, 2.0, 3.0, 0.5])
@pytest.mark.parametrize("norm_form", ["add_eps", "clamp"])
@pytest.mark.parametrize("norm_with_shared", [False, True])
def test_the_gradient_of_the_norm_is_its_complex_derivative(norm_p, norm_form, norm_with_shared):
    spec = RouterSpec(
        num_experts=4, top_k=3, score_func="sigmoid", route_norm=True, norm_p=norm_p, norm_eps=0.1,
        norm_form=norm_form, num_scored_shared_experts=2, norm_with_shared=norm_with_shared,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    raw_TK, shared_TS = rng.uniform(0.1, 1, (T, 3)), rng.uniform(0.1, 1, (T, 2))
    d_TK, d_TS = rng.standard_normal((T, 3)), rng.standard_normal((T, 2))

    def value(weights_TK, scores_TS):
        normed_TK, normed_TS = normalise(weights_TK, scores_TS, spec)
        return (normed_TK * d_TK).sum() + (normed_TS * d_TS).sum()

    d_raw_TK, d_shared_TS = normalise_backward(d_TK, d_TS, raw_TK, shared_TS, spec)
    assert_close(d_raw_TK, complex_gradient(lambda w: value(w, shared_TS.astype(complex)), raw_TK), COMPLEX_BOUND)
    assert_close(d_shared_TS, complex_gradient(lambda s: value(raw_TK.astype(complex), s), shared_TS), COMPLEX_BOUND)


@pytest.mark.parametrize("norm_p", [1.0, 2.0, 3.0])
def test_a_weight_of_0_takes_its_part_in_the_gradient_of_the_norm(norm_p):
    spec = RouterSpec(num_experts=4, top_k=3, route_norm=True, norm_p=norm_p)
    raw_TK, d_TK = np.array([[0.0, 0.5, 0.2]]), np.array([[1.0, -2.0, 3.0]])
    nothing_TS = np.zeros((1, 0))

    def value(weights_TK):
        return (normalise(weights_TK, nothing_TS, spec)[0] * d_TK).sum()

    d_raw_TK, _ = normalise_backward(d_TK, nothing_TS, raw_TK, nothing_TS, spec)
    assert_close(d_raw_TK, complex_gradient(value, raw_TK), COMPLEX_BOUND)


def test_the_norm_passes_the_gradient_at_its_clamp_and_none_where_it_is_0():
    nothing_TS = np.zeros((1, 0))
    clamp = RouterSpec(num_experts=4, top_k=1, route_norm=True, norm_eps=0.5, norm_form="clamp")
    at_TK, below_TK = np.array([[0.5]]), np.array([[np.nextafter(0.5, 0)]])
    assert normalise_backward(np.ones((1, 1)), nothing_TS, at_TK, nothing_TS, clamp)[0].item() == 0
    assert normalise_backward(np.ones((1, 1)), nothing_TS, below_TK, nothing_TS, clamp)[0].item() == 2
    plain = RouterSpec(num_experts=4, top_k=2, route_norm=True)
    d_raw_TK, _ = normalise_backward(np.ones((1, 2)), nothing_TS, np.zeros((1, 2)), nothing_TS, plain)
    assert (d_raw_TK == 0).all()


def test_what_flows_into_an_unused_slot_is_not_read():
    spec, logits_TE, inputs, d_weights_TK, _ = routing_case("given")
    routing = route(logits_TE, spec, **inputs)
    poisoned_TK = np.where(routing.expert_ids_TK == UNUSED, np.nan, d_weights_TK)
    assert np.isnan(poisoned_TK).any()
    expected_TE, _ = route_backward(routing, spec, None, d_weights_TK)
    np.testing.assert_array_equal(route_backward(routing, spec, None, poisoned_TK)[0], expected_TE)


def test_a_dropped_expert_that_a_fill_of_0_lets_in_gets_gradient_0():
    spec, logits_TE, inputs, d_weights_TK, _ = routing_case("groups_filled_with_0")
    routing = route(logits_TE, spec, **inputs)
    assert routing.group_ids_TL is not None
    group_of_E = np.arange(E) // 2
    kept_TE = (routing.group_ids_TL[:, :, None] == group_of_E).any(axis=1)
    dropped_but_selected_TK = ~np.take_along_axis(kept_TE, routing.expert_ids_TK, axis=1)
    assert dropped_but_selected_TK.any()
    d_logits_TE, _ = route_backward(routing, spec, None, d_weights_TK)
    assert (d_logits_TE[~kept_TE] == 0).all()


@pytest.mark.parametrize("norm_p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("score_func", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_one_expert_per_token_with_a_norm_gives_the_gate_exactly_no_gradient(score_func, norm_p):
    spec = RouterSpec(num_experts=E, top_k=1, score_func=score_func, route_norm=True, norm_p=norm_p)
    logits_TE = np.random.default_rng(0).standard_normal((50, E))
    d_logits_TE, _ = route_backward(route(logits_TE, spec), spec, None, np.linspace(-1, 1, 50)[:, None])
    assert (d_logits_TE == 0).all()
