"""Tests, what ranks run to train a layer of torchtitan with the hook of its optimizer."""

import numpy as np
import torch

from conformance.subjects.torchtitan.balance import optimizer_with_hook
from conformance.subjects.torchtitan.parallel import DTENSOR, local
from conformance.subjects.torchtitan.router import no_autocast_warning
from conformance.subjects.torchtitan.sharded import loaded, own_tokens
from moe_ref import BiasUpdateSpec, LayerParams, LayerSpec
from moe_ref.specs.layout import ShardLayout

STEPS, MICRO_BATCHES = 2, 2


def train_on_rank(
    x_by_shard, params: LayerParams, spec: LayerSpec, layout: ShardLayout, update: BiasUpdateSpec
) -> list[np.ndarray]:
    """The bias after each step: passes of training, forward and backward, and a step of an optimizer with the hook."""
    layer = loaded(params, spec, layout, DTENSOR)
    layer.moe.train().load_balance_coeff = update.rate
    optimizer, biases = optimizer_with_hook(layer.model, layer.dims), []
    for _ in range(STEPS):
        for _ in range(MICRO_BATCHES):
            with no_autocast_warning():
                local(layer.model(own_tokens(x_by_shard, layout)[None])).sum().backward()
        optimizer.step()
        biases.append(local(layer.moe.expert_bias_E).numpy().copy())
    assert not torch.count_nonzero(local(layer.moe.tokens_per_expert_E))
    layer.moe.eval()
    optimizer.zero_grad()
    return biases
