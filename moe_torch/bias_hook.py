"""moe_torch, bias hook: after each optimizer step, every layer's balancing bias moves by the load of that step.

    MoE.forward counts -> (micro-batches add up) -> one all-reduce for all layers -> bias_step -> counts of zero
    MoE.forward observes what experts needed -> ... -> bias_of_total        (quantile balancing, `quantile.py`)

Legend: E choices (experts, then null experts), N choices of all layers.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from moe_ref.specs.balance import BiasUpdateSpec
from moe_ref.specs.quantile import QuantileSpec
from moe_torch.balance import bias_step
from moe_torch.quantile import NeedCounts, bias_of_total


class BiasHook:
    """Moves `router.expert_bias` of the MoE layers of a model by what their `tokens_per_expert` has counted.

        hook = BiasHook(model, BiasUpdateSpec(rate=1e-3), group=data_parallel_group)
        hook.register(optimizer)

    Counts add up over micro-batches and chunks until the step, are summed over the group in one all-reduce for all
    layers, and the sign is taken once, of the sum. Layers do not influence each other: one whose update is off keeps
    its bias, and the others go on (pytorch/torchtitan#3686).

    A rule with momentum goes on from the last step: `state_dict` and `load_state_dict` are for checkpoints.

    Args:
        model: every submodule with `tokens_per_expert` and `router.expert_bias` is a layer. One whose rule is a
            `QuantileSpec` is a `MoE`, which observes from now on what its experts need (`needs`). Where
            DistributedDataParallel is to have the model, it is that module, or the one that it is given later.
        spec: the rule of all layers; None: off.
        overrides: the rule of a layer by its name in the model; None: off.
        group: the ranks that see different tokens; ranks that see the same tokens (tensor parallel ones) count once.
            None: one process sees all.

    Raises:
        ValueError: an override names no layer; a layer that is to be updated has no bias, or a router that its rule
            does not go with; or there are several processes and no group, so that each would sign its own counts.
    """

    counts: dict[str, Tensor]
    """The counts of the last step by layer, summed over the group: for `load_statistics`."""

    def __init__(
        self,
        model: nn.Module,
        spec: BiasUpdateSpec | QuantileSpec | None,
        *,
        overrides: Mapping[str, BiasUpdateSpec | QuantileSpec | None] | None = None,
        group: dist.ProcessGroup | None = None,
    ):
        self.layers: dict[str, Any] = {name: module for name, module in model.named_modules() if _is_layer(module)}
        overrides = dict(overrides or {})
        if unknown := sorted(overrides.keys() - self.layers.keys()):
            raise ValueError(f"overrides names {unknown}; the layers are {sorted(self.layers)}")
        self.specs = {name: overrides.get(name, spec) for name in self.layers}
        for name, layer in self.layers.items():
            if self.specs[name] is not None and _bias(layer) is None:
                raise ValueError(f"layer {name!r} has no expert_bias, as its selector takes none; override it by None")
        if group is None and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"group is None, but there are {dist.get_world_size()} processes; name the ranks that see different "
                f"tokens (torch.distributed.group.WORLD, if all do)"
            )
        self.group = group
        self.counts = {}
        self.last_steps: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            own, bias_E = self.specs[name], _bias(layer)
            if isinstance(own, QuantileSpec) and bias_E is not None:
                layer.needs = NeedCounts(own, layer.spec.router, bias_E.device)
        _leave_counts_to_ranks(model, self.layers)

    def register(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """`step` runs after every step of this optimizer; of several optimizers, register one."""
        # After the step, so that the forward passes of a closure are counted.
        return optimizer.register_step_post_hook(lambda *_: self.step())

    @torch.no_grad()
    def step(self) -> None:
        """Sums the counts, moves the biases, and sets the counts to zero. Every rank of the group takes part."""
        if not self.layers:
            return
        own = [_counts(layer) for layer in self.layers.values()]
        summed_N = torch.cat(own)
        if self.group is not None:
            dist.all_reduce(summed_N, group=self.group)
        self.counts = dict(zip(self.layers, summed_N.split([len(counts_E) for counts_E in own]), strict=True))
        self._sum_needs()
        for name, layer in self.layers.items():
            spec, bias_E = self.specs[name], _bias(layer)
            if isinstance(spec, QuantileSpec) and bias_E is not None:
                bias_E.copy_(bias_of_total(layer.needs.total, spec, bias_E, spec.wins(layer.spec.router)))
                layer.needs.total.zero_()
            elif isinstance(spec, BiasUpdateSpec) and bias_E is not None:
                step_E = bias_step(self.counts[name], spec, self.last_steps.get(name))
                if spec.momentum:
                    self.last_steps[name] = step_E
                bias_E.add_(step_E)
            _counts(layer).zero_()

    def _sum_needs(self) -> None:
        """The totals of all layers are summed over the group, in one all-reduce for each dtype."""
        if self.group is None:
            return
        totals = [
            layer.needs.total for name, layer in self.layers.items() if isinstance(self.specs[name], QuantileSpec)
        ]
        for dtype in sorted({total.dtype for total in totals}, key=str):
            own = [total for total in totals if total.dtype == dtype]
            summed_N = torch.cat([total.flatten() for total in own])
            dist.all_reduce(summed_N, group=self.group)
            for total, each_N in zip(own, summed_N.split([total.numel() for total in own]), strict=True):
                total.copy_(each_N.view_as(total))

    def state_dict(self) -> dict[str, Tensor]:
        """The last step of each layer whose rule has momentum, by its name; the biases are in the model's."""
        return dict(self.last_steps)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state_dict` returned.

        Raises:
            ValueError: a name is that of no layer with momentum.
        """
        with_momentum = {name for name, spec in self.specs.items() if getattr(spec, "momentum", 0)}
        if unknown := sorted(state.keys() - with_momentum):
            raise ValueError(f"state names {unknown}; the layers with momentum are {sorted(with_momentum)}")
        self.last_steps = {name: step_E.clone() for name, step_E in state.items()}


def _is_layer(module: nn.Module) -> bool:
    router = getattr(module, "router", None)
    return isinstance(getattr(module, "tokens_per_expert", None), Tensor) and hasattr(router, "expert_bias")


def _leave_counts_to_ranks(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """DistributedDataParallel does not copy the counts of its first rank to the others, as it does with buffers before
    a forward pass: the tokens that they had counted in earlier micro-batches of the step were lost."""
    totals = [getattr(layer, "needs", None) for layer in layers.values()]
    own = {id(_counts(layer)) for layer in layers.values()} | {id(each.total) for each in totals if each is not None}

    def names_in(module: nn.Module) -> set[str]:
        return {name for name, buffer in module.named_buffers() if id(buffer) in own}

    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            module.parameters_to_ignore |= names_in(module.module)
    # What a wrapper that is made later reads.
    known = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(known | names_in(model)))


def _counts(layer: nn.Module) -> Tensor:
    return layer.get_buffer("tokens_per_expert")


def _bias(layer: nn.Module) -> Tensor | None:
    router = layer.get_submodule("router")
    return router.expert_bias if isinstance(router.expert_bias, Tensor) else None
