"""conformance, the subjects of torch: how a rank joins the others, by gloo."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

COLLECTIVE = timedelta(minutes=30)
"""Far longer than the caller waits: it is the caller that calls a rank hung, and says where."""


def join(rank: int, size: int, folder: Path) -> None:
    """Makes this process a rank; the folder is that of the world."""
    # gloo listens on the address of the host's name, which need not be this machine's.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(1)
    method = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size, timeout=COLLECTIVE)
