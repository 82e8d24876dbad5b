"""conformance, `run`: one pytest process for each subject, two at a time, their verdicts shown as they come."""

import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conformance.core.chosen import chosen
from conformance.core.usage import UsageError
from conformance.run.conclude import CASES
from conformance.run.deviations import read
from conformance.run.plugin import merge
from conformance.run.progress import Progress
from conformance.run.report import FAILING, assemble, durations, fact, is_told_elsewhere, matrix, not_judged, table
from conformance.run.subjects_by_name import BUILT_IN, DEFAULT, STARTED_FIRST, known_names, subject_named
from conformance.run.views import write_folder, write_views
from conformance.run.watch import where

EXIT_NEW = 1
WANTED = {name: name.partition("-")[0] for name in BUILT_IN if name != "reference"}
"""The package that a built-in subject needs."""


HOW = {
    name: f"it has an environment of its own, of Python {python}, which `make peers` builds (docs/{name}.md)"
    for name, python in (("maxtext", "3.12"), ("megatron", "3.11"))
}
"""Of packages that no extra of ours installs: what is needed."""


@dataclass
class Process:
    """A subject being judged, by one process after the other where one breaks off."""

    name: str
    folder: Path
    """Its files: records, output, where it is."""
    options: Any
    popen: subprocess.Popen | None = None
    started: float = field(default_factory=time.monotonic)
    records: dict = field(default_factory=dict)
    done: set = field(default_factory=set)
    """Names of the tests that ended."""
    broken: dict = field(default_factory=dict)
    """name of a test on which a process broke -> the arguments of `watch.broken`."""
    read_to: int = 0
    at: tuple[str, float] = ("", 0.0)
    """The test that runs, and since when."""
    ended: float | None = None
    error: str = ""
    """What the process says the user gave wrongly."""

    @property
    def output_file(self) -> Path:
        return self.folder / "output.txt"

    @property
    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - self.started

    @property
    def code(self) -> int:
        """The exit status of the last process."""
        assert self.popen is not None
        return self.popen.returncode

    def start(self) -> None:
        """Judge what is not done yet."""
        resume = self.folder / "resume.json"
        resume.write_text(json.dumps({"done": sorted(self.done), "broken": self.broken}))
        self.at = ("", time.monotonic())
        with self.output_file.open("w") as file:
            # A session of its own: what it starts ends with it.
            self.popen = subprocess.Popen(
                [*_command(self.name, self.options, self.folder), "--moe-resume", str(resume)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=JAX_KEEPS_PROGRAMS | os.environ,
            )

    def read(self) -> None:
        """Take in the records that came since the last call, and which test runs."""
        file = self.folder / "records.jsonl"
        if file.exists():
            with file.open() as lines:
                lines.seek(self.read_to)
                while (line := lines.readline()).endswith("\n"):
                    found = json.loads(line)
                    if "error" in found:
                        self.error = found["error"]
                    elif "done" in found:
                        self.done.add(found["done"])
                    else:
                        merge(self.records, found)
                    self.read_to = lines.tell()
        place = where(self.folder / "where")
        if place is not None and place[0] != self.at[0]:
            self.at = (place[0], time.monotonic())

    def ends(self) -> bool:
        """Whether it is through; a process that died or hung is followed by one for the rest."""
        assert self.popen is not None
        self.read()
        why = ""
        if self.popen.poll() is None:
            if time.monotonic() - self.at[1] > self.options.limit and self.at[0]:
                why = f"did not return within {self.options.limit} s"
            elif self.seconds > self.options.timeout:
                self._kill()
                self.output_file.write_text(f"killed: no end after {self.options.timeout} s\n")
                return True
            else:
                return False
        elif self.popen.returncode not in PYTEST_CODES:
            why = f"ended the process, {_status(self.popen.returncode)}"
        if not why:
            return True
        self._kill()
        self.read()
        place = where(self.folder / "where")
        if place is None or place[0] in self.done or len(self.broken) >= MOST_BROKEN:
            return True
        last = _last_frame(self.output_file.read_text())
        self.broken[place[0]] = {"number": place[1], "title": why, "received": last}
        (self.folder / "where").unlink()
        self.start()
        return False

    def _kill(self) -> None:
        """End the process and all that it started; first with a traceback of where it is."""
        assert self.popen is not None
        for sign in (signal.SIGABRT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.popen.pid, sign)
                self.popen.wait(timeout=3)
        self.popen.wait()


JAX_KEEPS_PROGRAMS = {
    "JAX_COMPILATION_CACHE_DIR": str(CASES.parent.resolve() / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
"""Most of the time of a JAX subject is compilation; a second run reads the programs of the first. Other subjects ignore
it, and so does one whose user has set these."""
PYTEST_CODES = (0, 1, 2, 3, 4, 5)
"""Exit statuses with which pytest ends by itself."""
MOST_BROKEN = 12
"""So many tests may break the process; then the subject is given up."""


def _status(code: int) -> str:
    """What a process says with its exit status."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _last_frame(output: str) -> str:
    """The frame of the traceback in which Python was, as faulthandler writes it; or the last line."""
    frames = re.findall(r'^  File "(.*)", line (\d+) in (\S+)$', output, re.MULTILINE)
    if frames:
        file, line, function = frames[0]
        return f"at {file}:{line} in {function}"
    said = [line for line in output.splitlines() if line.strip() and not re.fullmatch(r"[.FEsxX]+( +\[.*\])?", line)]
    return said[-1][:200] if said else "nothing was printed"


def run_subjects(options) -> int:
    """Judge the subjects of the command line; prints tables, failures and a matrix."""
    for file in options.deviations:
        read(Path(file))  # a usage error here, before anything runs
    chosen(family=options.family, file=options.spec, tokens=options.tokens, width=options.width)
    names = options.subjects or list(DEFAULT)
    installed = []
    for name in names:
        if (why := _missing(name)) is None:
            installed.append(name)
        elif options.subjects:
            raise UsageError(why)
        else:
            print(f"subject {name} is not judged: {why}")
    with tempfile.TemporaryDirectory(prefix="moe-conformance-") as folder:
        finished = _judge_all(installed, options, Path(folder))
        codes = [process.code for process in finished]
        report = _report(finished, options)
        for process in finished:
            if process.error:
                raise UsageError(process.error)
            if process.code not in (0, 1):
                print(f"\nsubject {process.name}: the run broke off, {_status(process.code)}")
                print(process.output_file.read_text()[-4000:])
    _print_pages(report, (*FAILING, *(["advice"] if options.advice else [])))
    print(matrix(report))
    if options.report:
        write_folder(report, options.report)
        print(f"\nwrote report.json, report.md, report.html and junit.xml to {options.report}")
    for file in write_views(report, options):
        print(f"\nwrote {file}")
    if options.propose_deviations:
        _propose(report, options.propose_deviations)
    failing = any(r["status"] in FAILING for r in report["requirements"])
    return EXIT_NEW if failing or any(code not in (0, 1) for code in codes) else 0


def _missing(name: str) -> str | None:
    """Why a subject cannot be judged here: a package that is not installed. A wrong name is a UsageError."""
    import importlib.util

    if name in WANTED:
        package = WANTED[name]
        how = f"; {HOW[package]}" if package in HOW else ""
        return None if importlib.util.find_spec(package) else f"{package} is not installed{how}"
    if name not in known_names() and not name.endswith(".py") and ":" not in name:
        subject_named(name)  # raises the usage error with the nearest name
    return None


def _judge_all(names: list[str], options, folder: Path) -> list[Process]:
    """Run the subjects, as many at once as there are cores, at most two; print each table as it is done."""
    first = {name: number for number, name in enumerate(STARTED_FIRST)}
    waiting, running, finished = sorted(names, key=lambda name: first.get(name, len(first))), [], []
    at_once = min(2, os.cpu_count() or 1)
    show = Progress()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                own = folder / str(len(finished) + len(running))
                own.mkdir()
                running.append(Process(name=waiting.pop(0), folder=own, options=options))
                running[-1].start()
                show.say(f"judging {running[-1].name} ...")
            time.sleep(0.1)
            for process in [each for each in running if each.ends()]:
                process.ended = time.monotonic()
                running.remove(process)
                finished.append(process)
                _complete(process)
                show.clear()
                if process.records:
                    records = list(process.records.values())
                    facts = {name: fact(records, name) for name in ("version", "where")}
                    subject = {"name": process.name} | facts
                    print(table(subject, records) + f" in {process.seconds:.0f} s\n", flush=True)
                    if options.durations:
                        print(durations(records) + "\n", flush=True)
            show.update([(p.name, len(p.records), p.seconds) for p in running])
    finally:
        for process in running:  # where the user breaks off
            process._kill()
        show.clear()
    return sorted(finished, key=lambda process: names.index(process.name))


def _command(name: str, options, folder: Path) -> list[str]:
    """pytest on the suite, with nothing of the folder that it is called in."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-c", str(folder / "pytest.ini"), "--rootdir", str(folder)]
    command += ["--pyargs", "conformance.suite", "-p", "no:cacheprovider", "-p", "no:randomly", "-W", "ignore", "-q"]
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


def _complete(process: Process) -> None:
    """Name what was not judged."""
    if process.records:
        subject = next(iter(process.records))[0]
        for r in not_judged(subject, process.records.values()):
            process.records[subject, r["id"]] = r


def _report(finished: list[Process], options) -> dict:
    subjects = [
        {
            "name": next(iter(p.records))[0],
            "subject": p.name,
            "version": fact(p.records.values(), "version"),
            "where": fact(p.records.values(), "where"),
            "seconds": round(p.seconds, 1),
        }
        for p in finished
        if p.records
    ]
    records = [r for p in finished for r in p.records.values()]
    environment = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "examples": options.examples,
        "seed": options.seed,
        "family": options.family,
        "spec": str(options.spec) if options.spec else None,
        "device": options.device,
    }
    complete = (
        not options.stage
        and all(p.code in (0, 1) for p in finished)
        and all(r["status"] != "not judged" for r in records)
    )
    return assemble(subjects, records, environment, complete=complete)


def _print_pages(report: dict, statuses: tuple[str, ...]) -> None:
    """The page of each fault that violates a requirement with one of these statuses."""
    failing = [r for r in report["requirements"] if r["status"] in statuses and "failure" in r]
    pages = [r["failure"]["page"] for r in failing if not is_told_elsewhere(r)]
    for page in pages:
        print(f"\n{'-' * 100}\n{page}")
    if pages:
        print(f"\n{'-' * 100}")


def _propose(report: dict, file: Path) -> None:
    """TOML for every new failure; a person fills in reason and link, until then it is refused."""
    witnesses = file.parent / "witnesses"
    lines = ["# Differences from the specification that we know about.", ""]
    for r in report["requirements"]:
        if r["status"] == "NEW":
            failure = r["failure"]
            lines += [
                "[[deviation]]",
                f'requirement = "{r["id"]}"',
                f"when = {json.dumps(failure['tags'])}",
                'kind = "bug"  # bug, by-design or numerics',
                'reason = ""',
                'link = ""',
            ]
            if failure["replay"]:
                witnesses.mkdir(parents=True, exist_ok=True)
                data = {"requirement": r["id"], "subject": r["subject"], "case": failure["case"]}
                (witnesses / f"{failure['replay']}.json").write_text(json.dumps(data, indent=1) + "\n")
                lines.append(f'witness = "{failure["replay"]}"')
            lines.append("")
    file.write_text("\n".join(lines))
    print(f"\nwrote {file}: fill in reason and link of each entry, and drop the tags that do not matter")
