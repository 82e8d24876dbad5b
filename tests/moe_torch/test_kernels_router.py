"""moe_torch, tests of the kernels of router and permutation, in Triton's interpreter: against moe_ref."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_ref
from moe_ref import UNUSED, RouterSpec
from moe_ref.backward.routing import route_backward
from moe_ref.permute import permute
from moe_torch.dispatcher import LocalTokenDispatcher
from moe_torch.kernels import chosen, interpreted, sort
from moe_torch.kernels.router_ops import arguments_of, route_tokens
from moe_torch.routing import Routing, route

SOME = settings(max_examples=25, deadline=None, derandomize=True, database=None)
FORMS = {
    "softmax": {},
    "normed softmax": {"route_norm": True, "logit_scale": 0.5},
    "deepseek_v3": {"score_func": "sigmoid", "route_norm": True, "norm_eps": 1e-20, "route_scale": 2.5},
    "sqrtsoftplus": {"score_func": "sqrtsoftplus", "route_norm": True, "norm_form": "clamp", "norm_eps": 0.5},
    "llama4": {"score_func": "sigmoid", "select_by": "logit"},
    "gpt_oss": {"score_over": "selected", "select_by": "logit"},
}
GROUPS = {"G": {"num_expert_groups": 6, "num_limited_groups": 3}, "1 best": {"num_expert_groups": 3,
          "num_limited_groups": 2, "group_score_k": 1}, "4 best": {"num_expert_groups": 2, "num_limited_groups": 1,
          "group_score_k": 4}, "none": {}}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet_numpy():
    """The interpreter computes with NumPy, which warns of an exp that overflows."""
    with np.errstate(all="ignore"):
        yield


def on_kernel(logits_TE, spec: RouterSpec, **named) -> Routing:
    with interpreted():
        assert chosen(spec, device="cpu", dtype=torch.float32).way == "triton"
        return route(logits_TE, spec, **named)


def single(values) -> np.ndarray:
    """float64 of float32 values."""
    return np.asarray(values, np.float32).astype(np.float64)


def assert_right(spec: RouterSpec, logits_TE: np.ndarray, bias_E: np.ndarray | None, mask_T: np.ndarray | None) -> None:
    """Ids, weights, kept groups and the gradient of the logits are those of the reference."""
    wanted = moe_ref.route(np.where(np.isnan(logits_TE), 0, logits_TE), spec, expert_bias_E=bias_E, token_mask_T=mask_T)
    logits = torch.tensor(logits_TE, dtype=torch.float32, requires_grad=True)
    named = {"expert_bias_E": bias_E, "token_mask_T": mask_T}
    tensors = {n: None if v is None else torch.tensor(v) for n, v in named.items()}
    found = on_kernel(logits, spec, **tensors)
    np.testing.assert_array_equal(found.expert_ids_TK.numpy(), wanted.expert_ids_TK)
    # Ten roundings of 2**-24, and what they do to the argument of exp.
    np.testing.assert_allclose(found.weights_TK.detach().numpy(), wanted.weights_TK, rtol=3e-6, atol=1e-12)
    assert found.expert_ids_TK.dtype == torch.int64
    valid_T = np.ones(len(logits_TE), bool) if mask_T is None else mask_T
    if wanted.group_ids_TL is not None:
        assert found.group_ids_TL is not None
        np.testing.assert_array_equal(found.group_ids_TL.numpy()[valid_T], wanted.group_ids_TL[valid_T])
    if spec.has_scores:
        assert found.scores_TE is not None
        np.testing.assert_allclose(found.scores_TE.detach().numpy(), wanted.scores_TE, rtol=3e-6, atol=1e-12)
    d_weights_TK = np.linspace(-1, 2, wanted.weights_TK.size).reshape(wanted.weights_TK.shape)
    (grad,) = torch.autograd.grad(found.weights_TK, logits, torch.tensor(d_weights_TK, dtype=torch.float32))
    right_TE, _ = route_backward(wanted, spec, None, d_weights_TK, token_mask_T=mask_T)
    np.testing.assert_allclose(grad.numpy(), right_TE, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_router_and_its_gradient_are_the_reference(form, groups):
    rng = np.random.default_rng(1)
    spec = RouterSpec(num_experts=24, top_k=5, **GROUPS[groups] | FORMS[form])
    logits_TE, mask_T = single(rng.normal(size=(11, 24)) * 2), np.arange(11) % 4 != 2
    logits_TE[~mask_T] = np.nan
    logits_TE[3, 1::4] = -np.inf
    assert_right(spec, logits_TE, single(rng.normal(size=24) * 0.1), mask_T)


@SOME
@given(
    E=st.integers(1, 40),
    K=st.integers(1, 40),
    T=st.integers(0, 9),
    groups=st.sampled_from([1, 1, 2, 3, 4]),
    form=st.sampled_from(sorted(FORMS)),
    tied=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_size_with_ties_is_the_reference(E, K, T, groups, form, tied, seed):
    rng, fields = np.random.default_rng(seed), dict(FORMS[form])
    E = max(E, 2) * groups
    K = min(K, 32, E)
    if groups > 1:
        kept = max(1, groups - 1)
        K = min(K, kept * (E // groups))
        fields |= {"num_expert_groups": groups, "num_limited_groups": kept, "group_score_k": 1 + tied}
    # Of equal logits the scores are equal to the last bit, and other ones are far apart.
    logits_TE = rng.choice([-1.0, -0.0, 0.0, 0.75, 2.0], size=(T, E)) if tied else single(rng.normal(size=(T, E)))
    assert_right(RouterSpec(num_experts=E, top_k=K, **fields), logits_TE, None, None)


def test_a_slot_with_nothing_left_to_choose_is_unused():
    for fields in FORMS.values():
        spec = RouterSpec(num_experts=24, top_k=5, **GROUPS["G"] | fields)
        logits = torch.full((2, 24), -torch.inf)
        logits[0, 6:8] = torch.tensor([1.0, 2.0])
        logits.requires_grad_()
        found = on_kernel(logits, spec)
        assert found.expert_ids_TK.tolist() == [[7, 6] + [UNUSED] * 3, [UNUSED] * 5]
        assert found.weights_TK[0, :2].gt(0).all()
        assert found.weights_TK[0, 2:].eq(0).all()
        assert found.weights_TK[1].eq(0).all()
        found.weights_TK.sum().backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("level", [0.0, -40.0, -87.9, -150.0, -1e4, 1e4])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_finite_where_scores_saturate_or_vanish(form, level):
    logits = (torch.linspace(-1, 1, 48).view(2, 24) + level).requires_grad_()
    found = on_kernel(logits, RouterSpec(num_experts=24, top_k=5, **FORMS[form]))
    found.weights_TK.square().sum().backward()
    assert found.weights_TK.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_logits_are_routed_in_float32(dtype):
    spec = RouterSpec(num_experts=24, top_k=5, **GROUPS["G"] | FORMS["deepseek_v3"])
    logits = torch.randn(9, 24, generator=torch.manual_seed(0)).to(dtype).requires_grad_()
    found, wanted = on_kernel(logits, spec), moe_ref.route(logits.detach().double().numpy(), spec)
    np.testing.assert_array_equal(found.expert_ids_TK.numpy(), wanted.expert_ids_TK)
    np.testing.assert_allclose(found.weights_TK.detach().numpy(), wanted.weights_TK, rtol=3e-6)
    found.weights_TK.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_experts": 1025}, "num_choices is 1025"),
        ({"top_k": 33}, "top_k is 33"),
        ({"selector": "sparsemixer", "select_by": "logit"}, "selector is 'sparsemixer'"),
        ({"logit_softcap": 3.0}, "logit_softcap is 3.0"),
        ({"norm_p": 2.0}, "norm_p is 2.0"),
        ({"learned_scale": "global"}, "learned_scale is 'global'"),
        ({"num_null_experts": 2, "null_kind": "skip"}, "null_kind is 'skip'"),
        ({"num_null_experts": 2, "num_zero_experts": 1}, "num_zero_experts is 1"),
    ],
)
def test_a_router_that_does_not_fit_has_the_composition_and_a_reason(changes, why):
    spec = RouterSpec(**{"num_experts": 64, "top_k": 4} | changes)
    with interpreted():
        found = chosen(spec, device="cpu", dtype=torch.float32)
        assert found.way == "composition"
        assert why in found.why


def test_the_operator_keeps_the_contract_of_its_registration():
    spec = RouterSpec(num_experts=6, top_k=2, **FORMS["deepseek_v3"])
    logits = torch.randn(5, 6, generator=torch.manual_seed(0)).requires_grad_()
    torch.library.opcheck(route_tokens, (logits, torch.zeros(6), None, *arguments_of(spec)))


@SOME
@given(
    T=st.integers(0, 300),
    K=st.integers(1, 4),
    E=st.integers(1, 70),
    null=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_slots_are_sorted_by_expert_and_stay_in_token_order(T, K, E, null, seed):
    ids_TK = np.random.default_rng(seed).integers(-1, E + null, size=(T, K))
    with interpreted():
        found = LocalTokenDispatcher(E, E + null).permute(torch.tensor(ids_TK))
    wanted = permute(np.where(ids_TK >= E, UNUSED, ids_TK), E)
    used = len(wanted.order_N)
    np.testing.assert_array_equal(found.order_N[:used].numpy(), wanted.order_N)
    np.testing.assert_array_equal(found.tokens_per_expert_E[:E].numpy(), wanted.tokens_per_expert_E)
    np.testing.assert_array_equal(np.sort(found.order_N.numpy()), np.arange(T * K))
    np.testing.assert_array_equal(found.row_of_slot_N[found.order_N].numpy(), np.arange(T * K))


@pytest.mark.parametrize("most_blocks", [256, 2])
def test_slots_of_many_blocks_are_sorted_as_those_of_one(most_blocks, monkeypatch):
    monkeypatch.setattr(sort, "MOST_BLOCKS", most_blocks)
    ids_TK = torch.randint(-1, 300, (1700, 2), generator=torch.manual_seed(0))
    with interpreted():
        found = LocalTokenDispatcher(299, 300).permute(ids_TK)
    wanted = LocalTokenDispatcher(299, 300).permute(ids_TK)
    for name in ("order_N", "row_of_slot_N", "tokens_per_expert_E", "has_expert_TK"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
