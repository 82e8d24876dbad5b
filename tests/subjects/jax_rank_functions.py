"""Tests, what processes of JAX run to show what the pool of ranks does with them."""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def total(number: float) -> tuple[int, int, float]:
    """The process, how many there are, and the sum over them of number * (process + 1)."""
    mesh = Mesh(np.array([jax.local_devices(process_index=p)[0] for p in range(jax.process_count())]), ("p",))
    own = np.array([number * (jax.process_index() + 1)], np.float32)
    values_P = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("p")), own)
    return jax.process_index(), jax.process_count(), float(jax.jit(jnp.sum)(values_P))


def fail_on(process: int, how: str) -> float:
    """One process fails; the others wait for it."""
    if jax.process_index() == process:
        if how == "raise":
            raise KeyError("a wrong key")
        if how == "exit":
            os._exit(7)
        if how == "hang":
            sleep_for_long()
    return total(1.0)[2]


def sleep_for_long() -> None:
    """Hangs in no collective."""
    time.sleep(600)


def pid() -> int:
    """The process id."""
    return os.getpid()
