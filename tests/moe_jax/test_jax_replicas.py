"""moe_jax, tests of redundant experts: a whole layer of places is that of experts, with the gradients of experts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import home, place_slots, replicate, sparse_matmul
from moe_ref import ExpertSpec, LayerParams, LayerSpec, ReplicaSpec, RouterInputs, RouterSpec

REPLICAS = ReplicaSpec(num_experts=4, placement=(2, 0, 1, 2, 3, 2, 0), choice="in_turn")
SPEC = LayerSpec(router=RouterSpec(num_experts=4, top_k=2), experts=ExpertSpec(dim=8, hidden_dim=4, bias=True))
PLACED = SPEC.replace(router=RouterSpec(num_experts=7, top_k=2, selector="given"))


def test_experts_at_several_places_return_and_learn_what_one_does():
    params = jax.tree.map(jnp.asarray, replace(LayerParams.init(SPEC), expert_bias_E=None))
    x_TD = jnp.asarray(np.random.default_rng(0).normal(size=(9, 8)))
    _, decided = sparse_matmul(x_TD, params, SPEC)
    place_ids_TK = place_slots(decided.expert_ids_TK, REPLICAS)

    @jax.jit
    def of_experts(w):
        return jnp.sum(sparse_matmul(x_TD, replace(params, **w), SPEC)[0] ** 2)

    @jax.jit
    def of_places(w):
        placed = replace(replicate(replace(params, **w), REPLICAS), gate_ED=jnp.zeros((7, 8), x_TD.dtype))
        inputs = RouterInputs(given_ids_TK=place_ids_TK, given_weights_TK=decided.weights_TK)
        return jnp.sum(sparse_matmul(x_TD, placed, PLACED, inputs=inputs)[0] ** 2)

    own = {name: getattr(params, name) for name in ("w_up_EDF", "w_gate_EDF", "w_down_EFD", "b_down_ED")}
    wanted, found = jax.value_and_grad(of_experts)(own), jax.value_and_grad(of_places)(own)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)
    counts_P = jnp.bincount(place_ids_TK.reshape(-1), length=7)
    assert home(counts_P, REPLICAS).tolist() == jnp.bincount(decided.expert_ids_TK.reshape(-1), length=4).tolist()
    assert np.ptp(np.asarray(counts_P)[[0, 3, 5]]) <= 1
