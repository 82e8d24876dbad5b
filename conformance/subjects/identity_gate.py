"""conformance, the identity gate: with it a real PyTorch router takes logits instead of tokens.

A router takes tokens and multiplies them by its gate. Here the gate is an identity matrix whose product is not computed
but known: the logits are the input itself, so that -inf and NaN reach the router unharmed (0 * inf is NaN). All else
stays real: the empty product decides the dtype of the logits, autocast included, and raises where the real one would.
"""

import torch
from torch.nn import functional as F


class IdentityGate(torch.Tensor):
    """The weight of a gate whose linear map returns its input, in the dtype that the real product would have."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not F.linear:
            # Casts such as weight.float() keep the class, so that the casts of a module stay real.
            return super().__torch_function__(func, types, args, kwargs)
        return identity_linear(*args, **(kwargs or {}))


def identity_linear(x_TE, weight_EE, bias_E=None, *, bias=None):
    """The logits are the tokens, plus the learned bias where the gate has one."""
    bias_E = bias_E if bias is None else bias
    weight_EE = weight_EE.as_subclass(torch.Tensor)
    empty = F.linear(x_TE.new_empty((0, x_TE.shape[-1])), weight_EE, bias_E)
    logits_TE = x_TE.to(empty.dtype, copy=True)
    return logits_TE if bias_E is None else logits_TE + bias_E.to(empty.dtype)


def give_identity_gate(module: torch.nn.Module, path: str) -> None:
    """The weight at `path` of the module becomes an identity gate of the same shape and dtype."""
    owner, _, name = path.rpartition(".")
    weight_ED = module.get_parameter(path)
    size = weight_ED.shape[1]
    if weight_ED.shape[0] != size:
        raise ValueError(f"{path} has shape {tuple(weight_ED.shape)}; an identity gate is square")
    identity = torch.eye(size, dtype=weight_ED.dtype).as_subclass(IdentityGate)
    setattr(module.get_submodule(owner), name, torch.nn.Parameter(identity, requires_grad=False))
