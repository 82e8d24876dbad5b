"""The pool of ranks: right results, and a failure that names its rank and leaves nothing running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rank_functions import fail_on, process, threads, total, uneven

from conformance.subjects.ranks import RankError, Ranks

SOON = 10.0
"""Seconds; a failure is reported far earlier, on a machine that does nothing else."""


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as found:
        yield found


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def all_end(pids) -> bool:
    """Whether all of them end soon."""
    deadline = time.monotonic() + SOON
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_each_rank_returns_its_own_result(ranks, size):
    assert ranks.run(size, total, 2.0) == [(rank, size * (size + 1.0)) for rank in range(size)]


def test_a_batch_returns_a_result_for_each_of_its_examples(ranks):
    assert ranks.map(2, total, [(1.0,), (2.0,), (0.5,)]) == [
        [(0, 3.0), (1, 3.0)], [(0, 6.0), (1, 6.0)], [(0, 1.5), (1, 1.5)]
    ]  # fmt: skip
    assert ranks.map(2, total, []) == []


def test_uneven_rows_and_their_gradients_arrive(ranks):
    assert ranks.run(4, uneven, 3) == [[d + 1.0 for d in range(4) for _ in range(rank + d)] for rank in range(4)]


def test_ranks_stay_and_are_of_one_server(ranks):
    two = ranks.run(2, process)
    assert ranks.run(2, process) == two
    assert set(two) < set(ranks.processes())
    assert set(ranks.run(4, process)).isdisjoint(two)


def test_a_rank_has_one_thread_and_no_module_that_it_does_not_need(ranks):
    assert ranks.run(1, threads) == [(1, ["jax", "pytest", "hypothesis"])]


@pytest.mark.parametrize(
    ("how", "reported", "text"),
    [
        ("raise", "raised", "KeyError: 'a wrong key'"),
        ("unpicklable", "raised", "Can't pickle local object|Can't get local object"),
        ("exit", "died", "with exit code 7\n    the last words"),
        ("signal", "died", "of SIGABRT"),
        ("hang", "hung", "in sleep_for_long\n"),
    ],
)
def test_a_failing_rank_is_named_and_its_world_is_gone(ranks, how, reported, text):
    before = ranks.run(4, process)
    begin = time.monotonic()
    with pytest.raises(RankError, match=f"^rank 2 of 4 {'has hung' if how == 'hang' else reported}") as caught:
        ranks.run(4, fail_on, 2, how, timeout=1.0)
    assert time.monotonic() - begin < SOON
    assert (caught.value.rank, caught.value.how) == (2, reported)
    assert caught.value.error == ("KeyError" if how == "raise" else caught.value.error)
    assert caught.match(text)
    assert all_end(before)
    assert ranks.run(4, total, 1.0)[2] == (2, 10.0), "a new world works"


def test_ranks_that_wait_for_the_hung_one_come_after_it(ranks):
    with pytest.raises(RankError) as caught:
        ranks.run(2, fail_on, 1, "hang", timeout=1.0)
    hung, waiting = str(caught.value).split("rank 0 of 2 has hung")
    assert "sleep_for_long" in hung
    assert "all_reduce" in waiting


def test_a_rank_that_is_killed_while_idle_is_an_error_of_the_next_call(ranks):
    os.kill(ranks.run(2, process)[1], signal.SIGKILL)
    with pytest.raises(RankError, match="rank 1 of 2 died of SIGKILL"):
        ranks.run(2, total, 1.0)


def test_a_server_that_dies_takes_its_ranks_along_and_is_replaced():
    with Ranks() as ranks:
        ranks.run(2, process)
        server, *own = ranks.processes()
        os.kill(server, signal.SIGKILL)
        assert all_end(own)
        with pytest.raises(RankError, match="died without a word"):
            ranks.run(2, total, 1.0)
        assert ranks.run(2, total, 1.0) == [(0, 3.0), (1, 3.0)]


def test_closing_ends_every_process_and_can_be_done_twice():
    ranks = Ranks()
    ranks.run(2, process)
    pids = ranks.processes()
    assert len(pids) == 3
    ranks.close()
    ranks.close()
    assert all_end(pids)  # a kill is asked for at once, and done soon


def test_a_module_that_cannot_be_preloaded_is_an_error():
    with pytest.raises(RuntimeError, match="no_such_module"):
        Ranks(preload=("no_such_module",)).run(1, process)


def test_a_size_below_one_is_an_error(ranks):
    with pytest.raises(ValueError, match="size is 0; it is an integer at least 1"):
        ranks.run(0, process)


PARENT = """
import os, sys
from rank_functions import process, sleep_for_long
from conformance.subjects.ranks import Ranks
ranks = Ranks()
ranks.run(2, process)
print(*ranks.processes(), ranks._folder, flush=True)
if {exits}:
    sys.exit(0)
ranks.run(2, sleep_for_long)
"""


@pytest.mark.parametrize("ending", ["exit", "kill"])
def test_when_the_parent_ends_nothing_is_left(ending):
    here = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    code = PARENT.format(exits=ending == "exit")
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": here}
    ) as parent:
        assert parent.stdout is not None
        *pids, folder = parent.stdout.readline().split()
        if ending == "kill":
            time.sleep(0.2)  # until the ranks sleep
            assert all(alive(int(pid)) for pid in pids)
            parent.kill()
    assert all_end(map(int, pids))
    assert not Path(folder).exists()
