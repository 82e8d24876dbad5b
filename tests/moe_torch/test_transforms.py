"""moe_torch, tests of transforms: derivatives of any order and mode, vmap, FLOPs, export, activation checkpointing."""

from functools import partial

import numpy as np
import pytest
import states_on_ranks
import torch
from test_moe import LAYERS, D, F, layer, tokens
from test_torch_parallel import LAYERS as SHARDED
from test_torch_parallel import error, params_of
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from conformance.subjects.ranks import shared
from moe_ref import LayerParams, ShardLayout
from moe_torch.moe import MoE

NAMES = ["gpt_oss", "deepseek_v3", "llama4", "longcat_flash", "nemotron_h"]
"""Biases and a clamp; groups and shared experts; weights on the input; null experts; no gate."""


pytestmark = pytest.mark.usefixtures("one_thread")


def built(name: str) -> MoE:
    return layer(LAYERS[name], LayerParams.init(LAYERS[name], seed=2)).eval()


def parameters(moe: MoE) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in moe.named_parameters()}


def loss(moe: MoE, values: dict[str, torch.Tensor], x_TD: torch.Tensor) -> torch.Tensor:
    return functional_call(moe, values, (x_TD,)).square().sum()


def x_and_tangent(num_tokens: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(tokens(num_tokens)), torch.tensor(tokens(num_tokens, seed=5))


@pytest.mark.parametrize("name", NAMES)
def test_torch_func_gives_the_gradients_of_autograd(name):
    moe, (x_TD, tangent_TD) = built(name), x_and_tangent()
    found, d_x_TD = grad(partial(loss, moe), argnums=(0, 1))(parameters(moe), x_TD)
    x_TD = x_TD.requires_grad_()
    moe(x_TD).square().sum().backward()
    torch.testing.assert_close(d_x_TD, x_TD.grad)
    for key, parameter in moe.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, msg=key)
    # Forward mode: <d_x, tangent>, by torch.func, by dual numbers, and compiled.
    wanted = (d_x_TD * tangent_TD).sum()
    function, x_TD = partial(loss, moe, parameters(moe)), x_TD.detach()
    torch.testing.assert_close(jvp(function, (x_TD,), (tangent_TD,))[1], wanted)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x_TD, tangent_TD)
        torch.testing.assert_close(forward_ad.unpack_dual(moe(dual).square().sum()).tangent.detach(), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_of_a_gradient_is_right_in_every_mode(name):
    moe, (x_TD, tangent_TD) = built(name), x_and_tangent()
    function = partial(loss, moe, parameters(moe))
    x_TD = x_TD.requires_grad_()
    (plain_TD,) = torch.autograd.grad(function(x_TD), x_TD)
    (first_TD,) = torch.autograd.grad(function(x_TD), x_TD, create_graph=True)
    torch.testing.assert_close(first_TD.detach(), plain_TD)
    (wanted_TD,) = torch.autograd.grad((first_TD * tangent_TD).sum(), x_TD)
    step = 1e-5
    ahead_TD, behind_TD = (grad(function)(x_TD.detach() + sign * step * tangent_TD) for sign in (1, -1))
    torch.testing.assert_close(wanted_TD, (ahead_TD - behind_TD) / (2 * step), rtol=1e-5, atol=1e-5)
    x_TD = x_TD.detach()
    torch.testing.assert_close(jvp(grad(function), (x_TD,), (tangent_TD,))[1], wanted_TD)
    torch.testing.assert_close(vjp(grad(function), x_TD)[1](tangent_TD)[0], wanted_TD)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_holds_in_both_modes_and_for_the_second_order(name):
    moe, (x_TD, _) = built(name), x_and_tangent(3)
    x_TD = x_TD.requires_grad_()
    assert torch.autograd.gradcheck(moe, (x_TD,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(moe, (x_TD,))


def test_jacobians_and_hessians_are_those_of_each_other():
    moe, (x_TD, _) = built("deepseek_v3"), x_and_tangent(2)
    function = partial(loss, moe, parameters(moe))
    torch.testing.assert_close(hessian(function)(x_TD), jacfwd(jacfwd(function))(x_TD))


def test_vmap_over_gradients_gives_the_jacobian_of_one_after_the_other():
    moe, (x_TD, _) = built("gpt_oss"), x_and_tangent(2)
    asked = [x_TD.requires_grad_(), *moe.parameters()]
    out_TD = moe(x_TD)
    each = torch.eye(out_TD.numel(), dtype=out_TD.dtype).view(-1, *out_TD.shape)
    one_by_one = [torch.autograd.grad(out_TD, asked, one_TD, retain_graph=True) for one_TD in each]
    in_vmap = vmap(lambda one_TD: torch.autograd.grad(out_TD, asked, one_TD, retain_graph=True))(each)
    batched = torch.autograd.grad(out_TD, asked, each, is_grads_batched=True)
    for found, again, wanted in zip(in_vmap, batched, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(wanted))
        torch.testing.assert_close(again, torch.stack(wanted))


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_examples_gives_each_its_own(name):
    moe, x_BTD = built(name), torch.tensor(tokens(15)).view(3, 5, D)
    torch.testing.assert_close(vmap(moe)(x_BTD), torch.stack([moe(x_TD) for x_TD in x_BTD]))
    function = grad(partial(loss, moe))
    by_example = vmap(function, in_dims=(None, 0))(parameters(moe), x_BTD)
    one_by_one = [function(parameters(moe), x_TD) for x_TD in x_BTD]
    for key, value in by_example.items():
        torch.testing.assert_close(value, torch.stack([own[key] for own in one_by_one]), msg=key)


def test_vmap_over_layers_gives_each_its_own():
    moe, (x_TD, _) = built("deepseek_v3"), x_and_tangent()
    others = {name: value.flip(0).contiguous() for name, value in parameters(moe).items()}
    stacked = {name: torch.stack([value, others[name]]) for name, value in parameters(moe).items()}
    found = vmap(lambda values: functional_call(moe, values, (x_TD,)))(stacked)
    torch.testing.assert_close(found, torch.stack([moe(x_TD), functional_call(moe, others, (x_TD,))]))


def test_examples_of_vmap_are_counted_as_one_batch():
    moe, x_BTD = built("deepseek_v3").train(), torch.tensor(tokens(15)).view(3, 5, D)
    vmap(moe)(x_BTD)
    found = moe.tokens_per_expert.clone()
    moe.tokens_per_expert.zero_()
    moe(x_BTD)
    assert torch.equal(found, moe.tokens_per_expert)
    assert found.sum() == 15 * 3


def test_transforms_of_a_compiled_layer_are_those_of_the_layer():
    moe, (x_TD, tangent_TD) = built("deepseek_v3"), x_and_tangent()
    function = partial(loss, moe, parameters(moe))

    def both(x_TD):
        return grad(function)(x_TD), jvp(function, (x_TD,), (tangent_TD,))[1]

    torch._dynamo.reset()
    for found, wanted in zip(torch.compile(both, backend="aot_eager")(x_TD), both(x_TD), strict=True):
        torch.testing.assert_close(found, wanted)


# FLOPs


def products(moe: MoE, num_tokens: int, rows: int) -> tuple[int, int]:
    """Of the experts, and of gate and shared experts, in one forward pass."""
    spec = moe.spec
    matrices = 3 if spec.experts.gated else 2
    shared = 0 if spec.shared is None else matrices * spec.shared.hidden_dim * D
    return 2 * rows * matrices * F * D, 2 * num_tokens * (spec.router.num_logits * D + shared)


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_of_the_rows_that_have_an_expert(name):
    moe, x_TD = built(name), torch.tensor(tokens(9)).requires_grad_()
    mask_T = torch.arange(9) < 6
    ids_TK = moe.router.route(x_TD, token_mask_T=mask_T).expert_ids_TK
    rows = int(((ids_TK >= 0) & (ids_TK < moe.spec.router.num_experts)).sum())
    assert rows < ids_TK.numel()
    experts, others = products(moe, 9, rows)
    with FlopCounterMode(display=False) as forward:
        output_TD = moe(x_TD, mask_T)
    assert forward.get_total_flops() == experts + others
    with FlopCounterMode(display=False) as backward:
        output_TD.sum().backward()
    assert backward.get_total_flops() == 2 * (experts + others)
    moe.experts.requires_grad_(False)
    with FlopCounterMode(display=False) as frozen:
        moe(x_TD, mask_T).sum().backward()
    assert frozen.get_total_flops() == 2 * experts + 3 * others


# export and activation checkpointing


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_takes_any_number_of_tokens(strict):
    moe, (x_TD, _) = built("deepseek_v3"), x_and_tangent()
    shapes = {0: torch.export.Dim("B", min=2), 1: torch.export.Dim("L", min=2)}
    program = torch.export.export(moe, (x_TD.expand(3, -1, -1),), dynamic_shapes=(shapes,), strict=strict)
    other = torch.tensor(tokens(20, seed=8)).view(2, 10, D)
    assert torch.equal(program.module()(other), moe(other))


WAYS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": partial(create_selective_checkpoint_contexts, [torch.ops.moe_torch.expert_loop.default]),
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_a_recomputed_layer_has_the_same_bits_and_counts_once(way):
    found = []
    for recompute in (False, True):
        moe, x_TD = built("gpt_oss").train(), torch.tensor(tokens()).requires_grad_()
        output_TD = checkpoint(moe, x_TD, **WAYS[way]) if recompute else moe(x_TD)
        output_TD.square().sum().backward()
        found.append([output_TD.detach(), x_TD.grad, *(p.grad for p in moe.parameters()), moe.tokens_per_expert])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


# over ranks


@pytest.mark.parametrize("strategy", ["all_to_all", "node_dedup", "replicated"])
def test_a_parallel_layer_has_the_gradient_of_a_gradient(strategy):
    spec, layout = SHARDED["biases"], ShardLayout(expert=2, strategy=strategy, ranks_per_node=1)
    params, x_TD = params_of(spec), tokens(9)[:, :8].astype(np.float32)
    moe = MoE(spec)
    moe.load_params(params)
    wanted = states_on_ranks.second_order(moe, torch.tensor(x_TD))
    found = shared("conformance.subjects.torch.sharded").run(
        2, states_on_ranks.second_order_on_rank, spec, params, layout, x_TD
    )
    parts = [own.pop("x") for own in found]
    whole = parts[0] if layout.facts.shares_tokens else np.concatenate(parts)
    assert error(whole, wanted.pop("x")) < 1e-4
    for own in found:
        for name, value in wanted.items():
            assert error(own[name], value) < 1e-4, name


def test_torch_func_over_ranks_is_an_error_that_says_what_does():
    layout = ShardLayout(expert=2)
    call = states_on_ranks.refused_transform_on_rank, SHARDED["biases"], layout
    for message in shared("conformance.subjects.torch.sharded").run(2, *call):
        assert "torch.func and forward-mode AD do not reach over ranks; torch.autograd does" in message
