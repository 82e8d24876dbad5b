"""Tests: Megatron is asked for what a spec says; its real router and layer are called rightly, where it is there."""

import importlib.util

import numpy as np
import pytest

from conformance.run import running
from conformance.subjects.megatron.settings import capacity_entries, layer_entries, router_entries
from moe_ref import (
    CapacitySpec,
    ExpertSpec,
    LatentSpec,
    LayerParams,
    LayerSpec,
    RouterSpec,
    ShardLayout,
    SharedSpec,
    apply_capacity,
    moe_layer,
)
from moe_ref.specs.families import tiny

PLAIN = ExpertSpec(dim=8, hidden_dim=16)
GPT_OSS = ExpertSpec(dim=8, hidden_dim=16, alpha=1.702, up_offset=1.0, clamp=7.0, bias=True)
SIGMOIDS = {"score_func": "sigmoid", "route_norm": True, "norm_eps": 1e-20}
LAYERS = {
    "mixtral": LayerSpec(router=RouterSpec(num_experts=8, top_k=2, score_over="selected", select_by="logit"),
                         experts=PLAIN),
    "gpt_oss": LayerSpec(router=tiny("gpt_oss"), experts=GPT_OSS, gate_bias=True),
    "deepseek": LayerSpec(router=tiny("deepseek_v3"), experts=PLAIN, shared=SharedSpec(hidden_dim=16)),
    "qwen2_moe": LayerSpec(router=RouterSpec(num_experts=8, top_k=2), experts=PLAIN,
                           shared=SharedSpec(hidden_dim=24, gate="sigmoid")),
    "nemotron": LayerSpec(router=RouterSpec(num_experts=8, top_k=3, **SIGMOIDS, route_scale=2.5),
                          experts=ExpertSpec(dim=8, hidden_dim=16, gated=False, activation="relu2")),
    "sinkhorn": LayerSpec(router=RouterSpec(num_experts=8, top_k=1, score_func="sigmoid", select_by="logit",
                                            selector="sinkhorn"), experts=PLAIN),
    "quantiles": LayerSpec(router=RouterSpec(num_experts=8, top_k=2, score_func="sqrtsoftplus", route_norm=True,
                                             norm_eps=1e-20, select_by="logit"), experts=PLAIN),
}  # fmt: skip
T = 16


@pytest.mark.parametrize("name", LAYERS)
def test_the_settings_of_a_spec_are_read_back_as_that_spec(name):
    spec = LAYERS[name]
    entries = {key: value for key, value in layer_entries(spec).items() if value is not None}
    found = LayerSpec.from_megatron(entries)
    assert found == spec.replace(router=spec.router.replace(router_dtype="float32"))


def test_a_norm_over_the_selected_is_a_softmax_over_them():
    found = router_entries(tiny("qwen3_moe"))
    assert (found["moe_router_score_function"], found["moe_router_pre_softmax"]) == ("softmax", False)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LayerSpec(router=tiny("longcat_flash"), experts=PLAIN), "num_null_experts"),
        (
            LayerSpec(router=RouterSpec(num_experts=3, top_k=3, **SIGMOIDS, select_by="logit"), experts=PLAIN),
            "one is left",
        ),
        (LAYERS["qwen2_moe"].replace(latent=LatentSpec(dim=4)), "latent projections"),
        (LAYERS["mixtral"].replace(gate_bias=True), "add_bias_linear is both"),
        (LAYERS["mixtral"].replace(shared=SharedSpec(hidden_dim=8, combine="average")), "Megatron sums"),
        (LAYERS["mixtral"].replace(experts=ExpertSpec(dim=8, hidden_dim=8, activation="situ")), "no activation situ"),
    ],
)
def test_what_it_has_not_is_named(spec, message):
    with pytest.raises(ValueError, match=message):
        layer_entries(spec)


def test_groups_are_scored_by_as_many_experts_as_each_kept_group_gives():
    spec = RouterSpec(num_experts=8, top_k=4, num_expert_groups=4, num_limited_groups=2, **SIGMOIDS)
    assert router_entries(spec)["moe_router_group_topk"] == 2
    with pytest.raises(ValueError, match="top_k // kept groups best experts, 2"):
        router_entries(spec.replace(group_score_k=1))
    with pytest.raises(ValueError, match="would score 0"):
        router_entries(spec.replace(top_k=1))


def test_a_softmax_has_no_balancing_bias():
    with pytest.raises(ValueError, match="expert_bias"):
        router_entries(RouterSpec(num_experts=8, top_k=2), expert_bias=True)


def test_a_balancing_bias_of_logits_is_that_of_quantile_balancing():
    spec = RouterSpec(num_experts=8, top_k=2, select_by="logit")
    found = router_entries(spec, expert_bias=True)
    assert found["moe_router_load_balancing_type"] == "quantile_balancing"
    assert not found["moe_router_enable_expert_bias"]  # which is another one, of scores
    assert "moe_router_load_balancing_type" not in router_entries(LAYERS["mixtral"].router)


def test_a_drop_order_is_a_policy():
    found = capacity_entries(CapacitySpec(factor=1.5, drop_order="by_weight", pad_to_capacity=True))
    assert found == {
        "moe_expert_capacity_factor": 1.5, "moe_token_drop_policy": "probs", "moe_pad_expert_input_to_capacity": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match="drops by position or by probs"):
        capacity_entries(CapacitySpec(factor=1.5, drop_order="slot_major"))


def test_a_run_without_it_says_what_is_needed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    sentence = running.missing("megatron-alltoall") or ""
    assert sentence.startswith("megatron is not installed; it has an environment of its own, of Python 3.12")
    assert "make peers" in sentence


# Where it is installed: in the environment of `make peers`.


@pytest.mark.parametrize("name", LAYERS)
def test_its_real_layer_agrees_with_the_reference(name):
    pytest.importorskip("megatron", reason="megatron is not installed here: make peers")
    from conformance.subjects.megatron.subject import Megatron

    spec, rng, subject = LAYERS[name], np.random.default_rng(0), Megatron()
    assert subject.supports_layer(spec) is None
    params = LayerParams.init(spec, 0).astype(np.float32)
    if spec.router.score_func != "sigmoid":
        params = LayerParams(**vars(params) | {"expert_bias_E": None})
    x_TD = rng.normal(size=(T, spec.experts.dim)).astype(np.float32)
    wanted = moe_layer(x_TD, params, spec)
    np.testing.assert_allclose(subject.layer(x_TD, params, spec), wanted.output_TD, rtol=1e-4, atol=1e-5)
    if spec.experts.bias:  # docs/findings/megatron-expert-biases-have-no-backward.md
        with pytest.raises(RuntimeError, match="modified inplace"):
            subject.layer_gradients(x_TD, params, spec, np.ones_like(x_TD))
        return
    found = subject.layer_gradients(x_TD, params, spec, np.ones_like(x_TD))
    assert {name: value.shape for name, value in found.items()} == {
        name: np.shape(x_TD if name == "x_TD" else getattr(params, name)) for name in found
    }


def test_its_real_config_is_read():
    pytest.importorskip("megatron", reason="megatron is not installed here: make peers")
    from conformance.subjects.megatron.module import config_of

    spec = LAYERS["quantiles"]
    assert LayerSpec.from_megatron(config_of(layer_entries(spec))) == spec  # none of its keys is unknown


def test_the_largest_weights_are_kept():
    pytest.importorskip("megatron", reason="megatron is not installed here: make peers")
    from conformance.subjects.megatron.subject import Megatron

    ids_TK, weights_TK = np.array([[0, 1], [0, 2], [0, 1], [2, 3]]), np.arange(1, 9).reshape(4, 2) / 16
    spec = CapacitySpec(factor=1.0, drop_order="by_weight")
    found = Megatron().capacity(ids_TK, weights_TK, spec, 4)
    wanted = apply_capacity(ids_TK, weights_TK, spec, 4)
    assert found["expert_ids_TK"].tolist() == wanted.expert_ids_TK.tolist()


def test_a_router_of_logits_takes_minus_infinity_as_it_is():
    pytest.importorskip("megatron", reason="megatron is not installed here: make peers")
    from conformance.subjects.megatron.subject import Megatron

    logits_TE = np.array([[1.0, -np.inf, 0.5, 0.25]], np.float32)
    found = Megatron().route(logits_TE, RouterSpec(num_experts=4, top_k=3, **SIGMOIDS), None)
    assert np.isfinite(found.weights_TK).all()
    assert sorted(found.expert_ids_TK[0].tolist()) == [0, 2, 3]


@pytest.mark.parametrize("dispatcher", ["Alltoall", "Allgather"])
def test_its_layer_over_two_ranks_is_that_of_one(dispatcher):
    pytest.importorskip("megatron", reason="megatron is not installed here: make peers")
    from conformance.subjects.megatron import sharded

    subject, spec = getattr(sharded, f"Megatron{dispatcher}")(), LAYERS["deepseek"]
    layout = ShardLayout(expert=2, strategy=subject.strategy)
    assert subject.supports_layer(spec, layout) is None
    params = LayerParams.init(spec, 0).astype(np.float32)
    x_TD = np.random.default_rng(0).normal(size=(T, spec.experts.dim)).astype(np.float32)
    found = subject.sharded_layer(np.split(x_TD, 2), params, spec, layout)
    wanted_TD = moe_layer(x_TD, params, spec).output_TD
    np.testing.assert_allclose(np.concatenate(found), wanted_TD, rtol=1e-4, atol=1e-5)
