"""moe_ref, tests of the inputs of a router: one table of what each selector reads, for arrays of every framework."""

from dataclasses import fields

import numpy as np
import pytest

from moe_ref import NO_INPUTS, RouterInputs, RouterSpec, route
from moe_ref.specs.inputs import BY_TOKEN, READS
from moe_ref.specs.router_rules import SELECTORS

T, K = 5, 2
GIVEN = {
    "token_ids_T": np.zeros(T, int), "table_VK": np.array([[0, 1], [2, 3]]), "given_ids_TK": np.zeros((T, K), int),
    "given_weights_TK": np.zeros((T, K)), "logit_factors_TE": np.ones((T, 4)), "logit_noise_TE": np.zeros((T, 4)),
    "first_token": 3, "seed": 1,
}  # fmt: skip


def spec(selector):
    own = {
        "group_top_k": {"quota_groups": 2},
        "expert_choice": {"top_k": 4},
        "top_p": {"top_p": 0.5, "select_by": "score"},
    }.get(selector, {})
    return RouterSpec(**{"num_experts": 4, "top_k": K, "selector": selector, "select_by": "logit"} | own)


def test_the_table_has_every_selector_and_every_field():
    assert READS.keys() == set(SELECTORS)
    assert set().union(*READS.values()) == {field.name for field in fields(RouterInputs)} == GIVEN.keys()


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_selector_takes_what_it_reads_and_nothing_else(selector):
    everything, read = RouterInputs(**GIVEN), READS[selector]
    own = everything.read_by(spec(selector))
    own.check(spec(selector), T)
    assert {name for name in GIVEN if getattr(own, name) is not None} == read.keys()
    for name in GIVEN.keys() - read.keys():
        with pytest.raises(ValueError, match=f"{name} is given, but selector '{selector}' takes none"):
            RouterInputs(**{field: GIVEN[field] for field in (*read, name)}).check(spec(selector), T)
    for name, needed in read.items():
        others = RouterInputs(**{field: GIVEN[field] for field in read if field != name})
        if needed:
            with pytest.raises(ValueError, match=f"{name} is None; selector '{selector}' needs it"):
                others.check(spec(selector), T)
        else:
            others.check(spec(selector), T)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("given_ids_TK", np.zeros((T, 3), int), r"given_ids_TK has shape \(5, 3\); it is \(5, 2\)"),
        ("given_ids_TK", np.zeros((T, K)), "given_ids_TK has dtype float64; it is int"),
        ("given_ids_TK", np.zeros((T, K), bool), "given_ids_TK has dtype bool; it is int"),
        ("given_weights_TK", np.zeros((T - 1, K)), r"given_weights_TK has shape \(4, 2\); it is \(5, 2\)"),
        ("given_weights_TK", np.zeros((T, K), int), "given_weights_TK has dtype int64; it is float"),
    ],
)
def test_an_input_of_another_shape_or_kind_is_named(name, value, message):
    given = RouterInputs(**{"given_ids_TK": GIVEN["given_ids_TK"], name: value})
    with pytest.raises(ValueError, match=message):
        given.check(spec("given"), T)


def test_tokens_are_cut_from_what_has_an_entry_for_each():
    everything = RouterInputs(**GIVEN)
    part = everything.tokens(slice(1, 3))
    for name in GIVEN:
        found, whole = getattr(part, name), getattr(everything, name)
        np.testing.assert_array_equal(found, whole[1:3] if name in BY_TOKEN else whole)
    assert NO_INPUTS.tokens(slice(2)) is NO_INPUTS


def test_shards_go_on_where_the_shard_before_them_ended():
    shards = RouterInputs(first_token=10).shards(spec("round_robin"), (2, 0, 3))
    assert [shard.first_token for shard in shards] == [10, 12, 12]
    ids_TK = np.arange(2 * T).reshape(T, K)
    shards = RouterInputs(given_ids_TK=ids_TK).shards(spec("given"), (2, 0, 3))
    assert [shard.given_ids_TK.tolist() for shard in shards] == [ids_TK[:2].tolist(), [], ids_TK[2:].tolist()]


def test_arrays_by_name_become_one_object_and_the_rest_stays():
    named = {"given_ids_by_shard": [np.zeros((1, K), int), np.ones((2, K), int)], "token_mask_T": 1, "seed": 4}
    inputs, rest = RouterInputs.from_named(named)
    assert rest == {"token_mask_T": 1}
    assert inputs.given_ids_TK.tolist() == [[0, 0], [1, 1], [1, 1]]
    assert inputs.seed == 4
    assert RouterInputs.keywords({"token_mask_T": 1}).keys() == {"token_mask_T", "inputs"}


def test_the_gating_residual_of_a_layer_before_is_what_is_added_to_the_logits():
    rng = np.random.default_rng(0)
    logits_TE, previous_TE, gate_map_EE = rng.normal(size=(5, 8)), rng.normal(size=(5, 8)), rng.normal(size=(8, 8))
    residual_TE = previous_TE @ gate_map_EE.T
    spec = RouterSpec(num_experts=8, top_k=3, route_norm=True)
    found = route(logits_TE, spec, inputs=RouterInputs(logit_noise_TE=residual_TE))
    wanted = route(logits_TE + residual_TE, spec)
    np.testing.assert_array_equal(found.expert_ids_TK, wanted.expert_ids_TK)
    np.testing.assert_allclose(found.weights_TK, wanted.weights_TK, rtol=1e-12)
