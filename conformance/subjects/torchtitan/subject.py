"""conformance, subject torchtitan: the router, the MoE layer and the bias hook of pytorch/torchtitan, as they are."""

from importlib.metadata import version

import torch

from conformance.subjects.torchtitan.balance import TorchtitanBalance
from conformance.subjects.torchtitan.layer import TorchtitanLayer
from conformance.subjects.torchtitan.router import TorchtitanRouter
from conformance.subjects.torchtitan.training import TorchtitanTraining


class Torchtitan(TorchtitanRouter, TorchtitanLayer, TorchtitanBalance, TorchtitanTraining):
    """torchtitan on one rank; the experts compute in bfloat16."""

    name = "torchtitan"
    # Not bfloat16 besides: see below.
    logit_dtypes = ("float32",)
    expert_dtype = "bfloat16"

    def __init__(self):
        self.version = version("torchtitan")
        torch.set_num_threads(1)  # a router call is too small to share


class TorchtitanFloat32(Torchtitan):
    """The same with experts that compute in float32: their `forward` is overridden, as they allow, to not cast."""

    name = "torchtitan-float32"
    expert_dtype = "float32"


class TorchtitanBfloat16(TorchtitanRouter):
    """The router of a bfloat16 model on a CPU, whose autocast does not raise its gate to float32, as others do."""

    name = "torchtitan-bfloat16"
    logit_dtypes = ("float32", "bfloat16")

    def __init__(self):
        self.version = version("torchtitan")
