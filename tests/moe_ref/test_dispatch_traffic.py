"""moe_ref, tests of the traffic: counts alone give what the plan gives, and the plan what a hand count gives."""

import numpy as np
import pytest
from test_dispatch import groups, ids_of, random_case

from moe_ref import RouterSpec, ShardLayout, plan
from moe_ref.routing import route
from moe_ref.specs.families import family
from moe_ref.specs.layout import even_pieces
from moe_ref.strategies import STRATEGIES
from moe_ref.traffic import bytes_of, counted_traffic, demand, exact_traffic, split

TWO = RouterSpec(num_experts=4, top_k=2)


def blocks_of(ids_by_shard, size=2):
    """The ids in blocks of a few tokens, the last first."""
    blocks = [
        (shard, ids[begin : begin + size])
        for shard, ids in enumerate(ids_by_shard)
        for begin in range(0, len(ids), size)
    ]
    return blocks[::-1]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("seed", range(20))
def test_counts_alone_give_the_traffic_of_the_plan(strategy, seed):
    layout, router, ids_by_shard = random_case(strategy, seed)
    asked = demand(blocks_of(ids_by_shard), layout, router)
    for group, plans in enumerate(groups(plan(ids_by_shard, layout, router), layout)):
        exact, counted = exact_traffic(plans, layout), counted_traffic(asked[group], layout, router)
        np.testing.assert_array_equal(counted.out_SS, exact.out_SS)
        np.testing.assert_array_equal(counted.back_SS, exact.back_SS)
        assert counted.out == exact.out


def test_rows_are_split_by_how_far_they_go():
    rows_SS = np.array([[1, 2, 4, 8], [16, 32, 64, 128], [256, 512, 1024, 2048], [4096, 8192, 16384, 32768]])
    found = split(rows_SS, 2)
    assert found.on_rank == 1 + 32 + 1024 + 32768
    assert found.inside == 2 + 16 + 2048 + 16384
    assert found.across == 4 + 8 + 64 + 128 + 256 + 512 + 4096 + 8192
    assert bytes_of(3, 7168, 2) == 43008


def test_two_experts_on_a_far_node_are_two_rows_or_one():
    layout = ShardLayout(expert=4, ranks_per_node=2)
    ids = [np.array([[3, 2]]) if T else np.zeros((0, 2), int) for T in (0, 1, 0, 0)]
    direct = exact_traffic(plan(ids, layout, TWO), layout)
    assert (direct.out.across, direct.back.across, direct.out.inside) == (2, 2, 0)
    layout = layout.replace(strategy="node_dedup")
    once = exact_traffic(plan(ids, layout, TWO), layout)
    assert (once.out.across, once.back.across, once.out.inside) == (1, 1, 1)
    assert once.between_nodes_MM.tolist() == [[0, 1], [1, 4]]
    assert once.across_by_rank_S.tolist() == [0, 1, 0, 1]


def test_a_ring_carries_every_token_over_every_link_but_one():
    layout = ShardLayout(expert=4, ranks_per_node=2, strategy="ring_of_experts")
    rng = np.random.default_rng(0)
    found = exact_traffic(plan([ids_of(rng, T, TWO) for T in (1, 10, 100, 1000)], layout, TWO), layout)
    assert [int(found.out_SS[e, (e + 1) % 4]) for e in range(4)] == [1101, 1011, 111, 1110]
    assert [int(found.back_SS[e, (e + 1) % 4]) for e in range(4)] == [1110, 1101, 1011, 111]
    assert found.out.on_rank == 0
    assert found.out.across == 1011 + 1110
    # Ranks 1 and 3 send across nodes, 2 and 0 receive.
    assert found.across_by_rank_S.tolist() == [1110 + 111, 1011 + 1101, 1011 + 1101, 1110 + 111]
    # A token is sent over three links of the four.
    assert found.out_SS.sum() == 3 * 1111


def test_a_replicated_batch_sends_nothing_out_and_an_all_reduce_back():
    layout = ShardLayout(expert=4, strategy="replicated", ranks_per_node=1)
    found = exact_traffic(plan([ids_of(np.random.default_rng(0), 6, TWO)], layout, TWO), layout)
    assert even_pieces(6, 4) == (2, 2, 1, 1)
    assert not found.out_SS.any()
    assert found.back.across == 2 * 3 * 6


def test_rows_of_a_replicated_batch_go_to_every_rank():
    layout = ShardLayout(expert=2, strategy="replicated_ragged", ranks_per_node=1)
    found = exact_traffic(plan([np.array([[0, 3], [2, 1], [2, -1]])], layout, TWO), layout)
    assert not found.out_SS.any()
    assert found.back_SS.tolist() == [[2, 2], [3, 3]]


def test_one_rank_sends_nothing():
    for strategy in STRATEGIES:
        layout = ShardLayout(strategy=strategy)
        found = exact_traffic(plan([ids_of(np.random.default_rng(0), 5, TWO)], layout, TWO), layout)
        assert (found.out.inside, found.out.across, found.back.inside, found.back.across) == (0, 0, 0, 0)


def test_node_limited_routing_limits_nodes_and_rows_across_them_only_where_a_token_crosses_once():
    router = family("deepseek_v3").router
    layout = ShardLayout(expert=64, ranks_per_node=8, groups_per_node=1)
    rng = np.random.default_rng(0)
    logits = [rng.standard_normal((8, 256)) for _ in range(64)]
    per_token = {}
    for name, spec in (("limited", router), ("free", router.replace(num_expert_groups=None, num_limited_groups=None))):
        mesh = layout if name == "limited" else layout.replace(groups_per_node=None)
        asked = demand([(s, route(logits[s], spec).expert_ids_TK) for s in range(64)], mesh, spec)[0]
        for strategy in ("all_to_all", "node_dedup"):
            found = counted_traffic(asked, mesh.replace(strategy=strategy), spec)
            per_token[name, strategy] = found.out.across / 512
        if name == "limited":
            assert (asked.tokens_SM.sum(axis=1) <= 4 * 8).all()
    # 7 in 8 of the 8 rows go to another node, limit or not. A token has at most 4 nodes, or 5.25 on average.
    assert per_token["limited", "all_to_all"] == pytest.approx(7, abs=0.15)
    assert per_token["free", "all_to_all"] == pytest.approx(7, abs=0.15)
    assert per_token["limited", "node_dedup"] <= 4
    assert per_token["free", "node_dedup"] == pytest.approx(8 * (1 - (7 / 8) ** 8) * 7 / 8, abs=0.15)


def test_thousands_of_ranks_are_counted():
    router = RouterSpec(num_experts=2048, top_k=2)
    layout = ShardLayout(expert=2048, ranks_per_node=8, strategy="node_dedup")
    asked = demand([(s, np.array([[s, 2047 - s]])) for s in range(2048)], layout, router)[0]
    found = counted_traffic(asked, layout, router)
    # Each token has one expert where it is, and one on the mirrored node.
    assert (found.out.on_rank, found.out.across) == (2 * 2048, 2048)
    assert found.out.inside == 2048


def test_blocks_that_fit_no_shard_or_router_are_an_error():
    layout = ShardLayout(expert=2)
    with pytest.raises(ValueError, match=r"shard is 2; it is an integer between 0 and 1 \(num_token_shards\)"):
        demand([(2, np.zeros((1, 2), int))], layout, TWO)
    with pytest.raises(ValueError, match=r"expert_ids has shape \(1, 3\); it is \(any, 2\)"):
        demand([(0, np.zeros((1, 3), int))], layout, TWO)
    with pytest.raises(ValueError, match="expert is 3, which does not divide"):
        demand([], ShardLayout(expert=3), TWO)
