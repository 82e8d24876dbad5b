"""moe_torch, tests of redundant experts: a whole layer of places is that of experts, with the gradients of experts."""

import torch

from moe_ref import ExpertSpec, LayerParams, LayerSpec, ReplicaSpec, RouterSpec
from moe_torch import MoE, home, place_slots, replicate
from moe_torch.dispatcher import LocalTokenDispatcher
from moe_torch.experts import _slots

REPLICAS = ReplicaSpec(num_experts=4, placement=(2, 0, 1, 2, 3, 2, 0), choice="in_turn")


def test_experts_at_several_places_return_and_learn_what_one_does():
    spec = LayerSpec(router=RouterSpec(num_experts=4, top_k=2), experts=ExpertSpec(dim=5, hidden_dim=3, bias=True))
    moe = MoE(spec, dtype=torch.float64)
    moe.load_params(LayerParams.init(spec))
    x_TD = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    routing = moe.router.route(x_TD)
    weights = [getattr(moe.experts, name) for name in ("w1_EFD", "w2_EDF", "w3_EFD", "b1_EF", "b2_ED", "b3_EF")]

    def run(ids_TK, num_experts, own):
        permutation = LocalTokenDispatcher(num_experts).permute(ids_TK)
        counts_E, weights_TK = permutation.tokens_per_expert_E, routing.weights_TK.detach()
        act = moe.experts.activation
        output_TD = _slots("loop", x_TD, permutation.order_N, counts_E, weights_TK, 2, own, act)
        return output_TD, counts_E, torch.autograd.grad(output_TD.square().sum(), weights)

    output_TD, counts_E, grads = run(routing.expert_ids_TK, 4, weights)
    of_places = [replicate(weight, REPLICAS) for weight in weights]
    placed_TD, counts_P, placed_grads = run(place_slots(routing.expert_ids_TK, REPLICAS), 7, of_places)
    torch.testing.assert_close(placed_TD, output_TD, rtol=1e-12, atol=1e-13)
    assert home(counts_P, REPLICAS).tolist() == counts_E.tolist()
    assert counts_P[[0, 3, 5]].max() - counts_P[[0, 3, 5]].min() <= 1
    for found, wanted in zip(placed_grads, grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
