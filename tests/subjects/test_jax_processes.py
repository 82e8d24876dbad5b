"""The subject jax-processes: moe_jax over two and four real processes, and what a failing one leaves behind."""

import os
import time
from pathlib import Path

import jax_rank_functions as functions
import numpy as np
import pytest
from layer_agreement import FLOAT32, assert_near, params_of, tokens

from conformance.subjects.jax.sharded import JaxProcesses
from conformance.subjects.ranks import JAX, RankError, Ranks, shared
from moe_ref import ExpertSpec, LayerSpec, RouterSpec, SharedSpec, layer_backward, moe_layer
from moe_ref.dispatch import plan
from moe_ref.specs.layout import ShardLayout

SPEC = LayerSpec(
    router=RouterSpec(
        num_experts=8, top_k=3, score_func="sigmoid", num_expert_groups=4, num_limited_groups=2,
        route_norm=True, norm_eps=1e-20, route_scale=2.5,
    ),
    experts=ExpertSpec(dim=16, hidden_dim=8),
    shared=SharedSpec(hidden_dim=24),
)  # fmt: skip
LAYOUTS = {
    "EP 2, ragged": ShardLayout(expert=2, strategy="ragged_all_to_all"),
    "DP 2 x EP 2, replicated": ShardLayout(data=2, expert=2, strategy="replicated"),
    "FSDP 2 x EP 4, ring, placement": ShardLayout(
        fsdp=2, expert=4, strategy="ring_of_experts", placement=(3, 1, 2, 0, 7, 6, 4, 5)
    ),
}
SOON = 15.0
"""Seconds; a failure is reported far earlier, on a machine that does nothing else."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_has_the_plan_output_and_gradients_of_the_reference(name):
    layout, subject, params, T = LAYOUTS[name], JaxProcesses(), params_of(SPEC), 5
    assert subject.supports_layer(SPEC, layout) is None
    S = layout.num_token_shards
    x_TD, d_output_TD = tokens(S * T, SPEC.experts.dim)
    trace = moe_layer(x_TD, params, SPEC)
    wanted = layer_backward(trace, params, SPEC, d_output_TD)
    xs, d_outputs = np.split(x_TD, S), np.split(d_output_TD, S)
    outputs = subject.sharded_layer(xs, params, SPEC, layout)
    gradients = subject.sharded_gradients(xs, params, SPEC, layout, d_outputs)
    assert len(outputs) == len(gradients) == layout.num_ranks
    for rank in range(layout.num_ranks):
        shard = layout.shard_of(rank)
        assert_near(outputs[rank], np.split(trace.output_TD, S)[shard], FLOAT32)
        assert_near(gradients[rank].pop("x_TD"), np.split(wanted.x_TD, S)[shard], FLOAT32)
        for parameter, gradient in gradients[rank].items():
            assert_near(gradient, getattr(wanted.params, parameter), FLOAT32, parameter)

    ids_by_shard = np.split(trace.routing.expert_ids_TK, S)
    found = subject.dispatch(ids_by_shard, layout, SPEC)
    for own, right in zip(found, plan(ids_by_shard, layout, SPEC), strict=True):
        for field, value in own.items():
            np.testing.assert_array_equal(value, getattr(right, field), err_msg=field)


def test_a_layout_that_two_processes_cannot_share_is_unsupported():
    assert "two or four" in JaxProcesses().supports_layer(SPEC, ShardLayout(expert=1))
    assert "two or four" in JaxProcesses().supports_layer(SPEC, ShardLayout(data=3))


@pytest.fixture(scope="module")
def ranks():
    """The pool of the subject."""
    return shared("conformance.subjects.jax.sharded", join=JAX)


@pytest.mark.parametrize("size", [2, 4])
def test_processes_are_one_jax(ranks, size):
    assert ranks.run(size, functions.total, 2.0) == [(rank, size, size * (size + 1.0)) for rank in range(size)]


@pytest.mark.parametrize(
    ("how", "reported", "text"),
    [
        ("raise", "raised", "KeyError: 'a wrong key'"),
        ("exit", "died", "with exit code 7"),
        ("hang", "hung", "in sleep_for_long\n"),
    ],
)
def test_a_failing_process_is_named_and_nothing_is_left_running(ranks, how, reported, text):
    before = ranks.run(2, functions.pid)
    begin = time.monotonic()
    with pytest.raises(RankError) as caught:
        ranks.run(2, functions.fail_on, 1, how, timeout=2.0)
    assert time.monotonic() - begin < SOON
    assert caught.value.how == reported
    # Of those that hang all are shown: a process that waits in a program of JAX has no frame of a collective.
    own = str(caught.value).partition("rank 1 of 2 ")[2]
    assert own.startswith("has hung" if how == "hang" else reported)
    assert text in own
    assert how == "hang" or caught.value.rank == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in before)
    assert ranks.run(2, functions.total, 1.0)[1] == (1, 2, 3.0), "a new world works"


def test_the_caller_is_not_forked_and_may_have_used_jax(ranks):
    with Ranks(preload=("conformance.subjects.jax.sharded",), join=JAX) as own:
        assert os.getpid() not in own.run(2, functions.pid)
        assert len(own.processes()) == 3


def test_a_server_in_which_jax_has_started_forks_nobody():
    with (
        Ranks(preload=("jax_has_started",), join=JAX) as ranks,
        pytest.raises(RuntimeError, match="threads run in the server"),
    ):
        ranks.run(2, functions.pid)
