"""Tests, all: kernels run in Triton's interpreter, which is asked for before triton is first imported.

On a CPU nothing else of Triton could run. `moe_torch` takes its kernels on CPU tensors inside `kernels.interpreted()`
alone, so that the tests of everything else see the CPU's own way.

Most of the time of JAX is compilation, and most of that LLVM's last passes over programs that run once: they are left
out, in processes that tests start too. XLA's own passes, which fuse and partition, are not. Such processes also keep
what Python compiles of our modules, whatever the machine's default.
"""

import os

from conformance.run.plugin import search_cycles_rarely

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_collection_finish(session):
    search_cycles_rarely(session.config)
