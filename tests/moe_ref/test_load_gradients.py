"""moe_ref, tests of the gradients of load, against differences of the forward pass in float64."""

import numpy as np
import pytest
from derivatives import COMPLEX_BOUND, assert_close, complex_gradient, difference
from load_cases import E, K, T, routed

from moe_ref import (
    BALANCE_FORMS,
    BalanceSpec,
    CapacitySpec,
    apply_capacity,
    balance,
    balance_layers,
    balance_layers_backward,
    balance_loss,
    balance_loss_backward,
    capacity_backward,
    z_loss,
    z_loss_backward,
)
from moe_ref.specs.ids import UNUSED

LOGITS_TE, IDS_TK, WEIGHTS_TK = routed()
MASK_T = np.arange(T) % 3 != 1
LENGTHS = {"sequence_lengths": (4, 11), "tokens_per_shard": (6, 2, 7)}
SPECS = {form: BalanceSpec.of(form, coeff=0.7) for form in BALANCE_FORMS} | {
    "sigmoid": BalanceSpec(score_func="sigmoid"),
    "sigmoid_eps": BalanceSpec(score_func="sigmoid", norm_scores=True, score_eps=0.5, scope="local"),
    "sqrtsoftplus": BalanceSpec(score_func="sqrtsoftplus", coeff=3.0),
    "sqrtsoftplus_norm": BalanceSpec(score_func="sqrtsoftplus", norm_scores=True, per="sequence"),
}


def constant_counts(spec, inputs):
    """The loss as a function of the logits with the counts held, as the gradient has them."""
    trace = balance(LOGITS_TE, IDS_TK, spec, **inputs)

    def value(logits_TE):
        scores_TE = balance(logits_TE, IDS_TK, spec, **inputs).scores_TE
        means_UE = np.zeros_like(trace.mean_scores_UE)
        np.add.at(means_UE, trace.unit_of_T, scores_TE)
        means_UE /= np.maximum(trace.tokens_U, 1)[:, None]
        losses_U = float(E) ** spec.expert_power * (trace.fractions_UE * means_UE).sum(axis=-1)
        return spec.coeff * (trace.weights_U * losses_U).sum()

    assert value(LOGITS_TE) == pytest.approx(trace.loss)
    return value


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_the_gradient_of_a_balance_loss_is_its_difference_quotient(name, masked):
    spec, inputs = SPECS[name], LENGTHS | ({"token_mask_T": MASK_T} if masked else {})
    expected_TE = difference(constant_counts(spec, inputs), LOGITS_TE)
    found_TE = balance_loss_backward(LOGITS_TE, IDS_TK, spec, **inputs)
    assert_close(found_TE, expected_TE)
    assert np.abs(found_TE).max() > 1e-3 * spec.coeff / E**2
    if masked:
        np.testing.assert_array_equal(found_TE[~MASK_T], 0)


@pytest.mark.parametrize("name", ["switch", "deepseek_v2", "maxtext"])
def test_counts_of_a_routed_choice_are_constants_of_the_reported_loss(name):
    # NVIDIA/Megatron-LM#5798: the logged loss was right and its gradient was not.
    def value(logits_TE):
        return balance_loss(logits_TE, IDS_TK, SPECS[name], **LENGTHS)

    assert_close(balance_loss_backward(LOGITS_TE, IDS_TK, SPECS[name], **LENGTHS), difference(value, LOGITS_TE))


@pytest.mark.parametrize("name", ["switch", "sequence"])
def test_a_gradient_is_exact_in_the_imaginary_direction(name):
    spec = SPECS[name].replace(counts="routed")
    trace = balance(LOGITS_TE, IDS_TK, spec, **LENGTHS)
    share_TE = (trace.weights_U / np.maximum(trace.tokens_U, 1))[trace.unit_of_T, None] * trace.fractions_UE[
        trace.unit_of_T
    ]

    def value(logits_TE):
        scores_TE = np.exp(logits_TE) if spec.score_func == "softmax" else 1 / (1 + np.exp(-logits_TE))
        return spec.coeff * E * (share_TE * scores_TE / scores_TE.sum(axis=-1, keepdims=True)).sum()

    found_TE = balance_loss_backward(LOGITS_TE, IDS_TK, spec, **LENGTHS)
    assert_close(found_TE, complex_gradient(value, LOGITS_TE), COMPLEX_BOUND)


@pytest.mark.parametrize("form", ["switch", "gshard", "deepseek_v2", "sequence", "maxtext"])
def test_a_global_gradient_does_not_depend_on_how_the_batch_is_cut(form):
    spec, sequences = SPECS[form], (4, 11)
    whole_TE = balance_loss_backward(LOGITS_TE, IDS_TK, spec, sequence_lengths=sequences)
    for shards in ((1, 6, 0, 8), (1,) * T):
        cut_TE = balance_loss_backward(LOGITS_TE, IDS_TK, spec, sequence_lengths=sequences, tokens_per_shard=shards)
        np.testing.assert_array_equal(cut_TE, whole_TE)


def test_each_shard_can_compute_its_part_of_a_global_gradient_from_the_summed_counts():
    whole_TE = balance_loss_backward(LOGITS_TE, IDS_TK, BalanceSpec())
    fraction_E = balance(LOGITS_TE, IDS_TK, BalanceSpec()).fractions_UE[0]
    for own in (slice(4), slice(4, T)):
        scores_TE = balance(LOGITS_TE[own], IDS_TK[own], BalanceSpec()).scores_TE
        pull_T1 = (scores_TE * fraction_E).sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(whole_TE[own], E / T * scores_TE * (fraction_E - pull_T1), atol=1e-17)


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_extreme_logits_have_finite_gradients_and_minus_inf_has_0(score_func):
    spec = BalanceSpec(score_func=score_func, norm_scores=score_func != "softmax")
    logits_TE = LOGITS_TE.copy()
    logits_TE[0], logits_TE[1], logits_TE[2] = -1000 + LOGITS_TE[0], 1000 * LOGITS_TE[1], -44 + 4 * LOGITS_TE[2]
    logits_TE[3, 2] = -np.inf

    def value(finite_TE):
        moved_TE = np.where(np.isneginf(logits_TE), -np.inf, finite_TE)
        return balance_loss(moved_TE, IDS_TK, spec)

    found_TE = balance_loss_backward(logits_TE, IDS_TK, spec)
    assert found_TE[3, 2] == 0
    assert np.abs(found_TE[0]).max() > 1e-3
    assert_close(found_TE, difference(value, np.where(np.isneginf(logits_TE), 0, logits_TE)))


@pytest.mark.parametrize("over_layers", ["separate", "pooled"])
def test_the_gradient_of_layers_is_their_difference_quotient(over_layers):
    spec = BalanceSpec(over_layers=over_layers, scope="local", per="sequence")
    other_TE, other_TK, _ = routed(seed=1)
    layers_LTE, ids = np.stack([LOGITS_TE, other_TE]), [IDS_TK, other_TK]
    inputs = LENGTHS | {"token_mask_T": MASK_T}

    def value(moved_LTE):
        return sum(trace.loss for trace in balance_layers(moved_LTE, ids, spec, **inputs))

    found_LTE = np.stack(balance_layers_backward(layers_LTE, ids, spec, **inputs))
    assert_close(found_LTE, difference(value, layers_LTE))


@pytest.mark.parametrize("scope", ["global", "local"])
def test_the_gradient_of_the_z_loss_is_its_difference_quotient(scope):
    inputs = {"scope": scope, "coeff": 0.3, "token_mask_T": MASK_T, "tokens_per_shard": (6, 2, 7)}
    logits_TE = LOGITS_TE.copy()
    logits_TE[2, 4] = -np.inf
    found_TE = z_loss_backward(logits_TE, **inputs)
    assert found_TE[2, 4] == 0
    np.testing.assert_array_equal(found_TE[~MASK_T], 0)

    def value(moved_TE):
        return z_loss(np.where(np.isneginf(logits_TE), -np.inf, moved_TE), **inputs)

    assert_close(found_TE, difference(value, np.where(np.isneginf(logits_TE), 0, logits_TE)))


# capacity

CAPACITIES = {
    "no": CapacitySpec(factor=0.5),
    "before": CapacitySpec(factor=0.5, renormalise="before", weight_sum=2.5),
    "after": CapacitySpec(factor=0.5, renormalise="after"),
    "two_levels": CapacitySpec(
        factor=1.0, scope="rank", renormalise="before", then=CapacitySpec(factor=0.5, renormalise="after")
    ),
}


@pytest.mark.parametrize("name", CAPACITIES)
def test_the_gradient_through_a_capacity_is_its_difference_quotient(name):
    spec = CAPACITIES[name]
    ids_TK = IDS_TK.copy()
    ids_TK[3, 0] = UNUSED
    inputs = {"token_mask_T": MASK_T, "tokens_per_shard": (6, 9)}
    d_weights_TK = np.random.default_rng(3).standard_normal((T, K))
    trace = apply_capacity(ids_TK, WEIGHTS_TK, spec, E, **inputs)

    def value(weights_TK):
        return (apply_capacity(ids_TK, weights_TK, spec, E, **inputs).weights_TK * d_weights_TK).sum()

    found_TK = capacity_backward(trace, spec, d_weights_TK)
    assert_close(found_TK, difference(value, WEIGHTS_TK))
    assert trace.dropped_TK.any()
    assert np.abs(found_TK).max() > 0.1
    np.testing.assert_array_equal(found_TK[~MASK_T], 0)
    if name in ("no", "after"):
        np.testing.assert_array_equal(found_TK[trace.dropped_TK], 0)


def test_a_token_whose_weights_are_all_0_passes_no_gradient_through_a_norm():
    spec = CapacitySpec(factor=9.0, renormalise="after")
    trace = apply_capacity(IDS_TK, np.zeros((T, K)), spec, E)
    np.testing.assert_array_equal(trace.weights_TK, 0)
    np.testing.assert_array_equal(capacity_backward(trace, spec, np.ones((T, K))), 0)
