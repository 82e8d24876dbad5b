"""conformance, the ranks: processes joined by gloo that stay, and run a function as the ranks of a cluster would.

    with Ranks(preload=("moe_torch.moe",)) as ranks:
        outputs = ranks.run(4, function, *arguments)        # one result for each of four ranks

A server process imports a framework and what `preload` names, and does nothing else; the ranks of a world are forked
from it, which takes a tenth of a second where an import takes seconds. `join` names the module that makes one world of
them, of torch or of JAX. The caller may have used JAX or OpenMP, which do not survive a fork: it is never forked
itself, and needs no framework. Every wait has a timeout. A rank that raises, dies or
hangs is an error that names it; then its world is gone, and the next call starts a new one.
"""

import atexit
import contextlib
import os
import pickle
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from moe_ref.specs.checks import integer

TORCH, JAX = "conformance.subjects.torch.join", "conformance.subjects.jax.join"
"""What joins ranks to a world."""
START = 120.0
"""Seconds for the server to import, and for ranks to find each other; seconds under load, else well below one."""
GRACE = 0.5
"""Seconds in which others may still report after the first failure, so that the one that died comes first."""
LOG_LINES = 20
"""Last lines of a rank's own output in an error."""


class RankError(RuntimeError):
    """A rank raised, died or hung. The text has its number, and its traceback or where it hangs."""

    def __init__(self, message: str, *, rank: int, how: str, error: str = ""):
        super().__init__(message)
        self.rank = rank
        self.how = how
        """raised, died or hung."""
        self.error = error
        """The name of the exception's class, where it raised."""


@dataclass(frozen=True, kw_only=True)
class _World:
    """The ranks of one size."""

    pids: tuple[int, ...]
    connections: tuple[Connection, ...]
    folder: Path


class Ranks:
    """Worlds of ranks, each started when it is first asked for, all from one server.

    Args:
        preload: modules that the server imports before it forks; they start no thread on import.
        join: the module whose `join(rank, size, folder)` each rank calls before all else.
        timeout: seconds without any result of any rank after which those that are left are called hung.
    """

    def __init__(self, *, preload: Sequence[str] = (), join: str = TORCH, timeout: float = 60.0):
        self.preload = tuple(preload)
        self.join = join
        self.timeout = timeout
        self._worlds: dict[int, _World] = {}
        self._server: subprocess.Popen | None = None

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def run(self, size: int, function: Callable, *arguments, timeout: float | None = None) -> list:
        """function(*arguments) on each of `size` ranks: the results in the order of the ranks."""
        return self.map(size, function, [arguments], timeout=timeout)[0]

    def map(self, size: int, function: Callable, batch: Sequence[tuple], *, timeout: float | None = None) -> list[list]:
        """The same for a batch of arguments, in one message to each rank: for each of them a list as from `run`.

        Args:
            size: ranks in the world; torch.distributed, or jax.distributed, is initialised and says who is who.
            function: of a module that ranks can import; arguments and results can be pickled.
            timeout: instead of the one of all calls.

        Raises:
            RankError: a rank raised, died or hung.
        """
        integer("size", size, 1)
        world = self._worlds.get(size) or self._start(size)
        # A world that is left in the middle of a call, by whatever exception, is of no more use.
        del self._worlds[size]
        try:
            # The path first: with it a rank finds the module of the function.
            command = pickle.dumps((sys.path, pickle.dumps((function, list(batch)))))
            results = _call(world, command, len(batch), timeout or self.timeout)
        except _Failed as failed:
            raise self._explained(world, failed) from None
        except BaseException:
            self._stop(world)
            raise
        self._worlds[size] = world
        return results

    def close(self) -> None:
        """Ends the server and all ranks, whatever they are doing."""
        if self._server is None:
            return
        atexit.unregister(self.close)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()
        for connection in (self._control, *(c for world in self._worlds.values() for c in world.connections)):
            connection.close()
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._server, self._worlds = None, {}

    def processes(self) -> list[int]:
        """Process ids of the server and of all ranks that are up."""
        server = [] if self._server is None else [self._server.pid]
        return server + [pid for world in self._worlds.values() for pid in world.pids]

    def _start_server(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="moe_ranks_"))
        self._listener = socket.socket(socket.AF_UNIX)
        address = str(self._folder / "socket")
        self._listener.bind(address)
        self._listener.listen(64)
        # One thread each: what a fork leaves of a pool of threads is a deadlock.
        threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "conformance.subjects.rank_server", address],
            env=os.environ | threads | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a process group of its own, which can be killed as one
        )
        atexit.register(self.close)
        self._control = self._accept()
        self._ask("preload", self.preload)

    def _start(self, size: int) -> _World:
        if self._server is None or self._server.poll() is not None:
            self.close()
            try:
                self._start_server()
            except BaseException:
                self.close()
                raise
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        pids = self._ask("fork", size, str(folder), self.join)
        world = _World(pids=pids, connections=(), folder=folder)
        try:
            accepted = [self._accept() for _ in pids]
            found = {_receive(connection): connection for connection in accepted}
        except BaseException:
            self._stop(world)
            raise
        self._worlds[size] = _World(pids=pids, connections=tuple(found[r] for r in range(size)), folder=folder)
        return self._worlds[size]

    def _accept(self) -> Connection:
        self._listener.settimeout(START)
        try:
            found, _ = self._listener.accept()
        except TimeoutError:
            raise TimeoutError(f"no process has answered within {START:.0f} s of its start") from None
        found.setblocking(True)
        # To send and to receive are waits as well: a stopped process does neither.
        limit = struct.pack("ll", int(START), 0)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        return Connection(found.detach())

    def _ask(self, *command) -> Any:
        try:
            _send(self._control, command)
            how, answer = _receive(self._control)
        except (EOFError, OSError):
            self.close()
            raise RuntimeError("the server of the ranks has died; its own output says why") from None
        if how == "raised":
            raise RuntimeError(f"the server of the ranks raised\n{answer}")
        return answer

    def _stop(self, world: _World) -> dict[int, int]:
        """Kills a world; the exit code of each rank that had ended by itself, by process id."""
        for connection in world.connections:
            connection.close()
        try:
            codes = self._ask("end", world.pids)
        except RuntimeError:  # then its ranks end with it
            codes = {}
        shutil.rmtree(world.folder, ignore_errors=True)
        return codes

    def _explained(self, world: _World, failed: "_Failed") -> RankError:
        """Of all failures of a call, the one to look at first, and what the others say."""
        size = len(world.pids)
        stacks = _stacks(world, failed.unfinished) if failed.timed_out else {}
        logs = {rank: _log(world, rank) for rank in (*failed.died, *stacks)}
        codes = self._stop(world)
        found = [
            (rank, "died", f"rank {rank} of {size} died {_ending(codes.get(world.pids[rank]))}{logs[rank]}", "")
            for rank in failed.died
        ]
        found += [
            (rank, "raised", f"rank {rank} of {size} raised\n{text}", error)
            for rank, (error, text) in failed.raised.items()
        ]
        found += [
            (rank, "hung", f"rank {rank} of {size} has hung for {failed.timed_out:.1f} s\n{stack}{logs[rank]}", "")
            for rank, stack in sorted(stacks.items(), key=lambda item: ("torch/distributed" in item[1], item[0]))
        ]
        rank, how, _, error = found[0]
        return RankError("\n".join(message for _, _, message, _ in found), rank=rank, how=how, error=error)


@cache
def shared(*preload: str, join: str = TORCH) -> Ranks:
    """The ranks that everybody in this process shares who needs the same modules."""
    return Ranks(preload=preload, join=join)


class _Failed(Exception):
    """What went wrong in a call."""

    def __init__(self, *, died, raised, unfinished, timed_out):
        self.died: list[int] = died
        self.raised: dict[int, tuple[str, str]] = raised
        self.unfinished: list[int] = unfinished
        self.timed_out: float = timed_out


def _call(world: _World, command: bytes, length: int, timeout: float) -> list[list]:
    """Sends the command to every rank, and collects `length` results from each."""
    size = len(world.pids)
    died: list[int] = []
    raised: dict[int, tuple[str, str]] = {}
    results: list[list] = [[None] * size for _ in range(length)]
    received = dict.fromkeys(range(size) if length else (), 0)
    for rank, connection in enumerate(world.connections):
        try:
            connection.send_bytes(command)
        except OSError:
            died.append(rank)
            received.pop(rank, None)

    deadline = time.monotonic() + (GRACE if died else timeout)
    while received:
        ready = wait([world.connections[rank] for rank in received], max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for rank in [rank for rank in received if world.connections[rank] in ready]:
            try:
                how, value = _receive(world.connections[rank])
            except (EOFError, OSError):
                died.append(rank)
                del received[rank]
                continue
            if how == "raised":
                raised[rank] = value
                del received[rank]
                continue
            results[received[rank]][rank] = value
            received[rank] += 1
            if received[rank] == length:
                del received[rank]
        deadline = min(deadline, time.monotonic() + GRACE) if died or raised else time.monotonic() + timeout
    if died or raised or received:
        timed_out = 0.0 if died or raised else timeout
        raise _Failed(died=died, raised=raised, unfinished=list(received), timed_out=timed_out)
    return results


def _stacks(world: _World, ranks: Sequence[int]) -> dict[int, str]:
    """Where each of the ranks is, innermost call first: they write it when they get the signal."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(world.pids[rank], signal.SIGUSR1)
    time.sleep(GRACE)
    return {rank: (world.folder / f"{rank}.stack").read_text() for rank in ranks}


def _log(world: _World, rank: int) -> str:
    """The end of what a rank has written to its standard output and error."""
    lines = (world.folder / f"{rank}.log").read_text(errors="replace").splitlines()[-LOG_LINES:]
    return "".join(f"\n    {line}" for line in lines)


def _ending(code: int | None) -> str:
    if code is None:
        return "without a word"
    return f"with exit code {code}" if code >= 0 else f"of {signal.Signals(-code).name}"


def _send(connection: Connection, value) -> None:
    connection.send_bytes(pickle.dumps(value))


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())
