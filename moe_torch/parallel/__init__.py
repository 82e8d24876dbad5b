"""moe_torch, parallel: the layer over process groups. This is its face; start reading at `parallelize`."""

from moe_torch.parallel.collectives import Sent, recorded
from moe_torch.parallel.parallelize import parallelize, sync_gradients, unsupported
from moe_torch.parallel.params import full_tensors

__all__ = ["Sent", "full_tensors", "parallelize", "recorded", "sync_gradients", "unsupported"]
