"""conformance, layer, faults of replicas.

Legend: T tokens, K top_k, E experts, P places.
"""

import numpy as np

from conformance.core.fault import surrounds


@surrounds(breaks="REP-1")
def unused_slots_go_to_the_last_expert(run, memory, expert_ids_TK, replicas):
    """-1 is an index of the table: that of the last expert."""
    return run(np.where(expert_ids_TK < 0, replicas.num_experts - 1, expert_ids_TK), replicas)


@surrounds(breaks="REP-1")
def null_experts_keep_their_ids(run, memory, expert_ids_TK, replicas):
    """The id of a null expert is taken for that of a place."""
    return np.where(expert_ids_TK >= replicas.num_experts, expert_ids_TK, run(expert_ids_TK, replicas))


@surrounds(breaks="REP-1", links=("NVIDIA/TensorRT-LLM#18397",))
def expert_ids_are_taken_for_places(run, memory, expert_ids_TK, replicas):
    """Slots go to the place of the number of their expert."""
    return expert_ids_TK


@surrounds(breaks="REP-2")
def the_first_replica_gets_all(run, memory, expert_ids_TK, replicas):
    """Every slot goes to the first place of its expert."""
    first_E = np.array([replicas.placement.index(expert) for expert in range(replicas.num_experts)])
    is_expert_TK = (expert_ids_TK >= 0) & (expert_ids_TK < replicas.num_experts)
    first_TK = first_E[np.clip(expert_ids_TK, 0, replicas.num_experts - 1)]
    return np.where(is_expert_TK, first_TK, run(expert_ids_TK, replicas))


@surrounds(breaks="REP-2")
def replicas_are_dealt_out_by_token(run, memory, expert_ids_TK, replicas):
    """The number of the token decides, and not that of the slot."""
    columns = [run(column_T[:, None], replicas) for column_T in expert_ids_TK.T]
    return np.concatenate(columns, axis=1)


@surrounds(breaks="REP-3")
def the_busiest_place_counts(run, memory, values_P, replicas):
    """The count of an expert is that of its busiest place."""
    if values_P.ndim > 1:
        return run(values_P, replicas)
    placement_P = np.array(replicas.placement)
    return np.array([values_P[placement_P == expert].max() for expert in range(replicas.num_experts)])


@surrounds(breaks="REP-3")
def counts_are_of_the_first_places(run, memory, values_P, replicas):
    """The counts of the first E places are taken for those of the experts."""
    return run(values_P, replicas) if values_P.ndim > 1 else values_P[: replicas.num_experts]


@surrounds(breaks="REP-4", links=("NVIDIA/Megatron-LM#6274",))
def gradients_are_averaged(run, memory, values_P, replicas):
    """The gradient of an expert is the mean of those of its places."""
    found_E = run(values_P, replicas)
    if values_P.ndim == 1:
        return found_E
    return found_E / np.bincount(replicas.placement)[:, None]


@surrounds(breaks="REP-4", links=("NVIDIA/Megatron-LM#6274",))
def only_the_first_replica_learns(run, memory, values_P, replicas):
    """The gradients of the further places are lost."""
    if values_P.ndim == 1:
        return run(values_P, replicas)
    return values_P[[replicas.placement.index(expert) for expert in range(replicas.num_experts)]]
