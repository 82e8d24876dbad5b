"""conformance, subject megatron: router, MoE layer and load of NVIDIA's megatron-core, as they are."""

from importlib.metadata import version

import torch

from conformance.subjects.megatron.balance import MegatronBalance
from conformance.subjects.megatron.layer import MegatronLayer
from conformance.subjects.megatron.router import MegatronRouter


class Megatron(MegatronRouter, MegatronLayer, MegatronBalance):
    """megatron-core on one rank in float32, with its alltoall dispatcher, without Transformer Engine."""

    name = "megatron"
    version = version("megatron-core")
    logit_dtypes = ("float32", "float64")

    def __init__(self):
        torch.set_num_threads(1)  # a call on a few tokens is too small to share
