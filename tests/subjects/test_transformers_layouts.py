"""The subject transformers-layouts: blocks of transformers under their expert-parallel plans on gloo ranks."""

from dataclasses import replace

import numpy as np
import pytest
from layer_agreement import FLOAT32, assert_near, by_shard, params_of, tokens

from moe_ref import layer_backward, moe_layer
from moe_ref.specs.families import FAMILIES
from moe_ref.specs.layout import ShardLayout

pytest.importorskip("torch")
pytest.importorskip("transformers")

from test_transformers_layers import block_spec

from conformance.subjects.ranks import RankError
from conformance.subjects.transformers.blocks import BLOCKS
from conformance.subjects.transformers.layer import IMPLEMENTATIONS
from conformance.subjects.transformers.sharded import SHARED, TransformersLayouts, plan_of, turn

LAYOUTS = [
    (ShardLayout(expert=2), (3, 5)),
    (ShardLayout(expert=2), (0, 4)),
    (ShardLayout(expert=2, strategy="replicated"), (7,)),
    (ShardLayout(expert=2, strategy="replicated"), (6,)),
    (ShardLayout(expert=2, strategy="replicated"), (1,)),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "qwen2_moe"])
def test_every_rank_has_the_output_and_gradients_of_the_reference(name, implementation):
    spec, subject = block_spec(name), TransformersLayouts(name, implementation)
    params = params_of(spec, biased=FAMILIES[name].expert_bias)
    for layout, sizes in LAYOUTS:
        assert subject.supports_layer(spec, layout) is None
        x_TD, d_output_TD = tokens(sum(sizes), spec.experts.dim)
        trace = moe_layer(x_TD, params, spec)
        wanted = layer_backward(trace, params, spec, d_output_TD)
        xs, d_outputs = by_shard(x_TD, sizes), by_shard(d_output_TD, sizes)
        outputs = subject.sharded_layer(xs, params, spec, layout)
        gradients = subject.sharded_gradients(xs, params, spec, layout, d_outputs)
        for rank in range(layout.num_ranks):
            shard = 0 if layout.facts.shares_tokens else rank
            assert_near(outputs[rank], by_shard(trace.output_TD, sizes)[shard], FLOAT32)
            assert_near(gradients[rank].pop("x_TD"), by_shard(wanted.x_TD, sizes)[shard], FLOAT32)
            for field, gradient in gradients[rank].items():
                assert_near(gradient, getattr(wanted.params, field), FLOAT32, field)


def test_eager_experts_of_gpt_oss_take_no_slot_of_another_rank():
    spec, subject = block_spec("gpt_oss"), TransformersLayouts("gpt_oss", "eager")
    layout, params = ShardLayout(expert=2, strategy="replicated"), params_of(spec, biased=False)
    # A number of tokens at which it is the turn of the sum of partial outputs.
    batches = [tokens(num_tokens, spec.experts.dim)[0] for num_tokens in range(3, 30)]
    x_TD = next(x for x in batches if SHARED[turn(subject._asked([x], params, spec), len(SHARED))] == "all_reduce")
    with pytest.raises(RankError, match="Class values must be smaller than num_classes"):
        subject.sharded_layer([x_TD], params, spec, layout)


def test_eager_experts_without_a_token_miss_the_backward_pass_of_their_sum():
    spec, subject = block_spec("mixtral"), TransformersLayouts("mixtral", "eager")
    layout, params = ShardLayout(expert=2, strategy="replicated"), params_of(spec, biased=False)
    first_ED = np.zeros_like(params.gate_ED)
    first_ED[:3] = [[3.0], [2.0], [1.0]]  # experts of the first rank
    params = replace(params, gate_ED=first_ED)
    batches = [np.abs(tokens(num_tokens, spec.experts.dim)[0]) for num_tokens in range(3, 30)]
    x_TD = next(x for x in batches if SHARED[turn(subject._asked([x], params, spec), len(SHARED))] == "all_reduce")
    with pytest.raises(RankError, match="does not require grad"):
        subject.sharded_gradients([x_TD], params, spec, layout, [x_TD])


def test_a_plan_names_what_the_block_has():
    assert plan_of(BLOCKS["mixtral"]) == {
        "experts": "ep_dispatch_experts",
        "experts.gate_up_proj": "grouped_gemm",
        "experts.down_proj": "grouped_gemm",
    }
    assert not plan_of(BLOCKS["llama4"])


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (ShardLayout(expert=2, strategy="ring_of_experts"), "not ring_of_experts"),
        (ShardLayout(expert=2, tensor=2), "without tensor, which is 2"),
        (ShardLayout(expert=8), "on 2 to 4 ranks"),
        (ShardLayout(expert=2, placement=(1, 0, 2, 3, 4, 5, 6, 7)), "placed in their order"),
    ],
)
def test_an_unsupported_layout_has_a_reason(layout, reason):
    assert reason in str(TransformersLayouts().supports_layer(block_spec("mixtral"), layout))


def test_a_family_without_a_plan_is_unsupported():
    spec = block_spec("llama4")
    assert TransformersLayouts("llama4").supports_layer(spec, ShardLayout(expert=2)) == "no block has a plan"
