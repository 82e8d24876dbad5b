"""moe_ref, routing: worked examples by hand, and every error by its text."""

from typing import Any

import numpy as np
import pytest

from moe_ref import UNUSED, RouterInputs, RouterSpec, gate, route

DEEPSEEK = RouterSpec(
    num_experts=8,
    top_k=2,
    score_func="sigmoid",
    num_expert_groups=4,
    num_limited_groups=2,
    route_norm=True,
    route_scale=2.5,
)


def spec(**fields) -> RouterSpec:
    values: dict[str, Any] = {"num_experts": 4, "top_k": 2} | fields
    return RouterSpec(**values)


def test_softmax_weights_are_the_scores_of_the_two_best():
    trace = route(np.log([[1.0, 4.0, 2.0, 3.0]]), spec())
    assert trace.expert_ids_TK.tolist() == [[1, 3]]
    np.testing.assert_allclose(trace.weights_TK, [[0.4, 0.3]], rtol=1e-15)


def test_group_scores_are_the_sums_of_the_two_best():
    logits_TE = np.array([[9.0, -9.0, 1.0, 1.0, 2.0, -9.0, 0.0, 0.0]])
    trace = route(logits_TE, DEEPSEEK.replace(select_by="logit"))
    assert trace.group_scores_TG.tolist() == [[0.0, 2.0, -7.0, 0.0]]
    assert trace.group_ids_TL.tolist() == [[1, 0]]
    assert trace.expert_ids_TK.tolist() == [[0, 2]]


def test_negative_choice_scores_never_let_a_dropped_group_win():
    bias_E = np.full(8, -3.0)
    trace = route(np.arange(8.0)[None], DEEPSEEK, expert_bias_E=bias_E)
    assert trace.expert_ids_TK.tolist() == [[7, 6]]
    assert np.isneginf(trace.scores_for_choice_TE[0, :4]).all()


def test_ties_go_to_the_lower_group_and_the_lower_expert():
    trace = route(np.zeros((1, 8)), DEEPSEEK)
    assert trace.group_ids_TL.tolist() == [[0, 1]]
    assert trace.expert_ids_TK.tolist() == [[0, 1]]


def test_the_bias_chooses_and_does_not_weigh():
    trace = route(np.zeros((1, 4)), spec(score_func="sigmoid"), expert_bias_E=np.array([0.0, 0.0, 0.0, 1.0]))
    assert trace.expert_ids_TK.tolist() == [[3, 0]]
    assert trace.weights_TK.tolist() == [[0.5, 0.5]]


def test_a_filled_zero_is_chosen_before_a_negative_score_and_weighs_zero_after_the_fill():
    fields = {"mask_fill": 0.0, "num_expert_groups": 2, "num_limited_groups": 1, "score_func": "sigmoid"}
    bias_E = np.array([-5.0, -5.0, -9.0, -9.0])
    trace = route(np.zeros((1, 4)), spec(**fields, weights_from="masked_scores"), expert_bias_E=bias_E)
    assert trace.expert_ids_TK.tolist() == [[2, 3]]
    assert trace.weights_TK.tolist() == [[0.0, 0.0]]
    unmasked = route(np.zeros((1, 4)), spec(**fields), expert_bias_E=bias_E)
    assert unmasked.weights_TK.tolist() == [[0.5, 0.5]]


def test_softmax_over_the_selected_equals_the_normed_softmax_over_all():
    logits_TE = np.random.default_rng(0).normal(size=(5, 4))
    over_all = route(logits_TE, spec(route_norm=True))
    over_selected = route(logits_TE, spec(score_over="selected", select_by="logit"))
    assert over_selected.scores_TE is None
    np.testing.assert_allclose(over_all.weights_TK, over_selected.weights_TK, rtol=1e-14)


def test_replayed_slots_keep_their_place_and_unused_ones_weigh_nothing():
    given_ids_TK = np.array([[2, UNUSED], [UNUSED, UNUSED], [3, 0]])
    trace = route(
        np.zeros((3, 4)), spec(selector="given", route_norm=True), inputs=RouterInputs(given_ids_TK=given_ids_TK)
    )
    assert trace.expert_ids_TK.tolist() == given_ids_TK.tolist()
    assert trace.weights_TK.tolist() == [[1.0, 0.0], [0.0, 0.0], [0.5, 0.5]]


def test_padding_rows_are_not_read():
    logits_TE = np.array([[np.nan] * 4, [0.0, 1.0, 2.0, 3.0]])
    trace = route(logits_TE, spec(), token_mask_T=np.array([False, True]))
    assert trace.expert_ids_TK.tolist() == [[UNUSED, UNUSED], [3, 2]]
    assert trace.weights_TK[0].tolist() == [0.0, 0.0]


def test_shared_experts_join_the_norm():
    joint = spec(score_func="sigmoid", num_scored_shared_experts=1, route_norm=True, norm_with_shared=True)
    trace = route(np.zeros((1, 5)), joint)
    np.testing.assert_allclose(trace.weights_TK, [[1 / 3, 1 / 3]])
    np.testing.assert_allclose(trace.shared_weights_TS, [[1 / 3]])


def test_scores_of_zero_give_weights_of_zero():
    trace = route(np.array([[-2000.0, -2001.0, -2002.0, -2003.0]]), spec(score_func="sigmoid", route_norm=True))
    assert trace.weights_TK.tolist() == [[0.0, 0.0]]


def test_random_draws_repeat_with_their_seed():
    logits_TE = np.zeros((20, 4))
    drawing = spec(selector="random")
    first, second, other = (
        route(logits_TE, drawing, inputs=RouterInputs(seed=seed)).expert_ids_TK for seed in (1, 1, 2)
    )
    assert (first == second).all()
    assert (first != other).any()


def test_the_gate_adds_its_bias_to_the_logits():
    logits_TE = gate(np.array([[1.0, 2.0]]), np.array([[3.0, 4.0], [5.0, 6.0]]), np.array([0.5, -0.5]))
    assert logits_TE.tolist() == [[11.5, 16.5]]


def test_a_spec_survives_its_dictionary():
    for found in (DEEPSEEK, spec(num_expert_groups=2, num_limited_groups=1, mask_fill=0.0)):
        assert RouterSpec.from_dict(found.to_dict()) == found


def test_names_of_other_frameworks_are_understood():
    theirs = {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "scoring_func": "sigmoid",
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    }
    assert RouterSpec.from_dict(theirs) == DEEPSEEK


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0; it is an integer at least 1"),
        ({"top_k": 5}, r"top_k is 5; it is an integer between 1 and 4"),
        ({"top_k": True}, "top_k is True"),
        ({"score_func": "sigmod"}, r"score_func is 'sigmod'.*did you mean sigmoid"),
        (
            {"num_expert_groups": 3, "num_limited_groups": 1},
            r"num_expert_groups is 3, which does not divide num_experts",
        ),
        ({"num_expert_groups": 2}, "num_limited_groups is None"),
        (
            {"num_expert_groups": 2, "num_limited_groups": 3},
            "num_limited_groups is 3; it is an integer between 1 and 2",
        ),
        ({"num_expert_groups": 4, "num_limited_groups": 2}, "group_score_k is 2; it is an integer between 1 and 1"),
        (
            {"num_expert_groups": 2, "num_limited_groups": 1, "top_k": 3},
            "top_k is 3, but the 1 kept groups of 2 experts",
        ),
        ({"num_limited_groups": 2}, "num_limited_groups is 2, but num_expert_groups is None"),
        ({"mask_fill": 1.0, "num_expert_groups": 2, "num_limited_groups": 1}, "mask_fill is 1.0"),
        ({"route_norm": 1}, "route_norm is 1; it is a bool"),
        ({"norm_p": 0.0}, "norm_p is 0.0; it is a finite number greater than 0"),
        ({"norm_eps": -1.0}, "norm_eps is -1.0; it is a finite number of at least 0"),
        ({"route_scale": float("nan")}, "route_scale is nan"),
        ({"logit_softcap": 0.0}, "logit_softcap is 0.0"),
        ({"score_over": "selected"}, "then select_by is 'logit'"),
        ({"score_over": "selected", "select_by": "logit", "score_func": "sigmoid"}, "only a softmax has a support"),
        ({"selector": "sparsemixer"}, "then select_by is 'logit'"),
        ({"num_scored_shared_experts": 1}, "not 'softmax'"),
        ({"norm_with_shared": True}, "num_scored_shared_experts is 0"),
        ({"selector": "table", "num_expert_groups": 2, "num_limited_groups": 1}, "selector is 'table'"),
    ],
)
def test_an_invalid_spec_is_a_value_error_that_names_field_value_and_bound(fields, message):
    with pytest.raises(ValueError, match=message):
        spec(**fields)


def test_an_unknown_field_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown field 'n_grup'.*did you mean n_group"):
        RouterSpec.from_dict({"num_experts": 4, "top_k": 2, "n_grup": 2})
    with pytest.raises(ValueError, match="top_k is given twice"):
        RouterSpec.from_dict({"num_experts": 4, "top_k": 2, "num_experts_per_tok": 2})


LOGITS = np.zeros((2, 4))


@pytest.mark.parametrize(
    ("logits_TE", "fields", "inputs", "message"),
    [
        (np.zeros((2, 5)), {}, {}, r"logits_TE has shape \(2, 5\); it is \(any, 4\)"),
        (np.zeros((2, 4), dtype=int), {}, {}, "logits_TE has dtype int64; it is float"),
        (np.array([[0, 0, 0, np.nan]]), {}, {}, r"logits_TE\[0, 3\] is nan"),
        (np.array([[0, np.inf, 0, 0]]), {}, {}, r"logits_TE\[0, 1\] is inf"),
        (
            np.array([[0, -np.inf, -np.inf, -np.inf]]),
            {},
            {},
            r"scores_for_choice_TE\[0\] is .*; top_k \(2\) entries are above -inf",
        ),
        (LOGITS, {}, {"expert_bias_E": np.zeros(3)}, r"expert_bias_E has shape \(3,\); it is \(4\)"),
        (LOGITS, {}, {"expert_bias_E": np.full(4, np.nan)}, r"expert_bias_E\[0\] is nan; entries are finite"),
        (LOGITS, {"selector": "round_robin"}, {"expert_bias_E": np.zeros(4)}, "selector 'round_robin' takes none"),
        (LOGITS, {"learned_scale": "per_expert"}, {}, "learned_scale is None"),
        (LOGITS, {}, {"learned_scale": np.ones(4)}, "the spec's learned_scale is 'none'"),
        (LOGITS, {"selector": "table"}, {}, "token_ids_T is None; selector 'table' needs it"),
        (
            LOGITS,
            {"selector": "table"},
            {"table_VK": np.array([[0, 1]]), "token_ids_T": np.array([0, 1])},
            r"token_ids_T\[1\] is 1; ids are between 0 and 0",
        ),
        (LOGITS, {"selector": "given"}, {"given_ids_TK": np.array([[0, 0], [1, 2]])}, r"given_ids_TK\[0\] is \[0, 0\]"),
        (LOGITS, {"selector": "given"}, {"given_ids_TK": np.array([[0, 4], [1, 2]])}, r"given_ids_TK\[0, 1\] is 4"),
        (LOGITS, {}, {"token_mask_T": np.array([0, 1])}, "token_mask_T has dtype int64; it is bool"),
    ],
)
def test_an_invalid_input_is_a_value_error_that_names_field_value_and_bound(logits_TE, fields, inputs, message):
    with pytest.raises(ValueError, match=message):
        route(logits_TE, spec(**fields), **RouterInputs.keywords(inputs))


def test_each_quota_group_gives_its_best_and_slots_are_in_order_of_all():
    router = spec(num_experts=6, top_k=4, selector="group_top_k", quota_groups=2, route_norm=True)
    trace = route(np.log([[9.0, 8.0, 7.0, 1.0, 3.0, 3.0], [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]]), router)
    # Of the first group the third best expert of all is left out; of equal ones the lower ids are taken.
    assert trace.expert_ids_TK.tolist() == [[0, 1, 4, 5], [3, 4, 0, 1]]
    np.testing.assert_allclose(trace.weights_TK[0], np.array([9, 8, 3, 3]) / 23, rtol=1e-12)


def test_relu_gives_a_token_as_many_experts_as_logits_above_0():
    remoe = spec(num_experts=4, top_k=4, score_func="relu", selector="threshold")
    trace = route(np.array([[1.0, -1.0, 3.0, 0.0], [-1.0, -2.0, -0.5, -4.0], [1.0, 2.0, 2.0, 5.0]]), remoe)
    assert trace.expert_ids_TK.tolist() == [[2, 0, -1, -1], [-1] * 4, [3, 1, 2, 0]]
    assert trace.weights_TK.tolist() == [[3, 1, 0, 0], [0] * 4, [5, 2, 2, 1]]
    few = route(np.array([[1.0, 2.0, 2.0, 5.0]]), remoe.replace(top_k=2))
    assert few.expert_ids_TK.tolist() == [[3, 1]]


def test_a_bias_moves_what_is_held_against_the_threshold_and_no_weight():
    balanced = spec(num_experts=3, top_k=3, score_func="sigmoid", selector="threshold")
    logits_TE, beta_E = np.array([[0.0, 0.0, 0.0], [9.0, -9.0, 0.0]]), np.array([0.4, 0.5, 0.6])
    trace = route(logits_TE, balanced, expert_bias_E=-beta_E)
    # Score 0.5 is above 0.4, and not above 0.5.
    assert trace.expert_ids_TK.tolist() == [[0, -1, -1], [0, -1, -1]]
    np.testing.assert_allclose(trace.weights_TK[:, 0], [0.5, 1 / (1 + np.exp(-9))], rtol=1e-12)


def test_top_p_takes_the_choice_with_which_the_sum_is_above_p():
    probabilities_TE = np.array([[0.5, 0.25, 0.125, 0.125], [0.75, 0.125, 0.0625, 0.0625], [0.25] * 4])
    nucleus = spec(num_experts=4, top_k=3, selector="top_p", top_p=0.7)
    trace = route(np.log(probabilities_TE), nucleus)
    assert trace.expert_ids_TK.tolist() == [[0, 1, -1], [0, -1, -1], [0, 1, 2]]
    np.testing.assert_allclose(trace.weights_TK, [[0.5, 0.25, 0], [0.75, 0, 0], [0.25, 0.25, 0.25]], rtol=1e-12)
    # A sum of p itself is not above it.
    exact = route(np.array([[0.0, 0.0, -np.inf, -np.inf]]), nucleus.replace(top_p=0.5))
    assert exact.expert_ids_TK.tolist() == [[0, 1, -1]]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"threshold": 0.5}, "threshold is 0.5, but selector is 'top_k'"),
        ({"score_func": "relu"}, "score_func is 'relu' with selector 'top_k'"),
        ({"top_p": 0.5}, "top_p is 0.5, but selector is 'top_k'"),
        ({"selector": "top_p"}, "top_p is None"),
        ({"selector": "top_p", "top_p": 1.0}, "top_p is 1.0; it is less than 1"),
        (
            {"selector": "top_p", "top_p": 0.5, "score_func": "sigmoid"},
            "score_func is 'sigmoid'; with selector 'top_p'",
        ),
        ({"selector": "threshold", "num_expert_groups": 2, "num_limited_groups": 1}, "selector is 'threshold'"),
        ({"selector": "threshold", "score_func": "relu", "num_scored_shared_experts": 1}, "above 0: not 'relu'"),
    ],
)
def test_what_makes_no_number_of_experts_is_refused(fields, why):
    with pytest.raises(ValueError, match=why):
        spec(**fields)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"selector": "group_top_k"}, "quota_groups is None"),
        ({"quota_groups": 2}, "it goes with 'group_top_k'"),
        ({"selector": "group_top_k", "quota_groups": 3}, "does not divide num_experts"),
        ({"selector": "group_top_k", "quota_groups": 4}, "does not divide top_k"),
        ({"selector": "group_top_k", "quota_groups": 2, "num_null_experts": 1}, "num_null_experts is 1"),
    ],
)
def test_quotas_that_no_router_fills_are_refused(fields, why):
    with pytest.raises(ValueError, match=why):
        spec(**fields)
