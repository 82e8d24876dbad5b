"""moe_torch, tests of names: torchtitan's debug DeepSeek-V3 with our layer in it is the same model."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conformance.subjects.torch.arrays import to_numpy
from conformance.subjects.torchtitan.balance import optimizer_with_hook
from conformance.subjects.torchtitan.layer import forward_in_float32
from conformance.subjects.torchtitan.router import no_autocast_warning
from moe_ref import BiasUpdateSpec, ExpertSpec, LayerSpec, RouterSpec, SharedSpec
from moe_torch.bias_hook import BiasHook
from moe_torch.moe import MoE
from moe_torch.names import from_torchtitan, to_torchtitan

SPEC = LayerSpec(
    router=RouterSpec(num_experts=8, top_k=3, num_expert_groups=4, num_limited_groups=2),
    experts=ExpertSpec(dim=256, hidden_dim=256),
    shared=SharedSpec(hidden_dim=512),  # of two
)
STEPS, RATE = 5, 1e-3


pytestmark = pytest.mark.usefixtures("one_thread")


class Attention(nn.Module):
    """In place of torchtitan's flex attention, which has no backward pass on a CPU."""

    def forward(self, q_BLHD, k_BLHD, v_BLHD, *, attention_masks, scale):
        heads = (each.transpose(1, 2) for each in (q_BLHD, k_BLHD, v_BLHD))
        return F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale).transpose(1, 2)


@pytest.fixture(scope="module")
def titan() -> nn.Module:
    """torchtitan's debug DeepSeek-V3, of one dense block and one with groups, whose experts compute in float32."""
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.models.deepseek_v3 import _debugmodel

    set_spmd_backend("default")  # the shipped default looks for the trainer's mesh
    config = _debugmodel("flex", "standard")
    config.layers = config.layers[:2]
    for block in config.layers[1:]:
        block.moe.router.num_expert_groups, block.moe.router.num_limited_groups = 4, 2
    torch.manual_seed(0)
    model = config.build()
    model.init_states()
    for block in model.layers.values():
        block.attention.inner_attention = Attention()
    return model


def with_our_layers(titan: nn.Module) -> nn.Module:
    """The same model with `MoE` in its blocks."""
    model = copy.deepcopy(titan)
    for block in model.get_submodule("layers").children():
        if block.moe_enabled:
            block.moe = MoE(SPEC)
    model.load_state_dict(from_torchtitan(titan.state_dict()))
    return model


def losses_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Of some steps on tokens of a skewed distribution."""
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        tokens_BL = (torch.rand(2, 33, generator=generator) ** 3 * 100).long()
        with no_autocast_warning():
            logits_BLV = model(tokens_BL[:, :-1])
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_state_dict_comes_back_bit_for_bit(titan):
    before = titan.state_dict()
    ours = with_our_layers(titan)
    after = to_torchtitan(ours.state_dict())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    block = {name.removeprefix("layers.1."): v for name, v in before.items() if name.startswith("layers.1.")}
    back = to_torchtitan(from_torchtitan(block))
    assert back.keys() == block.keys()
    assert all(back[name] is value for name, value in block.items())


def test_our_layer_in_torchtitans_model_has_its_losses(titan):
    ours, theirs = with_our_layers(titan), copy.deepcopy(titan)
    for block in theirs.get_submodule("layers").children():
        if block.moe_enabled:
            inner = block.moe.routed_experts.inner_experts
            inner.forward = forward_in_float32.__get__(inner)
    adam = {"lr": 1e-3}
    hooked = optimizer_with_hook(theirs)
    optimizer = torch.optim.AdamW(theirs.parameters(), **adam)
    # Its hook stands before the step of the optimizer, ours after it: between forward passes either way.
    optimizer.register_step_pre_hook(lambda *_: hooked.step())
    wanted = losses_of(theirs, optimizer)
    optimizer = torch.optim.AdamW(ours.parameters(), **adam)
    BiasHook(ours, BiasUpdateSpec(rate=RATE, centred=True)).register(optimizer)
    found = losses_of(ours, optimizer)
    assert wanted[-1] < wanted[0] - 1
    assert found == pytest.approx(wanted, rel=1e-5)
    bias_E = to_torchtitan(ours.state_dict())["layers.1.moe.expert_bias_E"]
    assert to_numpy(bias_E) == pytest.approx(to_numpy(theirs.get_buffer("layers.1.moe.expert_bias_E")), abs=1e-7)
    assert bias_E.any()


def test_the_shared_gate_has_another_name_and_what_torchtitan_has_not_is_an_error():
    spec = SPEC.replace(shared=SharedSpec(hidden_dim=8, gate="sigmoid"))
    state = MoE(spec, device="meta").state_dict()
    assert "shared_experts.gate.weight" in to_torchtitan(state)
    assert from_torchtitan(to_torchtitan(state)) == state
    biased = MoE(SPEC.replace(experts=ExpertSpec(dim=8, hidden_dim=8, bias=True)), device="meta")
    with pytest.raises(ValueError, match=r"the state dict has 'experts\.b1_EF', which torchtitan's MoE has not"):
        to_torchtitan(biased.state_dict())
    with pytest.raises(ValueError, match=r"two names of the state dict become 'moe\.router\.expert_bias'"):
        from_torchtitan({"moe.expert_bias_E": 0, "moe.router.expert_bias": 1})
