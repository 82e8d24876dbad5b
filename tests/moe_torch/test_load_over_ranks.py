"""moe_torch, tests of load over ranks: losses, counts, capacity and biases are those of the whole batch."""

import numpy as np
import pytest
from load_on_ranks import biases_after_a_step, counts, hook_without_a_group, kept_ids, loss_and_gradient, sharded_layer

import moe_ref
from conformance.subjects.ranks import RankError, Ranks
from moe_ref import BalanceSpec, BiasUpdateSpec, CapacitySpec, ExpertSpec, LayerParams, LayerSpec, RouterSpec

T, E, K, S = 11, 5, 2, 3
SHARDS = (5, 2, 4)
SEQUENCES = (4, 4, 3)
SEQUENCE_OF_T = np.repeat(np.arange(3), SEQUENCES)
MASK = (np.arange(T) % 4 != 1) & ((np.arange(T) < 5) | (np.arange(T) >= 7))  # the second rank has padding alone
LAYER = LayerSpec(
    router=RouterSpec(num_experts=E, top_k=K, score_func="sigmoid"), experts=ExpertSpec(dim=4, hidden_dim=3)
)


@pytest.fixture(scope="module")
def ranks():
    with Ranks(preload=("moe_torch.bias_hook", "moe_torch.losses", "moe_torch.moe")) as ranks:
        yield ranks


def case(seed=0):
    rng = np.random.default_rng(seed)
    logits_TE = 3 * rng.standard_normal((T, E))
    ids_TK = np.argsort(-logits_TE + rng.standard_normal((T, E)), axis=1)[:, :K]
    return np.where(MASK[:, None], logits_TE, np.nan), ids_TK


@pytest.mark.parametrize("form", ["switch", "sequence", "transformers", "megatron_seq_aux"])
def test_a_loss_and_its_gradient_are_those_of_the_whole_batch(ranks, form):
    logits_TE, ids_TK = case()
    spec = BalanceSpec.of(form)
    found = ranks.run(S, loss_and_gradient, spec, SHARDS, logits_TE, ids_TK, MASK, SEQUENCE_OF_T)
    inputs = {"token_mask_T": MASK, "sequence_lengths": SEQUENCES, "tokens_per_shard": SHARDS}
    losses, gradients = zip(*found, strict=True)
    np.testing.assert_allclose(losses, moe_ref.balance_loss(logits_TE, ids_TK, spec, **inputs), rtol=1e-12)
    expected_TE = moe_ref.balance_loss_backward(logits_TE, ids_TK, spec, **inputs)
    np.testing.assert_allclose(np.concatenate(gradients), expected_TE, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_the_z_loss_is_that_of_the_whole_batch(ranks, scope):
    logits_TE, ids_TK = case()
    found = ranks.run(S, loss_and_gradient, scope, SHARDS, logits_TE, ids_TK, MASK, SEQUENCE_OF_T)
    inputs = {"scope": scope, "token_mask_T": MASK, "tokens_per_shard": SHARDS}
    losses, gradients = zip(*found, strict=True)
    np.testing.assert_allclose(losses, moe_ref.z_loss(logits_TE, **inputs), rtol=1e-12)
    expected_TE = moe_ref.z_loss_backward(logits_TE, **inputs)
    np.testing.assert_allclose(np.concatenate(gradients), expected_TE, rtol=1e-10, atol=1e-14)


def test_counts_are_those_of_the_whole_batch(ranks):
    _, ids_TK = case()
    for found_E in ranks.run(S, counts, SHARDS, ids_TK, E):
        np.testing.assert_array_equal(found_E, moe_ref.tokens_per_expert(ids_TK, E))


@pytest.mark.parametrize(
    ("scope", "drop_order"), [("global", "first_come"), ("global", "slot_major"), ("sequence", "by_weight")]
)
def test_a_capacity_is_that_of_the_whole_batch(ranks, scope, drop_order):
    spec = CapacitySpec(
        factor=1.1,
        scope="rank",
        drop_order=drop_order,
        then=CapacitySpec(factor=0.7, scope=scope, drop_order=drop_order),
    )
    _, ids_TK = case(1)
    weights_TK = np.round(np.random.default_rng(0).random((T, K)), 1)
    found = ranks.run(S, kept_ids, spec, SHARDS, ids_TK, weights_TK, MASK, SEQUENCE_OF_T, E)
    inputs = {"token_mask_T": MASK, "sequence_lengths": SEQUENCES, "tokens_per_shard": SHARDS}
    expected = moe_ref.apply_capacity(ids_TK, weights_TK, spec, E, **inputs)
    np.testing.assert_array_equal(np.concatenate(found), expected.expert_ids_TK)


@pytest.mark.parametrize("wrapped", ["not", "first", "later"])
def test_biases_move_by_the_counts_of_all_ranks_micro_batches_and_layers_in_one_all_reduce(ranks, wrapped):
    # DistributedDataParallel copies the buffers of its first rank to the others before each micro-batch.
    # Signed rank by rank or batch by batch, these counts move other experts.
    micro_batches = np.random.default_rng(0).standard_normal((3, S, 7, 4)).astype(np.float32)
    update = BiasUpdateSpec(rate=0.25, centred=True)
    found = ranks.run(S, biases_after_a_step, LAYER, update, micro_batches, wrapped)
    for biases, counts_of_layers, num_all_reduces in found:
        assert num_all_reduces == 1
        for bias_E, counts_E, same_E in zip(biases, counts_of_layers.values(), found[0][0], strict=True):
            assert counts_E.sum() == micro_batches[..., 0].size * K
            np.testing.assert_allclose(bias_E, moe_ref.bias_update(counts_E, update, np.zeros(E)), rtol=1e-6)
            np.testing.assert_array_equal(bias_E, same_E)


@pytest.mark.parametrize("scope", ["rank", "global"])
def test_a_layer_over_data_and_expert_ranks_drops_and_balances_as_the_whole_batch(ranks, scope):
    spec = LAYER.replace(router=LAYER.router.replace(num_experts=6), experts=ExpertSpec(dim=8, hidden_dim=4))
    capacity = CapacitySpec(factor=0.8, scope=scope, drop_order="slot_major")
    lengths, params, update = (5, 2, 7, 4), LayerParams.init(spec, 0), BiasUpdateSpec(rate=0.25)
    x_TD = np.random.default_rng(0).standard_normal((sum(lengths), 8))
    found = ranks.run(4, sharded_layer, spec, params, capacity, update, np.split(x_TD, np.cumsum(lengths)[:-1]))
    outputs, biases = zip(*found, strict=True)
    trace = moe_ref.moe_layer(x_TD, params, spec, capacity=capacity, tokens_per_shard=lengths)
    assert trace.capacity is not None
    assert trace.capacity.dropped_TK.any()
    np.testing.assert_allclose(np.concatenate(outputs), trace.output_TD, rtol=1e-9, atol=1e-11)
    # The choice counts, dropped or not.
    counts_E = moe_ref.tokens_per_expert(trace.routing.expert_ids_TK, 6)
    expected_E = moe_ref.bias_update(counts_E, update, params.expert_bias_E)
    for bias_E in biases:
        np.testing.assert_allclose(bias_E, expected_E, rtol=1e-6, atol=1e-7)


def test_a_hook_among_several_processes_is_told_its_group(ranks):
    with pytest.raises(RankError, match="group is None, but there are 3 processes"):
        ranks.run(S, hook_without_a_group, LAYER)
