"""moe_torch, tests of load and losses: each against moe_ref, value and gradient."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_ref
from moe_ref import BALANCE_FORMS, BalanceSpec, BiasUpdateSpec
from moe_ref.specs.balance import BIAS_RULES
from moe_torch.balance import bias_update, load_statistics, tokens_per_expert
from moe_torch.losses import balance_loss, balance_sums, loss_of_sums, z_loss

E, K = 5, 2
# Differences of shares of about 1, some of them rounded away: a few units of 2 ** -53.
SAME_GRADIENT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-14}
SIGMOID = {"score_func": "sigmoid", "norm_scores": True, "score_eps": 1e-20}
SPECS = [BalanceSpec.of(form, coeff=0.3) for form in BALANCE_FORMS] + [
    BalanceSpec.of("megatron_seq_aux", **SIGMOID),
    BalanceSpec(score_func="sqrtsoftplus", norm_scores=True),
    BalanceSpec(score_func="sigmoid", per="sequence", scope="local", expert_power=0),
    BalanceSpec(score_func="sqrtsoftplus"),
]


@st.composite
def batches(draw):
    """Logits, a choice that is not theirs, a mask and sequences; what belongs to padding is NaN."""
    lengths = draw(st.lists(st.integers(0, 6), max_size=4))
    rng, T = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), sum(lengths)
    logits_TE = draw(st.sampled_from([1.0, 10.0, 100.0])) * rng.standard_normal((T, E))
    ids_TK = np.argsort(-logits_TE + rng.standard_normal((T, E)), axis=1)[:, :K]
    ids_TK[rng.random((T, K)) < 0.1] = -1
    logits_TE[:, 1] = np.where(rng.random(T) < 0.2, -np.inf, logits_TE[:, 1])
    mask_T = rng.random(T) < draw(st.sampled_from([0.0, 0.7, 1.0]))
    logits_TE[~mask_T] = np.nan
    return logits_TE, ids_TK, mask_T, lengths


def inputs_of(mask_T, lengths):
    return {
        "token_mask_T": torch.tensor(mask_T),
        "sequence_of_T": torch.tensor(np.repeat(np.arange(len(lengths)), lengths)),
        "num_sequences": len(lengths),
    }


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from(SPECS))
def test_balance_losses_and_their_gradients_are_the_reference_s(batch, spec):
    logits_TE, ids_TK, mask_T, lengths = batch
    if spec.counts == "unbiased":
        # Sigmoids of larger logits are equal in float64, and the reference ranks them; the logits are not equal.
        logits_TE = np.where(np.isfinite(logits_TE), np.clip(logits_TE, -30, 30), logits_TE)
    logits = torch.tensor(logits_TE, requires_grad=True)
    loss = balance_loss(logits, torch.tensor(ids_TK), spec, **inputs_of(mask_T, lengths))
    loss.backward()
    expected = {"token_mask_T": mask_T, "sequence_lengths": lengths}
    np.testing.assert_allclose(loss.detach(), moe_ref.balance_loss(logits_TE, ids_TK, spec, **expected), rtol=1e-12)
    d_expected_TE = moe_ref.balance_loss_backward(logits_TE, ids_TK, spec, **expected)
    np.testing.assert_allclose(logits.grad, d_expected_TE, **SAME_GRADIENT)


@settings(max_examples=50, deadline=None)
@given(batches())
def test_the_z_loss_reads_logits_of_valid_tokens(batch):
    logits_TE, _, mask_T, _ = batch
    logits = torch.tensor(logits_TE, requires_grad=True)
    loss = z_loss(logits, coeff=0.5, token_mask_T=torch.tensor(mask_T))
    loss.backward()
    expected = {"coeff": 0.5, "token_mask_T": mask_T}
    np.testing.assert_allclose(loss.detach(), moe_ref.z_loss(logits_TE, **expected), rtol=1e-12)
    np.testing.assert_allclose(logits.grad, moe_ref.z_loss_backward(logits_TE, **expected), rtol=1e-10, atol=1e-14)


def test_scores_of_very_negative_logits_still_sum_to_one():
    # Their sum is 0 in float32 (NVIDIA/Megatron-LM#1545).
    logits = torch.full((10, E), -120.0, requires_grad=True)
    loss = balance_loss(logits, torch.arange(20).view(10, 2) % E, BalanceSpec(score_func="sigmoid", norm_scores=True))
    loss.backward()
    assert loss.item() == pytest.approx(1, rel=1e-6)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@settings(max_examples=30, deadline=None)
@given(batches(), st.sampled_from(["switch", "megatron_global_aux", "megatron_global_aux_0_16"]))
def test_micro_batches_that_are_added_are_one_batch_and_running_shares_are_of_all_so_far(batch, form):
    logits_TE, ids_TK, mask_T, _ = batch
    spec, cut = BalanceSpec.of(form), len(ids_TK) // 3
    logits, ids, mask = (torch.tensor(values) for values in (logits_TE, ids_TK, mask_T))
    first, second = (
        balance_sums(logits[own], ids[own], spec, token_mask_T=mask[own]) for own in (slice(cut), slice(cut, None))
    )
    if spec.scope == "global":
        found, _ = loss_of_sums(first + second, spec)
    else:
        losses = [loss_of_sums(first, spec), loss_of_sums(second, spec, earlier=first, num_earlier=1)]
        found = sum(loss for loss, _ in losses) / max(1, sum(int(has_tokens) for _, has_tokens in losses))
    shards = (cut, len(ids_TK) - cut)
    expected = moe_ref.balance_loss(logits_TE, ids_TK, spec, token_mask_T=mask_T, tokens_per_shard=shards)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_counts_are_those_of_valid_tokens_and_real_experts():
    ids_TK = np.array([[0, 1], [4, -1], [5, 0], [2, 3]])
    mask_T = np.array([True, True, True, False])
    found_E = tokens_per_expert(torch.tensor(ids_TK), E, torch.tensor(mask_T))
    np.testing.assert_array_equal(found_E, moe_ref.tokens_per_expert(ids_TK, E, mask_T))
    np.testing.assert_array_equal(tokens_per_expert(torch.tensor(ids_TK, dtype=torch.int32), E), [2, 1, 1, 1, 1])
    np.testing.assert_array_equal(tokens_per_expert(torch.tensor(ids_TK[:0]), E), np.zeros(E))


def test_statistics_are_the_reference_s():
    counts_E = np.array([3, 0, 4, 1, 0, 2])
    for options in ({}, {"num_ranks": 3}, {"num_ranks": 2, "placement": (2, 1, 0, 3, 5, 4)}):
        found, expected = (
            load_statistics(torch.tensor(counts_E), **options),
            moe_ref.load_statistics(counts_E, **options),
        )
        for name, value in vars(expected).items():
            np.testing.assert_allclose(getattr(found, name), value, rtol=1e-6, err_msg=name)
    assert load_statistics(torch.zeros(E, dtype=torch.int64)).max_over_mean == 0
    with pytest.raises(ValueError, match="num_ranks is 4, which does not divide the 6 experts"):
        load_statistics(torch.tensor(counts_E), num_ranks=4)
    with pytest.raises(ValueError, match="each of the 6 expert ids once"):
        load_statistics(torch.tensor(counts_E), placement=(0, 1, 2, 3, 4, 4))


@pytest.mark.parametrize("rule", BIAS_RULES)
def test_biases_move_as_in_the_reference(rule):
    rng = np.random.default_rng(0)
    counts_LE, bias_LE = rng.integers(0, 6, (7, E)), rng.standard_normal((7, E))
    counts_LE[0] = 2
    for frozen_E in (None, (True, False, False, True, False)):
        for centred in (False, True):
            spec = BiasUpdateSpec(rate=0.1, rule=rule, centred=centred, frozen_E=frozen_E)
            found_LE = bias_update(torch.tensor(counts_LE), spec, torch.tensor(bias_LE))
            np.testing.assert_allclose(found_LE, moe_ref.bias_update(counts_LE, spec, bias_LE), rtol=1e-14)


def test_a_balanced_expert_keeps_its_bias_at_any_load():
    # In float32 the mean of these counts is rounded.
    counts_E = torch.tensor([400_000_001, 400_000_003, 400_000_002, 400_000_002, 400_000_002], dtype=torch.int32)
    found_E = bias_update(counts_E, BiasUpdateSpec(rate=1.0), torch.zeros(E))
    np.testing.assert_array_equal(found_E, [1, -1, 0, 0, 0])


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"counts_E is torch.float32\[5\]"):
        bias_update(torch.ones(E), BiasUpdateSpec(), torch.zeros(E))
    with pytest.raises(ValueError, match="frozen_E has 2 entries; there are 5 biases"):
        bias_update(torch.ones(E, dtype=torch.int64), BiasUpdateSpec(frozen_E=(True, False)), torch.zeros(E))
    with pytest.raises(ValueError, match="scope is 'running'"):
        z_loss(torch.ones(3, E), scope="running")
    with pytest.raises(ValueError, match=r"logits_TE is torch.float32\[5\]"):
        z_loss(torch.ones(E))
