"""moe_torch, tests of the bias hook: what it moves, what it leaves, and that recomputation counts once."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe_ref
from moe_ref import BiasUpdateSpec, ExpertSpec, LayerSpec, QuantileSpec, RouterSpec, SharedSpec
from moe_torch.bias_hook import BiasHook
from moe_torch.moe import MoE

E, K, D, T = 5, 2, 4, 9
LAYER = LayerSpec(
    router=RouterSpec(num_experts=E, top_k=K, score_func="sigmoid"), experts=ExpertSpec(dim=D, hidden_dim=3)
)
UPDATE = BiasUpdateSpec(rate=0.25)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def counts_of(layer: MoE, x) -> np.ndarray:
    with torch.no_grad():
        return moe_ref.tokens_per_expert(layer.router.route(x).expert_ids_TK.numpy(), E)


def test_a_step_of_the_optimizer_moves_the_bias_and_clears_the_counts():
    moe, batches = MoE(LAYER), torch.randn(3, T, D)
    expected_E = sum(counts_of(moe, x) for x in batches)
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.0)
    hook = BiasHook(moe, UPDATE)
    handle = hook.register(optimizer)
    for x in batches:
        moe(x).sum().backward()
    optimizer.step()
    np.testing.assert_array_equal(moe.router.expert_bias, moe_ref.bias_update(expected_E, UPDATE, np.zeros(E)))
    np.testing.assert_array_equal(hook.counts[""], expected_E)
    np.testing.assert_array_equal(moe.tokens_per_expert, np.zeros(E))
    # Nothing was counted since, so that nothing moves.
    before_E = moe.router.expert_bias.clone()
    optimizer.step()
    np.testing.assert_array_equal(moe.router.expert_bias, before_E)
    handle.remove()


def test_a_layer_whose_update_is_off_does_not_stop_the_others():
    # pytorch/torchtitan#3686: a return where a continue was meant.
    layers = nn.Sequential(MoE(LAYER), MoE(LAYER.replace(router=RouterSpec(num_experts=7, top_k=1))), MoE(LAYER))
    hook = BiasHook(layers, UPDATE, overrides={"0": None, "2": UPDATE.replace(rate=2.0, rule="proportional")})
    layers(torch.randn(T, D))
    counted = [layer.tokens_per_expert.numpy().copy() for layer in layers]
    hook.step()
    np.testing.assert_array_equal(layers[0].router.expert_bias, np.zeros(E))
    for index, update in ((1, hook.specs["1"]), (2, hook.specs["2"])):
        expected_E = moe_ref.bias_update(counted[index], update, np.zeros(len(counted[index])))
        np.testing.assert_allclose(layers[index].router.expert_bias, expected_E, rtol=1e-6)
        assert expected_E.any()
    for layer, counts_E, kept_E in zip(layers, counted, hook.counts.values(), strict=True):
        np.testing.assert_array_equal(layer.tokens_per_expert, np.zeros_like(counts_E))
        np.testing.assert_array_equal(kept_E, counts_E)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_forward_pass_that_is_recomputed_counts_once(use_reentrant):
    # pytorch/torchtitan#1593
    moe, x = MoE(LAYER), torch.randn(T, D, requires_grad=True)
    expected_E = counts_of(moe, x)
    for times in (1, 2):
        checkpoint(moe, x, use_reentrant=use_reentrant).sum().backward()
        np.testing.assert_array_equal(moe.tokens_per_expert, times * expected_E)


def test_a_compiled_layer_that_is_recomputed_counts_once():
    moe, x = MoE(LAYER), torch.randn(T, D, requires_grad=True)
    expected_E = counts_of(moe, x)
    compiled = torch.compile(moe, backend="aot_eager")
    for times in (1, 2):
        checkpoint(compiled, x, use_reentrant=False).sum().backward()
        np.testing.assert_array_equal(moe.tokens_per_expert, times * expected_E)


def test_evaluation_counts_nothing_and_padding_is_not_counted():
    moe, x = MoE(LAYER), torch.randn(T, D)
    moe.eval()(x)
    assert not moe.tokens_per_expert.any()
    mask = torch.arange(T) % 3 != 1
    moe.train()(x, mask)
    np.testing.assert_array_equal(moe.tokens_per_expert, counts_of(moe, x[mask]))


def test_many_steps_balance_a_skewed_load():
    moe = MoE(LAYER)
    with torch.no_grad():
        moe.router.gate.weight.add_(torch.linspace(0.6, -0.6, E)[:, None])
    hook = BiasHook(moe, BiasUpdateSpec(rate=0.003))
    x = torch.rand(400, D)
    busiest = []
    for _ in range(200):
        moe(x)
        hook.step()
        busiest.append(hook.counts[""].max().item() * E / (len(x) * K))
    assert busiest[0] > 2
    assert busiest[-1] < 1.2


def test_what_names_no_layer_or_has_no_bias_is_refused():
    with pytest.raises(ValueError, match=r"overrides names \['1'\]; the layers are \['0'\]"):
        BiasHook(nn.Sequential(MoE(LAYER)), UPDATE, overrides={"1": None})
    without = LAYER.replace(router=RouterSpec(num_experts=E, top_k=K, selector="round_robin"))
    with pytest.raises(ValueError, match="layer '0' has no expert_bias"):
        BiasHook(nn.Sequential(MoE(without)), UPDATE)
    BiasHook(nn.Sequential(MoE(without)), UPDATE, overrides={"0": None}).step()
    BiasHook(nn.Linear(2, 2), UPDATE).step()


@pytest.mark.parametrize("setup", ["nothing", "reset_parameters", "load_state_dict"])
def test_a_layer_built_on_meta_starts_from_no_counts_and_no_bias(setup):
    # NVIDIA/Megatron-LM#4154: memory that nobody wrote to has a sign, too.
    whole = MoE(LAYER)
    with torch.device("meta"):
        built = MoE(LAYER)
    BiasHook(built, QuantileSpec.of("kimi_k3"))
    torch.use_deterministic_algorithms(True)  # what to_empty leaves is then a number that shows
    try:
        built.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    if setup == "reset_parameters":
        built.reset_parameters()
    if setup == "load_state_dict":
        built.load_state_dict(whole.state_dict())
    np.testing.assert_array_equal(built.tokens_per_expert, np.zeros(E))
    np.testing.assert_array_equal(built.router.expert_bias, np.zeros(E))
    np.testing.assert_array_equal(built.needs.total, np.zeros_like(built.needs.total))
    assert setup == "nothing" or all(each.isfinite().all() for each in built.parameters())


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("way", ["reset_parameters", "load_state_dict", "assign"])
def test_whatever_memory_held_is_no_count_and_no_bias(device, way):
    whole, other = MoE(LAYER), MoE(LAYER, device=device)
    whole.router.expert_bias.fill_(2.0)
    if way != "assign":
        other.to_empty(device="cpu")
        other.tokens_per_expert.fill_(7)
        other.router.expert_bias.fill_(7.0)
    if way == "reset_parameters":
        other.reset_parameters()
    else:
        other.load_state_dict(whole.state_dict(), assign=way == "assign")
    np.testing.assert_array_equal(other.tokens_per_expert, np.zeros(E))
    np.testing.assert_array_equal(other.router.expert_bias, np.full(E, 0.0 if way == "reset_parameters" else 2.0))
    other(torch.randn(T, D))
    assert other.tokens_per_expert.sum() == T * K


def test_reset_parameters_forgets_what_was_counted_and_draws_every_parameter_anew():
    moe = MoE(LAYER.replace(shared=SharedSpec(hidden_dim=3, gate="sigmoid")))
    before = {name: values.detach().clone() for name, values in moe.named_parameters()}
    moe(torch.randn(T, D))
    moe.router.expert_bias.fill_(1.0)
    moe.reset_parameters()
    np.testing.assert_array_equal(moe.tokens_per_expert, np.zeros(E))
    np.testing.assert_array_equal(moe.router.expert_bias, np.zeros(E))
    assert all((values != before[name]).any() for name, values in moe.named_parameters())


@pytest.mark.parametrize("rule", [QuantileSpec.of("kimi_k3"), QuantileSpec(over="batches", keep=0.5)])
def test_a_hook_sets_the_bias_to_the_quantile_of_its_training_passes(rule):
    moe, batches = MoE(LAYER), torch.randn(2, T, D)
    # With no bias the need of the expert at the cutoff is 0, which is an edge of two bins.
    assert moe.router.expert_bias is not None
    moe.router.expert_bias.uniform_(-0.5, 0.5)
    bias_E, hook = moe.router.expert_bias.numpy().copy(), BiasHook(moe, rule)
    moe(batches[0]).sum().backward()
    checkpoint(moe, batches[1], use_reentrant=False).sum().backward()
    moe.eval()(torch.randn(T, D))
    logits_TE = moe.router.gate(batches.flatten(0, 1)).detach().numpy()
    expected_E = moe_ref.quantile_update(logits_TE, LAYER.router, rule, bias_E, tokens_per_shard=(T, T))
    hook.step()
    np.testing.assert_allclose(moe.router.expert_bias, expected_E, atol=1e-6)
    before_E = moe.router.expert_bias.clone()
    hook.step()
    np.testing.assert_array_equal(moe.router.expert_bias, before_E)
    assert not [name for name in moe.state_dict() if "needs" in name]


def test_an_exact_quantile_of_a_pool_is_refused_by_a_hook():
    with pytest.raises(ValueError, match="bins is None"):
        BiasHook(MoE(LAYER), QuantileSpec())


def test_momentum_goes_on_after_a_checkpoint():
    rule = BiasUpdateSpec(rule="tanh", rate=0.25, momentum=0.5)
    moe, other = MoE(LAYER), MoE(LAYER)
    hook, later = BiasHook(moe, rule), BiasHook(other, rule)
    moe(torch.randn(T, D))
    hook.step()
    other.load_state_dict(moe.state_dict())
    later.load_state_dict(hook.state_dict())
    hook.step()
    later.step()
    np.testing.assert_array_equal(moe.router.expert_bias, other.router.expert_bias)
    with pytest.raises(ValueError, match="nobody"):
        later.load_state_dict({"nobody": torch.zeros(E)})
