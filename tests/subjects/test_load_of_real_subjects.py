"""Real losses, bias updates and capacities: what transformers and torchtitan compute is the form that names them."""

import numpy as np
import pytest

import moe_ref
from conformance.core.subject import Unsupported
from conformance.subjects.torchtitan.subject import Torchtitan
from conformance.subjects.transformers.subject import Transformers
from moe_ref import BalanceSpec, BiasUpdateSpec, CapacitySpec, RouterSpec

T, E = 12, 5
SEQUENCES = (4, 4, 4)
MASK = np.arange(T) % 4 != 1
# Sums of some tens of float32 numbers.
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


@pytest.fixture(scope="module")
def transformers():
    return Transformers()


def case(top_k: int):
    logits_TE = (3 * np.random.default_rng(0).standard_normal((T, E))).astype(np.float32)
    return logits_TE, np.argsort(-logits_TE, axis=1)[:, :top_k], RouterSpec(num_experts=E, top_k=top_k)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_loss_of_transformers_is_the_form_of_that_name(family, masked):
    logits_TE, ids_TK, router = case(2)
    spec, mask_T = BalanceSpec.of("transformers", coeff=0.02), MASK if masked else None
    subject = Transformers(family)
    assert subject.supports_load(spec) is None
    found = subject.balance_loss(logits_TE, ids_TK, spec, router, token_mask_T=mask_T)
    expected_TE = moe_ref.balance_loss_backward(logits_TE, ids_TK, spec, token_mask_T=mask_T)
    np.testing.assert_allclose(
        found["loss"], moe_ref.balance_loss(logits_TE, ids_TK, spec, token_mask_T=mask_T), **CLOSE
    )
    np.testing.assert_allclose(found["d_logits_TE"], expected_TE, **CLOSE)


def test_the_loss_of_transformers_is_not_finite_where_all_is_padding_or_padding_holds_nan(transformers):
    logits_TE, ids_TK, router = case(2)
    spec = BalanceSpec.of("transformers")
    all_padding = transformers.balance_loss(logits_TE, ids_TK, spec, router, token_mask_T=np.zeros(T, bool))
    assert np.isnan(all_padding["loss"])
    poisoned_TE = np.where(MASK[:, None], logits_TE, np.nan)
    assert np.isnan(transformers.balance_loss(poisoned_TE, ids_TK, spec, router, token_mask_T=MASK)["loss"])


def test_the_loss_and_z_loss_of_switch_transformers_are_means_over_sequences(transformers):
    logits_TE, ids_TK, router = case(1)
    spec = BalanceSpec(per="sequence")
    found = transformers.balance_loss(logits_TE, ids_TK, spec, router, sequence_lengths=SEQUENCES)
    expected_TE = moe_ref.balance_loss_backward(logits_TE, ids_TK, spec, sequence_lengths=SEQUENCES)
    np.testing.assert_allclose(
        found["loss"], moe_ref.balance_loss(logits_TE, ids_TK, spec, sequence_lengths=SEQUENCES), **CLOSE
    )
    np.testing.assert_allclose(found["d_logits_TE"], expected_TE, **CLOSE)
    found = transformers.z_loss(logits_TE, 0.1)
    np.testing.assert_allclose(found["loss"], moe_ref.z_loss(logits_TE, coeff=0.1), **CLOSE)
    np.testing.assert_allclose(found["d_logits_TE"], moe_ref.z_loss_backward(logits_TE, coeff=0.1), **CLOSE)


def test_the_router_of_switch_transformers_keeps_the_first_tokens_of_a_sequence(transformers):
    # huggingface/transformers#48421: summed over another axis, nothing is ever dropped.
    spec, rng = CapacitySpec(slots=2, scope="sequence"), np.random.default_rng(0)
    ids_TK, weights_TK = rng.integers(0, 2, (T, 1)), rng.uniform(0.3, 0.9, (T, 1))
    assert transformers.supports_load(spec) is None
    found = transformers.capacity(ids_TK, weights_TK, spec, E, sequence_lengths=(6, 6))
    expected = moe_ref.apply_capacity(ids_TK, weights_TK, spec, E, sequence_lengths=(6, 6))
    assert expected.dropped_TK.any()
    np.testing.assert_array_equal(found["expert_ids_TK"], expected.expert_ids_TK)
    np.testing.assert_allclose(found["weights_TK"], expected.weights_TK, **CLOSE)


def test_what_transformers_has_not_is_said(transformers):
    logits_TE, ids_TK, router = case(2)
    assert "no expert bias" in transformers.supports_load(BiasUpdateSpec())
    assert "slots=3" in transformers.supports_load(CapacitySpec(slots=3))
    assert "'switch' of sequences" in transformers.supports_load(BalanceSpec.of("gshard"))
    for inputs, why in (({}, "exactly one expert"), ({"token_mask_T": MASK}, "takes no mask"),
                        ({"sequence_lengths": (5, 7)}, "one length")):  # fmt: skip
        with pytest.raises(Unsupported, match=why):
            transformers.balance_loss(logits_TE, ids_TK, BalanceSpec(per="sequence"), router, **inputs)
    with pytest.raises(Unsupported, match="as they come"):
        transformers.balance_loss(logits_TE, ids_TK, BalanceSpec.of("transformers"), router.replace(num_null_experts=1))
    with pytest.raises(Unsupported, match="no balance loss for deepseek_v3"):
        Transformers("deepseek_v3").balance_loss(logits_TE, ids_TK, BalanceSpec.of("transformers"), router)
    with pytest.raises(Unsupported, match="largest softmax"):
        transformers.capacity(ids_TK[:, :1], np.full((T, 1), 0.1), CapacitySpec(slots=2, scope="sequence"), E)


def test_the_hook_of_torchtitan_takes_the_sign_of_the_sum_and_centres_it():
    subject, spec, rng = Torchtitan(), BiasUpdateSpec(rate=0.125, centred=True), np.random.default_rng(0)
    assert subject.supports_load(spec) is None
    for _ in range(5):
        counts_SE, bias_E = rng.integers(0, 9, (3, E)), rng.standard_normal(E)
        expected_E = moe_ref.bias_update(counts_SE.sum(axis=0), spec, bias_E)
        np.testing.assert_allclose(subject.bias_update(counts_SE, spec, bias_E), expected_E, **CLOSE)


def test_the_hook_of_torchtitan_counts_in_float32():
    # Past 2 ** 24 one token more or less is not told apart.
    counts_SE = np.array([[2**25, 2**25 + 1, 2**25, 2**25]])
    spec = BiasUpdateSpec(rate=0.125, centred=True)
    assert moe_ref.bias_update(counts_SE[0], spec, np.zeros(4)).any()
    np.testing.assert_array_equal(Torchtitan().bias_update(counts_SE, spec, np.zeros(4)), np.zeros(4))


@pytest.mark.parametrize(
    "spec", [BiasUpdateSpec(), BiasUpdateSpec(centred=True, rule="relative"), BiasUpdateSpec(rate=0, centred=True),
             BiasUpdateSpec(centred=True, frozen_E=(True, False)), BalanceSpec(), CapacitySpec(slots=1)]
)  # fmt: skip
def test_what_torchtitan_has_not_is_said(spec):
    assert Torchtitan().supports_load(spec)
