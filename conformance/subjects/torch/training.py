"""conformance, subject torch: layers of moe_torch with its bias hook over several steps, in this process.

A pipeline rank is a model part with an optimizer and a hook of its own, as it is where ranks are processes.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from conformance.core.subject import Subject
from conformance.subjects.torch.arrays import device, tensor_if_any, to_numpy, to_torch
from moe_ref import NO_INPUTS, BalanceSpec, Event, LayerParams, StackSpec
from moe_torch.bias_hook import BiasHook
from moe_torch.losses import balance_sums, loss_of_sums
from moe_torch.moe import MoE
from moe_torch.routing import Routing, scale_logits


class TorchTraining(Subject):
    """The scripts of training, for the subject of moe_torch."""

    def train(self, events: Sequence[Event], stack: StackSpec, params: list[LayerParams]) -> list[dict]:
        """The modules, their counters and their hook; the optimizer has a rate of 0."""
        states, model = [], Model(stack, params)
        for event in events:
            loss = None
            if event.kind == "build":
                model = Model(stack, params)
            elif event.kind == "step":
                for optimizer in model.optimizers:
                    optimizer.step()
            else:
                loss = model.run(event)
            states.append(
                {
                    "counts_by_layer": [to_numpy(moe.tokens_per_expert).copy() for moe in model.layers],
                    "bias_by_layer": [to_numpy(moe.get_buffer("router.expert_bias")).copy() for moe in model.layers],
                    "loss": loss,
                }
            )
        return states


class Model:
    """The layers, and an optimizer with a hook for each pipeline rank."""

    def __init__(self, stack: StackSpec, params: list[LayerParams]):
        self.stack = stack
        self.layers = [MoE(spec, device=device()) for spec in stack.layers]
        for moe, own in zip(self.layers, params, strict=True):
            moe.load_params(own)
        self.optimizers = [self.part(rank) for rank in range(stack.num_ranks)]

    def part(self, rank: int) -> torch.optim.Optimizer:
        """The optimizer of a rank, on which there are other weights than those of such layers too."""
        own = {str(layer): self.layers[layer] for layer in self.stack.layers_of(rank)}
        model = nn.ModuleDict(own | {"dense": nn.Linear(1, 1, device=device())})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        hook = BiasHook(model, None, overrides={name: self.stack.updates[int(name)] for name in own})
        hook.register(optimizer)
        return optimizer

    def run(self, event: Event) -> float | None:
        """A pass, with its backward pass where it is one of training."""
        training, routings = event.kind == "train", []
        for layer, moe in enumerate(self.layers):
            moe.train(training)
            assert event.x_LTD is not None
            x_TD = to_torch(event.x_LTD[layer]).requires_grad_(training)
            with torch.set_grad_enabled(training):
                if event.recomputed:
                    output_TD, routing = checkpoint(run_layer, moe, x_TD, event, layer, use_reentrant=False)
                else:
                    output_TD, routing = run_layer(moe, x_TD, event, layer)
            if training:
                output_TD.sum().backward()
            routings.append(routing)
        balance = self.stack.balance
        return None if balance is None else self.loss(routings, event, balance)

    def loss(self, routings: list[Routing], event: Event, balance: BalanceSpec) -> float:
        """The sum of the losses of the layers, or that of all their tokens together."""
        mask_T = tensor_if_any(event.token_mask_T)
        sums = []
        for routing, moe in zip(routings, self.layers, strict=True):
            assert routing.logits_TE is not None
            logits_TE = scale_logits(routing.logits_TE.detach(), moe.spec.router)[:, : moe.spec.router.num_choices]
            sums.append(balance_sums(logits_TE, routing.expert_ids_TK, balance, token_mask_T=mask_T))
        if balance.over_layers == "pooled" and sums:
            sums = [reduce(add, sums)]
        return float(sum(loss_of_sums(each, balance)[0] for each in sums))


def run_layer(moe: MoE, x_TD: torch.Tensor, event: Event, layer: int):
    """Output and routing of a layer, with the choice that the event forces, if any."""
    mask_T, inputs, router = event.token_mask_T, NO_INPUTS, None
    if event.records is not None:
        given, own_T = event.records[layer].inputs(moe.spec.router)
        mask_T = own_T if mask_T is None else mask_T & own_T
        inputs, router = given.map(to_torch), moe.spec.router.given()
    return moe.forward_and_routing(x_TD, tensor_if_any(mask_T), inputs=inputs, router_spec=router)
