"""moe_torch, replay: the choice of one run is recorded, and forced on another, here or in another framework.

    output, routing = layer.forward_and_routing(x)
    record = capture(routing, layer.spec.router)                 # save_records, load_records: moe_ref
    again = replay_layer(other_layer, x, record)                 # ids alone: the weights are the other router's
    again = replay_layer(other_layer, x, record, with_weights=True)

Legend: T tokens, K top_k, B sequences.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_ref.specs.record import RoutingRecord
from moe_ref.specs.router import RouterSpec
from moe_torch.moe import MoE
from moe_torch.routing import Routing


def capture(
    routing: Routing,
    spec: RouterSpec,
    *,
    token_mask: Tensor | None = None,
    sequence_lengths: Sequence[int] | None = None,
) -> RoutingRecord:
    """A record holds what the experts worked on, in slot order, with float32 weights; it is on the host. [RPL-8]

    Args:
        routing: of `MoE.forward_and_routing` or `route`; slots that a capacity dropped are unused.
        spec: the router that chose.
        token_mask: bools, False where a token is padding.
        sequence_lengths: of consecutive sequences; None: one.
    """
    return RoutingRecord.of_choice(
        routing.expert_ids_TK.int().cpu().numpy(),
        routing.weights_TK.detach().float().cpu().numpy(),
        spec,
        token_mask_T=None if token_mask is None else token_mask.flatten().cpu().numpy(),
        sequence_lengths=sequence_lengths,
    )


def replay_layer(layer: MoE, x: Tensor, record: RoutingRecord, *, with_weights: bool = False) -> Tensor:
    """The layer's output with the recorded choice; its own router gives the weights, or the record does. [RPL-2, RPL-3]

    The layer is called as a module, so that hooks and sharding see a forward pass like any other. Its capacity is not
    asked: what was dropped is unused in the record. Recorded weights are constants.
    """
    num_tokens = x.shape[:-1].numel()
    inputs, mask_T = record.inputs(layer.spec.router, with_weights=with_weights, num_tokens=num_tokens)
    own_inputs = inputs.map(lambda array: torch.tensor(array, device=x.device))
    mask = torch.tensor(mask_T, device=x.device).reshape(x.shape[:-1])
    return layer(x, mask, inputs=own_inputs, router_spec=layer.spec.router.given(with_weights=with_weights))
