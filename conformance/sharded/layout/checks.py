"""conformance, sharded: layout, forward. The layer laid over devices; every rank is judged, not rank 0.

Legend: T tokens, D model dim.
"""

import numpy as np

from conformance.core.check import Condition
from conformance.core.holding import hold
from conformance.core.judge import Crash, Judge
from conformance.layer.predicates import CHOICE_IS_CLEAR, WHOLE, poisoned, routed_alone, unmasked
from conformance.layer.verdicts import ROUTER_IS_WRONG, judged_T
from conformance.sharded.case import ShardedCase
from conformance.sharded.check import PAST_A_BYTE
from conformance.sharded.draw import another_layout
from conformance.sharded.kind import requires
from conformance.sharded.predicates import (
    AN_EMPTY_RANK,
    FILLED,
    HAS_TOKENS,
    OUTPUTS,
    SOME_EMPTY,
    by_tensor,
    chunked,
    in_order,
    is_plain,
    lossless,
    on_one_tensor_rank,
    placed,
    routed_only,
    small_buffer,
    unchunked,
    without_bias_of_down,
    without_chunks,
    without_small_buffer,
)
from conformance.sharded.verdicts import (
    POISON,
    fill_buffers_with_noise,
    fills_of_buffers,
    hold_outputs,
    hold_ranks,
    hold_same,
    name_of_rank,
    of_first_ranks,
    outputs_of_subject,
    radius_of_outputs,
    token_of_shard,
    trace_on_layout,
    wrong_already,
)


def hold_both(judge: Judge, case: ShardedCase, title: str, other: ShardedCase) -> None:
    """Two layouts of the same tokens give the same outputs, but for rounding."""
    first_TD, second_TD = (of_first_ranks(each, outputs_of_subject(judge, each)) for each in (case, other))
    radius_TD = radius_of_outputs(judge, case) + radius_of_outputs(judge, other)
    hold(title, first_TD, second_TD, radius_TD, rows=judged_T(judge, case))


@requires("LYT-1", method="sharded_layer", counts=FILLED)
def a_sharded_layer_runs_and_returns_an_output_for_every_rank(judge, case):
    outputs_of_subject(judge, case)


@requires(
    "LYT-2",
    method="sharded_layer",
    spec=routed_only,
    layout=is_plain,
    counts=FILLED,
    x=("normal", "large"),
    crowd=PAST_A_BYTE,
    after=("LYT-1", *WHOLE),
    unless=(ROUTER_IS_WRONG,),
)
def the_output_of_every_rank_is_that_of_the_one_rank_layer(judge, case):
    hold_outputs(judge, case, "not the output of the one-rank layer")


@requires(
    "LYT-3",
    method="sharded_layer",
    spec=lambda s: routed_only(s) and not s.experts.bias,
    layout=by_tensor,
    counts=FILLED,
    after=("LYT-1", *WHOLE),
    simpler=((on_one_tensor_rank, ("LYT-2",)),),
    unless=(ROUTER_IS_WRONG,),
)
def partial_sums_of_tensor_ranks_are_added_once(judge, case):
    hold_outputs(judge, case, "not the sum over the tensor ranks")


@requires(
    "LYT-4",
    method="sharded_layer",
    spec=lambda s: routed_only(s) and s.experts.bias,
    layout=by_tensor,
    counts=FILLED,
    after=("LYT-1", *WHOLE),
    simpler=((on_one_tensor_rank, ("LYT-2",)),),
    unless=(ROUTER_IS_WRONG, wrong_already(without_bias_of_down)),
)
def the_bias_of_a_down_projection_is_added_once(judge, case):
    hold_outputs(judge, case, "not with the bias of down once")


@requires(
    "LYT-5", method="sharded_layer", layout=lambda layout: layout.num_ranks > layout.num_token_shards, after=("LYT-1",)
)
def ranks_with_the_same_tokens_return_the_same_output(judge, case):
    hold_same(case, "another output than", outputs_of_subject(judge, case))


@requires(
    "LYT-6",
    method="sharded_layer",
    spec=lambda s: not routed_only(s),
    layout=unchunked,
    counts=FILLED,
    after=("LYT-1", "LYT-15", *WHOLE),
    simpler=((routed_alone, OUTPUTS),),
    unless=(ROUTER_IS_WRONG, wrong_already(routed_alone)),
)
def shared_experts_add_their_output_once(judge, case):
    hold_outputs(judge, case, "not routed + shared")


@requires(
    "LYT-7",
    method="sharded_layer",
    spec=routed_only,
    layout=is_plain,
    counts=SOME_EMPTY,
    given=(AN_EMPTY_RANK,),
    after=WHOLE,
    unless=(ROUTER_IS_WRONG,),
)
def a_rank_without_tokens_takes_part(judge, case):
    hold_outputs(judge, case, "not the output of the one-rank layer, beside ranks without tokens")


@requires("LYT-8", method="sharded_layer", counts=("empty",), bias=("none",))
def without_tokens_every_output_is_empty(judge, case):
    outputs_of_subject(judge, case)


@requires("LYT-9", method="sharded_layer", layout=lossless, given=(HAS_TOKENS,), after=("LYT-1",))
def a_token_changes_no_other_output(judge, case):
    rng = case.rng()
    token = int(rng.integers(case.num_tokens))
    others = np.arange(case.num_tokens) != token
    changed_TD = np.where(others[:, None], case.x_TD, 4 * rng.normal(size=case.x_TD.shape).astype(np.float32))
    before_TD = of_first_ranks(case, outputs_of_subject(judge, case))
    after = outputs_of_subject(judge, case.with_(x_TD=changed_TD))
    rows = others & judged_T(judge, case)
    title = f"changed by other numbers in token {token}"
    hold_ranks(case, title, after, before_TD, 2 * radius_of_outputs(judge, case), rows=rows)


@requires("LYT-10", method="sharded_layer", layout=lossless, given=(HAS_TOKENS,), after=("LYT-1",))
def a_nan_stays_in_its_token_on_every_rank(judge, case):
    rng = case.rng()
    token, columns_D = int(rng.integers(case.num_tokens)), rng.random(case.spec.experts.dim) < rng.choice([0.3, 1.0])
    others = np.arange(case.num_tokens) != token
    spoiled = case.with_(x_TD=np.where(others[:, None] | ~columns_D, case.x_TD, np.nan))
    before_TD = of_first_ranks(case, outputs_of_subject(judge, case))
    try:
        after = outputs_of_subject(judge, spoiled)
    except Crash as crash:
        if crash.refused:
            return
        raise
    rows = others & judged_T(judge, case)
    hold_ranks(
        case, f"changed by a NaN in token {token}", after, before_TD, 2 * radius_of_outputs(judge, case), rows=rows
    )


@requires("LYT-11", method="sharded_layer", layout=lossless, after=("LYT-1",))
def what_was_left_in_buffers_reaches_no_output(judge, case):
    clean_TD, clear_T = of_first_ranks(case, outputs_of_subject(judge, case)), judged_T(judge, case)
    for left, told in fills_of_buffers(judge, "sharded_layer"):
        fill_buffers_with_noise(judge, case, outputs_of_subject)
        found = outputs_of_subject(judge, case, **told)
        hold_ranks(case, f"changed by {left}", found, clean_TD, 2 * radius_of_outputs(judge, case), rows=clear_T)


@requires(
    "LYT-12",
    method="sharded_layer",
    inputs=("token_mask_T",),
    layout=lossless,
    simpler=((unmasked, ("LYT-14", "LYT-15")),),
    unless=(ROUTER_IS_WRONG,),
)
def padding_has_no_output_and_changes_none(judge, case):
    rows, radius_TD = case.valid_T & judged_T(judge, case), radius_of_outputs(judge, case)
    for poison in POISON:
        found = outputs_of_subject(judge, poisoned(case, poison))
        title = f"padding that holds {poison:g} has an output"
        hold_ranks(case, title, found, np.zeros(case.x_TD.shape), rows=~case.valid_T)
        title = f"not the output of the one-rank layer, beside padding that holds {poison:g}"
        hold_ranks(case, title, found, case.reference.output_TD, radius_TD, rows=rows)


@requires(
    "LYT-13",
    method="sharded_layer",
    layout=small_buffer,
    bias=("crowded", "one_rank", "mixed"),
    loads=("one_rank", "one_expert", "skewed"),
    given=(CHOICE_IS_CLEAR,),
    after=("LYT-1", *WHOLE),
    simpler=((without_small_buffer, OUTPUTS),),
    unless=(ROUTER_IS_WRONG, wrong_already(without_small_buffer)),
)
def a_slot_that_was_not_admitted_adds_0(judge, case):
    wanted_TD = np.concatenate(trace_on_layout(case).outputs_by_shard)
    hold_outputs(judge, case, "not the one-rank layer without the slots that were not admitted", wanted_TD=wanted_TD)


@requires("LYT-14", method="sharded_layer", layout=chunked, after=("LYT-1",))
def chunks_change_rounding_alone(judge, case):
    hold_both(judge, case, "another output than without chunks", without_chunks(case))


@requires("LYT-15", method="sharded_layer", layout=placed, after=("LYT-1",))
def the_placement_changes_rounding_alone(judge, case):
    hold_both(judge, case, "another output than with expert i at place i", in_order(case))


ANOTHER_LAYOUT = Condition(
    sentence="judged where another layout of these tokens is supported",
    holds=lambda judge, case: another_layout(judge, case) is not None,
)


@requires("LYT-16", method="sharded_layer", layout=unchunked, given=(ANOTHER_LAYOUT,), after=("LYT-1",))
def another_layout_changes_rounding_alone(judge, case):
    other = another_layout(judge, case)
    assert other is not None, "the condition says that there is one"
    hold_both(judge, case, f"another output than on {other.laid_out}", other)


@requires("LYT-17", method="sharded_layer", after=("LYT-1",))
def the_same_input_on_the_same_layout_gives_the_same_output(judge, case):
    first, second = (outputs_of_subject(judge, case) for _ in range(2))
    for rank, (before_TD, after_TD) in enumerate(zip(first, second, strict=True)):
        title = f"{name_of_rank(case, rank)}: another output in a second call"
        hold(title, after_TD, before_TD, label=token_of_shard)


@requires(
    "LYT-31",
    method="sharded_layer",
    spec=lambda s: routed_only(s) and s.router.selector != "table",
    layout=lambda layout: is_plain(layout) and layout.expert >= 4,
    counts=FILLED,
    bias=("one_rank",),
    loads=("one_rank",),
    after=("LYT-1", *WHOLE),
    unless=(ROUTER_IS_WRONG,),
)
def a_full_rank_loses_and_mixes_no_row(judge, case):
    hold_outputs(judge, case, "not the output of the one-rank layer, with all tokens on one rank")
