"""conformance, balance, faults of capacity: wrong capacities, drops and weights."""

import numpy as np

from conformance.core.fault import replaces, rounded, surrounds
from moe_ref import UNUSED, apply_capacity
from moe_ref.capacity import drop_order


def factor(capacity, times: float):
    """The rule with a larger factor, where it has one."""
    return capacity if capacity.factor is None else capacity.replace(factor=capacity.factor * times)


@surrounds(breaks="CAP-1")
def dropped_slots_go_to_the_next_expert(run, memory, ids_TK, weights_TK, capacity, E, **inputs):
    """A slot that finds no place goes to another expert."""
    found = run(ids_TK, weights_TK, capacity, E, **inputs)
    dropped_TK = (found["expert_ids_TK"] == UNUSED) & (ids_TK != UNUSED)
    return found | {"expert_ids_TK": np.where(dropped_TK, (ids_TK + 1) % E, found["expert_ids_TK"])}


@surrounds(breaks="CAP-2", links=("huggingface/transformers#48421",))
def places_are_counted_along_the_slots(run, memory, ids_TK, weights_TK, capacity, E, **inputs):
    """The running count is over an axis of one entry, and nothing is dropped."""
    return run(ids_TK, weights_TK, capacity.replace(factor=None, slots=10**6, rounding="ceil"), E, **inputs)


@surrounds(breaks="CAP-2", links=("laekov/fastmoe#199",))
def the_capacity_is_not_divided_by_the_experts(run, memory, ids_TK, weights_TK, capacity, E, **inputs):
    """It is factor * T * K."""
    return run(ids_TK, weights_TK, factor(capacity, E), E, **inputs)


@surrounds(breaks="CAP-3", links=("vllm-project/vllm-ascend#16384",))
def the_capacity_is_rounded_down(run, memory, ids_TK, weights_TK, capacity, E, **inputs):
    """It is rounded down, whatever the rounding."""
    down = capacity if capacity.factor is None else capacity.replace(rounding="floor")
    return run(ids_TK, weights_TK, down, E, **inputs)


@surrounds(breaks="CAP-4", links=("deepspeedai/DeepSpeed#8155", "marin-community/marin#8578"))
def more_rows_than_there_are(run, memory, ids_TK, weights_TK, capacity, E, **inputs):
    """The best rows up to the capacity are asked for, and there are not so many."""
    if capacity.factor is not None and capacity.factor * ids_TK.shape[1] > E:
        raise RuntimeError("selected index k out of range")
    return run(ids_TK, weights_TK, capacity, E, **inputs)


@surrounds(breaks="CAP-5")
def the_capacity_is_of_the_batch(run, memory, ids_TK, weights_TK, capacity, E, **inputs):
    """The scope is not read."""
    return run(ids_TK, weights_TK, capacity.replace(scope="global"), E, **inputs)


@surrounds(breaks="CAP-6", links=("lucidrains/st-moe-pytorch#13",))
def tokens_come_before_slots(run, memory, ids_TK, weights_TK, capacity, E, **inputs):
    """The slots of a token are admitted together where all first slots come first."""
    slot_major = capacity.drop_order == "slot_major"
    return run(ids_TK, weights_TK, capacity.replace(drop_order="first_come") if slot_major else capacity, E, **inputs)


@replaces("drop_order", breaks="CAP-7")
def the_smallest_weights_are_kept(weights_TK, spec):
    """The order of the weights is turned."""
    return drop_order(-weights_TK, spec)


@surrounds(breaks="CAP-8")
def dropped_slots_keep_their_weight(run, memory, ids_TK, weights_TK, capacity, E, **inputs):
    """A dropped slot is marked by its id alone."""
    return run(ids_TK, weights_TK, capacity, E, **inputs) | {"weights_TK": weights_TK}


@surrounds(breaks="CAP-9")
def weights_are_not_renormalised(run, memory, ids_TK, weights_TK, capacity, E, **inputs):
    """The weights of kept slots stay as they are."""
    return run(ids_TK, weights_TK, capacity.replace(renormalise="no", weight_sum=1.0), E, **inputs)


@surrounds(breaks="CAP-10")
def dropped_slots_have_a_gradient(run, memory, ids_TK, weights_TK, capacity, E, *, d_weights_TK=None, **inputs):
    """The gradient goes straight through."""
    found = run(ids_TK, weights_TK, capacity, E, **inputs)
    return found if d_weights_TK is None else found | {"d_weights_TK": d_weights_TK}


@surrounds(breaks="CAP-11", links=("vllm-project/vllm-ascend#14926",))
def rows_after_a_hot_expert_are_lost(run, memory, ids_TK, weights_TK, capacity, E, **inputs):
    """Where an expert overflows, the next one gets nothing."""
    found = run(ids_TK, weights_TK, capacity, E, **inputs)
    overflowing = np.unique(ids_TK[(ids_TK != UNUSED) & (found["expert_ids_TK"] == UNUSED)])
    after_TK = np.isin(found["expert_ids_TK"], (overflowing + 1) % E)
    return found | {"expert_ids_TK": np.where(after_TK, UNUSED, found["expert_ids_TK"])}


@surrounds(breaks="CAP-12", links=("microsoft/Tutel#26",))
def places_race(run, memory, ids_TK, weights_TK, capacity, E, **inputs):
    """Every second call loses the last slot that it keeps."""
    memory["calls"] = memory.get("calls", 0) + 1
    found = run(ids_TK, weights_TK, capacity, E, **inputs)
    kept_TK = found["expert_ids_TK"].copy()
    if memory["calls"] % 2 == 0:
        kept_TK.flat[np.flatnonzero(kept_TK != UNUSED)[-1:]] = UNUSED
    return found | {"expert_ids_TK": kept_TK}


@surrounds(breaks="CAP-13", links=("lucidrains/st-moe-pytorch#13", "microsoft/Tutel#26"))
def two_slots_have_one_place(run, memory, ids_TK, weights_TK, capacity, E, **inputs):
    """The second slot of an expert takes the place of the first one, too."""
    found = run(ids_TK, weights_TK, capacity, E, **inputs)
    if "slot_table_UEC" not in found or found["slot_table_UEC"].shape[-1] < 2:
        return found
    table_UEC = found["slot_table_UEC"].copy()
    table_UEC[..., 0] = np.where(table_UEC[..., 1] >= 0, table_UEC[..., 1], table_UEC[..., 0])
    return found | {"slot_table_UEC": table_UEC}


@surrounds(breaks="CAP-14")
def one_limit_is_enough(run, memory, ids_TK, weights_TK, capacity, E, **inputs):
    """The second limit is not read."""
    return run(ids_TK, weights_TK, capacity.replace(then=None), E, **inputs)


@surrounds(breaks="CAP-15")
def unused_slots_take_places(run, memory, ids_TK, weights_TK, capacity, E, **inputs):
    """An unused slot takes a place of every expert."""
    left = capacity.capacity(len(ids_TK), ids_TK.shape[1], E) - int((ids_TK == UNUSED).sum())
    fewer = capacity.replace(factor=None, slots=max(0, left), rounding="ceil", min_slots=0)
    return run(ids_TK, weights_TK, fewer if (ids_TK == UNUSED).any() else capacity, E, **inputs)


@replaces("drop_order", breaks="CAP-16")
def the_later_of_equal_weights(weights_TK, spec):
    """Equal weights are admitted from the last to the first."""
    if spec.drop_order != "by_weight":
        return drop_order(weights_TK, spec)
    return np.argsort(weights_TK.reshape(-1), kind="stable")[::-1]


@surrounds(breaks="CAP-2")
def places_are_bytes(run, memory, ids_TK, weights_TK, capacity, E, **inputs):
    """The place of a slot is kept in 8 bits, so that the one after 255 is the first again."""
    found = run(ids_TK, weights_TK, capacity, E, **inputs)
    if capacity.then is not None or len(ids_TK) <= 256:
        return found
    whole = run(ids_TK, weights_TK, capacity.replace(factor=None, slots=len(ids_TK), rounding="ceil"), E, **inputs)
    trace = apply_capacity(ids_TK, weights_TK, capacity.replace(factor=None, slots=len(ids_TK), rounding="ceil"), E)
    again_TK = trace.place_TK >= 256
    return found | {"expert_ids_TK": np.where(again_TK, whole["expert_ids_TK"], found["expert_ids_TK"])}


@surrounds(breaks="CAP-3")
def the_slots_are_counted_in_bfloat16(run, memory, ids_TK, weights_TK, capacity, E, **inputs):
    """T * K is rounded to 8 bits before it is divided."""
    N = ids_TK.size
    share = float(rounded(np.array(float(N)), 8)) / max(N, 1)
    return run(ids_TK, weights_TK, capacity if share == 1 else factor(capacity, share), E, **inputs)


@surrounds(breaks="CAP-13")
def the_table_ends_at_the_fullest_expert(run, memory, ids_TK, weights_TK, capacity, E, **inputs):
    """Where nothing is dropped the table has no empty places."""
    found = run(ids_TK, weights_TK, capacity, E, **inputs)
    if "slot_table_UEC" not in found or (found["expert_ids_TK"] != ids_TK).any():
        return found
    fullest = (found["slot_table_UEC"] >= 0).sum(axis=-1).max(initial=0)
    return found | {"slot_table_UEC": found["slot_table_UEC"][..., :fullest]}


@surrounds(breaks="CAP-17")
def weights_of_dropped_slots_are_cleared_in_place(run, memory, ids_TK, weights_TK, capacity, E, **inputs):
    """The array of weights that was given gets the zeros."""
    found = run(ids_TK, weights_TK, capacity, E, **inputs)
    weights_TK[found["expert_ids_TK"] == UNUSED] = 0
    return found


@surrounds(breaks="CAP-18")
def tokens_are_not_sorted(run, memory, ids_TK, weights_TK, capacity, E, **inputs):
    """First slots come first, and tokens stay in their order."""
    best = capacity.drop_order == "by_best_weight"
    return run(ids_TK, weights_TK, capacity.replace(drop_order="slot_major") if best else capacity, E, **inputs)


@replaces("drop_order", breaks="CAP-18")
def slots_are_sorted_by_their_own_weight(weights_TK, spec):
    """All first slots by their own weight, then all second ones by theirs."""
    if spec.drop_order != "by_best_weight":
        return drop_order(weights_TK, spec)
    by_own_TK, K = np.argsort(-weights_TK, axis=0, kind="stable"), weights_TK.shape[1]
    return (by_own_TK * K + np.arange(K)).T.reshape(-1)
