"""moe_torch, tests that a layer on kernels never waits for the host: no operator of its forward and backward pass asks
for a number of the device, or moves one from there or to there.

A GPU says so itself (`benchmarks.gpu`, promises); here every call of PyTorch is looked at, of Python's and of
autograd's, but for what Triton's interpreter does in place of a launch.
"""

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from moe_ref.specs.balance import BALANCE_FORMS, BalanceSpec, BiasUpdateSpec, CapacitySpec
from moe_ref.specs.layer import ExpertSpec, LayerSpec, SharedSpec
from moe_ref.specs.router import RouterSpec
from moe_torch import moe as layer_file
from moe_torch import selection
from moe_torch.bias_hook import BiasHook
from moe_torch.kernels import interpreted
from moe_torch.losses import balance_loss, z_loss
from moe_torch.moe import MoE

ASKS = {
    "item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "unique", "unique_consecutive", "bincount",
    "masked_select", "equal", "allclose", "__bool__", "__int__", "__float__", "__index__", "__contains__",
}  # fmt: skip
"""Of Python's: methods and functions whose result, or its shape, the host has to know."""
OPERATORS = {
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::masked_select",
    "aten::bincount", "aten::equal", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
}  # fmt: skip
"""The same below Python."""


class Waits(Exception):
    """A call that would wait."""


class Functions(TorchFunctionMode):
    """Python's calls."""

    paused = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if not self.paused:
            if name in ASKS:
                raise Waits(name)
            if name in ("tensor", "as_tensor", "from_numpy"):
                raise Waits(f"{name}, a copy to the device")
            if name == "to" and any(isinstance(each, torch.device | str) for each in (*args[1:], *kwargs.values())):
                raise Waits("to another device")
            if name == "repeat_interleave" and kwargs.get("output_size") is None and not isinstance(args[1], int):
                raise Waits(name)
        return function(*args, **kwargs)


class Operators(TorchDispatchMode):
    """What is called below Python, by autograd too."""

    paused = False

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if not self.paused:
            name = operator.name().partition(".")[0]
            if name in OPERATORS:
                raise Waits(name)
            if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_") and any(
                index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
            ):
                raise Waits(f"{name} with a mask")
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def watch(monkeypatch):
    """A step of a layer, looked at."""
    functions, operators = Functions(), Operators()
    launch = GridExecutor.__call__

    def launch_unseen(self, *args, **kwargs):
        functions.paused = operators.paused = True
        try:
            return launch(self, *args, **kwargs)
        finally:
            functions.paused = operators.paused = False

    monkeypatch.setattr(GridExecutor, "__call__", launch_unseen)

    def step(capacity=None, **changes):
        torch.manual_seed(0)
        moe = MoE(SPEC.replace(**changes), capacity=capacity, dtype=torch.bfloat16)
        x, mask = torch.randn(2, 5, 16, dtype=torch.bfloat16, requires_grad=True), torch.ones(2, 5, dtype=torch.bool)
        d_out, trained = torch.randn(2, 5, 16, dtype=torch.bfloat16), [x, *moe.parameters()]
        with interpreted(), np.errstate(all="ignore"), functions, operators:
            torch.autograd.grad(moe(x, mask), trained, d_out)

    return step


SPEC = LayerSpec(
    router=RouterSpec(
        num_experts=8, top_k=2, score_func="sigmoid", route_norm=True, num_expert_groups=4, num_limited_groups=2
    ),
    experts=ExpertSpec(dim=16, hidden_dim=16, bias=True),
)


def test_a_layer_waits_for_nothing(watch):
    watch()


def test_a_layer_with_shared_and_null_experts_and_weights_on_its_input_waits_for_nothing(watch):
    router = RouterSpec(num_experts=6, top_k=2, num_null_experts=2, weight_on="input")
    watch(router=router, shared=SharedSpec(hidden_dim=16, gate="sigmoid"))


def test_a_layer_with_a_capacity_waits_for_nothing(watch):
    watch(CapacitySpec(factor=1.0))
    watch(CapacitySpec(factor=1.0, scope="sequence", drop_order="by_weight"))


def test_a_step_of_the_balancing_bias_waits_for_nothing():
    moe = MoE(SPEC)
    for frozen_E in (None, (True, *[False] * 6, True)):
        hook = BiasHook(moe, BiasUpdateSpec(rate=0.1, frozen_E=frozen_E))
        with Functions(), Operators():
            hook.step()


def test_losses_wait_for_nothing(monkeypatch):
    monkeypatch.setattr(selection, "host_reads_are_free", lambda values: False)  # as on an accelerator
    logits, ids = torch.randn(6, 8, requires_grad=True), torch.arange(12).view(6, 2) % 8
    for mask in (None, torch.ones(6, dtype=torch.bool)):
        for form in BALANCE_FORMS:
            with Functions(), Operators():
                loss = balance_loss(logits, ids, BalanceSpec.of(form), token_mask_T=mask)
                torch.autograd.grad(loss + z_loss(logits, token_mask_T=mask), logits)


WAITS = {
    "a number": lambda x: x.sum().item(),
    "a list": lambda x: x.sum(0).tolist(),
    "a branch": lambda x: 1 if x.sum() > 0 else 2,
    "a loop to a count": lambda x: list(range(x.sum().to(torch.int64))),
    "a mask": lambda x: x[x > 0],
    "places": lambda x: torch.nonzero(x > 0),
    "the host": lambda x: x.cpu(),
    "counts": lambda x: torch.bincount(x.to(torch.int64).reshape(-1).abs()),
    "rows of counts": lambda x: x.repeat_interleave(torch.ones(len(x), dtype=torch.int64), 0),
    "a table of the host": lambda x: torch.tensor([1.0, 2.0]),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_layer_that_waits_is_seen(name, watch, monkeypatch):
    run = layer_file.run_experts

    def run_and_wait(experts, dispatcher, x_TD, *args, **kwargs):
        WAITS[name](x_TD.detach())
        return run(experts, dispatcher, x_TD, *args, **kwargs)

    monkeypatch.setattr(layer_file, "run_experts", run_and_wait)
    with pytest.raises(Waits):
        watch()


def test_a_backward_pass_that_waits_is_seen(watch, monkeypatch):
    class Mask(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, d_x):
            return torch.where(d_x[d_x > 0].sum() > 0, d_x, d_x)

    run = layer_file.run_experts
    monkeypatch.setattr(layer_file, "run_experts", lambda e, d, x_TD, *a, **k: run(e, d, Mask.apply(x_TD), *a, **k))
    with pytest.raises(Waits):
        watch()
