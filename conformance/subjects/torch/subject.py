"""conformance, subject torch: moe_torch on the CPU, in eager mode."""

import torch

from conformance.subjects.torch.balance import TorchBalance
from conformance.subjects.torch.layer import TorchLayer
from conformance.subjects.torch.router import TorchRouter
from conformance.subjects.torch.training import TorchTraining


class Torch(TorchRouter, TorchLayer, TorchBalance, TorchTraining):
    """moe_torch in one process."""

    name = "torch"
    version = torch.__version__
    logit_dtypes = ("float32", "float64", "bfloat16")

    def __init__(self):
        torch.set_num_threads(1)  # a call on a few tokens is too small to share
