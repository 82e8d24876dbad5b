"""conformance, layer, faults of replay: records and replays of a right layer that go wrong.

Legend: T tokens, K top_k.
"""

from dataclasses import replace

import numpy as np

from conformance.core.fault import surrounds
from moe_ref import UNUSED, RoutingRecord


def with_rows(record: RoutingRecord, rows: np.ndarray) -> RoutingRecord:
    """The record whose token t has the row rows[t]."""
    names = ("expert_ids_TK", "weights_TK", "token_mask_T")
    return replace(record, **{n: getattr(record, n)[rows] for n in names if getattr(record, n) is not None})


@surrounds(breaks="RPL-1")
def a_replay_returns_rows_of_slots(run, memory, x_TD, params, spec, record):
    """The outputs are not summed over the slots."""
    return np.repeat(run(x_TD, params, spec, record)[:, None], record.expert_ids_TK.shape[1], axis=1)


@surrounds(breaks="RPL-2", links=("radixark/miles#2722",))
def ids_alone_weigh_alike(run, memory, x_TD, params, spec, record):
    """Without weights every slot weighs 1 / K."""
    if record.weights_TK is not None:
        return run(x_TD, params, spec, record)
    K = record.expert_ids_TK.shape[1]
    return run(x_TD, params, spec, replace(record, weights_TK=np.where(record.expert_ids_TK < 0, 0, 1 / K)))


@surrounds(breaks="RPL-3", links=("radixark/miles#2722",))
def recorded_weights_are_dropped(run, memory, x_TD, params, spec, record):
    """The ids alone are replayed."""
    return run(x_TD, params, spec, replace(record, weights_TK=None))


@surrounds(breaks="RPL-3")
def weights_are_normed_in_a_replay(run, memory, x_TD, params, spec, record):
    """Recorded weights are divided by their sum."""
    if record.weights_TK is None:
        return run(x_TD, params, spec, record)
    sum_T1 = record.weights_TK.sum(axis=-1, keepdims=True)
    return run(x_TD, params, spec, replace(record, weights_TK=record.weights_TK / np.where(sum_T1 == 0, 1, sum_T1)))


@surrounds(breaks="RPL-4")
def the_bias_moves_the_recorded_choice(run, memory, x_TD, params, spec, record):
    """With an expert_bias each recorded expert gives way to the next one."""
    if params.expert_bias_E is None:
        return run(x_TD, params, spec, record)
    next_TK = np.where(record.expert_ids_TK < 0, UNUSED, (record.expert_ids_TK + 1) % spec.router.num_choices)
    return run(x_TD, params, spec, replace(record, expert_ids_TK=next_TK))


@surrounds(breaks="RPL-5", links=("PrimeIntellect-ai/prime-rl#1807", "radixark/miles#645"))
def unused_slots_end_the_replay(run, memory, x_TD, params, spec, record):
    """A token with an unused slot counts as one without a record: it has the output 0."""
    whole_T = (record.expert_ids_TK >= 0).all(axis=-1) | ~record.token_mask_T
    return np.where(whole_T[:, None], run(x_TD, params, spec, record), 0)


@surrounds(breaks="RPL-5", links=("PrimeIntellect-ai/prime-rl#1807", "radixark/miles#645"))
def unused_slots_are_expert_0(run, memory, x_TD, params, spec, record):
    """An unused slot is filled with zeros, which is an expert, of weight 1."""
    unused_TK = (
        (record.expert_ids_TK < 0) & record.token_mask_T[:, None] & ~(record.expert_ids_TK == 0).any(-1)[:, None]
    )
    first_TK = unused_TK & (np.cumsum(unused_TK, axis=-1) == 1)
    ids_TK = np.where(first_TK, 0, record.expert_ids_TK)
    weights_TK = None if record.weights_TK is None else np.where(first_TK, 1, record.weights_TK)
    return run(x_TD, params, spec, replace(record, expert_ids_TK=ids_TK, weights_TK=weights_TK))


@surrounds(breaks="RPL-6", links=("radixark/miles#645", "AI-Hypercomputer/maxtext#5266"))
def rows_shift_behind_padding(run, memory, x_TD, params, spec, record):
    """With padding in the record, each token takes the row of its neighbour."""
    rows_T = np.arange(len(x_TD)) - (0 if record.token_mask_T.all() else 1)
    return run(x_TD, params, spec, with_rows(record, rows_T))


@surrounds(breaks="RPL-7", links=("radixark/miles#3146",))
def rows_are_turned(run, memory, x_TD, params, spec, record):
    """The rows of the record are flattened in another order than the tokens."""
    return run(x_TD, params, spec, with_rows(record, np.arange(len(x_TD))[::-1]))


@surrounds(breaks="RPL-8", links=("sgl-project/sglang#36404",))
def the_last_row_is_recorded_twice(run, memory, x_TD, params, spec, **inputs):
    """A row that was not cleared stands in the place of the first."""
    T = len(x_TD)
    return with_rows(run(x_TD, params, spec, **inputs), np.r_[T - 1, 1:T] if T else np.arange(0))


@surrounds(breaks="RPL-9")
def a_record_counts_redundant_experts(run, memory, x_TD, params, spec, **inputs):
    """A record names a router with twice the experts, as if each had a redundant copy."""
    record = run(x_TD, params, spec, **inputs)
    return replace(record, spec=record.spec.replace(num_experts=2 * record.spec.num_experts))


@surrounds(breaks="RPL-4")
def a_record_holds_ids_in_a_byte(run, memory, x_TD, params, spec, record):
    """Recorded ids are carried in 8 bits."""
    ids_TK = record.expert_ids_TK
    return run(x_TD, params, spec, replace(record, expert_ids_TK=np.where(ids_TK < 0, ids_TK, ids_TK % 256)))


@surrounds(breaks="RPL-8", links=("PrimeIntellect-ai/prime-rl#1807",))
def unused_slots_are_recorded_as_expert_0(run, memory, x_TD, params, spec, **inputs):
    """A slot that a token leaves unused is recorded as expert 0 with weight 0."""
    record = run(x_TD, params, spec, **inputs)
    unused_TK = (record.expert_ids_TK == UNUSED) & record.token_mask_T[:, None]
    return replace(record, expert_ids_TK=np.where(unused_TK, 0, record.expert_ids_TK))
