"""Tests, what they share: small layers, and whether a subject agrees with moe_ref on one.

Every comparison is with moe_ref in float64, on numbers that float32 holds.
"""

from dataclasses import fields, replace

import numpy as np

from moe_ref import ExpertSpec, LayerParams, LayerSpec, RouterInputs, SharedSpec, layer_backward, moe_layer
from moe_ref.specs.families import tiny

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
    trace = moe_layer(x_TD, params, spec, **RouterInputs.keywords(inputs))
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
    rows_RD = np.concatenate([rows_ND, np.full((3, rows_ND.shape[1]), np.nan)]).astype(np.float32)
    found = subject.experts(rows_RD, trace.permutation.tokens_per_expert_E, params, spec)
    assert found.shape == rows_RD.shape
    assert_near(found[: len(rows_ND)], trace.experts.output_RD, bound)
    no_counts_E = np.zeros(spec.router.num_experts, dtype=np.int64)
    assert subject.experts(rows_RD[:0], no_counts_E, params, spec).shape == (0, rows_RD.shape[1])


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


def by_shard(values: np.ndarray, tokens_per_shard: tuple[int, ...]) -> list[np.ndarray]:
    """The rows of each shard."""
    return np.split(values, np.cumsum(tokens_per_shard)[:-1])
