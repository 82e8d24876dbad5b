"""moe_ref, tests of served records: what inference engines hand over, read and written."""

import base64

import numpy as np
import pytest

from moe_ref import (
    ExpertSpec,
    LayerSpec,
    RouterSpec,
    capture,
    records_from_served,
    replay,
    route,
    served_array,
    served_base64,
    served_from_records,
)
from moe_ref.specs.ids import UNUSED

T, L, K, E = 6, 3, 2, 8
SPEC = RouterSpec(num_experts=E, top_k=K)
RNG = np.random.default_rng(0)
LOGITS_LTE = RNG.normal(size=(L, T, E))
IDS_TLK = np.stack([route(logits_TE, SPEC).expert_ids_TK for logits_TE in LOGITS_LTE], axis=1)


@pytest.mark.parametrize(
    "given",
    [
        IDS_TLK,
        IDS_TLK.astype(np.uint8),  # vLLM, with few experts
        IDS_TLK.tolist(),
        served_base64(IDS_TLK),
        base64.b64encode(IDS_TLK.astype("<i4").tobytes()),
        {"data": served_base64(IDS_TLK), "shape": [T, L, K]},
        {"data": base64.b64encode(IDS_TLK.astype("<u2").tobytes()).decode(), "shape": [T, L, K], "dtype": "uint16"},
    ],
    ids=["array", "uint8", "lists", "base64", "bytes", "with shape", "with dtype"],
)
def test_every_form_of_an_engine_is_the_same_array(given):
    found = served_array(given, num_layers=L, top_k=K)
    assert found.dtype == np.int64
    assert np.array_equal(found, IDS_TLK)


def test_a_record_of_each_layer_replays_and_goes_back_as_it_came():
    records = records_from_served(served_base64(IDS_TLK), [SPEC] * L)
    assert list(records) == ["0", "1", "2"]
    for layer, record in records.items():
        assert record.weights_TK is None
        replayed = replay(record, LOGITS_LTE[int(layer)], SPEC)
        assert np.array_equal(replayed.weights_TK, route(LOGITS_LTE[int(layer)], SPEC).weights_TK)
    written = served_from_records(records)
    assert written.dtype == np.int32
    assert np.array_equal(written, IDS_TLK)


def test_the_last_token_has_no_route_where_an_engine_did_not_run_it():
    (record,) = records_from_served(IDS_TLK[:, :1], SPEC, num_tokens=T + 1).values()
    assert record.token_mask_T.tolist() == [True] * T + [False]
    assert record.expert_ids_TK[-1].tolist() == [UNUSED] * K
    with pytest.raises(ValueError, match="routed_experts has 6 rows; 8 tokens have as many, or one less"):
        records_from_served(IDS_TLK, SPEC, num_tokens=T + 2)


def test_a_row_of_minus_one_is_a_token_without_a_route_of_that_layer():
    ids_TLK = IDS_TLK.copy()
    ids_TLK[2, 1] = -1
    records = records_from_served(ids_TLK, SPEC)
    assert [record.token_mask_T.all() for record in records.values()] == [True, False, True]
    assert np.array_equal(served_from_records(records), ids_TLK)


def test_a_dense_layer_has_no_record_whatever_an_engine_filled_it_with():
    layer = LayerSpec(router=SPEC, experts=ExpertSpec(dim=4, hidden_dim=4))
    for fill in (0, -1):
        ids_TLK = IDS_TLK.copy()
        ids_TLK[:, 0] = fill
        records = records_from_served(ids_TLK, [None, layer, layer])
        assert list(records) == ["1", "2"]
        assert (served_from_records(records)[:, 0] == -1).all()
    with pytest.raises(ValueError, match="layer 0 is dense, and has ids"):
        records_from_served(IDS_TLK, [None, SPEC, SPEC])


@pytest.mark.parametrize("tokens", [slice(None), slice(4, None)], ids=["all", "some"])
def test_repeated_zeros_are_refused_as_lost_records(tokens):
    ids_TLK = IDS_TLK.copy()
    ids_TLK[tokens, 1] = 0
    with pytest.raises(
        ValueError, match=r"routed_experts\[\d, 1\] is \[0, 0\].* a record that was lost and filled with 0"
    ):
        records_from_served(ids_TLK, SPEC)


def test_one_zero_is_an_expert():
    ids_TLK = np.array([[[0, 3]], [[5, 0]]])
    assert np.array_equal(served_from_records(records_from_served(ids_TLK, SPEC)), ids_TLK)


def test_rows_of_arange_are_padding_where_that_is_said():
    ids_TLK = np.concatenate([IDS_TLK, np.broadcast_to(np.arange(K), (2, L, K))])
    plain = records_from_served(ids_TLK, SPEC)["0"]
    assert plain.token_mask_T.all()
    records = records_from_served(ids_TLK, SPEC, padding="arange")
    assert records["0"].token_mask_T.tolist() == [True] * T + [False] * 2
    assert np.array_equal(served_from_records(records, padding="arange"), ids_TLK)
    assert (served_from_records(records)[T:] == -1).all()


def test_a_choice_that_looks_like_padding_in_one_layer_alone_is_a_choice():
    ids_TLK = IDS_TLK.copy()
    ids_TLK[1, 0] = np.arange(K)
    ids_TLK[1, 1] = [6, 7]
    assert records_from_served(ids_TLK, SPEC, padding="arange")["0"].token_mask_T.all()


def test_ids_past_the_experts_are_refused_as_not_logical():
    with pytest.raises(ValueError, match="id 9 in layer 0; ids are below 8, and logical"):
        records_from_served(np.array([[[1, 9]]]), SPEC)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((2, 3), int), r"routed_experts has shape \(2, 3\)"),
        (np.zeros((2, L, K)), "routed_experts has dtype float64; it is int"),
        ("not base64!", "is no base64 of int32"),
        (base64.b64encode(b"123").decode(), "is no base64 of int32"),
        (base64.b64encode(bytes(4 * 5)).decode(), "has 5 ids, no multiple of 3 layers x 2"),
        ({"data": "", "shape": [1, L, K]}, r"has shape \(1, 3, 2\) and 0 ids"),
        ({"shape": [0, L, K]}, "it has data and shape"),
    ],
)
def test_what_is_no_record_is_refused_by_what_it_is(value, message):
    with pytest.raises(ValueError, match=message):
        served_array(value, num_layers=L, top_k=K)


def test_base64_alone_needs_its_sizes():
    with pytest.raises(ValueError, match="num_layers and top_k are needed"):
        served_array(served_base64(IDS_TLK))
    with pytest.raises(ValueError, match="num_layers and top_k are needed"):
        records_from_served(served_base64(IDS_TLK), SPEC)


def test_records_that_no_array_holds_are_refused():
    records = records_from_served(IDS_TLK, SPEC)
    with pytest.raises(ValueError, match="a name is a layer's number"):
        served_from_records({"first": records["0"]})
    with pytest.raises(ValueError, match="num_layers is 2; it is an integer at least 3"):
        served_from_records(records, num_layers=2)
    assert served_from_records(records, num_layers=5).shape == (T, 5, K)
    short = records_from_served(IDS_TLK[1:], SPEC)["0"]
    with pytest.raises(ValueError, match="an array has one"):
        served_from_records({"0": records["0"], "1": short})
    partly = capture(route(LOGITS_LTE[0], SPEC), SPEC)
    ids_TK = partly.expert_ids_TK.copy()
    ids_TK[3, 1] = UNUSED
    one_slot = type(partly).of_choice(ids_TK, None, SPEC)
    assert served_from_records({"0": one_slot})[3, 0, 1] == UNUSED
    with pytest.raises(ValueError, match="token 3 has some unused slots"):
        served_from_records({"0": one_slot}, padding="arange")
