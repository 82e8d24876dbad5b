"""conformance, judging: the processes that judge one subject, and what they have found so far.

    at first     several at once (`sharing`): each claims a stage before the first test of it, one of them from the
                 first stage on, the others from the last. A test that finds something is left for the end.
    at the end   one for the tests that are left, in order, if there are any: one fault has one page, which is made
                 where it is found first. Where one process is wanted, it is this one.

A process that dies or hangs on a test is followed by one for the rest, in which that test is a violation.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conformance.run.conclude import CASES
from conformance.run.plugin import merge
from conformance.run.report import cut_short
from conformance.run.watch import last_words, where

SUITE = Path(__file__).parents[1] / "suite"
ENVIRONMENT = {
    "JAX_COMPILATION_CACHE_DIR": str(CASES.parent.resolve() / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
"""Most of the time of a JAX subject is compilation; a second run reads the programs of the first. Its processes share a
device, of which the first would take three quarters of the memory. Other subjects ignore it all, and so does one whose
user has set these."""
ON_A_GPU = {"XLA_FLAGS": "--xla_gpu_autotune_level=0"}
"""Besides. XLA would compile each product of a program in several ways and time them, beside other processes: that is
most of the time of a program, and what it takes then differs from one program to the next."""
PYTEST_CODES = (0, 1, 2, 3, 4, 5)
"""Exit statuses with which pytest ends by itself."""
MOST_BROKEN = 12
"""So many tests may break the process; then the subject is given up."""


@dataclass
class Process:
    """One pytest process on a subject, and what it has written so far."""

    folder: Path
    """Its files: records, output, where it is."""
    popen: subprocess.Popen
    read_to: int = 0
    at: tuple[str, float] = field(default_factory=lambda: ("", time.monotonic()))
    """The test that runs, and since when."""

    @property
    def output(self) -> str:
        """What it printed."""
        return (self.folder / "output.txt").read_text()

    def lines(self) -> list[dict]:
        """What it wrote since the last call; notes which test runs."""
        found, file = [], self.folder / "records.jsonl"
        if file.exists():
            with file.open() as lines:
                lines.seek(self.read_to)
                while (line := lines.readline()).endswith("\n"):
                    found.append(json.loads(line))
                    self.read_to = lines.tell()
        place = where(self.folder / "where")
        if place is not None and place[0] != self.at[0]:
            self.at = (place[0], time.monotonic())
        return found

    def kill(self) -> None:
        """End it and all that it started; first with a traceback of where it is."""
        for sign in (signal.SIGABRT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.popen.pid, sign)
                self.popen.wait(timeout=3)
        self.popen.wait()


@dataclass
class Judging:
    """A subject being judged."""

    name: str
    folder: Path
    options: Any
    processes: int
    """How many may judge it at once."""
    running: list[Process] = field(default_factory=list)
    begun: int = 0
    """Processes that were started."""
    is_shared: bool = False
    """Whether those that run claim stages."""
    started: float | None = None
    ended: float | None = None
    records: dict = field(default_factory=dict)
    done: set = field(default_factory=set)
    """Names of the tests that ended."""
    left: dict = field(default_factory=dict)
    """name of a test that found something and is left for the end -> the arguments of `watch.found_before`."""
    found: dict = field(default_factory=dict)
    """name of such a test, or of one on which a process broke -> its record where nobody comes to look into it."""
    broken: dict = field(default_factory=dict)
    """name of a test on which a process broke -> the arguments of `watch.broken`."""
    error: str = ""
    """What a process says the user gave wrongly."""
    code: int = 0
    """The exit status that counts: that of the last process."""
    output: str = ""
    """What the last process printed."""

    @property
    def seconds(self) -> float:
        """Since the first process was started."""
        return 0.0 if self.started is None else (self.ended or time.monotonic()) - self.started

    @property
    def wants_one(self) -> bool:
        """Whether a process can be started for it now."""
        if self.ended is not None:
            return False
        return not self.running or (self.is_shared and self.begun < self.processes)

    def start(self) -> None:
        """Start a process for what is not done yet."""
        claims = self.folder / "claims"
        if self.started is None:
            self.started, self.is_shared = time.monotonic(), self.processes > 1
            claims.mkdir()
        sharing = ["--moe-claims", str(claims), str(self.begun)] if self.is_shared else []
        own = self.folder / str(self.begun)
        own.mkdir()
        resume = own / "resume.json"
        resume.write_text(json.dumps({"done": sorted(self.done), "broken": self.broken, "left": self.left}))
        with (own / "output.txt").open("w") as file:
            # A session of its own: what it starts ends with it.
            popen = subprocess.Popen(
                [*_command(self.name, self.options, own), "--moe-resume", str(resume), *sharing],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=ENVIRONMENT | (ON_A_GPU if _is_gpu(self.options.device) else {}) | os.environ,
            )
        self.running.append(Process(folder=own, popen=popen))
        self.begun += 1

    def look(self) -> bool:
        """Take in what the processes have found; whether all of it is there."""
        for process in list(self.running):
            why = self._why_ended(process)
            if why is None:
                continue
            self.running.remove(process)
            self.output = process.output
            self.code = 1 if why and self._blames(process, why) else process.popen.returncode or self.code
            if self.code not in (0, 1):
                return self.end()
            if not self.running:
                there_is_more = self.left or not self.broken.keys() <= self.done
                if not there_is_more or not (self.is_shared or why):
                    return self.end()
                self.is_shared = False
        if self.seconds > self.options.timeout:
            at = [process.at[0] for process in self.running]
            self.end()
            self.output = f"killed: no end after {self.options.timeout} s, in {', '.join(at)}\n"
        return self.ended is not None

    def end(self) -> bool:
        """Nothing more is judged: processes that run are ended, and what they found is told as it was found. Says that
        all is there."""
        for process in self.running:
            process.kill()
            self.code = self.code if self.code not in (0, 1) else process.popen.returncode
            self._read(process)
        for name, record in self.found.items():
            if name not in self.done:
                merge(self.records, record)
        self.running, self.ended = [], time.monotonic()
        return True

    def _read(self, process: Process) -> None:
        for found in process.lines():
            if "error" in found:
                self.error = found["error"]
            elif "done" in found:
                self.done.add(found["done"])
                self.left.pop(found["done"], None)
            elif "left" in found:
                name = found.pop("left")
                self.found[name], self.left[name] = found.pop("record"), found
            else:
                merge(self.records, found)

    def _why_ended(self, process: Process) -> str | None:
        """None while it runs; "" where it went through its tests, else how it broke off."""
        self._read(process)
        if process.popen.poll() is None:
            if time.monotonic() - process.at[1] <= self.options.limit or not process.at[0]:
                return None
            why = f"did not return within {self.options.limit} s"
        elif process.popen.returncode in PYTEST_CODES:
            why = ""
        else:
            why = f"ended the process, {status(process.popen.returncode)}"
            if last_words(process.folder / "where"):
                why = "lost the device: in that process nothing runs on it any more"
        if why:
            process.kill()
        self._read(process)
        return why

    def _blames(self, process: Process, why: str) -> bool:
        """Whether there is a test that a process broke on, which is a violation from now on."""
        place = where(process.folder / "where")
        if place is None or place[0] in self.done or len(self.broken) >= MOST_BROKEN:
            return False
        last = last_words(process.folder / "where") or _last_frame(process.output)
        self.broken[place[0]] = {"number": place[1], "title": why, "received": last}
        subject = next(iter(self.records), (self.name,))[0]
        self.found[place[0]] = cut_short(subject, place[2], why, last)
        return True


def status(code: int) -> str:
    """What a process says with its exit status."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _is_gpu(device: str | None) -> bool:
    """Whether it is one by its name in JAX."""
    return device is not None and device.partition(":")[0] in ("cuda", "gpu", "rocm")


def _last_frame(output: str) -> str:
    """The frame of the traceback in which Python was, as faulthandler writes it; or the last line."""
    frames = re.findall(r'^  File "(.*)", line (\d+) in (\S+)$', output, re.MULTILINE)
    if frames:
        file, line, function = frames[0]
        return f"at {file}:{line} in {function}"
    said = [line for line in output.splitlines() if line.strip() and not re.fullmatch(r"[.FEsxX]+( +\[.*\])?", line)]
    return said[-1][:200] if said else "nothing was printed"


def _command(name: str, options, folder: Path) -> list[str]:
    """pytest on the suite, with nothing of the folder that it is called in; a failure is a page, no `assert`."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-c", str(folder / "pytest.ini"), "--rootdir", str(folder)]
    # By its path: for a module pytest reads tests/conftest.py of that folder first.
    command += [str(SUITE), "--confcutdir", str(SUITE)]
    command += ["-p", "no:cacheprovider", "-p", "no:randomly", "-W", "ignore", "-q"]
    # By its module, not by the entry point of an installation: a checkout on PYTHONPATH has none.
    command += ["-p", "no:moe_conformance", "-p", "conformance.run.plugin"]
    command += ["--assert", "plain"]  # else pytest compiles every module of ours again
    command += ["--subject", name, "--moe-records", str(folder / "records.jsonl"), "--moe-watch", str(folder / "where")]
    if options.examples:
        command += ["--moe-examples", str(options.examples)]
    if options.seed is not None:
        command += ["--moe-seed", str(options.seed)]
    for file in options.deviations:
        command += ["--moe-deviations", str(Path(file).resolve())]
    for stage in options.stage:
        command += ["--moe-stage", stage]
    if options.family:
        command += ["--moe-family", *options.family]
    if options.spec:
        command += ["--moe-spec", str(options.spec.resolve())]
    if options.tokens:
        command += ["--moe-tokens", str(options.tokens)]
    if options.device:
        command += ["--moe-device", options.device]
    if options.width:
        command += ["--moe-width", *map(str, options.width)]
    return command
