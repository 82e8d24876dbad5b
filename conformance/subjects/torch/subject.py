"""conformance, subject torch: moe_torch in eager mode, on the CPU or on the device that is asked for."""

import importlib.util
import os

import torch

from conformance.subjects.torch.arrays import use_device
from conformance.subjects.torch.balance import TorchBalance
from conformance.subjects.torch.layer import TorchLayer
from conformance.subjects.torch.router import TorchRouter
from conformance.subjects.torch.training import TorchTraining
from moe_torch.kernels import interpreted


class Torch(TorchRouter, TorchLayer, TorchBalance, TorchTraining):
    """moe_torch in one process."""

    name = "torch"
    version = torch.__version__
    logit_dtypes = ("float32", "float64", "bfloat16")

    def __init__(self):
        torch.set_num_threads(1)  # a call on a few tokens is too small to share

    def to_device(self, device: str) -> None:
        """A device of PyTorch, or 'interpreter': the kernels of an accelerator on the CPU, in Triton's interpreter.

        Raises:
            ValueError: there is no such device; or there is no Triton, or it was not told to interpret.
        """
        if device == "interpreter":
            self._interpret()
            return
        found = existing(device)
        use_device(found)
        if found.type != "cpu":
            # A kernel is compiled for each form of a router, and for widths that are multiples of 16 or not.
            self.compiles = True
        if found.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32":
            self.compute_dtype = self.expert_dtype = "tf32"

    def _interpret(self) -> None:
        if importlib.util.find_spec("triton") is None:
            raise ValueError("triton is not installed")
        if os.environ.get("TRITON_INTERPRET") != "1":
            # PyTorch imports triton, which reads it then.
            raise ValueError("set TRITON_INTERPRET=1 in the environment")
        self.compiles = True  # each program costs milliseconds: few sizes
        self._kernels = interpreted()
        self._kernels.__enter__()


def existing(device: str) -> torch.device:
    """The device of a name.

    Raises:
        ValueError: there is none.
    """
    try:
        found = torch.device(device)
        # Some backends find out only when something is made there.
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no such device: {str(error).splitlines()[0]}") from None
    return found
