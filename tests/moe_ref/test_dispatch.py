"""moe_ref, tests of the dispatch plans: every row arrives where its expert is, once, and the numbers add up."""

from collections import Counter
from itertools import permutations, product

import numpy as np
import pytest

from moe_ref import RouterSpec, ShardLayout
from moe_ref.dispatch import plan, plan_chunks
from moe_ref.strategies import STRATEGIES


def ids_of(rng, num_tokens, router, unused=0.2):
    """Distinct choices for each token, null experts among them, and some slots unused."""
    ids_TK = np.array([rng.permutation(router.num_choices)[: router.top_k] for _ in range(num_tokens)])
    ids_TK = ids_TK.reshape(num_tokens, router.top_k).astype(np.int64)
    return np.where(rng.random(ids_TK.shape) < unused, -1, ids_TK)


def random_case(strategy, seed):
    """A layout, a router and ids, all drawn."""
    rng = np.random.default_rng(seed)
    data, fsdp = rng.integers(1, 3, 2).tolist()
    expert = int(rng.choice([1, 2, 3, 4, 6]))
    num_experts = expert * int(rng.integers(1, 4))
    router = RouterSpec(num_experts=num_experts, top_k=int(rng.integers(1, min(4, num_experts) + 1)),
                        num_null_experts=int(rng.integers(0, 3)))  # fmt: skip
    has_buffer = STRATEGIES[strategy].facts.has_buffer
    layout = ShardLayout(
        data=data,
        fsdp=fsdp,
        expert=expert,
        tensor=int(rng.integers(1, 3)),
        strategy=strategy,
        placement=tuple(rng.permutation(num_experts)) if rng.random() < 0.5 else None,
        ranks_per_node=int(rng.choice([n for n in range(1, expert + 1) if expert % n == 0])),
        buffer_factor=float(rng.choice([0.3, 1.0, 1.2])) if has_buffer and seed % 3 else None,
    )
    tokens = rng.choice([0, 1, 2, 3, 5, 7], layout.num_token_shards)
    return layout, router, [ids_of(rng, T, router) for T in tokens]


def groups(plans, layout):
    """The plans of each rank group."""
    return [plans[i : i + layout.expert] for i in range(0, len(plans), layout.expert)]


def wanted_at(e, group, layout, router, ids_by_shard):
    """Every (source, slot) whose expert rank e of a group owns, in the order of admission: by source, place and slot;
    the ring has them all, and keeps them by place, source and slot."""
    shards = [ids_by_shard[shard] for shard in layout.shards_of_group(group)]
    found = []
    for source, ids_TK in enumerate(shards):
        for slot, expert_id in enumerate(ids_TK.reshape(-1)):
            if 0 <= expert_id < router.num_experts and layout.owner_of(expert_id, router.num_experts) == e:
                place = layout.place_of(expert_id, router.num_experts)
                found.append((e if layout.facts.shares_tokens else source, place, slot))
    by_place = layout.strategy == "ring_of_experts"
    return sorted(found, key=lambda row: (row[1], row[0], row[2]) if by_place else row)


def check_laws(plans, layout, router, ids_by_shard):
    """What holds for every plan, from the ids alone."""
    assert [(p.group, p.e) for p in plans] == list(product(range(layout.num_rank_groups), range(layout.expert)))
    for group, ranks in enumerate(groups(plans, layout)):
        check_exchange(ranks)
        if layout.facts.by_node:
            check_crossing([p.across for p in ranks], layout, group, router, ids_by_shard)
        for p in ranks:
            check_rows(p, layout, router, ids_by_shard)


def check_exchange(parts):
    """What is sent is received: sizes are transposed, rows fill each buffer without gap or overlap."""
    sends = np.array([p.send_sizes_S for p in parts])
    np.testing.assert_array_equal(sends.T, [p.recv_sizes_S for p in parts])
    for r in range(len(parts)):
        ends = np.cumsum(sends[:, r])
        np.testing.assert_array_equal([p.output_offsets_S[r] for p in parts], ends - sends[:, r])
    for p in parts:
        assert (p.input_offsets_S + p.send_sizes_S <= len(p.sends_N2)).all()


def delivered(parts):
    """What each rank has in its buffer when every rank has sent by its sizes and offsets."""
    buffers = [np.full((p.recv_sizes_S.sum(), 2), -9) for p in parts]
    for p in parts:
        for r, buffer in enumerate(buffers):
            begin, size, at = p.input_offsets_S[r], p.send_sizes_S[r], p.output_offsets_S[r]
            assert (buffer[at : at + size] == -9).all()
            buffer[at : at + size] = p.sends_N2[begin : begin + size]
    assert all((buffer != -9).all() for buffer in buffers)
    return buffers


def check_crossing(parts, layout, group, router, ids_by_shard):
    """A token is on each node that has experts of it exactly once, on the rank of the same position."""
    check_exchange(parts)
    landed = delivered(parts)
    for source, shard in enumerate(layout.shards_of_group(group)):
        for token, ids in enumerate(ids_by_shard[shard]):
            owners = [layout.owner_of(i, router.num_experts) for i in ids if 0 <= i < router.num_experts]
            nodes = {layout.node_of(e) for e in owners}
            at = [e for e, rows in enumerate(landed) for row in rows.tolist() if row == [source, token]]
            assert sorted(layout.node_of(e) for e in at) == sorted(nodes)
            assert all(e % layout.node_size == source % layout.node_size for e in at)


def check_rows(p, layout, router, ids_by_shard):
    """A rank works on the slots of its experts, each once, by place; what found no room is named at its source."""
    wanted = wanted_at(p.e, p.group, layout, router, ids_by_shard)
    room = 10**9 if p.buffer_rows is None else p.buffer_rows
    admitted = wanted[:room]
    assert Counter(map(tuple, p.order_R2.tolist())) == Counter((source, slot) for source, _, slot in admitted)
    assert p.overflow == len(wanted) - len(admitted)
    place_of_row = {(source, slot): place for source, place, slot in admitted}
    places = [place_of_row[row] for row in map(tuple, p.order_R2.tolist())]
    assert places == sorted(places)
    first = p.e * router.num_experts // layout.expert
    assert p.group_sizes_e.tolist() == [places.count(first + i) for i in range(router.num_experts // layout.expert)]
    if not layout.facts.by_node:
        # Rows of one expert are in the order of source and slot.
        by_place = sorted((place, source, slot) for source, place, slot in admitted)
        assert p.order_R2.tolist() == [[source, slot] for _, source, slot in by_place]
    refused = [
        slot
        for e in range(layout.expert)
        for source, _, slot in wanted_at(e, p.group, layout, router, ids_by_shard)[room:]
        if source == p.e
    ]
    assert p.dropped_slots_N.tolist() == sorted(refused)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("seed", range(25))
def test_every_row_is_where_its_expert_is_exactly_once(strategy, seed):
    layout, router, ids_by_shard = random_case(strategy, seed)
    check_laws(plan(ids_by_shard, layout, router), layout, router, ids_by_shard)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("seed", range(10))
def test_arrival_says_where_each_row_lies_in_what_came(strategy, seed):
    layout, router, ids_by_shard = random_case(strategy, 100 + seed)
    for group, ranks in enumerate(groups(plan(ids_by_shard, layout, router), layout)):
        for p, buffer in zip(ranks, delivered(ranks), strict=True):
            if layout.facts.shares_tokens:
                tokens = p.order_R2[:, 1] // router.top_k
                np.testing.assert_array_equal(p.arrival_R, tokens)
            elif layout.strategy == "ring_of_experts":
                np.testing.assert_array_equal(buffer[p.arrival_R], p.order_R2 // [1, router.top_k])
                sizes = [len(ids_by_shard[shard]) for shard in layout.shards_of_group(group)]
                assert p.recv_sizes_S.tolist() == sizes
            else:
                np.testing.assert_array_equal(buffer[p.arrival_R], p.order_R2)
                assert sorted(p.arrival_R.tolist()) == list(range(len(buffer)))


def assignments(top_k, num_choices):
    """Every choice of a token: distinct ids in every order, and unused slots."""
    ids = [-1] * top_k + list(range(num_choices))
    return sorted(set(permutations(ids, top_k)))


@pytest.mark.parametrize(("tokens", "num_experts", "top_k", "num_null"), [
    ((2, 1), 2, 1, 1), ((1, 1), 2, 2, 0), ((1, 1), 4, 2, 0), ((2, 1, 1), 3, 1, 0), ((1, 0, 1), 3, 2, 1),
    ((1, 1, 1), 3, 2, 0),
])  # fmt: skip
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_assignment_of_a_few_tokens_to_a_few_experts_obeys_the_laws(
    strategy, tokens, num_experts, top_k, num_null
):
    """All of them: for one expert per rank or two, one or two slots, two and three ranks, with and without a buffer."""
    router = RouterSpec(num_experts=num_experts, top_k=top_k, num_null_experts=num_null)
    shards = (sum(tokens),) if STRATEGIES[strategy].facts.shares_tokens else tokens
    layout = ShardLayout(expert=len(tokens), strategy=strategy, ranks_per_node=1)
    layouts = [layout]
    if layout.facts.has_buffer:
        layouts = [layout, layout.replace(buffer_factor=0.5)]
    ends = np.cumsum(shards)[:-1]
    for chosen in product(assignments(top_k, router.num_choices), repeat=sum(tokens)):
        ids_by_shard = np.split(np.array(chosen), ends)
        for each in layouts:
            check_laws(plan(ids_by_shard, each, router), each, router, ids_by_shard)


TWO_RANKS = [np.array([[0, 3], [2, 1], [2, 3]]), np.array([[3, 2]])]
"""Four experts on two ranks; three tokens and one."""
TWO = RouterSpec(num_experts=4, top_k=2)


def test_an_all_to_all_by_hand():
    first, second = plan(TWO_RANKS, ShardLayout(expert=2), TWO)
    assert first.sends_N2.tolist() == [[0, 0], [0, 3], [0, 2], [0, 4], [0, 1], [0, 5]]
    assert (first.send_sizes_S.tolist(), first.recv_sizes_S.tolist()) == ([2, 4], [2, 0])
    assert (first.input_offsets_S.tolist(), first.output_offsets_S.tolist()) == ([0, 2], [0, 0])
    assert (second.send_sizes_S.tolist(), second.recv_sizes_S.tolist()) == ([0, 2], [4, 2])
    assert (second.input_offsets_S.tolist(), second.output_offsets_S.tolist()) == ([0, 0], [2, 4])
    assert first.order_R2.tolist() == [[0, 0], [0, 3]]
    assert second.order_R2.tolist() == [[0, 2], [0, 4], [1, 1], [0, 1], [0, 5], [1, 0]]
    assert second.arrival_R.tolist() == [0, 1, 4, 2, 3, 5]
    assert (first.group_sizes_e.tolist(), second.group_sizes_e.tolist()) == ([1, 1], [3, 3])


def test_a_full_buffer_admits_sources_in_rank_order_and_drops_the_rest():
    layout = ShardLayout(expert=2, strategy="ragged_all_to_all", buffer_factor=0.75)
    first, second = plan(TWO_RANKS, layout, TWO)
    # Balanced load is 4 rows; there is room for 3. Rank 1 wants slots 2, 4, 1, 5 of rank 0, then 1, 0 of its own.
    assert (first.buffer_rows, second.buffer_rows) == (3, 3)
    assert (first.overflow, second.overflow) == (0, 3)
    assert (first.dropped_slots_N.tolist(), second.dropped_slots_N.tolist()) == ([5], [0, 1])
    assert (first.send_sizes_S.tolist(), second.send_sizes_S.tolist()) == ([2, 3], [0, 0])
    assert first.input_offsets_S.tolist() == [0, 2]
    assert second.order_R2.tolist() == [[0, 2], [0, 4], [0, 1]]


def test_a_full_buffer_of_the_ring_keeps_the_rows_of_the_first_experts():
    layout = ShardLayout(expert=2, strategy="ring_of_experts", buffer_factor=0.75)
    first, second = plan(TWO_RANKS, layout, TWO)
    # Rank 1 picks slots 2, 4 and 1 (of rank 1) for expert 2, then 1, 5 and 0 (of rank 1) for expert 3.
    assert (first.buffer_rows, second.buffer_rows) == (3, 3)
    assert second.order_R2.tolist() == [[0, 2], [0, 4], [1, 1]]
    assert (first.group_sizes_e.tolist(), second.group_sizes_e.tolist()) == ([1, 1], [3, 0])
    assert (first.overflow, second.overflow) == (0, 3)
    assert (first.dropped_slots_N.tolist(), second.dropped_slots_N.tolist()) == ([1, 5], [0])
    assert (first.send_sizes_S.tolist(), second.send_sizes_S.tolist()) == ([3, 3], [1, 1])


def test_rows_of_a_replicated_batch_come_back_behind_those_of_the_ranks_before():
    layout = ShardLayout(expert=2, strategy="replicated_ragged")
    first, second = plan([np.array([[0, 3], [2, 1], [2, -1]])], layout, TWO)
    # Rank 0 has experts 0 and 1: slots 0 and 3. Rank 1 has slots 2 and 4 of expert 2, and slot 1 of expert 3.
    assert first.sends_N2.tolist() == first.order_R2.tolist() == [[0, 0], [0, 3]]
    assert second.sends_N2.tolist() == second.order_R2.tolist() == [[1, 2], [1, 4], [1, 1]]
    for each, sent, begin in ((first, 2, 0), (second, 3, 2)):
        assert (each.send_sizes_S.tolist(), each.recv_sizes_S.tolist()) == ([sent, sent], [2, 3])
        assert (each.input_offsets_S.tolist(), each.output_offsets_S.tolist()) == ([0, 0], [begin, begin])
    # In each buffer: all rows by place, as one rank alone sorts them.
    assert [buffer[:, 1].tolist() for buffer in delivered([first, second])] == [[0, 3, 2, 4, 1]] * 2


def test_one_token_with_two_experts_on_a_far_node_crosses_once():
    layout = ShardLayout(expert=4, ranks_per_node=2, strategy="node_dedup")
    ids = [np.zeros((0, 2), int), np.array([[3, 2]]), np.zeros((0, 2), int), np.zeros((0, 2), int)]
    plans = plan(ids, layout, TWO)
    assert [p.across.send_sizes_S.tolist() for p in plans if p.across] == [[0] * 4, [0, 0, 0, 1], [0] * 4, [0] * 4]
    # It lands on rank 3, which sends one row to rank 2 and keeps one.
    assert [p.send_sizes_S.tolist() for p in plans] == [[0] * 4, [0] * 4, [0] * 4, [0, 0, 1, 1]]
    assert [p.order_R2.tolist() for p in plans] == [[], [], [[1, 1]], [[1, 0]]]
    direct = plan(ids, layout.replace(strategy="all_to_all"), TWO)
    assert direct[1].send_sizes_S.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_rank_works_on_every_row_in_the_order_of_permute(strategy):
    from moe_ref.permute import permute

    router = RouterSpec(num_experts=5, top_k=3, num_null_experts=2)
    ids_TK = ids_of(np.random.default_rng(0), 7, router)
    (only,) = plan([ids_TK], ShardLayout(strategy=strategy), router)
    whole = permute(ids_TK, 5)
    np.testing.assert_array_equal(only.order_R2, np.stack([0 * whole.order_N, whole.order_N], axis=1))
    np.testing.assert_array_equal(only.group_sizes_e, whole.tokens_per_expert_E)


def test_chunks_plan_the_tokens_of_each_chunk_and_together_all():
    router = RouterSpec(num_experts=6, top_k=2)
    layout = ShardLayout(expert=2, num_token_chunks=3)
    ids_by_shard = [ids_of(np.random.default_rng(1), T, router) for T in (5, 2)]
    chunks = plan_chunks(ids_by_shard, layout, router)
    whole = plan(ids_by_shard, layout.replace(num_token_chunks=1), router)
    for e in range(2):
        np.testing.assert_array_equal(sum(chunk[e].group_sizes_e for chunk in chunks), whole[e].group_sizes_e)
    first = plan([ids_by_shard[0][:2], ids_by_shard[1][:1]], layout.replace(num_token_chunks=1), router)
    np.testing.assert_array_equal(chunks[0][1].order_R2, first[1].order_R2)


@pytest.mark.parametrize(("ids", "fields", "message"), [
    ([[[0, 1]]], {}, "expert_ids_by_shard has 1 entries; the layout has 2 token shards"),
    ([[[0, 1]], [[0]]], {}, r"expert_ids_by_shard\[1\] has shape \(1, 1\); it is \(any, 2\)"),
    ([[[0, 1]], [[0.0, 1.0]]], {}, r"expert_ids_by_shard\[1\] has dtype float64; it is int"),
    ([[[0, 4]], [[0, 1]]], {}, r"expert_ids_by_shard\[0\]\[0, 1\] is 4; ids are -1, or at least 0 and less than 4"),
    ([[[0, -2]], [[0, 1]]], {}, r"expert_ids_by_shard\[0\]\[0, 1\] is -2; ids are -1"),
    ([[[1, 1]], [[0, 1]]], {}, r"expert_ids_by_shard\[0\]\[0\] is \[1, 1\]; the experts of a token are distinct"),
    ([[[0, 1]], [[0, 1]]], {"num_token_chunks": 2}, "num_token_chunks is 2; plan is for one exchange"),
    ([[[0, 1]], [[0, 1]]], {"placement": (0,)}, "placement has 1 entries; num_experts is 4"),
])  # fmt: skip
def test_ids_that_fit_neither_layout_nor_router_are_an_error(ids, fields, message):
    layout = ShardLayout(expert=2, **fields)
    with pytest.raises(ValueError, match=message):
        plan([np.array(one) for one in ids], layout, TWO)
