"""moe_torch, tests of dispatcher and experts: slots, rows and one operator, against moe_ref and by their contract."""

from typing import Any

import numpy as np
import pytest
import torch

from moe_ref.experts import feed_forward
from moe_ref.permute import permute
from moe_ref.specs.align import AlignSpec
from moe_ref.specs.layer import ExpertSpec, LayerSpec
from moe_ref.specs.params import FeedForward, LayerParams
from moe_ref.specs.router import RouterSpec
from moe_torch.activation import Activation
from moe_torch.dispatcher import LocalTokenDispatcher, weighted_sum
from moe_torch.experts import GroupedExperts, expert_loop
from moe_torch.moe import MoE

T, D, F = 23, 10, 6
# Sums of some tens of products, in another order than the reference's.
SAME: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


def tokens(num_tokens: int = T) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((num_tokens, D))


def grouped_experts(num_experts: int, dtype=torch.float64, **changes) -> GroupedExperts:
    torch.manual_seed(0)
    return GroupedExperts(num_experts, ExpertSpec(dim=D, hidden_dim=F, **changes), dtype=dtype)


def weights_of(own: GroupedExperts, expert_id: int) -> FeedForward:
    """The weights of one expert that has a gate and biases, for moe_ref."""
    w1, w2, w3, b1, b2, b3 = (
        getattr(own, name)[expert_id].detach().numpy().T
        for name in ("w1_EFD", "w2_EDF", "w3_EFD", "b1_EF", "b2_ED", "b3_EF")
    )
    return FeedForward(w_gate_DF=w1, w_down_FD=w2, w_up_DF=w3, b_gate_F=b1, b_down_D=b2, b_up_F=b3)


@pytest.mark.parametrize("chosen", [0, 3, 4])
def test_all_tokens_to_one_expert_leave_the_others_a_gradient_of_exactly_zero(chosen):
    own, x = grouped_experts(5, bias=True), torch.tensor(tokens(700))
    ids = torch.full((700, 1), chosen)
    weights = torch.rand(700, 1, dtype=torch.float64, generator=torch.manual_seed(1))
    output = own.sum_of_slots(x, LocalTokenDispatcher(5).permute(ids), weights)
    output.sum().backward()
    one = feed_forward(x.numpy(), weights_of(own, chosen), own.spec)
    np.testing.assert_allclose(output.detach().numpy(), one.output_RD * weights.numpy(), **SAME)
    for parameter in own.parameters():
        assert parameter.grad is not None
        by_expert = parameter.grad.flatten(1).abs().sum(1)
        assert by_expert[chosen] > 0
        assert by_expert.sum() == by_expert[chosen]


def test_without_any_used_slot_output_and_gradients_are_zero():
    own, x = grouped_experts(3), torch.tensor(tokens(), requires_grad=True)
    weights = torch.ones(T, 2, dtype=torch.float64, requires_grad=True)
    permutation = LocalTokenDispatcher(3).permute(torch.full((T, 2), -1))
    output = own.sum_of_slots(x, permutation, weights)
    output.sum().backward()
    assert not output.any()
    for tensor in (x, weights, *own.parameters()):
        assert tensor.grad is not None
        assert not tensor.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["loop", "rows"])
def test_the_number_of_an_expert_does_not_change_a_bit(way, dtype):
    # Slots are added in slot order; ascending expert ids would give other last bits.
    own = grouped_experts(8, dtype)
    x = torch.tensor(tokens(), dtype=dtype)
    generator = torch.manual_seed(3)
    ids, weights = torch.rand(T, 8, generator=generator).topk(5).indices, torch.rand(T, 5, generator=generator)
    new_id = torch.randperm(8, generator=generator)
    renumbered = grouped_experts(8, dtype)
    with torch.no_grad():
        for name, parameter in renumbered.named_parameters():
            parameter[new_id] = getattr(own, name)

    def output(which: GroupedExperts, expert_ids):
        dispatcher = LocalTokenDispatcher(8)
        permutation = dispatcher.permute(expert_ids)
        if way == "loop":
            return which.sum_of_slots(x, permutation, weights)
        rows = which(dispatcher.dispatch(x, permutation), permutation.tokens_per_expert_E)
        return dispatcher.combine(rows, permutation, weights)

    assert torch.equal(output(own, ids), output(renumbered, new_id[ids]))


def test_the_sum_of_slots_is_rounded_once():
    rng = np.random.default_rng(0)
    slots = torch.tensor(rng.uniform(1, 2, (50, 64, D))).to(torch.bfloat16)
    weights = torch.tensor(rng.uniform(1, 2, (50, 64)), dtype=torch.float32)
    expected = (slots.double() * weights.double()[:, :, None]).sum(1)
    # Half a unit of bfloat16, which is 2**-8 just above a power of two, and some of float32.
    assert ((weighted_sum(slots, weights).double() - expected).abs() / expected).max() < 1.001 * 2.0**-8


class _Poison(torch.autograd.Function):
    """Rows past the last group are NaN, in the output and in the gradient: what a grouped matmul may leave there."""

    @staticmethod
    def forward(rows_ND, used: int):
        return torch.cat([rows_ND[:used], torch.full_like(rows_ND[used:], float("nan"))])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.used = inputs[1]

    @staticmethod
    def backward(ctx, *grads):
        return torch.cat([grads[0][: ctx.used], torch.full_like(grads[0][ctx.used :], float("nan"))]), None


@pytest.mark.parametrize("on_input", [False, True], ids=["weight_on_output", "weight_on_input"])
def test_rows_past_the_last_group_are_never_read(on_input):
    dispatcher = LocalTokenDispatcher(4, 6)
    ids = torch.tensor([[0, 5], [-1, -1], [3, 0], [4, 5], [2, -1]])
    x = torch.tensor(tokens(5), requires_grad=True)
    weights = torch.rand(5, 2, dtype=torch.float64, generator=torch.manual_seed(0)).requires_grad_()
    permutation = dispatcher.permute(ids)
    used = int(permutation.tokens_per_expert_E[:4].sum())
    assert used == 4
    rows = _Poison.apply(dispatcher.dispatch(x, permutation, weights if on_input else None), used)
    output = dispatcher.combine(rows, permutation, None if on_input else weights)
    output.sum().backward()
    factor = torch.where((ids >= 0) & (ids < 4), weights, 0)
    torch.testing.assert_close(output, factor.sum(1, keepdim=True) * x)
    assert x.grad is not None
    assert weights.grad is not None
    torch.testing.assert_close(x.grad, factor.sum(1, keepdim=True).expand(5, D))
    torch.testing.assert_close(weights.grad, torch.where((ids >= 0) & (ids < 4), x.sum(1, keepdim=True), 0))


def test_rows_are_sorted_by_expert_and_stay_in_token_order():
    ids = np.array([[2, 0], [-1, 1], [0, 4], [3, 2], [1, 0]])
    found, expected = LocalTokenDispatcher(4, 5).permute(torch.tensor(ids)), permute(ids, 4)
    used = len(expected.order_N)
    assert found.order_N[:used].tolist() == expected.order_N.tolist()
    assert found.tokens_per_expert_E.tolist() == [*expected.tokens_per_expert_E, 1]
    assert found.row_of_slot_N[found.order_N].tolist() == list(range(10))


@pytest.mark.parametrize(("experts_", "choices", "field"), [(0, None, "num_experts"), (4, 3, "num_choices")])
def test_a_dispatcher_names_the_field_that_is_wrong(experts_, choices, field):
    with pytest.raises(ValueError, match=field):
        LocalTokenDispatcher(experts_, choices)


def test_experts_name_the_field_that_is_wrong():
    with pytest.raises(ValueError, match="num_experts is 0"):
        GroupedExperts(0, ExpertSpec(dim=D, hidden_dim=F))


def test_the_operator_keeps_the_contract_of_its_registration():
    own = grouped_experts(3, bias=True)
    # Every slot is used: rows of the two halves that no expert wrote would differ from call to call.
    permutation = LocalTokenDispatcher(3).permute(torch.tensor([[0, 2], [2, 1], [0, 1]]))
    x = torch.tensor(tokens(3), requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64).requires_grad_()
    parameters = (own.w1_EFD, own.w2_EDF, own.w3_EFD, own.b1_EF, own.b2_ED, own.b3_EF)
    counts = permutation.tokens_per_expert_E
    args = (x, permutation.order_N, counts, weights, 2, *parameters, *Activation.of(own.spec), True)
    torch.library.opcheck(expert_loop, args)


def test_what_padding_rows_get_as_a_gradient_reaches_no_weight():
    dispatcher, weights = LocalTokenDispatcher(2, align=AlignSpec(multiple=4)), torch.rand(3, 1, requires_grad=True)
    aligned = dispatcher.align_rows(dispatcher.permute(torch.tensor([[0], [1], [1]])), AlignSpec(multiple=4))
    rows = dispatcher.dispatch_aligned(torch.ones(3, D), aligned, weights)
    is_padding = aligned.slot_of_row_A < 0
    # A grouped matmul leaves gradients of rows past the last group unwritten.
    rows.backward(torch.where(is_padding[:, None], torch.nan, torch.ones_like(rows)))
    assert weights.grad is not None
    assert weights.grad.tolist() == [[D]] * 3


@pytest.mark.parametrize("weight_on", ["input", "output"])
@pytest.mark.parametrize("num_tokens", [T, 0])
def test_aligned_rows_change_neither_output_nor_gradient(weight_on, num_tokens):
    router = RouterSpec(num_experts=5, top_k=2, score_func="sigmoid", weight_on=weight_on, num_null_experts=1)
    spec = LayerSpec(router=router, experts=ExpertSpec(dim=D, hidden_dim=F, bias=True))
    params = LayerParams.init(spec, 0)
    found = []
    for align in (None, AlignSpec(multiple=16, idle_blocks=1), AlignSpec(multiple=8)):
        moe, x = MoE(spec, align=align, dtype=torch.float64), torch.tensor(tokens(num_tokens), requires_grad=True)
        moe.load_params(params)
        output = moe(x)
        output.square().sum().backward()
        found.append([output.detach(), x.grad, *(p.grad for p in moe.parameters())])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, **SAME)
