"""Tests: MaxText is asked for what a spec says; its real router and layer are called rightly, where it is installed."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest

from conformance.run import running
from conformance.subjects.maxtext.settings import settings_of
from moe_ref import (
    ExpertSpec,
    LatentSpec,
    LayerParams,
    LayerSpec,
    RouterInputs,
    RouterSpec,
    SharedSpec,
    moe_layer,
    route,
)
from moe_ref.specs.families import tiny

PLAIN = ExpertSpec(dim=8, hidden_dim=16)
GPT_OSS = ExpertSpec(dim=8, hidden_dim=16, alpha=1.702, up_offset=1.0, clamp=7.0, bias=True)
LAYERS = {
    "mixtral": LayerSpec(router=tiny("mixtral"), experts=PLAIN),
    "qwen3_moe": LayerSpec(router=tiny("qwen3_moe"), experts=PLAIN),
    "gpt_oss": LayerSpec(router=tiny("gpt_oss"), experts=GPT_OSS, gate_bias=True),
    "deepseek": LayerSpec(router=tiny("deepseek_v3"), experts=PLAIN, shared=SharedSpec(hidden_dim=16)),
    "deepseek4": LayerSpec(router=tiny("deepseek_v4_hash"), experts=PLAIN, shared=SharedSpec(hidden_dim=16)),
    "llama4": LayerSpec(router=tiny("llama4"), experts=PLAIN, shared=SharedSpec(hidden_dim=16)),
    "gemma4": LayerSpec(router=tiny("gemma4"), experts=ExpertSpec(dim=8, hidden_dim=16, activation="gelu_tanh")),
}
"""decoder_block -> a layer of it."""
T = 16


@pytest.mark.parametrize("block", LAYERS)
def test_a_family_has_its_decoder_block(block):
    name = "qwen3_moe" if block == "mixtral" else block  # a softmax that is normed over the selected is one row
    assert settings_of(LAYERS[block])[1]["decoder_block"] == name


@pytest.mark.parametrize("block", ["gpt_oss", "deepseek", "llama4"])
def test_the_settings_of_a_spec_are_read_back_as_that_spec(block):
    _, entries = settings_of(LAYERS[block])
    assert LayerSpec.from_maxtext(entries) == LAYERS[block]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LayerSpec(router=tiny("longcat_flash"), experts=PLAIN), "num_null_experts"),
        (LayerSpec(router=tiny("deepseek_v2"), experts=PLAIN), "mask_fill"),
        (LAYERS["mixtral"].replace(experts=ExpertSpec(dim=8, hidden_dim=16, clamp=1.0)), "experts.clamp is 1.0"),
        (LAYERS["deepseek"].replace(gate_bias=True), "gate_bias is True"),
        (LAYERS["mixtral"].replace(latent=LatentSpec(dim=4)), "latent is given"),
        (LAYERS["mixtral"].replace(shared=SharedSpec(hidden_dim=16)), "have no shared experts"),
        (LAYERS["deepseek"].replace(experts=ExpertSpec(dim=8, hidden_dim=16, gated=False)), "have gated True"),
    ],
)
def test_what_it_has_not_is_named(spec, message):
    with pytest.raises(ValueError, match=message):
        settings_of(spec)


def test_a_run_without_it_says_what_is_needed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    sentence = running.missing("maxtext-layouts") or ""
    assert sentence.startswith("maxtext is not installed; it has an environment of its own, of Python 3.12")
    assert "make peers" in sentence


# Where it is installed: in the environment of `make peers`.


@pytest.mark.parametrize("block", LAYERS)
def test_its_real_layer_agrees_with_the_reference(block):
    pytest.importorskip("maxtext", reason="maxtext is not installed here: make peers")
    from conformance.subjects.maxtext.subject import Maxtext

    spec, rng, subject = LAYERS[block], np.random.default_rng(0), Maxtext()
    assert subject.supports_layer(spec) is None
    params = LayerParams.init(spec, 0).astype(np.float32)
    if block != "deepseek":  # which alone has a balancing bias
        params = replace(params, expert_bias_E=None)
    x_TD = rng.normal(size=(T, spec.experts.dim)).astype(np.float32)
    inputs = {}
    if spec.router.selector == "table":
        table_VK = np.stack([rng.permutation(spec.router.num_experts)[: spec.router.top_k] for _ in range(5)])
        inputs = {"token_ids_T": rng.integers(0, 5, T), "table_VK": table_VK}
    wanted = moe_layer(x_TD, params, spec, inputs=RouterInputs.from_named(inputs)[0])
    np.testing.assert_allclose(subject.layer(x_TD, params, spec, **inputs), wanted.output_TD, rtol=1e-4, atol=1e-5)
    if spec.router.selector == "top_k":
        scale = {} if params.learned_scale is None else {"learned_scale": params.learned_scale}
        logits_TE = wanted.routing.logits_TE.astype(np.float32)
        found = subject.route(logits_TE, spec.router, params.expert_bias_E, **scale)
        alone = route(logits_TE, spec.router, expert_bias_E=params.expert_bias_E, **scale)
        assert (np.sort(found.expert_ids_TK) == np.sort(alone.expert_ids_TK)).all()


def test_the_masks_of_a_capacity_keep_the_first():
    pytest.importorskip("maxtext", reason="maxtext is not installed here: make peers")
    from conformance.subjects.maxtext.subject import Maxtext
    from moe_ref import CapacitySpec

    ids_TK, weights_TK = np.array([[0, 1], [0, 2], [0, 1]]), np.full((3, 2), 0.5, np.float32)
    found = Maxtext().capacity(ids_TK, weights_TK, CapacitySpec(slots=2), 4)
    assert found["expert_ids_TK"].tolist() == [[0, 1], [0, 2], [-1, 1]]


def test_a_router_of_logits_takes_minus_infinity_as_it_is():
    pytest.importorskip("maxtext", reason="maxtext is not installed here: make peers")
    from conformance.subjects.maxtext.subject import Maxtext

    logits_TE = np.array([[1.0, -np.inf, 0.5, 0.25]], np.float32)
    spec = RouterSpec(num_experts=4, top_k=3, score_func="sigmoid", route_norm=True, norm_eps=1e-20)
    found = Maxtext().route(logits_TE, spec, None)
    assert np.isfinite(found.weights_TK).all()
    assert sorted(found.expert_ids_TK[0].tolist()) == [0, 2, 3]
