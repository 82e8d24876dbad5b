"""conformance, the subjects of jax: how a process joins the others, by jax.distributed and gloo."""

from pathlib import Path

import jax

START = 60
"""Seconds for processes to find each other."""


def join(rank: int, size: int, folder: Path) -> None:
    """Makes this process number `rank` of a JAX of `size` processes, on CPUs; the folder is that of the world."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # A socket in a folder of our own: nobody else takes it, as somebody may take a port that was free a moment ago.
    address = f"unix:{folder / 'coordinator'}"
    jax.distributed.initialize(
        coordinator_address=address,
        coordinator_bind_address=address,
        num_processes=size,
        process_id=rank,
        initialization_timeout=START,
        cluster_detection_method="deactivate",
    )
