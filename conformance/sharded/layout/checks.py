"""conformance, suite: layout. The layer laid over devices, forward; every rank is judged, not rank 0."""

from functools import partial

import numpy as np

from conformance.core.check import requires
from conformance.core.judge import NotRun, Violation
from conformance.layer.layer.checks import without_shared
from conformance.layer.verdicts import excusing, hold, judged_T
from conformance.sharded.case import LayoutCase
from conformance.sharded.draw import another_layout
from conformance.sharded.verdicts import (
    POISON,
    fills_buffers,
    hold_outputs,
    hold_ranks,
    hold_same,
    layer_is_wrong,
    name_of,
    outputs,
    radius_of,
    refused,
    soil,
    truncated,
    whole,
)

FILLED = ("equal", "uneven", "prime")
"""Counts of tokens that leave no rank without any."""
SOME_EMPTY = ("some_empty",)


def has_chunks(layout) -> bool:
    return layout.num_token_chunks > 1 or layout.num_emb_chunks > 1


def lossless(layout) -> bool:
    """No buffer is too small for what comes."""
    return layout.buffer_factor is None


def is_plain(layout) -> bool:
    """Rows travel, and nothing else is special."""
    return lossless(layout) and not has_chunks(layout) and layout.placement is None and layout.tensor == 1


def by_tensor(layout) -> bool:
    """Partial sums besides."""
    return lossless(layout) and not has_chunks(layout) and layout.placement is None and layout.tensor > 1


def unchunked(layout) -> bool:
    return lossless(layout) and not has_chunks(layout)


def alone(spec) -> bool:
    """Routed experts without shared ones."""
    return spec.shared is None


def relaid(case: LayoutCase, **changes) -> LayoutCase:
    """The same tokens on a layout with other fields."""
    return case.with_(layout=case.layout.replace(**changes))


def is_wrong(judge, case: LayoutCase) -> bool:
    """The subject's output is not the one-rank layer's, where it runs the case at all."""
    try:
        hold_outputs(judge, case, "")
    except Violation:
        return True
    except NotRun:
        return False
    return False


def hold_layout(judge, case: LayoutCase, title: str, *simpler: LayoutCase, **more) -> None:
    """Every rank's output is the one-rank layer's; where that layer or a simpler case is wrong, it is to blame."""
    try:
        hold_outputs(judge, case, title, **more)
    except Violation:
        if layer_is_wrong(judge, case, "layer") or any(is_wrong(judge, each) for each in simpler):
            raise NotRun("judged where the one-rank layer and simpler layouts are right") from None
        raise


def compare(judge, case: LayoutCase, title: str, other: LayoutCase) -> None:
    """Two layouts of the same tokens give the same outputs, but for rounding."""
    first_TD, second_TD = (whole(each, outputs(judge, each)) for each in (case, other))
    radius_TD = radius_of(judge, case) + radius_of(judge, other)
    hold(case, title, first_TD, second_TD, radius_TD, rows=judged_T(judge, case))


@requires("LYT-1", method="sharded_layer", counts=FILLED)
def test_a_sharded_layer_runs_and_returns_an_output_for_every_rank(judge, case):
    outputs(judge, case)


@requires("LYT-2", method="sharded_layer", spec=alone, layout=is_plain, counts=FILLED, x=("normal", "large"),
          after=("LYT-1",))  # fmt: skip
def test_the_output_of_every_rank_is_that_of_the_one_rank_layer(judge, case):
    hold_layout(judge, case, "not the output of the one-rank layer")


@requires("LYT-3", method="sharded_layer", spec=lambda s: alone(s) and not s.experts.bias, layout=by_tensor,
          counts=FILLED, after=("LYT-1",))  # fmt: skip
def test_partial_sums_of_tensor_ranks_are_added_once(judge, case):
    hold_layout(judge, case, "not the sum over the tensor ranks", relaid(case, tensor=1))


@requires("LYT-4", method="sharded_layer", spec=lambda s: alone(s) and s.experts.bias, layout=by_tensor,
          counts=FILLED, after=("LYT-1",))  # fmt: skip
def test_the_bias_of_a_down_projection_is_added_once(judge, case):
    unbiased = case.with_params(b_down_ED=0 * np.asarray(case.params.b_down_ED))
    hold_layout(judge, case, "not with the bias of down once", relaid(case, tensor=1), unbiased)


@requires("LYT-5", method="sharded_layer", layout=lambda layout: layout.num_ranks > layout.num_token_shards,
          after=("LYT-1",))  # fmt: skip
def test_ranks_with_the_same_tokens_return_the_same_output(judge, case):
    hold_same(case, "another output than", outputs(judge, case))


@requires("LYT-6", method="sharded_layer", spec=lambda s: not alone(s), layout=unchunked, counts=FILLED,
          after=("LYT-1",))  # fmt: skip
def test_shared_experts_add_their_output_once(judge, case):
    routed = () if case.spec.router.num_scored_shared_experts else (without_shared(case),)
    hold_layout(judge, case, "not routed + shared", *routed)


@requires("LYT-7", method="sharded_layer", spec=alone, layout=is_plain, counts=SOME_EMPTY)
def test_a_rank_without_tokens_takes_part(judge, case):
    if 0 not in case.tokens_per_shard:
        raise NotRun("judged where a rank has no token")
    hold_layout(judge, case, "not the output of the one-rank layer, beside ranks without tokens")


@requires("LYT-8", method="sharded_layer", counts=("empty",), bias=("none",))
def test_without_tokens_every_output_is_empty(judge, case):
    outputs(judge, case)


@requires("LYT-9", method="sharded_layer", layout=lossless, after=("LYT-1",))
def test_a_token_changes_no_other_output(judge, case):
    rng = case.rng()
    if not case.num_tokens:
        raise NotRun("judged where there is a token")
    others = np.arange(case.num_tokens) != rng.integers(case.num_tokens)
    changed_TD = np.where(others[:, None], case.x_TD, 4 * rng.normal(size=case.x_TD.shape).astype(np.float32))
    other = case.with_(x_TD=changed_TD)
    before, after = whole(case, outputs(judge, case)), outputs(judge, other)
    token = int(np.flatnonzero(~others)[0])
    rows = others & judged_T(judge, case)
    title = f"changed by other numbers in token {token}"
    hold_ranks(case, title, after, before, 2 * radius_of(judge, case), rows=rows)


@requires("LYT-10", method="sharded_layer", layout=lossless, after=("LYT-1",))
def test_a_nan_stays_in_its_token_on_every_rank(judge, case):
    rng = case.rng()
    if not case.num_tokens:
        raise NotRun("judged where there is a token")
    token, columns_D = int(rng.integers(case.num_tokens)), rng.random(case.spec.experts.dim) < rng.choice([0.3, 1.0])
    others = np.arange(case.num_tokens) != token
    spoiled = case.with_(x_TD=np.where(others[:, None] | ~columns_D, case.x_TD, np.nan))
    before = whole(case, outputs(judge, case))
    after = refused(partial(outputs, judge, spoiled))
    if after is None:
        return
    rows = others & judged_T(judge, case)
    title = f"changed by a NaN in token {token}"
    hold_ranks(case, title, after, before, 2 * radius_of(judge, case), rows=rows)


@requires("LYT-11", method="sharded_layer", layout=lossless, after=("LYT-1",))
def test_what_was_left_in_buffers_reaches_no_output(judge, case):
    clean = whole(case, outputs(judge, case))
    fills = POISON if fills_buffers(judge, "sharded_layer") else (None,) * len(POISON)
    clear_T = judged_T(judge, case)
    for fill in fills:
        soil(judge, case, "sharded_layer")
        found = outputs(judge, case, **({} if fill is None else {"buffer_fill": fill}))
        left = "a call with huge tokens" if fill is None else f"buffers that held {fill:g}"
        hold_ranks(case, f"changed by {left}", found, clean, 2 * radius_of(judge, case), rows=clear_T)


@requires("LYT-12", method="sharded_layer", inputs=("token_mask_T",), layout=lossless)
def test_padding_has_no_output_and_changes_none(judge, case):
    for poison in POISON:
        spoiled = case.with_(x_TD=np.where(case.valid_T[:, None], case.x_TD, poison))
        found = outputs(judge, spoiled)
        nothing = np.zeros(case.x_TD.shape)
        title = f"padding that holds {poison:g} has an output"
        hold_ranks(case, title, found, nothing, nothing, rows=~case.valid_T)
        rows = case.valid_T & judged_T(judge, case)
        title = f"not the output of the one-rank layer, beside padding that holds {poison:g}"
        with excusing(judge, case):
            hold_ranks(case, title, found, case.reference.output_TD, radius_of(judge, case), rows=rows)


def small_buffer(layout) -> bool:
    return layout.buffer_factor is not None and layout.expert > 1


@requires("LYT-13", method="sharded_layer", layout=small_buffer, bias=("crowded", "one_rank", "mixed"),
          loads=("one_rank", "one_expert", "skewed"), after=("LYT-1",))  # fmt: skip
def test_a_slot_that_was_not_admitted_adds_0(judge, case):
    if not judged_T(judge, case).all():
        raise NotRun("judged where every choice is beyond doubt")
    wanted_TD = np.concatenate(truncated(case).outputs_by_shard)
    title = "not the one-rank layer without the slots that were not admitted"
    hold_layout(judge, case, title, relaid(case, buffer_factor=None), wanted_TD=wanted_TD)


@requires("LYT-14", method="sharded_layer", layout=lambda layout: lossless(layout) and has_chunks(layout),
          after=("LYT-1",))  # fmt: skip
def test_chunks_change_rounding_alone(judge, case):
    together = relaid(case, num_token_chunks=1, num_emb_chunks=1)
    compare(judge, case, "another output than without chunks", together)


@requires("LYT-15", method="sharded_layer", layout=lambda layout: unchunked(layout) and layout.placement is not None
          and layout.expert > 1, after=("LYT-1",))  # fmt: skip
def test_the_placement_changes_rounding_alone(judge, case):
    contiguous = relaid(case, placement=None)
    compare(judge, case, "another output than with expert i at place i", contiguous)


@requires("LYT-16", method="sharded_layer", layout=unchunked, after=("LYT-1",))
def test_another_layout_changes_rounding_alone(judge, case):
    other = another_layout(judge, case)
    if other is None:
        raise NotRun("judged where another layout of these tokens is supported")
    compare(judge, case, f"another output than on {other.laid_out}", other)


@requires("LYT-17", method="sharded_layer", after=("LYT-1",))
def test_the_same_input_on_the_same_layout_gives_the_same_output(judge, case):
    first, second = outputs(judge, case), outputs(judge, case)
    for rank, (before, after) in enumerate(zip(first, second, strict=True)):
        title, nothing = f"{name_of(case, rank)}: another output in a second call", np.zeros(before.shape)
        hold(case, title, after, before, nothing, label=lambda row: f"token {row} of the shard")


@requires("LYT-31", method="sharded_layer", spec=lambda s: alone(s) and s.router.selector != "table",
          layout=lambda layout: is_plain(layout) and layout.expert >= 4, counts=FILLED, bias=("one_rank",),
          loads=("one_rank",), after=("LYT-1",))  # fmt: skip
def test_a_full_rank_loses_and_mixes_no_row(judge, case):
    title = "not the output of the one-rank layer, with all tokens on one rank"
    hold_layout(judge, case, title)
