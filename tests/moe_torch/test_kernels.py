"""moe_torch, tests of the kernels of the experts, against moe_ref at sizes no tile divides, in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BOUND, EXPERTS, NAMES, Case, assert_right, case, run
from triton.runtime.interpreter import GridExecutor

from moe_ref.specs.layer import ExpertSpec, LayerSpec
from moe_ref.specs.router import RouterSpec
from moe_torch.activation import Activation
from moe_torch.dispatcher import LocalTokenDispatcher
from moe_torch.experts import GroupedExperts
from moe_torch.kernels import chosen, interpreted, launch
from moe_torch.kernels.choice import Chosen, say_once
from moe_torch.kernels.expert_ops import expert_tiles
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


def test_a_compiled_layer_holds_the_kernels_in_one_graph():
    router = RouterSpec(num_experts=4, top_k=2, score_func="sigmoid", num_expert_groups=2, num_limited_groups=1)
    torch.manual_seed(0)
    moe = MoE(LayerSpec(router=router, experts=ExpertSpec(dim=7, hidden_dim=5)))
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


class Of:
    """`torch.cuda.device_of`, which a CPU has no use for, and whether the program is inside of one."""

    depth = 0

    def __init__(self, tensor: torch.Tensor):
        assert isinstance(tensor, torch.Tensor)

    def __enter__(self):
        Of.depth += 1

    def __exit__(self, *_):
        Of.depth -= 1


def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch):
    # Triton launches on the current device: with tensors on cuda:1 that would be another one.
    launched, launch_grid = [], GridExecutor.__call__

    def seen(self, *arguments, **options):
        launched.append(Of.depth)
        return launch_grid(self, *arguments, **options)

    monkeypatch.setattr(torch.cuda, "device_of", Of)
    monkeypatch.setattr(GridExecutor, "__call__", seen)
    router = RouterSpec(num_experts=4, top_k=2, score_func="sigmoid", route_norm=True)
    moe = MoE(LayerSpec(router=router, experts=ExpertSpec(dim=6, hidden_dim=5)))
    x_TD = torch.randn(3, 6, requires_grad=True)
    with interpreted():
        torch.autograd.grad(moe(x_TD).sum(), [x_TD, *moe.parameters()])
    assert len(launched) > 8
    assert min(launched) == 1
