"""conformance, suite: layout, backward. Every rank's gradients are those of the one-rank layer, complete and once."""

import numpy as np

from conformance.core.check import requires
from conformance.core.judge import NotRun, Violation
from conformance.layer.backward.checks import BIASES, MATRICES, ROUTER, SHARED
from conformance.layer.verdicts import hold, hold_parameter, judged_T, wanted_gradients
from conformance.sharded.layout.checks import FILLED, SOME_EMPTY, has_chunks, is_wrong, lossless, relaid, small_buffer
from conformance.sharded.verdicts import (
    POISON,
    fills_buffers,
    gradients_by_rank,
    hold_each,
    hold_gradients_of_ranks,
    hold_same,
    layer_is_wrong,
    name_of,
    radii_of_gradients,
    soil,
    truncated_gradients,
)

FORWARD = ("LYT-1", "LYT-18")


def unchunked(layout) -> bool:
    return lossless(layout) and not has_chunks(layout)


def beyond_doubt(judge, case) -> None:
    """NotRun where a choice hangs on rounding: it changes every gradient."""
    if not judged_T(judge, case).all():
        raise NotRun("judged where every choice is beyond doubt")


def excusing_forward(judge, case) -> None:
    """NotRun where what is wrong is wrong already forward, or on one rank."""
    if layer_is_wrong(judge, case, "layer_gradients") or is_wrong(judge, case):
        raise NotRun("judged where the one-rank gradients and the outputs are right")


def hold_names(judge, case, names, title: str) -> None:
    """The gradients of these names are the one-rank layer's on every rank."""
    try:
        hold_gradients_of_ranks(judge, case, names, title)
    except Violation:
        excusing_forward(judge, case)
        raise


@requires("LYT-18", method="sharded_gradients", counts=FILLED)
def test_the_sharded_backward_pass_runs_and_returns_every_gradient(judge, case):
    gradients_by_rank(judge, case)


@requires("LYT-19", method="sharded_gradients", layout=unchunked, counts=FILLED, after=FORWARD)
def test_the_gradient_of_the_tokens_comes_through_every_rank(judge, case):
    hold_names(judge, case, ["x_TD"], "not the gradient of its tokens")


@requires("LYT-20", method="sharded_gradients", layout=unchunked, counts=FILLED, after=FORWARD)
def test_matrices_get_the_gradients_of_every_shard_once(judge, case):
    hold_names(judge, case, MATRICES, "not the gradient of all shards")


@requires("LYT-21", method="sharded_gradients", spec=lambda s: s.experts.bias, layout=unchunked, counts=FILLED,
          after=(*FORWARD, "LYT-20"))  # fmt: skip
def test_biases_get_the_gradients_of_their_rows_once(judge, case):
    hold_names(judge, case, BIASES, "not the gradient of its rows")


@requires("LYT-22", method="sharded_gradients", layout=unchunked, counts=FILLED, after=FORWARD)
def test_the_router_gets_the_gradients_of_every_shard_once(judge, case):
    hold_names(judge, case, ROUTER, "not the gradient of all shards")


@requires("LYT-23", method="sharded_gradients", spec=lambda s: s.shared is not None, layout=unchunked, counts=FILLED,
          after=FORWARD)  # fmt: skip
def test_shared_experts_get_the_gradients_of_every_shard_once(judge, case):
    hold_names(judge, case, SHARED, "not the gradient of all shards")


@requires("LYT-24", method="sharded_gradients", layout=lambda layout: layout.num_ranks > 1, after=FORWARD)
def test_every_rank_has_the_same_gradients(judge, case):
    found = gradients_by_rank(judge, case)
    hold_same(case, "another gradient of the tokens than", [grads["x_TD"] for grads in found])
    for rank, grads in enumerate(found):
        for name in wanted_gradients(case):
            if name != "x_TD":
                title = f"{name_of(case, rank)}: another gradient than {name_of(case, 0)}"
                nothing = np.zeros(grads[name].shape)
                hold_parameter(case, title, name, grads[name], found[0][name], nothing)


@requires("LYT-25", method="sharded_gradients", layout=lossless, bias=("crowded", "one_rank"),
          loads=("one_expert", "one_rank"), after=FORWARD)  # fmt: skip
def test_an_expert_without_tokens_on_any_rank_gets_gradients_of_0(judge, case):
    beyond_doubt(judge, case)
    idle_E = case.reference.permutation.tokens_per_expert_E == 0
    if not idle_E.any():
        raise NotRun("judged where an expert is without tokens")
    soil(judge, case, "sharded_gradients")
    gradients_by_rank(judge, case.with_params(expert_bias_E=None))
    for rank, grads in enumerate(gradients_by_rank(judge, case)):
        for name in (n for n in (*MATRICES, *BIASES) if n in grads):
            title = f"{name_of(case, rank)}: an expert without tokens has a gradient"
            nothing = np.zeros(grads[name].shape)
            hold_parameter(case, title, name, grads[name], nothing, nothing, rows=idle_E)


@requires("LYT-26", method="sharded_gradients", layout=lossless, after=FORWARD)
def test_what_was_left_in_buffers_reaches_no_gradient(judge, case):
    beyond_doubt(judge, case)
    clean, radii = gradients_by_rank(judge, case), radii_of_gradients(judge, case)
    fills = POISON if fills_buffers(judge, "sharded_gradients") else (None,) * len(POISON)
    for fill in fills:
        soil(judge, case, "sharded_gradients")
        found = gradients_by_rank(judge, case, **({} if fill is None else {"buffer_fill": fill}))
        left = "a call with huge tokens" if fill is None else f"buffers that held {fill:g}"
        for rank, (grads, before) in enumerate(zip(found, clean, strict=True)):
            for name, grad in grads.items():
                if name != "x_TD" and name in radii:
                    title = f"{name_of(case, rank)}: changed by {left}"
                    hold_parameter(case, title, name, grad, before[name], 2 * radii[name])
        tokens = [grads["x_TD"] for grads in found]
        for rank, (grad_TD, before) in enumerate(zip(tokens, clean, strict=True)):
            radius = 2 * case.by_shard(radii["x_TD"])[case.layout.shard_of(rank)]
            title = f"{name_of(case, rank)}: tokens, changed by {left}"
            hold(case, title, grad_TD, before["x_TD"], radius, label=lambda row: f"token {row} of the shard")


@requires("LYT-27", method="sharded_gradients", layout=unchunked, counts=SOME_EMPTY, after=("LYT-7",))
def test_a_rank_without_tokens_takes_part_in_the_backward_pass(judge, case):
    if 0 not in case.tokens_per_shard:
        raise NotRun("judged where a rank has no token")
    hold_names(judge, case, wanted_gradients(case), "not the gradient, beside ranks without tokens")


@requires("LYT-28", method="sharded_gradients", inputs=("token_mask_T",), layout=lossless, after=("LYT-12",))
def test_padding_adds_nothing_to_any_gradient(judge, case):
    beyond_doubt(judge, case)
    valid_T1, radii = case.valid_T[:, None], radii_of_gradients(judge, case)
    for poison in POISON:
        spoiled = case.with_(
            x_TD=np.where(valid_T1, case.x_TD, poison), d_output_TD=np.where(valid_T1, case.d_output_TD, 1e30)
        )
        found = gradients_by_rank(judge, spoiled)
        title = f"not the gradient, with {poison:g} in the padding"
        try:
            rows = np.ones(case.num_tokens, dtype=bool)
            # The oracle does not read padding: its gradients of the clean case are those of the spoiled one.
            hold_each(case, title, found, wanted_gradients(case), radii, wanted_gradients(case), rows=rows)
        except Violation:
            excusing_forward(judge, case)
            raise


@requires("LYT-29", method="sharded_gradients", layout=small_buffer, bias=("crowded", "one_rank", "mixed"),
          loads=("one_rank", "one_expert", "skewed"), after=FORWARD)  # fmt: skip
def test_a_slot_that_was_not_admitted_sends_no_gradient(judge, case):
    beyond_doubt(judge, case)
    if not judge.holds("LYT-13", case):
        raise NotRun("judged where the outputs are right")
    found, wanted = gradients_by_rank(judge, case), truncated_gradients(case)
    title, rows = "not the gradient without the slots that were not admitted", np.ones(case.num_tokens, dtype=bool)
    radii = radii_of_gradients(judge, case)
    try:
        hold_each(case, title, found, wanted, radii, wanted, rows=rows)
    except Violation:
        excusing_forward(judge, relaid(case, buffer_factor=None))
        raise


@requires("LYT-30", method="sharded_gradients", layout=lambda layout: lossless(layout) and has_chunks(layout),
          after=FORWARD)  # fmt: skip
def test_chunks_change_gradients_by_rounding_alone(judge, case):
    beyond_doubt(judge, case)
    together = relaid(case, num_token_chunks=1, num_emb_chunks=1)
    found, wanted = (gradients_by_rank(judge, each) for each in (case, together))
    radii = radii_of_gradients(judge, case)
    title = "another gradient than without chunks"
    for rank, (grads, plain) in enumerate(zip(found, wanted, strict=True)):
        for name in wanted_gradients(case):
            radius = case.by_shard(radii[name])[case.layout.shard_of(rank)] if name == "x_TD" else radii[name]
            full_title = f"{name_of(case, rank)}: {title}"
            hold_parameter(case, full_title, name, grads[name], plain[name], 2 * radius)
