"""The whole house: a choice recorded in PyTorch is saved, loaded, and replayed in JAX, with the same outputs."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import torch

import moe_jax.replay
import moe_jax.routing
import moe_ref
import moe_torch.replay
import moe_torch.routing
from moe_jax.dense_matmul import dense_matmul
from moe_jax.sparse_matmul import sparse_matmul
from moe_ref import (
    CapacitySpec,
    ExpertSpec,
    LayerParams,
    LayerSpec,
    RouterInputs,
    RouterSpec,
    SharedSpec,
    load_records,
    save_records,
)
from moe_torch.moe import MoE

T, D = 14, 6
LENGTHS = (5, 0, 9)
MASK = np.arange(T) % 5 != 3
LAYERS = {
    "deepseek_v3": LayerSpec(
        router=RouterSpec(
            num_experts=8, top_k=3, score_func="sigmoid", num_expert_groups=4, num_limited_groups=2, route_norm=True,
            route_scale=2.5,
        ),
        experts=ExpertSpec(dim=D, hidden_dim=4),
        shared=SharedSpec(hidden_dim=3),
    ),
    "gpt_oss, with null experts": LayerSpec(
        router=RouterSpec(num_experts=5, top_k=2, score_over="selected", select_by="logit", num_null_experts=2),
        experts=ExpertSpec(dim=D, hidden_dim=4, bias=True),
    ),
}  # fmt: skip
CAPACITY = CapacitySpec(factor=0.8, drop_order="by_weight", renormalise="after", weight_sum=2.5)
# Two frameworks that sum some tens of float32 products in orders of their own, each within 2e-6 of the reference.
CLOSE = {"rtol": 1e-4, "atol": 5e-6}


def case(spec: LayerSpec, seed: int = 0):
    """Tokens, and the parameters of a sampler and of a trainer that has moved on: they choose differently."""
    rng = np.random.default_rng(seed)
    x_TD = rng.standard_normal((T, D)).astype(np.float32)
    sampler, trainer = LayerParams.init(spec, seed), LayerParams.init(spec, seed + 1)
    x_TD[~MASK] = np.nan
    return x_TD, sampler, trainer


def record_in_torch(x_TD, params: LayerParams, spec: LayerSpec):
    moe = MoE(spec, capacity=CAPACITY)
    moe.load_params(params)
    with torch.no_grad():
        output, routing = moe.forward_and_routing(torch.tensor(x_TD), torch.tensor(MASK))
    record = moe_torch.replay.capture(routing, spec.router, token_mask=torch.tensor(MASK), sequence_lengths=LENGTHS)
    return output.numpy(), record


def narrow(params: LayerParams) -> LayerParams:
    return jax.tree.map(lambda values: np.asarray(values, np.float32), params)


@pytest.mark.parametrize("name", LAYERS)
def test_recorded_in_torch_and_replayed_in_jax_the_outputs_are_the_same(name, tmp_path):
    spec = LAYERS[name]
    x_TD, sampler, trainer = case(spec)
    output_TD, record = record_in_torch(x_TD, sampler, spec)
    save_records(tmp_path / "step_1.safetensors", {"layers.3": record})
    loaded = load_records(tmp_path / "step_1.safetensors")["layers.3"]
    assert loaded.spec == spec.router
    assert loaded.sequence_lengths == LENGTHS
    assert (loaded.expert_ids_TK[MASK] < 0).any()  # the capacity dropped some

    again_TD, decided = jax.jit(partial(moe_jax.replay.replay_layer, spec=spec, record=loaded, with_weights=True))(
        x_TD, narrow(sampler)
    )
    np.testing.assert_array_equal(decided.expert_ids_TK, record.expert_ids_TK)
    np.testing.assert_array_equal(decided.weights_TK, record.weights_TK)
    np.testing.assert_allclose(again_TD, output_TD, **CLOSE)

    # Ids alone, on the trainer's own parameters: its router would have chosen other experts.
    own = moe_ref.moe_layer(x_TD, trainer, spec, token_mask_T=MASK).expert_ids_TK
    assert (own != record.expert_ids_TK).any(axis=1).mean() > 0.5
    expected = moe_ref.replay_layer(loaded, x_TD, trainer, spec)
    for layer in (sparse_matmul, dense_matmul):
        run = partial(moe_jax.replay.replay_layer, spec=spec, record=loaded.ids_alone(), layer=layer)
        forced_TD, forced = jax.jit(run)(x_TD, narrow(trainer))
        np.testing.assert_array_equal(forced.expert_ids_TK, record.expert_ids_TK)
        np.testing.assert_allclose(forced_TD, expected.output_TD, **CLOSE)
    in_torch = MoE(spec, capacity=CAPACITY)  # which does not drop again
    in_torch.load_params(trainer)
    forced = moe_torch.replay.replay_layer(in_torch, torch.tensor(x_TD), loaded).detach()
    np.testing.assert_allclose(forced, expected.output_TD, **CLOSE)


@pytest.mark.parametrize("with_weights", [False, True])
def test_gradients_of_a_replay_are_the_reference_s(with_weights):
    spec = LAYERS["deepseek_v3"]
    x_TD, sampler, trainer = case(spec)
    _, record = record_in_torch(x_TD, sampler, spec)
    d_output_TD = np.random.default_rng(1).standard_normal((T, D))
    trace = moe_ref.replay_layer(record, x_TD, trainer, spec, with_weights=with_weights)
    forced_spec = spec.replace(router=spec.router.given(with_weights=with_weights))
    expected = moe_ref.layer_backward(trace, replace(trainer, expert_bias_E=None), forced_spec, d_output_TD)
    # Recorded weights are constants.
    assert (np.abs(expected.params.gate_ED).max() == 0) == with_weights

    moe = MoE(spec, dtype=torch.float64)
    moe.load_params(trainer)
    x = torch.tensor(x_TD, dtype=torch.float64, requires_grad=True)
    moe_torch.replay.replay_layer(moe, x, record, with_weights=with_weights).backward(torch.tensor(d_output_TD))
    with jax.enable_x64(True):
        run = partial(moe_jax.replay.replay_layer, spec=spec, record=record, with_weights=with_weights)
        _, pull, _ = jax.vjp(jax.jit(run), x_TD.astype(np.float64), trainer, has_aux=True)
        d_x_TD, d_params = pull(d_output_TD)
    for found in (x.grad, d_x_TD):
        np.testing.assert_allclose(found, expected.x_TD, rtol=1e-9, atol=1e-11)
    d_gate = moe.router.gate.weight.grad
    for found in (np.zeros_like(d_params.gate_ED) if d_gate is None else d_gate, d_params.gate_ED):
        np.testing.assert_allclose(found, expected.params.gate_ED, rtol=1e-9, atol=1e-11)


def test_a_record_of_jax_replays_in_torch():
    spec = LAYERS["gpt_oss, with null experts"]
    x_TD, sampler, _ = case(spec)
    output_TD, decided = jax.jit(partial(sparse_matmul, spec=spec, token_mask_T=MASK))(x_TD, narrow(sampler))
    record = moe_jax.replay.capture(decided, spec.router, token_mask_T=MASK, sequence_lengths=LENGTHS)
    moe = MoE(spec)
    moe.load_params(sampler)
    again = moe_torch.replay.replay_layer(moe, torch.tensor(x_TD), record, with_weights=True)
    np.testing.assert_allclose(again.detach(), output_TD, **CLOSE)


def in_jax(record, spec: LayerSpec, **options):
    moe_jax.replay.replay_layer(np.zeros((T, D), np.float32), narrow(LayerParams.init(spec)), spec, record, **options)


def in_torch(record, spec: LayerSpec, **options):
    moe_torch.replay.replay_layer(MoE(spec), torch.zeros(T, D), record, **options)


@pytest.mark.parametrize("replay", [in_jax, in_torch])
def test_what_cannot_be_replayed_is_refused(replay):
    spec = LAYERS["deepseek_v3"]
    x_TD, sampler, _ = case(spec)
    _, record = record_in_torch(x_TD, sampler, spec)
    with pytest.raises(ValueError, match="top_k is 2; the record has 3"):
        replay(record, spec.replace(router=spec.router.replace(top_k=2)))
    with pytest.raises(ValueError, match="weights_TK of the record is None"):
        replay(record.ids_alone(), spec, with_weights=True)
    mixer = RouterSpec(num_experts=8, top_k=3, selector="sparsemixer", select_by="logit")
    with pytest.raises(ValueError, match="selector is 'sparsemixer'"):
        replay(record, spec.replace(router=mixer))
    replay(record, spec.replace(router=mixer), with_weights=True)


def test_sequence_lengths_of_a_record_sum_to_its_tokens():
    spec = LAYERS["deepseek_v3"]
    x_TD, sampler, _ = case(spec)
    moe = MoE(spec)
    moe.load_params(sampler)
    with torch.no_grad():
        _, routing = moe.forward_and_routing(torch.tensor(x_TD), torch.tensor(MASK))
    with pytest.raises(ValueError, match="sequence_lengths sums to 5; there are 14 tokens"):
        moe_torch.replay.capture(routing, spec.router, sequence_lengths=(5,))
    with pytest.raises(ValueError, match="sequence_lengths sums to 5; there are 14 tokens"):
        moe_jax.replay.capture(routing, spec.router, sequence_lengths=(5,))


@pytest.mark.parametrize("route", [moe_jax.routing.route, moe_torch.routing.route])
def test_shards_of_round_robin_choose_what_the_whole_batch_would(route):
    spec = RouterSpec(num_experts=5, top_k=2, selector="round_robin")
    array = torch.tensor if route is moe_torch.routing.route else np.asarray
    logits_TE = np.random.default_rng(0).standard_normal((9, 5))
    parts = [route(array(logits_TE[own]), spec, inputs=RouterInputs(first_token=first)).expert_ids_TK
             for own, first in ((slice(4), 0), (slice(4, None), 4))]  # fmt: skip
    np.testing.assert_array_equal(np.concatenate(parts), moe_ref.route(logits_TE, spec).expert_ids_TK)


@pytest.mark.parametrize("route", [moe_jax.routing.route, moe_torch.routing.route])
def test_given_weights_are_final_and_belong_to_given_ids(route):
    spec = RouterSpec(num_experts=5, top_k=2, selector="given", route_norm=True, route_scale=3.0)
    array = torch.tensor if route is moe_torch.routing.route else np.asarray
    logits_TE, ids_TK = np.zeros((3, 5)), np.array([[0, 4], [2, -1], [1, 3]])
    weights_TK = np.array([[0.25, 0.5], [2.0, np.nan], [0.0, 1.0]])
    given = RouterInputs(given_ids_TK=ids_TK, given_weights_TK=weights_TK).map(array)
    found = route(array(logits_TE), spec, inputs=given)
    np.testing.assert_array_equal(found.weights_TK, [[0.25, 0.5], [2.0, 0.0], [0.0, 1.0]])
    plain = RouterSpec(num_experts=5, top_k=2)
    with pytest.raises(ValueError, match="given_weights_TK is given, but selector 'top_k' takes none"):
        route(array(logits_TE), plain, inputs=RouterInputs(given_weights_TK=array(weights_TK)))
    with pytest.raises(ValueError, match="given_weights_TK has shape"):
        route(array(logits_TE), spec, inputs=replace(given, given_weights_TK=array(weights_TK[:2])))
