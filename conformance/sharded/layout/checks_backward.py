"""conformance, sharded: layout, backward. Every rank's gradients are those of the one-rank layer, complete and once.

Legend: T tokens, D model dim, E experts.
"""

import numpy as np

from conformance.layer.predicates import (
    BIASES,
    CHOICE_IS_CLEAR,
    GRADIENTS,
    IDLE_EXPERT,
    MATRICES,
    ROUTER,
    SHARED,
    poisoned,
)
from conformance.layer.verdicts import ROUTER_IS_WRONG, hold_parameter, wanted_gradients
from conformance.sharded.kind import requires
from conformance.sharded.predicates import (
    AN_EMPTY_RANK,
    FILLED,
    OUTPUTS,
    SOME_EMPTY,
    chunked,
    lossless,
    small_buffer,
    unchunked,
    without_chunks,
    without_small_buffer,
)
from conformance.sharded.verdicts import (
    NOISE,
    OUTPUTS_ARE_WRONG,
    POISON,
    fill_buffers_with_noise,
    fills_of_buffers,
    gradients_of_subject,
    gradients_on_layout,
    hold_alike,
    hold_each,
    hold_gradients,
    hold_same,
    name_of_rank,
    radii_of_gradients,
    wrong_already,
)

RUNS = ("LYT-1", "LYT-18")
FORWARD = (*RUNS, *OUTPUTS, *GRADIENTS)
"""Where one of these fails on the same case, the gradients of the ranks are wrong too."""
EXPLAINED = (ROUTER_IS_WRONG, OUTPUTS_ARE_WRONG)


@requires("LYT-18", method="sharded_gradients", counts=FILLED)
def the_sharded_backward_pass_runs_and_returns_every_gradient(judge, case):
    gradients_of_subject(judge, case)


@requires("LYT-19", method="sharded_gradients", layout=unchunked, counts=FILLED, after=FORWARD, unless=EXPLAINED)
def the_gradient_of_the_tokens_comes_through_every_rank(judge, case):
    hold_gradients(judge, case, ["x_TD"], "not the gradient of its tokens")


@requires("LYT-20", method="sharded_gradients", layout=unchunked, counts=FILLED, after=FORWARD, unless=EXPLAINED)
def matrices_get_the_gradients_of_every_shard_once(judge, case):
    hold_gradients(judge, case, MATRICES, "not the gradient of all shards")


@requires(
    "LYT-21",
    method="sharded_gradients",
    spec=lambda s: s.experts.bias,
    layout=unchunked,
    counts=FILLED,
    after=(*FORWARD, "LYT-20"),
    unless=EXPLAINED,
)
def biases_get_the_gradients_of_their_rows_once(judge, case):
    hold_gradients(judge, case, BIASES, "not the gradient of its rows")


@requires("LYT-22", method="sharded_gradients", layout=unchunked, counts=FILLED, after=FORWARD, unless=EXPLAINED)
def the_router_gets_the_gradients_of_every_shard_once(judge, case):
    hold_gradients(judge, case, ROUTER, "not the gradient of all shards")


@requires(
    "LYT-23",
    method="sharded_gradients",
    spec=lambda s: s.shared is not None,
    layout=unchunked,
    counts=FILLED,
    after=FORWARD,
    unless=EXPLAINED,
)
def shared_experts_get_the_gradients_of_every_shard_once(judge, case):
    hold_gradients(judge, case, SHARED, "not the gradient of all shards")


@requires("LYT-24", method="sharded_gradients", layout=lambda layout: layout.num_ranks > 1, after=RUNS)
def every_rank_has_the_same_gradients(judge, case):
    found = gradients_of_subject(judge, case)
    hold_same(case, "another gradient of the tokens than", [grads["x_TD"] for grads in found])
    for rank, grads in enumerate(found):
        title = f"{name_of_rank(case, rank)}: another gradient than {name_of_rank(case, 0)}"
        for name in (n for n in wanted_gradients(case) if n != "x_TD"):
            hold_parameter(title, name, grads[name], found[0][name])


@requires(
    "LYT-25",
    method="sharded_gradients",
    layout=lossless,
    bias=("crowded", "one_rank"),
    loads=("one_expert", "one_rank"),
    given=(IDLE_EXPERT,),
    after=RUNS,
)
def an_expert_without_tokens_on_any_rank_gets_gradients_of_0(judge, case):
    idle_E = case.reference.permutation.tokens_per_expert_E == 0
    # Memory that fuller calls have used is not 0.
    fill_buffers_with_noise(judge, case, gradients_of_subject)
    gradients_of_subject(judge, case.with_params(expert_bias_E=None))
    for rank, grads in enumerate(gradients_of_subject(judge, case)):
        title = f"{name_of_rank(case, rank)}: an expert without tokens has a gradient"
        for name in (n for n in (*MATRICES, *BIASES) if n in grads):
            hold_parameter(title, name, grads[name], np.zeros(grads[name].shape), rows=idle_E)


@requires("LYT-26", method="sharded_gradients", layout=lossless, given=(CHOICE_IS_CLEAR,), after=RUNS)
def what_was_left_in_buffers_reaches_no_gradient(judge, case):
    clean, radii = gradients_of_subject(judge, case), radii_of_gradients(judge, case)
    for left, told in fills_of_buffers(judge, "sharded_gradients"):
        fill_buffers_with_noise(judge, case, gradients_of_subject)
        found = gradients_of_subject(judge, case, **told)
        hold_alike(case, f"changed by {left}", found, clean, radii, radii)


@requires(
    "LYT-27",
    method="sharded_gradients",
    layout=unchunked,
    counts=SOME_EMPTY,
    given=(AN_EMPTY_RANK,),
    after=("LYT-7", *OUTPUTS, *GRADIENTS),
    unless=EXPLAINED,
)
def a_rank_without_tokens_takes_part_in_the_backward_pass(judge, case):
    hold_gradients(judge, case, wanted_gradients(case), "not the gradient, beside ranks without tokens")


@requires(
    "LYT-28",
    method="sharded_gradients",
    inputs=("token_mask_T",),
    layout=lossless,
    given=(CHOICE_IS_CLEAR,),
    after=("LYT-12", "LAY-6", "LAY-7", "BWD-9", *OUTPUTS, *GRADIENTS),
    unless=EXPLAINED,
)
def padding_adds_nothing_to_any_gradient(judge, case):
    wanted, radii, valid_T = wanted_gradients(case), radii_of_gradients(judge, case), case.valid_T
    for poison in POISON:
        spoiled = poisoned(case, poison).with_(d_output_TD=np.where(valid_T[:, None], case.d_output_TD, NOISE))
        found = gradients_of_subject(judge, spoiled)
        title = f"not the gradient, with {poison:g} in the padding"
        # The oracle does not read padding: its gradients of the clean case are those of the spoiled one.
        hold_each(case, title, found, wanted, radii, wanted, rows=np.ones(case.num_tokens, dtype=bool))


@requires(
    "LYT-29",
    method="sharded_gradients",
    layout=small_buffer,
    bias=("crowded", "one_rank", "mixed"),
    loads=("one_rank", "one_expert", "skewed"),
    given=(CHOICE_IS_CLEAR,),
    after=(*RUNS, "LYT-13", *GRADIENTS),
    simpler=((without_small_buffer, OUTPUTS),),
    unless=(ROUTER_IS_WRONG, wrong_already(without_small_buffer)),
)
def a_slot_that_was_not_admitted_sends_no_gradient(judge, case):
    found, wanted, radii = gradients_of_subject(judge, case), gradients_on_layout(case), radii_of_gradients(judge, case)
    title, rows = "not the gradient without the slots that were not admitted", np.ones(case.num_tokens, dtype=bool)
    hold_each(case, title, found, wanted, radii, wanted, rows=rows)


@requires("LYT-30", method="sharded_gradients", layout=chunked, given=(CHOICE_IS_CLEAR,), after=RUNS)
def chunks_change_gradients_by_rounding_alone(judge, case):
    found, wanted = (gradients_of_subject(judge, each) for each in (case, without_chunks(case)))
    hold_alike(
        case,
        "another gradient than without chunks",
        found,
        wanted,
        wanted_gradients(case),
        radii_of_gradients(judge, case),
    )
