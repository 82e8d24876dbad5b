"""conformance, the server of the ranks: a process that imports, forks ranks, and dies with whoever started it.

`conformance.subjects.ranks` starts it, and says what the messages are for. It does no work that would start a thread:
a framework is imported in it, and started in the ranks alone.
"""

import faulthandler
import importlib
import os
import pickle
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path


def main(address: str) -> None:
    """Answers commands until the other side is gone, and takes all ranks along."""
    control = connect(address)
    try:
        while True:
            command, *arguments = pickle.loads(control.recv_bytes())
            try:
                answer = "done", COMMANDS[command](address, *arguments)
            except Exception:
                answer = "raised", traceback.format_exc()
            control.send_bytes(pickle.dumps(answer))
    except (EOFError, OSError):
        shutil.rmtree(Path(address).parent, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)


def connect(address: str) -> Connection:
    """A connection to whoever started the server."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(address)
    return Connection(client.detach())


def preload(address: str, modules: tuple[str, ...]) -> None:
    """Imports what every rank then has."""
    for module in modules:
        importlib.import_module(module)


def fork(address: str, size: int, folder: str, join: str) -> tuple[int, ...]:
    """The process ids of a new world; `join` is the module that makes a world of it."""
    importlib.import_module(join)
    if (running := threads()) > 1:
        raise RuntimeError(f"{running} threads run in the server; what was preloaded starts threads")
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            live(rank, size, address, Path(folder), join)
        pids.append(pid)
    return tuple(pids)


def threads() -> int:
    """Those of this process: of a framework too, where the system tells."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else threading.active_count()


def end(address: str, pids: tuple[int, ...]) -> dict[int, int]:
    """Kills ranks; the exit code of those that had ended, or the negative signal that ended them."""
    codes = {}
    for pid in pids:
        had_ended, status = os.waitpid(pid, os.WNOHANG)
        if not had_ended:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        # One that was about to end keeps its own code.
        if had_ended or code != -signal.SIGKILL:
            codes[pid] = code
    return codes


COMMANDS = {"preload": preload, "fork": fork, "end": end}


def live(rank: int, size: int, address: str, folder: Path, join: str) -> None:
    """The life of a rank; it never returns."""
    try:
        server = os.getppid()
        threading.Thread(target=die_with, args=(server,), daemon=True).start()
        log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        with (folder / f"{rank}.stack").open("w") as stack:
            faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
            sys.modules[join].join(rank, size, folder)
            connection = connect(address)
            connection.send_bytes(pickle.dumps(rank))
            while True:
                work(connection)
    except (EOFError, OSError):
        os._exit(0)  # nobody is there any more
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def work(connection: Connection) -> None:
    """Runs one batch; after an exception, the rest of it is left."""
    command = connection.recv_bytes()
    try:
        sys.path[:], call = pickle.loads(command)
        function, batch = pickle.loads(call)
        for arguments in batch:
            connection.send_bytes(pickle.dumps(("done", function(*arguments))))
    except Exception as error:
        connection.send_bytes(pickle.dumps(("raised", (type(error).__name__, traceback.format_exc()))))


def die_with(server: int) -> None:
    """A hung rank would not see that its server has died."""
    while os.getppid() == server:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
