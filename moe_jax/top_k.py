"""moe_jax, top-k: the k largest of each row in the canonical order, fast on a CPU."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

MAX_ROUNDS = 16
"""Above this many, `top_k` leaves its rounds to lax.top_k: each round is code of its own."""
WIDE = 128
"""Above this many entries, `top_k` looks at chunks of them first."""


def top_k(values_TN: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest entries of each row and their ids, descending; ties go to the lower id. [SEL-5, SEL-6]

    -0.0 equals 0.0, and NaN is above all. Found by k rounds of integer maxima, which compilers vectorise. Of many
    entries the k chunks with the largest maxima are kept first: they hold the k best, because each better chunk
    holds an entry that is better.
    """
    if k > MAX_ROUNDS:
        # lax.top_k promises the lower index among equals, but ranks -0.0 below 0.0 on CPU.
        return lax.top_k(jnp.where(values_TN == 0, 0, values_TN), k)
    keys_TN, ids_TN = to_keys(values_TN), positions(values_TN)
    chunk = chunk_size(values_TN.shape[-1])
    if chunk > 1:
        keys_TN, ids_TN = keep_chunks(keys_TN, k, chunk)
    best_keys_TK, best_ids_TK = rounds(keys_TN, ids_TN, k)
    return to_values(best_keys_TK, values_TN.dtype), best_ids_TK


def chunk_size(num_entries: int) -> int:
    """The smallest power of two, as far as it divides the entries, that leaves at most WIDE chunks."""
    chunk = 1
    while num_entries // chunk > WIDE and num_entries % (2 * chunk) == 0:
        chunk *= 2
    return chunk


def keep_chunks(keys_TN: jax.Array, k: int, chunk: int) -> tuple[jax.Array, jax.Array]:
    """The entries of the k chunks of consecutive entries whose maxima are the largest, and their ids."""
    *lead, N = keys_TN.shape
    chunked_TBC = keys_TN.reshape(*lead, N // chunk, chunk)
    best_TB = chunked_TBC.max(axis=-1)
    _, kept_ids_TB = rounds(best_TB, positions(best_TB), k)
    kept_TBC = jnp.take_along_axis(chunked_TBC, kept_ids_TB[..., None], axis=-2, mode="promise_in_bounds")
    ids_TBC = kept_ids_TB[..., None] * chunk + positions(kept_TBC)
    return kept_TBC.reshape(*lead, k * chunk), ids_TBC.reshape(*lead, k * chunk)


def rounds(keys_TN: jax.Array, ids_TN: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest keys of each row and their ids, one round for each; ties go to the lower id."""
    taken, no_id = jnp.iinfo(keys_TN.dtype).min, jnp.iinfo(jnp.int32).max
    left_TN, keys, ids = keys_TN, [], []
    for _ in range(k):
        keys.append(fold(jnp.maximum, left_TN))
        ids.append(fold(jnp.minimum, jnp.where(left_TN == keys[-1], ids_TN, no_id)))
        left_TN = jnp.where(ids_TN == ids[-1], taken, left_TN)
    return jnp.concatenate(keys, axis=-1), jnp.concatenate(ids, axis=-1)


def fold(smaller_or_larger: Any, array_TN: jax.Array) -> jax.Array:
    """The minimum or maximum of each row, with that axis kept: halves are folded while they are long."""
    # XLA for CPU vectorises a fold; its reduction of a long row of integers runs one entry at a time.
    while array_TN.shape[-1] > 16 and array_TN.shape[-1] % 2 == 0:
        low_TN, high_TN = jnp.split(array_TN, 2, axis=-1)
        array_TN = smaller_or_larger(low_TN, high_TN)
    return smaller_or_larger.reduce(array_TN, axis=-1, keepdims=True)


def positions(values_TN: jax.Array) -> jax.Array:
    """The position of each entry in its row."""
    return lax.broadcasted_iota(jnp.int32, values_TN.shape, values_TN.ndim - 1)


def to_keys(values: jax.Array) -> jax.Array:
    """Integers in the order of the floats: -0.0 becomes that of 0.0, NaN the largest."""
    dtype = jnp.int64 if values.dtype == jnp.float64 else jnp.int32
    bits = lax.bitcast_convert_type(values, dtype)
    # The bits of a negative float are those of its size, plus the lowest integer.
    keys = jnp.where(bits < 0, jnp.iinfo(dtype).min - bits, bits)
    return jnp.where(jnp.isnan(values), jnp.iinfo(dtype).max, keys)


def to_values(keys: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The floats that `to_keys` made integers of; NaN is NaN again."""
    bits = jnp.where(keys < 0, jnp.iinfo(keys.dtype).min - keys, keys)
    return lax.bitcast_convert_type(bits, dtype)
