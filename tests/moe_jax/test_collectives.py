"""moe_jax, tests of the collectives: ragged all-to-all against a loop over ranks, with poison in what nobody sent."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from moe_jax.parallel.collectives import ragged_all_to_all, vary

N, M, D = 11, 23, 3
"""Rows of each rank to send, and rows of its output."""
POISONS = (np.nan, 1e30)


def exchange(num_ranks: int, load: str, seed: int = 0):
    """Sizes and offsets of all ranks: runs in rank order, or in another order with gaps between them."""
    rng = np.random.default_rng(seed)
    sizes_SS = rng.integers(0, min(N, M) // num_ranks + 1, (num_ranks, num_ranks))
    if load == "one receiver":
        sizes_SS[:, 1:] = 0
        sizes_SS[:, 0] = min(N, M // num_ranks)
    if load == "nothing":
        sizes_SS[:] = 0
    order_S = np.arange(num_ranks) if load == "in order" else rng.permutation(num_ranks)
    input_SS, output_SS = np.zeros_like(sizes_SS), np.zeros_like(sizes_SS)
    for s in range(num_ranks):
        input_SS[s, order_S] = np.cumsum(sizes_SS[s, order_S]) - sizes_SS[s, order_S]
        output_SS[order_S, s] = np.cumsum(sizes_SS[order_S, s]) - sizes_SS[order_S, s]
    # input[s, r]: where rank s has the rows for r; output[s, r]: where r wants those from s.
    return input_SS, sizes_SS, output_SS


def reference(operand_SND, output_SMD, input_SS, sizes_SS, output_SS):
    """Row by row."""
    result_SMD = output_SMD.copy()
    for s, r in np.ndindex(sizes_SS.shape):
        for i in range(sizes_SS[s, r]):
            result_SMD[r, output_SS[s, r] + i] = operand_SND[s, input_SS[s, r] + i]
    return result_SMD


def reference_backward(d_result_SMD, operand_SND, input_SS, sizes_SS, output_SS):
    d_operand_SND, d_output_SMD = np.zeros_like(operand_SND), d_result_SMD.copy()
    for s, r in np.ndindex(sizes_SS.shape):
        for i in range(sizes_SS[s, r]):
            d_operand_SND[s, input_SS[s, r] + i] = d_result_SMD[r, output_SS[s, r] + i]
            d_output_SMD[r, output_SS[s, r] + i] = 0
    return d_operand_SND, d_output_SMD


@lru_cache
def compiled(num_ranks: int):
    mesh = Mesh(np.array(jax.devices()[:num_ranks]), ("x",), axis_types=(AxisType.Auto,))
    own = PartitionSpec("x")
    sharded = jax.shard_map(partial(ragged_all_to_all, axis_name="x"), mesh=mesh, in_specs=own, out_specs=own)

    @jax.jit
    def run(operand, output, d_result, *sizes):
        result, pull = jax.vjp(lambda operand, output: sharded(operand, output, *sizes), operand, output)
        return result, *pull(d_result)

    return run


@pytest.mark.parametrize("load", ["in order", "with gaps", "one receiver", "nothing"])
@pytest.mark.parametrize("num_ranks", [1, 4, 8])
def test_every_run_arrives_and_other_rows_keep_what_they_held(num_ranks, load):
    rng = np.random.default_rng(1)
    input_SS, sizes_SS, output_SS = exchange(num_ranks, load)
    operand = rng.standard_normal((num_ranks, N, D), np.float32)
    d_result = rng.standard_normal((num_ranks, M, D), np.float32)
    sizes = [a.reshape(-1).astype(np.int32) for a in (input_SS, sizes_SS, output_SS, sizes_SS.T)]
    for poison in POISONS:
        output = np.full((num_ranks, M, D), poison, np.float32)
        found = compiled(num_ranks)(operand.reshape(-1, D), output.reshape(-1, D), d_result.reshape(-1, D), *sizes)
        result = reference(operand, output, input_SS, sizes_SS, output_SS)
        expected = (result, *reference_backward(d_result, operand, input_SS, sizes_SS, output_SS))
        for array, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(array).reshape(wanted.shape), wanted)


@pytest.mark.parametrize("poison", POISONS)
def test_the_gradient_of_a_row_that_nobody_sent_reaches_no_row_that_was(poison):
    input_SS, sizes_SS, output_SS = exchange(4, "in order")
    sizes = [a.reshape(-1).astype(np.int32) for a in (input_SS, sizes_SS, output_SS, sizes_SS.T)]
    d_result = np.full((4, M, D), poison, np.float32)
    for r in range(4):
        d_result[r, : sizes_SS[:, r].sum()] = 1
    _, d_operand, d_output = compiled(4)(jnp.ones((4 * N, D)), jnp.ones((4 * M, D)), d_result.reshape(-1, D), *sizes)
    ones = reference_backward(d_result, np.ones((4, N, D), np.float32), input_SS, sizes_SS, output_SS)
    np.testing.assert_array_equal(np.asarray(d_operand).reshape(4, N, D), ones[0])
    np.testing.assert_array_equal(np.asarray(d_output).reshape(4, M, D), ones[1])
    assert set(np.unique(ones[0])) == {0, 1}


@pytest.mark.parametrize(("platform", "native"), [("cpu", False), ("cuda", True), ("tpu", True)])
def test_the_native_collective_is_used_where_the_platform_has_it(platform, native):
    rows, sizes = jnp.ones((4 * N, D)), jnp.zeros(16, jnp.int32)
    traced = compiled(4).trace(rows, jnp.ones((4 * M, D)), jnp.ones((4 * M, D)), *[sizes] * 4)
    assert ("ragged_all_to_all" in traced.lower(lowering_platforms=(platform,)).as_text()) == native


def test_no_rows_are_exchanged_without_a_collective():
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",), axis_types=(AxisType.Auto,))
    own = PartitionSpec("x")
    sharded = jax.shard_map(partial(ragged_all_to_all, axis_name="x"), mesh=mesh, in_specs=own, out_specs=own)
    output = jnp.arange(2.0 * M * D).reshape(2 * M, D)
    np.testing.assert_array_equal(sharded(jnp.zeros((0, D)), output, *[jnp.zeros(4, jnp.int32)] * 4), output)


def test_rows_of_another_width_are_an_error():
    with pytest.raises(ValueError, match=r"float32\[2, 3\] and float32\[2, 4\]"):
        ragged_all_to_all(jnp.ones((2, 3)), jnp.ones((2, 4)), *[jnp.zeros(1, jnp.int32)] * 4, axis_name="x")


def test_the_gradient_of_what_was_made_to_vary_is_the_sum():
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",), axis_types=(AxisType.Auto,))

    def own_share(value):
        return vary(value, ("x",)) * (jax.lax.axis_index("x") + 1.0)

    share = jax.shard_map(own_share, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec("x"))
    np.testing.assert_array_equal(jax.grad(lambda value: share(value).sum())(jnp.ones(1)), [10.0])
