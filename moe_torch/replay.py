"""moe_torch, replay: the choice of one run is recorded, and forced on another, here or in another framework.

    output, routing = layer.forward_and_routing(x)
    record = capture(routing, layer.spec.router)                 # save_records, load_records: moe_ref.record
    again = replay_layer(other_layer, x, record)                 # ids alone: the weights are the other router's
    again = replay_layer(other_layer, x, record, with_weights=True)

Legend: T tokens, K top_k, B sequences.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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
    T = len(routing.expert_ids_TK)
    lengths = [T] if sequence_lengths is None else list(sequence_lengths)
    if sum(lengths) != T:
        raise ValueError(f"sequence_lengths sums to {sum(lengths)}; there are {T} tokens")
    ends_B = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    mask_T = torch.ones(T, dtype=torch.bool) if token_mask is None else token_mask.flatten()
    return RoutingRecord(
        expert_ids_TK=routing.expert_ids_TK.int().cpu().numpy(),
        weights_TK=routing.weights_TK.detach().float().cpu().numpy(),
        token_mask_T=mask_T.cpu().numpy(),
        sequence_starts_B=(ends_B - torch.tensor(lengths, dtype=torch.int64)).numpy(),
        spec=spec,
    )


def replay_layer(layer: MoE, x: Tensor, record: RoutingRecord, *, with_weights: bool = False) -> Tensor:
    """The layer's output with the recorded choice; its own router gives the weights, or the record does. [RPL-2, RPL-3]

    The layer is called as a module, so that hooks and sharding see a forward pass like any other. Its capacity is not
    asked: what was dropped is unused in the record. Recorded weights are constants.
    """
    inputs = replay_inputs(record, layer.spec.router, x.device, with_weights=with_weights)
    mask = inputs.pop("token_mask_T").reshape(x.shape[:-1])
    return layer(x, mask, router_spec=replay_spec(layer.spec.router, with_weights=with_weights), **inputs)


def replay_spec(spec: RouterSpec, *, with_weights: bool = False) -> RouterSpec:
    """The same router with its choice replaced by a given one. [RPL-4]

    Raises:
        ValueError: its weights are not a function of the chosen ids alone (sparsemixer).
    """
    if spec.selector == "sparsemixer" and not with_weights:
        raise ValueError("selector is 'sparsemixer', whose weights depend on how it chose; replay it with_weights")
    identity = RouterSpec(num_experts=1, top_k=1)
    groups = ("num_expert_groups", "num_limited_groups", "group_score_k", "mask_fill", "weights_from")
    return replace(spec, selector="given", **{name: getattr(identity, name) for name in groups})


def replay_inputs(
    record: RoutingRecord, spec: RouterSpec, device=None, *, with_weights: bool = False
) -> dict[str, Any]:
    """What `route` takes to replay a record on a router with as many choices."""
    for field in ("top_k", "num_choices"):
        recorded, wanted = getattr(record.spec, field), getattr(spec, field)
        if recorded != wanted:
            raise ValueError(f"{field} is {wanted}; the record has {recorded}")
    inputs = {
        "given_ids_TK": torch.tensor(record.expert_ids_TK, device=device),
        "token_mask_T": torch.tensor(record.token_mask_T, device=device),
    }
    if not with_weights:
        return inputs
    if record.weights_TK is None:
        raise ValueError("with_weights is True, but weights_TK of the record is None")
    return inputs | {"given_weights_TK": torch.tensor(record.weights_TK, device=device)}
