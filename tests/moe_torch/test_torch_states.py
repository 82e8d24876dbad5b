"""moe_torch over real ranks: checkpoints, clipping and optimizers see one whole layer, whatever the layout."""

from dataclasses import replace

import numpy as np
import pytest
import states_on_ranks
import torch
from test_torch_parallel import FLOAT32, LAYERS, PLACED, error, params_of

from conformance.subjects.ranks import shared
from moe_ref import LayerParams, LayerSpec, layer_backward, moe_layer
from moe_ref.specs.layout import ShardLayout
from moe_torch.bias_hook import BiasHook
from moe_torch.moe import MoE

DEEPSEEK, BIASES = LAYERS["groups"], LAYERS["biases"]
EP1, EP2, EP4 = (ShardLayout(expert=n) for n in (1, 2, 4))
FSDP2_EP2 = ShardLayout(fsdp=2, expert=2)
ADAM = 2e-4
"""Largest error over largest number after some steps of Adam, which divides by the square root of small numbers."""


def on_ranks(layout: ShardLayout, function, *arguments) -> list:
    return shared("conformance.subjects.torch.sharded").run(layout.num_ranks, function, *arguments)


def tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def other_params(spec: LayerSpec) -> LayerParams:
    return LayerParams.init(spec, seed=7).astype(np.float32)


def assert_near(found: dict, wanted: dict, bound: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert error(found[name], value) < bound, name


def assert_equal(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


# clipping

CLIPPED = {
    "EP 2": (EP2, DEEPSEEK),
    "EP 4, placed": (EP4.replace(placement=PLACED), BIASES),
    "EP 2, TP 2": (ShardLayout(expert=2, tensor=2), BIASES),
    "TP 2": (ShardLayout(tensor=2), BIASES),
    "EP 2, TP 2, replicated": (ShardLayout(expert=2, tensor=2, strategy="replicated"), BIASES),
    "DP 2, EP 2": (ShardLayout(data=2, expert=2), BIASES),
    "FSDP 2": (ShardLayout(fsdp=2), DEEPSEEK),
    "FSDP 2, EP 2": (FSDP2_EP2, BIASES),
}


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("sync", [True, False], ids=["after sync_gradients", "before it"])
def test_the_norm_of_a_parallel_layer_is_that_of_the_whole_on_every_rank(name, sync):
    layout, spec = CLIPPED[name]
    params, x_TD = params_of(spec), tokens(11, 8)
    trace = moe_layer(x_TD, params, spec)
    gradients = layer_backward(trace, params, spec, 2 * trace.output_TD).params
    trained = [v for name, v in vars(gradients).items() if v is not None and name != "expert_bias_E"]
    wanted = np.sqrt(sum(np.square(value).sum() for value in trained))
    found = on_ranks(layout, states_on_ranks.clip_on_rank, spec, params, layout, x_TD, sync)
    for norm, clipped in found:
        assert norm == pytest.approx(wanted, rel=FLOAT32)
        assert norm == found[0][0]
        assert np.sqrt(sum(np.square(value).sum() for value in clipped.values())) == pytest.approx(1, rel=1e-4)
        assert_equal(clipped, found[0][1])


def model_of_one(spec: LayerSpec, params: LayerParams) -> states_on_ranks.Model:
    return states_on_ranks.Model(spec, params)


RESTS = {
    "EP 2, the same mesh": (EP2, "same mesh"),
    "FSDP 2, EP 2, the same mesh": (FSDP2_EP2, "same mesh"),
    "EP 2, all ranks": (EP2, "other mesh"),
    "FSDP 2, EP 2, all ranks": (FSDP2_EP2, "other mesh"),
    "EP 2, plain": (EP2, "plain"),
}


@pytest.mark.parametrize("name", RESTS)
def test_the_norm_of_a_model_is_one_or_torch_refuses_and_ours_has_it(name):
    layout, rest = RESTS[name]
    params, x_TD = params_of(DEEPSEEK), tokens(11, 8)
    model = model_of_one(DEEPSEEK, params)
    states_on_ranks.backward(model, torch.tensor(x_TD))
    wanted = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    message = {"same mesh": "", "other mesh": "must have the same mesh", "plain": "mixed torch.Tensor and DTensor"}
    for norm, clipped, refused in on_ranks(
        layout, states_on_ranks.clip_model_on_rank, DEEPSEEK, params, layout, x_TD, rest
    ):
        assert message[rest] in refused
        assert bool(message[rest]) == bool(refused)
        assert norm == pytest.approx(wanted, rel=FLOAT32)
        assert_near(clipped, gradients, FLOAT32)


def test_the_fsdp_of_a_model_may_take_the_parameters_of_a_parallel_layer():
    params, x_TD = params_of(BIASES), tokens(11, 8)
    model = model_of_one(BIASES, params)
    states_on_ranks.backward(model, torch.tensor(x_TD))
    wanted = {name: p.grad.numpy() for name, p in model.moe.named_parameters() if p.grad is not None}
    for found in on_ranks(FSDP2_EP2, states_on_ranks.outer_fsdp_on_rank, BIASES, params, x_TD):
        assert_near(found, wanted, FLOAT32)


# optimizers


def trained_alone(spec: LayerSpec, params: LayerParams, batches: np.ndarray, name: str) -> dict:
    """One process with all tokens."""
    model = model_of_one(spec, params)
    optimizer = states_on_ranks.OPTIMIZERS[name](model.parameters())
    BiasHook(model, states_on_ranks.BiasUpdateSpec(rate=0.01)).register(optimizer)
    for x_TD in batches:
        states_on_ranks.backward(model, torch.tensor(x_TD))
        optimizer.step()
        optimizer.zero_grad()
    return states_on_ranks.whole(model)


@pytest.mark.parametrize("optimizer", states_on_ranks.OPTIMIZERS)
@pytest.mark.parametrize("name", ["EP 2, the same mesh", "FSDP 2, EP 2, the same mesh", "FSDP 2, EP 2, all ranks"])
def test_an_optimizer_takes_all_parameters_in_one_group(name, optimizer):
    layout, rest = RESTS[name]
    params, batches = params_of(DEEPSEEK), tokens(2, 11, 8)
    wanted = trained_alone(DEEPSEEK, params, batches, optimizer)
    bound = FLOAT32 if optimizer == "SGD" else ADAM
    call = states_on_ranks.optimize_on_rank, DEEPSEEK, params, layout, batches, rest, optimizer
    for found in on_ranks(layout, *call):
        assert_near(found, wanted, bound)


# checkpoints

LAYOUTS = {
    "EP 4": EP4,
    "EP 1": EP1,
    "FSDP 2, EP 2": FSDP2_EP2,
    "FSDP 4": ShardLayout(fsdp=4),
    "FSDP 3": ShardLayout(fsdp=3),
}


@pytest.fixture(scope="module", params=["EP 2", "FSDP 3, EP 2, experts padded"])
def checkpoint(request, tmp_path_factory):
    """Of two steps; what the layer had, and where two steps more lead."""
    layout = EP2 if request.param == "EP 2" else ShardLayout(fsdp=3, expert=2)
    folder, batches = tmp_path_factory.mktemp("checkpoint"), tokens(4, 12, 8)
    call = states_on_ranks.save_on_rank, DEEPSEEK, params_of(DEEPSEEK), layout, batches, folder
    saved, full, trained = zip(*on_ranks(layout, *call), strict=True)
    for own in saved:
        assert_equal(own, saved[0])
    return folder, batches, saved[0], full, trained[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_goes_on_in_every_layout(name, checkpoint):
    folder, batches, saved, _, trained = checkpoint
    assert saved["moe.router.expert_bias"].any()
    layout = LAYOUTS[name]
    call = states_on_ranks.load_on_rank, DEEPSEEK, other_params(DEEPSEEK), layout, batches, folder
    for loaded, goes_on in on_ranks(layout, *call):
        assert_equal(loaded, saved)
        # The optimizer's state as well: without it the steps would be others.
        assert_near(goes_on, trained, ADAM)


def test_a_full_state_dict_has_all_experts(checkpoint):
    _, _, saved, full, _ = checkpoint
    assert full[0]["moe.experts.w1_EFD"].shape == (16, 16, 8)
    for found in full:
        assert_equal(found, saved)


@pytest.mark.parametrize("name", ["EP 2", "EP 2, TP 2", "FSDP 2, EP 2"])
def test_a_whole_state_dict_and_one_over_ranks_are_taken_back(name):
    layout, _ = CLIPPED[name]
    call = states_on_ranks.take_back_on_rank, BIASES, params_of(BIASES), other_params(BIASES), layout
    for found in on_ranks(layout, *call):
        for way in found:
            assert_equal(found[way], found["wanted"])


def test_a_placement_is_in_no_checkpoint_and_takes_whole_tensors():
    layout, params = EP2.replace(placement=PLACED), params_of(BIASES)
    wanted = MoE(BIASES)
    wanted.load_params(params)
    call = states_on_ranks.placed_on_rank, BIASES, params, other_params(BIASES), layout
    for errors, found in on_ranks(layout, *call):
        assert len(errors) == 3
        assert all("in whose order a rank stores its experts" in message for message in errors)
        assert "save `full_tensors(moe)`, or parallelize without a placement" in errors[0]
        assert_equal(found, {name: value.detach().numpy() for name, value in wanted.named_parameters()})


# the meta device


@pytest.mark.parametrize("name", ["EP 2", "EP 2, TP 2", "FSDP 2, EP 2", "FSDP 2"])
def test_a_layer_that_is_built_on_meta_is_filled(name):
    layout, _ = CLIPPED[name]
    params = replace(params_of(BIASES), expert_bias_E=np.arange(8, dtype=np.float32))
    call = states_on_ranks.meta_on_rank, BIASES, params, layout
    for own in on_ranks(layout, *call, "load_state_dict"):
        assert not any(np.isnan(value).any() for value in own.values())
        assert not own["tokens_per_expert"].any()
        np.testing.assert_array_equal(own["router.expert_bias"], np.arange(8))
    found = on_ranks(layout, *call, "reset_parameters")
    for rank, own in enumerate(found):
        assert not any(np.isnan(value).any() for value in own.values())
        assert not own["tokens_per_expert"].any()
        assert not own["router.expert_bias"].any()
        weight = own["experts.w2_EDF"]
        assert np.std(weight) == pytest.approx(16**-0.5, rel=0.3)  # by the fan-in of the whole layer
        for other in range(rank):
            same_fsdp = layout.coordinates(rank)[1] == layout.coordinates(other)[1]
            assert np.array_equal(own["router.gate.weight"], found[other]["router.gate.weight"]) == same_fsdp
            assert not np.array_equal(weight, found[other]["experts.w2_EDF"])
