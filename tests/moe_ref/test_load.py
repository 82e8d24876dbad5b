"""moe_ref, tests of counts, of load statistics and of the bias update."""

import numpy as np
import pytest
from load_cases import E, K, T, routed

from moe_ref import (
    BiasUpdateSpec,
    RouterInputs,
    RouterSpec,
    ShardLayout,
    bias_update,
    load_statistics,
    route,
    tokens_per_expert,
)
from moe_ref.specs.ids import UNUSED

LOGITS_TE, IDS_TK, _ = routed()

# counts


def test_a_count_is_of_slots_of_valid_tokens_and_of_experts_alone():
    ids_TK = np.array([[0, 2], [2, UNUSED], [4, 5], [2, 1]])
    np.testing.assert_array_equal(tokens_per_expert(ids_TK, 4), [1, 1, 3, 0])
    np.testing.assert_array_equal(tokens_per_expert(ids_TK, 6), [1, 1, 3, 0, 1, 1])
    mask_T = np.array([True, False, True, False])
    np.testing.assert_array_equal(tokens_per_expert(ids_TK, 4, mask_T), [1, 0, 1, 0])
    np.testing.assert_array_equal(tokens_per_expert(np.zeros((0, 2), int), 3), [0, 0, 0])


def test_every_slot_is_counted_not_the_first_choice_alone():
    # deepspeedai/DeepSpeed#2559
    assert tokens_per_expert(IDS_TK, E).sum() == T * K


def test_the_count_of_a_batch_is_the_sum_of_the_counts_of_its_parts():
    parts = [tokens_per_expert(part, E) for part in np.split(IDS_TK, [2, 2, 9])]
    np.testing.assert_array_equal(sum(parts), tokens_per_expert(IDS_TK, E))


# statistics


def test_statistics_of_a_known_load():
    found = load_statistics(np.array([6, 0, 2, 4]), num_ranks=2)
    assert (found.total, found.mean, found.largest, found.smallest, found.num_empty) == (12, 3.0, 6, 0, 1)
    assert found.max_over_mean == 2
    np.testing.assert_array_equal(found.rows_of_rank_S, [6, 6])
    assert found.required_buffer_factor == 1
    moved = load_statistics(np.array([6, 0, 2, 4]), num_ranks=2, placement=(0, 3, 1, 2))
    np.testing.assert_array_equal(moved.rows_of_rank_S, [10, 2])
    assert moved.required_buffer_factor == pytest.approx(10 / 6)


def test_the_required_buffer_factor_is_the_smallest_that_drops_no_row():
    counts_E = np.array([5, 9, 4, 0, 6, 6])
    found = load_statistics(counts_E, num_ranks=3)
    rows = [
        ShardLayout(expert=3, strategy="ragged_all_to_all", buffer_factor=factor).buffer_rows(15, 6, 2)
        for factor in (found.required_buffer_factor, found.required_buffer_factor - 0.11)
    ]
    assert rows == [found.rows_of_rank_S.max(), found.rows_of_rank_S.max() - 1]


def test_statistics_without_tokens_are_0_and_of_a_collapse_are_e():
    nothing = load_statistics(np.zeros(4, int), num_ranks=4)
    assert (nothing.max_over_mean, nothing.required_buffer_factor, nothing.num_empty) == (0, 0, 4)
    collapse = load_statistics(np.array([0, 0, 5, 0]), num_ranks=4)
    assert (collapse.max_over_mean, collapse.required_buffer_factor) == (4, 4)


@pytest.mark.parametrize(
    ("counts_E", "options", "message"),
    [
        (np.ones(4), {}, "counts_E has dtype float64; it is int"),
        (np.array([1, -1]), {}, "counts are at least 0"),
        (np.arange(4), {"num_ranks": 3}, "num_ranks is 3, which does not divide 4 experts"),
        (np.zeros(0, int), {}, "does not divide 0 experts"),
        (np.arange(4), {"placement": (0, 1, 1, 2)}, "it has each expert id once"),
    ],
)
def test_wrong_loads_are_refused(counts_E, options, message):
    with pytest.raises(ValueError, match=message):
        load_statistics(counts_E, **options)


# bias update

COUNTS_E = np.array([3, 9, 4, 8, 6, 6, 6])


def test_the_bias_of_a_light_expert_rises_by_the_rate_and_that_of_a_heavy_one_falls():
    found = bias_update(COUNTS_E, BiasUpdateSpec(rate=0.5), np.arange(7.0))
    np.testing.assert_allclose(found - np.arange(7.0), [0.5, -0.5, 0.5, -0.5, 0, 0, 0])


def test_a_step_can_be_proportional_or_relative_to_the_excess():
    zeros_E = np.zeros(7)
    proportional = bias_update(COUNTS_E, BiasUpdateSpec(rate=0.5, rule="proportional"), zeros_E)
    np.testing.assert_allclose(proportional, 0.5 * (6 - COUNTS_E))
    relative = BiasUpdateSpec(rate=0.5, rule="relative")
    np.testing.assert_allclose(bias_update(COUNTS_E, relative, zeros_E), 0.5 * (6 - COUNTS_E) / 6)
    np.testing.assert_allclose(bias_update(10 * COUNTS_E, relative, zeros_E), 0.5 * (6 - COUNTS_E) / 6)


@pytest.mark.parametrize("rule", ["sign", "proportional", "relative"])
def test_an_even_load_and_an_empty_one_move_nothing(rule):
    for counts_E in (np.full(7, 5), np.zeros(7, int)):
        np.testing.assert_array_equal(bias_update(counts_E, BiasUpdateSpec(rule=rule), np.ones(7)), np.ones(7))


def test_a_centred_step_keeps_the_sum_of_the_biases():
    # pytorch/torchtitan: delta = rate * sign(mean - count), less its own mean.
    counts_E, bias_E = np.array([1, 1, 1, 9]), np.arange(4.0)
    found = bias_update(counts_E, BiasUpdateSpec(rate=0.1, centred=True), bias_E)
    np.testing.assert_allclose(found - bias_E, 0.1 * (np.array([1, 1, 1, -1]) - 0.5))
    assert found.sum() == pytest.approx(bias_E.sum())


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("rule", ["sign", "proportional", "relative"])
def test_a_frozen_expert_keeps_its_bias_and_is_in_no_mean(rule, centred):
    spec = BiasUpdateSpec(rate=0.1, rule=rule, centred=centred)
    frozen_E = (False, True, False, False, True, False, False)
    free_E = ~np.array(frozen_E)
    found = bias_update(COUNTS_E, spec.replace(frozen_E=frozen_E), np.ones(7))
    np.testing.assert_array_equal(found[~free_E], 1)
    np.testing.assert_array_equal(found[free_E], bias_update(COUNTS_E[free_E], spec, np.ones(5)))


def test_the_sign_is_taken_once_of_the_summed_counts():
    shards_SE = np.array([[9, 0, 3], [0, 5, 1], [0, 5, 1]])
    spec = BiasUpdateSpec(rate=1.0)
    once = bias_update(shards_SE.sum(axis=0), spec, np.zeros(3))
    each = sum(bias_update(counts_E, spec, np.zeros(3)) for counts_E in shards_SE)
    np.testing.assert_array_equal(once, [-1, -1, 1])
    assert (np.sign(each) != once).any()


def test_the_sign_of_a_huge_load_is_exact():
    # In float32 the mean of these is 16777216, and the third expert would not move.
    counts_E = np.array([2**24, 2**24, 2**24 + 1, 2**24])
    np.testing.assert_array_equal(bias_update(counts_E, BiasUpdateSpec(rate=1.0), np.zeros(4)), [1, 1, -1, 1])


@pytest.mark.parametrize("centred", [False, True])
def test_layers_do_not_influence_each_other(centred):
    # pytorch/torchtitan#3686
    counts_LE, biases_LE = np.stack([COUNTS_E, np.full(7, 4), COUNTS_E[::-1]]), np.arange(21.0).reshape(3, 7)
    spec = BiasUpdateSpec(rule="proportional", centred=centred, frozen_E=(True,) + (False,) * 6)
    found = bias_update(counts_LE, spec, biases_LE)
    for layer in range(3):
        np.testing.assert_array_equal(found[layer], bias_update(counts_LE[layer], spec, biases_LE[layer]))


def test_the_update_balances_a_skewed_router():
    rng = np.random.default_rng(0)
    spec, update, bias_E = RouterSpec(num_experts=8, top_k=2, score_func="sigmoid"), BiasUpdateSpec(rate=0.01), None
    ratios = []
    for _ in range(100):
        logits_TE = rng.standard_normal((512, 8)) + np.linspace(0, 2, 8)
        counts_E = tokens_per_expert(route(logits_TE, spec, expert_bias_E=bias_E).expert_ids_TK, 8)
        bias_E = bias_update(counts_E, update, np.zeros(8) if bias_E is None else bias_E)
        ratios.append(load_statistics(counts_E).max_over_mean)
    assert np.mean(ratios[:5]) > 1.9
    assert np.mean(ratios[-20:]) < 1.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": -0.1}, "rate is -0.1"),
        ({"rule": "signum"}, "did you mean sign"),
        ({"centred": None}, "centred is None; it is a bool"),
        ({"frozen_E": (True, 0)}, "its entries are bools"),
        ({"frozen_E": (True, True)}, "freezes every expert"),
    ],
)
def test_a_wrong_update_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BiasUpdateSpec(**changes)


def test_an_update_is_read_back_from_its_dict():
    spec = BiasUpdateSpec(rate=0.5, rule="relative", centred=True, frozen_E=(True, False))
    assert BiasUpdateSpec.from_dict(spec.to_dict()) == spec
    assert BiasUpdateSpec.from_dict({"frozen_E": [True, False]}) == BiasUpdateSpec(frozen_E=(True, False))


@pytest.mark.parametrize(
    ("counts_E", "bias_E", "message"),
    [
        (np.ones(7), np.zeros(7), "counts_E has dtype float64; it is int"),
        (-COUNTS_E, np.zeros(7), "counts are at least 0"),
        (COUNTS_E, np.zeros(6), r"expert_bias_E has shape \(6,\); it is \(7\)"),
        (COUNTS_E[:6], np.zeros(6), r"frozen_E has shape \(7,\); it is \(6\)"),
        (np.zeros((2, 2, 7), int), np.zeros((2, 2, 7)), r"counts_E has shape \(2, 2, 7\)"),
    ],
)
def test_wrong_counts_are_refused(counts_E, bias_E, message):
    with pytest.raises(ValueError, match=message):
        bias_update(counts_E, BiasUpdateSpec(frozen_E=(True,) + (False,) * 6), bias_E)


# selectors that choose without scores, and shards


def test_round_robin_of_a_shard_goes_on_where_the_shard_before_it_ended():
    spec = RouterSpec(num_experts=E, top_k=3, selector="round_robin")
    whole_TK = route(LOGITS_TE, spec).expert_ids_TK
    starts = (0, 4, 4, 11)
    parts = [
        route(LOGITS_TE[start:end], spec, inputs=RouterInputs(first_token=start)).expert_ids_TK
        for start, end in zip(starts, (*starts[1:], T), strict=True)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole_TK)
    # Without it every shard begins with expert 0, as torchtitan's forced balance does.
    assert (route(LOGITS_TE[4:], spec).expert_ids_TK != whole_TK[4:]).any()
    with pytest.raises(ValueError, match="first_token is -1"):
        route(LOGITS_TE, spec, inputs=RouterInputs(first_token=-1))


def test_a_table_gives_a_token_the_same_experts_on_every_shard():
    spec = RouterSpec(num_experts=E, top_k=K, selector="table")
    table_VK, token_ids_T = np.array([[0, 3], [6, 5], [1, 2]]), np.arange(T) % 3
    inputs = RouterInputs(table_VK=table_VK, token_ids_T=token_ids_T)
    whole_TK = route(LOGITS_TE, spec, inputs=inputs).expert_ids_TK
    part_TK = route(LOGITS_TE[7:], spec, inputs=inputs.tokens(slice(7, None))).expert_ids_TK
    np.testing.assert_array_equal(part_TK, whole_TK[7:])


def test_random_draws_differ_by_shard_when_each_has_a_seed_of_its_own():
    spec = RouterSpec(num_experts=E, top_k=K, selector="random")

    def draw(shard):
        return route(LOGITS_TE, spec, inputs=RouterInputs(seed=(7, shard))).expert_ids_TK

    drawn = [draw(shard) for shard in (0, 1, 0)]
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert (drawn[0] != drawn[1]).any()
    counts_E = sum(tokens_per_expert(draw(shard), E) for shard in range(100))
    assert load_statistics(counts_E).max_over_mean < 1.15
