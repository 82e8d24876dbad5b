"""Upcycling: the layer made of a dense feed-forward is that feed-forward at the start, where the papers say so."""

import jax
import numpy as np
import pytest
import torch

from moe_jax import sparse_matmul
from moe_ref import ExpertSpec, LayerSpec, RouterSpec, moe_layer
from moe_ref.experts import feed_forward
from moe_ref.specs.params import FeedForward
from moe_ref.specs.upcycle import upcycle, why_not_exact
from moe_torch import MoE

D, F, T = 6, 8, 11
SELECTED = {"score_over": "selected", "select_by": "logit"}
X_TD = np.random.default_rng(0).normal(size=(T, D))


def dense_of(experts: ExpertSpec) -> FeedForward:
    rng = np.random.default_rng(1)
    gated, bias = experts.gated, experts.bias
    return FeedForward(
        w_up_DF=rng.normal(size=(D, F)),
        w_down_FD=rng.normal(size=(F, D)),
        w_gate_DF=rng.normal(size=(D, F)) if gated else None,
        b_up_F=rng.normal(size=F) if bias else None,
        b_gate_F=rng.normal(size=F) if bias and gated else None,
        b_down_D=rng.normal(size=D) if bias else None,
    )


def layer(G: int, K: int, router: dict, **experts) -> LayerSpec:
    made = ExpertSpec(dim=D, hidden_dim=F // G, **experts)
    return LayerSpec(router=RouterSpec(num_experts=4 * G, top_k=K, **router), experts=made)


def dense_output(spec: LayerSpec) -> np.ndarray:
    wide = spec.experts.replace(hidden_dim=F)
    return feed_forward(X_TD, dense_of(wide), wide).output_RD


EXACT = {
    "copies, normed": layer(1, 2, {"route_norm": True}),
    "copies, sigmoid, scaled": layer(
        1, 3, {"score_func": "sigmoid", "route_norm": True, "route_scale": 2.5, "norm_eps": 1e-20}, bias=True
    ),
    "one copy": layer(1, 1, {"route_norm": True}, activation="gelu"),
    "parts": layer(4, 8, SELECTED, bias=True),
    "parts of one group": layer(2, 2, SELECTED | {"output_scale": 3.0}),
    "parts, not gated": layer(2, 4, {"route_norm": True}, gated=False, activation="relu2"),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_upcycled_layer_is_the_dense_one_where_the_papers_say_so(name):
    spec = EXACT[name]
    G = F // spec.experts.hidden_dim
    params = upcycle(dense_of(spec.experts), spec, gate_std=1.0)
    assert why_not_exact(spec, G) == ""
    trace = moe_layer(X_TD, params, spec)
    np.testing.assert_allclose(trace.output_TD, dense_output(spec), rtol=1e-11, atol=1e-12)
    # A token has each part as often as any other.
    parts = np.sort(trace.routing.expert_ids_TK % G, axis=-1)
    assert (parts == np.repeat(np.arange(G), spec.router.top_k // G)).all()


@pytest.mark.parametrize("name", ["copies, sigmoid, scaled", "parts"])
def test_so_it_is_in_both_frameworks(name):
    spec = EXACT[name]
    params, tokens_TD = upcycle(dense_of(spec.experts), spec, gate_std=1.0), X_TD.astype(np.float32)
    moe = MoE(spec)
    moe.load_params(params)
    with torch.no_grad():
        of_torch = moe(torch.from_numpy(tokens_TD)).numpy()
    run = jax.jit(sparse_matmul, static_argnames="spec")
    of_jax, _ = run(tokens_TD, params.astype(np.float32), spec=spec)
    for found_TD in (of_torch, of_jax):
        np.testing.assert_allclose(found_TD, dense_output(spec), rtol=1e-4, atol=1e-4)


def test_factors_on_all_projections_are_those_of_megatron():
    spec = layer(2, 4, SELECTED)
    dense = dense_of(spec.experts)
    params = upcycle(dense, spec, scale_on="all")
    np.testing.assert_allclose(params.w_up_EDF[3], dense.w_up_DF[:, 4:] * 2 ** (1 / 3))
    np.testing.assert_allclose(params.w_down_EFD[0], dense.w_down_FD[:4] * 2 ** (1 / 3))
    assert (params.gate_ED[0] == params.gate_ED[1]).all()
    assert (params.gate_ED[1] != params.gate_ED[2]).any()
    # silu is not homogeneous, and relu2 is: its factor goes through the activation squared.
    assert "none on what comes out" in why_not_exact(spec, 2, scale_on="all")
    squared = layer(2, 4, SELECTED, gated=False, activation="relu2")
    of_all = upcycle(dense_of(squared.experts), squared, scale_on="all")
    np.testing.assert_allclose(moe_layer(X_TD, of_all, squared).output_TD, dense_output(squared), rtol=1e-11)


def test_a_softmax_over_all_experts_is_the_dense_one_where_it_is_uniform():
    spec = layer(2, 4, {})
    assert "do not sum to a constant" in why_not_exact(spec, 2)
    params = upcycle(dense_of(spec.experts), spec, gate_std=0.0)
    np.testing.assert_allclose(moe_layer(X_TD, params, spec).output_TD, dense_output(spec), rtol=1e-11, atol=1e-12)
    assert "some of them more often" in why_not_exact(layer(2, 3, SELECTED), 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": ExpertSpec(dim=D, hidden_dim=3)}, "experts.hidden_dim is 3, which does not divide 8"),
        ({"experts": ExpertSpec(dim=5, hidden_dim=4)}, "experts.dim is 5; the dense tokens have 6"),
        ({"experts": ExpertSpec(dim=D, hidden_dim=4, bias=True)}, "experts.bias is True, and the dense .* lacks"),
        ({"router": RouterSpec(num_experts=5, top_k=2)}, "router.num_experts is 5, no multiple of 2 parts"),
        ({"router": RouterSpec(num_experts=4, top_k=2, route_scale=0.0)}, "is 0.0; nothing makes up for it"),
    ],
)
def test_a_layer_that_cannot_be_made_of_it_is_refused(changes, message):
    spec = layer(2, 4, SELECTED)
    with pytest.raises(ValueError, match=message):
        upcycle(dense_of(spec.experts), spec.replace(**changes))
