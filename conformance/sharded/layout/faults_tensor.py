"""conformance, sharded, faults of tensor ranks: partial sums that are not added or added wrongly, biases added twice.

Legend: R rows on this rank, E experts, D model dim.
"""

from dataclasses import replace

import numpy as np

from conformance.core.fault import replaces, surrounds
from moe_ref import LayerParams
from moe_ref.sharded import sum_over_tensor_ranks


@replaces("sum_over_tensor_ranks", breaks="LYT-3", links=("vllm-project/vllm-ascend#971",))
def tensor_ranks_keep_their_partial_sums(worked, layout):
    """Partial sums are not added."""
    return tuple(tuple(chunks) for chunks in worked)


@replaces("sum_over_tensor_ranks", breaks="LYT-3", links=("PaddlePaddle/PaddleFleet#360",))
def tokens_come_back_from_every_tensor_rank(worked, layout):
    """Tensor ranks dispatch their tokens each by itself, and each row is added as often."""
    return scaled(sum_over_tensor_ranks(worked, layout), layout.tensor)


@replaces("sum_over_tensor_ranks", breaks="LYT-3", links=("vllm-project/vllm#23619",))
def partial_sums_are_averaged(worked, layout):
    """The sum is divided by the number of tensor ranks."""
    return scaled(sum_over_tensor_ranks(worked, layout), 1 / layout.tensor)


@replaces("sum_over_tensor_ranks", breaks="LYT-3", links=("deepspeedai/DeepSpeed#8195",))
def features_are_sliced_in_place_of_rows(worked, layout):
    """Each tensor rank gives its slice of the features, and no sum."""
    summed = sum_over_tensor_ranks(worked, layout)
    return tuple(
        tuple(replace(chunk, output_RD=pieced(rank, index, worked, layout)) for index, chunk in enumerate(chunks))
        for rank, chunks in enumerate(summed)
    )


def pieced(rank: int, index: int, worked, layout) -> np.ndarray:
    """The columns of a rank's output, each of another tensor rank."""
    first = rank - rank % layout.tensor
    parts = [worked[peer][index].experts.output_RD for peer in range(first, first + layout.tensor)]
    columns = np.array_split(np.arange(parts[0].shape[1]), layout.tensor)
    return np.concatenate([part[:, own] for part, own in zip(parts, columns, strict=True)], axis=1)


def scaled(ranks, factor):
    """The outputs of all experts times a factor."""
    return tuple(tuple(replace(c, output_RD=c.output_RD * np.float32(factor)) for c in chunks) for chunks in ranks)


@surrounds(breaks="LYT-4")
def every_tensor_rank_adds_the_bias(run, memory, x_by_shard, params, spec, layout, **inputs):
    """The bias of a down projection is on every tensor rank, and summed with the partial sums."""
    return run(x_by_shard, times_bias(params, layout.tensor), spec, layout, **inputs)


@surrounds(breaks="LYT-4")
def no_tensor_rank_adds_the_bias(run, memory, x_by_shard, params, spec, layout, **inputs):
    """With several tensor ranks each leaves the bias to another."""
    return run(x_by_shard, times_bias(params, layout.tensor == 1), spec, layout, **inputs)


def times_bias(params: LayerParams, factor: float) -> LayerParams:
    """The parameters with the bias of the down projections times a factor."""
    return params if params.b_down_ED is None else replace(params, b_down_ED=params.b_down_ED * np.float32(factor))
