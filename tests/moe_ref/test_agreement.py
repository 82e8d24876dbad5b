"""tests of moe_ref, agreement: what two records of the same tokens have in common."""

import numpy as np
import pytest

from moe_ref import RouterSpec, RoutingRecord, agreement, capture, route

SPEC = RouterSpec(num_experts=6, top_k=3)


def record(ids, weights=None, *, mask=None, spec=SPEC) -> RoutingRecord:
    ids_TK = np.array(ids, dtype=np.int64).reshape(-1, spec.top_k)
    weights_TK = None if weights is None else np.array(weights, np.float32).reshape(ids_TK.shape)
    return RoutingRecord.of_choice(ids_TK, weights_TK, spec, token_mask_T=mask)


def routed(logits_TE, spec=SPEC) -> RoutingRecord:
    return capture(route(logits_TE, spec), spec)


def test_a_record_agrees_with_itself_in_any_order_of_slots():
    one = routed(np.random.default_rng(0).normal(size=(9, 6)))
    order = np.random.default_rng(1).permuted(np.tile(np.arange(3), (9, 1)), axis=-1)
    take = np.take_along_axis
    other = record(take(one.expert_ids_TK, order, 1), take(one.weights_TK, order, 1))
    found = agreement(one, other)
    assert found.mean_overlap == 3
    assert found.overlap_rate == 1
    assert found.set_mismatch_rate == found.weight_mismatch_rate == found.mean_moved_weight == 0


def test_sets_and_weights_are_counted_by_hand():
    one = record([[0, 1, 2], [3, 4, 5]], [[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    other = record([[2, 0, 4], [5, 3, 4]], [[0.2, 0.5, 0.3], [0.2, 0.4, 0.4]])
    found = agreement(one, other)
    np.testing.assert_array_equal(found.overlap_T, [2, 3])
    np.testing.assert_array_equal(found.sets_differ_T, [True, False])
    np.testing.assert_array_equal(found.weights_differ_T, [True, True])
    np.testing.assert_allclose(found.moved_weight_T, [0.3, 0.1], rtol=1e-6)
    assert found.mean_overlap == 2.5
    assert found.overlap_rate == 5 / 6
    assert found.set_mismatch_rate == 0.5
    assert found.weight_mismatch_rate == 1


def test_padding_and_slots_that_are_unused_in_both_do_not_count():
    mask = np.array([True, False, True, True])
    one = record([[0, 1, -1], [-1, -1, -1], [-1, -1, -1], [0, 1, 2]], mask=mask)
    other = record([[1, -1, 0], [-1, -1, -1], [-1, -1, -1], [0, -1, -1]], mask=mask)
    found = agreement(one, other)
    assert found.num_tokens == 2
    np.testing.assert_array_equal(found.size_T, [2, 0, 0, 3])
    np.testing.assert_array_equal(found.overlap_T, [2, 0, 0, 1])
    assert found.set_mismatch_rate == 0.5
    assert found.weight_mismatch_rate is None
    assert found.mean_moved_weight is None


def test_an_unused_slot_is_no_expert_0():
    one, other = record([[1, 2, -1]], [[0.5, 0.5, 0]]), record([[1, 2, 0]], [[0.5, 0.5, 0]])
    found = agreement(one, other)
    assert found.overlap_T == 2
    assert found.sets_differ_T
    assert found.weights_differ_T
    assert found.moved_weight_T == 0


def test_two_sizes_of_top_k_are_compared():
    logits_TE = np.random.default_rng(0).normal(size=(5, 6))
    found = agreement(routed(logits_TE), routed(logits_TE, SPEC.replace(top_k=2)))
    assert found.mean_overlap == 2
    assert found.overlap_rate == pytest.approx(2 / 3)


def test_a_small_change_of_logits_moves_little_weight():
    rng = np.random.default_rng(0)
    logits_TE = rng.normal(size=(400, 6))
    found = [agreement(routed(logits_TE), routed(logits_TE + rng.normal(0, size, (400, 6)))) for size in (1e-3, 0.3)]
    assert found[0].set_mismatch_rate < 0.02 < found[1].set_mismatch_rate
    assert found[0].mean_moved_weight < 1e-2 < found[1].mean_moved_weight


def test_no_token_has_no_rate():
    found = agreement(record([]), record([]))
    assert found.num_tokens == 0
    assert np.isnan([found.mean_overlap, found.overlap_rate, found.set_mismatch_rate]).all()


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (record([[0, 1, 2]] * 2), "other has 2 tokens; one has 1"),
        (record([[0, 1, 2]], spec=SPEC.replace(num_experts=7)), "num_choices of other is 7; that of one is 6"),
        (record([[-1, -1, -1]], mask=np.array([False])), "token_mask_T differs in 1 tokens"),
    ],
)
def test_records_of_other_tokens_are_refused(other, text):
    with pytest.raises(ValueError, match=text):
        agreement(record([[0, 1, 2]]), other)
    with pytest.raises(ValueError, match="tolerance is -1"):
        agreement(other, other, tolerance=-1)
