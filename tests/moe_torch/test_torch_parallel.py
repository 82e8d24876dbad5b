"""moe_torch over real ranks: every rank's output and gradients are those of moe_ref on the tokens of all ranks."""

from dataclasses import fields, replace

import numpy as np
import pytest

from conformance.subjects.torch.sharded import TorchLayouts
from moe_ref import (
    ExpertSpec,
    LatentSpec,
    LayerParams,
    LayerSpec,
    RouterSpec,
    SharedSpec,
    layer_backward,
    moe_layer,
)
from moe_ref.specs.families import tiny
from moe_ref.specs.layout import ShardLayout
from moe_torch.moe import MoE
from moe_torch.parallel import parallelize

FLOAT32 = 5e-6
"""Largest error over largest number: sums of some products in another order; 1.5e-6 is seen."""
GPT_OSS = ExpertSpec(dim=8, hidden_dim=16, bias=True, alpha=1.702, up_offset=1.0, clamp=0.7)
LAYERS = {
    "groups": LayerSpec(
        router=tiny("deepseek_v3"), experts=ExpertSpec(dim=8, hidden_dim=16), shared=SharedSpec(hidden_dim=8)
    ),
    "biases": LayerSpec(router=RouterSpec(num_experts=8, top_k=3, route_norm=True), experts=GPT_OSS, gate_bias=True),
    "weight on the input": LayerSpec(
        router=tiny("llama4").replace(num_experts=8, top_k=2),
        experts=ExpertSpec(dim=8, hidden_dim=16, gated=False, activation="relu2", bias=True),
        shared=SharedSpec(hidden_dim=8, gate="sigmoid", combine="average"),
        latent=LatentSpec(dim=4),
    ),
    "null experts": LayerSpec(
        router=RouterSpec(
            num_experts=8,
            top_k=3,
            num_null_experts=4,
            num_constant_experts=2,
            num_zero_experts=1,
            learned_scale="per_expert",
        ),
        experts=ExpertSpec(dim=8, hidden_dim=16),
        latent=LatentSpec(dim=6, norm_eps=0.1),
    ),
    "six experts": LayerSpec(router=RouterSpec(num_experts=6, top_k=2), experts=GPT_OSS),
}
PLACED = (5, 2, 7, 0, 3, 6, 1, 4)
LAYOUTS = {
    "one rank": ((7,), {}),
    "EP 2, a rank without tokens": ((0, 5), {"expert": 2}),
    "EP 4, uneven": ((3, 0, 7, 1), {"expert": 4}),
    "EP 8, uneven": ((1, 0, 2, 3, 0, 5, 13, 1), {"expert": 8}),
    "EP 4, no token at all": ((0, 0, 0, 0), {"expert": 4}),
    "EP 4, placed": ((3, 0, 7, 1), {"expert": 4, "placement": PLACED}),
    "EP 2, chunks": ((7, 2), {"expert": 2, "num_token_chunks": 3}),
    "EP 4, chunks": ((3, 0, 7, 1), {"expert": 4, "num_token_chunks": 2}),
    "EP 4, replicated": ((7,), {"expert": 4, "strategy": "replicated"}),
    "EP 2 twice, replicated, placed": ((3, 5), {
        "data": 2, "expert": 2, "strategy": "replicated", "placement": PLACED,
    }),
    "TP 4": ((5,), {"tensor": 4}),
    "EP 2, TP 2, chunks": ((5, 0), {"expert": 2, "tensor": 2, "num_token_chunks": 2}),
    "EP 4, TP 2, replicated": ((5,), {"expert": 4, "tensor": 2, "strategy": "replicated"}),
    "DP 2, EP 2": ((3, 2, 0, 5), {"data": 2, "expert": 2}),
    "FSDP 2": ((3, 5), {"fsdp": 2}),
    "FSDP 2, placed": ((3, 5), {"fsdp": 2, "placement": PLACED}),
    "FSDP 2, EP 2": ((3, 0, 2, 5), {"fsdp": 2, "expert": 2}),
    "DP 2, FSDP 2, EP 2": ((3, 0, 2, 5, 1, 1, 7, 0), {"data": 2, "fsdp": 2, "expert": 2}),
    "FSDP 2, EP 2, TP 2, placed": ((3, 0, 2, 5), {
        "fsdp": 2, "expert": 2, "tensor": 2, "placement": PLACED,
    }),
    "FSDP 3, EP 2, experts padded": ((3, 0, 2, 5, 1, 1), {"fsdp": 3, "expert": 2}),
    "FSDP 2, EP 2, columns divided": ((3, 0, 2, 5), {"fsdp": 2, "expert": 2}),
    "nodes of 1": ((3, 0, 7, 1), {"expert": 4, "strategy": "node_dedup", "ranks_per_node": 1}),
    "nodes of 2, placed": ((3, 0, 7, 1), {
        "expert": 4, "strategy": "node_dedup", "ranks_per_node": 2, "placement": PLACED,
    }),
    "nodes of 4": ((1, 0, 2, 3, 0, 5, 13, 1), {
        "expert": 8, "strategy": "node_dedup", "ranks_per_node": 4,
    }),
    "nodes of 2, FSDP 2, chunks": ((1, 0, 2, 3, 0, 5, 7, 1), {
        "fsdp": 2, "expert": 4, "strategy": "node_dedup", "ranks_per_node": 2, "num_token_chunks": 2,
    }),
    "nodes of 1, TP 2": ((3, 5), {
        "expert": 2, "tensor": 2, "strategy": "node_dedup", "ranks_per_node": 1,
    }),
}  # fmt: skip
WITH = {
    "biases": (
        "nodes of 4", "EP 2, TP 2, chunks", "FSDP 2, EP 2, TP 2, placed", "EP 4, placed",
        "FSDP 3, EP 2, experts padded", "FSDP 2, placed",
    ),
    "weight on the input": (
        "TP 4", "EP 8, uneven", "EP 4, chunks", "nodes of 2, placed", "EP 4, TP 2, replicated",
    ),
    "null experts": ("FSDP 2", "EP 2, chunks", "EP 2 twice, replicated, placed", "nodes of 1"),
    "six experts": ("FSDP 2, EP 2, columns divided",),
}  # fmt: skip
LAYER_OF = {layout: layer for layer, layouts in WITH.items() for layout in layouts}
"""The layer of a layout; else the one with groups."""


def params_of(spec: LayerSpec) -> LayerParams:
    """Parameters that float32 holds."""
    return LayerParams.init(spec, seed=1).astype(np.float32)


def error(found, wanted) -> float:
    """The largest difference, relative to the largest number; infinite for another shape."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted)
    if found.shape != wanted.shape:
        return np.inf
    return np.abs(found - wanted).max(initial=0) / (np.abs(wanted).max(initial=0) or 1)


def assert_every_rank_agrees(spec: LayerSpec, params: LayerParams, layout: ShardLayout, sizes, **inputs):
    """Outputs and all gradients."""
    rng = np.random.default_rng(0)
    x_TD, d_output_TD = rng.normal(size=(2, sum(sizes), spec.experts.dim)).astype(np.float32)

    def by_shard(values):
        return np.split(values, np.cumsum(sizes)[:-1])

    trace = moe_layer(x_TD, params, spec, **inputs)
    wanted = layer_backward(trace, params, spec, d_output_TD)
    names = {"token_mask_T": "token_mask_by_shard"}
    inputs = {names[name]: by_shard(value) for name, value in inputs.items()}
    subject = TorchLayouts()
    outputs = subject.sharded_layer(by_shard(x_TD), params, spec, layout, **inputs)
    gradients = subject.sharded_gradients(by_shard(x_TD), params, spec, layout, by_shard(d_output_TD), **inputs)
    assert len(outputs) == len(gradients) == layout.num_ranks
    trained = {f.name for f in fields(params) if getattr(params, f.name) is not None} - {"expert_bias_E"}
    for rank in range(layout.num_ranks):
        shard = layout.shard_of(rank)
        assert error(outputs[rank], by_shard(trace.output_TD)[shard]) < FLOAT32, rank
        assert gradients[rank].keys() == trained | {"x_TD"}
        for name, gradient in gradients[rank].items():
            right = by_shard(wanted.x_TD)[shard] if name == "x_TD" else getattr(wanted.params, name)
            assert error(gradient, right) < FLOAT32, (rank, name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_has_the_output_and_gradients_of_one_rank(name):
    spec = LAYERS[LAYER_OF.get(name, "groups")]
    sizes, fields_of_layout = LAYOUTS[name]
    assert_every_rank_agrees(spec, params_of(spec), ShardLayout(**fields_of_layout), sizes)


@pytest.mark.parametrize("strategy", ["all_to_all", "node_dedup", "replicated"])
@pytest.mark.parametrize("expert", [0, 5])
def test_all_tokens_may_go_to_one_expert(strategy, expert):
    spec = LayerSpec(router=RouterSpec(num_experts=8, top_k=1, score_func="sigmoid"), experts=GPT_OSS)
    crowd_E = np.where(np.arange(8) == expert, 9.0, 0.0).astype(np.float32)
    layout = ShardLayout(expert=4, strategy=strategy, ranks_per_node=2)
    sizes = (11,) if layout.facts.shares_tokens else (3, 0, 7, 1)
    assert_every_rank_agrees(spec, replace(params_of(spec), expert_bias_E=crowd_E), layout, sizes)


@pytest.mark.parametrize("strategy", ["all_to_all", "node_dedup"])
def test_padding_is_in_no_output_and_no_gradient(strategy):
    spec = LAYERS["groups"]
    layout = ShardLayout(expert=4, strategy=strategy, ranks_per_node=2)
    mask_T = np.array([1, 0, 1, 0, 0, 1, 1, 0, 1, 1, 0], dtype=bool)  # the second rank has padding alone
    assert_every_rank_agrees(spec, params_of(spec), layout, (3, 2, 5, 1), token_mask_T=mask_T)


def test_an_unsupported_layout_has_a_reason():
    subject, spec = TorchLayouts(), LAYERS["groups"]
    layout = ShardLayout(expert=2)
    assert subject.supports_layer(spec, layout) is None
    assert "strategy is 'ring_of_experts'" in subject.supports_layer(spec, layout.replace(strategy="ring_of_experts"))
    assert "pieces of D" in subject.supports_layer(spec, layout.replace(num_emb_chunks=2))
    random = spec.replace(router=RouterSpec(num_experts=4, top_k=1, selector="random"))
    assert "draws on its own" in subject.supports_layer(random, layout)


def test_what_one_rank_alone_can_do_is_refused_over_ranks():
    with pytest.raises(ValueError, match="batch_invariant is True"):
        parallelize(MoE(LAYERS["groups"], batch_invariant=True), None, ShardLayout())
