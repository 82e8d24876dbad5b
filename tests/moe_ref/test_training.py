"""tests of moe_ref: what layers count and how their biases move over several steps, in numbers written by hand."""

from dataclasses import replace

import numpy as np
import pytest

from moe_ref import (
    UNUSED,
    BalanceSpec,
    BiasUpdateSpec,
    Event,
    ExpertSpec,
    LayerParams,
    LayerSpec,
    RouterSpec,
    RoutingRecord,
    StackSpec,
    train,
)

THREE = LayerSpec(
    router=RouterSpec(num_experts=3, top_k=1, score_func="sigmoid"), experts=ExpertSpec(dim=3, hidden_dim=2)
)
FOUR = THREE.replace(router=THREE.router.replace(num_experts=4))
SIGN = BiasUpdateSpec(rate=0.5)
TWO = StackSpec(layers=(THREE, THREE), updates=(SIGN, SIGN))
BUILD, STEP = Event(kind="build"), Event(kind="step")


def params_of(stack: StackSpec, bias=None) -> list[LayerParams]:
    """The logits of a token are its own numbers; a fourth expert has the logit 0."""
    found = []
    for spec in stack.layers:
        E = spec.router.num_experts
        weights = {"w_up_EDF": np.ones((E, 3, 2)), "w_gate_EDF": np.ones((E, 3, 2)), "w_down_EFD": np.ones((E, 2, 3))}
        found.append(LayerParams(gate_ED=np.eye(E, 3), expert_bias_E=bias, **weights))
    return found


def tokens(*ids: list[int]) -> np.ndarray:
    """(L, T, 3) tokens that have the logit 1 for one expert and 0 for the others, in each layer."""
    return np.stack([np.eye(3)[own] for own in ids])


def passed(*ids: list[int], kind: str = "train", **fields) -> Event:
    return Event(kind=kind, x_LTD=tokens(*ids), **fields)


def states_of(*events: Event, stack: StackSpec = TWO, bias=None):
    return train([BUILD, *events], stack, params_of(stack, bias))


def counts(state) -> list[list[int]]:
    return [counts_E.tolist() for counts_E in state.counts_by_layer]


def biases(state) -> list[list[float]]:
    return [bias_E.tolist() for bias_E in state.bias_by_layer]


def test_layers_begin_with_counts_of_0_and_the_given_bias():
    (state,) = states_of()
    assert counts(state) == [[0, 0, 0], [0, 0, 0]]
    assert biases(state) == [[0, 0, 0], [0, 0, 0]]
    (state,) = states_of(bias=np.array([0.5, 0, -1]))
    assert biases(state) == [[0.5, 0, -1], [0.5, 0, -1]]


def test_two_steps_of_two_layers():
    states = states_of(passed([0, 0, 1, 0], [2, 2, 2, 2]), passed([0, 1, 1, 0], [2, 0, 2, 2]), STEP)
    assert counts(states[1]) == [[3, 1, 0], [0, 0, 4]]
    assert counts(states[2]) == [[5, 3, 0], [1, 0, 7]]
    assert counts(states[3]) == [[0, 0, 0], [0, 0, 0]]
    # 8 slots of 3 experts: the mean is 2 2/3.
    assert biases(states[3]) == [[-0.5, -0.5, 0.5], [0.5, 0.5, -0.5]]

    # sigmoid(1) = 0.73 and sigmoid(0) = 0.5: with these biases expert 2 of the first layer is chosen by every token
    # (0.23, 0, 1 and 0, 0.23, 1); in the second layer the tokens of expert 2 (1, 1, 0.23) have the lower of two ids.
    after = states_of(
        passed([0, 0, 1, 0], [2, 2, 2, 2]),
        passed([0, 1, 1, 0], [2, 0, 2, 2]),
        STEP,
        passed([0, 1, 0, 1], [0, 1, 2, 2]),
        STEP,
    )
    assert counts(after[4]) == [[0, 0, 4], [3, 1, 0]]
    assert biases(after[5]) == [[0, 0, 0], [0, 1, 0]]


def test_evaluation_counts_nothing_and_moves_nothing():
    states = states_of(passed([0], [1]), passed([1], [1], kind="evaluate"), STEP, passed([1], [1], kind="evaluate"))
    assert counts(states[2]) == counts(states[1]) == [[1, 0, 0], [0, 1, 0]]
    assert biases(states[4]) == biases(states[3]) == [[-0.5, 0.5, 0.5], [0.5, -0.5, 0.5]]


def test_a_recomputed_micro_batch_is_counted_once():
    _, once = states_of(passed([0, 2], [1, 1]))
    _, again = states_of(passed([0, 2], [1, 1], recomputed=True))
    assert counts(again) == counts(once) == [[1, 0, 1], [0, 2, 0]]


def test_padding_is_counted_nowhere():
    _, state = states_of(passed([0, 2, 2], [1, 1, 0], token_mask_T=np.array([True, False, True])))
    assert counts(state) == [[1, 0, 1], [1, 1, 0]]


def test_a_layer_without_an_update_counts_and_begins_anew_and_keeps_its_bias():
    stack = TWO.replace(updates=(None, SIGN))
    states = states_of(passed([0], [1]), STEP, stack=stack, bias=np.array([0.0, 0.0, 0.125]))
    assert counts(states[1]) == [[1, 0, 0], [0, 1, 0]]
    assert counts(states[2]) == [[0, 0, 0], [0, 0, 0]]
    assert biases(states[2]) == [[0, 0, 0.125], [0.5, -0.5, 0.625]]


@pytest.mark.parametrize("rule", ["sign", "proportional", "relative"])
def test_a_step_without_a_token_moves_nothing(rule):
    stack = TWO.replace(updates=(BiasUpdateSpec(rule=rule, rate=0.5, centred=True),) * 2)
    states = states_of(STEP, stack=stack, bias=np.array([0.25, 0, 0]))
    assert biases(states[1]) == [[0.25, 0, 0], [0.25, 0, 0]]


def test_layers_of_other_sizes_move_each_by_its_own_rule():
    stack = StackSpec(layers=(THREE, FOUR), updates=(SIGN, BiasUpdateSpec(rule="relative", rate=0.5)))
    states = states_of(passed([0, 1], [1, 1]), STEP, stack=stack)
    assert counts(states[1]) == [[1, 1, 0], [0, 2, 0, 0]]
    # (mean - count) / mean is 1 for an expert of four without a token, and 1 - 4 for the one with both.
    assert biases(states[2]) == [[-0.5, -0.5, 0.5], [0.5, -1.5, 0.5, 0.5]]


def record(ids: list[int]) -> RoutingRecord:
    return RoutingRecord.of_choice(np.array(ids)[:, None], None, THREE.router)


def test_a_forced_choice_is_counted_and_moves_the_bias():
    records = (record([2, 2, UNUSED]), record([1, 0, 1]))
    states = states_of(passed([0, 0, 0], [2, 2, 2], records=records), STEP)
    assert counts(states[1]) == [[0, 0, 2], [1, 2, 0]]
    # 3 slots of 3 experts: expert 0 of the second layer has the mean.
    assert biases(states[2]) == [[0.5, 0.5, -0.5], [0, -0.5, 0.5]]


def test_a_forced_choice_does_not_ask_the_bias():
    records = (record([0]), record([0]))
    states = states_of(passed([0], [0], records=records), bias=np.array([-9.0, 0, 9]))
    assert counts(states[1]) == [[1, 0, 0], [1, 0, 0]]


def test_new_layers_forget_everything():
    states = states_of(passed([0], [1]), STEP, passed([0], [1]), BUILD)
    assert counts(states[4]) == [[0, 0, 0], [0, 0, 0]]
    assert biases(states[4]) == [[0, 0, 0], [0, 0, 0]]


def test_ranks_make_no_difference_and_no_layer_is_no_state():
    events = (passed([0, 1], [2, 2]), STEP)
    wanted = states_of(*events)
    found = states_of(*events, stack=TWO.replace(num_ranks=3, rank_of_layer=(0, 2)))
    assert [biases(state) for state in found] == [biases(state) for state in wanted]
    none = StackSpec(layers=(), updates=(), num_ranks=2)
    states = train([BUILD, Event(kind="train", x_LTD=np.zeros((0, 2, 1))), STEP], none, [])
    assert [(state.counts_by_layer, state.bias_by_layer) for state in states] == [([], [])] * 3


def test_losses_of_layers_are_summed_or_pooled():
    # Softmax of logits 1, 0, 0: e / (e + 2) and twice 1 / (e + 2).
    high, low = np.e / (np.e + 2), 1 / (np.e + 2)
    softmax = TWO.replace(layers=(THREE.replace(router=THREE.router.replace(score_func="softmax")),) * 2)
    event = passed([0, 0], [1, 1])
    summed = softmax.replace(balance=BalanceSpec())
    # Each layer has all its slots with one expert, whose mean score is `high`: 3 * 1 * high.
    assert states_of(event, stack=summed)[1].loss == pytest.approx(2 * 3 * high)
    pooled = softmax.replace(balance=BalanceSpec(over_layers="pooled"))
    # Experts 0 and 1 have half of all slots each, and the mean score (high + low) / 2.
    assert states_of(event, stack=pooled)[1].loss == pytest.approx(3 * (high + low) / 2)
    assert states_of(replace(event, kind="evaluate"), stack=pooled)[1].loss == states_of(event, stack=pooled)[1].loss
    assert states_of(event, STEP, stack=pooled)[2].loss is None
    none = StackSpec(layers=(), updates=(), balance=BalanceSpec())
    assert train([BUILD, Event(kind="evaluate", x_LTD=np.zeros((0, 2, 1)))], none, [])[1].loss == 0


def test_a_stack_is_read_as_it_was_written():
    stack = StackSpec(
        layers=(THREE, FOUR),
        updates=(None, SIGN),
        balance=BalanceSpec(coeff=0.5),
        num_ranks=2,
        rank_of_layer=(1, 0),
    )
    assert StackSpec.from_dict(stack.to_dict()) == stack
    assert StackSpec.from_dict(TWO.to_dict()) == TWO
    assert stack.layers_of(0) == (1,)
    assert TWO.layers_of(0) == (0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"updates": (SIGN,)}, "updates is .*; there are 2 layers"),
        ({"updates": (SIGN, "sign")}, r"updates\[1\] is 'sign'"),
        ({"layers": (THREE, "moe")}, r"layers\[1\] is 'moe'"),
        ({"layers": (THREE, THREE.replace(experts=ExpertSpec(dim=4, hidden_dim=2)))}, r"dims \[3, 4\]"),
        ({"layers": (THREE, FOUR), "balance": BalanceSpec(over_layers="pooled")}, "of one size"),
        ({"rank_of_layer": (0, 1)}, "rank_of_layer is 1"),
        ({"num_ranks": 0}, "num_ranks is 0"),
        ({"balance": "switch"}, "balance is 'switch'"),
        (
            {"layers": (THREE, THREE.replace(router=RouterSpec(num_experts=3, top_k=1, selector="round_robin")))},
            "has no expert_bias",
        ),
    ],
)
def test_a_stack_that_contradicts_itself_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TWO.replace(**change)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "forward"}, "kind is 'forward'"),
        ({"kind": "train"}, "x_LTD goes with"),
        ({"kind": "step", "x_LTD": tokens([0])}, "x_LTD goes with"),
        ({"kind": "step", "token_mask_T": np.ones(1, bool)}, "token_mask_T is given"),
        ({"kind": "step", "records": ()}, "records is given"),
        ({"kind": "evaluate", "x_LTD": tokens([0]), "recomputed": True}, "recomputed is True"),
        ({"kind": "train", "x_LTD": tokens([0]), "records": (record([0, 1]),)}, "each of the 1 layers has 1"),
        ({"kind": "train", "x_LTD": tokens([0]), "token_mask_T": np.ones(2, bool)}, "token_mask_T has shape"),
    ],
)
def test_an_event_that_contradicts_itself_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Event(**fields)


def test_a_script_begins_with_a_build_and_has_parameters_for_each_layer():
    with pytest.raises(ValueError, match="events begins with a build"):
        train([STEP], TWO, params_of(TWO))
    with pytest.raises(ValueError, match="params has 1 entries; there are 2 layers"):
        train([BUILD], TWO, params_of(TWO)[:1])
