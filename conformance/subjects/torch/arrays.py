"""conformance, what the subjects of PyTorch share: arrays, inputs and parameters between NumPy and torch."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from moe_ref import LayerParams, RouterInputs

_device = torch.device("cpu")


def use_device(device: torch.device) -> None:
    """Tensors are made there from now on."""
    global _device
    _device = device


def device() -> torch.device:
    """Where tensors are made."""
    return _device


def tensor(array) -> torch.Tensor:
    """A tensor of the same dtype, with its own memory; bfloat16 arrives as ml_dtypes arrays, unknown to torch."""
    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(_device)
    return torch.from_numpy(array).to(_device)


def to_torch(array) -> torch.Tensor:
    """A tensor of the same dtype, float64 as float32."""
    found = tensor(array)
    return found.float() if found.dtype == torch.float64 else found


def single(array) -> torch.Tensor:
    """A float32 tensor."""
    return tensor(array).float()


def tensor_if_any(array: np.ndarray | None) -> torch.Tensor | None:
    """As `tensor`; None stays None."""
    return None if array is None else tensor(array)


def to_numpy(values: torch.Tensor) -> np.ndarray:
    """A NumPy array; bfloat16 is widened to float32, which loses nothing."""
    return (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy()


def numpy_if_any(values: torch.Tensor | None) -> np.ndarray | None:
    """As `to_numpy`; None stays None."""
    return None if values is None else to_numpy(values)


def with_gradient(loss: torch.Tensor, logits_TE: torch.Tensor) -> dict:
    """A loss and its gradient by the logits, as `balance_loss` and `z_loss` return them."""
    (d_logits_TE,) = torch.autograd.grad(loss, logits_TE)
    return {"loss": float(loss.detach()), "d_logits_TE": to_numpy(d_logits_TE.float())}


def to_inputs(inputs: RouterInputs) -> RouterInputs:
    """The same inputs as tensors; the seed becomes a generator."""
    generator = None if inputs.seed is None else torch.Generator(_device).manual_seed(inputs.seed)
    return replace(inputs.map(tensor), seed=generator)


def to_canonical(by_name: dict[str, np.ndarray], params: LayerParams) -> dict[str, np.ndarray]:
    """Field of LayerParams -> value, from the names and shapes of the module; `params` gives the shapes."""
    gated = params.w_gate_EDF is not None
    # Without a gate the activation stands on the up projection, and that is w1.
    first, third = ("gate", "up") if gated else ("up", "none")
    names = {
        "router.gate.weight": "gate_ED",
        "router.gate.bias": "gate_bias_E",
        "router.learned_scale": "learned_scale",
        "experts.w1_EFD": f"w_{first}_EDF",
        "experts.w2_EDF": "w_down_EFD",
        "experts.w3_EFD": f"w_{third}_EDF",
        "experts.b1_EF": f"b_{first}_EF",
        "experts.b2_ED": "b_down_ED",
        "experts.b3_EF": f"b_{third}_EF",
        "shared_experts.w1.weight": f"shared_w_{first}_SDF",
        "shared_experts.w2.weight": "shared_w_down_SFD",
        "shared_experts.w3.weight": f"shared_w_{third}_SDF",
        "shared_experts.token_gate.weight": "shared_token_gate_D",
        "constant_experts.w_Z2D": "constant_w_ZD2",
        "constant_experts.v_ZD": "constant_ZD",
        "latent.down.weight": "latent_w_down_DH",
        "latent.up.weight": "latent_w_up_HD",
        "latent.norm.weight": "latent_norm_H",
    }
    found = {}
    for name, value in by_name.items():
        field = names[name]
        shape = np.shape(getattr(params, field))
        if field == "shared_w_down_SFD" or field.startswith("latent_w"):
            value = value.T  # (D, S * F), or (out, in)
        elif field == "constant_w_ZD2":
            value = np.swapaxes(value, 1, 2)
        elif "w_" in field:
            # (E, out, in), or (S * out, in) where shared experts are side by side.
            value = np.swapaxes(value.reshape(shape[0], shape[2], shape[1]), 1, 2)
        found[field] = value.reshape(shape)
    return found


def slices(lengths: Sequence[int] | None, num_tokens: int) -> list[slice]:
    """Consecutive parts of the tokens; one without lengths."""
    lengths = [num_tokens] if lengths is None else list(lengths)
    return [slice(end - length, end) for length, end in zip(lengths, np.cumsum(lengths).tolist(), strict=True)]
