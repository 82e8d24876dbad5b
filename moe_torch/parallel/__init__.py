"""moe_torch, parallel: the layer over process groups. This is its face; start reading at `parallelize`."""

from moe_torch.parallel.collectives import Sent, recorded
from moe_torch.parallel.parallelize import parallelize, sync_gradients, unsupported
from moe_torch.parallel.params import full_tensors
from moe_torch.parallel.states import clip_grad_norm_

__all__ = ["Sent", "clip_grad_norm_", "full_tensors", "parallelize", "recorded", "sync_gradients", "unsupported"]
