"""moe_torch, tests of the kernels of the experts, against moe_ref at sizes no tile divides, in Triton's interpreter."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BOUND, EXPERTS, NAMES, Case, assert_right, case, run
from torch.utils.flop_counter import FlopCounterMode

from moe_ref.specs.layer import ExpertSpec, LayerSpec
from moe_ref.specs.router import RouterSpec
from moe_torch.activation import Activation
from moe_torch.dispatcher import LocalTokenDispatcher
from moe_torch.experts import GroupedExperts
from moe_torch.kernels import chosen, interpreted, launch
from moe_torch.kernels.choice import Chosen, say_once
from moe_torch.kernels.expert_ops import expert_tiles, expert_tiles_backward
from moe_torch.kernels.guard import on_its_device
from moe_torch.kernels.router_ops import route_tokens, route_tokens_backward
from moe_torch.kernels.sort_ops import sort_slots
from moe_torch.kernels.tiles import most_tiles
from moe_torch.moe import MoE

FEW = settings(max_examples=8, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("form", EXPERTS)
def test_every_form_of_an_expert_and_its_gradients_are_the_reference(form):
    assert_right(case(form=form))


@pytest.mark.parametrize("form", ["plain", "nemotron_h"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_within_its_bound(dtype, form):
    changes = {"form": form, "dtype": dtype}
    c = case(**changes)
    # A clamp has a kink, and so has relu: a value that rounds to its other side has another slope, and rightly so.
    if c.spec.clamp is None:
        assert_right(c)
    else:
        found, right = run(c)["out"], run(case(form=form))["out"]
        assert found.shape == right.shape
        assert found.dtype == dtype


@FEW
@given(
    T=st.integers(1, 12),
    D=st.integers(1, 34),
    F=st.integers(1, 34),
    E=st.integers(1, 5),
    K=st.integers(1, 5),
    empty=st.none() | st.integers(0, 4),
    unused=st.sampled_from([0.0, 0.3, 1.0]),
    weighted=st.booleans(),
    form=st.sampled_from(["plain", "gpt_oss"]),
    seed=st.integers(0, 99),
)
def test_any_sizes_and_counts_are_the_reference(T, D, F, E, K, empty, unused, weighted, form, seed):
    K = min(K, E) if weighted else 1
    assert_right(case(T, D, F, E, K, empty=empty, unused=unused, weighted=weighted, form=form, seed=seed))


@pytest.mark.parametrize("K", [1, 4])
def test_all_rows_of_one_expert_or_every_expert_for_every_token(K):
    assert_right(case(T=20, E=4 if K == 4 else 1, K=K, unused=0, empty=None))


def test_no_tokens_are_no_launch():
    found = run(case(T=0, form="gpt_oss"))
    assert found["out"].shape == (0, 19)
    assert all(not found[name].any() for name in NAMES)


def test_rows_past_the_last_group_are_never_read_and_come_out_as_zero():
    torch.manual_seed(0)
    own = GroupedExperts(3, ExpertSpec(dim=19, hidden_dim=17, bias=True))
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.normal_()
    rows, d_rows = torch.randn(23, 19), torch.randn(23, 19)
    rows[20:] = d_rows[20:] = torch.nan
    counts = torch.tensor([7, 0, 13])
    found = {}
    for way in ("loop", "kernels"):
        x = rows.clone().requires_grad_()
        if way == "kernels":
            with interpreted():
                out = own(x, counts)
                grads = torch.autograd.grad(out, [x, *own.parameters()], d_rows)
        else:
            out = own(x, counts)
            grads = torch.autograd.grad(out, [x, *own.parameters()], d_rows)
        found[way] = (out[:20], grads[0][:20], *grads[1:])
        assert not out[20:].any()
    torch.testing.assert_close(found["kernels"], found["loop"], rtol=1e-4, atol=1e-5)


def test_there_are_as_many_tiles_as_the_worst_counts_need():
    # A step of one token has a tile for each of its slots, and not one for each of hundreds of experts.
    assert most_tiles(8, 256, 16) == 8
    for experts, total, rows in product((1, 2, 3), range(1, 9), (1, 2, 4)):
        splits = [c for c in product(range(total + 1), repeat=experts) if sum(c) <= total]
        needed = [sum(-(-c // rows) for c in (*split, total - sum(split))) for split in splits]
        assert most_tiles(total, experts, rows) == max(needed)


def test_counts_and_order_may_lie_between_other_numbers():
    torch.manual_seed(0)
    own, rows = GroupedExperts(3, ExpertSpec(dim=19, hidden_dim=17)), torch.randn(23, 19)
    counts = torch.tensor([[7, 0], [0, 9], [13, 3]])[:, 0]
    assert not counts.is_contiguous()
    expected = own(rows, counts)
    with interpreted():
        torch.testing.assert_close(own(rows, counts), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [1, 2], ids=["stacked", "interleaved"])
def test_halves_of_one_tensor_are_taken_as_they_come(axis):
    c = case(E=3)
    w1, w2, w3, *biases = c.weights
    assert w1 is not None
    assert w3 is not None
    if axis == 1:
        first, third = torch.cat([w1, w3], dim=1).split(w1.shape[1], dim=1)
    else:
        both = torch.stack([w1, w3], dim=2).flatten(1, 2)
        first, third = both[:, ::2], both[:, 1::2]
    assert not first.is_contiguous()
    permutation = LocalTokenDispatcher(3).permute(c.expert_ids_TK)
    with interpreted():
        out, *_ = expert_tiles(
            c.x_TD, permutation.order_N, permutation.tokens_per_expert_E, c.weights_TK, 2, first, w2, third, *biases,
            *Activation.of(c.spec), False,
        )  # fmt: skip
    assert torch.equal(out, run(c)["out"])


def test_equal_inputs_give_equal_bits():
    first, again = run(case(form="gpt_oss")), run(case(form="gpt_oss"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def operands(c: Case, keep: bool):
    permutation = LocalTokenDispatcher(c.num_experts).permute(c.expert_ids_TK)
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (c.x_TD, c.weights_TK, *c.weights)]
    x, weights, *rest = leaves
    return (x, permutation.order_N, permutation.tokens_per_expert_E, weights, 2, *rest, *Activation.of(c.spec), keep)


def test_the_operator_keeps_the_contract_of_its_registration():
    c = case(T=5, D=5, F=6, E=2, form="gpt_oss", unused=0, empty=None)
    with interpreted():
        torch.library.opcheck(expert_tiles, operands(c, True))


def small_layer() -> MoE:
    router = RouterSpec(num_experts=4, top_k=2, score_func="sigmoid", num_expert_groups=2, num_limited_groups=1)
    torch.manual_seed(0)
    return MoE(LayerSpec(router=router, experts=ExpertSpec(dim=7, hidden_dim=5)))


def test_a_compiled_layer_holds_the_kernels_in_one_graph():
    moe = small_layer()
    x = torch.randn(6, 7)
    expected = moe(x)
    torch._dynamo.reset()
    with interpreted():
        compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
        found = compiled(x.requires_grad_())
        found.sum().backward()
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_one_graph_on_kernels_is_for_any_number_of_tokens():
    moe, graphs = small_layer(), []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with interpreted():
        compiled = torch.compile(moe, fullgraph=True, backend=counted, dynamic=True)
        for T in (6, 7, 9):
            x = torch.randn(T, 7)
            torch.testing.assert_close(compiled(x), moe(x), rtol=1e-5, atol=1e-6)
        program = torch.export.export(moe, (x,), dynamic_shapes=({0: torch.export.Dim("T", min=2)},))
        torch.testing.assert_close(program.module()(torch.ones(3, 7)), moe(torch.ones(3, 7)), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
    assert len(graphs) == 1


def test_an_operator_launches_on_the_device_of_its_tensors(monkeypatch):
    # Triton launches on the current device, whose kernels cannot read the memory of another.
    current = []
    monkeypatch.setattr(torch.cuda, "_exchange_device", lambda device: current.append(device) or 0)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", lambda device: current.append(device) or 3)
    on_third = SimpleNamespace(is_cuda=True, get_device=lambda: 3)
    assert on_its_device(lambda first, second: (list(current), second))(on_third, 5) == ([3], 5)
    assert current == [3, 0]
    for operator in (expert_tiles, expert_tiles_backward, route_tokens, route_tokens_backward, sort_slots):
        assert operator._init_fn.__code__ is on_its_device(len).__code__


def test_flops_on_kernels_are_those_of_the_rows_that_have_an_expert():
    c = case()
    rows = int((c.expert_ids_TK >= 0).sum())
    with FlopCounterMode(display=False) as counter:
        run(c)
    # Three products forward, six backward.
    assert counter.get_total_flops() == 9 * 2 * rows * 19 * 21


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_the_layer_takes_the_kernels_inside_interpreted_alone(dtype):
    spec = ExpertSpec(dim=7, hidden_dim=5)
    assert chosen(spec, device="cpu", dtype=dtype).way == "loop"
    with interpreted():
        assert chosen(spec, device="cpu", dtype=dtype).way == "triton"
    assert chosen(spec, device="cpu", dtype=dtype).way == "loop"


def test_what_the_kernels_cannot_take_has_a_reason():
    spec = ExpertSpec(dim=7, hidden_dim=16)
    with interpreted():
        found = chosen(spec, device="cpu", dtype=torch.float64)
        assert (found.way, "float64" in found.why) == ("loop", True)
    on_cuda = chosen(spec, device="cuda")
    # Here TRITON_INTERPRET is set, so that nothing is compiled.
    assert on_cuda.way == "loop"
    assert "dim is 7" in on_cuda.why
    assert chosen(spec.replace(dim=8), device="cuda").way == "grouped_mm"


def test_the_interpreter_has_to_be_asked_for(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is not 1"), interpreted():
        pass


def test_a_slower_way_on_an_accelerator_is_said_once():
    found = Chosen(way="loop", why="a reason of this test")
    with pytest.warns(UserWarning, match="experts of moe_torch take the way 'loop': a reason of this test"):
        say_once(found, "experts")
    say_once(found, "experts")  # a second warning would be an error here


def test_sums_of_slots_are_kept_in_float32():
    slots = torch.full((4, 3), 2.0**-8, dtype=torch.bfloat16)
    slots[0] = 1
    # In bfloat16 1 + 2**-8 is 1, three times. The interpreter rounds to bfloat16 by leaving bits off.
    assert (launch.sum_of_slots(slots, 1, 4).float() - (1 + 3 * 2.0**-8)).abs().max() < 2.0**-7
