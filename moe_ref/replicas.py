"""moe_ref, redundant experts: a choice of experts becomes one of places, and what places have comes home to experts.

    expert ids -> place_slots -> place ids -> the layer, with parameters of `replicate` -> counts, gradients -> `home`

The router never knows: ids, counts and records stay those of experts.

Legend: T tokens, K top_k, E experts, P places.
"""

from dataclasses import replace

import numpy as np

from moe_ref.specs.checks import array
from moe_ref.specs.params import LayerParams
from moe_ref.specs.replicas import ReplicaSpec

ROUTED = ("w_up_EDF", "w_down_EFD", "w_gate_EDF", "b_up_EF", "b_down_ED", "b_gate_EF")
"""What is copied: the parameters of the routed experts."""


def place_slots(expert_ids_TK: np.ndarray, spec: ReplicaSpec) -> np.ndarray:
    """A slot goes to one place of its expert; one without an expert to none. [REP-1, REP-2]

    Returns:
        place_ids_TK: places; -1 in unused slots, and null experts are numbered on past the places, as past the experts.
    """
    ids_TK = array("expert_ids_TK", expert_ids_TK, (None, None), kind="int").astype(np.int64)
    places = [np.flatnonzero(np.array(spec.placement) == expert) for expert in range(spec.num_experts)]
    turn_E = np.zeros(spec.num_experts, np.int64)
    found_TK = np.where(ids_TK >= spec.num_experts, ids_TK - spec.num_experts + spec.num_places, ids_TK)
    for slot, expert in enumerate(ids_TK.reshape(-1)):
        if 0 <= expert < spec.num_experts:
            number = slot if spec.choice == "by_slot" else turn_E[expert]
            found_TK.reshape(-1)[slot] = places[expert][number % len(places[expert])]
            turn_E[expert] += 1
    return found_TK


def home(values_P: np.ndarray, spec: ReplicaSpec) -> np.ndarray:
    """What an expert has is the sum over its places: of counts, or of gradients. [REP-3, REP-4]

    Args:
        values_P: (P, ...) numbers.

    Returns:
        (E, ...) in the dtype of the values.
    """
    values_P = np.asarray(values_P)
    total_E = np.zeros((spec.num_experts, *values_P.shape[1:]), values_P.dtype)
    for place, expert in enumerate(spec.placement):
        total_E[expert] += values_P[place]
    return total_E


def replicate(params: LayerParams, spec: ReplicaSpec) -> LayerParams:
    """The routed experts at their places: a copy at each; the router and all else as they are."""
    order_P = np.array(spec.placement)
    return _of_routed(params, lambda value: np.asarray(value)[order_P])


def home_gradients(grads: LayerParams, spec: ReplicaSpec) -> LayerParams:
    """Gradients of places as those of experts. [REP-4]"""
    return _of_routed(grads, lambda value: home(value, spec))


def _of_routed(params: LayerParams, change) -> LayerParams:
    return replace(params, **{name: change(value) for name, value in params.by_name().items() if name in ROUTED})
