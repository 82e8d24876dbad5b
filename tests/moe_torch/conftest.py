"""moe_torch, tests: what several files share."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Layers this small are slower on two threads, and much slower where the threads have to share a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
