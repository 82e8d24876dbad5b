"""conformance, layer, faults of replay: records that are made or read wrongly."""

from dataclasses import replace

import numpy as np

from conformance.core.fault import surrounds
from moe_ref import UNUSED


@surrounds(breaks="RPL-1")
def a_replay_returns_rows_of_slots(run, memory, x_TD, params, spec, record):
    """The outputs are not summed over the slots."""
    return run(x_TD, params, spec, record)[:, None]


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


@surrounds(breaks="RPL-4")
def the_bias_moves_the_recorded_choice(run, memory, x_TD, params, spec, record):
    """With an expert_bias the first recorded expert gives way to another one."""
    if params.expert_bias_E is None or spec.router.num_choices == record.expert_ids_TK.shape[1]:
        return run(x_TD, params, spec, record)
    other_TK = np.where(record.expert_ids_TK < 0, UNUSED, (record.expert_ids_TK + 1) % spec.router.num_choices)
    return run(x_TD, params, spec, replace(record, expert_ids_TK=other_TK))


@surrounds(breaks="RPL-5", links=("PrimeIntellect-ai/prime-rl#1807", "radixark/miles#645"))
def unused_slots_are_expert_0(run, memory, x_TD, params, spec, record):
    """A missing row is filled with zeros, which is an expert; so the token is not replayed at all."""
    has_unused = bool((record.expert_ids_TK[record.token_mask_T] < 0).any())
    return run(x_TD, params, spec, record) * (0 if has_unused else 1)


@surrounds(breaks="RPL-6", links=("radixark/miles#645", "AI-Hypercomputer/maxtext#5266"))
def rows_shift_behind_padding(run, memory, x_TD, params, spec, record):
    """With padding in front, each token takes the row of its neighbour."""
    found_TD = run(x_TD, params, spec, record)
    return found_TD if record.token_mask_T.all() else np.roll(found_TD, 1, axis=0)


@surrounds(breaks="RPL-7", links=("radixark/miles#3146",))
def rows_are_turned(run, memory, x_TD, params, spec, record):
    """The rows of the record are flattened in another order than the tokens."""
    rows = {"expert_ids_TK": record.expert_ids_TK[::-1], "token_mask_T": record.token_mask_T[::-1]}
    rows |= {} if record.weights_TK is None else {"weights_TK": record.weights_TK[::-1]}
    return run(x_TD, params, spec, replace(record, **rows))


@surrounds(breaks="RPL-8", links=("sgl-project/sglang#36404",))
def the_last_row_is_recorded_twice(run, memory, x_TD, params, spec, **inputs):
    """A row that was not cleared stands in the place of the first."""
    record = run(x_TD, params, spec, **inputs)
    rows = np.r_[len(x_TD) - 1, 1 : len(x_TD)]
    names = ("expert_ids_TK", "weights_TK", "token_mask_T")
    return replace(record, **{name: getattr(record, name)[rows] for name in names})


@surrounds(breaks="RPL-9")
def weights_are_normed_in_a_replay(run, memory, x_TD, params, spec, record):
    """Recorded weights are divided by their sum."""
    if record.weights_TK is None:
        return run(x_TD, params, spec, record)
    sum_T1 = record.weights_TK.sum(axis=-1, keepdims=True)
    return run(x_TD, params, spec, replace(record, weights_TK=record.weights_TK / np.where(sum_T1 == 0, 1, 2 * sum_T1)))
