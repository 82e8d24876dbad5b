"""The subject torchtitan-layouts: torchtitan's own parallelize, FSDP2 and dispatcher on gloo ranks, against moe_ref."""

from dataclasses import replace

import numpy as np
import pytest
from layer_agreement import FLOAT32, assert_near, by_shard, params_of, tokens
from torchtitan_rank_functions import MICRO_BATCHES, STEPS, train_on_rank

from conformance.core.subject import Unsupported
from conformance.subjects.ranks import RankError
from conformance.subjects.torchtitan.sharded import TorchtitanLayouts, TorchtitanSpmdLayouts
from moe_ref import BiasUpdateSpec, ExpertSpec, LayerSpec, RouterSpec, SharedSpec, layer_backward, moe_layer
from moe_ref.balance import bias_update
from moe_ref.dispatch import plan
from moe_ref.specs.families import tiny
from moe_ref.specs.layout import ShardLayout

SPEC = LayerSpec(
    router=RouterSpec(
        num_experts=8, top_k=3, score_func="sigmoid", num_expert_groups=4, num_limited_groups=2,
        route_norm=True, norm_eps=1e-20, route_scale=2.5,
    ),
    experts=ExpertSpec(dim=16, hidden_dim=8),
    shared=SharedSpec(hidden_dim=24),
)  # fmt: skip
GPT_OSS = LayerSpec(
    router=tiny("gpt_oss"),
    experts=ExpertSpec(dim=16, hidden_dim=16, alpha=1.702, up_offset=1.0, clamp=0.75, bias=True),
    gate_bias=True,
)
LAYOUTS = {
    "EP 4": (SPEC, ShardLayout(expert=4), (3, 0, 7, 1)),
    "FSDP 2, EP 2": (SPEC, ShardLayout(fsdp=2, expert=2), (3, 1, 0, 5)),
    "DP 2, EP 2": (SPEC, ShardLayout(data=2, expert=2), (3, 1, 0, 5)),
    "EP 2, TP 2": (SPEC, ShardLayout(expert=2, tensor=2), (3, 4)),
    "FSDP 2, TP 2": (SPEC, ShardLayout(fsdp=2, tensor=2), (5, 0)),
    "gpt-oss, FSDP 2": (GPT_OSS, ShardLayout(fsdp=2), (3, 2)),
    "gpt-oss, EP 2, TP 2": (GPT_OSS, ShardLayout(expert=2, tensor=2), (3, 4)),
    "gpt-oss, TP 2": (GPT_OSS, ShardLayout(tensor=2), (5,)),
}


def params_without_logit_bias(spec: LayerSpec):
    """torchtitan adds the balancing bias to scores, where gpt-oss ranks logits."""
    params = params_of(spec)
    return replace(params, expert_bias_E=None) if spec is GPT_OSS else params


@pytest.mark.parametrize(("spec", "layout", "sizes"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_rank_has_the_output_and_gradients_of_the_reference(spec, layout, sizes):
    subject, params = TorchtitanLayouts(), params_without_logit_bias(spec)
    assert subject.supports_layer(spec, layout) is None
    x_TD, d_output_TD = tokens(sum(sizes), spec.experts.dim)
    trace = moe_layer(x_TD, params, spec)
    wanted = layer_backward(trace, params, spec, d_output_TD)
    xs, d_outputs = by_shard(x_TD, sizes), by_shard(d_output_TD, sizes)
    outputs = subject.sharded_layer(xs, params, spec, layout)
    gradients = subject.sharded_gradients(xs, params, spec, layout, d_outputs)
    for rank in range(layout.num_ranks):
        shard = layout.shard_of(rank)
        assert_near(outputs[rank], by_shard(trace.output_TD, sizes)[shard], FLOAT32)
        own = gradients[rank].pop("x_TD")
        if layout.tensor == 1 or layout.expert > 1:  # else it lacks what comes through the experts, which is declared
            assert_near(own, by_shard(wanted.x_TD, sizes)[shard], FLOAT32)
        assert len(gradients[rank]) == (8 if spec is GPT_OSS else 7)
        for name, gradient in gradients[rank].items():
            assert_near(gradient, getattr(wanted.params, name), FLOAT32, name)


def test_the_dispatcher_has_the_plan_of_the_reference():
    layout, sizes = ShardLayout(data=2, expert=2), (3, 1, 0, 5)
    trace = moe_layer(tokens(sum(sizes), SPEC.experts.dim)[0], params_of(SPEC), SPEC)
    ids_by_shard = by_shard(trace.routing.expert_ids_TK, sizes)
    found = TorchtitanLayouts().dispatch(ids_by_shard, layout, SPEC)
    for own, right in zip(found, plan(ids_by_shard, layout, SPEC), strict=True):
        for name, value in own.items():
            np.testing.assert_array_equal(value, getattr(right, name), err_msg=name)


def test_the_default_backend_adds_the_down_bias_of_gpt_oss_once_for_each_tensor_rank():
    subject, params = TorchtitanSpmdLayouts(), params_without_logit_bias(GPT_OSS)
    x_TD, _ = tokens(5, GPT_OSS.experts.dim)
    once_TD = moe_layer(x_TD, params, GPT_OSS).output_TD
    assert params.b_down_ED is not None
    twice_TD = moe_layer(x_TD, replace(params, b_down_ED=2 * params.b_down_ED), GPT_OSS).output_TD
    assert_near(subject.sharded_layer([x_TD], params, GPT_OSS, ShardLayout())[0], once_TD, FLOAT32)
    for output_TD in subject.sharded_layer([x_TD], params, GPT_OSS, ShardLayout(tensor=2)):
        assert_near(output_TD, twice_TD, FLOAT32)


# the hook over ranks

UPDATE = BiasUpdateSpec(rate=0.125, centred=True)


@pytest.mark.parametrize("axes", [{"expert": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2}, {"fsdp": 2, "expert": 2}])
def test_the_hook_moves_the_bias_by_the_counts_of_all_ranks_step_by_step(axes):
    layout, params = ShardLayout(**axes), params_of(SPEC)
    x_TD, _ = tokens(8, SPEC.experts.dim)
    sizes = (8 // layout.num_token_shards,) * layout.num_token_shards
    found = TorchtitanLayouts().ranks.run(
        layout.num_ranks, train_on_rank, by_shard(x_TD, sizes), params, SPEC, layout, UPDATE
    )
    bias_E = params.expert_bias_E
    assert bias_E is not None
    for step in range(STEPS):
        ids_TK = moe_layer(x_TD, replace(params, expert_bias_E=bias_E), SPEC).routing.expert_ids_TK
        counts_E = MICRO_BATCHES * np.bincount(ids_TK.ravel(), minlength=SPEC.router.num_experts)
        bias_E = bias_update(counts_E, UPDATE, bias_E)
        for biases in found:
            np.testing.assert_allclose(biases[step], bias_E, atol=1e-6)


@pytest.mark.parametrize(("num_shards", "num_experts"), [(2, 8), (4, 8), (3, 8), (11, 8)])
def test_counts_of_any_number_of_shards_move_the_bias_by_their_sum(num_shards, num_experts):
    counts_SE = np.random.default_rng(num_shards).integers(0, 9, (num_shards, num_experts))
    bias_E = np.linspace(-1, 1, num_experts)
    found_E = TorchtitanLayouts().bias_update(counts_SE, UPDATE, bias_E)
    np.testing.assert_allclose(found_E, bias_update(counts_SE.sum(axis=0), UPDATE, bias_E), atol=1e-6)


# what it does not do


def test_experts_that_the_ranks_do_not_divide_are_refused():
    spec = SPEC.replace(router=RouterSpec(num_experts=6, top_k=2, score_func="sigmoid"))
    x_by_shard = [tokens(2, SPEC.experts.dim)[0]] * 4
    with pytest.raises(RankError, match="shape '\\[4, -1\\]' is invalid for input of size 6"):
        TorchtitanLayouts().sharded_layer(x_by_shard, params_of(spec), spec, ShardLayout(expert=4))


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (ShardLayout(expert=2, strategy="node_dedup"), "not node_dedup"),
        (ShardLayout(num_token_chunks=2), "no num_token_chunks, which is 2"),
        (ShardLayout(placement=(1, 0, 2, 3, 4, 5, 6, 7)), "placed in their order"),
        (ShardLayout(expert=4, tensor=4), "which do not divide them"),
        (ShardLayout(tensor=4), "a tensor rank's part of hidden_dim"),
        (ShardLayout(fsdp=11), "along a width, and FSDP2 evenly alone"),
        (ShardLayout(fsdp=3, expert=4), "along a width, and FSDP2 evenly alone"),
    ],
)
def test_an_unsupported_layout_has_a_reason(layout, reason):
    assert reason in TorchtitanLayouts().supports_layer(SPEC, layout)


def test_unused_slots_are_unsupported():
    with pytest.raises(Unsupported, match="no unused slots"):
        TorchtitanLayouts().dispatch([np.array([[0, 1, -1]])], ShardLayout(), SPEC)


def test_a_plan_of_another_strategy_is_refused_where_one_rank_is_alone():
    with pytest.raises(Unsupported, match="not of ring_of_experts"):
        TorchtitanLayouts().dispatch([np.zeros((1, 3), np.int64)], ShardLayout(strategy="ring_of_experts"), SPEC)
