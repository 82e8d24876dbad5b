"""moe_torch over real ranks: bytes on the wire, determinism, other ways to run, what a rank stores, and errors."""

from dataclasses import replace

import numpy as np
import parallel_functions
import pytest
from test_torch_parallel import FLOAT32, GPT_OSS, LAYERS, PLACED, error, params_of

from conformance.subjects.ranks import shared
from moe_ref import ExpertSpec, LayerSpec, RouterSpec, moe_layer
from moe_ref.dispatch import plan
from moe_ref.specs.layout import ShardLayout

BFLOAT16 = 3e-2
"""Relative to the largest number; a rounding is 4e-3, and 1e-2 is seen."""
DEEPSEEK = LAYERS["groups"]


def on_ranks(layout: ShardLayout, function, *arguments):
    return shared("conformance.subjects.torch.sharded").run(layout.num_ranks, function, *arguments)


def tokens(sizes: tuple[int, ...], dim: int = 8) -> list[np.ndarray]:
    """So many tokens for each shard."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=(n, dim)).astype(np.float32) for n in sizes]


def trained(spec: LayerSpec, layout: ShardLayout, sizes, way: str = "eager") -> list[dict]:
    x_by_shard = tokens(sizes, spec.experts.dim)
    return on_ranks(layout, parallel_functions.train_on_rank, params_of(spec), spec, layout, x_by_shard, way)


def assert_equal(found: list[dict], wanted: list[dict]):
    """Bit for bit, on every rank."""
    for own, other in zip(found, wanted, strict=True):
        assert own.keys() == other.keys()
        for name in own:
            np.testing.assert_array_equal(own[name], other[name], err_msg=name)


def assert_near(found: list[dict], wanted: list[dict], bound: float):
    for own, other in zip(found, wanted, strict=True):
        for name in own:
            assert error(own[name], other[name]) < bound, name


EP4 = ShardLayout(expert=4, ranks_per_node=2)
UNEVEN = (3, 0, 7, 1)
"""Tokens of its shards."""
STRATEGIES = ["all_to_all", "node_dedup"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_rows_and_bytes_across_nodes_are_those_of_the_plan(strategy, ranks_per_node):
    spec = LayerSpec(
        router=RouterSpec(num_experts=16, top_k=4, num_expert_groups=4, num_limited_groups=2), experts=GPT_OSS
    )
    layout = EP4.replace(strategy=strategy, ranks_per_node=ranks_per_node)
    x_by_shard, params = tokens(UNEVEN), params_of(spec)
    ids = moe_layer(np.concatenate(x_by_shard), params, spec).routing.expert_ids_TK
    plans = plan(np.split(ids, np.cumsum(UNEVEN)[:-1]), layout, spec)
    by_rank = on_ranks(layout, parallel_functions.sent_on_rank, params, spec, layout, x_by_shard)
    for e, (sent, own) in enumerate(zip(by_rank, plans, strict=True)):

        def crossing(sizes_S, e=e):
            return sum(sizes_S[r] for r in range(layout.expert) if layout.node_of(r) != layout.node_of(e))

        exchange = own if own.across is None else own.across
        there, back = crossing(exchange.send_sizes_S), crossing(exchange.recv_sizes_S)
        assert (there > 0) == (ranks_per_node < 4 and len(x_by_shard[e]) > 0)
        rows = [each for each in sent if each[0] == "rows" and layout.node_of(each[2]) != layout.node_of(e)]
        assert {each[4] for each in sent if each[0] == "rows"} == {8 * 4}
        # Forward there and back, backward back and there.
        assert sum(n for _, backward, _, n, _ in rows if not backward) == there + back
        assert sum(n for _, backward, _, n, _ in rows if backward) == there + back
    kinds = {(what, backward) for sent in by_rank for what, backward, *_ in sent}
    assert (("ids", False) in kinds) == (("weights", True) in kinds) == (strategy == "node_dedup")


def test_a_node_limited_token_crosses_to_each_of_its_nodes_once():
    """Eight slots in two groups, which are on two other nodes."""
    spec = LayerSpec(
        router=RouterSpec(num_experts=16, top_k=8, num_expert_groups=4, num_limited_groups=2), experts=GPT_OSS
    )
    params = replace(params_of(spec), expert_bias_E=np.repeat([0, 9, 9, 0], 4).astype(np.float32))
    crossing = {}
    for strategy in STRATEGIES:
        layout = EP4.replace(strategy=strategy, ranks_per_node=1)
        sent = on_ranks(layout, parallel_functions.sent_on_rank, params, spec, layout, tokens((1, 0, 0, 0)))[0]
        crossing[strategy] = sum(n for what, back, r, n, _ in sent if what == "rows" and not back and r != 0)
    assert crossing == {"all_to_all": 8, "node_dedup": 2}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_runs_are_equal_bit_for_bit(strategy):
    layout = EP4.replace(strategy=strategy)
    assert_equal(trained(DEEPSEEK, layout, UNEVEN), trained(DEEPSEEK, layout, UNEVEN))


def test_where_experts_are_placed_changes_no_bit():
    """Each expert has the same rows in the same order, and a token's slots are summed in the order of the slots."""
    spec = LAYERS["biases"]
    placed = trained(spec, EP4.replace(placement=PLACED), UNEVEN)
    for own, other in zip(placed, trained(spec, EP4, UNEVEN), strict=True):
        for name in ("output", "x"):
            np.testing.assert_array_equal(own[name], other[name], err_msg=name)


def test_rows_are_added_slot_by_slot_and_no_slot_has_a_token_twice():
    """Then the sum has one order also where rows are added in parallel, as on CUDA."""
    spec = LAYERS["null experts"]
    layout = EP4.replace(num_token_chunks=2)
    rng = np.random.default_rng(0)
    ids_by_shard = [rng.permuted(np.tile(np.arange(-1, 11), (n, 1)), axis=1)[:, :3] for n in UNEVEN]
    found = on_ranks(layout, parallel_functions.plan_on_rank, params_of(spec), spec, layout, ids_by_shard)
    for (slots, tokens_of, num_tokens), ids_TK in zip(found, ids_by_shard, strict=True):
        assert num_tokens == list(layout.chunk_sizes(len(ids_TK)))
        for chunk, chunk_TK in enumerate(np.split(ids_TK, [num_tokens[0]])):
            used_TK = (chunk_TK >= 0) & (chunk_TK < 8)
            for k in range(3):
                wanted = np.flatnonzero(used_TK[:, k])
                assert tokens_of[chunk][k] == wanted.tolist()
                assert slots[chunk][k] == (wanted * 3 + k).tolist()


def test_ranks_with_the_same_tokens_have_the_same_bits():
    layout = ShardLayout(expert=2, tensor=2, strategy="replicated")
    first, *others = trained(LAYERS["biases"], layout, (7,))
    for other in others:
        assert_equal([other], [first])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layer", ["groups", "weight on the input"])
def test_grouped_matmuls_give_the_same(strategy, layer):
    layout = EP4.replace(strategy=strategy)
    assert_near(trained(LAYERS[layer], layout, UNEVEN, "grouped"), trained(LAYERS[layer], layout, UNEVEN), FLOAT32)


def test_grouped_matmuls_give_the_same_on_replicated_tokens():
    layout = ShardLayout(expert=2, tensor=2, strategy="replicated")
    spec = LAYERS["biases"]
    assert_near(trained(spec, layout, (7,), "grouped"), trained(spec, layout, (7,)), FLOAT32)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "replicated"])
def test_aligned_rows_of_each_rank_change_neither_output_nor_gradient(strategy):
    layout, spec = EP4.replace(strategy=strategy), LAYERS["weight on the input"]
    sizes = (11,) if layout.facts.shares_tokens else UNEVEN
    assert_near(trained(spec, layout, sizes, "aligned"), trained(spec, layout, sizes), FLOAT32)


def test_a_rank_without_rows_has_its_blocks_and_is_waited_for():
    spec = LayerSpec(router=RouterSpec(num_experts=8, top_k=1, score_func="sigmoid"), experts=GPT_OSS)
    params = replace(params_of(spec), expert_bias_E=np.where(np.arange(8) == 5, 9.0, 0.0).astype(np.float32))
    x_by_shard = tokens(UNEVEN)
    found = on_ranks(EP4, parallel_functions.train_on_rank, params, spec, EP4, x_by_shard, "aligned")
    assert_near(found, on_ranks(EP4, parallel_functions.train_on_rank, params, spec, EP4, x_by_shard, "eager"), FLOAT32)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "replicated"])
def test_bfloat16_rows_travel_and_return(strategy):
    layout = EP4.replace(strategy=strategy)
    sizes = (11,) if layout.facts.shares_tokens else UNEVEN
    # Every expert, and no clamp: rounding decides neither a choice nor the side of a kink.
    spec = LayerSpec(
        router=RouterSpec(num_experts=8, top_k=8, score_func="sigmoid"),
        experts=ExpertSpec(dim=8, hidden_dim=16, bias=True),
    )
    assert_near(trained(spec, layout, sizes, "bfloat16"), trained(spec, layout, sizes), BFLOAT16)


def test_a_compiled_layer_gives_the_same():
    layout = ShardLayout(expert=2)
    assert_near(trained(DEEPSEEK, layout, (3, 7), "compiled"), trained(DEEPSEEK, layout, (3, 7)), FLOAT32)


@pytest.mark.parametrize("way", ["with routing", "twice"])
@pytest.mark.parametrize("axes", [{"expert": 2}, {"fsdp": 2}, {"fsdp": 2, "expert": 2}])
def test_the_method_that_returns_the_routing_too_and_a_second_step_give_the_same(axes, way):
    layout, sizes = ShardLayout(**axes), (3, 7, 0, 2)[: 2 * len(axes)]
    assert_near(trained(DEEPSEEK, layout, sizes, way), trained(DEEPSEEK, layout, sizes), FLOAT32)


STORED = {
    "EP 4": (ShardLayout(expert=4, placement=PLACED), (1, 1, 2, 8)),
    "EP 2, TP 2": (ShardLayout(expert=2, tensor=2), (1, 1, 4, 8)),
    "FSDP 2, EP 2": (ShardLayout(fsdp=2, expert=2, placement=PLACED), (2, 1, 2, 8)),
    "DP 2, FSDP 2": (ShardLayout(data=2, fsdp=2), (2, 2, 2, 8)),
}


@pytest.mark.parametrize("name", STORED)
def test_a_rank_stores_its_part_and_the_parts_make_the_whole(name):
    layout, _ = STORED[name]
    spec = LAYERS["biases"]
    parts = layout.fsdp * layout.expert * layout.tensor
    for whole, again, stored in on_ranks(layout, parallel_functions.parameters_on_rank, params_of(spec), spec, layout):
        assert_equal([again], [whole])
        for weight in ("w1_EFD", "w2_EDF", "w3_EFD", "b1_EF", "b3_EF"):
            assert stored[f"experts.{weight}"] * parts == whole[f"experts.{weight}"].size
        assert stored["router.gate.weight"] * layout.fsdp == whole["router.gate.weight"].size
        # The down bias is no part of the columns that tensor ranks divide.
        assert stored["experts.b2_ED"] * parts == whole["experts.b2_ED"].size * layout.tensor


def test_each_rank_counts_the_choices_of_its_own_tokens():
    spec = LAYERS["null experts"]
    layout = EP4.replace(placement=PLACED)
    params, x_by_shard = params_of(spec), tokens(UNEVEN)
    ids = moe_layer(np.concatenate(x_by_shard), params, spec).routing.expert_ids_TK
    counts = on_ranks(layout, parallel_functions.counts_on_rank, params, spec, layout, x_by_shard)
    for own, of_shard in zip(counts, np.split(ids, np.cumsum(UNEVEN)[:-1]), strict=True):
        np.testing.assert_array_equal(own, np.bincount(of_shard.ravel(), minlength=spec.router.num_choices))


EP2 = (1, 1, 2, 1)
REFUSED = {
    "strategy": (EP2, {"expert": 2, "strategy": "ring_of_experts"}, {},
                 "strategy is 'ring_of_experts'; moe_torch has all_to_all, replicated, node_dedup"),
    "pieces of D": (EP2, {"expert": 2, "num_emb_chunks": 2}, {}, "num_emb_chunks is 2; moe_torch does not divide"),
    "short placement": (EP2, {"expert": 2, "placement": (1, 0)}, {}, "placement has 2 entries; num_experts is 8"),
    "experts": ((1, 1, 3, 1), {"expert": 3}, {}, "expert is 3, which does not divide num_experts (8)"),
    "columns": ((1, 1, 1, 3), {"tensor": 3}, {}, "tensor is 3, which does not divide hidden_dim (16)"),
    "larger mesh": (EP2, {}, {}, "the mesh is {'expert': 2}; the layout needs {'data': 1, 'fsdp': 1, 'expert': 1, "),
    "smaller mesh": (EP2, {"expert": 2, "fsdp": 2}, {}, "the layout needs {'data': 1, 'fsdp': 2, 'expert': 2, "),
    "options": (EP2, {"expert": 2}, {"reshard_after_forward": False},
                "reshard_after_forward is given for fully_shard, but the mesh"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_layout_that_does_not_fit_is_an_error_on_every_rank(name):
    sizes, fields, options, message = REFUSED[name]
    ranks, layout = shared("conformance.subjects.torch.sharded"), ShardLayout(**fields)
    call = parallel_functions.refused_on_rank, LAYERS["biases"], sizes, layout, options
    found = ranks.run(int(np.prod(sizes)), *call)
    assert all(message in error for error in found), found


def test_calls_that_a_layer_is_not_ready_for_are_errors():
    found = shared("conformance.subjects.torch.sharded").run(2, parallel_functions.misused_on_rank, DEEPSEEK)
    whole = "the layer is whole; `parallelize` divides it over ranks"
    assert found[0] == [whole, whole, "the layer is parallel already",
                        "the mesh has an axis 'pipeline'; its axes are of data, fsdp, expert, tensor"]  # fmt: skip


def test_the_mesh_may_be_a_part_of_a_larger_one():
    x_by_shard, params = tokens((3, 5)), params_of(DEEPSEEK)
    wanted = np.split(moe_layer(np.concatenate(x_by_shard), params, DEEPSEEK).output_TD, [3])
    ranks = shared("conformance.subjects.torch.sharded")
    found = ranks.run(4, parallel_functions.part_of_a_mesh_on_rank, params, DEEPSEEK, x_by_shard)
    for rank, (output_TD, message) in enumerate(found):
        assert error(output_TD, wanted[rank % 2]) < FLOAT32
        assert message == "the mesh has 2 of 4 ranks; for strategy 'node_dedup' it has all"


def test_device_dtype_mode_and_what_is_frozen_stay():
    found = shared("conformance.subjects.torch.sharded").run(2, parallel_functions.kinds_on_rank, LAYERS["biases"])
    assert (
        found
        == [
            {
                "device": "meta",
                "dtype": "torch.bfloat16",
                "trained": [False, True],
                "training": False,
                "experts": [4, 4],
            }
        ]
        * 2
    )
