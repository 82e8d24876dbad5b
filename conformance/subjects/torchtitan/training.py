"""conformance, subject torchtitan: MoE layers with the hook of its optimizer over several steps, on one rank.

A pipeline rank is a list of one model part with an optimizer and a hook of its own.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from conformance.core.subject import Subject, Unsupported
from conformance.subjects.torch.arrays import to_numpy, to_torch
from conformance.subjects.torchtitan.arrays import load_params
from conformance.subjects.torchtitan.balance import Block, optimizer_with_hook
from conformance.subjects.torchtitan.layer import build_layer
from conformance.subjects.torchtitan.router import no_autocast_warning
from moe_ref import Event, LayerParams, QuantileSpec, StackSpec


class TorchtitanTraining(Subject):
    """Scripts without padding and without a forced choice, which it has not got."""

    def supports_training(self, stack: StackSpec) -> str | None:
        if None in stack.updates and any(stack.updates):
            return "torchtitan balances every layer or none"
        return super().supports_training(stack)

    def train(self, events: Sequence[Event], stack: StackSpec, params: list[LayerParams]) -> list[dict]:
        """The modules as they are; the optimizer has a rate of 0."""
        if any(event.token_mask_T is not None for event in events):
            raise Unsupported("torchtitan's MoE takes no mask of padding tokens")
        if any(event.records is not None for event in events):
            raise Unsupported("torchtitan's MoE takes no choice of experts")
        states, moes, optimizers = [], [], []
        for event in events:
            if event.kind == "build":
                moes = [build_layer.__wrapped__(spec, self.expert_dtype) for spec in stack.layers]
                for moe, own, update in zip(moes, params, stack.updates, strict=True):
                    load_params(moe, own)
                    assert not isinstance(update, QuantileSpec)  # which supports_training refuses
                    moe.load_balance_coeff = None if update is None else update.rate
                optimizers = [part_of(stack.layers_of(rank), moes) for rank in range(stack.num_ranks)]
            elif event.kind == "step":
                for optimizer in optimizers:
                    optimizer.step()
            else:
                run(event, moes)
            states.append(
                {
                    "counts_by_layer": [counts_of(moe) for moe in moes],
                    "bias_by_layer": [to_numpy(moe.expert_bias_E.clone()) for moe in moes],
                }
            )
        return states


def counts_of(moe: nn.Module) -> np.ndarray:
    """Its counters are float32, and hold whole numbers."""
    counts_E = moe.get_buffer("tokens_per_expert_E")
    return to_numpy(counts_E).astype(np.int64)


def part_of(layers: Sequence[int], moes: list[nn.Module]) -> torch.optim.Optimizer:
    """The optimizer of a model part, which has other weights too."""
    model = nn.Module()
    model.layers = nn.ModuleDict({str(layer): Block(moes[layer]) for layer in layers})
    model.output = nn.Linear(1, 1)
    return optimizer_with_hook(model)


def run(event: Event, moes: list[nn.Module]) -> None:
    """A pass, with its backward pass where it is one of training."""
    assert event.x_LTD is not None
    training = event.kind == "train"
    for moe, x_TD in zip(moes, event.x_LTD, strict=True):
        moe.train(training)
        x_1TD = to_torch(x_TD)[None].requires_grad_(training)
        with torch.set_grad_enabled(training), no_autocast_warning():
            output_1TD = checkpoint(moe, x_1TD, use_reentrant=False) if event.recomputed else moe(x_1TD)
            if training:
                output_1TD.sum().backward()
