"""moe_ref, tests of the layout: who is where, who owns what, and every error."""

import json

import numpy as np
import pytest

from moe_ref import STRATEGIES, ExpertSpec, LayerSpec, RouterSpec, ShardLayout
from moe_ref.specs.layout import STRATEGY_FACTS

ROUTER = RouterSpec(num_experts=8, top_k=3)
GROUPED = RouterSpec(num_experts=8, top_k=2, num_expert_groups=4, num_limited_groups=2)
LAYER = LayerSpec(router=ROUTER, experts=ExpertSpec(dim=6, hidden_dim=4))


def test_ranks_are_numbered_data_first_and_tensor_last():
    mesh = ShardLayout(data=2, fsdp=3, expert=4, tensor=5)
    everyone = [(d, f, e, t) for d in range(2) for f in range(3) for e in range(4) for t in range(5)]
    assert [mesh.rank(*at) for at in everyone] == list(range(mesh.num_ranks)) == list(range(120))
    assert [mesh.coordinates(rank) for rank in range(120)] == everyone


def test_tensor_ranks_share_a_token_shard_and_replicated_ranks_too():
    mesh = ShardLayout(data=2, fsdp=3, expert=4, tensor=5)
    assert [mesh.shard_of(rank) for rank in range(120)] == [rank // 5 for rank in range(120)]
    assert list(mesh.shards_of_group(1)) == [4, 5, 6, 7]
    replicated = ShardLayout(data=2, fsdp=3, expert=4, tensor=5, strategy="replicated")
    assert [replicated.shard_of(rank) for rank in range(120)] == [rank // 20 for rank in range(120)]
    assert [replicated.group_of(rank) for rank in range(120)] == [rank // 20 for rank in range(120)]
    assert list(replicated.shards_of_group(1)) == [1]


def test_an_expert_is_owned_by_the_rank_of_its_place():
    mesh = ShardLayout(expert=4, placement=(7, 0, 1, 2, 3, 4, 5, 6), ranks_per_node=2)
    assert [mesh.experts_of(e, 8) for e in range(4)] == [(7, 0), (1, 2), (3, 4), (5, 6)]
    assert [mesh.experts_of_node(node, 8) for node in range(2)] == [(7, 0, 1, 2), (3, 4, 5, 6)]
    for expert_id in range(8):
        assert expert_id in mesh.experts_of(mesh.owner_of(expert_id, 8), 8)
    assert [mesh.place_of(expert_id, 8) for expert_id in range(8)] == [1, 2, 3, 4, 5, 6, 7, 0]
    contiguous = mesh.replace(placement=None)
    assert [contiguous.owner_of(expert_id, 8) for expert_id in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_nodes_are_runs_of_the_expert_axis():
    assert [ShardLayout(expert=4, ranks_per_node=2).node_of(e) for e in range(4)] == [0, 0, 1, 1]
    assert ShardLayout(expert=4).num_nodes == 1
    assert ShardLayout(expert=4, ranks_per_node=1).num_nodes == 4


def test_chunks_are_as_even_as_can_be():
    mesh = ShardLayout(expert=2, num_token_chunks=3)
    assert (mesh.chunk_sizes(7), mesh.chunk_sizes(2)) == ((3, 2, 2), (1, 1, 0))
    assert mesh.chunks(7) == [slice(0, 3), slice(3, 5), slice(5, 7)]
    assert mesh.chunks(2) == [slice(0, 1), slice(1, 2), slice(2, 2)]


@pytest.mark.parametrize(("factor", "rows"), [
    (None, 10 * 3), (0.01, 1), (1.0, 8), (1.1, 9), (2.0, 15), (4.0, 30), (1e9, 30), (1e-9, 1), (1, 8),
])  # fmt: skip
def test_a_buffer_has_room_for_a_multiple_of_balanced_load_and_never_more_than_the_worst_case(factor, rows):
    mesh = ShardLayout(expert=4, strategy="ragged_all_to_all", buffer_factor=factor)
    # 10 tokens of 3 slots over 4 ranks: 7.5 rows each in balance; a token has at most 3 of a rank's 4 experts.
    assert mesh.buffer_rows(10, 16, 3) == rows


def test_the_factor_of_a_buffer_is_the_decimal_number_that_it_prints_as():
    mesh = ShardLayout(expert=2, strategy="ragged_all_to_all", buffer_factor=1.1)
    # 1.1 * 10 is 11.000000000000002 in binary.
    assert mesh.buffer_rows(20, 2, 1) == 11


@pytest.mark.parametrize(("E", "K", "ep"), [(8, 2, 4), (8, 6, 4), (8, 2, 8), (256, 8, 64), (4, 4, 1)])
def test_the_worst_case_is_balanced_load_times_the_smaller_of_ranks_and_experts_per_choice(E, K, ep):
    worst = ShardLayout(expert=ep, strategy="ragged_all_to_all").buffer_rows(12 * ep, E, K)
    assert worst == 12 * K * min(ep, E / K)


def test_a_layout_is_read_from_what_it_writes():
    for mesh in (
        ShardLayout(),
        ShardLayout(data=2, expert=4, ranks_per_node=2, groups_per_node=2, placement=np.arange(8)[::-1]),
        ShardLayout(fsdp=2, tensor=2, strategy="replicated", num_token_chunks=2, num_emb_chunks=3),
        ShardLayout(expert=2, strategy="ragged_all_to_all", buffer_factor=1.5),
    ):
        assert ShardLayout.from_dict(json.loads(json.dumps(mesh.to_dict()))) == mesh
    assert ShardLayout().to_dict() == {}


def test_groups_that_lie_on_whole_nodes_are_accepted():
    ShardLayout(expert=4, ranks_per_node=2, groups_per_node=2).check(GROUPED)
    # Groups 0 and 2 on the first node.
    placed = ShardLayout(expert=4, ranks_per_node=2, groups_per_node=2, placement=(0, 1, 4, 5, 2, 3, 6, 7))
    placed.check(GROUPED)


@pytest.mark.parametrize(("fields", "message"), [
    ({"data": 0}, "data is 0; it is an integer at least 1"),
    ({"fsdp": 1.5}, "fsdp is 1.5; it is an integer at least 1"),
    ({"expert": -1}, "expert is -1; it is an integer at least 1"),
    ({"tensor": True}, "tensor is True; it is an integer at least 1"),
    ({"num_token_chunks": 0}, "num_token_chunks is 0; it is an integer at least 1"),
    ({"num_emb_chunks": 0}, "num_emb_chunks is 0; it is an integer at least 1"),
    ({"strategy": "all2all"}, r"strategy is 'all2all', .* \(did you mean all_to_all\?\)"),
    ({"placement": (0, -1)}, r"placement\[1\] is -1; it is an integer at least 0"),
    ({"placement": "01"}, "placement is '01'; it is a tuple"),
    ({"placement": (0, 1, 1, 2)}, r"placement is \(0, 1, 1, 2\); it has each of 0 .. 3 once"),
    ({"ranks_per_node": 0}, "ranks_per_node is 0; it is an integer between 1 and 4"),
    ({"ranks_per_node": 3}, r"ranks_per_node is 3, which does not divide the expert axis \(4\)"),
    ({"groups_per_node": 0}, "groups_per_node is 0; it is an integer at least 1"),
    ({"buffer_factor": 1.0}, "buffer_factor is 1.0 with strategy 'all_to_all'; it is of 'ragged_all_to_all', "),
    ({"buffer_factor": 0.0, "strategy": "ragged_all_to_all"}, "buffer_factor is 0.0; .* greater than 0.0"),
    ({"buffer_factor": np.inf, "strategy": "ragged_all_to_all"}, "buffer_factor is inf; it is a finite number"),
])  # fmt: skip
def test_a_wrong_layout_is_an_error_that_names_field_value_and_bound(fields, message):
    with pytest.raises(ValueError, match=message):
        ShardLayout(**{"expert": 4} | fields)


def test_an_unknown_field_is_an_error():
    with pytest.raises(ValueError, match=r"unknown field 'experts' of ShardLayout \(did you mean expert\?\)"):
        ShardLayout.from_dict({"experts": 1})


@pytest.mark.parametrize(("fields", "spec", "message"), [
    ({"expert": 16}, ROUTER, "expert is 16; it is an integer between 1 and 8"),
    ({"expert": 3}, ROUTER, r"expert is 3, which does not divide num_experts \(8\)"),
    ({"placement": (1, 0)}, ROUTER, "placement has 2 entries; num_experts is 8"),
    ({"tensor": 3}, LAYER, r"tensor is 3, which does not divide hidden_dim \(4\)"),
    ({"num_emb_chunks": 4}, LAYER, r"num_emb_chunks is 4, which does not divide dim \(6\)"),
    ({"groups_per_node": 1}, ROUTER, "groups_per_node is 1, but num_expert_groups of the router is None"),
    ({"groups_per_node": 3}, GROUPED, "groups_per_node is 3; 1 nodes of that many groups are not the router's 4"),
    ({"expert": 8, "ranks_per_node": 1, "groups_per_node": 1}, GROUPED, "8 nodes of that many groups are not"),
    ({"expert": 4, "ranks_per_node": 2, "groups_per_node": 2, "placement": (0, 2, 4, 6, 1, 3, 5, 7)}, GROUPED,
     "groups_per_node is 2, but group 0 straddles nodes: expert 0 is on node 0, expert 1 on node 1"),
])  # fmt: skip
def test_a_layout_that_does_not_fit_the_layer_is_an_error(fields, spec, message):
    mesh = ShardLayout(**fields)
    with pytest.raises(ValueError, match=message):
        mesh.check(spec)


def test_a_layer_that_fits_is_accepted():
    ShardLayout(expert=4, tensor=2, num_emb_chunks=3).check(LAYER)


@pytest.mark.parametrize(("call", "message"), [
    (lambda mesh: mesh.coordinates(4), "rank is 4; it is an integer between 0 and 3"),
    (lambda mesh: mesh.experts_of(4, 8), r"e is 4; it is an integer between 0 and 3 \(the expert axis\)"),
    (lambda mesh: mesh.experts_of_node(1, 8), r"node is 1; it is an integer between 0 and 0 \(num_nodes\)"),
])  # fmt: skip
def test_a_rank_expert_or_node_that_is_not_there_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(ShardLayout(expert=4))


def test_every_strategy_has_facts_and_an_object_in_the_same_order():
    assert list(STRATEGIES) == list(STRATEGY_FACTS)
    for name, facts in STRATEGY_FACTS.items():
        assert STRATEGIES[name].facts is ShardLayout(strategy=name).facts is facts
        assert facts.partial_sums in ("one", "rank", "node")
