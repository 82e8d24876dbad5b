"""The subject torchtitan-layouts: torchtitan's real AllToAllTokenDispatcher on gloo ranks, against moe_ref."""

import numpy as np
import pytest
from layer_agreement import FLOAT32, assert_near, params_of, tokens

from conformance.core.subject import Unsupported
from conformance.subjects.torchtitan.sharded import TorchtitanLayouts
from moe_ref import ExpertSpec, LayerSpec, RouterSpec, SharedSpec, layer_backward, moe_layer
from moe_ref.dispatch import plan
from moe_ref.specs.layout import ShardLayout

SPEC = LayerSpec(
    router=RouterSpec(
        num_experts=8, top_k=3, score_func="sigmoid", num_expert_groups=4, num_limited_groups=2,
        route_norm=True, norm_eps=1e-20, route_scale=2.5,
    ),
    experts=ExpertSpec(dim=16, hidden_dim=8),
    shared=SharedSpec(hidden_dim=24),
)  # fmt: skip
LAYOUTS = [
    (ShardLayout(expert=2), (0, 5)),
    (ShardLayout(expert=4), (3, 0, 7, 1)),
    (ShardLayout(expert=8), (1, 0, 2, 3, 0, 5, 7, 1)),
    (ShardLayout(data=2, expert=2), (3, 1, 0, 5)),
]


def by_shard(values, tokens_per_shard) -> list[np.ndarray]:
    return np.split(values, np.cumsum(tokens_per_shard)[:-1])


@pytest.mark.parametrize(("layout", "sizes"), LAYOUTS, ids=["EP 2", "EP 4", "EP 8", "DP 2, EP 2"])
def test_every_rank_has_the_plan_output_and_gradients_of_the_reference(layout, sizes):
    subject, params = TorchtitanLayouts(), params_of(SPEC)
    assert subject.supports_layer(SPEC, layout) is None
    x_TD, d_output_TD = tokens(sum(sizes), SPEC.experts.dim)
    trace = moe_layer(x_TD, params, SPEC)
    wanted = layer_backward(trace, params, SPEC, d_output_TD)
    xs, d_outputs = by_shard(x_TD, sizes), by_shard(d_output_TD, sizes)
    outputs = subject.sharded_layer(xs, params, SPEC, layout)
    gradients = subject.sharded_gradients(xs, params, SPEC, layout, d_outputs)
    for rank in range(layout.num_ranks):
        assert_near(outputs[rank], by_shard(trace.output_TD, sizes)[rank], FLOAT32)
        assert_near(gradients[rank].pop("x_TD"), by_shard(wanted.x_TD, sizes)[rank], FLOAT32)
        assert len(gradients[rank]) == 7
        for name, gradient in gradients[rank].items():
            assert_near(gradient, getattr(wanted.params, name), FLOAT32, name)

    ids_by_shard = by_shard(trace.routing.expert_ids_TK, sizes)
    found = subject.dispatch(ids_by_shard, layout, SPEC)
    for own, right in zip(found, plan(ids_by_shard, layout, SPEC), strict=True):
        for name, value in own.items():
            np.testing.assert_array_equal(value, getattr(right, name), err_msg=name)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (ShardLayout(expert=2, strategy="node_dedup"), "not node_dedup"),
        (ShardLayout(tensor=2), "judged without tensor, which is 2"),
        (ShardLayout(placement=(1, 0, 2, 3, 4, 5, 6, 7)), "placed in their order"),
    ],
)
def test_an_unsupported_layout_has_a_reason(layout, reason):
    assert reason in TorchtitanLayouts().supports_layer(SPEC, layout)


def test_unused_slots_are_unsupported():
    with pytest.raises(Unsupported, match="no unused slots"):
        TorchtitanLayouts().dispatch([np.array([[0, 1, -1]])], ShardLayout(), SPEC)
