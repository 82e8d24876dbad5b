"""moe_jax, tests of load and losses: each against moe_ref, value and gradient, on one device and over a mesh."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import moe_ref
from moe_jax.balance import bias_update, load_statistics, tokens_per_expert
from moe_jax.losses import balance_loss, balance_sums, loss_of_sums, z_loss
from moe_ref import BalanceSpec, BiasUpdateSpec
from moe_ref.specs.balance import BIAS_RULES

T, E, K = 12, 5, 2
# Differences of shares of about 1, some of them rounded away: a few units of 2 ** -53.
SAME_GRADIENT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-14}
SHARDS = 4
SEQUENCES = (4, 0, 5, 3)
SEQUENCE_OF_T = np.repeat(np.arange(4), SEQUENCES)
MASK = np.arange(T) % 5 != 1
SIGMOID = {"score_func": "sigmoid", "norm_scores": True, "score_eps": 1e-20}
FORMS = ("switch", "gshard", "transformers", "sequence", "maxtext", "megatron_seq_aux",
         "megatron_global_aux", "megatron_global_aux_0_16")  # fmt: skip
"""Each value of each field at least once; a program costs a second."""
SPECS = {form: BalanceSpec.of(form, coeff=0.3) for form in FORMS} | {
    "megatron_sigmoid": BalanceSpec.of("megatron_seq_aux", **SIGMOID),
    "sqrtsoftplus": BalanceSpec(score_func="sqrtsoftplus", norm_scores=True),
    "raw_sigmoid": BalanceSpec(score_func="sigmoid", per="sequence", scope="local", expert_power=0),
    "raw_sqrtsoftplus": BalanceSpec(score_func="sqrtsoftplus"),
}
GLOBAL = ("switch", "sequence", "transformers", "raw_sigmoid")
"""For the mesh: counts of the choice and of scores, scopes global and local, sequences that cross shards."""


def case(seed: int = 0, size: float = 3.0):
    """Logits, and a choice that is not theirs; what belongs to padding is NaN."""
    rng = np.random.default_rng(seed)
    logits_TE = size * rng.standard_normal((T, E))
    ids_TK = np.argsort(-logits_TE + rng.standard_normal((T, E)), axis=1)[:, :K]
    ids_TK[3, 1] = -1
    logits_TE[~MASK] = np.nan
    return logits_TE, ids_TK


INPUTS = {"token_mask_T": MASK, "sequence_of_T": SEQUENCE_OF_T, "num_sequences": len(SEQUENCES)}
REFERENCE_INPUTS = {"token_mask_T": MASK, "sequence_lengths": SEQUENCES}


@pytest.mark.parametrize("name", SPECS)
def test_balance_losses_and_their_gradients_are_the_reference_s(name):
    compiled = jax.jit(jax.value_and_grad(partial(balance_loss, spec=SPECS[name], **INPUTS)))
    for seed, size in ((0, 3.0), (1, 100.0)):
        logits_TE, ids_TK = case(seed, size)
        with jax.enable_x64(True):
            loss, d_logits_TE = compiled(logits_TE, ids_TK)
        expected = moe_ref.balance_loss(logits_TE, ids_TK, SPECS[name], **REFERENCE_INPUTS)
        np.testing.assert_allclose(loss, expected, rtol=1e-12)
        d_expected_TE = moe_ref.balance_loss_backward(logits_TE, ids_TK, SPECS[name], **REFERENCE_INPUTS)
        np.testing.assert_allclose(d_logits_TE, d_expected_TE, **SAME_GRADIENT)


def test_scores_of_very_negative_logits_still_sum_to_one():
    # Their sum is 0 in float32, and 1e-34 with nothing but an epsilon (NVIDIA/Megatron-LM#1545).
    spec = BalanceSpec(score_func="sigmoid", norm_scores=True)
    logits_TE = np.full((T, E), -120.0, np.float32)
    ids_TK = np.arange(T * K).reshape(T, K) % E
    loss, d_logits_TE = jax.jit(jax.value_and_grad(partial(balance_loss, spec=spec)))(logits_TE, ids_TK)
    np.testing.assert_allclose(loss, 1, rtol=1e-6)
    assert np.isfinite(d_logits_TE).all()


def test_an_expert_that_is_never_chosen_has_no_gradient():
    logits_TE, ids_TK = case()
    logits_TE[:, 4] = -np.inf
    ids_TK[ids_TK == 4] = 0
    for name in ("sequence", "sqrtsoftplus"):
        d_logits_TE = jax.jit(jax.grad(partial(balance_loss, spec=SPECS[name], **INPUTS)))(logits_TE, ids_TK)
        assert np.isfinite(d_logits_TE).all()
        np.testing.assert_array_equal(d_logits_TE[:, 4], 0)


@pytest.mark.parametrize("name", ["switch", "megatron_global_aux", "megatron_global_aux_0_16"])
def test_micro_batches_that_are_added_are_one_batch_and_running_shares_are_of_all_so_far(name):
    logits_TE, ids_TK = case()
    spec = SPECS[name]

    @jax.jit
    def both(logits_TE, ids_TK):
        first, second = (
            balance_sums(logits_TE[own], ids_TK[own], spec, token_mask_T=MASK[own]) for own in (slice(5), slice(5, T))
        )
        if spec.scope == "global":
            return loss_of_sums(first + second, spec)
        return (loss_of_sums(first, spec) + loss_of_sums(second, spec, earlier=first, num_earlier=1)) / 2

    with jax.enable_x64(True):
        found = both(logits_TE, ids_TK)
    expected = moe_ref.balance_loss(logits_TE, ids_TK, spec, token_mask_T=MASK, tokens_per_shard=(5, T - 5))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def over_mesh(function, *in_specs):
    """`function` under shard_map on four devices; its result is replicated."""
    mesh = Mesh(np.array(jax.devices("cpu")[:SHARDS]), ("shards",))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec()))


SHARDED = PartitionSpec("shards")


@pytest.mark.parametrize("name", GLOBAL)
def test_a_loss_over_a_mesh_is_that_of_the_whole_batch_and_so_is_its_gradient(name):
    logits_TE, ids_TK = case()
    mask_T = MASK & (np.arange(T) >= 3)  # the first shard is padding alone
    spec, own = SPECS[name], {"num_sequences": len(SEQUENCES), "axis_name": "shards"}

    def loss(logits_TE, ids_TK, mask_T, sequence_of_T):
        return balance_loss(logits_TE, ids_TK, spec, token_mask_T=mask_T, sequence_of_T=sequence_of_T, **own)

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=Mesh(np.array(jax.devices("cpu")[:SHARDS]), ("shards",)),
        in_specs=(SHARDED,) * 4,
        out_specs=(PartitionSpec(), SHARDED),
    )
    def inside(*arrays):
        return jax.value_and_grad(loss)(*arrays)

    with jax.enable_x64(True):
        whole = over_mesh(loss, *(SHARDED,) * 4)
        arrays = (logits_TE, ids_TK, mask_T, SEQUENCE_OF_T)
        found, d_outside_TE = jax.value_and_grad(whole)(*arrays)
        found_inside, d_inside_TE = inside(*arrays)
    inputs = {"token_mask_T": mask_T, "sequence_lengths": SEQUENCES, "tokens_per_shard": (3, 3, 3, 3)}
    np.testing.assert_allclose(
        [found, found_inside], moe_ref.balance_loss(logits_TE, ids_TK, spec, **inputs), rtol=1e-12
    )
    expected_TE = moe_ref.balance_loss_backward(logits_TE, ids_TK, spec, **inputs)
    for d_logits_TE in (d_outside_TE, d_inside_TE):
        np.testing.assert_allclose(d_logits_TE, expected_TE, **SAME_GRADIENT)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_the_z_loss_reads_logits_of_valid_tokens(scope):
    logits_TE, _ = case(size=20.0)
    mask_T = MASK & (np.arange(T) >= 3)
    loss = partial(z_loss, coeff=0.5, scope=scope, axis_name="shards")
    with jax.enable_x64(True):
        whole = over_mesh(lambda logits_TE, mask_T: loss(logits_TE, token_mask_T=mask_T), SHARDED, SHARDED)
        found, d_logits_TE = jax.value_and_grad(whole)(logits_TE, mask_T)
    inputs = {"coeff": 0.5, "scope": scope, "token_mask_T": mask_T, "tokens_per_shard": (3, 3, 3, 3)}
    np.testing.assert_allclose(found, moe_ref.z_loss(logits_TE, **inputs), rtol=1e-12)
    np.testing.assert_allclose(d_logits_TE, moe_ref.z_loss_backward(logits_TE, **inputs), **SAME_GRADIENT)


def test_counts_over_a_mesh_are_those_of_the_whole_batch():
    _, ids_TK = case()
    ids_TK[5, 0] = E  # a null expert
    count = over_mesh(partial(tokens_per_expert, num_experts=E, axis_name="shards"), SHARDED)
    np.testing.assert_array_equal(count(ids_TK), moe_ref.tokens_per_expert(ids_TK, E))
    found_E = tokens_per_expert(ids_TK, E, MASK)
    np.testing.assert_array_equal(found_E, moe_ref.tokens_per_expert(ids_TK, E, MASK))
    np.testing.assert_array_equal(tokens_per_expert(ids_TK[:0], E), np.zeros(E))


def test_statistics_are_the_reference_s():
    counts_E = np.array([3, 0, 4, 1, 0, 2])
    for options in ({}, {"num_ranks": 3}, {"num_ranks": 2, "placement": (2, 1, 0, 3, 5, 4)}):
        found, expected = load_statistics(counts_E, **options), moe_ref.load_statistics(counts_E, **options)
        for name, value in vars(expected).items():
            np.testing.assert_allclose(getattr(found, name), value, rtol=1e-6, err_msg=name)
    assert load_statistics(np.zeros(E, int)).max_over_mean == 0
    with pytest.raises(ValueError, match="num_ranks is 4, which does not divide the 6 experts"):
        load_statistics(counts_E, num_ranks=4)
    with pytest.raises(ValueError, match="each of the 6 expert ids once"):
        load_statistics(counts_E, placement=(0, 1, 2, 3, 4, 4))


@pytest.mark.parametrize("rule", BIAS_RULES)
def test_biases_move_as_in_the_reference(rule):
    rng = np.random.default_rng(0)
    counts_LE, bias_LE = rng.integers(0, 6, (7, E)), rng.standard_normal((7, E))
    counts_LE[0] = 2
    with jax.enable_x64(True):
        for frozen_E in (None, (True, False, False, True, False)):
            for centred in (False, True):
                spec = BiasUpdateSpec(rate=0.1, rule=rule, centred=centred, frozen_E=frozen_E)
                found_LE = bias_update(counts_LE, spec, bias_LE)
                np.testing.assert_allclose(found_LE, moe_ref.bias_update(counts_LE, spec, bias_LE), rtol=1e-14)


def test_a_balanced_expert_keeps_its_bias_at_any_load():
    # In float32 the mean of these counts is rounded, and their product with E exceeds int32.
    counts_E = np.array([400_000_001, 400_000_003, 400_000_002, 400_000_002, 400_000_002], np.int32)
    found_E = bias_update(counts_E, BiasUpdateSpec(rate=1.0), np.zeros(E, np.float32))
    np.testing.assert_array_equal(found_E, [1, -1, 0, 0, 0])


def test_the_sign_is_taken_of_the_sum_over_the_mesh():
    counts_SE = np.array([[9, 0, 0, 0, 1], [0, 2, 2, 3, 0], [0, 2, 3, 2, 4], [0, 3, 2, 2, 3]])
    spec = BiasUpdateSpec(rate=0.5)

    def update(counts_1E):
        return bias_update(counts_1E[0], spec, jnp.zeros(E), axis_name="shards")

    np.testing.assert_array_equal(
        over_mesh(update, SHARDED)(counts_SE), moe_ref.bias_update(counts_SE.sum(0), spec, np.zeros(E))
    )


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"counts_E is float32\[5\]"):
        bias_update(np.ones(E, np.float32), BiasUpdateSpec(), np.zeros(E))
    with pytest.raises(ValueError, match="frozen_E has 2 entries; there are 5 biases"):
        bias_update(np.ones(E, int), BiasUpdateSpec(frozen_E=(True, False)), np.zeros(E))
    with pytest.raises(ValueError, match="scope is 'running'"):
        z_loss(np.ones((T, E)), scope="running")
    with pytest.raises(ValueError, match=r"logits_TE is float32\[5\]"):
        z_loss(np.ones(E, np.float32))
