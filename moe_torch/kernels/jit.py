"""moe_torch, kernels: triton.jit without its types, which know no launch with plain numbers."""

from typing import Any

import triton

jit: Any = triton.jit
