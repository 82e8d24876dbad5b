"""Tests, all: kernels run in Triton's interpreter, which is asked for before triton is first imported.

On a CPU nothing else of Triton could run. `moe_torch` takes its kernels on CPU tensors inside `kernels.interpreted()`
alone, so that the tests of everything else see the CPU's own way.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
