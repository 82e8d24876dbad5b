"""moe_torch, kernels: experts, permutation and router on an accelerator, in Triton.

`chosen(spec)` says which way a layer goes on a device, and why. Operators (`expert_ops`, `sort_ops`, `router_ops`) are
registered with PyTorch, so that torch.compile, autograd and CUDA graphs take them; kernels are imported with the first
call of one. They are deterministic, and nothing waits for the host.
"""

from moe_torch.kernels.choice import Chosen, chosen, interpreted

__all__ = ["Chosen", "chosen", "interpreted"]
