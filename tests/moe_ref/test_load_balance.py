"""moe_ref, tests of the balance losses: each published formula, written here as its source writes it."""

from dataclasses import fields

import numpy as np
import pytest
from load_cases import SEQUENCES, B, E, K, S, T, largest, one_hot, routed, sigmoid, softmax

from moe_ref import BALANCE_FORMS, BalanceSpec, balance, balance_layers, balance_loss, tokens_per_expert, z_loss
from moe_ref.balance import balance_scores, log_scores
from moe_ref.specs.ids import UNUSED

LOGITS_TE, IDS_TK, _ = routed()
LOGITS_BSE, IDS_BSK = LOGITS_TE.reshape(B, S, E), IDS_TK.reshape(B, S, K)


def switch():
    fraction_E = one_hot(IDS_TK).sum(axis=(0, 1)) / (T * K)
    return E * (fraction_E * softmax(LOGITS_TE).mean(axis=0)).sum()


def gshard():
    first_E = one_hot(IDS_TK[:, 0]).sum(axis=0)
    return np.mean(first_E / T * softmax(LOGITS_TE).mean(axis=0))


def transformers():
    def of_rank(logits_SE):
        scores_SE = softmax(logits_SE)
        tokens_per_expert_KE = one_hot(largest(scores_SE)).mean(axis=0)
        return (tokens_per_expert_KE * scores_SE.mean(axis=0)).sum() * E

    return np.mean([of_rank(logits_SE) for logits_SE in LOGITS_BSE])


def deepseek_v2():
    load_BE = one_hot(IDS_BSK).sum(axis=(1, 2)) / (S * K / E)
    return (load_BE * softmax(LOGITS_BSE).mean(axis=1)).sum(axis=1).mean()


def sequence():
    losses = []
    for logits_SE in LOGITS_BSE:
        scores_SE = sigmoid(logits_SE)
        f_E = E / (K * S) * one_hot(largest(scores_SE)).sum(axis=(0, 1))
        p_E = (scores_SE / scores_SE.sum(axis=1, keepdims=True)).mean(axis=0)
        losses.append((f_E * p_E).sum())
    return np.mean(losses)


def maxtext():
    density_BE = one_hot(IDS_BSK).sum(axis=2).mean(axis=1)
    return (density_BE * softmax(LOGITS_BSE).mean(axis=1)).mean() * E**2


def megatron(scores, counts_E, num_tokens):
    return (scores.sum(axis=0) * counts_E).sum() * E / (K * num_tokens * num_tokens)


def megatron_aux():
    counts_BE = one_hot(largest(softmax(LOGITS_BSE))).sum(axis=(1, 2))
    return np.mean([megatron(softmax(z), counts_E, S) for z, counts_E in zip(LOGITS_BSE, counts_BE, strict=True)])


def megatron_seq_aux():
    probs_SBE = softmax(LOGITS_BSE).transpose(1, 0, 2)
    map_SBE = one_hot(largest(probs_SBE)).sum(axis=2)
    return megatron(probs_SBE.reshape(S, B * E), map_SBE.reshape(S, B * E).sum(axis=0), S) / B


def megatron_global_aux():
    counts_E, tokens, losses = np.zeros(E), 0, []
    for logits_SE in LOGITS_BSE:
        counts_E, tokens = counts_E + one_hot(largest(softmax(logits_SE))).sum(axis=(0, 1)), tokens + S
        losses.append(E * (counts_E / (K * tokens) * softmax(logits_SE).mean(axis=0)).sum())
    return np.mean(losses)


def megatron_global_aux_0_16():
    total_E, losses = np.zeros(E), []
    for steps, logits_SE in enumerate(LOGITS_BSE, start=1):
        total_E = total_E + one_hot(largest(softmax(logits_SE))).sum(axis=(0, 1))
        losses.append(megatron(softmax(logits_SE), total_E / steps, S))
    return np.mean(losses)


def remoe():
    relu_BSE = np.maximum(LOGITS_BSE, 0)
    counts_BE = one_hot(IDS_BSK).sum(axis=(1, 2))
    return np.mean([megatron(relu_SE, counts_E, S) for relu_SE, counts_E in zip(relu_BSE, counts_BE, strict=True)])


PUBLISHED = {
    "switch": switch,
    "gshard": gshard,
    "transformers": transformers,
    "deepseek_v2": deepseek_v2,
    "sequence": sequence,
    "maxtext": maxtext,
    "maxtext_0_2_5": lambda: maxtext() / K,
    "megatron_aux": megatron_aux,
    "megatron_seq_aux": megatron_seq_aux,
    "megatron_global_aux": megatron_global_aux,
    "megatron_global_aux_0_16": megatron_global_aux_0_16,
    "remoe": remoe,
}


@pytest.mark.parametrize("form", BALANCE_FORMS)
def test_each_published_loss_is_a_spec(form):
    spec = BalanceSpec.of(form, coeff=0.3)
    found = balance_loss(LOGITS_TE, IDS_TK, spec, sequence_lengths=SEQUENCES, tokens_per_shard=SEQUENCES)
    np.testing.assert_allclose(found, 0.3 * PUBLISHED[form](), rtol=1e-13)


def test_no_two_published_losses_are_the_same():
    values = {round(value(), 12) for name, value in PUBLISHED.items() if name != "maxtext_0_2_5"}
    # Micro-batches of one length have the same mean and share so far.
    np.testing.assert_allclose(megatron_global_aux(), megatron_global_aux_0_16(), rtol=1e-13)
    # With one sequence on each shard megatron_aux and megatron_seq_aux agree, as they are meant to.
    assert len(values) == len(PUBLISHED) - 3


def test_the_forms_and_their_variants_change_every_field():
    variants = [BalanceSpec.of(form) for form in BALANCE_FORMS]
    variants.append(BalanceSpec(target_top_k=2))
    variants.append(BalanceSpec(coeff=2.0, score_func="sigmoid", norm_scores=True, score_eps=1e-20))
    assert set().union(*(spec.to_dict() for spec in variants)) == {field.name for field in fields(BalanceSpec)}


@pytest.mark.parametrize("form", [*BALANCE_FORMS])
@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_in_perfect_balance_the_loss_is_a_known_constant(form, top_k):
    logits_TE = np.zeros((E, E))
    ids_TK = (np.arange(E)[:, None] + np.arange(top_k)) % E
    spec = BalanceSpec.of(form, counts="routed", scope="global")
    constant = {"gshard": 1 / E**2, "transformers": top_k, "maxtext": top_k, "remoe": 0}.get(form, 1)
    np.testing.assert_allclose(balance_loss(logits_TE, ids_TK, spec), constant, rtol=1e-14)


@pytest.mark.parametrize("form", [*BALANCE_FORMS])
def test_a_collapsed_choice_costs_more_than_an_even_one(form):
    spec = BalanceSpec.of(form, counts="routed")
    collapsed = balance_loss(np.tile(4.0 * (np.arange(E) < K), (T, 1)), np.tile([0, 1], (T, 1)), spec)
    even = balance_loss(np.zeros((E, E)), (np.arange(E)[:, None] + np.arange(K)) % E, spec)
    assert collapsed > 1.5 * even


# scores and counts


@pytest.mark.parametrize("score_func", ["sigmoid", "sqrtsoftplus"])
def test_normalised_scores_sum_to_1_however_negative_the_logits(score_func):
    spec = BalanceSpec(score_func=score_func, norm_scores=True)
    logits_TE = np.random.default_rng(1).uniform(-1, 1, (6, E)) + np.array([[-1000], [-300], [-41], [-39], [0], [500]])
    scores_TE = balance_scores(logits_TE, spec)
    np.testing.assert_allclose(scores_TE.sum(axis=-1), 1, rtol=1e-12)
    assert (scores_TE > 0).all()


def test_an_eps_lets_very_negative_logits_fall_below_the_minimum_of_the_loss():
    # NVIDIA/Megatron-LM#1545
    logits_TE, ids_TK = np.full((T, E), -60.0), IDS_TK
    exact = BalanceSpec(score_func="sigmoid", norm_scores=True)
    assert balance_loss(logits_TE, ids_TK, exact) == pytest.approx(1)
    assert balance_loss(logits_TE, ids_TK, exact.replace(score_eps=1e-20)) < 1e-4
    ordinary = balance_scores(LOGITS_TE, exact.replace(score_eps=0.5))
    np.testing.assert_allclose(ordinary, sigmoid(LOGITS_TE) / (sigmoid(LOGITS_TE).sum(-1, keepdims=True) + 0.5))


@pytest.mark.parametrize(
    ("score_func", "raw"),
    [("sigmoid", sigmoid), ("sqrtsoftplus", lambda logits: np.sqrt(np.log1p(np.exp(logits))))],
)
def test_raw_scores_are_the_scores_of_the_router(score_func, raw):
    spec = BalanceSpec(score_func=score_func)
    np.testing.assert_allclose(balance_scores(LOGITS_TE, spec), raw(LOGITS_TE), rtol=1e-13)
    wide_TE = np.linspace(-39, 39, 4 * E).reshape(4, E)
    np.testing.assert_allclose(log_scores(wide_TE, spec), np.log(raw(wide_TE)), rtol=1e-13, atol=1e-15)
    near = np.array([[-40.0 - 1e-12, -40.0 + 1e-12]])
    np.testing.assert_allclose(*log_scores(near, spec)[0], rtol=1e-12)


def test_unbiased_counts_are_those_of_the_scores_and_not_of_the_choice():
    routed_counts = balance(LOGITS_TE, IDS_TK, BalanceSpec()).counts_UE
    unbiased = balance(LOGITS_TE, IDS_TK, BalanceSpec(counts="unbiased"))
    np.testing.assert_array_equal(routed_counts[0], tokens_per_expert(IDS_TK, E))
    np.testing.assert_array_equal(unbiased.counts_UE[0], tokens_per_expert(largest(LOGITS_TE), E))
    assert (routed_counts != unbiased.counts_UE).any()


def test_a_logit_of_minus_inf_is_never_counted_and_has_score_0():
    logits_TE = np.full((2, E), -np.inf)
    logits_TE[:, 3] = 1.0
    trace = balance(logits_TE, IDS_TK[:2], BalanceSpec(counts="unbiased"))
    np.testing.assert_array_equal(trace.counts_UE[0], 2 * (np.arange(E) == 3))
    np.testing.assert_array_equal(trace.scores_TE, np.tile(np.arange(E) == 3, (2, 1)))


def test_unused_slots_are_not_counted():
    ids_TK = IDS_TK.copy()
    ids_TK[::2, 1] = UNUSED
    np.testing.assert_array_equal(balance(LOGITS_TE, ids_TK, BalanceSpec()).counts_UE[0], tokens_per_expert(ids_TK, E))


def test_counted_slots_limits_the_counts_and_what_they_are_a_share_of():
    trace = balance(LOGITS_TE, IDS_TK, BalanceSpec(counted_slots=1))
    np.testing.assert_array_equal(trace.counts_UE[0], tokens_per_expert(IDS_TK[:, :1], E))
    assert trace.fractions_UE.sum() == pytest.approx(1)
    more = balance(LOGITS_TE, IDS_TK, BalanceSpec(counted_slots=5))
    assert more.loss == balance_loss(LOGITS_TE, IDS_TK, BalanceSpec())


# units: sequences, shards, layers

UNEVEN = (1, 6, 0, 8)


@pytest.mark.parametrize("shards", [None, UNEVEN, (T,), (1,) * T, (0, 0, T)])
@pytest.mark.parametrize("form", ["switch", "gshard", "deepseek_v2", "sequence", "maxtext"])
def test_a_global_loss_does_not_depend_on_how_the_batch_is_cut(form, shards):
    spec, sequences = BalanceSpec.of(form), (4, 11)
    whole = balance(LOGITS_TE, IDS_TK, spec, sequence_lengths=sequences)
    cut = balance(LOGITS_TE, IDS_TK, spec, sequence_lengths=sequences, tokens_per_shard=shards)
    assert cut.loss == whole.loss
    np.testing.assert_array_equal(cut.counts_UE, whole.counts_UE)


def test_a_global_loss_is_that_of_counts_and_scores_summed_over_shards():
    local = balance(LOGITS_TE, IDS_TK, BalanceSpec(scope="local"), tokens_per_shard=UNEVEN)
    whole = balance(LOGITS_TE, IDS_TK, BalanceSpec())
    np.testing.assert_array_equal(local.counts_UE.sum(axis=0), whole.counts_UE[0])
    sums_E = (local.mean_scores_UE * local.tokens_U[:, None]).sum(axis=0)
    np.testing.assert_allclose(E * (local.counts_UE.sum(axis=0) * sums_E).sum() / (T * T * K), whole.loss)


def test_a_local_loss_is_the_mean_over_the_shards_that_have_tokens():
    spec = BalanceSpec(scope="local")
    found = balance(LOGITS_TE, IDS_TK, spec, tokens_per_shard=UNEVEN)
    ends = np.cumsum(UNEVEN)
    alone = [balance_loss(LOGITS_TE[end - n : end], IDS_TK[end - n : end], spec)
             for n, end in zip(UNEVEN, ends, strict=True) if n]  # fmt: skip
    np.testing.assert_allclose(found.loss, np.mean(alone))
    assert found.loss != pytest.approx(balance_loss(LOGITS_TE, IDS_TK, spec))
    np.testing.assert_array_equal(found.tokens_U, UNEVEN)
    assert found.weights_U.sum() == pytest.approx(1)


def test_a_local_loss_per_sequence_is_a_mean_over_shards_of_means_over_sequences():
    spec = BalanceSpec(scope="local", per="sequence")
    found = balance_loss(LOGITS_TE, IDS_TK, spec, sequence_lengths=(4, 3, 8), tokens_per_shard=(7, 8))
    first, second, third = (
        balance_loss(LOGITS_TE[own], IDS_TK[own], BalanceSpec()) for own in (slice(4), slice(4, 7), slice(7, T))
    )
    np.testing.assert_allclose(found, ((first + second) / 2 + third) / 2)


def test_a_running_share_is_of_all_slots_so_far_and_sums_to_1_for_any_cut():
    shards = (5, 4, 0, 6)
    trace = balance(LOGITS_TE, IDS_TK, BalanceSpec(scope="running"), tokens_per_shard=shards)
    counts = [tokens_per_expert(IDS_TK[:end], E) for end in np.cumsum(shards)]
    np.testing.assert_array_equal(trace.counts_UE, counts)
    np.testing.assert_allclose(trace.fractions_UE, np.array(counts) / (K * np.cumsum(shards))[:, None])
    np.testing.assert_allclose(trace.weights_U, [1 / 3, 1 / 3, 0, 1 / 3])
    assert trace.losses_U[0] == pytest.approx(balance_loss(LOGITS_TE[:5], IDS_TK[:5], BalanceSpec()))


@pytest.mark.parametrize("cut", [(4, 4, 4), (6, 2, 4), (2, 2, 8), (0, 12)])
def test_a_running_loss_of_equal_frequencies_is_that_of_the_batch(cut):
    # NVIDIA/Megatron-LM#7213: f summed to 2 or to a half.
    logits_TE = np.tile([[2.0, 1, -1, -2], [-2, 1, -1, 2]], (6, 1))
    ids_TK = np.tile([[0, 1], [3, 1]], (6, 1))
    right = balance_loss(logits_TE, ids_TK, BalanceSpec())
    running = BalanceSpec.of("megatron_global_aux", counts="routed")
    assert balance_loss(logits_TE, ids_TK, running, tokens_per_shard=cut) == pytest.approx(right)
    mask_T = np.ones(12, dtype=bool)
    mask_T[cut[0] : sum(cut[:2])] = False
    padded = balance_loss(logits_TE, ids_TK, running, tokens_per_shard=cut, token_mask_T=mask_T)
    assert padded == pytest.approx(right if mask_T.any() else 0)


def test_running_mean_counts_are_the_mean_of_the_micro_batches_so_far():
    trace = balance(LOGITS_TE, IDS_TK, BalanceSpec(scope="running_mean"), tokens_per_shard=(5, 4, 6))
    counts = [tokens_per_expert(IDS_TK[own], E) for own in (slice(5), slice(5, 9), slice(9, T))]
    np.testing.assert_allclose(trace.counts_UE, [counts[0], sum(counts[:2]) / 2, sum(counts) / 3])


def test_layers_are_summed_or_pooled():
    other_TE, other_TK, _ = routed(seed=1)
    layers, ids = [LOGITS_TE, other_TE], [IDS_TK, other_TK]
    lengths = {"sequence_lengths": (4, 11), "tokens_per_shard": (6, 9)}
    summed = balance_layers(layers, ids, BalanceSpec(), **lengths)
    assert [trace.loss for trace in summed] == [
        balance_loss(z, i, BalanceSpec()) for z, i in zip(layers, ids, strict=True)
    ]
    (pooled,) = balance_layers(layers, ids, BalanceSpec(over_layers="pooled"))
    expected = balance_loss(np.concatenate(layers), np.concatenate(ids), BalanceSpec())
    np.testing.assert_allclose(pooled.loss, expected)
    mask_T = np.arange(T) % 4 != 0
    spec = BalanceSpec(over_layers="pooled", scope="local", per="sequence")
    (cut,) = balance_layers(layers, ids, spec, token_mask_T=mask_T, **lengths)
    parts = [(0, 4), (4, 6), (6, T)]
    first, second, third = (
        balance_loss(
            np.concatenate([z[start:end] for z in layers]),
            np.concatenate([i[start:end] for i in ids]),
            BalanceSpec(),
            token_mask_T=np.tile(mask_T[start:end], 2),
        )
        for start, end in parts
    )
    np.testing.assert_allclose(cut.loss, ((first + second) / 2 + third) / 2)
    with pytest.raises(ValueError, match="logits_by_layer is empty"):
        balance_layers([], [], spec)


# padding

MASK_T = np.arange(T) % 3 != 1


@pytest.mark.parametrize("form", BALANCE_FORMS)
def test_padding_changes_no_loss(form):
    spec, shards = BalanceSpec.of(form), (5, 4, 6)
    logits_TE, ids_TK = LOGITS_TE.copy(), IDS_TK.copy()
    logits_TE[~MASK_T], ids_TK[~MASK_T] = np.nan, 99
    padded = balance_loss(
        logits_TE, ids_TK, spec, token_mask_T=MASK_T, sequence_lengths=shards, tokens_per_shard=shards
    )
    valid = [int(MASK_T[start:end].sum()) for start, end in ((0, 5), (5, 9), (9, T))]
    compact = balance_loss(LOGITS_TE[MASK_T], IDS_TK[MASK_T], spec, sequence_lengths=valid, tokens_per_shard=valid)
    np.testing.assert_allclose(padded, compact, rtol=1e-14)


def test_a_sequence_of_padding_alone_is_in_no_mean():
    spec = BalanceSpec(per="sequence")
    mask_T = np.arange(T) < 10
    padded = balance_loss(LOGITS_TE, IDS_TK, spec, token_mask_T=mask_T, sequence_lengths=(4, 6, 5))
    assert padded == balance_loss(LOGITS_TE[:10], IDS_TK[:10], spec, sequence_lengths=(4, 6))


@pytest.mark.parametrize("form", BALANCE_FORMS)
def test_without_valid_tokens_the_loss_is_0(form):
    spec = BalanceSpec.of(form)
    assert balance_loss(LOGITS_TE, IDS_TK, spec, token_mask_T=np.zeros(T, bool)) == 0
    assert balance_loss(np.zeros((0, E)), np.zeros((0, K), int), spec) == 0
    assert balance_loss(np.zeros((0, E)), np.zeros((0, K), int), spec, tokens_per_shard=()) == 0


# z-loss


def test_the_z_loss_is_the_mean_of_squared_log_sums():
    expected = np.mean(np.log(np.exp(LOGITS_TE).sum(axis=-1)) ** 2)
    np.testing.assert_allclose(z_loss(LOGITS_TE, coeff=0.5), 0.5 * expected)
    np.testing.assert_allclose(z_loss(np.full((2, E), 1e4)), (1e4 + np.log(E)) ** 2)
    np.testing.assert_allclose(z_loss(np.concatenate([LOGITS_TE] * 2)), expected)
    assert z_loss(np.zeros((0, E))) == 0


def test_the_z_loss_knows_padding_and_shards():
    poisoned_TE = np.where(MASK_T[:, None], LOGITS_TE, np.nan)
    np.testing.assert_allclose(z_loss(poisoned_TE, token_mask_T=MASK_T), z_loss(LOGITS_TE[MASK_T]))
    cut = {"token_mask_T": MASK_T, "tokens_per_shard": UNEVEN}
    assert z_loss(poisoned_TE, **cut) == z_loss(poisoned_TE, token_mask_T=MASK_T)
    shards = [z_loss(LOGITS_TE[own][MASK_T[own]]) for own in (slice(1), slice(1, 7), slice(7, T))]
    np.testing.assert_allclose(z_loss(poisoned_TE, scope="local", **cut), np.mean(shards))


# what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coeff": -1.0}, "coeff is -1.0"),
        ({"score_func": "tanh"}, "score_func is 'tanh'"),
        ({"norm_scores": 1}, "norm_scores is 1; it is a bool"),
        ({"norm_scores": True}, "which is a share already"),
        ({"score_eps": 1e-20}, "score_eps is 1e-20, but norm_scores is False"),
        ({"counts": "biased"}, "counts is 'biased'"),
        ({"counted_slots": 0}, "counted_slots is 0"),
        ({"counts_over": "rows"}, "counts_over is 'rows'"),
        ({"expert_power": 2}, "expert_power is 2"),
        ({"per": "token"}, "per is 'token'"),
        ({"scope": "rank"}, "scope is 'rank'"),
        ({"scope": "running", "per": "sequence"}, "running counts are of batches"),
        ({"over_layers": "mean"}, "over_layers is 'mean'"),
    ],
)
def test_a_wrong_spec_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BalanceSpec(**changes)


def test_a_spec_is_read_from_a_form_and_back_from_its_fields():
    spec = BalanceSpec.from_dict({"form": "transformers", "coeff": 0.001, "scope": "global"})
    assert spec == BalanceSpec.of("transformers", coeff=0.001).replace(scope="global")
    assert BalanceSpec.from_dict(spec.to_dict()) == spec
    for wrong in ({"form": "swich"}, {"fom": "switch"}):
        with pytest.raises(ValueError, match=r"did you mean switch|unknown field 'fom'"):
            BalanceSpec.from_dict(wrong)
    with pytest.raises(ValueError, match="did you mean switch"):
        BalanceSpec.of("swich")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits_TE": np.where(np.arange(E) == 1, np.nan, LOGITS_TE)}, "entries are finite, or -inf"),
        ({"logits_TE": np.full((T, E), -np.inf)}, "a token has an entry above -inf"),
        ({"expert_ids_TK": np.full((T, K), 3)}, "the experts of a token are distinct"),
        ({"expert_ids_TK": IDS_TK + 3}, "ids are between -1 and 6"),
        ({"expert_ids_TK": np.full((T, E + 1), UNUSED), "spec": BalanceSpec(counts="unbiased")}, "has 8 slots; the 7"),
        ({"token_mask_T": np.ones(T)}, "token_mask_T has dtype float64; it is bool"),
        ({"sequence_lengths": (3, 4)}, "sequence_lengths sums to 7; there are 15 tokens"),
        ({"tokens_per_shard": (16, -1)}, "lengths are at least 0"),
        ({"tokens_per_shard": ()}, "tokens_per_shard sums to 0; there are 15 tokens"),
    ],
)
def test_wrong_inputs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        balance(**{"logits_TE": LOGITS_TE, "expert_ids_TK": IDS_TK, "spec": BalanceSpec()} | changes)


def test_a_z_loss_has_two_scopes():
    with pytest.raises(ValueError, match="scope is 'running'"):
        z_loss(LOGITS_TE, scope="running")
