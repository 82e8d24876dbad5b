"""Tests, what ranks run to show what the pool of ranks does."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist


def total(number: float) -> tuple[int, float]:
    """The rank, and the sum over the ranks of number * (rank + 1)."""
    value = torch.tensor(number * (dist.get_rank() + 1), dtype=torch.float64)
    dist.all_reduce(value)
    return dist.get_rank(), value.item()


def uneven(number: int) -> list[float]:
    """What a rank receives when rank r sends r + d rows of `number` to rank d, and its gradient goes back."""
    from torch.distributed.nn.functional import all_to_all_single

    rank, size = dist.get_rank(), dist.get_world_size()
    sent = [rank + d for d in range(size)]
    received = [r + rank for r in range(size)]
    rows = torch.full((sum(sent),), float(number), requires_grad=True)
    out = all_to_all_single(torch.empty(sum(received)), rows, received, sent)
    (out * (rank + 1)).sum().backward()
    assert rows.grad is not None
    return rows.grad.tolist()


def fail_on(rank: int, how: str) -> float:
    """One rank fails; the others wait for it."""
    if dist.get_rank() == rank:
        print("the last words", file=sys.stderr, flush=True)
        if how == "raise":
            raise KeyError("a wrong key")
        if how == "exit":
            os._exit(7)
        if how == "signal":
            os.kill(os.getpid(), signal.SIGABRT)
        if how == "unpicklable":
            return lambda: None  # pyright: ignore[reportReturnType]
        if how == "hang":
            sleep_for_long()
    return total(1.0)[1]


def sleep_for_long() -> None:
    """Hangs in no collective."""
    time.sleep(600)


def process() -> int:
    """The process id of the rank."""
    return os.getpid()


def threads() -> tuple[int, list[str]]:
    """Threads that torch uses, and which of some modules the rank has not."""
    return torch.get_num_threads(), [name for name in ("jax", "pytest", "hypothesis") if name not in sys.modules]
